r"""HN-1, HN-2, HN-4 .. HN-8 as the document is read, against the oracle; their limits, and negative
controls. Other readings: test_readings.py.
"""

import math
from itertools import permutations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from toy_pairs import DTYPES, TOLERANCE, catalogue, normal, oracle_gaps

from hanorec import hars
from hanorec.etas import ema_eta
from hanorec.hars import (
    cluster_gap,
    fuse,
    hardness,
    mean_pool,
    pair_beta,
    responsiveness,
    reward_gap,
    without_extremes,
)
from hanorec.losses import dpo_loss
from hanorec.readings import cosine_gap, ranked_gap
from hanorec.topk import topk_neighbors

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)


# ---- HN-1, HN-2: embeddings ----


@pytest.mark.equation("HN-1")
@pytest.mark.parametrize("n", [1, 5])
def test_mean_pool(n):
    rows = normal(n, 3, seed=1)
    np.testing.assert_allclose(mean_pool(rows), oracle.item_embedding(rows.tolist()), atol=1e-15)


@pytest.mark.equation("HN-1")
def test_mean_pool_adds_in_float32():
    """In bfloat16 the integers above 256 are even only, so a running sum of 300 ones would stop at
    256; the mean is 1.
    """
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
    expected = oracle.fuse(H.tolist(), X.tolist(), has_image)
    np.testing.assert_allclose(e, expected, atol=TOLERANCE[dtype])
    expected = oracle.fuse(H.tolist(), X.tolist())
    np.testing.assert_allclose(fuse(H, X), expected, atol=TOLERANCE[dtype])


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


@pytest.mark.equation("HN-2")
def test_opposite_embeddings_are_refused_although_rounding_leaves_something():
    H = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match="item row 0"):
        fuse(H, -2.7 * H)


# ---- HN-4: the gap of two clusters ----


@pytest.mark.equation("HN-4")
@DTYPES
@pytest.mark.parametrize("k", [1, 4, 23])
def test_gap_of_every_pair_of_a_catalogue(k, dtype):
    """All 24 x 23 ordered pairs: overlapping and disjoint clusters, w in N(l) and not; at K = 23
    each cluster is everything.
    """
    e, scores, index = catalogue(k=k, dtype=dtype)
    pairs = list(permutations(range(24), 2))
    chosen, rejected = torch.tensor(pairs).T
    delta = cluster_gap(e, scores, index, chosen, rejected)
    assert delta.shape == (len(pairs),) and delta.dtype == dtype
    expected = oracle_gaps(e, scores, index, chosen, rejected)
    np.testing.assert_allclose(delta, expected, atol=TOLERANCE[dtype])
    if k == 4:  # the pairs do cover the cases named above
        members = [(set(index[w].tolist()), set(index[l].tolist())) for w, l in pairs]
        assert any(w in N_l for (w, _), (_, N_l) in zip(pairs, members, strict=True))
        assert any(N_w & N_l for N_w, N_l in members) and any(not N_w & N_l for N_w, N_l in members)


@pytest.mark.equation("HN-4")
@given(data=st.data())
@QUICK
def test_gap_with_duplicates_and_ties(data):
    """Items on the four axes of the plane, many of them equal, one pair at a time (P = 1)."""
    n = data.draw(st.integers(2, 9))
    axes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    e = axes[data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))]
    scores, index = topk_neighbors(e, data.draw(st.integers(1, n - 1)))
    w, l = (torch.tensor([data.draw(st.integers(0, n - 1))]) for _ in range(2))
    expected = oracle_gaps(e, scores, index, w, l)
    np.testing.assert_allclose(cluster_gap(e, scores, index, w, l), expected, atol=1e-14)


@pytest.mark.equation("HN-4")
def test_gap_of_an_item_with_itself_and_with_its_copy_is_zero():
    e, _, _ = catalogue(n=10)
    e = e.repeat(2, 1)
    scores, index = topk_neighbors(e, 3)
    w = torch.arange(10)
    np.testing.assert_allclose(cluster_gap(e, scores, index, w, w), 0, atol=1e-14)
    np.testing.assert_allclose(cluster_gap(e, scores, index, w, w + 10), 0, atol=1e-14)


@pytest.mark.equation("HN-4")
def test_gap_is_symmetric_and_bounded():
    """Both distributions live on one set, so the order of the pair does not matter; two
    distributions are at most sqrt 2 apart.
    """
    e, scores, index = catalogue()
    w, l = torch.arange(12), torch.arange(12, 24)
    delta = cluster_gap(e, scores, index, w, l)
    np.testing.assert_allclose(delta, cluster_gap(e, scores, index, l, w), atol=1e-15)
    assert (delta > 0).all() and (delta < math.sqrt(2)).all()


@pytest.mark.equation("HN-4")
def test_control_a_union_that_repeats_members_differs():
    """Dropping the de-duplication moves every gap whose clusters overlap (here by over 0.001), so
    the oracle would notice.
    """
    e, scores, index = catalogue()
    # l is w's nearest: {w, l} and the clusters overlap always
    pairs = [(w, int(index[w, 0])) for w in range(24)]
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
    """The reason for the document's reading: 300 random items, 800 pairs; the gap should fall as
    cos(w, l) rises. Also the two differ.
    """
    e, scores, index = catalogue(n=300, d=16, k=10, seed=9)
    draw = torch.Generator().manual_seed(9)
    w = torch.randint(300, (800,), generator=draw)
    l = (w + torch.randint(1, 300, (800,), generator=draw)) % 300
    cosine = 1 - cosine_gap(e, scores, index, w, l)
    union, ranked = cluster_gap(e, scores, index, w, l), ranked_gap(e, scores, index, w, l)
    assert np.corrcoef(union, cosine)[0, 1] < -0.8
    assert abs(np.corrcoef(ranked, cosine)[0, 1]) < 0.15
    assert hardness(ranked).max() < 0.52 < hardness(union).max()


@pytest.mark.equation("HN-4")
@pytest.mark.parametrize("at_once", [1, 50, 276, 551, 552])
def test_pieces_of_the_pairs_do_not_show(monkeypatch, at_once):
    """552 pairs in pieces that divide 552, that leave one pair over, and in one: the same gaps, in
    the same order. Control: pieces in another order would show, since a shift by one piece does.
    """
    e, scores, index = catalogue()
    w, l = torch.tensor(list(permutations(range(24), 2))).T
    whole = cluster_gap(e, scores, index, w, l)
    assert len(w) == 552 < hars.PAIRS_AT_ONCE
    monkeypatch.setattr(hars, "PAIRS_AT_ONCE", at_once)
    pieces = cluster_gap(e, scores, index, w, l)
    torch.testing.assert_close(pieces, whole, atol=1e-15, rtol=0)
    if at_once < 552:
        assert (pieces.roll(at_once) - whole).abs().max() > 0.1


@pytest.mark.equation("HN-4")
def test_no_pair_has_no_gap():
    e, scores, index = catalogue()
    none = torch.zeros(0, dtype=torch.int64)
    assert cluster_gap(e, scores, index, none, none).shape == (0,)


class Largest(TorchDispatchMode):
    """The most numbers in any tensor made inside; the names of the operations."""

    def __init__(self):
        super().__init__()
        self.numbers, self.operations = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.add(function.name().removeprefix("aten::").partition(".")[0])
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 8)
        return made


@pytest.mark.equation("HN-4")
def test_memory_is_that_of_one_piece(monkeypatch):
    """5,520 pairs, each with 2 + 2 x 4 members of width 6: of 100 at a time no tensor holds more
    than their members, 6,000 numbers, beside the 5,520 results. Control: in one piece it would be
    331,200.
    """
    e, scores, index = catalogue()
    w, l = (rows.clone() for rows in torch.tensor(list(permutations(range(24), 2)) * 10).T)

    def largest(at_once):
        monkeypatch.setattr(hars, "PAIRS_AT_ONCE", at_once)
        with Largest() as found:
            cluster_gap(e, scores, index, w, l)
        return found.numbers

    assert largest(100) == 100 * 10 * 6
    assert largest(len(w)) >= len(w) * 10 * 6


@pytest.mark.equation("HN-4")
def test_many_pairs_on_a_device():
    """Torch's device of shapes without numbers: 50,000 pairs of 41,081 items of width 1536 in
    tensors of 1,024 x 22 x 1,536 numbers (in float32; here counted by 8 bytes) at most, and nobody
    asks for a number, which would fail there. Control: a question is among the operations.
    """
    e = torch.empty(41_081, 1536, device="meta")
    scores = torch.empty(41_081, 10, device="meta")
    index = torch.empty(41_081, 10, dtype=torch.int64, device="meta")
    w = torch.empty(50_000, dtype=torch.int64, device="meta")
    with Largest() as found:
        delta = cluster_gap(e, scores, index, w, w)
    assert delta.shape == (50_000,)
    assert found.numbers <= 1024 * 22 * 1536 * 4 // 8
    assert "_local_scalar_dense" not in found.operations
    with Largest() as asked:
        torch.ones(2).sum().item()
    assert "_local_scalar_dense" in asked.operations


# ---- HN-5: hardness ----


@pytest.mark.equation("HN-5")
@DTYPES
def test_hardness_matches_the_oracle(dtype):
    delta = normal(50, seed=10, dtype=dtype).abs()
    lam = hardness(delta)
    assert lam.dtype == dtype
    np.testing.assert_allclose(lam, oracle.hardness(delta), rtol=TOLERANCE[dtype])


@pytest.mark.equation("HN-5")
def test_a_larger_gap_is_never_harder():
    """Smaller lambda = harder; sigma(Delta) starts at 1/2 because Delta >= 0."""
    delta = torch.linspace(0, math.sqrt(2), 30, dtype=torch.float64)
    assert (hardness(delta).diff() > 0).all()
    assert hardness(delta)[0] == 0.5
    assert hardness(delta)[-1] == pytest.approx(oracle.sigmoid(math.sqrt(2)), abs=1e-15)


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
def test_responsiveness_matches_the_oracle(n, dtype):
    for seed in range(5):
        R = 0.3 + normal(n, seed=seed, dtype=dtype)
        eta = responsiveness(R)
        assert eta.shape == () and eta.dtype == dtype
        expected = oracle.responsiveness(R.tolist())
        assert eta == pytest.approx(expected, rel=100 * TOLERANCE[dtype])


@pytest.mark.equation("HN-7")
@given(st.lists(st.integers(-3, 3), min_size=3, max_size=12))
@QUICK
def test_responsiveness_with_ties_zero_means_and_zeros(R):
    """Small integers reach the fallback (mean 0), all zeros, and repeated extremes, of which only
    one each is dropped.
    """
    eta = responsiveness(torch.tensor(R, dtype=torch.float64))
    assert eta == pytest.approx(oracle.responsiveness(R), rel=1e-13)


@pytest.mark.equation("HN-7")
def test_one_eta_for_every_sign_and_scale():
    """R, -R and 100 R: R / mean(R) is the same. Control: another skew gives another eta, on either
    side of 1.
    """
    draw = torch.Generator().manual_seed(13)
    R = torch.cat([torch.rand(40, generator=draw, dtype=torch.float64) ** 3, torch.ones(1)])
    eta = responsiveness(R)
    for factor in (-1, 100, 1e-3):
        assert abs(responsiveness(factor * R) - eta) < 1e-12
    assert eta < 1 < responsiveness(1.1 - R)


@pytest.mark.equation("HN-7")
def test_the_denominator_is_sigma_one_unless_the_fallback_applies():
    """kept mean 2/3 of R = (2, 4, 12): sigma(2/3) / sigma(1); with mean 0, R = (-3, 1, 2, 0):
    sigma(1/3) / sigma(0).
    """
    eta = responsiveness(torch.tensor([2.0, 4, 12]))
    assert eta == pytest.approx(oracle.sigmoid(2 / 3) / oracle.sigmoid(1), rel=1e-6)
    eta = responsiveness(torch.tensor([-3.0, 1, 2, 0]))
    assert eta == pytest.approx(2 * oracle.sigmoid(1 / 3), rel=1e-6)


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize("mean_R", [0.9e-8, 1.1e-8, -0.9e-8, -1.1e-8])
def test_the_threshold_of_the_fallback(mean_R):
    """Rewards of about 1 around a mean just under and just over 1e-8. Over it, R~ is of the order
    1e8 and eta saturates; under it R is divided by mean |R|, about 1, and eta is about 1.
    """
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
    """An outlier of any size leaves the kept values alone. Control: of two at one end one is kept.
    """
    calm = torch.tensor([1.0, 0.4, 0.2, 0.9, 0.5], dtype=torch.float64)
    assert without_extremes(calm).tolist() == [0.4, 0.5, 0.9]
    calm[0] = 1e4
    assert without_extremes(calm).tolist() == [0.4, 0.5, 0.9]
    calm[1] = 1e4
    assert without_extremes(calm).tolist() == [0.5, 0.9, 1e4]


@pytest.mark.equation("HN-7")
def test_running_statistics_react_to_learning():
    """A batch with rewards raised by one std gets a larger eta. Control: the document's own form
    barely sees it.
    """
    R = 2 + normal(64, seed=14)
    before = {"mean": R.mean().item(), "variance": 1.0}
    assert ema_eta(R, dict(before)) == pytest.approx(1, abs=0.1)
    assert ema_eta(R + 1, dict(before)) > 1.3
    assert abs(responsiveness(R + 1) - responsiveness(R)) < 0.02


@pytest.mark.equation("HN-7")
def test_the_global_batch_is_not_the_mean_of_its_parts():
    """Negative control for accumulation: eta of eight pairs differs from the mean of eta over two
    halves.
    """
    R = torch.tensor([1.0, 2, 3, 10, 0.5, 0.1, 0.2, 7], dtype=torch.float64)
    halves = (responsiveness(R[:4]) + responsiveness(R[4:])) / 2
    assert abs(responsiveness(R) - halves) > 0.01


@pytest.mark.equation("HN-7")
def test_the_order_of_the_pairs_does_not_matter():
    R = normal(17, seed=15)
    assert responsiveness(R.flip(0)) == pytest.approx(responsiveness(R).item(), rel=1e-14)


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_pairs(n):
    with pytest.raises(ValueError, match=f"of {n} pairs, 1 dropped from each end: at least 3"):
        responsiveness(torch.ones(n))


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_reward_is_refused(broken):
    with pytest.raises(ValueError, match="finite rewards"):
        responsiveness(torch.tensor([1.0, broken, 2.0]))


# ---- HN-8: the weight, and that it is one ----


@pytest.mark.equation("HN-8")
@DTYPES
def test_pair_beta_matches_the_oracle(dtype):
    lam = normal(30, seed=16, dtype=dtype).sigmoid()
    eta = torch.tensor(1.1, dtype=dtype)
    beta = pair_beta(lam, eta)
    assert beta.dtype == dtype and beta.shape == (30,)
    np.testing.assert_allclose(beta, oracle.pair_beta(lam, eta, 0.1, 1e-6), rtol=TOLERANCE[dtype])
    beta = pair_beta(lam, eta, 0.3, 0.2)
    np.testing.assert_allclose(beta, oracle.pair_beta(lam, eta, 0.3, 0.2), rtol=TOLERANCE[dtype])


@pytest.mark.equation("HN-8")
def test_beta_never_falls_under_the_floor():
    """lambda 1e-9: 1e-10 is lifted to 1e-6, while 0.5 keeps 0.05. One pair is enough."""
    beta = pair_beta(torch.tensor([1e-9, 0.5]), torch.tensor(1.0))
    np.testing.assert_allclose(beta, [1e-6, 0.05], rtol=1e-6)
    assert pair_beta(torch.tensor([0.0]), torch.tensor(1.0)) == pytest.approx(1e-6)


@pytest.mark.equation("HN-8")
def test_no_gradient_through_the_weights():
    """beta' depends on h by R and eta, and on e by lambda, yet the loss must move only by h: d loss
    / d h = -beta' sigma(-beta' h).

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
    kept = (attached_h / attached_h.mean()).sort().values[1:-1]
    attached_beta = lam.detach() * kept.mean().sigmoid() * 0.1
    (-torch.nn.functional.logsigmoid(attached_beta * attached_h)).sum().backward()
    assert (attached_h.grad - h.grad).abs().max() > 1e-3
