"""What docs/theory.md derives, on small cases: DPO's optimum, h*, early and late pull, the bound on
lambda, label noise.
"""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch

from hanorec.base.errors import InputError
from hanorec.hars import cluster_gap, pair_beta
from hanorec.losses import dpo_loss, preference_logit
from hanorec.studies.theory import (
    BETA0,
    example_gaps,
    largest_gap,
    moved,
    noisy_sizes,
    read_gaps,
    sample_size,
)
from hanorec.topk import topk_neighbors

REWARDS = torch.tensor([1.0, 0.2, -0.4, 0.5], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)


def closed_form(beta):
    """pi_ref exp(r / beta) / Z over the four answers."""
    pairs = zip(REFERENCE.tolist(), REWARDS.tolist(), strict=True)
    weights = [q * math.exp(r / beta) for q, r in pairs]
    return [w / math.fsum(weights) for w in weights]


def minimum(loss_of):
    """The logits (4,) at which a smooth loss is least, from 0."""
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        search.zero_grad()
        loss = loss_of(logits.log_softmax(0))
        loss.backward()
        return loss

    search.step(closure)
    return logits.detach()


def expected_dpo(log_policy, beta):
    """DPO-2 over all ordered pairs, each as often as its answer is preferred: sigma(r_w - r_l)."""
    total = 0.0
    for w, l in itertools.permutations(range(4), 2):
        logs = log_policy[w], log_policy[l], REFERENCE[w].log(), REFERENCE[l].log()
        h = preference_logit(*(x.reshape(1) for x in logs))
        total = total + (REWARDS[w] - REWARDS[l]).sigmoid() * dpo_loss(h, beta).sum()
    return total


@pytest.mark.equation("DPO-2")
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_of_the_kl_objective_is_the_closed_form(beta):
    """E[r] - beta KL(pi || pi_ref), climbed without the closed form."""

    def loss(log_policy):
        policy = log_policy.exp()
        return -(policy * (REWARDS - beta * (log_policy - REFERENCE.log()))).sum()

    found = minimum(loss).softmax(0)
    np.testing.assert_allclose(found, closed_form(beta), atol=1e-7)


@pytest.mark.equation("DPO-1", "DPO-2")
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_of_dpo_is_the_same(beta):
    """Preferences drawn with the rewards' own probabilities lead DPO to the policy that maximises
    them. Control: with another beta to another policy.
    """
    found = minimum(lambda log_policy: expected_dpo(log_policy, beta)).softmax(0)
    np.testing.assert_allclose(found, closed_form(beta), atol=1e-6)
    assert np.abs(found - np.array(closed_form(2 * beta))).max() > 0.01


def slope_of_the_expectation(h, beta, p, normalised_by=None):
    """d/dh of the expected loss of a pair whose label is right with probability p."""
    h = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([beta], dtype=torch.float64)
    right, wrong = dpo_loss(h, beta, normalised_by), dpo_loss(-h, beta, normalised_by)
    loss = (p * right + (1 - p) * wrong).sum()
    return torch.autograd.grad(loss, h)[0].item()


@pytest.mark.equation("HN-8", "HN-11")
@pytest.mark.parametrize("normalised_by", [None, 0.1])
@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("lam", [0.5, 0.8])
def test_the_optimum_of_a_pair(lam, p, normalised_by):
    """The slope vanishes at logit(p) / beta', below it is negative, above it positive: h falls to
    there from both sides, and further out for a low beta'.
    """
    beta = pair_beta(torch.tensor([lam], dtype=torch.float64), torch.tensor(1.0)).item()
    best = math.log(p / (1 - p)) / beta
    assert slope_of_the_expectation(best, beta, p, normalised_by) == pytest.approx(0, abs=1e-15)
    assert slope_of_the_expectation(best - 1, beta, p, normalised_by) < -1e-5
    assert slope_of_the_expectation(best + 1, beta, p, normalised_by) > 1e-5


@pytest.mark.equation("HN-11")
def test_one_reward_stands_behind_dpo_and_none_behind_a_beta_a_pair():
    """Of one policy h_ac = h_ab + h_bc. With one beta the optima of the three pairs add up so; with
    a beta' each they do not.
    """

    def optima(*betas):
        r = REWARDS.tolist()
        gaps = r[0] - r[1], r[1] - r[2], r[0] - r[2]
        return [gap / beta for gap, beta in zip(gaps, betas, strict=True)]

    ab, bc, ac = optima(0.1, 0.1, 0.1)
    assert ab + bc == pytest.approx(ac, rel=1e-12)
    ab, bc, ac = optima(0.05, 0.06, 0.1)
    assert ab + bc > 1.5 * ac


@pytest.mark.equation("HN-11")
@pytest.mark.parametrize("p", [0.9, 0.999])
def test_a_low_beta_is_behind_early_and_ahead_late(p):
    """Half the pull at first; in the end twice as far. And h at two beta' is one curve: beta' h
    depends on beta'^2 t alone.
    """
    low, high = BETA0 / 2, BETA0
    early, late = 0.01 / BETA0**2, 1e4 / BETA0**2
    assert moved(low, p, early) / moved(high, p, early) == pytest.approx(0.5, abs=1e-3)
    best = math.log(p / (1 - p))
    steps = 100_000
    assert moved(low, p, late, steps) == pytest.approx(best / low, rel=0.02)
    assert moved(high, p, late, steps) == pytest.approx(best / high, rel=0.02)
    for time in (1.0, 10.0):
        scaled = [beta * moved(beta, p, time / beta**2) for beta in (low, high)]
        assert scaled[0] == pytest.approx(scaled[1], rel=1e-9)


@pytest.mark.equation("HN-11")
def test_the_pull_of_the_table_is_that_of_the_loss():
    """Gradient descent on the package's loss, 200 small steps."""
    for beta in (0.05, 0.1):
        h = 0.0
        for _ in range(200):
            h -= 1.0 * slope_of_the_expectation(h, beta, 0.9)
        assert h == pytest.approx(moved(beta, 0.9, 200.0), rel=0.01)


# ---- the bound on lambda ----


def gap_of(s_w, s_l):
    """Distance of the two softmaxes."""
    return math.dist(oracle.softmax(s_w), oracle.softmax(s_l))


@pytest.mark.equation("HN-4", "HN-5")
@pytest.mark.parametrize(
    ("k", "delta", "lam"), [(1, 1.077, 0.746), (2, 0.962, 0.724), (10, 0.537, 0.631)]
)
def test_the_largest_lambda(k, delta, lam):
    assert largest_gap(k) == pytest.approx(delta, abs=5e-4)
    assert oracle.sigmoid(largest_gap(k)) == pytest.approx(lam, abs=5e-4)


@pytest.mark.equation("HN-4")
@pytest.mark.parametrize("k", [1, 2])
def test_counting_kinds_is_trying_every_corner(k):
    """All similarities at 1 or -1, one by one: s_wl both ways, and two of each other member."""
    best = 0.0
    for others in range(k - 1, 2 * k + 1):
        for corner in itertools.product((-1, 1), repeat=2 + 2 * others):
            (to_l, to_w), s_w, s_l = corner[:2], corner[2 : 2 + others], corner[2 + others :]
            best = max(best, gap_of([1, to_l, *s_w], [to_w, 1, *s_l]))
    assert largest_gap(k) == pytest.approx(best, rel=1e-12)


@pytest.mark.equation("HN-4")
@pytest.mark.parametrize("k", [1, 3, 10])
def test_no_similarities_give_more(k):
    """Two thousand draws from the whole range, most of them near its ends, and real clusters of
    items in the plane, where gaps are large. Control: of K = 1 some are above the bound of K = 10.
    """
    draws, bound = np.random.default_rng(k), largest_gap(k)
    largest = 0.0
    for _ in range(2000):
        others = draws.integers(k - 1, 2 * k + 1)
        s_w, s_l = np.cos(np.pi * draws.beta(0.2, 0.2, (2, others)))
        wl = math.cos(math.pi * draws.beta(0.2, 0.2))
        largest = max(largest, gap_of([1, wl, *s_w], [wl, 1, *s_l]))
    assert 0.5 * bound < largest <= bound + 1e-12

    angle = torch.arange(24, dtype=torch.float64) * 2 * math.pi / 24
    e = torch.stack([angle.cos(), angle.sin()], 1)
    w, l = torch.tensor(list(itertools.permutations(range(24), 2))).T
    assert cluster_gap(e, *topk_neighbors(e, k), w, l).max() < bound
    if k == 1:
        assert largest > largest_gap(10)


# ---- label noise ----


def test_sample_size_by_hand():
    """Weights 1 and 3, labels of mean 0 and 1: E[wm]^2 = 9/4, E[w^2] = 5, E[m]^2 = 1/4: 1.8 of at
    most 2, that of the weights 0 and 1. Uniform weights give 1, at any scale.
    """
    truth = np.array([0.0, 1.0])
    assert sample_size(np.array([1.0, 3.0]), truth) == pytest.approx(1.8)
    assert sample_size(truth, truth) == pytest.approx(2)
    assert sample_size(np.array([7.0, 7.0]), truth) == pytest.approx(1)


@pytest.mark.equation("HN-5")
@pytest.mark.parametrize("name", ["normal", "30% hard, 70% easy"])
def test_what_label_noise_makes_of_the_weights(name):
    """By loops. Without noise spread weights lose; with coin tosses for the hardest 30% the
    standardised ones, which ignore them, gain, and the reversed lose more. No weights beat the
    best.
    """
    delta = sorted(example_gaps()[name].tolist())
    standardised = list(oracle.hardness(delta, "standardised"))
    weights = [list(oracle.hardness(delta)), standardised, standardised[::-1]]
    for rho in (0, 0.25, 0.5):
        truth = [1 - 2 * rho if i < 300 else 1.0 for i in range(1000)]
        expected = []
        for w in (*weights, truth):
            signal = oracle.dot(w, truth) / 1000
            expected.append(signal**2 / (oracle.dot(w, w) / 1000) / oracle.average(truth) ** 2)
        assert noisy_sizes(np.array(delta), rho) == pytest.approx(expected, rel=1e-9)
        assert max(expected[:3]) <= expected[3] + 1e-12
        literal, spread, wrong, _ = expected
        assert literal == pytest.approx(1, abs=0.025)
        assert (spread < 0.9, spread > 1.2) == (rho == 0, rho == 0.5)
        assert wrong < 0.9 and (wrong < spread - 0.2) == (rho > 0)


def test_what_is_no_pairs_tsv(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("user\tdelta\nu\t0.25\nv\t0.5\n")
    assert read_gaps(path).tolist() == [0.25, 0.5]
    path.write_text("user\tlambda\nu\t0.25\n")
    for wrong in (path, tmp_path / "none.tsv"):
        with pytest.raises(InputError, match="expected the pairs.tsv of a run"):
            read_gaps(wrong)
