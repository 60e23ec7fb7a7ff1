"""Candidate sets whose negatives are about as popular as the target: popularity is at chance there.

Among uniform negatives a held-out item is told by its popularity first. Here its place by
popularity among the candidates is dealt out: over all examples each place occurs equally often.
"""

from collections.abc import Collection, Iterable

import numpy as np

from hanorec.base.errors import InputError, shown
from hanorec.datasets.candidates import check_negatives, generator_of, shuffled, take
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example, with_seen


def draw_matched_candidates(
    examples: Iterable[Example],
    catalog: Catalog,
    counts: np.ndarray,
    neighbors: int = 50,
    negatives: int = 9,
    seed: int = 2025,
) -> list[Example]:
    """The examples with the target and `negatives` unseen rows, all titles different, shuffled.

    A target at place p by count (0 = most popular) has p negatives drawn uniformly from the
    `neighbors` unseen items next above it, the others from those next below it; on either side
    whatever has the count of the last one belongs to it. Items of the target's own count would tie
    with it: they only fill up where both sides together are too few.

    The nearest items alone would not do: next to a popular target most are less popular, and in the
    middle of the catalogue the target would stand in their middle, which can be told, too. A target
    among the most or the least popular items cannot take every place; the others make up for it as
    far as they can. So a set depends on all examples. What is at chance are ranks within a user.

    counts: (N,) int, how often each item occurs in training. InputError: too few unseen items, or
    fewer neighbors than negatives.
    """
    check_negatives(negatives)
    if neighbors < negatives:
        raise InputError(
            f"--neighbors {neighbors}: expected at least {negatives}, since all negatives of a "
            "matched set may stand on one side of the target; raise it, or use fewer negatives "
            "(--candidates)"
        )
    pairs = list(with_seen(examples))
    order = np.argsort(counts, kind="stable")  # (N,) rows, least popular first
    upward = order, counts[order]
    downward = order[::-1], -counts[order[::-1]]
    pools, rooms = [], []
    for example, seen in pairs:
        own = counts[example.target]
        above = _beyond(*upward, own, seen, neighbors)
        below = _beyond(*downward, -own, seen, neighbors)
        pools.append((above, below))
        rooms.append([_room(pool, example, seen, catalog, negatives) for pool in (above, below)])

    most, room_below = np.array(rooms).reshape(-1, 2).T  # (E,) each
    least = np.minimum(negatives - room_below, most)  # most, where both sides are too few
    places = deal_places(least, most, negatives, np.random.default_rng(seed))
    _say_uneven(places, negatives)

    rows, result = list(catalog.row.values()), []
    for (example, seen), (above, below), place in zip(pairs, pools, places, strict=True):
        rng, taken = generator_of(seed, example, seen, catalog), []
        used = {catalog.titles[example.target]}
        take(rng.permutation(above).tolist(), taken, used, place, seen, catalog.titles)
        take(rng.permutation(below).tolist(), taken, used, negatives, seen, catalog.titles)
        if len(taken) < negatives:
            tied = np.flatnonzero(counts == counts[example.target])
            take(rng.permutation(tied).tolist(), taken, used, negatives, seen, catalog.titles)
        if len(taken) < negatives:
            raise InputError(
                f"user {shown(example.user)}: {len(taken)} unseen items with titles of their own "
                f"about as popular as the target, {negatives} negatives wanted; use fewer "
                "negatives (--candidates), raise --neighbors, or add items to the titles file"
            )
        result.append(shuffled(rng, example, taken, rows))
    return result


def deal_places(
    least: np.ndarray, most: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """A place in least .. most for each example, at random, and each of 0 .. n equally often as far
    as these bounds permit: (E,), (E,) -> (E,) int.
    """
    left = np.arange(len(most))  # examples without a place
    places = np.zeros(len(most), int)
    for place in range(n + 1):
        left = rng.permutation(left)
        due, open_to = most[left] == place, least[left] <= place
        left = left[np.argsort(np.where(due, 0, np.where(open_to, 1, 2)), kind="stable")]
        after = len(most) * (n - place) // (n + 1)  # how many are to be left
        number = int(np.clip(len(left) - after, due.sum(), open_to.sum()))
        places[left[:number]] = place
        left = left[number:]
    return places


def _beyond(
    order: np.ndarray, level: np.ndarray, own: int, seen: Collection[int], m: int
) -> np.ndarray:
    """Rows of `order`, whose levels ascend, from the first above `own` to the m-th that is unseen,
    with all of that level."""
    start = np.searchsorted(level, own, "right")
    some = order[start : start + m + len(seen)].tolist()
    unseen = [place for place, row in enumerate(some, start) if row not in seen][:m]
    if not unseen:
        return order[:0]
    return order[start : np.searchsorted(level, level[unseen[-1]], "right")]


def _room(
    pool: np.ndarray, example: Example, seen: frozenset[int], catalog: Catalog, most: int
) -> int:
    """How many negatives the pool has for the example, counted up to `most`."""
    taken: list[int] = []
    take(pool.tolist(), taken, {catalog.titles[example.target]}, most, seen, catalog.titles)
    return len(taken)


def _say_uneven(places: np.ndarray, n: int) -> None:
    """A note where not every place could be dealt out equally often."""
    times = np.bincount(places, minlength=n + 1)
    if np.ptp(times) > 1:
        print(
            f"note: too many targets are among the most or the least popular items: their places "
            f"by popularity among {n} matched negatives occur {times.min()} to {times.max()} times "
            "each, so popularity is not quite at chance there; see its line in the report"
        )
