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

from hanorec import hars, readings
from hanorec.base.config import DpoConfig
from hanorec.base.settings import parse
from hanorec.hars import fuse, pair_beta, reward_gap
from hanorec.lora.layer import absolute_noise
from hanorec.readings import (
    CONTROLS,
    ETAS,
    GAPS,
    HARDNESS,
    NOISES,
    batch_eta,
    cosine_gap,
    ema_eta,
    mean_lambda,
    permuted_lambda,
    ratio_hardness,
    reversed_lambda,
    running_statistics,
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
    "noise": NOISES,
}
DOCUMENT = [hars.cluster_gap, hars.hardness, unchanged, batch_eta, absolute_noise]


# ---- the gap (HN-4) ----


@pytest.mark.equation("HN-4")
@DTYPES
@pytest.mark.parametrize("form", ["ranked", "cosine"])
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
    for form in ("ranked", "cosine"):
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
    monkeypatch.setattr(readings, "DECAY", 1.0)

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
@pytest.mark.parametrize("reading", ETAS.values())
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


def allowed(flag):
    return list(typing.get_args(typing.get_type_hints(DpoConfig)[flag]))


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
    for flag in ("hardness", "control", "eta", "noise"):
        assert allowed(flag) == list(BY_FLAG[flag]), flag


def test_the_first_of_each_is_the_documents_and_the_default():
    for (flag, found), first in zip(BY_FLAG.items(), DOCUMENT, strict=True):
        assert getattr(DpoConfig(), flag) == next(iter(found))
        assert next(iter(found.values())) is first


@pytest.mark.parametrize("flag", BY_FLAG)
def test_an_unknown_name_is_refused_with_the_known_ones(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([DpoConfig], [f"--{flag}", "louder"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"--{flag}: invalid choice: 'louder'" in said
    assert all(name in said for name in allowed(flag))
