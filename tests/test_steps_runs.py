"""Whole runs of train_dpo.py by other readings of its step, and the readings that go together."""

import json
import math

import numpy as np
import pytest
import toy
from safetensors.torch import load_file

import train_dpo
from hanorec.base.errors import InputError


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


@pytest.mark.parametrize(("flags", "said"), [
    (["--rewards", "noisy"], "--rewards noisy with --eta-over step"),
    (["--kept", "near"], "--kept near with --eta batch and --ablation full: expected --eta b"),
    (["--kept", "near", "--eta", "beta_dpo", "--ablation", "no_hars"], "an ablation with eta"),
    (["--noise-draw", "answer", "--checkpointing", "true"], "--noise-draw answer with --checkp"),
    (["--alignment-coef", 1, "--images", "none"], "--alignment-coef 1.0 with --images none"),
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
