"""What runs on a GPU, where there is one."""

import pytest
import torch
import toy

import train_dpo
import train_sft

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

ON_GPU = ["--device", "cuda", "--lora-dropout", 0]


def test_sft_on_a_gpu_is_that_on_the_cpu(launch):
    """The same losses in float32, up to rounding and what Adam makes of it; in bfloat16 near."""
    _, cpu, _ = launch(train_sft.main, *toy.STEPS, "--lora-dropout", 0)
    for dtype, tolerance in [("float32", 1e-3), ("bfloat16", 0.1)]:
        _, log, _ = launch(train_sft.main, *toy.STEPS, *ON_GPU, "--dtype", dtype)
        for found, expected in zip(log, cpu, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)


def test_dpo_on_a_gpu_starts_where_it_does_on_the_cpu(launch, sft):
    """The noise is drawn on the device, so that later steps differ. Without noise the policy is the
    reference at first.
    """
    flags = [*toy.STEPS, "--sft", sft, "--sigma", 0]
    _, cpu, _ = launch(train_dpo.main, *flags, "--lora-dropout", 0)
    _, log, _ = launch(train_dpo.main, *flags, *ON_GPU, "--dtype", "float32")
    assert log[0]["loss"] == pytest.approx(cpu[0]["loss"], abs=1e-4)
    assert log[0]["lambda"] == pytest.approx(cpu[0]["lambda"], abs=1e-4)
