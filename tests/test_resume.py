"""A run that is killed, at any moment, goes on to the very result of a run that never was: weights,
log and noise, to the bit.
"""

import builtins
import errno
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time

import pytest
import torch
import toy
from processes import in_a_child

import train_dpo
import train_sft
from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import sha256, write_json
from hanorec.base.lock import unlock_folder
from hanorec.run import run as training_run
from hanorec.run.checkpoint import generators, load_checkpoint, save_checkpoint
from hanorec.run.log import append_log
from hanorec.run.record import open_run

# 9 steps; dropout and noise on
LONG = [
    "--targets-per-user", 1, "--epochs", 3, "--micro-batch", 4, "--accumulation", 2,
    "--learning-rate", 1e-3,
]


def results(out):
    """What must be equal: adapter, log, and whatever else lies there but for times and folder
    names.
    """
    return (
        sha256(out / "adapter_model.safetensors"), (out / "log.jsonl").read_bytes(),
        sorted(p.name for p in out.iterdir()),
    )


# ---- the whole scripts, killed by the clock ----


@pytest.mark.long  # any point; the next test kills between all calls that write
@pytest.mark.parametrize(("main", "kills", "flags"), [
    (train_sft.main, 6, []),
    (train_dpo.main, 20, ["--eta", "ema", "--save-every", 2]),
    (train_dpo.main, 2, ["--plain", "true"]),
], ids=["sft", "dpo", "plain"])
def test_killed_at_random_points(data, checkpoints, sft, tmp_path, main, kills, flags):
    """`kills` SIGKILLs at random moments of runs that are started again and again; every one ends
    as the run that was left alone.
    """
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *LONG]
    argv += ["--save-every", 1, *flags]
    argv += ["--sft", sft] if main is train_dpo.main else []

    def command(out):
        return [str(word) for word in [*argv, "--out", out]]

    in_a_child(os.getpid)  # the first child waits for the server
    begin = time.monotonic()
    assert in_a_child(main, command(tmp_path / "whole")) == 0
    took = time.monotonic() - begin
    expected, rng, killed, number = results(tmp_path / "whole"), random.Random(5), 0, 0
    while killed < kills:
        out, number = tmp_path / f"run{number}", number + 1
        for _ in range(200):
            if (out / "adapter_config.json").exists():
                # killed after the result was whole: a finished run, which is left as it is
                with pytest.raises(InputError, match="holds a finished run"):
                    main(command(out))
                break
            status = in_a_child(main, command(out), kill_after=rng.uniform(0, took))
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
            if status == 0:
                break
        assert results(out) == expected


# ---- the checkpoint itself, killed or failing between any two system calls ----


class Loop:
    """The smallest training loop with all the state that ours have: weights, Adam, dropout, a
    generator of its own, a running mean, a log.
    """

    def __init__(self, out, steps=4):
        self.out, self.steps = out, steps

    def run(self):
        out = open_run(self.out, {"steps": self.steps}, "result.json")
        write_json(out / "run.json", {"settings": {"steps": self.steps}})
        torch.manual_seed(1)
        weights = [torch.randn(3, 2, requires_grad=True), torch.zeros(2, requires_grad=True)]
        optimizer = torch.optim.AdamW(weights, lr=0.1)
        own = torch.Generator().manual_seed(2)
        sources = generators(torch.device("cpu"), own=own)
        done, carried = load_checkpoint(out, weights, optimizer, sources)
        mean = carried.get("mean", 0.0)
        for step in range(done, self.steps):
            x = torch.nn.functional.dropout(torch.randn(5, 3, generator=own), 0.5)
            loss = (x @ weights[0] + weights[1] - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = 0.9 * mean + 0.1 * loss.item()
            append_log(out / "log.jsonl", {"step": step, "loss": loss.item(), "mean": mean})
            if (step + 1) % 2 == 0:
                save_checkpoint(out, step + 1, weights, optimizer, sources, mean=mean)
        write_json(out / "result.json", [w.tolist() for w in weights])
        unlock_folder(out)

    def found(self):
        return (self.out / "result.json").read_text(), (self.out / "log.jsonl").read_text()


TOUCHING = [
    (os, "replace"),
    (os, "fsync"),
    (os, "chmod"),
    (os, "fdopen"),
    (os, "truncate"),
    (os, "mkdir"),
    (builtins, "open"),
    (tempfile, "mkstemp"),
    (shutil, "rmtree"),
]


def at_call(n, act):
    """Let the n-th of the calls that touch files do `act` instead."""
    count = iter(range(10**9))

    def watched(real):
        def call(*args, **kwargs):
            if next(count) == n:
                act()
            return real(*args, **kwargs)
        return call

    for module, name in TOUCHING:
        setattr(module, name, watched(getattr(module, name)))


def killed_at(n, loop):
    at_call(n, lambda: os.kill(os.getpid(), signal.SIGKILL))
    loop.run()


def test_killed_between_any_two_calls(tmp_path):
    """From the first call that touches a file to the last one: killed just before it, started
    again, and ended as if nothing had been.
    """
    whole = Loop(tmp_path / "whole")
    assert in_a_child(whole.run) == 0
    for n in range(1000):
        loop = Loop(tmp_path / f"{n}")
        status = in_a_child(killed_at, n, loop)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if not (loop.out / "result.json").exists():
            assert in_a_child(loop.run) == 0
        assert loop.found() == whole.found(), n
        assert not list(loop.out.glob(".*"))
    assert n > 40  # there were so many calls


NO_SUCH_CALL = 5


def failing_at(n, fault, loop):
    failed = []

    def fail():
        failed.append(n)
        raise OSError(fault, os.strerror(fault), "checkpoint")

    at_call(n, fail)
    try:
        run(loop.run)
    except SystemExit as stop:
        os._exit(stop.code)
    os._exit(0 if failed else NO_SUCH_CALL)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO], ids=["no space", "I/O error"])
def test_a_failing_disk_is_reported_and_loses_nothing(tmp_path, fault):
    """Each call fails in turn: exit code 2 and one line, and the next start ends as a run that
    never failed.
    """
    whole = Loop(tmp_path / "whole")
    assert in_a_child(whole.run) == 0
    for n in range(1000):
        loop = Loop(tmp_path / f"{n}")
        status = in_a_child(failing_at, n, fault, loop)
        if status == NO_SUCH_CALL:
            break
        assert status in (0, 2), n  # 0: what failed was the making of a folder that is there
        if not (loop.out / "result.json").exists():
            assert in_a_child(loop.run) == 0
        assert loop.found() == whole.found(), n
    assert n > 40


def counting_checkpoints(loop, path):
    """Run; write how many whole checkpoints lie there at each call from the second's writing on."""
    counts, writing = [], []
    save = save_checkpoint

    def watched_save(out, step, *args, **kwargs):
        writing.append(step)
        save(out, step, *args, **kwargs)

    def watched(real):
        def call(*args, **kwargs):
            if len(writing) > 1:
                found = [{f.name for f in p.iterdir()} for p in loop.out.glob("checkpoint-*")]
                counts.append(found.count({"state.safetensors", "state.json"}))
            return real(*args, **kwargs)
        return call

    globals()["save_checkpoint"] = watched_save
    for module, name in TOUCHING:
        setattr(module, name, watched(getattr(module, name)))
    loop.run()
    path.write_text(json.dumps(counts))


def test_a_checkpoint_is_deleted_only_when_the_next_is_whole(tmp_path):
    """At every call of the second checkpoint's writing a whole one lies there."""
    assert in_a_child(counting_checkpoints, Loop(tmp_path / "run"), tmp_path / "counts") == 0
    counts = json.loads((tmp_path / "counts").read_text())
    assert len(counts) > 20 and min(counts) >= 1 and max(counts) == 2


# ---- what is refused ----


@pytest.fixture
def stopped(tmp_path):
    """A run with a checkpoint after its 2nd step and no result."""
    loop = Loop(tmp_path / "run", steps=3)
    loop.run()
    (loop.out / "result.json").unlink()
    return loop


def test_other_settings_are_refused(stopped):
    stopped.steps = 4
    before = {p: p.read_bytes() for p in stopped.out.rglob("*") if p.is_file()}
    with pytest.raises(
        InputError,
        match="run: holds a stopped run with steps = 3, this command has 4; give the same",
    ):
        stopped.run()
    assert {p: p.read_bytes() for p in stopped.out.rglob("*") if p.is_file()} == before


def test_a_finished_run_is_refused(stopped):
    stopped.run()
    with pytest.raises(InputError, match="holds a finished run"):
        stopped.run()
    assert not list(stopped.out.glob("checkpoint-*"))  # of no use any more


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        Loop(tmp_path).run()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(("damage", "words"), [
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "its hash is not the one in state.json"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"), "its hash is not the one in state.json"),
    (lambda p: p.unlink(), "cannot be read"),
    (lambda p: (p.parent / "state.json").write_text("{"), "state.json: not readable"),
])
def test_a_damaged_checkpoint_is_refused(stopped, damage, words):
    damage(next(stopped.out.glob("checkpoint-*")) / "state.safetensors")
    with pytest.raises(InputError, match=words):
        stopped.run()


@pytest.mark.parametrize(
    "change",
    [lambda state: state.pop("step"), lambda state: state.update(facts=[]),
     lambda state: state.update(log_bytes="9")],
)
def test_an_edited_state_is_refused(stopped, change):
    path = next(stopped.out.glob("checkpoint-*")) / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(
        InputError, match="state.json: step = .*, facts = .*, log_bytes = .*, expected"
    ):
        stopped.run()


@pytest.mark.parametrize(
    "lose", [lambda log: log.unlink(), lambda log: log.write_text("")], ids=["deleted", "emptied"]
)
def test_a_lost_log_is_refused(stopped, lose):
    """Going on would leave a gap in it."""
    lose(stopped.out / "log.jsonl")
    with pytest.raises(
        InputError, match="log.jsonl: 0 bytes, expected at least .*: lines are lost"
    ):
        stopped.run()


def test_another_kind_of_device_is_refused(stopped):
    """As if the run had been begun on a GPU, whose dropout has a generator of its own."""
    weights = [torch.zeros(3, 2, requires_grad=True), torch.zeros(2, requires_grad=True)]
    sources = generators(torch.device("cpu"), own=torch.Generator(), cuda=torch.Generator())
    with pytest.raises(
        InputError,
        match=(
            "holds the random generators .*'own', 'torch'.*, this run has .*'cuda', 'own', 'torch'"
        ),
    ):
        load_checkpoint(stopped.out, weights, torch.optim.AdamW(weights), sources)


def test_another_model_is_refused(stopped):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    with pytest.raises(InputError, match="weights have other shapes"):
        load_checkpoint(
            stopped.out, [torch.zeros(1)], optimizer,
            generators(torch.device("cpu"), own=torch.Generator()),
        )


def test_the_log_has_no_line_twice(stopped):
    """Three steps were done, the checkpoint is of the second: the third line goes and comes again.
    """
    assert len((stopped.out / "log.jsonl").read_text().splitlines()) == 3
    stopped.run()
    assert [
        json.loads(line)["step"] for line in (stopped.out / "log.jsonl").read_text().splitlines()
    ] == [0, 1, 2]


def exit_at_a_pickle(event, _):
    if event == "pickle.find_class":
        os._exit(7)


def stopped_after(step):
    """In a child: end it once that step is in the log."""
    append = training_run.append_log

    def then_stop(path, record):
        append(path, record)
        if record["step"] == step:
            os._exit(3)

    training_run.append_log = then_stop


def watched_for_pickles(argv, stop_after=None):
    sys.addaudithook(exit_at_a_pickle)
    if stop_after is not None:
        stopped_after(stop_after)
    train_dpo.main(argv)


def unpickle():
    sys.addaudithook(exit_at_a_pickle)
    pickle.loads(pickle.dumps(errno.errorcode.get))


def test_nothing_is_pickled(checkpoints, data, tmp_path):
    """A run that is stopped and goes on unpickles nothing (the interpreter itself would say so),
    and leaves safetensors and JSON alone.
    """
    out = tmp_path / "out"
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *LONG]
    argv = [str(word) for word in [*argv, "--save-every", 1, "--out", out]]
    for stop_after, status in [(4, 3), (None, 0)]:
        assert in_a_child(watched_for_pickles, argv, stop_after) == status
        kinds = {p.suffix for p in out.rglob("*") if p.is_file()} - {".md"}  # the adapter's card
        assert kinds == {".safetensors", ".json", ".jsonl", ".tsv"}
    assert in_a_child(unpickle) == 7  # the check can fail


def sft_stopped_after(step, argv):
    stopped_after(step)
    train_sft.main(argv)


def test_changed_inputs_are_refused(data, checkpoints, tmp_path):
    """The settings name the same folders, but the titles in one of them have changed: the run does
    not go on.
    """
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", folder, *toy.SHORT, *LONG]
    argv = [str(word) for word in [*argv, "--save-every", 1, "--out", tmp_path / "out"]]
    assert in_a_child(sft_stopped_after, 2, argv) == 3
    path = folder / "Posterland_titles.csv"
    old = path.read_text()
    path.write_text(old.replace(" Again", " Once More"))
    changed = "run.json: this run was started with data of hash .*, expected no change"
    with pytest.raises(InputError, match=changed):
        train_sft.main(argv)
    path.write_text(old)
    train_sft.main(argv)
    assert (tmp_path / "out" / "adapter_config.json").exists()
