r"""Who had what, in which order: histories, held-out items, and frozen candidate sets (1 positive + n negatives).

train.tsv, val.tsv and test.tsv hold one user a line, `user<TAB>id id id ...`, oldest first, without a header. A user's
whole sequence is train + val + test. Two rules keep the future out:

- a history holds only rows that come strictly before its target;
- a negative is an item the user has not had: not in train (training), train + val (val), train + val + test (test).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.catalog import Catalog
from hanorec.errors import InputError
from hanorec.files import read_json, write_json
from hanorec.lines import numbered_lines


@dataclass(frozen=True)
class Interactions:
    """User -> item rows, oldest first, for each split. Every user is in `train`; `val` and `test` may lack users."""

    train: dict[str, tuple[int, ...]]
    val: dict[str, tuple[int, ...]]
    test: dict[str, tuple[int, ...]]

    def before(self, user: str, split: str) -> tuple[int, ...]:
        """All rows of `user` earlier than `split`: "val" gives train, "test" gives train + val."""
        _check_split(split)
        return self.train[user] + (self.val.get(user, ()) if split == "test" else ())


@dataclass(frozen=True)
class Example:
    """One thing to predict. Every int is a row of the catalogue."""

    user: str
    history: tuple[int, ...]  # the most recent rows before the target, oldest first, never empty
    target: int
    seen: frozenset[int]  # never a negative; includes the target
    candidates: tuple[int, ...] = ()  # the target and its negatives, shuffled


def _check_split(split: str) -> None:
    if split not in ("val", "test"):
        raise InputError(f"split {split!r}; expected 'val' or 'test'")


def load_interactions(directory: Path, catalog: Catalog) -> Interactions:
    """Read the three files of a native dataset. InputError names the file, the line and the value."""
    directory = Path(directory)
    train = _read_split(directory / "train.tsv", catalog, None)
    if not train:
        raise InputError(f"{directory / 'train.tsv'}: no users; expected lines user<TAB>id id id ...")
    held_out = [_read_split(directory / f"{split}.tsv", catalog, train) for split in ("val", "test")]
    return Interactions(train, *held_out)


def _read_split(path: Path, catalog: Catalog, train: dict[str, tuple[int, ...]] | None) -> dict[str, tuple[int, ...]]:
    users: dict[str, tuple[int, ...]] = {}
    for line, text in numbered_lines(path):
        user, tab, rest = text.partition("\t")
        if not tab or "\t" in rest:
            raise InputError(
                f"{path}:{line}: {text.count(chr(9))} tabs in {text[:80]!r}; expected one, as in user<TAB>id id id ..."
            )
        if not user.strip():
            raise InputError(f"{path}:{line}: empty user {user!r}; expected a name before the tab")
        if user in users:
            raise InputError(
                f"{path}:{line}: user {user!r} has an earlier line; expected one line a user, so join them"
            )
        items = rest.split()
        if not items:
            raise InputError(
                f"{path}:{line}: user {user!r} has no items (empty history); expected at least one, "
                f"so add them or remove the line"
            )
        if train is not None and user not in train:
            raise InputError(
                f"{path}:{line}: user {user!r} has no line in train.tsv (empty history); expected one, "
                f"so add it or remove the user here"
            )
        try:
            users[user] = tuple(catalog.row[item] for item in items)
        except KeyError as error:
            raise InputError(
                f"{path}:{line}: unknown item id {error.args[0]!r}; expected an id of the titles file: "
                f"add it there or remove it here"
            ) from None
    return users


def training_examples(
    data: Interactions, targets_per_user: int = 3, history: int = 5, users: Iterable[str] | None = None
) -> list[Example]:
    """The last `targets_per_user` positions (0 = all) of each train sequence that have at least one earlier item.

    `seen` is the user's whole train sequence: a later training item is no negative, and val and test are not looked at.
    """
    if targets_per_user < 0:
        raise InputError(f"targets_per_user is {targets_per_user}; expected 0 (all) or more")
    _check_history(history)
    examples = []
    for user in data.train if users is None else users:
        if user not in data.train:
            raise InputError(f"user {user!r} has no line in train.tsv; expected one of its {len(data.train)} users")
        rows = data.train[user]
        seen = frozenset(rows)
        first = max(1, len(rows) - targets_per_user) if targets_per_user else 1
        for position in range(first, len(rows)):
            examples.append(Example(user, rows[:position][-history:], rows[position], seen))
    return examples


def heldout_examples(data: Interactions, split: str, history: int = 5) -> list[Example]:
    """One example per held-out row of `split` ("val" or "test"), in file order."""
    _check_split(split)
    _check_history(history)
    examples = []
    for user, held_out in getattr(data, split).items():
        earlier = data.before(user, split)
        seen = frozenset(earlier + held_out)
        for position, target in enumerate(held_out):
            examples.append(Example(user, (earlier + held_out[:position])[-history:], target, seen))
    return examples


def _check_history(history: int) -> None:
    if history < 1:
        raise InputError(f"history is {history}; expected at least 1 item")


def select_users(users: Iterable[str], start: float, stop: float, seed: int) -> list[str]:
    """The users whose seeded rank lies in the fraction [start, stop). Adjoining fractions share nobody, miss nobody."""
    if not 0 <= start < stop <= 1:
        raise InputError(f"fraction [{start}, {stop}) of the users; expected 0 <= start < stop <= 1")
    ranked = sorted(set(users))  # sorted, so that file order does not matter
    order = np.random.default_rng(seed).permutation(len(ranked))
    chosen = order[round(start * len(ranked)) : round(stop * len(ranked))]
    if not len(chosen):
        raise InputError(f"fraction [{start}, {stop}) of {len(ranked)} users is nobody; widen it")
    return [ranked[i] for i in chosen]


def _generator(seed: int, example: Example, catalog: Catalog) -> np.random.Generator:
    """A generator of the example's own, so that a subset of the users gets the same sets as all of them."""
    key = json.dumps([seed, example.user, catalog.ids[example.target], len(example.seen)])
    return np.random.default_rng(np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype=np.uint32))


def _take(
    rows: Iterable[int], taken: list[int], used: set[str], count: int, seen: frozenset[int], titles: Sequence[str]
) -> None:
    """Move unseen rows with new titles from `rows` to `taken` until it holds `count`.

    `used` holds the titles so far: the answer is a title, so two items with one title could not be told apart.
    """
    for row in rows:
        if len(taken) == count:
            return
        if row not in seen and titles[row] not in used:
            taken.append(row)
            used.add(titles[row])


def _check_negatives(negatives: int) -> None:
    if negatives < 1:
        raise InputError(f"negatives is {negatives}; expected at least 1")


def draw_candidates(
    examples: Iterable[Example], catalog: Catalog, negatives: int = 9, seed: int = 2025
) -> list[Example]:
    """The examples with `candidates`: the target and `negatives` uniform unseen rows, all titles different, shuffled.

    A set depends on (seed, user, target, number of seen items) and the catalogue alone: a subset of the examples gets
    the same sets. InputError: too few unseen items.
    """
    _check_negatives(negatives)
    result = []
    for example in examples:
        rng = _generator(seed, example, catalog)
        taken: list[int] = []
        used = {catalog.titles[example.target]}
        # rejection first: it costs nothing in a large catalogue
        draws = rng.integers(len(catalog.ids), size=4 * negatives + 16).tolist()
        _take(draws, taken, used, negatives, example.seen, catalog.titles)
        if len(taken) < negatives:  # a small pool: go on through all of it in random order, which is uniform too
            pool = [row for row in range(len(catalog.ids)) if row not in example.seen]
            _take(rng.permutation(pool).tolist(), taken, used, negatives, example.seen, catalog.titles)
        if len(taken) < negatives:
            raise InputError(
                f"user {example.user!r}: {len(taken)} unseen items with titles of their own, "
                f"{negatives} negatives wanted; use fewer negatives or add items to the titles file"
            )
        result.append(_shuffled(rng, example, taken))
    return result


def draw_hard_candidates(
    examples: Iterable[Example], catalog: Catalog, neighbors: np.ndarray, negatives: int = 9, seed: int = 2025
) -> list[Example]:
    """As `draw_candidates`, with negatives drawn from the target's neighbourhood: the hard set.

    They are drawn uniformly from the M nearest items rather than being the very nearest: of ten items that all lie next
    to one of them, that one could be told by its place in the middle.
    neighbors: (N, M) int, row i = the items nearest to i. InputError: too few of them are left.
    """
    _check_negatives(negatives)
    neighbors = np.asarray(neighbors)
    n = len(catalog.ids)
    if neighbors.ndim != 2 or len(neighbors) != n or neighbors.dtype.kind not in "iu":
        raise InputError(f"neighbors is {neighbors.dtype} {neighbors.shape}; expected integers of shape ({n}, M)")
    if neighbors.size and (neighbors.min() < 0 or neighbors.max() >= n):
        raise InputError(f"neighbors spans {neighbors.min()} .. {neighbors.max()}; expected rows 0 .. {n - 1}")
    result = []
    for example in examples:
        rng = _generator(seed, example, catalog)
        taken: list[int] = []
        used = {catalog.titles[example.target]}
        _take(rng.permutation(neighbors[example.target]).tolist(), taken, used, negatives, example.seen, catalog.titles)
        if len(taken) < negatives:
            raise InputError(
                f"item {catalog.ids[example.target]!r}: {len(taken)} of {neighbors.shape[1]} neighbours are unseen by "
                f"user {example.user!r} and have titles of their own, {negatives} negatives wanted; use a larger K"
            )
        result.append(_shuffled(rng, example, taken))
    return result


def _shuffled(rng: np.random.Generator, example: Example, taken: list[int]) -> Example:
    return replace(example, candidates=tuple(rng.permutation([example.target, *taken]).tolist()))


def _hash(rows: Any) -> str:
    text = json.dumps(rows, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def save_candidates(path: Path, examples: Iterable[Example], catalog: Catalog, **facts: Any) -> str:
    """Freeze the sets by item id, with the facts they were drawn under. Returns the SHA-256 of the rows."""
    rows = []
    for example in examples:
        if not example.candidates:
            raise InputError(f"{path}: user {example.user!r} has no candidates; draw them before saving")
        ids = [catalog.ids[row] for row in example.candidates]
        rows.append({"user": example.user, "target": catalog.ids[example.target], "candidates": ids})
    digest = _hash(rows)
    write_json(path, {"facts": facts, "sha256": digest, "rows": rows})
    return digest


def load_candidates(path: Path, examples: Sequence[Example], catalog: Catalog, **expected: Any) -> list[Example]:
    """The examples with the frozen sets of `path`; every fact in `expected` must be the one that the file states.

    InputError: the file was edited, or was drawn under other facts or for other examples, or a set cannot be scored.
    """
    again = "delete the file to draw again"
    stored = read_json(path)
    if not isinstance(stored, dict) or not {"facts", "sha256", "rows"} <= stored.keys():
        raise InputError(f"{path}: not a candidate file; expected facts, sha256 and rows; {again}")
    if _hash(stored["rows"]) != stored["sha256"]:
        raise InputError(
            f"{path}: the rows do not have the stated sha256 {stored['sha256']}: the file was edited; {again}"
        )
    for fact, value in json.loads(json.dumps(expected)).items():  # through JSON, which turns tuples into lists
        found = stored["facts"].get(fact)
        if found != value:
            raise InputError(f"{path}: {fact} is {found!r} in the file, expected {value!r}; {again}")
    if len(stored["rows"]) != len(examples):
        raise InputError(f"{path}: {len(stored['rows'])} rows, expected {len(examples)}, one an example; {again}")
    result = []
    for number, (row, example) in enumerate(zip(stored["rows"], examples, strict=True), start=1):
        try:
            result.append(_checked(row, example, catalog))
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}; {again}") from None
    return result


def _checked(row: dict[str, Any], example: Example, catalog: Catalog) -> Example:
    wanted = (example.user, catalog.ids[example.target])
    if (row["user"], row["target"]) != wanted:
        raise InputError(f"is for (user, target) {(row['user'], row['target'])}, expected {wanted}")
    owner: dict[str, str] = {}  # title -> id
    candidates = []
    for item in row["candidates"]:
        if item not in catalog.row:
            raise InputError(f"candidate {item!r} is unknown; expected an id of the titles file")
        candidate = catalog.row[item]
        if candidate in candidates:
            raise InputError(f"candidate {item!r} appears twice; expected each once")
        title = catalog.titles[candidate]
        if title in owner:
            raise InputError(
                f"candidates {owner[title]!r} and {item!r} have one title {title!r}; expected different ones"
            )
        if candidate in example.seen and candidate != example.target:
            raise InputError(f"candidate {item!r} is one that user {example.user!r} has had; expected unseen negatives")
        owner[title] = item
        candidates.append(candidate)
    if example.target not in candidates:
        raise InputError(f"target {wanted[1]!r} is not among the candidates; expected it there")
    return replace(example, candidates=tuple(candidates))
