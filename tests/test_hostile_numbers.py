"""Numbers at their ends: margins far beyond any training, through the losses and through a whole
model; bfloat16 against float32.
"""

import os

import numpy as np
import oracle
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from hanorec.etas import batch_eta
from hanorec.hars import pair_beta, responsiveness, reward_gap
from hanorec.losses import dpo_loss, preference_logit, sft_loss
from hanorec.mllm.backbone import FAMILIES
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.items import encode_pictures
from hanorec.mllm.load import load_backbone
from hanorec.scoring import answer_log_probs

HUGE = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=8)
MANY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@MANY
@given(HUGE, st.floats(1e-6, 1.0), st.sampled_from([None, 0.1]))
def test_losses_of_any_margin_are_finite(margins, beta, normalised_by):
    """float32, h up to 2^100 = 1.3e30: the loss is the oracle's, finite and >= 0; its slope is at
    most beta, or beta0 where normalised.
    """
    h = torch.tensor(margins, requires_grad=True)
    loss = dpo_loss(h, torch.full((len(h),), beta), normalised_by)
    loss.sum().backward()
    assert loss.isfinite().all() and (loss >= 0).all() and h.grad.isfinite().all()
    np.testing.assert_allclose(
        loss.detach(), oracle.dpo_loss(margins, beta, normalised_by), rtol=1e-5, atol=1e-30
    )
    assert (h.grad.abs() <= (normalised_by or beta) * 1.00001).all()


@MANY
@given(HUGE, st.sampled_from([None, 0.2]))
def test_weights_of_any_rewards_are_finite(margins, trim):
    """eta stays within its range, 0 .. 2, and beta' between its floor and twice lambda beta0,
    whatever the rewards.
    """
    R = reward_gap(torch.tensor(margins), 0.1)
    eta = batch_eta(R, {}, trim)
    beta = pair_beta(torch.full((len(R),), 0.7), eta)
    assert 0 <= eta <= 2 and (beta >= 1e-6).all() and (beta <= 2 * 0.7 * 0.1 + 1e-6).all()


def test_rewards_that_cancel():
    """The mean is nothing but rounding beside the rewards: eta is still a number, and beta' does
    not vanish.
    """
    for rewards in (
        [1e30, -1e30, 1.0],
        [1e8, -1e8, 3e-8],
        [0.0, 0.0, 0.0],
        [1e-30, 1e-30, -1e-30],
        [3e38, 3e38, 3e38],
    ):
        eta = responsiveness(torch.tensor(rewards))
        assert eta.isfinite() and (pair_beta(torch.ones(3), eta) >= 1e-6).all(), rewards


def gradient(backbone, batch, layers, reference):
    """(h, loss, flat gradient) of one DPO step on a batch of chosen and rejected answers."""
    log_probs = answer_log_probs(forward(backbone, batch), batch)
    h = preference_logit(log_probs[:, 0], log_probs[:, 1], reference[:, 0], reference[:, 1])
    loss = dpo_loss(h, 0.1).mean()
    return h.detach(), loss.item(), toy.gradients(loss, layers)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_a_policy_far_from_its_reference_still_trains(qwen, catalog, gallery, scale):
    """A head a hundred or ten thousand times too large: margins of thousands, in both directions;
    loss and every gradient are finite.
    """
    pictures = gallery["qwen2_5_vl"]
    rows = [toy.ranking_row(qwen, catalog, pictures, answers=pair) for pair in ((3, 4), (4, 3))]
    batch = collate(qwen, rows, pictures)
    with torch.no_grad():
        reference = answer_log_probs(forward(qwen, batch), batch)
    layers = toy.busy_lora(qwen.model, seed=2)
    # logits of any size
    qwen.model.lm_head.weight = torch.nn.Parameter(
        qwen.model.lm_head.weight * scale, requires_grad=False
    )
    h, loss, grad = gradient(qwen, batch, layers, reference)
    assert h.abs().max() > scale and h[0] == pytest.approx(-h[1].item(), rel=1e-3)
    assert np.isfinite(loss) and grad.isfinite().all()


# The bounds for bfloat16 (8 bits: each rounding is off by up to 2^-9 = 0.2%), in nats a token, on
# models of two layers with weights three to six times larger than initialised ones. Measured: 0.035
# at most over three seeds and families, 0.011 typically.
TOKEN_BOUND, COSINE_BOUND = 0.08, 0.98


@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ,
    reason="PyTorch packs bfloat16 by what the processor can do, and then refuses the pack",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_agrees_with_float32(family, checkpoints, catalog):
    """Log-probabilities, the SFT loss, the margin h and the direction of the gradient: with the
    same adapter, on both types of base.
    """
    found = {}
    for dtype in ("float32", "bfloat16"):
        backbone = load_backbone(str(checkpoints[family]), dtype, "cpu")
        pictures = encode_pictures(backbone, catalog, range(12))
        rows = [toy.ranking_row(backbone, catalog, pictures, history, candidates, candidates[:2])
                for history, candidates in (((0, 1, 2), (3, 4, 5)), ((7, 8), (9, 10, 11)))]
        batch = collate(backbone, rows, pictures)
        with torch.no_grad():
            reference = answer_log_probs(forward(backbone, batch), batch)
        layers = toy.busy_lora(backbone.model, seed=2)
        with torch.no_grad():
            log_probs = answer_log_probs(forward(backbone, batch), batch)
            alone = collate(backbone, [toy.single_answer(row, 0) for row in rows], pictures)
            logits = forward(backbone, alone)
        assert log_probs.dtype == torch.float32 and logits.dtype == getattr(torch, dtype)
        tokens = torch.tensor([[len(answer) for answer in row.answers] for row in rows])
        found[dtype] = (
            log_probs, sft_loss(logits, alone.labels).item(),
            *gradient(backbone, batch, layers, reference), tokens,
        )
    (one, sft_one, h_one, _, grad_one, tokens), (two, sft_two, h_two, _, grad_two, _) = (
        found.values()
    )
    assert ((one - two).abs() / tokens).max() < TOKEN_BOUND
    assert abs(sft_one - sft_two) < TOKEN_BOUND
    # policy and reference, each on both answers
    assert ((h_one - h_two).abs() / tokens.sum(1)).max() < 2 * TOKEN_BOUND
    assert torch.cosine_similarity(grad_one, grad_two, 0) > COSINE_BOUND
    # Negative control: the bounds tell the adapter from its absence, and one pair's gradient from
    # another's.
    assert ((one - reference).abs() / tokens).max() > 3 * TOKEN_BOUND
    assert torch.cosine_similarity(grad_one, grad_one.roll(1), 0) < 0.5
