"""Training over several processes: the same global batch gives the same losses, eta, beta' and adapters as one process.

float32 sums in another order differ in the seventh digit; Adam's quotient m / sqrt v passes that on where gradients are small. So logged
numbers (6 decimals) have to agree within 2e-5, weights within 2e-5 at a learning rate of 1e-3. The negative controls are off by far more.
"""

import json
import os
import re
import shutil
import signal
import time
from functools import cache

import numpy as np
import pytest
import torch
import toy
from processes import together, torchrun
from toy_ranking import write_folder

import evaluate
import train_dpo
import train_sft
from hanorec.base.distributed import rank
from hanorec.base.errors import InputError
from hanorec.run.run import check_finite

NUMBERS = 2e-5
WEIGHTS = 2e-5
# 19 rows in global batches of 8, 8 and 3: on 2 and 4 ranks the shares are uneven, and on 4 ranks one of them is empty.
DATA = ["--users-to", "0.8", "--lora-dropout", "0"]
DPO = ["--hardness", "standardised", "--sigma", "0.01", "--noise-ranks", "same", "--log-kl", "true"]


@pytest.fixture(scope="module")
def train(data, checkpoints, sft, tmp_path_factory):
    """train(script, n, *flags, change=...) -> (folder, log) of the script on n ranks; each distinct call runs once."""
    @cache
    def start(script, n, *flags, family="qwen2_5_vl", change=None):
        out = tmp_path_factory.mktemp("ranks") / "out"
        own = [*DPO, *(["--sft", sft] if family == "qwen2_5_vl" else [])] if script is train_dpo else []  # the SFT adapter is of one family
        argv = [*map(str, ["--model", checkpoints[family], "--data", data, "--out", out, *toy.SHORT, *toy.STEPS, *DATA, *own, *flags])]

        def work():
            if change is not None:
                change()
            script.main(argv)

        assert together(n, work) == [0] * n
        return out, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    return start


def apart(one, other):
    """Largest difference of what two runs logged, and of their adapters."""
    (folder, log), (other_folder, other_log) = one, other
    assert len(log) == len(other_log) > 1 and log[0].keys() == other_log[0].keys()
    numbers = max(abs(a[key] - b[key]) for a, b in zip(log, other_log, strict=True) for key in a if a[key] is not None)
    return numbers, toy.furthest(folder, other_folder)


@pytest.mark.parametrize("n,flags", [(2, []), (4, []), (2, ["--shard", "true"]), (4, ["--micro-batch", "8", "--accumulation", "1", "--shard", "true"])])
def test_sft_is_the_same_on_any_number_of_ranks(train, n, flags):
    numbers, weights = apart(train(train_sft, 1), train(train_sft, n, *flags))
    assert numbers < NUMBERS and weights < WEIGHTS


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize("n,flags", [(2, []), (4, ["--micro-batch", "8", "--accumulation", "1"]), (4, ["--shard", "true"])])
def test_dpo_is_the_same_on_any_number_of_ranks(train, n, flags):
    """eta and beta' are among the logged numbers; the noise is one draw for all."""
    numbers, weights = apart(train(train_dpo, 1), train(train_dpo, n, *flags))
    assert numbers < NUMBERS and weights < WEIGHTS


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_the_other_families_can_be_sharded(train, family):
    numbers, weights = apart(train(train_dpo, 1, family=family), train(train_dpo, 2, "--shard", "true", family=family))
    assert numbers < NUMBERS and weights < WEIGHTS


def no_sum():
    train_sft.sum_gradients = lambda weights, *numbers: numbers


def mean():
    total = train_sft.sum_gradients

    def half(weights, *numbers):
        numbers = total(weights, *numbers)
        for weight in weights:
            weight.grad /= 2
        return numbers

    train_sft.sum_gradients = half


def own_rewards():
    train_dpo.of_all = lambda found, n: torch.cat(list(found))


def test_a_wrong_reduction_is_noticed(train):
    """Gradients of the own share alone; their mean, which Adam hides from the weights but not from the norm; eta of the own share alone."""
    numbers, weights = apart(train(train_sft, 1), train(train_sft, 2, change=no_sum))
    assert numbers > 100 * NUMBERS and weights > 10 * WEIGHTS
    assert apart(train(train_sft, 1), train(train_sft, 2, change=mean))[0] > 100 * NUMBERS
    even = ["--users-to", "0.67"]  # 16 rows: 4 pairs on each rank, enough for an eta
    one, log = train(train_dpo, 1, *even)[1], train(train_dpo, 2, *even, change=own_rewards)[1]
    assert max(abs(a["eta"] - b["eta"]) for a, b in zip(one, log, strict=True)) > 100 * NUMBERS


@pytest.mark.equation("HN-9")
def test_each_rank_has_noise_of_its_own_unless_told_otherwise(train):
    numbers, weights = apart(train(train_dpo, 2), train(train_dpo, 2, "--noise-ranks", "own"))
    assert numbers > 10 * NUMBERS and weights > 10 * WEIGHTS
    first = train(train_dpo, 1), train(train_dpo, 1, "--noise-ranks", "own")
    assert apart(*first) == (0, 0)  # a single process has one stream


@pytest.mark.parametrize("script,flags", [(train_sft, []), (train_dpo, ["--sigma", "0.01", "--shard", "true"])])
def test_a_killed_rank_ends_the_run_which_goes_on_bit_by_bit(script, flags, data, checkpoints, sft, tmp_path):
    """With dropout and noise, so that the streams of both ranks have to be put back; on another number of ranks it is refused."""
    def command(out):
        argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, "--out", tmp_path / out, *toy.SHORT, *toy.STEPS, "--epochs", "2", "--save-every", "1", *flags]
        return [*map(str, [*argv, *(["--sft", sft] if script is train_dpo else [])])]

    def killed():
        def check(total, norm, step, users):
            if step == 3 and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            check_finite(total, norm, step, users)

        script.check_finite = check
        script.main(command("killed"))

    assert together(2, lambda: script.main(command("whole"))) == [0, 0]
    assert together(2, killed) == [1, -signal.SIGKILL]
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    with pytest.raises(InputError, match="2 processes, this one has 1.*--nproc-per-node 2"):
        script.main(command("killed"))
    assert together(2, lambda: script.main(command("killed"))) == [0, 0]
    assert toy.furthest(tmp_path / "whole", tmp_path / "killed") == 0
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "killed" / "log.jsonl").read_text()


def test_a_run_stopped_after_its_last_step_waits_for_its_slowest_rank(data, checkpoints, tmp_path):
    """Rank 0 has nothing left to do but write the adapter and delete the checkpoint that the other is about to read."""
    argv = [*map(str, ["--model", checkpoints["qwen2_5_vl"], "--data", data, "--out", tmp_path / "out", *toy.SHORT, *toy.STEPS, "--save-every", "1"])]

    def stopped():
        train_sft.save_policy = lambda *arguments, **named: os._exit(3)
        train_sft.main(argv)

    def late():
        load = train_sft.load_checkpoint

        def slow(*arguments):
            time.sleep(2 * rank())
            done, facts = load(*arguments)
            assert done > 0
            return done, facts

        train_sft.load_checkpoint = slow
        train_sft.main(argv)

    assert together(2, stopped) == [3, 3]
    assert together(2, late) == [0, 0]
    assert (tmp_path / "out" / "adapter_config.json").exists() and not list((tmp_path / "out").glob("checkpoint-*"))


def test_torchrun_trains_and_speaks_with_one_voice(data, checkpoints, tmp_path):
    """As a user starts it: a run; bad input, which every rank meets; and a step that only one rank finds broken."""
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *toy.STEPS]
    code, out, err = torchrun(2, "train_sft.py", *argv, "--out", tmp_path / "out")
    assert code == 0, err
    assert out.count("wrote the adapter") == 1 and json.loads((tmp_path / "out" / "run.json").read_text())["ranks"] == 2
    code, out, err = torchrun(2, "train_sft.py", *argv, "--sft", tmp_path / "none", "--out", tmp_path / "bad")
    assert code != 0 and err.count("error: ") == 1 and str(tmp_path / "none") in err
    broken = tmp_path / "broken.py"
    broken.write_text("import train_sft\nfrom hanorec.distributed import rank\nfrom hanorec.errors import InputError, run\n"
                      "def check(total, norm, step, users):\n    if step == 1 and rank() == 1:\n        raise InputError('step 1 is broken here')\n"
                      "train_sft.check_finite = check\nif __name__ == '__main__':\n    run(train_sft.main)\n")
    code, out, err = torchrun(2, broken, *argv, "--out", tmp_path / "half")
    assert code != 0 and re.findall("^error: .*", err, re.MULTILINE) == ["error: step 1 is broken here"]
    assert not (tmp_path / "half" / "adapter_config.json").exists()


def test_what_a_sharded_run_wrote_is_evaluated_alike_by_one_process_and_by_sharded_ones(train, data, checkpoints, tmp_path):
    """The adapter states what it stands on; were the sharded base's fingerprint another, it would be refused. 24 users on 5 ranks."""
    out, _ = train(train_sft, 2, "--shard", "true")
    shutil.copytree(data, tmp_path / "data")  # it is given candidate sets
    argv = [*map(str, ["--model", checkpoints["qwen2_5_vl"], "--data", tmp_path / "data", "--adapter", out, "--neighbors", "20", "--similarity", "true", *toy.SHORT])]
    evaluate.main([*argv, "--out", str(tmp_path / "one")])
    assert together(5, lambda: evaluate.main([*argv, "--out", str(tmp_path / "five"), "--shard", "true"])) == [0] * 5
    one, five = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "five"))
    for kind in ("random", "hard"):
        assert one["sets"][kind]["users"] == five["sets"][kind]["users"]
        scores = [np.array(report["sets"][kind]["scores"][str(out)]) for report in (one, five)]
        assert np.abs(scores[0] - scores[1]).max() < NUMBERS and np.ptp(scores[0]) > 1
    assert np.abs(np.array(one["similarity"][str(out)]["after"]) - five["similarity"][str(out)]["after"]).max() < NUMBERS


def test_torchrun_evaluates_and_trains_brmrs(data, checkpoints, tmp_path):
    """As a user starts them; rank 0 alone writes and speaks. More ranks than users; a batch of 179 pairs, and one of a single pair."""
    shutil.copytree(data, tmp_path / "data")
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", tmp_path / "data", "--users-to", "0.1", *toy.SHORT]
    code, out, err = torchrun(4, "evaluate.py", *argv, "--sets", "random", "--out", tmp_path / "test")
    assert code == 0 and out.count("random candidates") == 1, err
    assert len(json.loads((tmp_path / "test" / "metrics.json").read_text())["sets"]["random"]["users"]) == 2
    write_folder(tmp_path / "ranking")
    code, out, err = torchrun(2, "train_brmrs.py", "--data", tmp_path / "ranking", "--out", tmp_path / "brmrs", "--epochs", "2", "--batch", "179", "--dim", "8")
    assert code == 0 and out.count("best epoch") == 1 and (tmp_path / "brmrs" / "metrics.json").exists(), err
