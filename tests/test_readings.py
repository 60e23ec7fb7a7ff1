r"""The other readings of HN-4, HN-5 and HN-7, and the controls, against the oracle; what all are
called. The document's own readings: test_hars.py. The noise (HN-9): test_lora_math.py.
"""

import math
import typing
from itertools import permutations, product

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_pairs import DTYPES, TOLERANCE, catalogue, normal, oracle_gaps

from hanorec import etas, hars, readings
from hanorec.base.config import DpoConfig
from hanorec.base.config_steps import StepConfig
from hanorec.base.settings import parse
from hanorec.etas import (
    batch_eta,
    beta_dpo_eta,
    ema_eta,
    inner_kept,
    near_kept,
    pair_eta,
    running_statistics,
)
from hanorec.hars import fuse, pair_beta, reward_gap
from hanorec.lora.layer import absolute_noise
from hanorec.readings import (
    CONTROLS,
    ETAS,
    GAPS,
    HARDNESS,
    KEPT,
    NOISES,
    alignment_kl,
    cosine_gap,
    mean_lambda,
    one_lambda,
    permuted_lambda,
    ratio_hardness,
    reversed_lambda,
    standardised_hardness,
    unchanged,
)
from hanorec.run.checkpoint import load_checkpoint, save_checkpoint
from hanorec.topk import topk_neighbors

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
BY_FLAG = {
    "gap": GAPS,
    "hardness": HARDNESS,
    "control": CONTROLS,
    "eta": ETAS,
    "kept": KEPT,
    "noise": NOISES,
}
DOCUMENT = [
    hars.cluster_gap, hars.hardness, unchanged, batch_eta, etas.all_kept, absolute_noise,
]
OTHER_GAPS = ["ranked", "signed", "centroid", "cosine"]


# ---- the gap (HN-4) ----


@pytest.mark.equation("HN-4")
@DTYPES
@pytest.mark.parametrize("form", OTHER_GAPS)
@pytest.mark.parametrize("k", [1, 4, 23])
def test_other_gaps_of_every_pair_of_a_catalogue(k, form, dtype):
    """All 24 x 23 ordered pairs; of `cosine` K is no part."""
    e, scores, index = catalogue(k=k, dtype=dtype)
    chosen, rejected = torch.tensor(list(permutations(range(24), 2))).T
    delta = GAPS[form](e, scores, index, chosen, rejected)
    assert delta.shape == (24 * 23,) and delta.dtype == dtype
    expected = oracle_gaps(e, scores, index, chosen, rejected, form)
    np.testing.assert_allclose(delta, expected, atol=TOLERANCE[dtype])


@pytest.mark.equation("HN-4")
@given(data=st.data())
@QUICK
def test_other_gaps_with_duplicates_and_ties(data):
    """Items on the four axes of the plane, many of them equal, one pair at a time (P = 1)."""
    n = data.draw(st.integers(2, 9))
    axes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    e = axes[data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))]
    scores, index = topk_neighbors(e, data.draw(st.integers(1, n - 1)))
    w, l = (torch.tensor([data.draw(st.integers(0, n - 1))]) for _ in range(2))
    for form in OTHER_GAPS:
        expected = oracle_gaps(e, scores, index, w, l, form)
        np.testing.assert_allclose(GAPS[form](e, scores, index, w, l), expected, atol=1e-14)


@pytest.mark.equation("HN-4")
def test_cosine_of_an_item_with_itself_and_with_its_copy_is_zero_and_never_below():
    """In float32 <e, e> rounds above 1 for some rows, so that 1 - <e, e> alone would be negative.
    """
    e, _, _ = catalogue(n=200, dtype=torch.float32)
    e = e.repeat(2, 1)
    w = torch.arange(200)
    for l in (w, w + 200):
        delta = cosine_gap(e, e, w, w, l)  # neither scores nor index is looked at
        assert (delta >= 0).all()
        np.testing.assert_allclose(delta, 0, atol=1e-6)
    assert (1 - (e[w] * e[w]).sum(1)).min() < 0


@pytest.mark.equation("HN-4")
def test_the_bounds_of_other_gaps():
    """cosine: 2 of opposite items. ranked: two distributions, so less than sqrt 2."""
    e, scores, index = catalogue()
    opposite = torch.cat([e, -e])
    w, l = torch.arange(24), torch.arange(24, 48)
    np.testing.assert_allclose(cosine_gap(opposite, scores, index, w, l), 2, atol=1e-14)
    ranked = readings.ranked_gap(e, scores, index, w, w.flip(0))
    assert (ranked >= 0).all() and (ranked < math.sqrt(2)).all()
    # each other's mirror image: symmetric
    np.testing.assert_allclose(ranked, ranked.flip(0), atol=1e-15)


@pytest.mark.equation("HN-4", "HN-5")
def test_only_a_signed_gap_reaches_a_lambda_below_one_half():
    """An item amid copies of itself against one whose neighbours are far: 1 less 0, and the other
    way round; exchanged it changes its sign. Control: no other gap is ever below 0, or tells the
    two orders apart.
    """
    e, scores, index = catalogue()
    w, l = torch.tensor(list(permutations(range(24), 2))).T
    signed = GAPS["signed"](e, scores, index, w, l)
    np.testing.assert_array_equal(signed, -GAPS["signed"](e, scores, index, l, w))
    lam = hars.hardness(signed)
    assert lam.min() < 0.48 and lam.max() > 0.52
    for form in ("union", "ranked", "centroid", "cosine"):
        gap = GAPS[form](e, scores, index, w, l)
        assert (gap >= 0).all(), form
        np.testing.assert_allclose(gap, GAPS[form](e, scores, index, l, w), atol=1e-15)

    close = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # scores of two items
    first, second = torch.tensor([0]), torch.tensor([1])
    assert readings.signed_gap(e, close, index, first, second).tolist() == [1]
    assert readings.signed_gap(e, close, index, second, first).tolist() == [-1]


@pytest.mark.equation("HN-4")
def test_centroids_of_one_cluster_are_at_one_place():
    """Two items and each other's only neighbour: both clusters are the same set. Control: `cosine`
    sees two items."""
    e = catalogue()[0][:2]
    scores, index = topk_neighbors(e, 1)
    w, l = torch.tensor([0]), torch.tensor([1])
    np.testing.assert_allclose(readings.centroid_gap(e, scores, index, w, l), 0, atol=1e-15)
    assert cosine_gap(e, scores, index, w, l) > 0.01


@pytest.mark.equation("HN-4")
def test_a_gap_by_jensen_shannon_would_say_the_same():
    """To second order it is |U| Delta^2 / 8, by the oracle's distributions; so it orders pairs as
    `union` does, and is no option. Control: `ranked` orders them otherwise.
    """
    e, scores, index = catalogue(n=60, d=12, k=5)
    found = {"js": [], "second order": [], "union": [], "ranked": []}
    for w, l in zip(range(30), range(30, 60), strict=True):
        members = sorted({w, l, *index[w].tolist(), *index[l].tolist()})
        p, q = (oracle.softmax((e[members] @ e[m]).tolist()) for m in (w, l))
        between = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        js = 0.0
        for one in (p, q):
            js += 0.5 * sum(a * math.log(a / b) for a, b in zip(one, between, strict=True))
        gaps = {form: oracle.cluster_gap(e, scores, index, w, l, form) for form in GAPS}
        found["js"].append(js)
        found["second order"].append(len(members) * gaps["union"] ** 2 / 8)
        found["union"].append(gaps["union"])
        found["ranked"].append(gaps["ranked"])
    np.testing.assert_allclose(found["js"], found["second order"], rtol=0.2)
    order = {name: np.argsort(np.argsort(values)) for name, values in found.items()}
    assert np.corrcoef(order["js"], order["union"])[0, 1] > 0.98
    assert np.corrcoef(order["js"], order["ranked"])[0, 1] < 0.7


# ---- the hardness (HN-5) ----


@pytest.mark.equation("HN-5")
@DTYPES
@pytest.mark.parametrize("form", ["ratio", "standardised"])
def test_other_hardness_matches_the_oracle(form, dtype):
    delta = normal(50, seed=10, dtype=dtype).abs()
    lam = HARDNESS[form](delta)
    assert lam.dtype == dtype
    np.testing.assert_allclose(lam, oracle.hardness(delta, form), rtol=TOLERANCE[dtype])


@pytest.mark.equation("HN-5")
def test_ratio_is_sigmoid_up_to_a_constant_and_standardised_is_not():
    delta = normal(50, seed=11).abs()
    plain = hars.hardness(delta)
    ratio = ratio_hardness(delta) / plain
    np.testing.assert_allclose(ratio, 1 / oracle.sigmoid(delta.mean()), rtol=1e-14)
    standardised = standardised_hardness(delta) / plain
    assert standardised.max() / standardised.min() > 2


@pytest.mark.equation("HN-5")
def test_a_larger_gap_is_never_harder_in_any_reading():
    """Standardised spans far more than the document's."""
    delta = torch.linspace(0, math.sqrt(2), 30, dtype=torch.float64)
    for reading in HARDNESS.values():
        assert (reading(delta).diff() > 0).all()
    plain, spread = hars.hardness(delta), standardised_hardness(delta)
    assert spread.max() - spread.min() > 1 > 3 * (plain.max() - plain.min())


@pytest.mark.equation("HN-5")
def test_standardised_uses_the_population_deviation():
    """Delta = (0, 2): mean 1, population std 1 (sample std sqrt 2): 2 sigma(-1), 2 sigma(1)."""
    lam = standardised_hardness(torch.tensor([0.0, 2.0], dtype=torch.float64))
    np.testing.assert_allclose(lam, [2 * oracle.sigmoid(-1), 2 * oracle.sigmoid(1)], rtol=1e-14)


@pytest.mark.equation("HN-5")
@pytest.mark.parametrize("n", [1, 4])
def test_standardised_refuses_equal_gaps(n):
    with pytest.raises(ValueError, match="standard deviation 0.*use the form sigmoid"):
        standardised_hardness(torch.ones(n))


# ---- the controls ----


@pytest.mark.equation("HN-5")
def test_reversed_gives_the_hardest_pair_the_largest():
    """0.5 < 0.6 < 0.7 < 0.9 stand in rows 0, 2, 3, 1: reversed, row 0 gets 0.9, row 2 0.7, row 3
    0.6, row 1 0.5. Of equal ones each gets what is equal, too.
    """
    lam = torch.tensor([0.5, 0.9, 0.6, 0.7])
    assert torch.equal(reversed_lambda(lam), torch.tensor([0.9, 0.5, 0.7, 0.6]))
    assert reversed_lambda(torch.ones(3)).tolist() == [1, 1, 1]
    assert unchanged(lam) is lam


@pytest.mark.equation("HN-5")
def test_permuted_deals_them_out_by_the_generator():
    """The same numbers, nearly all at other pairs, alike for one seed. Control: not for another."""
    lam = torch.linspace(0.5, 0.9, 100, dtype=torch.float64)

    def dealt(seed):
        return permuted_lambda(lam, torch.Generator().manual_seed(seed))

    assert torch.equal(dealt(0).sort().values, lam)
    assert (dealt(0) != lam).float().mean() > 0.9
    assert torch.equal(dealt(0), dealt(0))
    assert not torch.equal(dealt(0), dealt(1))


@pytest.mark.equation("HN-5")
def test_mean_gives_all_pairs_one_lambda():
    lam = mean_lambda(torch.tensor([0.5, 0.9, 0.7, 0.5], dtype=torch.float64))
    assert lam.shape == (4,) and lam.tolist() == pytest.approx([0.65] * 4)


@pytest.mark.equation("HN-5")
def test_one_is_no_hardness_at_all():
    """With eta = 1 beta' is beta0: plain DPO. Control: the mean is not."""
    lam = torch.tensor([0.5, 0.9, 0.7], dtype=torch.float64)
    beta = pair_beta(one_lambda(lam), torch.ones((), dtype=torch.float64), 0.1)
    assert beta.tolist() == [0.1] * 3
    assert not torch.equal(one_lambda(lam), mean_lambda(lam))


# ---- the responsiveness (HN-7) ----


@pytest.mark.equation("HN-7")
@DTYPES
@pytest.mark.parametrize("n", [3, 4, 32])
@pytest.mark.parametrize("trim", [None, 0.05, 0.1, 0.33])
def test_batch_eta_matches_the_oracle(n, trim, dtype):
    """Without trim it is the document's to the bit, and it keeps nothing."""
    for seed in range(5):
        R = 0.3 + normal(n, seed=seed, dtype=dtype)
        state = {}
        eta = batch_eta(R, state, trim)
        assert eta.shape == () and eta.dtype == dtype and state == {}
        expected = oracle.responsiveness(R.tolist(), trim)
        assert eta == pytest.approx(expected, rel=100 * TOLERANCE[dtype])
        if trim is None:
            assert eta == hars.responsiveness(R)


@pytest.mark.equation("HN-7")
@DTYPES
@pytest.mark.parametrize("n", [3, 8, 32])
@pytest.mark.parametrize("trim", [None, 0.33])
def test_pair_eta_matches_the_oracle(n, trim, dtype):
    """Of prompts with two pairs each as of single ones."""
    for seed in range(5):
        R = 0.3 + normal(n, 2, seed=seed, dtype=dtype)
        eta = pair_eta(R, {}, trim)
        assert eta.shape == R.shape and eta.dtype == dtype
        expected = oracle.responsiveness_of_pairs(R.flatten().tolist(), trim)
        np.testing.assert_allclose(eta.flatten(), expected, rtol=100 * TOLERANCE[dtype])


@pytest.mark.equation("HN-7")
def test_pair_eta_tells_pairs_apart_and_no_other_does():
    """A larger reward has the larger eta, but for extremes: they have that of the next. Of three
    pairs all have one number, the middle's, which is the document's own; without rewards all have
    1, as there.
    """
    R = torch.tensor([0.9, 0.1, 0.5, 0.3, 7.0], dtype=torch.float64)
    eta = pair_eta(R, {})
    assert eta[1] == eta[3] < eta[2] < eta[0] == eta[4]
    assert batch_eta(R, {}).shape == ema_eta(R, {}).shape == beta_dpo_eta(R, {}).shape == ()
    three = R[:3]
    np.testing.assert_allclose(pair_eta(three, {}), batch_eta(three, {}), rtol=1e-15)
    assert pair_eta(torch.zeros(4), {}).tolist() == [1] * 4
    assert pair_eta(-R, {})[0] < 1.37  # R and -R are alike, as in `batch`
    np.testing.assert_allclose(pair_eta(-R, {}), eta, rtol=1e-14)


@pytest.mark.equation("HN-7")
@DTYPES
def test_beta_dpo_matches_the_oracle(dtype):
    """Five batches; the first has the mean that it sets, so 1. Control: the running mean counts."""
    state, before = {}, None
    for seed in range(5):
        R = 0.2 * seed + 0.1 * normal(16, seed=seed, dtype=dtype)
        eta = beta_dpo_eta(R, state)
        before = oracle.running_statistics(R.tolist(), before)
        expected = oracle.beta_dpo_factor(R.tolist(), before[0])
        assert eta.shape == () and eta == pytest.approx(expected, rel=10 * TOLERANCE[dtype])
        assert (eta == 1) == (seed == 0)
    assert beta_dpo_eta(R, {}) == 1 != expected


@pytest.mark.equation("HN-7")
def test_beta_dpo_never_turns_a_preference_round():
    """A mean far below the running one: 0, which HN-8 raises to its floor, and never less."""
    state = {}
    beta_dpo_eta(torch.ones(4), state)
    eta = beta_dpo_eta(torch.full((4,), -9.0), state)
    assert eta == 0 and pair_beta(torch.ones(4), eta).tolist() == pytest.approx([1e-6] * 4)


# ---- which pairs count in the loss (HN-11) ----


@pytest.mark.equation("HN-11")
def test_all_pairs_count_but_extremes():
    """By hand: of (3, 1, 2, 9, 5) the 1 and the 9 do not count and the others make up for them; a
    trim of 0.4 leaves the 3. The mean weight is always 1. Fewer than three are refused.
    """
    R = torch.tensor([[3.0, 1.0], [2.0, 9.0], [5.0, 4.0]], dtype=torch.float64)
    assert etas.all_kept(R, {}).tolist() == torch.ones(3, 2).tolist()
    assert inner_kept(R, {}).tolist() == [[1.5, 0], [1.5, 0], [1.5, 1.5]]
    assert inner_kept(R, {}, 0.4).tolist() == [[3, 0], [0, 0], [0, 3]]
    with pytest.raises(ValueError, match="at least 3"):
        inner_kept(R[:1], {})


@pytest.mark.equation("HN-11")
def test_near_draws_what_lies_near_the_running_mean():
    """Chances by the Gaussian of the distance, without replacement: over many draws the pair that
    is left out of four of five is as often each as exact enumeration says. Control: uniform chances
    would leave out each as often.
    """
    R = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    state = {"mean": 0.5, "variance": 1.0}
    generator = torch.Generator().manual_seed(0)
    n = 4000
    weights = torch.stack([near_kept(R, state, None, generator) for _ in range(n)])
    assert set(weights.unique().tolist()) == {0.0, 1.25}
    np.testing.assert_allclose(weights.sum(1), 5)
    chance = np.exp(-0.5 * (R.numpy() - 0.5) ** 2)
    expected = np.zeros(5)
    for order in permutations(range(5), 4):
        p, left = 1.0, chance.sum()
        for i in order:
            p, left = p * chance[i] / left, left - chance[i]
        (missing,) = set(range(5)) - set(order)
        expected[missing] += p
    found = (weights == 0).double().mean(0).numpy()
    np.testing.assert_allclose(found, expected, atol=4 * math.sqrt(0.25 / n))
    assert expected.max() > 0.8 and expected.min() < 0.02
    again = near_kept(R, state, None, torch.Generator().manual_seed(0))
    assert torch.equal(again, weights[0])


# ---- image and text (HN-12) ----


@pytest.mark.equation("HN-12")
@DTYPES
@pytest.mark.parametrize("n", [3, 9])
def test_alignment_matches_the_oracle(n, dtype):
    H, X = normal(n, 5, seed=1, dtype=dtype), normal(n, 5, seed=2, dtype=dtype)
    found = alignment_kl(H, X)
    assert found.shape == () and found.dtype == dtype and found > 0
    assert found == pytest.approx(oracle.alignment_kl(H, X), rel=1e3 * TOLERANCE[dtype])


@pytest.mark.equation("HN-12")
def test_alignment_is_zero_where_both_spaces_are_one():
    """Also of scaled and rotated embeddings: what counts is likeness. Control: of other items'
    images it is not. Its gradient is that of finite differences, and reaches both.
    """
    H = normal(6, 4, seed=3)
    turn = torch.linalg.qr(normal(4, 4, seed=4)).Q
    assert alignment_kl(H, 3 * H @ turn) == pytest.approx(0, abs=1e-14)
    assert alignment_kl(H, H.roll(1, 0)) > 1e-3
    X = normal(6, 4, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(alignment_kl, (H.requires_grad_(), X))


@pytest.mark.equation("HN-7")
@DTYPES
@pytest.mark.parametrize("trim", [None, 0.2])
def test_ema_eta_matches_the_oracle(trim, dtype):
    """Over five batches, each with the statistics that it has just been mixed into."""
    state, before = {}, None
    for seed in range(5):
        R = seed + (1 + seed) * normal(16, seed=seed, dtype=dtype)
        eta = ema_eta(R, state, trim)
        mean, variance = before = oracle.running_statistics(R.tolist(), before)
        expected = oracle.responsiveness_ema(R.tolist(), mean, math.sqrt(variance), trim)
        assert eta.shape == () and eta.dtype == dtype
        assert eta == pytest.approx(expected, rel=10 * TOLERANCE[dtype])
        found = state["mean"], state["variance"]
        assert found == pytest.approx((mean, variance), rel=10 * TOLERANCE[dtype])


@pytest.mark.equation("HN-7")
def test_running_statistics_by_hand():
    """(1, 3): mean 2, variance 1. Then (6, 6): mean 0.9 * 2 + 0.1 * 6 = 2.4, variance 0.9 * 1 + 0.1
    * 0 = 0.9.
    """
    state = {}
    assert running_statistics(torch.tensor([1.0, 3.0]), state) == (2, 1)
    found = running_statistics(torch.tensor([6.0, 6.0]), state)
    assert found == pytest.approx((2.4, math.sqrt(0.9)), rel=1e-12)
    assert state == pytest.approx({"mean": 2.4, "variance": 0.9}, rel=1e-12)


@pytest.mark.equation("HN-7")
def test_ema_drops_only_one_extreme_at_each_end(monkeypatch):
    """With statistics that do not move, an outlier of any size leaves eta exactly the same;
    control: two outliers at one end do move it.
    """
    monkeypatch.setattr(etas, "DECAY", 1.0)

    def eta(*rewards):
        return ema_eta(torch.tensor(rewards, dtype=torch.float64), {"mean": 0.4, "variance": 0.25})

    calm = eta(0.2, 0.4, 0.5, 0.9, 1.0)
    assert eta(0.2, 0.4, 0.5, 0.9, 1e4) == calm
    assert eta(0.2, 0.4, 0.5, 1e4, 1e4) > 1.2 * calm


@pytest.mark.equation("HN-7")
def test_ema_of_equal_rewards_is_finite():
    """Their deviation is 0 and is taken as 1e-8: at the mean, eta is 1; above it, its ceiling."""
    state = {}
    assert ema_eta(torch.full((4,), 0.3, dtype=torch.float64), state) == 1
    assert ema_eta(torch.full((4,), 0.4, dtype=torch.float64), state) == pytest.approx(2)


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize("reading", [batch_eta, pair_eta, ema_eta])
def test_what_no_eta_takes(reading):
    """Also with a trim; a refused reward leaves the state alone."""
    for n, trim in ((0, None), (1, None), (2, None), (2, 0.4)):
        with pytest.raises(ValueError, match="at least 3"):
            reading(torch.ones(n), {}, trim)
    for trim in (-0.3, 0.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="between 0 and 0.5"):
            reading(torch.ones(10), {}, trim)
    for trim in (None, 0.2):
        state = {}
        with pytest.raises(ValueError, match="finite rewards"):
            reading(torch.tensor([1.0, math.nan, 2.0]), state, trim)
        assert state == {}


@pytest.mark.equation("HN-7")
def test_no_eta_carries_a_gradient():
    for reading in ETAS.values():
        R = normal(8, seed=3).requires_grad_()
        assert not reading(R, {}).requires_grad and not reading(R, {}, 0.2).requires_grad
    for reading in KEPT.values():
        assert not reading(R, {"mean": 0.0, "variance": 1.0}).requires_grad


@pytest.mark.equation("HN-7")
def test_the_state_of_ema_survives_a_checkpoint(tmp_path):
    """A run that goes on has the very numbers of one that was never stopped: JSON keeps a float to
    the bit. Control: a state that is lost gives another eta.
    """
    first, second = normal(8, seed=1), 3 + normal(8, seed=2)
    state = {}
    ema_eta(first, state)
    weights = [torch.zeros(2, requires_grad=True)]
    optimizer = torch.optim.AdamW(weights)
    save_checkpoint(tmp_path, 1, weights, optimizer, {}, **state)
    step, carried = load_checkpoint(tmp_path, weights, optimizer, {})
    assert step == 1 and carried == state
    lost = ema_eta(second, {})
    assert ema_eta(second, carried) == ema_eta(second, state) != lost


# ---- the whole chain ----


@pytest.mark.equation("HN-8")
@pytest.mark.parametrize("form", GAPS)
@pytest.mark.parametrize("hard", HARDNESS)
def test_from_items_to_beta(form, hard):
    """H and X to beta', in every reading of HN-4 and of HN-5, beside the oracle's chain."""
    H, X = normal(15, 6, seed=17), normal(15, 6, seed=18)
    has_image = torch.arange(15) % 4 != 0
    w, l, h = torch.arange(7), torch.arange(7, 14), 20 * normal(7, seed=19)
    e = fuse(H, X, has_image)
    lam = HARDNESS[hard](GAPS[form](e, *topk_neighbors(e, 3), w, l))
    beta = pair_beta(lam, ETAS["batch"](reward_gap(h, 0.1), {}))

    e_ = oracle.fuse(H.tolist(), X.tolist(), has_image)
    clusters = oracle.topk_neighbors(e_, 3)
    pairs = zip(w, l, strict=True)
    lam_ = oracle.hardness([oracle.cluster_gap(e_, *clusters, a, b, form) for a, b in pairs], hard)
    eta_ = oracle.responsiveness(oracle.reward_gap(h, 0.1))
    np.testing.assert_allclose(beta, oracle.pair_beta(lam_, eta_), rtol=1e-10)


# ---- names: what a flag allows is what the dictionaries hold ----


def kind_of(flag):
    return StepConfig if flag == "kept" else DpoConfig


def allowed(flag):
    return list(typing.get_args(typing.get_type_hints(kind_of(flag))[flag]))


def test_the_flags_allow_the_names_of_the_dictionaries():
    """In the same order, the document's first and the default. The gap's last name is no value of
    its flag, but what the ablation w/o SAM makes of any.
    """
    gaps, ablations = list(GAPS), allowed("ablation")
    assert gaps == [*allowed("gap"), "cosine"]
    reached = set()
    for ablation, gap in product(ablations, allowed("gap")):
        form = DpoConfig(ablation=ablation, gap=gap).gap_form
        assert form == ("cosine" if ablation == "no_sam" else gap)
        reached.add(form)
    assert reached == set(gaps)
    for flag in ("hardness", "control", "eta", "kept", "noise"):
        assert allowed(flag) == list(BY_FLAG[flag]), flag


def test_the_first_of_each_is_the_documents_and_the_default():
    for (flag, found), first in zip(BY_FLAG.items(), DOCUMENT, strict=True):
        assert getattr(kind_of(flag)(), flag) == next(iter(found))
        assert next(iter(found.values())) is first


@pytest.mark.parametrize("flag", BY_FLAG)
def test_an_unknown_name_is_refused_with_the_known_ones(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([kind_of(flag)], [f"--{flag}", "louder"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"--{flag}: invalid choice: 'louder'" in said
    assert all(name in said for name in allowed(flag))
