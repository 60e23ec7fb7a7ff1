"""A trained ranking by itself, as it lies on disk, and its best items for its rows.

    FOLDER/embeddings.safetensors   user (U, d), item (I, d), train (2, E): pairs that are masked
    FOLDER/names.json               users, items; where a row of `user` is the state of one held-out
                                    item instead of a user's for all: the split, the targets, and
                                    the hash of the data that the states were made from; hold_out,
                                    how many of each user's last training items it has not learnt
                                    from
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hanorec.base.distributed import all_reduce
from hanorec.base.errors import InputError
from hanorec.base.files import read_object
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

    def __repr__(self) -> str:
        return f"<Retriever: {len(self.user)} users, {len(self.item)} items>"

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
