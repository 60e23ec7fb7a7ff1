"""Whether a retriever knows the targets: where it places those of training and of validation.

Lists of training are to be like those of the test. The places are among the items that somebody has
in training and that are new to the user, 1 = best; a target that nobody has in training is left
out, since training has no such target.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import Example, heldout_examples, training_examples
from hanorec.datasets.interactions import load_interactions as load
from hanorec.recommending.people import Person
from hanorec.recommending.retrieval import Source, UserVectors, load_source


def target_places(here: Path, data: str, depth: int) -> dict[str, list[int]]:
    """Case -> the place of each target.

    The cases: the cut retriever on training targets, the full one on validation targets, which the
    first should be like; and the full one on training targets, as a control.
    """
    catalog = load_catalog(data)
    interactions = load(data, catalog)
    longest = max(map(len, interactions.train.values())) + 1
    training = training_examples(interactions, depth, longest)
    validation = heldout_examples(interactions, "val", longest)
    cut = load_source(here / "cut", catalog, interactions)
    full = load_source(here / "full", catalog, interactions)
    trained = sorted(set().union(*interactions.train.values()))
    cases = {
        "cut, training": (cut, training),
        "full, validation": (full, validation),
        "full, training": (full, training),
    }
    found = {}
    for case, (source, examples) in cases.items():
        known = set(trained)
        found[case] = places(source, [e for e in examples if e.target in known], trained)
    return found


def places(source: Source, examples: Sequence[Example], trained: Sequence[int]) -> list[int]:
    """Of each example's target among the trained items that are new to its user; a tie counts
    against it. Each history is all that the user had before."""
    outside = torch.ones(len(source.item), dtype=torch.bool)
    outside[list(trained)] = False
    found = []
    for example, state in zip(examples, _states(source, examples), strict=True):
        scores = source.item @ state  # (N,)
        own = scores[example.target].clone()
        scores[outside] = -torch.inf
        scores[[row for row in example.seen if row != example.target]] = -torch.inf
        found.append(int((scores >= own).sum()))
    return found


def _states(source: Source, examples: Sequence[Example]) -> Tensor:
    """(E, d): the vector of training where there is one, whatever it has learnt from."""
    if isinstance(source, UserVectors):
        return source.found.user[[source.row[example.user] for example in examples]]
    people = [Person(example.user, example.history, True) for example in examples]
    parts = [source.states(people[i : i + 256]) for i in range(0, len(people), 256)]
    return torch.cat(parts)


def shares(places: Sequence[int], ks: Sequence[int]) -> dict[str, float]:
    """The share of the targets among the k best, for each k, and the median place."""
    found = {f"first {k}": float((np.array(places) <= k).mean()) for k in ks}
    return {**found, "median": float(np.median(places))}
