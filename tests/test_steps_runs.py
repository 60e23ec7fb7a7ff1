"""Whole runs of train_dpo.py by other readings of its step, and the readings that go together."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import toy
from safetensors.torch import load_file

import train_dpo
from hanorec.base.batches import global_batches, smallest_part
from hanorec.base.config_steps import StepConfig
from hanorec.base.errors import InputError
from hanorec.run.record import check_settings


@pytest.mark.equation("HN-10")
def test_the_sft_adapter_trained_on(launch, sft):
    """Its reference is the SFT policy, that of a stacked run; without noise the first loss is ln 2;
    what is written stands on the base alone. Control: it is not the SFT adapter any more.
    """
    flags = [*toy.STEPS, "--sft", sft, "--lora-dropout", 0, "--ablation", "no_nodo"]
    stacked, _, _ = launch(train_dpo.main, *flags)
    out, log, facts = launch(train_dpo.main, *flags, "--continue-sft", "true")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=2e-6) and log[0]["eta"] == 1
    assert not (out / "below").exists() and facts["settings"]["continue_sft"]
    one, two = [load_file(folder / "reference.safetensors") for folder in (stacked, out)]
    np.testing.assert_allclose(one["log_probs"], two["log_probs"], atol=1e-5)
    assert toy.furthest(out, sft) > 1e-4
    noisy, _, _ = launch(
        train_dpo.main, *toy.STEPS, "--sft", sft, "--lora-dropout", 0, "--continue-sft", "true"
    )
    assert toy.furthest(noisy, out) > 1e-5  # the noise is on it
    again = json.loads((out / "hanorec.json").read_text())
    assert again["stands_on"] == json.loads((sft / "hanorec.json").read_text())["stands_on"]


def test_all_readings_of_the_step_at_once(launch, sft):
    out, log, facts = launch(
        train_dpo.main, *toy.STEPS, "--sft", sft, "--noise-pass", "forward", "--noise-draw",
        "answer", "--noise-draws", 2, "--rewards", "noisy", "--eta-over", "micro", "--kept",
        "inner", "--alignment-coef", 0.5, "--continue-sft", "true", "--eta", "pair", "--gap",
        "signed", "--normalised", "true", "--drop-last", "true", "--micro-batch", 5,
    )
    assert [record["step"] for record in log] == [0, 1]  # 24 rows: 20, in steps of 10
    for record in log:
        assert all(math.isfinite(value) for value in record.values() if value is not None)
    assert toy.furthest(out, sft) > 0 and facts["settings"]["kept"] == "inner"


def test_a_run_from_before_these_settings_goes_on(tmp_path):
    """Its run.json states none of them, which means their defaults. Control: others are refused."""
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"epochs": 1}}))
    settings = {"epochs": 1, "targets": 1, "drop_last": False, **asdict(StepConfig())}
    check_settings(tmp_path, settings)
    for name, value in (("noise_pass", "forward"), ("drop_last", True), ("quotes", "chosen")):
        with pytest.raises(InputError, match=name):
            check_settings(tmp_path, {"epochs": 1, name: value})


def test_the_rest_of_an_epoch_is_left_out():
    """11 rows in steps of 6 = 2 micro-batches of 3: 9 rows, another rest in another epoch. Control:
    all 11 without it."""
    rests = set()
    for epoch in range(3):
        first, second = global_batches(11, 6, 7, epoch)
        assert global_batches(11, 6, 7, epoch, multiple=3) == [first, second[:3]]
        rests.add(tuple(second[3:]))
    assert len(second) == 5 and len(rests) > 1
    assert [smallest_part(n, 4) for n in (8, 9, 3, 7)] == [4, 1, 3, 3]


@pytest.mark.parametrize(("flags", "said"), [
    (["--rewards", "noisy"], "--rewards noisy with --eta-over step"),
    (["--kept", "near"], "--kept near with --eta batch and --ablation full: expected --eta b"),
    (["--kept", "near", "--eta", "beta_dpo", "--ablation", "no_hars"], "an ablation with eta"),
    (["--noise-draw", "answer", "--checkpointing", "true"], "--noise-draw answer with --checkp"),
    (["--noise-pass", "forward", "--compile", "true"], "--noise-pass forward with --compile true"),
    (["--alignment-coef", 1, "--images", "none"], "--alignment-coef 1.0 with --images none"),
    (["--alignment-coef", 1, "--shard", "true"], "--alignment-coef 1.0 with --shard"),
    (["--eta-over", "micro", "--micro-batch", 11, "--kept", "inner", "--ablation", "no_hars"],
     "a micro-batch has 2 pairs"),
    (["--continue-sft", "true"], "--continue-sft without --sft"),
    (["--continue-sft", "true", "--log-kl", "true", "--sft", "SFT"], "--log-kl or --kl-coef"),
    (["--continue-sft", "true", "--lora-rank", 4, "--sft", "SFT"], "give --lora-rank 8 --lora-alp"),
    (["--eta-over", "micro", "--micro-batch", 11], "a micro-batch has 2 pairs.*--drop-last true"),
    (["--noise-draws", 0], "--noise-draws 0: expected at least 1"),
    (["--drop-last", "true", "--micro-batch", 25], "0 training rows in steps of 50"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_readings_that_do_not_go_together(launch, sft, flags, said):
    flags = [sft if flag == "SFT" else flag for flag in flags]
    with pytest.raises(InputError, match=said):
        launch(train_dpo.main, *toy.STEPS, *flags)
