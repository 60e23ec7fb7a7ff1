"""How a prediction of `hanorec.studies.map` is judged: a figure with its interval.

A figure is a sum of cells' measures, each with a weight, for every user; so a difference of two
rows is one with weights 1 and -1. Its interval covers both the one over users, with the trained
models held fixed, and Student's over the seeds. The prediction holds if all of it lies where it was
predicted, has failed if none of it does, and is undecided otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hanorec.metrics import bootstrap_interval
from hanorec.studies.audit_run import correlation
from hanorec.studies.map_world import Measures
from hanorec.studies.tables import half_width

Cells = Mapping[str, Sequence[Measures]]  # cell -> its measures in each seed

POINTS = ("NDCG@3", "accuracy")  # measures that are shown, and predicted, in percent
VERDICTS = ("failed", "undecided", "held")  # of several parts the first that one of them has


class Part(NamedTuple):
    """What is predicted of one figure: that it lies in low .. high.

    Attributes:
        weights: cell -> its weight in the figure.
    """

    measure: str
    weights: Mapping[str, float]
    low: float = -math.inf
    high: float = math.inf


class Order(NamedTuple):
    """Part about the order of cells: Spearman's correlation of two measures' means, a value a seed.
    """

    measures: tuple[str, str]
    cells: Sequence[str]
    low: float
    high: float = 1.0


class Prediction(NamedTuple):
    """Attributes:
    text: as docs/map.md has it.
    """

    name: str
    text: str
    parts: Sequence[Part | Order]


class Estimate(NamedTuple):
    mean: float
    low: float
    high: float


def higher(measure: str, above: str, below: str, by: float = 0.0) -> Part:
    """One cell is above another."""
    return Part(measure, {above: 1.0, below: -1.0}, low=by)


def near(measure: str, one: str, other: str, within: float) -> Part:
    """Two cells are level."""
    return Part(measure, {one: 1.0, other: -1.0}, -within, within)


def estimate(cells: Cells, part: Part | Order, shared: bool) -> Estimate:
    """The part's figure with the interval that covers both.

    shared: whether the users of all seeds are the same.
    """
    if isinstance(part, Order):
        values = np.array([_order(cells, part, seed) for seed in range(_seeds(cells, part.cells))])
        half = half_width(values) if len(values) > 1 else math.inf
        return Estimate(float(values.mean()), values.mean() - half, values.mean() + half)

    unit = 100 if part.measure in POINTS else 1
    sums = []
    for seed in range(_seeds(cells, part.weights)):
        sums.append(sum(
            unit * weight * np.array(cells[cell][seed][part.measure])
            for cell, weight in part.weights.items()))
    users = np.mean(sums, 0) if shared else np.concatenate(sums)
    low, high = bootstrap_interval(users)
    if len(sums) > 1:
        means = np.array([one.mean() for one in sums])
        low = min(low, means.mean() - half_width(means))
        high = max(high, means.mean() + half_width(means))
    return Estimate(float(users.mean()), float(low), float(high))


def _seeds(cells: Cells, names: Sequence[str] | Mapping[str, float]) -> int:
    return len(cells[next(iter(names))])


def _order(cells: Cells, part: Order, seed: int) -> float:
    means = []
    for measure in part.measures:
        means.append(np.array([np.mean(cells[cell][seed][measure]) for cell in part.cells]))
    return correlation(*means)[1]


def verdict(found: Estimate, part: Part | Order) -> str:
    """One of `VERDICTS`."""
    if part.low <= found.low and found.high <= part.high:
        return "held"
    if found.high < part.low or part.high < found.low:
        return "failed"
    return "undecided"


def judge(
    cells: Cells, prediction: Prediction, shared: bool,
) -> tuple[str, list[tuple[Part | Order, Estimate]]]:
    """The verdict over all parts, and the figure of each."""
    found = [(part, estimate(cells, part, shared)) for part in prediction.parts]
    verdicts = [verdict(one, part) for part, one in found]
    return min(verdicts, key=VERDICTS.index), found
