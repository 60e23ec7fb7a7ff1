"""A trained ranking by itself, as it lies on disk, and the candidates that it retrieves.

T = examples, one target each; n = items retrieved.

    FOLDER/embeddings.safetensors   user (U, d), item (I, d), train (2, E): pairs that are masked
    FOLDER/names.json               users, items; where a row of `user` is the state of one held-out
                                    item instead of a user's for all: the split, the targets, and
                                    the hash of the data that the states were made from
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hanorec.base.config import EvalConfig
from hanorec.base.distributed import all_reduce
from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.datasets.catalog import Catalog, data_hash
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
    targets: tuple[str, ...] = ()  # the item that each row of `user` is the state for, if it is
    data: str | None = None  # hash of the data of such states

    def top_n(self, rows: Tensor, n: int, had: Sequence[Iterable[int]] = ()) -> Tensor:
        """The n best items of each user that are new to them, best first.

        Several processes divide the users; each returns all.

        Args:
            rows: (b,) int64 users.
            had: items that each of them had beside the training pairs; nothing = none.
        Returns:
            (b, n) item rows; of equal scores the smaller row first.
        Raises:
            InputError: fewer than n items are left to one of the users.
        """
        least = min(self._new_items(rows, had), default=n)
        if not 1 <= n <= least:
            raise InputError(
                f"{n} items to retrieve: one of these users has {least} items that are new to "
                "them; choose 1 .. that many with --top-n"
            )
        found = rows.new_zeros(len(rows), n)
        for part, s in self._scores(rows, had):
            found[part] = s.argsort(dim=1, descending=True, stable=True)[:, :n]
        all_reduce([found])  # each row is zero in all processes but one
        return found

    def places(self, rows: Tensor, items: Tensor, had: Sequence[Iterable[int]] = ()) -> Tensor:
        """The place, from 1 = best, of these items of each user among all that are new to them.

        A tie counts against every item in it, beyond the n retrieved ones, too: an item that only
        its id brought among them has a place beyond n.

        Args:
            items: (b, n) of `top_n`. rows, had: as there.
        Returns:
            (b, n) int64.
        """
        found = torch.zeros_like(items)
        for part, s in self._scores(rows, had):
            own = s.gather(1, items[part])  # (b, n)
            for column in range(items.shape[1]):
                found[part, column] = (s >= own[:, column : column + 1]).sum(1)
        all_reduce([found])
        return found

    def _new_items(self, rows: Tensor, had: Sequence[Iterable[int]]) -> list[int]:
        """How many items are new to each of these users."""
        left = (len(self.items) - self.seen.degree[rows]).tolist()
        for number, items in enumerate(had):
            _, trained = self.seen.of(rows[number : number + 1])
            left[number] -= len(set(items).difference(trained.tolist()))
        return left

    def _scores(
        self, rows: Tensor, had: Sequence[Iterable[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's blocks: places in `rows`, and scores (b, I), -inf at what is not new."""
        for part in own_blocks(torch.arange(len(rows)), len(self.items)):
            s = self.user[rows[part]] @ self.item.T  # (b, I)
            s[self.seen.of(rows[part])] = -torch.inf
            for line, number in enumerate(part.tolist() if had else ()):
                s[line, list(had[number])] = -torch.inf
            yield part, s


def check_retriever(folder: str | Path, split: str) -> None:
    """InputError where `--retriever` is no finished folder, or one of states for another split.

    Only names and headers are read, so it costs little before a model is loaded.
    """
    folder = Path(folder)
    wanted = (
        "expected the --out folder of a finished train_brmrs.py, or the folder val or test in that "
        "of a recommender of hanorec.baselines"
    )
    if not (folder / "names.json").exists():
        raise InputError(
            f"--retriever: {folder / 'names.json'}: no such file, {wanted}; check the path, or "
            "give that command again if it was stopped"
        )
    names = read_object(folder / "names.json")
    if not all(isinstance(names.get(kind), list) for kind in ("users", "items")):
        raise InputError(
            f"--retriever: {folder / 'names.json'} has no lists of users and items, {wanted}; "
            "check the path"
        )
    if names.get("split", split) != split:
        raise InputError(
            f"--retriever: {folder} holds states for the split {names['split']!r}, expected "
            f"{split!r} as --split says; give the folder {split} beside it, or another --split"
        )
    path = folder / "embeddings.safetensors"
    try:
        with safe_open(path, "pt") as file:
            for name in ("user", "item", "train"):
                file.get_slice(name)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"--retriever: {path}: cannot be read ({error}), {wanted}; check the path"
        ) from None


def load_retriever(folder: str | Path, split: str = "test") -> Retriever:
    """What a recommender left in its finished folder, on the CPU, for the examples of a split."""
    check_retriever(folder, split)
    names = read_object(Path(folder) / "names.json")
    found = load_file(Path(folder) / "embeddings.safetensors")
    users, items, targets = (tuple(names.get(kind, ())) for kind in ("users", "items", "targets"))
    seen = Seen(*found["train"], len(users))
    return Retriever(
        users, items, found["user"], found["item"], seen, targets, names.get("data")
    )


# ---- retrieving ----


def retrieved(held: HeldOut, config: EvalConfig) -> tuple[list[Example], np.ndarray, float]:
    """What `--retriever` finds for the users asked for, see `retrieve`, and the seconds it took."""
    examples = held.asked(held.every)
    retriever = load_retriever(config.retriever, config.split)
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


def _numbered(keys: Iterable[Any]) -> list[tuple[Any, int]]:
    """Each key with the number of equal ones before it."""
    count: Counter[Any] = Counter()
    found = []
    for key in keys:
        found.append((key, count[key]))
        count[key] += 1
    return found
