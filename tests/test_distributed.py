"""Training over several processes: the same global batch gives the same losses, eta, beta' and
adapters as one process.

What must be equal is computed in float64 (float64.py), so that no machine's rounding decides. The
negative controls are off by far more.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from float64 import run_in_float64
from processes import run_script, together, torchrun
from torch.utils import backend_registration
from toy_ranking import write_folder

import train_dpo
import train_sft
from hanorec.base import distributed
from hanorec.base.distributed import rank, share, sum_gradients, usable_device
from hanorec.base.errors import InputError
from hanorec.run import run

DIGIT = 1.5e-6  # the log has 6 decimals: where it rounds, a hair makes a difference of one
WEIGHTS = 1e-10  # Adam's eps is 1e-8: 1e-16 becomes at most 1e-8 of a step, which is 1e-3
# 19 rows in global batches of 8, 8 and 3: on 2 and 4 ranks the shares are uneven, and on 4 ranks
# one of them is empty.
DATA = ["--users-to", "0.8", "--lora-dropout", "0"]
DPO = ["--hardness", "standardised", "--sigma", "0.01", "--noise-ranks", "same"]
# A step read otherwise: what 2 ranks have of a micro-batch of 4 is a micro-batch of 8.
OTHER = [
    "--rewards", "noisy", "--eta-over", "micro", "--noise-draw", "forward", "--eta", "pair",
    "--kept", "inner", "--log-kl", "true",
]


@pytest.fixture(scope="module")
def train(data, checkpoints, sft, tmp_path_factory):
    """train(script, n, *flags, change=...) -> (folder, log) of the script on n ranks, in float64.

    Each distinct call runs once.
    """
    @cache
    def start(script, n, *flags, family="qwen2_5_vl", change=None):
        out = tmp_path_factory.mktemp("ranks") / "out"
        argv = ["--model", checkpoints[family], "--data", data, "--out", out]
        argv += [*toy.SHORT, *toy.STEPS, *DATA]
        if script is train_dpo:
            argv += DPO
            argv += ["--sft", sft] if family == "qwen2_5_vl" else []  # it is of one family
        argv = [str(word) for word in [*argv, *flags]]
        changes = [change] if change is not None else []
        assert together(n, run_in_float64, script.__name__, argv, *changes) == [0] * n
        return out, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    return start


def apart(one, other):
    """Largest difference of what two runs logged, and of their adapters."""
    (folder, log), (other_folder, other_log) = one, other
    assert len(log) == len(other_log) > 1 and log[0].keys() == other_log[0].keys()
    numbers = 0.0
    for a, b in zip(log, other_log, strict=True):
        for key, value in a.items():
            if value is not None:
                numbers = max(numbers, abs(value - b[key]))
    return numbers, toy.furthest(folder, other_folder)


SHARDED = ["--shard", "true"]
ONE_PART = ["--micro-batch", "8", "--accumulation", "1"]


def test_a_weight_without_a_gradient_keeps_none(monkeypatch):
    """As on two ranks that have the same gradients, of one weight of two."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda total: total.mul_(2))
    weights = [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    weights[1].grad = torch.tensor([1.0, -4.0])
    assert sum_gradients(weights, 0.5) == (1.0,)
    assert weights[0].grad is None and weights[1].grad.tolist() == [2.0, -8.0]


@pytest.mark.parametrize("n,flags", [(2, []), (4, []), (2, SHARDED), (4, [*ONE_PART, *SHARDED])])
def test_sft_is_the_same_on_any_number_of_ranks(train, n, flags):
    numbers, weights = apart(train(train_sft, 1), train(train_sft, n, *flags))
    assert numbers < DIGIT and weights < WEIGHTS


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize("n,flags", [(2, []), (4, ONE_PART), (4, SHARDED)])
def test_dpo_is_the_same_on_any_number_of_ranks(train, n, flags):
    """eta and beta' are among the logged numbers; the noise is one draw for all."""
    numbers, weights = apart(train(train_dpo, 1), train(train_dpo, n, *flags))
    assert numbers < DIGIT and weights < WEIGHTS


@pytest.mark.equation("HN-7")
def test_another_step_is_the_same_on_two_ranks(train):
    numbers, weights = apart(train(train_dpo, 1, *ONE_PART, *OTHER), train(train_dpo, 2, *OTHER))
    assert numbers < DIGIT and weights < WEIGHTS


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_the_other_families_can_be_sharded(train, family):
    one = train(train_dpo, 1, family=family)
    numbers, weights = apart(one, train(train_dpo, 2, *SHARDED, family=family))
    assert numbers < DIGIT and weights < WEIGHTS


def no_sum():
    run.sum_gradients = lambda weights, *numbers: numbers


def mean():
    total = run.sum_gradients

    def half(weights, *numbers):
        numbers = total(weights, *numbers)
        for weight in weights:
            weight.grad /= 2
        return numbers

    run.sum_gradients = half


def a_share_too_large():
    total = run.sum_gradients

    def off(weights, *numbers):
        if rank() == 0:
            for weight in weights:
                weight.grad *= 1 + 1e-4
        return total(weights, *numbers)

    run.sum_gradients = off


def own_rewards():
    def of_share(eta):
        return lambda R, *rest: eta(R[share(len(R))], *rest)

    train_dpo.ETAS = {name: of_share(eta) for name, eta in train_dpo.ETAS.items()}


def test_a_wrong_reduction_is_noticed(train):
    """Gradients of the own share alone; their mean, which Adam hides from the weights but not from
    the norm; one rank's share too large by 1e-4; eta of the own share alone.
    """
    numbers, weights = apart(train(train_sft, 1), train(train_sft, 2, change=no_sum))
    assert numbers > 1000 * DIGIT and weights > 1000 * WEIGHTS
    numbers, _ = apart(train(train_sft, 1), train(train_sft, 2, change=mean))
    assert numbers > 1000 * DIGIT
    numbers, weights = apart(train(train_sft, 1), train(train_sft, 2, change=a_share_too_large))
    assert numbers > 10 * DIGIT and weights > 1000 * WEIGHTS
    even = ["--users-to", "0.67"]  # 16 rows: 4 pairs on each rank, enough for an eta
    one, log = train(train_dpo, 1, *even)[1], train(train_dpo, 2, *even, change=own_rewards)[1]
    assert max(abs(a["eta"] - b["eta"]) for a, b in zip(one, log, strict=True)) > 1000 * DIGIT


@pytest.mark.equation("HN-9")
def test_each_rank_has_noise_of_its_own_unless_told_otherwise(train):
    numbers, weights = apart(train(train_dpo, 2), train(train_dpo, 2, "--noise-ranks", "own"))
    assert numbers > 10 * DIGIT and weights > 1000 * WEIGHTS
    first = train(train_dpo, 1), train(train_dpo, 1, "--noise-ranks", "own")
    assert apart(*first) == (0, 0)  # a single process has one stream


# ---- ranks that are killed, stopped, or fail ----


def killed_in_its_fourth_step():
    check = run.check_finite

    def check_or_die(total, norm, step, users):
        if step == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        check(total, norm, step, users)

    run.check_finite = check_or_die


@pytest.mark.parametrize("script,flags", [
    (train_sft, []), (train_dpo, ["--sigma", "0.01", "--shard", "true"]),
])
def test_a_killed_rank_ends_the_run_which_goes_on_bit_by_bit(
    script, flags, data, checkpoints, sft, tmp_path
):
    """With dropout and noise, so that the streams of both ranks have to be put back; on another
    number of ranks it is refused.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *toy.STEPS]
    argv += ["--epochs", "2", "--save-every", "1", *flags]
    argv += ["--sft", sft] if script is train_dpo else []

    def on_two_ranks(out, *changes):
        words = [str(word) for word in [*argv, "--out", out]]
        return together(2, run_script, script.__name__, words, *changes)

    assert on_two_ranks(whole) == [0, 0]
    assert on_two_ranks(killed, killed_in_its_fourth_step) == [1, -signal.SIGKILL]
    assert list(killed.glob("checkpoint-*"))
    with pytest.raises(InputError, match="2 processes, this one has 1.*--nproc-per-node 2"):
        script.main([str(word) for word in [*argv, "--out", killed]])
    assert on_two_ranks(killed) == [0, 0]
    assert toy.furthest(whole, killed) == 0
    assert (whole / "log.jsonl").read_text() == (killed / "log.jsonl").read_text()


def stopped_before_the_adapter():
    run.save_policy = lambda *arguments, **named: os._exit(3)


def slow_to_load():
    load = run.load_checkpoint

    def slow(*arguments):
        time.sleep(2 * rank())
        done, facts = load(*arguments)
        assert done > 0
        return done, facts

    run.load_checkpoint = slow


def test_a_run_stopped_after_its_last_step_waits_for_its_slowest_rank(data, checkpoints, tmp_path):
    """Rank 0 has nothing left to do but write the adapter and delete the checkpoint that the other
    is about to read.
    """
    out = tmp_path / "out"
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, "--out", out]
    argv = [str(word) for word in [*argv, *toy.SHORT, *toy.STEPS, "--save-every", "1"]]
    assert together(2, run_script, "train_sft", argv, stopped_before_the_adapter) == [3, 3]
    assert together(2, run_script, "train_sft", argv, slow_to_load) == [0, 0]
    assert (out / "adapter_config.json").exists() and not list(out.glob("checkpoint-*"))


BROKEN = """
import train_sft
from hanorec.base import command
from hanorec.base.distributed import rank
from hanorec.base.errors import InputError
from hanorec.run import run

def check(total, norm, step, users):
    if step == 1 and rank() == 1:
        raise InputError("step 1 is broken here")

run.check_finite = check
if __name__ == "__main__":
    command.run(train_sft.main)
"""


def test_torchrun_trains_and_speaks_with_one_voice(data, checkpoints, tmp_path):
    """As a user starts it: a run; bad input, which every rank meets; and a step that only one rank
    finds broken.
    """
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *toy.STEPS]
    code, out, err = torchrun(2, "train_sft.py", *argv, "--out", tmp_path / "out")
    assert code == 0, err
    assert out.count("wrote the adapter") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["ranks"] == 2

    bad = ["--sft", tmp_path / "none", "--out", tmp_path / "bad"]
    code, out, err = torchrun(2, "train_sft.py", *argv, *bad)
    assert code != 0 and err.count("error: ") == 1 and str(tmp_path / "none") in err

    (tmp_path / "broken.py").write_text(BROKEN)
    code, out, err = torchrun(2, tmp_path / "broken.py", *argv, "--out", tmp_path / "half")
    assert code != 0
    assert re.findall("^error: .*", err, re.MULTILINE) == ["error: step 1 is broken here"]
    assert not (tmp_path / "half" / "adapter_config.json").exists()


# ---- evaluation, and BR-MRS, as users start them ----


def test_what_a_sharded_run_wrote_is_evaluated_alike_by_one_process_and_by_sharded_ones(
    train, data, checkpoints, tmp_path
):
    """The adapter states what it stands on; were the sharded base's fingerprint another, it would
    be refused. 24 users on 5 ranks.
    """
    adapter, _ = train(train_sft, 2, *SHARDED)
    shutil.copytree(data, tmp_path / "data")  # it is given candidate sets
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", tmp_path / "data"]
    argv += ["--adapter", adapter, "--neighbors", "20", "--similarity", "true", *toy.SHORT]
    reports = []
    for n, flags in [(1, []), (5, SHARDED)]:
        words = [str(word) for word in [*argv, "--out", tmp_path / str(n), *flags]]
        assert together(n, run_in_float64, "evaluate", words) == [0] * n
        reports.append(json.loads((tmp_path / str(n) / "metrics.json").read_text()))
    one, five = reports
    for kind in ("random", "hard"):
        assert one["sets"][kind]["users"] == five["sets"][kind]["users"]
        scores = [np.array(report["sets"][kind]["scores"][str(adapter)]) for report in reports]
        assert np.abs(scores[0] - scores[1]).max() < 1e-10 and np.ptp(scores[0]) > 1
    after = [np.array(report["similarity"][str(adapter)]["after"]) for report in reports]
    assert np.abs(after[0] - after[1]).max() < 1e-10


def test_torchrun_evaluates_and_trains_brmrs(data, checkpoints, tmp_path):
    """As a user starts them; rank 0 alone writes and speaks. More ranks than users; a batch of 179
    pairs, and one of a single pair.
    """
    shutil.copytree(data, tmp_path / "data")
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", tmp_path / "data", *toy.SHORT]
    argv += ["--users-to", "0.1", "--sets", "random", "--out", tmp_path / "test"]
    code, out, err = torchrun(4, "evaluate.py", *argv)
    assert code == 0 and out.count("random candidates") == 1, err
    report = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert len(report["sets"]["random"]["users"]) == 2

    write_folder(tmp_path / "ranking")
    argv = ["--data", tmp_path / "ranking", "--out", tmp_path / "brmrs", "--device", "cpu"]
    argv += ["--epochs", "2", "--batch", "179", "--dim", "8"]
    code, out, err = torchrun(2, "train_brmrs.py", *argv)
    assert code == 0 and out.count("best epoch") == 1, err
    assert (tmp_path / "brmrs" / "metrics.json").exists()


# ---- devices ----


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(name, monkeypatch):
    """A machine with one GPU, simulated: four ranks of it, and one. Every rank refuses alike."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for local_rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises(InputError) as refused:
            usable_device(name)
        assert str(refused.value) == (
            f"--device {name}: 4 processes on this machine, which has 1 GPU, expected a GPU for "
            "each; start torchrun with --nproc-per-node 1, or give --device cpu"
        )
        assert usable_device("cpu") == torch.device("cpu")
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(device) or torch.zeros(()))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    usable_device(name)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    usable_device(name)
    assert asked == ["cuda:0", "cuda:3"]


SIMULATION = """
import os
import processes
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

def backward():
    x = torch.ones(3, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]

def forked():
    child = os.fork()
    if child == 0:
        try:
            backward()
        except RuntimeError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("simulated")
    backward()
    assert forked() == 7
    processes.PRELOADED[:] = ["torch"]
    assert processes.in_a_child(backward) == 0
    assert processes.together(2, backward) == [0, 0]
"""


def test_children_can_train_where_autograds_device_threads_run(tmp_path):
    """As on a machine with a GPU: once another device than the CPU is registered, a backward starts
    threads for it, and a fork of that process can run none. Control: such a fork.
    """
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} registers no device from Python")
    script = tmp_path / "simulation.py"
    script.write_text(SIMULATION)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_no_test_forks_this_process():
    """conftest.py sees to it, with or without a GPU."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 86
