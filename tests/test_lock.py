"""One process at a time in an output folder, whoever ends it and however. Real processes, really
killed.
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import toy
from processes import ON_CPU, ROOT, in_a_child, start, torchrun

import evaluate
import train_brmrs
import train_dpo
from hanorec import demo, export
from hanorec.base import lock
from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder
from hanorec.run.record import open_run
from hanorec.studies import ablation, brmrs_ablation

LONG = ["--targets-per-user", "1", "--micro-batch", "4", "--accumulation", "1", "--epochs", "99"]


def hold(folder, ready):
    claim_folder(folder)
    Path(ready).touch()
    time.sleep(300)


def appears(path, within=120):
    """Wait for a file."""
    end = time.monotonic() + within
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.01)


@contextmanager
def holding(folder, ready):
    """A process that holds the folder until it is killed."""
    child = start(os.devnull, hold, str(folder), str(ready))
    appears(ready)
    try:
        yield child
    finally:
        child.kill()
        child.join()


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / out."""
    with holding(tmp_path / "out", tmp_path / "ready") as child:
        yield child


def claimed(folder):
    claim_folder(folder)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- the lock itself ----


def test_a_second_process_is_refused_and_the_first_is_named(holder, tmp_path):
    """By claim_folder and by open_run; the folder stays as it is."""
    out = tmp_path / "out"
    before = (out / lock.NAME).read_text()
    message = rf"out: process {holder.pid} on .* is at work in it, expected nobody; .*--out"
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            claim_folder(out)
        with pytest.raises(InputError, match=message):
            open_run(out, {}, "result")
    assert names(out) == [lock.NAME] and (out / lock.NAME).read_text() == before
    assert json.loads(before)["process"] == holder.pid


def test_a_killed_holder_holds_nothing(holder, tmp_path):
    """SIGKILL: its file stays, its lock does not. The next one takes the folder over."""
    out = tmp_path / "out"
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert names(out) == [lock.NAME]
    claim_folder(out)
    assert json.loads((out / lock.NAME).read_text())["process"] == os.getpid()
    assert in_a_child(claimed, out) == 1
    lock.unlock_folder(out)
    assert names(out) == [] and in_a_child(claimed, out) == 0


def test_the_same_process_may_ask_again(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        claim_folder(out)
        claim_folder(tmp_path / "other" / ".." / "out")  # the same by another name
    os.rename(out, tmp_path / "moved")
    claim_folder(out)  # a new folder, where the old one was
    assert names(out) == [lock.NAME]
    lock.unlock_all()
    assert names(out) == [] and names(tmp_path / "moved") == [lock.NAME]


def test_where_a_look_fails_the_folder_is_left_as_it_was(tmp_path):
    """A folder of something else is not even touched, and not kept from others."""
    (tmp_path / "thesis.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(InputError, match="not an empty folder"):
            claim_folder(tmp_path)
        assert names(tmp_path) == ["thesis.txt"]
    (tmp_path / lock.NAME).write_text("left behind")
    with pytest.raises(InputError, match="not an empty folder"):
        claim_folder(tmp_path)
    assert (tmp_path / lock.NAME).read_text() == "left behind"
    lock.lock_folder(tmp_path)
    lock.unlock_folder(tmp_path)


def test_a_command_lets_go_whatever_ends_it(tmp_path, capsys):
    def fails():
        claim_folder(tmp_path / "out")
        raise InputError("a wrong title")

    with pytest.raises(SystemExit):
        run(fails)
    assert names(tmp_path / "out") == [] and "a wrong title" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_aloud(tmp_path, monkeypatch, capsys, fault):
    def flock(file, how):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(fcntl, "flock", flock)
    claim_folder(tmp_path / "out")
    assert f"note: {tmp_path / 'out'}: its file system has no locks" in capsys.readouterr().out
    lock.unlock_folder(tmp_path / "out")


def test_any_other_fault_of_the_disk_is_none_of_the_lock(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        claim_folder(tmp_path / "out")


def test_a_lock_on_a_deleted_file_is_worth_nothing(tmp_path, monkeypatch):
    """Between opening and locking, the first process may end and delete the file; then a third one
    may make it anew. Whoever locked the deleted one opens again.
    """
    path, real, deleted = tmp_path / lock.NAME, fcntl.flock, []

    def flock(file, how):
        if not deleted:
            deleted.append(path.unlink())
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    claim_folder(tmp_path)
    assert deleted and path.exists() and in_a_child(claimed, tmp_path) == 1
    lock.unlock_folder(tmp_path)


# ---- commands ----


def command(script, *argv):
    """A script as a user starts it, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, argv)],
        cwd=ROOT,
        env=os.environ | ON_CPU | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def grows(log, lines, process):
    """Wait until the process has written so many lines."""
    end = time.monotonic() + 300
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_one_command_twice(data, checkpoints, tmp_path):
    """The second is refused with the first's number, before it loads anything; the first goes on
    and logs each step once. Killed, it lets the folder go.
    """
    out = tmp_path / "out"
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *LONG]
    argv += ["--save-every", 1, "--out", out]
    first = command("train_sft.py", *argv)
    try:
        appears(out / lock.NAME)
        while not (out / lock.NAME).read_text():
            time.sleep(0.01)
        second = command("train_sft.py", *argv)
        assert second.wait(timeout=300) == 2
        error = second.stderr.read().splitlines()[-1]
        assert f"error: {out}: process {first.pid} on " in error and "(train_sft.py)" in error
        grows(out / "log.jsonl", 3, first)
    finally:
        first.kill()
        first.wait()
    lines = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines == list(range(len(lines)))
    lock.lock_folder(out)  # the next one may have it; tests of resuming go on with such runs
    lock.unlock_folder(out)


def test_a_finished_run_lets_go(sft):
    """Nothing of the lock is left in the folder."""
    assert lock.NAME not in names(sft)


def test_on_two_ranks_the_first_holds_it(holder, data, checkpoints, tmp_path):
    """One message, of rank 0."""
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *toy.STEPS]
    code, _, errors = torchrun(2, ROOT / "train_sft.py", *argv, "--out", tmp_path / "out")
    assert code != 0
    assert errors.count(f"process {holder.pid} on ") == 1


@pytest.mark.parametrize("script", [evaluate, train_dpo, train_brmrs])
def test_every_command_asks(holder, data, checkpoints, tmp_path, script):
    argv = ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(data), "--device", "cpu"]
    with pytest.raises(InputError, match=f"process {holder.pid} on "):
        script.main([*argv, "--out", str(tmp_path / "out")])
    assert names(tmp_path / "out") == [lock.NAME]


def test_every_study_asks(holder, data, checkpoints, tmp_path, sft):
    """Demo, export and the studies, in this process."""
    out, model = str(tmp_path / "out"), str(checkpoints["qwen2_5_vl"])
    commands = [
        (demo.main, ["--out", out]),
        (export.main, ["--model", model, "--adapter", str(sft), "--out", out]),
        (brmrs_ablation.main, ["--data", str(data), "--model", model, "--out", out]),
    ]
    for main, argv in commands:
        with pytest.raises(InputError, match=f"process {holder.pid} on "):
            main(argv)
    seed = tmp_path / "ablation" / data.resolve().name / "seed-2025"  # it locks a seed at a time
    with holding(seed, tmp_path / "other") as child:
        argv = ["--data", str(data), "--model", model, "--out", str(tmp_path / "ablation")]
        with pytest.raises(InputError, match=f"process {child.pid} on "):
            ablation.main(argv)
