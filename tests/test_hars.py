r"""HN-1, HN-2, HN-4 .. HN-8 against the oracle, their limits, and negative controls."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanorec.hars import (
    RunningReward,
    cluster_gap,
    fuse,
    hardness,
    mean_pool,
    pair_beta,
    responsiveness,
    reward_gap,
)
from hanorec.losses import dpo_loss
from hanorec.topk import topk_neighbors

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def catalogue(n=24, d=6, k=4, seed=0, dtype=torch.float64):
    e = normal(n, d, seed=seed)
    e = (e / e.norm(dim=1, keepdim=True)).to(dtype)
    return e, *topk_neighbors(e, k)


def oracle_gaps(e, scores, index, chosen, rejected, form):
    e, scores, index = e.double().numpy(), scores.double().numpy(), index.numpy()
    return [oracle.cluster_gap(e, scores, index, w, l, form) for w, l in zip(chosen, rejected, strict=True)]


# ---- HN-1, HN-2: embeddings ----


@pytest.mark.equation("HN-1")
@pytest.mark.parametrize("n", [1, 5])
def test_mean_pool(n):
    rows = normal(n, 3, seed=1)
    np.testing.assert_allclose(mean_pool(rows), oracle.item_embedding(rows.tolist()), atol=1e-15)


@pytest.mark.equation("HN-1")
def test_mean_pool_adds_in_float32():
    """In bfloat16 the integers above 256 are even only, so a running sum of 300 ones would stop at 256; the mean is 1."""
    pooled = mean_pool(torch.ones(300, 2, dtype=torch.bfloat16))
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [1, 1]


@pytest.mark.equation("HN-2")
@DTYPES
def test_fuse_matches_the_oracle(dtype):
    H, X = normal(9, 5, seed=2, dtype=dtype), 30 * normal(9, 5, seed=3, dtype=dtype)
    has_image = torch.tensor([True, False] * 4 + [True])
    e = fuse(H, X, has_image)
    assert e.dtype == dtype
    np.testing.assert_allclose(e, oracle.fuse(H.tolist(), X.tolist(), has_image), atol=TOLERANCE[dtype])
    np.testing.assert_allclose(fuse(H, X), oracle.fuse(H.tolist(), X.tolist()), atol=TOLERANCE[dtype])


@pytest.mark.equation("HN-2")
@pytest.mark.parametrize("filler", [0.0, float("nan"), 1e9])
def test_an_item_without_an_image_ignores_its_row_of_X(filler):
    H, X = normal(4, 5, seed=4), normal(4, 5, seed=5)
    X[2] = filler
    has_image = torch.tensor([True, True, False, True])
    np.testing.assert_allclose(fuse(H, X, has_image)[2], H[2] / H[2].norm(), atol=1e-15)


@pytest.mark.equation("HN-2")
def test_both_modalities_weigh_the_same_whatever_their_lengths():
    """Scaling H by 100 changes nothing. Control: without the inner norm it would."""
    H, X = normal(4, 5, seed=6), normal(4, 5, seed=7)
    np.testing.assert_allclose(fuse(100 * H, X), fuse(H, X), atol=1e-14)
    careless = (100 * H + X) / (100 * H + X).norm(dim=1, keepdim=True)
    assert (careless - fuse(H, X)).abs().max() > 0.1


@pytest.mark.equation("HN-2")
@pytest.mark.parametrize("row", ["zero", "opposite", "nan"])
def test_a_row_without_a_direction_is_named(row):
    H, X = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    if row == "zero":
        H[1], X[1] = 0, 0
    elif row == "opposite":
        X[1] = -H[1]
    else:
        H[1, 0] = float("nan")
    with pytest.raises(ValueError, match="item row 1"):
        fuse(H, X)


# ---- HN-4: the gap of two clusters ----


@pytest.mark.equation("HN-4")
@DTYPES
@pytest.mark.parametrize("form", ["union", "ranked", "cosine"])
@pytest.mark.parametrize("k", [1, 4, 23])
def test_gap_of_every_pair_of_a_catalogue(k, form, dtype):
    """All 24 x 23 ordered pairs: overlapping and disjoint clusters, w in N(l) and not; at K = 23 each cluster is everything."""
    e, scores, index = catalogue(k=k, dtype=dtype)
    pairs = [(w, l) for w in range(24) for l in range(24) if w != l]
    chosen, rejected = torch.tensor(pairs).T
    delta = cluster_gap(e, scores, index, chosen, rejected, form)
    assert delta.shape == (len(pairs),) and delta.dtype == dtype
    expected = oracle_gaps(e, scores, index, chosen, rejected, form)
    np.testing.assert_allclose(delta, expected, atol=TOLERANCE[dtype])
    if k == 4:  # the pairs do cover the cases named above
        members = [(set(index[w].tolist()), set(index[l].tolist())) for w, l in pairs]
        assert any(w in N_l for (w, _), (_, N_l) in zip(pairs, members, strict=True))
        assert any(N_w & N_l for N_w, N_l in members) and any(not N_w & N_l for N_w, N_l in members)


@pytest.mark.equation("HN-4")
@given(data=st.data())
@QUICK
def test_gap_with_duplicates_and_ties(data):
    """Items on the four axes of the plane, many of them equal; the default form, one pair at a time (P = 1)."""
    n = data.draw(st.integers(2, 9))
    axes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    e = axes[data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))]
    scores, index = topk_neighbors(e, data.draw(st.integers(1, n - 1)))
    w, l = (torch.tensor([data.draw(st.integers(0, n - 1))]) for _ in range(2))
    for form in ("union", "ranked", "cosine"):
        expected = oracle_gaps(e, scores, index, w, l, form)
        np.testing.assert_allclose(cluster_gap(e, scores, index, w, l, form), expected, atol=1e-14)


@pytest.mark.equation("HN-4")
def test_gap_of_an_item_with_itself_and_with_its_copy_is_zero():
    e, _, _ = catalogue(n=10)
    e = e.repeat(2, 1)
    scores, index = topk_neighbors(e, 3)
    w = torch.arange(10)
    for form in ("union", "cosine"):
        np.testing.assert_allclose(cluster_gap(e, scores, index, w, w, form), 0, atol=1e-14)
        np.testing.assert_allclose(cluster_gap(e, scores, index, w, w + 10, form), 0, atol=1e-14)


@pytest.mark.equation("HN-4")
def test_gap_is_symmetric_and_bounded():
    """Both distributions live on one set, so the order of the pair does not matter; two distributions are at most sqrt 2 apart."""
    e, scores, index = catalogue()
    w, l = torch.arange(12), torch.arange(12, 24)
    delta = cluster_gap(e, scores, index, w, l)
    np.testing.assert_allclose(delta, cluster_gap(e, scores, index, l, w), atol=1e-15)
    assert (delta > 0).all() and (delta < math.sqrt(2)).all()


@pytest.mark.equation("HN-4")
def test_control_a_union_that_repeats_members_differs():
    """Dropping the de-duplication moves every gap whose clusters overlap (here by over 0.001), so the oracle would notice."""
    e, scores, index = catalogue()
    pairs = [(w, int(index[w, 0])) for w in range(24)]  # l is w's nearest: {w, l} and the clusters overlap always
    delta = cluster_gap(e, scores, index, *torch.tensor(pairs).T)
    repeated = [oracle.cluster_gap_with_repeats(e.numpy(), index.numpy(), w, l) for w, l in pairs]
    assert (delta - torch.tensor(repeated)).abs().min() > 1e-3


@pytest.mark.equation("HN-4")
def test_control_clusters_of_other_items_differ():
    """Handing over the index rows in another order must show."""
    e, scores, index = catalogue()
    w, l = torch.arange(12), torch.arange(12, 24)
    wrong = cluster_gap(e, scores, index.roll(1, 0), w, l)
    assert (wrong - cluster_gap(e, scores, index, w, l)).abs().max() > 1e-2


@pytest.mark.equation("HN-4")
def test_union_follows_similarity_and_ranked_does_not():
    """The reason for the default: 300 random items, 800 pairs; the gap should fall as cos(w, l) rises. Also the forms differ."""
    e, scores, index = catalogue(n=300, d=16, k=10, seed=9)
    draw = torch.Generator().manual_seed(9)
    w = torch.randint(300, (800,), generator=draw)
    l = (w + torch.randint(1, 300, (800,), generator=draw)) % 300
    cosine = 1 - cluster_gap(e, scores, index, w, l, "cosine")
    union, ranked = (cluster_gap(e, scores, index, w, l, form) for form in ("union", "ranked"))
    assert np.corrcoef(union, cosine)[0, 1] < -0.8
    assert abs(np.corrcoef(ranked, cosine)[0, 1]) < 0.15
    assert hardness(ranked).max() < 0.52 < hardness(union).max()


@pytest.mark.equation("HN-4")
def test_an_unknown_form_of_the_gap_is_refused():
    e, scores, index = catalogue()
    with pytest.raises(ValueError, match="'sets'.*union, ranked or cosine"):
        cluster_gap(e, scores, index, torch.tensor([0]), torch.tensor([1]), "sets")


# ---- HN-5: hardness ----


@pytest.mark.equation("HN-5")
@DTYPES
@pytest.mark.parametrize("form", ["sigmoid", "ratio", "standardised"])
@pytest.mark.parametrize("statistics", [{}, {"mean": 0.3, "std": 0.2}])
def test_hardness_matches_the_oracle(form, statistics, dtype):
    delta = normal(50, seed=10, dtype=dtype).abs()
    lam = hardness(delta, form, **statistics)
    assert lam.dtype == dtype
    np.testing.assert_allclose(lam, oracle.hardness(delta, form, **statistics), rtol=TOLERANCE[dtype])


@pytest.mark.equation("HN-5")
def test_ratio_is_sigmoid_up_to_a_constant_and_standardised_is_not():
    delta = normal(50, seed=11).abs()
    plain = hardness(delta)
    ratio = hardness(delta, "ratio") / plain
    np.testing.assert_allclose(ratio, 1 / oracle.sigmoid(delta.mean()), rtol=1e-14)
    standardised = hardness(delta, "standardised") / plain
    assert standardised.max() / standardised.min() > 2


@pytest.mark.equation("HN-5")
def test_a_larger_gap_is_never_harder():
    """Smaller lambda = harder; sigma(Delta) starts at 1/2 because Delta >= 0; standardised spans far more."""
    delta = torch.linspace(0, math.sqrt(2), 30, dtype=torch.float64)
    for form in ("sigmoid", "ratio", "standardised"):
        assert (hardness(delta, form).diff() > 0).all()
    assert hardness(delta)[0] == 0.5
    assert hardness(delta)[-1] == pytest.approx(oracle.sigmoid(math.sqrt(2)), abs=1e-15)
    spread = hardness(delta, "standardised")
    assert spread.max() - spread.min() > 1 > 3 * (hardness(delta).max() - hardness(delta).min())


@pytest.mark.equation("HN-5")
def test_standardised_uses_the_population_deviation():
    """Delta = (0, 2): mean 1, population std 1 (sample std sqrt 2): 2 sigma(-1), 2 sigma(1)."""
    lam = hardness(torch.tensor([0.0, 2.0], dtype=torch.float64), "standardised")
    np.testing.assert_allclose(lam, [2 * oracle.sigmoid(-1), 2 * oracle.sigmoid(1)], rtol=1e-14)


@pytest.mark.equation("HN-5")
def test_hardness_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="standard deviation 0"):
        hardness(torch.ones(4), "standardised")
    with pytest.raises(ValueError, match="'linear'"):
        hardness(torch.ones(4), "linear")


# ---- HN-6, HN-7: rewards and responsiveness ----


@pytest.mark.equation("HN-6")
@DTYPES
def test_reward_gap(dtype):
    h = (1e4 * normal(20, seed=12, dtype=dtype)).requires_grad_()
    R = reward_gap(h, 0.1)
    np.testing.assert_allclose(R, oracle.reward_gap(h.tolist(), 0.1), rtol=1e-6)
    assert R.dtype == dtype and not R.requires_grad


@pytest.mark.equation("HN-7")
@DTYPES
@pytest.mark.parametrize("n", [3, 4, 32])
@pytest.mark.parametrize("trim", [None, 0.05, 0.1, 0.33])
def test_responsiveness_matches_the_oracle(n, trim, dtype):
    for seed in range(5):
        R = 0.3 + normal(n, seed=seed, dtype=dtype)
        eta = responsiveness(R, trim)
        assert eta.shape == () and eta.dtype == dtype
        assert eta == pytest.approx(oracle.responsiveness(R.tolist(), trim), rel=100 * TOLERANCE[dtype])


@pytest.mark.equation("HN-7")
@given(st.lists(st.integers(-3, 3), min_size=3, max_size=12))
@QUICK
def test_responsiveness_with_ties_zero_means_and_zeros(R):
    """Small integers reach the fallback (mean 0), all zeros, and repeated extremes, of which only one each is dropped."""
    eta = responsiveness(torch.tensor(R, dtype=torch.float64))
    assert eta == pytest.approx(oracle.responsiveness(R), rel=1e-13)


@pytest.mark.equation("HN-7")
def test_one_eta_for_every_sign_and_scale():
    """R, -R and 100 R: R / mean(R) is the same. Control: another skew gives another eta, on either side of 1."""
    R = torch.cat([torch.rand(40, generator=torch.Generator().manual_seed(13), dtype=torch.float64) ** 3, torch.ones(1)])
    eta = responsiveness(R)
    for factor in (-1, 100, 1e-3):
        assert abs(responsiveness(factor * R) - eta) < 1e-12
    assert eta < 1 < responsiveness(1.1 - R)


@pytest.mark.equation("HN-7")
def test_the_denominator_is_sigma_one_unless_the_fallback_applies():
    """kept mean 2/3 of R = (2, 4, 12): sigma(2/3) / sigma(1); with mean 0, R = (-3, 1, 2, 0): sigma(1/3) / sigma(0)."""
    assert responsiveness(torch.tensor([2.0, 4, 12])) == pytest.approx(oracle.sigmoid(2 / 3) / oracle.sigmoid(1), rel=1e-6)
    assert responsiveness(torch.tensor([-3.0, 1, 2, 0])) == pytest.approx(2 * oracle.sigmoid(1 / 3), rel=1e-6)


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize("mean_R", [0.9e-8, 1.1e-8, -0.9e-8, -1.1e-8])
def test_the_threshold_of_the_fallback(mean_R):
    """Rewards of about 1 around a mean just under and just over 1e-8. Over it, R~ is of the order 1e8 and eta saturates;
    under it R is divided by mean |R|, about 1, and eta is about 1."""
    R = torch.tensor([1.0, 0.25, -0.75, -0.5], dtype=torch.float64) + mean_R
    eta = responsiveness(R)
    assert eta == pytest.approx(oracle.responsiveness(R.tolist()), rel=1e-6)
    assert (0.5 < eta < 1.1) == (abs(mean_R) < 1e-8)


@pytest.mark.equation("HN-7")
@DTYPES
def test_all_rewards_zero_gives_one(dtype):
    """The first step: policy = reference, h = 0 for every pair."""
    assert responsiveness(torch.zeros(8, dtype=dtype)) == 1


@pytest.mark.equation("HN-7")
def test_only_one_extreme_at_each_end_is_dropped():
    """An outlier of any size leaves the kept values alone, up to the mean that normalises. With the running statistics, which
    do not move, eta stays exactly the same; control: two outliers at one end do move it."""
    R = torch.tensor([0.2, 0.4, 0.5, 0.9, 1.0], dtype=torch.float64)
    eta = responsiveness(R, mean=0.4, std=0.5)
    wild = torch.tensor([0.2, 0.4, 0.5, 0.9, 1e4], dtype=torch.float64)
    assert responsiveness(wild, mean=0.4, std=0.5) == eta
    wilder = torch.tensor([0.2, 0.4, 0.5, 1e4, 1e4], dtype=torch.float64)
    assert responsiveness(wilder, mean=0.4, std=0.5) > 1.2 * eta


@pytest.mark.equation("HN-7")
@DTYPES
@pytest.mark.parametrize("trim", [None, 0.2])
def test_running_statistics_match_the_oracle(trim, dtype):
    for seed in range(5):
        R = normal(16, seed=seed, dtype=dtype)
        eta = responsiveness(R, trim, mean=0.2, std=1.5)
        assert eta == pytest.approx(oracle.responsiveness_ema(R.tolist(), 0.2, 1.5, trim), rel=TOLERANCE[dtype])


@pytest.mark.equation("HN-7")
def test_running_statistics_react_to_learning():
    """A batch with rewards raised by one std gets a larger eta. Control: the document's own form barely sees it."""
    R = 2 + normal(64, seed=14)
    usual = responsiveness(R, mean=R.mean().item(), std=1.0)
    assert usual == pytest.approx(1, abs=0.1)
    assert responsiveness(R + 1, mean=R.mean().item(), std=1.0) > 1.3
    assert abs(responsiveness(R + 1) - responsiveness(R)) < 0.02


@pytest.mark.equation("HN-7")
def test_running_reward_by_hand():
    """(1, 3): mean 2, variance 1. Then (6, 6): mean 0.9 * 2 + 0.1 * 6 = 2.4, variance 0.9 * 1 + 0.1 * 0 = 0.9."""
    running = RunningReward(decay=0.9)
    assert running.update(torch.tensor([1.0, 3.0])) == (2, 1)
    assert running.update(torch.tensor([6.0, 6.0])) == pytest.approx((2.4, math.sqrt(0.9)), rel=1e-12)


@pytest.mark.equation("HN-7")
def test_the_global_batch_is_not_the_mean_of_its_parts():
    """Negative control for accumulation: eta of eight pairs differs from the mean of eta over two halves."""
    R = torch.tensor([1.0, 2, 3, 10, 0.5, 0.1, 0.2, 7], dtype=torch.float64)
    halves = (responsiveness(R[:4]) + responsiveness(R[4:])) / 2
    assert abs(responsiveness(R) - halves) > 0.01


@pytest.mark.equation("HN-7")
def test_the_order_of_the_pairs_does_not_matter():
    R = normal(17, seed=15)
    assert responsiveness(R.flip(0)) == pytest.approx(responsiveness(R).item(), rel=1e-14)


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize(("n", "trim"), [(0, None), (1, None), (2, None), (2, 0.4)])
def test_too_few_pairs(n, trim):
    with pytest.raises(ValueError, match="at least 3"):
        responsiveness(torch.ones(n), trim)


@pytest.mark.equation("HN-7")
def test_a_trim_out_of_range_a_broken_reward_and_half_of_the_statistics_are_refused():
    for trim in (-0.3, 0.0, 0.5):
        with pytest.raises(ValueError, match="between 0 and 0.5"):
            responsiveness(torch.ones(10), trim)
    with pytest.raises(ValueError, match="finite rewards"):
        responsiveness(torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(ValueError, match="both statistics"):
        responsiveness(torch.ones(5), mean=1.0)


@pytest.mark.equation("HN-2")
def test_opposite_embeddings_are_refused_although_rounding_leaves_something():
    H = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match="item row 0"):
        fuse(H, -2.7 * H)


# ---- HN-8: the weight, and that it is one ----


@pytest.mark.equation("HN-8")
@DTYPES
def test_pair_beta_matches_the_oracle(dtype):
    lam = normal(30, seed=16, dtype=dtype).sigmoid()
    eta = torch.tensor(1.1, dtype=dtype)
    beta = pair_beta(lam, eta)
    assert beta.dtype == dtype and beta.shape == (30,)
    np.testing.assert_allclose(beta, oracle.pair_beta(lam, eta, 0.1, 1e-6), rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(pair_beta(lam, eta, 0.3, 0.2), oracle.pair_beta(lam, eta, 0.3, 0.2), rtol=TOLERANCE[dtype])


@pytest.mark.equation("HN-8")
def test_beta_never_falls_under_the_floor():
    """lambda 1e-9: 1e-10 is lifted to 1e-6, while 0.5 keeps 0.05. One pair is enough."""
    np.testing.assert_allclose(pair_beta(torch.tensor([1e-9, 0.5]), torch.tensor(1.0)), [1e-6, 0.05], rtol=1e-6)
    assert pair_beta(torch.tensor([0.0]), torch.tensor(1.0)) == pytest.approx(1e-6)


@pytest.mark.equation("HN-8")
@pytest.mark.parametrize("form", ["union", "ranked", "cosine"])
@pytest.mark.parametrize("hard", ["sigmoid", "ratio", "standardised"])
def test_from_items_to_beta(form, hard):
    """The whole chain, H and X to beta', beside the oracle's chain."""
    H, X = normal(15, 6, seed=17), normal(15, 6, seed=18)
    has_image = torch.arange(15) % 4 != 0
    w, l, h = torch.arange(7), torch.arange(7, 14), 20 * normal(7, seed=19)
    e = fuse(H, X, has_image)
    beta = pair_beta(hardness(cluster_gap(e, *topk_neighbors(e, 3), w, l, form), hard), responsiveness(reward_gap(h, 0.1)))
    e_ = oracle.fuse(H.tolist(), X.tolist(), has_image)
    scores_, index_ = oracle.topk_neighbors(e_, 3)
    delta_ = [oracle.cluster_gap(e_, scores_, index_, a, b, form) for a, b in zip(w, l, strict=True)]
    eta_ = oracle.responsiveness(oracle.reward_gap(h, 0.1))
    np.testing.assert_allclose(beta, oracle.pair_beta(oracle.hardness(delta_, hard), eta_), rtol=1e-10)


@pytest.mark.equation("HN-8")
def test_no_gradient_through_the_weights():
    """beta' depends on h by R and eta, and on e by lambda, yet the loss must move only by h: d loss / d h = -beta' sigma(-beta' h).

    Control: the same beta' left attached gives another gradient.
    """
    e = normal(12, 4, seed=20)
    e = (e / e.norm(dim=1, keepdim=True)).requires_grad_()
    h = (10 * normal(6, seed=21) + 5).requires_grad_()
    R = reward_gap(h, 0.1)
    eta = responsiveness(0.1 * h)  # even an attached R gives no gradient
    lam = hardness(cluster_gap(e, *topk_neighbors(e, 3), torch.arange(6), torch.arange(6, 12)))
    beta = pair_beta(lam, eta)
    assert not R.requires_grad and not eta.requires_grad and not beta.requires_grad
    dpo_loss(h, beta).sum().backward()
    np.testing.assert_allclose(h.grad, oracle.dpo_slope(h.tolist(), beta), rtol=1e-12)
    assert e.grad is None

    attached_h = h.detach().clone().requires_grad_()
    attached_beta = lam.detach() * (attached_h / attached_h.mean()).sort().values[1:-1].mean().sigmoid() * 0.1
    (-torch.nn.functional.logsigmoid(attached_beta * attached_h)).sum().backward()
    assert (attached_h.grad - h.grad).abs().max() > 1e-3
