r"""Who had what, in which order: histories and held-out items. Candidates: see candidates.py.

train.tsv, val.tsv and test.tsv hold one user a line, user<TAB>id id id ..., oldest first, without a
header. A user's whole sequence is train + val + test. Two rules keep the future out:

- a history holds only rows that come strictly before its target;
- a negative is an item the user has not had: not in train (training), train + val (val),
  train + val + test (test).
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hanorec.base.errors import Fault, InputError, refuse, shown
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.lines import numbered_lines

Rows = tuple[int, ...]  # of the catalogue


@dataclass(frozen=True)
class Interactions:
    """User -> item rows, oldest first, for each split.

    Every user is in `train`; `val` and `test` may lack users.
    """

    train: dict[str, Rows]
    val: dict[str, Rows]
    test: dict[str, Rows]

    def __repr__(self) -> str:
        counts = [f"{len(getattr(self, split))} in {split}" for split in ("train", "val", "test")]
        return f"<Interactions: users, {', '.join(counts)}>"

    def before(self, user: str, split: str) -> Rows:
        """All rows of `user` earlier than `split`: "val" gives train, "test" gives train + val."""
        _check_split(split)
        val = self.val.get(user, ()) if split == "test" else ()
        return self.train[user] + val


@dataclass(frozen=True, slots=True)  # slots, and `seen` without a copy: there are millions of them
class Example:
    """One thing to predict. Every int is a row of the catalogue."""

    user: str
    history: Rows  # the most recent rows before the target, oldest first, never empty
    target: int
    seen: Collection[int]  # never a negative; includes the target; may repeat
    candidates: Rows = ()  # the target and its negatives, shuffled

    def __repr__(self) -> str:
        had, listed = len(self.history), len(self.candidates)
        return f"<Example: {self.user}, {had} items -> {self.target}, {listed} candidates>"
    also: Rows = ()  # further targets of one answer with it, newest first: lists.py

    @property
    def targets(self) -> Rows:
        """All that are to be predicted, the newest first."""
        return self.target, *self.also


@dataclass(frozen=True)
class HeldOut:
    """The data, every held-out item of a split, and the users asked for."""

    catalog: Catalog
    interactions: Interactions
    every: list[Example]  # of all users: candidate sets are drawn for all of them at once
    users: set[str]

    def __repr__(self) -> str:
        return f"<HeldOut: {len(self.every)} items of {self.catalog.name}, {len(self.users)} users>"

    def asked(self, examples: list[Example]) -> list[Example]:
        """Those of the users asked for."""
        return [example for example in examples if example.user in self.users]


def _check_split(split: str) -> None:
    if split not in ("val", "test"):
        raise InputError(f"split {split!r}; expected 'val' or 'test'")


def load_interactions(
    directory: Path, catalog: Catalog, fault: Fault = refuse
) -> Interactions:
    """Read the three files of a native dataset. InputError names the file, the line, the value."""
    directory = Path(directory)
    path = directory / "train.tsv"
    train = _read_split(path, catalog, None, fault)
    if not train and path.is_file():
        fault(InputError(f"{path}: no users; expected lines user<TAB>id id id ..."))
    known = train or None
    val = _read_split(directory / "val.tsv", catalog, known, fault)
    test = _read_split(directory / "test.tsv", catalog, known, fault)
    return Interactions(train, val, test)


def _read_split(
    path: Path, catalog: Catalog, train: dict[str, Rows] | None, fault: Fault
) -> dict[str, Rows]:
    """User -> rows of one file. train: the users that may occur, None = any."""
    users: dict[str, Rows] = {}
    row = catalog.row
    for line, text in numbered_lines(path, fault=fault):
        user, tab, rest = text.partition("\t")
        if not tab or "\t" in rest:
            fault(InputError(
                f"{path}:{line}: {text.count(chr(9))} tabs in {shown(text)}; "
                f"expected one, as in user<TAB>id id id ..."
            ))
            if tab and (train is None or user in train):
                users.setdefault(user, ())  # known, though not what they had
            continue
        if not user.strip():
            fault(InputError(
                f"{path}:{line}: empty user {shown(user)}; "
                f"expected a name before the tab, so add it or remove the line"
            ))
            continue
        if user in users:
            fault(InputError(
                f"{path}:{line}: user {shown(user)} has an earlier line; "
                f"expected one line a user, so join them"
            ))
            continue
        items = rest.split()
        if not items:
            fault(InputError(
                f"{path}:{line}: user {shown(user)} has no items (empty history); "
                f"expected at least one, so add them or remove the line"
            ))
        if train is not None and user not in train:
            fault(InputError(
                f"{path}:{line}: user {shown(user)} has no line in train.tsv (empty history); "
                f"expected one, so add it or remove the user here"
            ))
            continue
        try:
            users[user] = tuple(map(row.__getitem__, items))
        except KeyError:
            for item in dict.fromkeys(items):
                if item not in row:
                    fault(InputError(
                        f"{path}:{line}: unknown item id {shown(item)}; "
                        f"expected an id of the titles file: add it there or remove it here"
                    ))
            users[user] = tuple(row[item] for item in items if item in row)
    return users


def training_examples(
    data: Interactions,
    targets_per_user: int = 3,
    history: int = 5,
    users: Iterable[str] | None = None,
) -> list[Example]:
    """The last `targets_per_user` positions (0 = all) of each train sequence, as examples.

    Each has at least one earlier item. `Example.seen` is the user's whole train sequence: a later
    training item is no negative, and val and test are not looked at.
    """
    if targets_per_user < 0:
        raise InputError(f"targets_per_user is {targets_per_user}; expected 0 (all) or more")
    _check_history(history)
    examples = []
    for user in data.train if users is None else users:
        if user not in data.train:
            raise InputError(
                f"user {user!r} has no line in train.tsv; "
                f"expected one of its {len(data.train)} users"
            )
        rows = data.train[user]
        first = max(1, len(rows) - targets_per_user) if targets_per_user else 1
        for position in range(first, len(rows)):
            earlier = rows[max(0, position - history) : position]
            examples.append(Example(user, earlier, rows[position], rows))
    return examples


def heldout_examples(data: Interactions, split: str, history: int = 5) -> list[Example]:
    """One example per held-out row of `split` ("val" or "test"), in file order."""
    _check_split(split)
    _check_history(history)
    examples = []
    for user, held_out in getattr(data, split).items():
        before = data.before(user, split)
        seen = before + held_out
        for position, target in enumerate(held_out, len(before)):
            earlier = seen[max(0, position - history) : position]
            examples.append(Example(user, earlier, target, seen))
    return examples


def without_last(data: Interactions, count: int) -> Interactions:
    """The training items but for each user's last `count`, which are `val`; nobody has a test item.

    Everybody keeps at least one item. So `val` holds the targets of `training_examples`.
    """
    cut, last = {}, {}
    for user, rows in data.train.items():
        first = max(1, len(rows) - count)
        cut[user] = rows[:first]
        if rows[first:]:
            last[user] = rows[first:]
    return Interactions(cut, last, {})


def check_some(directory: str | Path, examples: Sequence[Example], users: Collection[str]) -> None:
    """InputError where these users give no training example."""
    if not examples:
        raise InputError(
            f"{directory}: none of the {len(users)} users has two training items, expected some; "
            f"choose other users or more data"
        )


def had_before(data: Interactions, split: str, examples: Iterable[Example]) -> list[Example]:
    """Those of the split's examples whose target their user had before: copying finds it."""
    return [example for example in examples if example.target in data.before(example.user, split)]


def with_seen(examples: Iterable[Example]) -> Iterator[tuple[Example, frozenset[int]]]:
    """Each example with what its user has had, as a set.

    It is made once for all examples of one user, since they share `seen`.
    """
    last, seen = None, frozenset()
    for example in examples:
        if example.seen is not last:
            last, seen = example.seen, frozenset(example.seen)
        yield example, seen


def item_counts(train: Mapping[str, Sequence[int]]) -> Counter[int]:
    """Item row -> how often it was chosen in training; 0 for the others."""
    count: Counter[int] = Counter()
    for rows in train.values():
        count.update(rows)
    return count


def _check_history(history: int) -> None:
    if history < 1:
        raise InputError(f"history is {history}; expected at least 1 item")


def select_users(users: Iterable[str], start: float, stop: float, seed: int) -> list[str]:
    """The users whose seeded rank lies in the fraction [start, stop).

    Adjoining fractions share nobody and miss nobody.
    """
    if not 0 <= start < stop <= 1:
        raise InputError(
            f"fraction [{start}, {stop}) of the users; expected 0 <= start < stop <= 1 "
            f"of --users-from and --users-to"
        )
    ranked = sorted(set(users))  # sorted, so that file order does not matter
    order = np.random.default_rng(seed).permutation(len(ranked))
    chosen = order[round(start * len(ranked)) : round(stop * len(ranked))]
    if not len(chosen):
        raise InputError(
            f"fraction [{start}, {stop}) of {len(ranked)} users is nobody; "
            f"widen --users-from, --users-to"
        )
    return [ranked[i] for i in chosen]
