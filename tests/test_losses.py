r"""SFT-1, DPO-1, DPO-2, HN-11 and HN-12 against the oracle, their gradients, limits, and negative
controls.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from torch.autograd import gradcheck

from hanorec.losses import (
    dpo_loss,
    kl_divergence,
    preference_logit,
    prompt_logits,
    sft_loss,
    token_log_probs,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
LN2 = math.log(2)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def rows_with_answers(seed=0, dtype=torch.float64):
    """Logits (3, 7, 5) and labels (3, 7): answers of 3, 1 and 5 tokens; the last ends before the
    row does.
    """
    tokens = torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(seed))
    labels = torch.full((3, 7), -100)
    for row, (start, stop) in enumerate([(4, 7), (6, 7), (1, 6)]):
        labels[row, start:stop] = tokens[row, start:stop]
    return 3 * normal(3, 7, 5, seed=seed, dtype=dtype), labels


# ---- SFT-1 ----


@pytest.mark.equation("SFT-1")
@DTYPES
def test_sft_loss_matches_the_oracle(dtype):
    for seed in range(4):
        logits, labels = rows_with_answers(seed, dtype)
        loss = sft_loss(logits, labels)
        assert loss.shape == () and loss.dtype == dtype
        assert loss == pytest.approx(
            oracle.sft_loss(logits.tolist(), labels.tolist()), rel=TOLERANCE[dtype]
        )


@pytest.mark.equation("SFT-1")
def test_only_the_positions_before_an_answer_token_matter():
    """Change every other position's logits: the loss and its gradient do not notice. One that
    matters: it does.
    """
    logits, labels = rows_with_answers(1)
    matters = torch.zeros(3, 7, dtype=torch.bool)
    matters[:, :-1] = labels[:, 1:] != -100
    leaf = logits.clone().requires_grad_()
    sft_loss(leaf, labels).backward()
    assert torch.equal(leaf.grad.abs().sum(2) > 0, matters)
    other = torch.where(matters[..., None], logits, 100 * normal(3, 7, 5, seed=2))
    assert sft_loss(other, labels) == sft_loss(logits, labels)
    logits[0, 3, 0] += 1
    assert sft_loss(logits, labels) != sft_loss(other, labels)


@pytest.mark.equation("SFT-1")
def test_control_a_loss_without_the_shift_differs():
    """Perfect logits for the next token give almost 0. Scored in place, without the shift, they
    would give about 20.
    """
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    perfect = 20 * torch.nn.functional.one_hot(tokens.roll(-1, 1), 5).double()
    labels = torch.tensor([[-100, 1, 2, 3, 4]])
    assert sft_loss(perfect, labels) < 1e-7
    assert sft_loss(perfect.roll(-1, 1), labels) > 19


@pytest.mark.equation("SFT-1")
def test_mean_over_tokens_not_over_rows():
    """One row costs ln 2 a token over 3 tokens, one ln 4 over 1 token (vocabulary 2 and logits 0;
    logits giving 1/4): (3 ln 2 + ln 4) / 4 = 5/4 ln 2. Means of rows would give 3/2 ln 2.
    """
    logits = torch.zeros(2, 4, 2, dtype=torch.float64)
    logits[1, 2] = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    labels = torch.tensor([[-100, 0, 1, 0], [-100, -100, -100, 0]])
    assert sft_loss(logits, labels) == pytest.approx(1.25 * LN2, rel=1e-14)


@pytest.mark.equation("SFT-1")
def test_a_uniform_policy_costs_ln_v():
    labels = torch.tensor([[-100, 4, 5], [-100, -100, 10]])
    assert sft_loss(torch.full((2, 3, 11), 7.0), labels) == pytest.approx(math.log(11))


@pytest.mark.equation("SFT-1")
@DTYPES
def test_sft_loss_with_large_logits_stays_finite(dtype):
    logits = torch.tensor(
        [[[1e4, -1e4], [0, 0]], [[-1e4, 1e4], [0, 0]]], dtype=dtype, requires_grad=True
    )
    loss = sft_loss(logits, torch.tensor([[-100, 0], [-100, 0]]))
    loss.backward()
    assert loss == 1e4  # (0 + 2e4) / 2
    assert logits.grad.isfinite().all()


@pytest.mark.equation("SFT-1")
def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = rows_with_answers(3, torch.bfloat16)
    loss = sft_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss == pytest.approx(oracle.sft_loss(logits.tolist(), labels.tolist()), rel=1e-5)


@pytest.mark.equation("SFT-1")
def test_no_answer_token_is_an_error():
    """A label at position 0 has nothing before it that could predict it, so it does not count."""
    with pytest.raises(ValueError, match="answer"):
        sft_loss(torch.zeros(1, 3, 4), torch.tensor([[2, -100, -100]]))


@pytest.mark.equation("SFT-1")
def test_sft_gradcheck():
    _, labels = rows_with_answers(4)
    assert gradcheck(lambda x: sft_loss(x, labels), (normal(3, 7, 5, seed=5).requires_grad_(),))


# ---- DPO-1 ----


@pytest.mark.equation("DPO-1")
@DTYPES
def test_answer_log_probabilities_match_the_oracle(dtype):
    logits, tokens = 5 * normal(6, 9, seed=6, dtype=dtype), torch.tensor([0, 8, 3, 3, 1, 7])
    total = token_log_probs(logits, tokens).sum()
    assert total == pytest.approx(
        oracle.answer_log_prob(logits.tolist(), tokens.tolist()), rel=TOLERANCE[dtype]
    )


@pytest.mark.equation("DPO-1")
@DTYPES
def test_preference_logit_matches_the_oracle(dtype):
    four = [-20 * normal(12, seed=s, dtype=dtype).abs() for s in range(4)]
    h = preference_logit(*four)
    assert h.shape == (12,) and h.dtype == dtype
    np.testing.assert_allclose(h, oracle.preference_logit(*four), atol=100 * TOLERANCE[dtype])


@pytest.mark.equation("DPO-1")
def test_policy_equal_to_reference_gives_exactly_zero():
    """Whatever the two answers, and also where the sums are large."""
    w, l = -1e3 * normal(8, seed=7).abs(), -1e3 * normal(8, seed=8).abs()
    assert (preference_logit(w, l, w, l) == 0).all()


@pytest.mark.equation("DPO-1")
def test_control_every_swapped_argument_shows():
    """(w, l) swapped on both models turns the sign; policy and reference swapped too; on one model
    alone, another number. One swap cannot show in the value, the second argument for the third; it
    shows in the gradient (the next test).
    """
    pw, pl, rw, rl = (normal(8, seed=s) for s in range(4))
    h = preference_logit(pw, pl, rw, rl)
    np.testing.assert_allclose(preference_logit(pl, pw, rl, rw), -h, atol=1e-14)
    np.testing.assert_allclose(preference_logit(rw, rl, pw, pl), -h, atol=1e-14)
    assert (preference_logit(pw, pl, rl, rw) - h).abs().min() > 1e-3
    assert (preference_logit(pl, pw, rw, rl) - h).abs().min() > 1e-3


@pytest.mark.equation("DPO-1")
def test_gradient_reaches_the_policy_only():
    """d h / d log pi(y_w) = 1, d h / d log pi(y_l) = -1, nothing for the reference, even where it
    asks for a gradient.
    """
    four = [normal(5, seed=s).requires_grad_() for s in range(4)]
    preference_logit(*four).sum().backward()
    assert (four[0].grad == 1).all() and (four[1].grad == -1).all()
    assert four[2].grad is None and four[3].grad is None


@pytest.mark.equation("DPO-1")
def test_preference_logit_gradcheck():
    rw, rl = normal(5, seed=9), normal(5, seed=10)
    policy = [normal(5, seed=s).requires_grad_() for s in (11, 12)]
    assert gradcheck(lambda w, l: preference_logit(w, l, rw, rl), policy)


@pytest.mark.equation("DPO-1")
def test_prompt_logits_by_hand():
    """h of (w, l1), (w, l2): (5 - 1) - (3 - 2) = 3 and (5 - 1) - (4 - 0) = 0; second prompt: 1 - 0
    = 1 and 1 - 2 = -1.
    """
    policy = torch.tensor([[5.0, 3, 4], [1, 0, 2]])
    ref = torch.tensor([[1.0, 2, 0], [0, 0, 0]])
    assert prompt_logits(policy, ref).tolist() == [[3, 0], [1, -1]]
    # control: the chosen answer stands first
    assert prompt_logits(policy.flip(1), ref.flip(1)).tolist() != [[3, 0], [1, -1]]


@pytest.mark.equation("DPO-1")
@pytest.mark.parametrize("n", [1, 3])
def test_prompt_logits_are_the_preference_logits_of_each_pair(n):
    policy, ref = normal(4, 1 + n, seed=13), normal(4, 1 + n, seed=14)
    h = prompt_logits(policy, ref)
    assert h.shape == (4, n)
    for j in range(n):
        four = policy[:, 0], policy[:, 1 + j], ref[:, 0], ref[:, 1 + j]
        assert torch.equal(h[:, j], preference_logit(*four))


@pytest.mark.equation("DPO-1")
def test_the_chosen_answer_is_pulled_once_for_each_rejected_one():
    """d / d log pi(y_w) of the sum over n = 3 pairs is 3, that of each y_l -1; the reference gets
    none.
    """
    policy, ref = normal(2, 4, seed=15).requires_grad_(), normal(2, 4, seed=16).requires_grad_()
    prompt_logits(policy, ref).sum().backward()
    assert policy.grad.tolist() == [[3, -1, -1, -1]] * 2
    assert ref.grad is None


@pytest.mark.equation("DPO-1")
@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (2, 4)])
def test_a_reference_of_other_answers_or_prompts_is_refused(shape):
    with pytest.raises(ValueError, match="four equal"):
        prompt_logits(torch.ones(2, 3), torch.ones(shape))


# ---- DPO-2 and HN-11 ----


@pytest.mark.equation("DPO-2")
@DTYPES
@pytest.mark.parametrize("beta", [0.1, 1.0, 1e-6])
def test_plain_dpo_matches_the_oracle(beta, dtype):
    h = 30 * normal(40, seed=13, dtype=dtype)
    loss = dpo_loss(h, beta)
    assert loss.shape == (40,) and loss.dtype == dtype
    np.testing.assert_allclose(loss, oracle.dpo_loss(h, beta), rtol=TOLERANCE[dtype], atol=1e-30)


@pytest.mark.equation("DPO-2")
def test_policy_equal_to_reference_gives_ln_2_in_every_form():
    """h = 0: -log sigma(0) = ln 2, whatever beta; normalised it is ln 2 times beta0 / beta'."""
    zero = torch.zeros(3, dtype=torch.float64)
    beta = torch.tensor([0.02, 0.1, 0.3], dtype=torch.float64)
    np.testing.assert_allclose(dpo_loss(zero, 0.1), LN2, rtol=1e-15)
    np.testing.assert_allclose(dpo_loss(zero, beta), LN2, rtol=1e-15)
    np.testing.assert_allclose(dpo_loss(zero, 0.1, normalised_by=0.1), LN2, rtol=1e-15)
    np.testing.assert_allclose(
        dpo_loss(zero, beta, normalised_by=0.1), [5 * LN2, LN2, LN2 / 3], rtol=1e-14
    )


@pytest.mark.equation("DPO-2")
@DTYPES
def test_large_margins_stay_finite(dtype):
    """beta h = -1e4 costs 1e4, +1e4 costs 0; both gradients are finite: -1 (times beta) and 0."""
    h = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = dpo_loss(h, 1.0)
    loss.sum().backward()
    assert loss.tolist() == [0, 1e4]
    assert h.grad.tolist() == [0, -1]
    naive = -torch.log(torch.sigmoid(h))  # control: this is what the stable form is for
    assert not naive.isfinite().all()


@pytest.mark.equation("DPO-2")
def test_a_larger_preference_costs_less():
    loss = dpo_loss(torch.linspace(-50, 50, 101, dtype=torch.float64), 0.1)
    assert (loss.diff() < 0).all() and (loss > 0).all()


@pytest.mark.equation("HN-11")
@DTYPES
@pytest.mark.parametrize("normalised_by", [None, 0.1, 0.3])
def test_weighted_dpo_matches_the_oracle(normalised_by, dtype):
    h = 30 * normal(40, seed=14, dtype=dtype)
    beta = (0.02 + 0.1 * normal(40, seed=15).abs()).to(dtype)
    loss = dpo_loss(h, beta, normalised_by)
    assert loss.shape == (40,) and loss.dtype == dtype
    np.testing.assert_allclose(
        loss, oracle.dpo_loss(h, beta, normalised_by), rtol=TOLERANCE[dtype], atol=1e-30
    )


@pytest.mark.equation("HN-11")
def test_equal_betas_give_plain_dpo():
    """beta'_i = beta0 for all: DPO-2 exactly, with and without normalising. Control: one beta'
    moved, only that pair moves.
    """
    h = 10 * normal(9, seed=16)
    beta = torch.full((9,), 0.1, dtype=torch.float64)
    assert torch.equal(dpo_loss(h, beta), dpo_loss(h, 0.1))
    np.testing.assert_allclose(dpo_loss(h, beta, normalised_by=0.1), dpo_loss(h, 0.1), rtol=1e-15)
    beta[4] = 0.07
    assert (dpo_loss(h, beta) != dpo_loss(h, 0.1)).nonzero().tolist() == [[4]]


@pytest.mark.equation("HN-11")
def test_slopes_of_a_hard_and_an_easy_pair():
    """The reason for `normalised`. At h = 0 the plain slope is beta' / 2: the hard pair (low beta')
    pulls less; normalised both pull beta0 / 2. At h = 100 the hard pair pulls more in both forms.
    The numbers are the oracle's.
    """
    beta = torch.tensor([0.05, 0.08], dtype=torch.float64)
    for height, normalised_by in [(0.0, None), (0.0, 0.1), (100.0, None), (100.0, 0.1)]:
        h = torch.full((2,), height, dtype=torch.float64, requires_grad=True)
        dpo_loss(h, beta, normalised_by).sum().backward()
        np.testing.assert_allclose(
            h.grad, oracle.dpo_slope(h.tolist(), beta, normalised_by), rtol=1e-12
        )
        hard, easy = h.grad.abs().tolist()
        if height == 0 and normalised_by is None:
            assert hard == pytest.approx(0.025) and easy == pytest.approx(0.04)
        elif height == 0:
            assert hard == pytest.approx(0.05) and easy == pytest.approx(0.05)
        else:
            assert hard > 3 * easy


@pytest.mark.equation("HN-11")
@pytest.mark.parametrize("normalised_by", [None, 0.1])
def test_no_gradient_flows_through_beta(normalised_by):
    beta = torch.tensor([0.05, 0.1], dtype=torch.float64, requires_grad=True)
    h = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(h, beta, normalised_by).sum().backward()
    assert beta.grad is None
    assert h.grad is not None


@pytest.mark.equation("HN-11")
@pytest.mark.parametrize("beta", [0.1, [0.05, 0.1, 0.2, 0.01]])
@pytest.mark.parametrize("normalised_by", [None, 0.1])
def test_dpo_gradcheck(beta, normalised_by):
    weight = torch.tensor(beta, dtype=torch.float64)
    h = torch.tensor([0.0, 12.0, -9.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: dpo_loss(x, weight, normalised_by), (h,))


@pytest.mark.equation("HN-11")
def test_one_pair():
    loss = dpo_loss(
        torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    )
    np.testing.assert_allclose(loss, oracle.dpo_loss([2.0], [0.3]), rtol=1e-14)


# ---- HN-12 ----


@pytest.mark.equation("HN-12")
@DTYPES
def test_kl_matches_the_oracle(dtype):
    for seed in range(4):
        policy = 2 * normal(6, 8, seed=seed, dtype=dtype)
        ref = 2 * normal(6, 8, seed=seed + 50, dtype=dtype)
        kl = kl_divergence(policy, ref)
        assert kl.shape == () and kl.dtype == dtype
        assert kl == pytest.approx(
            oracle.kl_divergence(policy.tolist(), ref.tolist()), rel=10 * TOLERANCE[dtype]
        )


@pytest.mark.equation("HN-12")
def test_kl_is_zero_only_for_equal_distributions_and_not_symmetric():
    """A shift of a whole row of logits changes nothing. Control: swapped arguments give another
    number.
    """
    policy, ref = normal(4, 6, seed=17), normal(4, 6, seed=18)
    assert kl_divergence(policy, policy) == 0
    assert kl_divergence(policy, policy + 3.5) == pytest.approx(0, abs=1e-14)
    forward, backward = kl_divergence(policy, ref), kl_divergence(ref, policy)
    assert forward > 0 and backward > 0 and abs(forward - backward) > 1e-2


@pytest.mark.equation("HN-12")
@DTYPES
def test_kl_with_large_logits_stays_finite(dtype):
    """A policy that is certain of token 0 and a reference certain of token 1, 2e4 apart: KL = 2e4;
    certain alike: 0.
    """
    policy = torch.tensor([[1e4, -1e4]], dtype=dtype, requires_grad=True)
    kl = kl_divergence(policy, torch.tensor([[-1e4, 1e4]], dtype=dtype))
    kl.backward()
    assert kl == 2e4 and policy.grad.isfinite().all()
    assert kl_divergence(policy, policy.detach()) == 0


@pytest.mark.equation("HN-12")
def test_kl_in_bfloat16_is_computed_in_float32():
    policy = normal(5, 7, seed=19, dtype=torch.bfloat16)
    ref = normal(5, 7, seed=20, dtype=torch.bfloat16)
    kl = kl_divergence(policy, ref)
    assert kl.dtype == torch.float32
    assert kl == pytest.approx(oracle.kl_divergence(policy.tolist(), ref.tolist()), rel=1e-5)


@pytest.mark.equation("HN-12")
def test_kl_gradcheck_and_no_gradient_to_the_reference():
    policy, ref = normal(3, 5, seed=21).requires_grad_(), normal(3, 5, seed=22).requires_grad_()
    assert gradcheck(lambda p: kl_divergence(p, ref.detach()), (policy,))
    kl_divergence(policy, ref).backward()
    assert ref.grad is None and policy.grad.abs().sum() > 0


@pytest.mark.equation("DPO-1", "HN-11")
def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="four equal"):
        preference_logit(torch.ones(3), torch.ones(3), torch.ones(1), torch.ones(3))
    with pytest.raises(ValueError, match="same shape"):
        dpo_loss(torch.ones(3), torch.ones(3, 1))
