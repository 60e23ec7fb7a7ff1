"""The figures of docs/theory.md, in seconds and without a model.

    python -m hanorec.studies.theory [PAIRS]
        PAIRS: pairs.tsv of a run, whose Delta the table of label noise takes, too
"""

import csv
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import NormalDist

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.theory")
    result.add_argument("pairs", nargs="?", type=Path, help="pairs.tsv of a run")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import numpy as np
import torch

from hanorec.base.errors import InputError
from hanorec.hars import hardness
from hanorec.readings import standardised_hardness
from hanorec.studies.audit_run import table

BETA0 = 0.1
LIKE, UNLIKE = math.e, 1 / math.e  # exp of the similarities 1 and -1


# ---- the largest gap (HN-4) ----


def largest_gap(k: int) -> float:
    """The largest Delta of two items with K neighbours each, for any similarities in -1 .. 1.

    At the largest one every similarity is 1 or -1 (docs/theory.md), so that an item of U is one of
    four kinds, and it is enough to count the kinds.
    """
    largest = 0.0
    for others in range(k - 1, 2 * k + 1):  # of U without w and l
        counts = np.indices([others + 1] * 3).reshape(3, -1)
        counts = counts[:, counts.sum(0) <= others]
        # alike to both; to w alone; to l alone; to neither
        kinds = [*counts, others - counts.sum(0)]
        for w_to_l, l_to_w in product((LIKE, UNLIKE), repeat=2):
            ends = [(1, LIKE, l_to_w), (1, w_to_l, LIKE)]  # w and l: how many, exp s_w, exp s_l
            rest = zip(kinds, product((LIKE, UNLIKE), repeat=2), strict=True)
            largest = max(largest, _gap([*ends, *((n, *of_kind) for n, of_kind in rest)]))
    return largest


def _gap(members: Sequence[tuple[int | np.ndarray, float, float]]) -> float:
    """The largest distance of the two softmaxes: (how many, exp s_w, exp s_l) a kind of member."""
    sum_w = sum(n * a for n, a, _ in members)
    sum_l = sum(n * b for n, _, b in members)
    squares = sum(n * (a / sum_w - b / sum_l) ** 2 for n, a, b in members)
    return math.sqrt(np.max(squares))


def print_bound() -> None:
    rows = []
    for k in (1, 2, 5, 10, 20, 50):
        delta = largest_gap(k)
        rows.append([k, delta, 1 / (1 + math.exp(-delta))])
    table("K | largest Δ | largest λ = σ(Δ)", rows)


# ---- early and late pull (HN-11) ----


def moved(beta: float, p: float, time: float, steps: int = 4000) -> float:
    """h after gradient descent on the expected loss for a time, in small steps, from h = 0.

    Args:
        p: probability that the label is right, dh/dt = beta (p - sigma(beta h)).
    """
    h, dt = 0.0, time / steps

    def pull(h: float) -> float:
        return beta * (p - 1 / (1 + math.exp(-beta * h)))

    for _ in range(steps):
        half = h + dt / 2 * pull(h)  # the midpoint rule
        h += dt * pull(half)
    return h


def print_pull() -> None:
    rows = []
    for time in (0.1, 1, 3, 10, 30, 100, 300):
        of_p = []
        for p in (0.9, 0.999):
            low, high = (moved(beta, p, time / BETA0**2) for beta in (BETA0 / 2, BETA0))
            of_p += [low, high, low / high]
        rows.append([time, *of_p])
    table(
        "β0² t | p = 0.9: h at β' = 0.05 | at 0.1 | ratio | p = 0.999: h at 0.05 | at 0.1 | ratio",
        rows)


# ---- label noise ----


def sample_size(weights: np.ndarray, truth: np.ndarray) -> float:
    """How many pairs one pair is worth under these weights, against uniform ones.

    Args:
        weights: (P,) of the pairs. truth: (P,) mean of a pair's label, 1 - 2 rho.
    Returns:
        E[w m]^2 / (E[w^2] E[m]^2); 1 for uniform weights.
    """
    signal = np.mean(weights * truth) ** 2
    return float(signal / (np.mean(weights**2) * np.mean(truth) ** 2))


WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # Delta (P,), ascending -> weights (P,)
    "literal": lambda delta: hardness(torch.as_tensor(delta)).numpy(),
    "standardised": lambda delta: standardised_hardness(torch.as_tensor(delta)).numpy(),
    "reversed": lambda delta: standardised_hardness(torch.as_tensor(delta)).numpy()[::-1],
}


def noisy_sizes(delta: np.ndarray, rho: float, share: float = 0.3) -> list[float]:
    """`sample_size` of each of WEIGHTS, and of the best weights there are.

    Args:
        delta: (P,). rho: probability that a label is wrong, of the hardest `share` of the pairs.
    """
    delta = np.sort(delta)
    hard = np.arange(len(delta)) < share * len(delta)
    truth = np.where(hard, 1 - 2 * rho, 1.0)
    sizes = [sample_size(weigh(delta), truth) for weigh in WEIGHTS.values()]
    return [*sizes, sample_size(truth, truth)]


def example_gaps() -> dict[str, np.ndarray]:
    """Delta of a thousand pairs, mean 0.11 and deviation 0.035: normal, and in two groups."""
    normal = NormalDist()
    bell = np.array([normal.inv_cdf((i + 0.5) / 1000) for i in range(1000)])
    groups = np.where(np.arange(1000) < 300, -((7 / 3) ** 0.5), (3 / 7) ** 0.5)
    return {"normal": 0.11 + 0.035 * bell, "30% hard, 70% easy": 0.11 + 0.035 * groups}


def read_gaps(path: Path) -> np.ndarray:
    """The column delta of a pairs.tsv: (P,)."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return np.array([float(row["delta"]) for row in csv.DictReader(file, delimiter="\t")])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({error!r}), expected the pairs.tsv of a run of train_dpo.py "
            "with HaRS, with a column delta; check the path"
        ) from None


def print_sizes(gaps: dict[str, np.ndarray]) -> None:
    rows = []
    for name, delta in gaps.items():
        for rho in (0.0, 0.25, 0.5):
            rows.append([name, rho, *(f"{size:.2f}" for size in noisy_sizes(delta, rho))])
    table("Δ of the pairs | ρ | " + " | ".join([*WEIGHTS, "best"]), rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    gaps = example_gaps()
    if args.pairs is not None:
        gaps[str(args.pairs)] = read_gaps(args.pairs)
    print_bound()
    print_pull()
    print_sizes(gaps)
