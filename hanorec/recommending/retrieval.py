"""What a trained recommender retrieves for anybody: a state of each person, a row of each item.

A score is an inner product. b = people, N = items, d = width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.baselines.config import SequenceConfig
from hanorec.baselines.sequence_training import new_model
from hanorec.baselines.vectors import padded
from hanorec.datasets.catalog import Catalog, data_hash
from hanorec.datasets.interactions import Interactions
from hanorec.ranking.retriever import load_retriever
from hanorec.ranking.sampler import Seen
from hanorec.recommending.fold_in import fit_fold_in, item_means
from hanorec.recommending.people import Person

AGAIN = "train it on this data"


class Source(Protocol):
    """What retrieves."""

    item: Tensor  # (N, d)
    file: Path  # its weights, for the record

    def states(self, people: Sequence[Person]) -> Tensor:
        """(b, d)."""
        ...

    def about(self, people: Iterable[Person]) -> str:
        """Where the states come from, for a note; it goes through all people once."""
        ...


class UserVectors:
    """BR-MRS, LightGCN, BPR-MF: a vector of each user of training; others are folded in (RC-1).

    A user's own vector knows what they had in training; what they have had since is left out of the
    lists, but not in the vector.
    """

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        found = load_retriever(folder)
        self.file = folder / "embeddings.safetensors"
        self.item, self.ids, self.found = found.item, catalog.ids, found
        self.row: dict[str, int] = {}
        for row, user in enumerate(found.users):  # of several states, which are equal, the first
            self.row.setdefault(user, row)

    @cached_property
    def W(self) -> Tensor:
        """The map of `fit_fold_in`."""
        return fit_fold_in(self.found.user, self.item, self.found.seen)

    def states(self, people: Sequence[Person]) -> Tensor:
        """(b, d). InputError: a user who, in training, had an item that the data does not have."""
        return torch.stack([self._state(person) for person in people])

    def _state(self, person: Person) -> Tensor:
        if not self.knows(person):
            items = torch.tensor(list(dict.fromkeys(person.history)))
            own = Seen(torch.zeros_like(items), items, 1)
            mean = item_means(self.item, own, torch.zeros(1, dtype=torch.long))  # (1, d + 1)
            return (mean @ self.W)[0].to(self.item.dtype)
        row = self.row[person.name]
        _, trained = self.found.seen.of(torch.tensor([row]))
        others = set(trained.tolist()).difference(person.history)
        if others:
            raise InputError(
                f"--retriever: it was trained on item {self.ids[min(others)]!r} of user "
                f"{person.name!r}, who does not have it in this data, expected the same data or "
                f"more of it; {AGAIN}"
            )
        return self.found.user[row]

    def knows(self, person: Person) -> bool:
        """Whether they have a vector of their own."""
        return person.in_data and person.name in self.row

    def about(self, people: Iterable[Person]) -> str:
        own = total = 0
        for person in people:
            own += self.knows(person)
            total += 1
        return (
            f"{own} of {total} with their own vector of training, {total - own} folded in from the "
            "mean of their items (RC-1)"
        )


class SequenceStates:
    """SASRec, GRU4Rec, Caser, BERT4Rec, CL4SRec: a state from each person's last items."""

    def __init__(self, folder: Path, config: SequenceConfig, catalog: Catalog, data: Interactions):
        self.method, self.length = config.method, config.history or config.length
        self.row = {user: row for row, user in enumerate(data.train)}
        self.n_items = len(catalog.ids)
        self.file = folder / "model.safetensors"
        weights = _weights(self.file)
        self.model = new_model(config, len(self.row), self.n_items).eval()
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(
                f"--retriever: {self.file}: its weights are not those of "
                f"model.json with {len(self.row)} users and {self.n_items} items "
                f"({str(error).splitlines()[-1].strip()}), expected both of one run; {AGAIN}"
            ) from None
        self.item = self.model.item_rows().detach()

    @torch.no_grad()
    def states(self, people: Sequence[Person]) -> Tensor:
        """(b, d'). InputError: of Caser, somebody who was not in training."""
        users = torch.tensor([self._row(person) for person in people])
        sequences = padded([person.history[-self.length :] for person in people], self.n_items)
        return self.model.state(users, sequences)

    def _row(self, person: Person) -> int:
        if self.method == "caser" and not person.in_data:
            raise InputError(
                f"--retriever: Caser has a vector for each user of training and none for "
                f"{person.name!r}, expected users of the data; use another method for them"
            )
        return self.row[person.name] if person.in_data else 0

    def about(self, people: Iterable[Person]) -> str:
        return f"all from the last {self.length} items by {self.method}"


def load_source(folder: str | Path, catalog: Catalog, data: Interactions) -> Source:
    """What `--retriever` names. InputError: no finished run, or one of other data."""
    folder = Path(folder)
    if not (folder / "model.json").exists() and (folder.parent / "model.json").exists():
        folder = folder.parent  # a folder of states, val or test
    wanted = "the --out folder of a finished train_brmrs.py or recommender of hanorec.baselines"
    missing = [name for name in ("model.json", "metrics.json") if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"--retriever: {folder / missing[0]}: no such file, expected {wanted}; check the path, "
            "or give that command again if it was stopped"
        )
    config = read_object(folder / "model.json").get("config")
    if not isinstance(config, dict):
        raise InputError(
            f"--retriever: {folder / 'model.json'} has no config, expected {wanted}; check the path"
        )
    of_baselines = (folder / "test" / "names.json").exists()
    names = read_object((folder / "test" if of_baselines else folder) / "names.json")
    if names.get("items") != list(catalog.ids):
        raise InputError(
            f"--retriever: {folder} ranks {len(names.get('items', ()))} items, {catalog.directory} "
            f"has {len(catalog.ids)} or others, expected the same in the same order; {AGAIN}"
        )
    if "method" not in config:
        return UserVectors(folder / "test" if of_baselines else folder, catalog)
    config = _sequence_config(folder, config)
    if config.method == "caser" and names.get("data") != data_hash(catalog):
        raise InputError(
            f"--retriever: {folder} was trained on data of hash {names.get('data')}, expected "
            f"{data_hash(catalog)} of {catalog.directory}, since Caser knows users by their lines "
            f"in train.tsv; {AGAIN}"
        )
    return SequenceStates(folder, config, catalog, data)


def _sequence_config(folder: Path, config: dict[str, Any]) -> SequenceConfig:
    unknown = sorted(config.keys() - {field.name for field in fields(SequenceConfig)})
    if unknown:
        raise InputError(
            f"--retriever: {folder / 'model.json'}: unknown settings {', '.join(unknown)}, "
            f"expected those of sequence_training; {AGAIN}"
        )
    return SequenceConfig(**config)


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"--retriever: {path}: cannot be read ({error}), expected the weights of a finished "
            f"run; {AGAIN}"
        ) from None


def best(scores: Tensor, n: int) -> Tensor:
    """The n largest of (N,) scores that are not -inf, or all of these: rows, best first.

    Of equal scores the smaller row comes first.
    """
    n = min(n, int((scores > -torch.inf).sum()))
    if not n:
        return torch.zeros(0, dtype=torch.long)
    least = scores.topk(n).values[-1]
    rows = (scores >= least).nonzero()[:, 0]  # ascending; more than n where the last ones tie
    return rows[scores[rows].argsort(descending=True, stable=True)[:n]]
