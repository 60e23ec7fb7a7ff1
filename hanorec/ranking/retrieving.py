"""What a trained ranking retrieves for held-out items, and how it scores given candidates.

T = examples, one target each; n = items retrieved.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanorec.base.config import EvalConfig
from hanorec.base.errors import InputError
from hanorec.datasets.catalog import Catalog, data_hash
from hanorec.datasets.interactions import Example, HeldOut
from hanorec.ranking.retriever import Retriever, load_retriever


def retrieved(
    held: HeldOut, config: EvalConfig
) -> tuple[list[Example], np.ndarray, np.ndarray, float]:
    """What `--retriever` finds for the users asked for, see `retrieve`, its scores (T, n), and the
    seconds it took."""
    examples = held.asked(held.every)
    retriever = load_retriever(config.retriever, config.split)
    start = time.perf_counter()
    had = [held.interactions.before(example.user, config.split) for example in examples]
    found, places = retrieve(retriever, held.catalog, examples, had, config.top_n, config.seed)
    scores = candidate_scores(retriever, held.catalog, found)
    return found, places, scores, time.perf_counter() - start


def retrieve(
    retriever: Retriever,
    catalog: Catalog,
    examples: Sequence[Example],
    had: Sequence[Iterable[int]],
    n: int,
    seed: int,
) -> tuple[list[Example], np.ndarray]:
    """The retriever's n best items of each example's user, as its candidates.

    They stand in the prompt in random order, as they do in training, so that the new order owes
    nothing to the old one.

    Args:
        had: the items that each example's user had before the target; none of them is retrieved.
    Returns:
        The examples with candidates, and each candidate's place with the retriever, (T, n), 1 =
        best, as in `Retriever.places`.
    Raises:
        InputError: the retriever knows other items, or does not know a user; fewer than n items are
            left.
    """
    users = retriever_rows(retriever, catalog, examples)  # (T,)
    # The retriever masks training items alone; what a user had since are validation items.
    best = retriever.top_n(users, n, had)  # (T, n)
    place = retriever.places(users, best, had).numpy()  # (T, n)

    found, places = [], []
    for number, (example, order) in enumerate(zip(examples, best.tolist(), strict=True)):
        shuffle = np.random.default_rng([seed, number]).permutation(n)
        found.append(replace(example, candidates=tuple(order[i] for i in shuffle)))
        places.append(place[number][shuffle])
    return found, np.array(places)


def retriever_rows(
    retriever: Retriever, catalog: Catalog, examples: Sequence[Example]
) -> Tensor:
    """The retriever's row of each example: (T,) int64. InputError where it has none."""
    if retriever.items != catalog.ids:
        raise InputError(
            f"--retriever: it ranks {len(retriever.items)} items, {catalog.directory} has "
            f"{len(catalog.ids)} or others, expected the same in the same order; train it on this "
            "data"
        )
    keys: list[Any] = [example.user for example in examples]
    known: list[Any] = list(retriever.users)
    if retriever.targets:
        if retriever.data != data_hash(catalog):
            raise InputError(
                f"--retriever: its states were made from data of hash {retriever.data}, expected "
                f"{data_hash(catalog)} of {catalog.directory}; train it on this data"
            )
        keys = _numbered((example.user, catalog.ids[example.target]) for example in examples)
        known = _numbered(zip(retriever.users, retriever.targets, strict=True))
    row = {key: number for number, key in enumerate(known)}
    for example, key in zip(examples, keys, strict=True):
        if key not in row:
            raise InputError(
                f"--retriever: it does not know user {example.user!r}, expected all "
                f"{len(examples)} examples; train it on this data"
            )
    return torch.tensor([row[key] for key in keys])


def candidate_scores(
    retriever: Retriever, catalog: Catalog, examples: Sequence[Example]
) -> np.ndarray:
    """The score of each candidate, never rounded: examples with equally many -> (U, C) float64.

    InputError where the retriever has no state for one of the examples.
    """
    user = retriever.user[retriever_rows(retriever, catalog, examples)]  # (U, d)
    item = retriever.item[torch.tensor([example.candidates for example in examples])]  # (U, C, d)
    return torch.einsum("ud,ucd->uc", user.double(), item.double()).numpy()


def _numbered(keys: Iterable[Any]) -> list[tuple[Any, int]]:
    """Each key with the number of equal ones behind it: a user's first may be missing."""
    count: Counter[Any] = Counter()
    found = []
    for key in reversed(list(keys)):
        found.append((key, count[key]))
        count[key] += 1
    return found[::-1]
