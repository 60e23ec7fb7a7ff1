"""Candidate sets: 1 positive and n negatives, drawn once with a seed, the same for every model.

A set never holds an item that the user has had (`Example.seen`), nor two items with one title. Sets
that match the target's popularity: matched.py. How sets are frozen in a file: frozen.py.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from hanorec.base.errors import InputError, shown
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example, with_seen


def draw_candidates(
    examples: Iterable[Example],
    catalog: Catalog,
    negatives: int = 9,
    seed: int = 2025,
) -> list[Example]:
    """The examples with their `Example.candidates`.

    These are the target and `negatives` uniform unseen rows, all titles different, shuffled. A set
    depends on (seed, user, target, number of seen items) and the catalogue alone: a subset of the
    examples gets the same sets. InputError: too few unseen items.
    """
    check_negatives(negatives)
    n_items = len(catalog.ids)
    rows = list(catalog.row.values())
    result = []
    for example, seen in with_seen(examples):
        rng = generator_of(seed, example, seen, catalog)
        taken: list[int] = []
        used = {catalog.titles[row] for row in example.targets}

        # rejection first: it costs nothing in a large catalogue
        draws = rng.integers(n_items, size=4 * negatives + 16)
        take(draws.tolist(), taken, used, negatives, seen, catalog.titles)

        # a small pool: go on through all of it in random order, which is uniform too
        if len(taken) < negatives:
            pool = [row for row in range(n_items) if row not in seen]
            take(rng.permutation(pool).tolist(), taken, used, negatives, seen, catalog.titles)

        if len(taken) < negatives:
            raise InputError(
                f"user {shown(example.user)}: {len(taken)} unseen items with titles of their own, "
                f"{negatives} negatives wanted; use fewer negatives (--candidates) or add items to "
                f"the titles file"
            )
        result.append(shuffled(rng, example, taken, rows))
    return result


def draw_hard_candidates(
    examples: Iterable[Example],
    catalog: Catalog,
    neighbors: np.ndarray,
    negatives: int = 9,
    seed: int = 2025,
) -> list[Example]:
    """As `draw_candidates`, with negatives from the target's neighbourhood: the hard set.

    They are drawn uniformly from the M nearest items rather than being the very nearest: of ten
    items that all lie next to one of them, that one could be told by its place in the middle.

    neighbors: (N, M) int, row i = the items nearest to i. InputError: too few of them are left.
    """
    check_negatives(negatives)
    neighbors = np.asarray(neighbors)
    _check_neighbors(neighbors, len(catalog.ids))
    rows = list(catalog.row.values())
    result = []
    for example, seen in with_seen(examples):
        rng = generator_of(seed, example, seen, catalog)
        taken: list[int] = []
        used = {catalog.titles[row] for row in example.targets}
        near = rng.permutation(neighbors[example.target])
        take(near.tolist(), taken, used, negatives, seen, catalog.titles)
        if len(taken) < negatives:
            raise InputError(
                f"item {catalog.ids[example.target]!r}: "
                f"{len(taken)} of {neighbors.shape[1]} neighbours are unseen by "
                f"user {example.user!r} and have titles of their own, "
                f"{negatives} negatives wanted; raise --neighbors or use fewer negatives "
                f"(--candidates)"
            )
        result.append(shuffled(rng, example, taken, rows))
    return result


def near_count(wanted: int, catalog: Catalog) -> int:
    """How many neighbours of an item hard negatives are drawn from: `wanted`, or all others."""
    others = len(catalog.ids) - 1
    if others < 1:
        raise InputError(
            f"{catalog.directory}: one item has no neighbours; add items to the titles file"
        )
    return min(wanted, others)


def check_negatives(negatives: int) -> None:
    """InputError where a set would have none."""
    if negatives < 1:
        raise InputError(f"negatives is {negatives}; expected at least 1")


def _check_neighbors(neighbors: np.ndarray, n: int) -> None:
    if neighbors.ndim != 2 or len(neighbors) != n or neighbors.dtype.kind not in "iu":
        raise InputError(
            f"neighbors is {neighbors.dtype} {neighbors.shape}; "
            f"expected integers of shape ({n}, M)"
        )
    if neighbors.size and (neighbors.min() < 0 or neighbors.max() >= n):
        raise InputError(
            f"neighbors spans {neighbors.min()} .. {neighbors.max()}; expected rows 0 .. {n - 1}"
        )


def generator_of(
    seed: int, example: Example, seen: frozenset[int], catalog: Catalog
) -> np.random.Generator:
    """A generator of the example's own: a subset of the users gets the same sets as all of them."""
    key = json.dumps([seed, example.user, catalog.ids[example.target], len(seen)])
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def take(
    rows: Iterable[int],
    taken: list[int],
    used: set[str],
    count: int,
    seen: frozenset[int],
    titles: Sequence[str],
) -> None:
    """Move unseen rows with new titles from `rows` to `taken` until it holds `count`.

    `used` holds the titles so far: the answer is a title, so two items with one title could not be
    told apart.
    """
    for row in rows:
        if len(taken) == count:
            return
        if row not in seen and titles[row] not in used:
            taken.append(row)
            used.add(titles[row])


def shuffled(
    rng: np.random.Generator, example: Example, taken: list[int], rows: list[int]
) -> Example:
    """The example with its targets and the rows `taken` as candidates, in random order.

    rows: 0, 1, 2 ... as the integers that the whole catalogue shares; new ones would cost three
    times the memory.
    """
    order = rng.permutation([*example.targets, *taken]).tolist()
    return replace(example, candidates=tuple(rows[row] for row in order))
