"""A trained ranking by itself, as it lies on disk, and the candidates that it retrieves.

T = examples, one target each; n = items retrieved.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hanorec.base.config import EvalConfig
from hanorec.base.distributed import all_reduce
from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example
from hanorec.ranking.candidate_sets import HeldOut
from hanorec.ranking.full_ranking import own_blocks
from hanorec.ranking.sampler import Seen


@dataclass
class Retriever:
    """The trained ranking by itself: names, fused embeddings, and what is masked."""

    users: tuple[str, ...]
    items: tuple[str, ...]
    user: Tensor  # (U, d_f)
    item: Tensor  # (I, d_f)
    seen: Seen

    def top_n(self, rows: Tensor, n: int) -> Tensor:
        """The n best items of each user that are not among the training pairs, best first.

        Several processes divide the users; each returns all.

        Args:
            rows: (b,) int64 users.
        Returns:
            (b, n) item rows; of equal scores the smaller row first.
        Raises:
            InputError: fewer than n items are left to one of the users.
        """
        least = n
        if len(rows):
            least = len(self.items) - int(self.seen.degree[rows].max())
        if not 1 <= n <= least:
            raise InputError(
                f"{n} items to retrieve: one of these users has {least} items without a training "
                "pair; choose 1 .. that many"
            )
        found = rows.new_zeros(len(rows), n)
        for part in own_blocks(torch.arange(len(rows)), len(self.items)):
            s = self.user[rows[part]] @ self.item.T  # (b, I)
            s[self.seen.of(rows[part])] = -torch.inf
            found[part] = s.argsort(dim=1, descending=True, stable=True)[:, :n]
        all_reduce([found])  # each row is zero in all processes but one
        return found


def load_retriever(folder: str | Path) -> Retriever:
    """What train_brmrs.py left in its finished OUT folder, on the CPU."""
    folder = Path(folder)
    names, path = read_object(folder / "names.json"), folder / "embeddings.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}), expected the --out folder of a finished "
            "train_brmrs.py; check the path"
        ) from None
    users, items = tuple(names["users"]), tuple(names["items"])
    seen = Seen(*found["train"], len(users))
    return Retriever(users, items, found["user"], found["item"], seen)


# ---- retrieving ----


def retrieved(held: HeldOut, config: EvalConfig) -> tuple[list[Example], np.ndarray, float]:
    """What `--retriever` finds for the users asked for, see `retrieve`, and the seconds it took."""
    examples = held.asked(held.every)
    retriever = load_retriever(config.retriever)
    start = time.perf_counter()
    had = [held.interactions.before(example.user, config.split) for example in examples]
    found, places = retrieve(retriever, held.catalog, examples, had, config.top_n, config.seed)
    return found, places, time.perf_counter() - start


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
        best.
    Raises:
        InputError: the retriever knows other items, or does not know a user; fewer than n items are
            left.
    """
    users = _retriever_rows(retriever, catalog, examples)  # (T,)
    before = [set(items) for items in had]
    # The retriever leaves out training items; so many more are asked for that n are left without
    # those that a user had since (validation items).
    degrees = retriever.seen.degree[users].tolist()
    later = max(len(items) - degree for items, degree in zip(before, degrees, strict=True))
    best = retriever.top_n(users, n + later).tolist()

    found, places = [], []
    for number, (example, order) in enumerate(zip(examples, best, strict=True)):
        left = [item for item in order if item not in before[number]][:n]
        shuffle = np.random.default_rng([seed, number]).permutation(n)
        found.append(replace(example, candidates=tuple(left[i] for i in shuffle)))
        places.append(shuffle + 1)
    return found, np.array(places)


def _retriever_rows(
    retriever: Retriever, catalog: Catalog, examples: Sequence[Example]
) -> Tensor:
    """The retriever's row of each example's user: (T,) int64."""
    if retriever.items != catalog.ids:
        raise InputError(
            f"--retriever: it ranks {len(retriever.items)} items, {catalog.directory} has "
            f"{len(catalog.ids)} or others, expected the same in the same order; train it on this "
            "data"
        )
    row = {user: number for number, user in enumerate(retriever.users)}
    unknown = [example.user for example in examples if example.user not in row]
    if unknown:
        raise InputError(
            f"--retriever: it does not know user {unknown[0]!r}, expected all {len(examples)} "
            "users; train it on this data"
        )
    return torch.tensor([row[example.user] for example in examples])
