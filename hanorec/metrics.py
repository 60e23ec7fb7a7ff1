r"""Ranks, HR, NDCG, AUC, image-text similarity, and how sure we can be of them (EV-1 .. EV-4).

U = users, C = candidates. Numbers here are small, so all of it is float64 NumPy. Source: document
000, section 3.1.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from hanorec.base.errors import InputError


def rank_of_positive(scores: ArrayLike, positive: ArrayLike) -> np.ndarray:
    r"""Ranks, from 1 = best, of the positive candidate.

    A tie counts against the positive, so that a model which scores all alike gets the last place.

    Args:
        scores: (U, C). positive: (U,) the position of the positive among the candidates.
    Returns:
        (U,) int.
    Raises:
        InputError: a NaN score.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive)
    broken = np.isnan(scores).any(1)  # (U,)
    if broken.any():
        raise InputError(
            f"user row {int(broken.argmax())} has a NaN score, expected numbers; "
            "the model is broken"
        )
    own = np.take_along_axis(scores, positive[:, None], 1)  # (U, 1)
    # \operatorname{rank} = 1 + |\{c \ne c^+ : s_c \ge s_{c^+}\}|, where c^+ itself gives the 1
    return (scores >= own).sum(1)


def hit_rate(ranks: ArrayLike, k: int) -> float:
    r"""HR@k in 0 .. 1: the share of users whose positive stands among the first k."""
    return float((np.asarray(ranks) <= k).mean())


def ndcg_rows(ranks: ArrayLike, k: int) -> np.ndarray:
    r"""NDCG@k of each user (U,): one relevant item, so the ideal gain is 1."""
    ranks = np.asarray(ranks, np.float64)
    # EV-2: NDCG@k = \frac{1}{\log_2(1 + \operatorname{rank})}
    # \text{ if } \operatorname{rank} \le k \text{ else } 0
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def ndcg(ranks: ArrayLike, k: int) -> float:
    r"""NDCG@k in 0 .. 1, the mean over users."""
    return float(ndcg_rows(ranks, k).mean())


def auc_rows(positive: ArrayLike, negative: ArrayLike) -> np.ndarray:
    r"""AUC of each user: the share of won pairs, ties count half.

    Args:
        positive: (U,) scores of the positives. negative: (U, n) of the negatives.
    Returns:
        (U,) in 0 .. 1.
    Raises:
        InputError: a NaN score.
    """
    positive = np.asarray(positive, np.float64)[:, None]  # (U, 1)
    negative = np.asarray(negative, np.float64)  # (U, n)
    if np.isnan(positive).any() or np.isnan(negative).any():
        raise InputError("AUC of NaN scores, expected numbers; the model is broken")
    # EV-3: AUC = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)
    return ((positive > negative) + 0.5 * (positive == negative)).mean(1)


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    r"""AUC in 0 .. 1, the mean of `auc_rows` over users: pairs are within a user."""
    return float(auc_rows(positive, negative).mean())


def pooled_auc(positive: ArrayLike, negative: ArrayLike) -> float:
    r"""AUC over all pairs of the two sets (n,), (m,), whatever user they come from.

    It is the binary task's other reading.
    """
    positive = np.sort(np.asarray(positive, np.float64))  # (n,)
    negative = np.asarray(negative, np.float64)  # (m,)
    up_to = np.searchsorted(positive, negative, side="right")  # (m,): positives <= each negative
    below = np.searchsorted(positive, negative, side="left")  # (m,): positives < each negative
    above, tied = len(positive) - up_to, up_to - below  # (m,) each
    return float((above + 0.5 * tied).sum() / (len(positive) * len(negative)))


def similarity_groups(
    before: ArrayLike, after: ArrayLike, groups: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    r"""The "weak get weaker" curve: mean image-text similarity before and after training.

    Groups are by the similarity before, weakest first, as equal as N allows.

    Args:
        before, after: (N,) cos(H_i, X_i) of each item with an image.
    Returns:
        Before and after, (groups,) each.
    Raises:
        InputError: fewer items than groups.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if len(before) < groups:
        raise InputError(
            f"{len(before)} items with an image in {groups} groups: expected at least one a group; "
            "use fewer groups"
        )
    # EV-4: G_1, \dots, G_{10} \text{ by } \cos(H_i, X_i) \text{ before};
    # \quad \operatorname{mean}_{i \in G_g} \cos(H_i, X_i) \text{ before and after}
    parts = np.array_split(np.argsort(before, kind="stable"), groups)
    return np.array([before[p].mean() for p in parts]), np.array([after[p].mean() for p in parts])


def bootstrap_interval(
    rows: ArrayLike, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    r"""Percentile interval of the mean of per-user values (U,), users drawn with replacement."""
    rows = np.asarray(rows, np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([rows[rng.integers(0, len(rows), len(rows))].mean() for _ in range(samples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_test(a: ArrayLike, b: ArrayLike, samples: int = 2000, seed: int = 0) -> dict[str, float]:
    r"""Is a better than b on the same users? a, b: (U,) per-user values.

    Returns:
        difference = mean(a - b), its bootstrap 95% interval (low, high), and the two-sided p of a
        sign-flip permutation test.
    """
    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)  # (U,)
    low, high = bootstrap_interval(gap, samples, seed)
    rng = np.random.default_rng(seed)
    flipped = np.array([(gap * rng.choice([-1.0, 1.0], len(gap))).mean() for _ in range(samples)])
    # The observed assignment counts as one of the permutations, so p is never 0.
    p = (1 + (np.abs(flipped) >= abs(gap.mean()) - 1e-12).sum()) / (1 + samples)
    return {"difference": float(gap.mean()), "low": low, "high": high, "p": float(p)}


def shown_test(test: Mapping[str, float], digits: int = 3) -> str:
    """What `paired_test` found, as tables print it, in points: "+1.20 [-0.31, +2.70], p = 0.114".

    digits: of p.
    """
    interval = f"[{100 * test['low']:+.2f}, {100 * test['high']:+.2f}]"
    return f"{100 * test['difference']:+.2f} {interval}, p = {test['p']:.{digits}f}"
