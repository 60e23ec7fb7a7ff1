"""The facts stated in docs/audit.md, on small numbers by hand or by the oracle, and that what the
page names exists.
"""

import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from hanorec.etas import ema_eta
from hanorec.hars import cluster_gap, hardness, responsiveness, reward_gap
from hanorec.lora.layer import LoRALinear, lora_noise
from hanorec.losses import dpo_loss
from hanorec.metrics import auc, hit_rate, ndcg, rank_of_positive
from hanorec.readings import CONTROLS, ranked_gap, standardised_hardness
from hanorec.scoring import answer_log_probs
from hanorec.studies import audit, noise_curve
from hanorec.studies.audit_scores import hard_auc
from hanorec.studies.audit_weights import EQUAL_PULL, settled_ema, turning_point
from hanorec.topk import topk_neighbors

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "audit.md"


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- lambda ----


@pytest.mark.equation("HN-4")
def test_the_ranked_gap_is_zero_for_items_that_are_nothing_alike():
    """The items of docs/walkthrough.md: 1 and 4 are orthogonal, but both have neighbours at 0.96
    and 0.8, so to `ranked` the pair is as hard as an item against itself, lambda = 0.5; to `union`
    it is the easier of the two. At angles of 0, 36.9, 53.1, 90 ... degrees.
    """
    e = vector([1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1], [-0.6, 0.8], [-0.8, 0.6])
    scores, index = topk_neighbors(e, 2)
    w, l = torch.tensor([1, 1]), torch.tensor([2, 4])
    np.testing.assert_allclose(
        hardness(ranked_gap(e, scores, index, w, l)), [0.5, 0.5], atol=1e-12
    )
    hard, easy = hardness(cluster_gap(e, scores, index, w, l))
    assert 0.5 < hard < easy < oracle.sigmoid(math.sqrt(2)) < 0.805


@pytest.mark.equation("HN-5")
def test_standardised_spans_a_factor_of_seven_where_sigmoid_spans_one_tenth():
    """Delta = 0.2, 0.3, 0.4, 0.5: sigma from 0.550 to 0.622; standardised -1.342 .. 1.342, so 0.414
    .. 1.586, and both have the order of Delta.
    """
    delta = vector(0.2, 0.3, 0.4, 0.5)
    plain, spread = hardness(delta), standardised_hardness(delta)
    np.testing.assert_allclose(plain[[0, 3]], [0.549834, 0.622459], atol=1e-6)
    np.testing.assert_allclose(spread[[0, 3]], [0.414, 1.586], atol=1e-3)


@pytest.mark.equation("HN-5")
def test_the_controls_give_the_same_lambdas_to_other_pairs():
    """0.5 < 0.6 < 0.7 < 0.9 stand in rows 0, 2, 3, 1: reversed, row 0 gets 0.9, row 2 0.7, row 3
    0.6, row 1 0.5.
    """
    lam = vector(0.5, 0.9, 0.6, 0.7)
    assert CONTROLS["none"](lam) is lam
    assert CONTROLS["reversed"](lam).tolist() == [0.9, 0.5, 0.7, 0.6]
    many = torch.linspace(0.5, 0.9, 100, dtype=torch.float64)
    dealt = CONTROLS["permuted"](many, torch.Generator().manual_seed(0))
    assert torch.equal(dealt.sort().values, many) and (dealt != many).float().mean() > 0.9
    assert CONTROLS["mean"](vector(0.5, 0.9, 0.7, 0.5)).tolist() == pytest.approx([0.65] * 4)


# ---- eta ----


def closed_form(R):
    """sigma(1 + 2 (1 - c) / (P - 2)) / sigma(1), c = (min + max) / (2 mean)."""
    c = (min(R) + max(R)) / 2 / oracle.average(R)
    return oracle.sigmoid(1 + 2 * (1 - c) / (len(R) - 2)) / oracle.sigmoid(1)


@pytest.mark.equation("HN-7")
@pytest.mark.parametrize(
    "R",
    [[2, 4, 12], [-1, 0.2, 0.3, 5], [-3, -2, -1, 0, 1], [1, 1, 1, 1],
     list(np.random.default_rng(0).normal(0.1, 1, 32))],
)
def test_eta_depends_on_the_middle_of_the_extremes_alone(R):
    """The sum of what is kept is that of all less the two extremes. Control: a batch with the same
    mean and extremes but another inside.
    """
    eta = responsiveness(vector(*R))
    assert eta == pytest.approx(closed_form(R), rel=1e-12)
    inside = sorted(R)
    inside[1] = inside[-2] = (inside[1] + inside[-2]) / 2
    assert responsiveness(vector(*inside)) == pytest.approx(eta.item(), rel=1e-9)
    assert responsiveness(vector(*R[:-1], R[-1] + 1)) != eta


@pytest.mark.equation("HN-7")
def test_eta_collapses_where_the_mean_is_near_zero_and_is_bounded():
    """R = (-1, -0.1, -0.1, 1.204): mean 0.001, so R~ of the kept is -100 and eta = sigma(-100) /
    sigma(1); so too for -R. With 1.196 the mean is -0.001, the kept are +100, and eta is at its
    ceiling.
    """
    assert responsiveness(vector(-1, -0.1, -0.1, 1.204)) < 1e-40
    assert responsiveness(vector(1, 0.1, 0.1, -1.204)) < 1e-40
    assert responsiveness(vector(-1, -0.1, -0.1, 1.196)) == pytest.approx(
        1 / oracle.sigmoid(1), rel=1e-12
    )
    assert 1 / oracle.sigmoid(1) == pytest.approx(1.367879, abs=1e-6)


@pytest.mark.equation("HN-7")
def test_ema_has_no_pole():
    """The same rewards with running mean 0 and std 1: kept -0.1, eta = 2 sigma(-0.1) = 0.950.

    A batch is a tenth of the running mean and variance, so it finds them where it leaves them at 0
    and 1.
    """
    R = vector(-1, -0.1, -0.1, 1.204)
    state = {"mean": -0.1 * R.mean().item() / 0.9}
    state["variance"] = (1 - 0.1 * R.var(correction=0).item()) / 0.9
    assert ema_eta(R, state) == pytest.approx(0.950042, abs=1e-6)
    assert (state["mean"], state["variance"]) == (pytest.approx(0, abs=1e-12), pytest.approx(1))
    assert settled_ema(R.numpy(), mean=0.0, std=1.0) == pytest.approx(0.950042, abs=1e-6)


@pytest.mark.equation("HN-7")
def test_eta_of_micro_batches_by_hand():
    """R = (1, 1, 1, 1, 1, 1, 1, 9). Together: mean 2, kept 1/2: sigma(0.5) / sigma(1) = 0.851. In
    halves: 1, and mean 3, kept 1/3: 0.797.
    """
    R = vector(1, 1, 1, 1, 1, 1, 1, 9)
    assert [round(responsiveness(part).item(), 3) for part in (R, R[:4], R[4:])] == [
        0.851, 1.0, 0.797
    ]


# ---- noise ----


@pytest.mark.equation("HN-9")
@pytest.mark.parametrize("trained", [False, True])
def test_the_expected_change_of_a_weight(trained):
    """E |s (B' A' - B A)|^2 by 3000 draws, within 5 percent; at B = 0 and sigma = the RMS of a
    fresh A, the terms sigma^2 and sigma^4 are equal.
    """
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 10).double(), r=4, alpha=8)
    if trained:
        nn.init.normal_(layer.B, std=0.2)
    model, draws, squares = nn.Sequential(layer), torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for _ in range(3000):
            with lora_noise(model, 0.1, draws):
                squares.append(noise_curve.change(layer) ** 2)
    assert np.mean(squares) == pytest.approx(
        noise_curve.expected_change(layer, 0.1, 0.1) ** 2, rel=0.05
    )


def test_where_the_product_of_the_noises_takes_over():
    """A with entries +-1 / sqrt(3 * 12), B = 0, out 10, r 4, s 2: sigma^2 out |A|^2 = sigma^2 * 10
    * 4 / 3 and sigma^4 r in out = sigma^4 * 480 are equal at sigma^2 = 1 / 36, where the root of
    the sum is 2 sqrt(2 * 480) / 36 = 1.721.
    """
    layer = LoRALinear(nn.Linear(12, 10).double(), r=4, alpha=8)
    layer.A.data.fill_(1 / 6)
    assert noise_curve.expected_change(layer, 1 / 6, 1 / 6) == pytest.approx(
        2 * math.sqrt(960) / 36, rel=1e-12
    )


@pytest.mark.equation("HN-9")
def test_a_zero_B_protects_the_output_from_A_alone():
    """Fresh adapter: noise on A changes nothing, noise on B does."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5).double(), r=2, alpha=4)
    x = torch.randn(3, 6, dtype=torch.float64)
    none = [torch.zeros_like(layer.A), torch.zeros_like(layer.B)]
    clean = layer(x)
    for side, protected in ((0, True), (1, False)):
        layer.noise = tuple(
            0.1 * torch.ones_like(z) if side == i else z for i, z in enumerate(none)
        )
        assert torch.equal(layer(x), clean) == protected


@pytest.mark.equation("HN-6")
def test_noisy_rewards_would_give_another_eta():
    """Clean h = (4, 8, 12, 40): eta 0.891. A draw that adds (0, 0, 0, 24): mean 22, kept 10 / 22:
    sigma(0.4545) / sigma(1) = 0.8367.
    """
    h = vector(4, 8, 12, 40)
    noisy = h + vector(0, 0, 0, 24)
    assert responsiveness(reward_gap(h, 0.1)) == pytest.approx(0.8910, abs=1e-4)
    assert responsiveness(reward_gap(noisy, 0.1)) == pytest.approx(
        oracle.sigmoid(10 / 22) / oracle.sigmoid(1), rel=1e-12
    )


# ---- the pull of a pair ----


@pytest.mark.equation("HN-11")
def test_where_a_low_beta_pulls_more():
    """d/d beta of beta sigma(-beta h) is sigma(-x) (1 - x sigma(x)), x = beta h: zero at x =
    1.2785. Pulls of 0.05 and 0.1 are equal where 2 (1 + u) = 1 + u^2 with u = exp(0.05 h): u = 1 +
    sqrt 2, h = 17.63.
    """
    x = turning_point()
    assert x == pytest.approx(1.278465, abs=1e-6)
    assert x * oracle.sigmoid(x) == pytest.approx(1, abs=1e-12)

    def pull(beta, h, normalised_by=None):
        h = vector(h).requires_grad_()
        return -torch.autograd.grad(dpo_loss(h, beta, normalised_by).sum(), h)[0].item()

    for beta in (0.05, 0.1):
        at = [pull(beta + step, x / beta) for step in (-1e-4, 0, 1e-4)]
        assert at[1] > at[0] and at[1] > at[2]  # the most that any beta pulls at this h
    same = math.log(1 + math.sqrt(2)) / 0.05
    assert same == EQUAL_PULL == pytest.approx(17.627, abs=1e-3)
    assert pull(0.05, same) == pytest.approx(pull(0.1, same), rel=1e-12)
    assert pull(0.05, 5) < pull(0.1, 5) and pull(0.05, 30) > pull(0.1, 30)
    low, high = vector(0.05), vector(0.1)
    assert pull(low, 0, 0.1) == pull(high, 0, 0.1) and pull(low, 5, 0.1) > pull(high, 5, 0.1)
    assert pull(low, -5, 0.1) < pull(high, -5, 0.1)  # but a pair that is still wrong is pulled less


# ---- metrics ----


@pytest.mark.equation("EV-3")
def test_hard_labels_give_the_mean_of_both_rates():
    """Scores 0.2 and -0.1 for the targets, (-1, 0.1) and (-0.3, -0.2) for the others; Yes where >
    0. TPR 1/2, TNR 3/4: 0.625, which is the AUC of the labels, ties half. The AUC of the scores is
    1.
    """
    own, other = np.array([0.2, -0.1]), np.array([[-1, 0.1], [-0.3, -0.2]])
    assert hard_auc(own[:, None], other) == (0.5, 0.75, 0.625)
    labels = [float(x > 0) for x in own], [float(x > 0) for x in other.ravel()]
    assert oracle.binary_auc(*labels) == pytest.approx(0.625)
    assert auc(own, other) == 1


@pytest.mark.equation("EV-2")
@pytest.mark.parametrize(
    ("positives", "negatives", "hit", "gain"),
    [(1, 9, 30, 21.31),
     (1, 4, 60, 42.62),
     (1, 7, 37.5, 26.64),
     (1, 6, 42.86, 30.44),
     (3, 4, 88.57, 42.86),
     (3, 7, 70.83, 30)],
)
def test_chance_of_other_candidate_sets(positives, negatives, hit, gain):
    """Every set of places for the targets, equally likely. Of 3 + 4 with one that counts the others
    are as good as negatives: 1 + 6.
    """
    total = positives + negatives
    gains = [1 / math.log2(1 + place) if place <= 3 else 0 for place in range(1, total + 1)]
    places = list(itertools.combinations(range(total), positives))
    assert 100 * np.mean([min(p) < 3 for p in places]) == pytest.approx(hit, abs=0.005)
    expected = np.mean([sum(gains[i] for i in p) for p in places]) / sum(gains[:positives])
    assert 100 * expected == pytest.approx(gain, abs=0.005)
    if positives == 1:
        ranks = np.arange(1, negatives + 2)
        assert 100 * hit_rate(ranks, 3) == pytest.approx(hit, abs=0.005)
        assert 100 * ndcg(ranks, 3) == pytest.approx(gain, abs=0.005)


@pytest.mark.equation("EV-1")
def test_sum_and_mean_rank_a_long_title_differently():
    """Token probabilities 1/2 each: a title of one token and the end has log 1/4, one of three and
    the end log 1/16. By the sum the short one is first; by the mean both are equal. Control: the
    end counts, or the sums would be log 1/2 and log 1/8.
    """
    logits = torch.zeros(1, 6, 2, dtype=torch.float64)  # two tokens, equally likely
    batch = SimpleNamespace(
        row=torch.zeros(6, dtype=torch.int64), query=torch.arange(6),
        token=torch.zeros(6, dtype=torch.int64), answer=torch.tensor([0, 0, 1, 1, 1, 1]),
        size=(1, 2),
    )
    total, mean = answer_log_probs(logits, batch), answer_log_probs(logits, batch, mean=True)
    np.testing.assert_allclose(total[0], [math.log(1 / 4), math.log(1 / 16)], rtol=1e-12)
    np.testing.assert_allclose(mean[0], [math.log(1 / 2)] * 2, rtol=1e-12)
    # a tie counts against it
    assert rank_of_positive(total, [0])[0] == 1 and rank_of_positive(mean, [0])[0] == 2


# ---- the page ----


def test_every_command_and_test_of_the_page_exists():
    text = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"tests/(test_\w+\.py)::(test_\w+)", text)
    assert len(named) > 15
    for path, name in named:
        source = (ROOT / "tests" / path).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{path}::{name}"
    parts = re.findall(r"python\s+-m\s+hanorec\.studies\.audit\s+(\w+)", text)
    assert set(audit.PARTS) | {"titles", "length"} == set(parts)
    paths = re.findall(r"\b(?:python )?((?:benchmarks|docs|hanorec)/[\w/.-]+\.(?:py|md))", text)
    paths += re.findall(r"\]\(([\w.]+\.md)\)", text)
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path


def test_each_entry_of_the_page_has_a_figure_a_test_and_a_consequence():
    entries = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    entries = [entry for entry in entries if re.match(r"\d+\. ", entry)]
    assert len(entries) == 12
    for entry in entries:
        title = entry.splitlines()[0]
        assert "**Consequence.**" in entry and "::test_" in entry, title
        assert "hanorec.studies." in entry, title
