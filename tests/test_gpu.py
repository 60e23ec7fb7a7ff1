"""What runs on a GPU, where there is one."""

import pytest
import torch
import toy

import train_dpo
import train_sft
from hanorec.topk import topk_neighbors
from hanorec.topk_groups import keep_best_by_groups

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


def test_neighbours_on_a_gpu_are_those_on_the_cpu():
    """Whole numbers: exact products, ties at nearly every K-th place. By groups (the default) and
    in the way of a CPU.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        e = torch.randint(-4, 5, (3001, 3), generator=generator).to(dtype)
        expected = topk_neighbors(e, 10)
        for block, by_groups in [(None, None), (500, True), (500, False)]:
            found = [x.cpu() for x in topk_neighbors(e.cuda(), 10, block, by_groups)]
            torch.testing.assert_close(found, list(expected), atol=0, rtol=0)


def test_a_block_makes_nobody_wait():
    """CUDA raises where a block by groups would wait for the device."""
    s = torch.randn(64, 999, device="cuda")
    best, index = s.new_full((64, 10), -torch.inf), s.new_zeros((64, 10), dtype=torch.int64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep_best_by_groups(best, index, s, 0)
        with pytest.raises(RuntimeError):
            best.max().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
