"""Frozen candidate sets: 1 positive and n negatives, drawn once with a seed, stored with a hash, the same for every model.

A set never holds an item that the user has had (Example.seen), nor two items with one title.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_object, write_text
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example


def _with_seen(examples: Iterable[Example]) -> Iterator[tuple[Example, frozenset[int]]]:
    """Each example with what its user has had, as a set: made once for the examples of one user, which share `seen`."""
    last, seen = None, frozenset()
    for example in examples:
        if example.seen is not last:
            last, seen = example.seen, frozenset(example.seen)
        yield example, seen


def _generator(seed: int, example: Example, seen: frozenset[int], catalog: Catalog) -> np.random.Generator:
    """A generator of the example's own, so that a subset of the users gets the same sets as all of them."""
    key = json.dumps([seed, example.user, catalog.ids[example.target], len(seen)])
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
    result, rows = [], list(catalog.row.values())
    for example, seen in _with_seen(examples):
        rng = _generator(seed, example, seen, catalog)
        taken: list[int] = []
        used = {catalog.titles[example.target]}
        # rejection first: it costs nothing in a large catalogue
        draws = rng.integers(len(catalog.ids), size=4 * negatives + 16).tolist()
        _take(draws, taken, used, negatives, seen, catalog.titles)
        if len(taken) < negatives:  # a small pool: go on through all of it in random order, which is uniform too
            pool = [row for row in range(len(catalog.ids)) if row not in seen]
            _take(rng.permutation(pool).tolist(), taken, used, negatives, seen, catalog.titles)
        if len(taken) < negatives:
            raise InputError(
                f"user {shown(example.user)}: {len(taken)} unseen items with titles of their own, "
                f"{negatives} negatives wanted; use fewer negatives or add items to the titles file"
            )
        result.append(_shuffled(rng, example, taken, rows))
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
    result, rows = [], list(catalog.row.values())
    for example, seen in _with_seen(examples):
        rng = _generator(seed, example, seen, catalog)
        taken: list[int] = []
        used = {catalog.titles[example.target]}
        _take(rng.permutation(neighbors[example.target]).tolist(), taken, used, negatives, seen, catalog.titles)
        if len(taken) < negatives:
            raise InputError(
                f"item {catalog.ids[example.target]!r}: {len(taken)} of {neighbors.shape[1]} neighbours are unseen by "
                f"user {example.user!r} and have titles of their own, {negatives} negatives wanted; use a larger K"
            )
        result.append(_shuffled(rng, example, taken, rows))
    return result


def _shuffled(rng: np.random.Generator, example: Example, taken: list[int], rows: list[int]) -> Example:
    """rows: 0, 1, 2 ... as the integers that the whole catalogue shares; new ones would cost three times the memory."""
    return replace(example, candidates=tuple(rows[row] for row in rng.permutation([example.target, *taken]).tolist()))


def _text(value: Any) -> str:
    """Compact JSON, the same on every machine."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _hash(rows: Iterable[str]) -> str:
    """SHA-256 of the rows' list as compact JSON, from the text of each row, since the whole is as large as the file."""
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        digest.update(f"{',' if number else ''}{row}".encode("utf-8", "surrogatepass"))  # such an id is refused as unknown
    digest.update(b"]")
    return digest.hexdigest()


def save_candidates(path: Path, examples: Iterable[Example], catalog: Catalog, **facts: Any) -> str:
    """Freeze the sets by item id, a line a set, with the facts they were drawn under. Returns the SHA-256 of the rows."""
    rows = []
    for example in examples:
        if not example.candidates:
            raise InputError(f"{path}: user {shown(example.user)} has no candidates; draw them before saving")
        ids = [catalog.ids[row] for row in example.candidates]
        rows.append(_text({"user": example.user, "target": catalog.ids[example.target], "candidates": ids}))
    digest = _hash(rows)
    write_text(path, f'{{"facts": {_text(facts)},\n"sha256": "{digest}",\n"rows": [\n' + ",\n".join(rows) + "\n]}\n")
    return digest


def load_candidates(path: Path, examples: Sequence[Example], catalog: Catalog, **expected: Any) -> list[Example]:
    """The examples with the frozen sets of `path`; every fact in `expected` must be the one that the file states.

    InputError: the file was edited, or was drawn under other facts or for other examples, or a set cannot be scored.
    """
    again = "delete the file to draw again"
    stored = read_object(path)
    facts, rows = stored.get("facts"), stored.get("rows")
    if not isinstance(facts, dict) or not isinstance(rows, list) or "sha256" not in stored:
        raise InputError(f"{path}: not a candidate file; expected facts, sha256 and rows; {again}")
    if _hash(map(_text, rows)) != stored["sha256"]:
        raise InputError(
            f"{path}: the rows do not have the stated sha256 {shown(stored['sha256'])}: the file was edited; {again}"
        )
    for fact, value in json.loads(json.dumps(expected)).items():  # through JSON, which turns tuples into lists
        if facts.get(fact) != value:
            raise InputError(f"{path}: {fact} is {shown(facts.get(fact))} in the file, expected {value!r}; {again}")
    if len(rows) != len(examples):
        raise InputError(f"{path}: {len(rows)} rows, expected {len(examples)}, one an example; {again}")
    result = []
    for number, (row, (example, seen)) in enumerate(zip(rows, _with_seen(examples), strict=True), start=1):
        try:
            result.append(_checked(row, example, seen, catalog, expected.get("negatives")))
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}; {again}") from None
    return result


def _checked(row: Any, example: Example, seen: frozenset[int], catalog: Catalog, negatives: int | None) -> Example:
    ids = row.get("candidates") if isinstance(row, dict) else None
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
        raise InputError(f"is {shown(row)}; expected an object with user, target and a list of candidate ids")
    wanted = (example.user, catalog.ids[example.target])
    if (found := (row.get("user"), row.get("target"))) != wanted:
        raise InputError(f"is for (user, target) {shown(found)}, expected {wanted}")
    if negatives is not None and len(ids) != negatives + 1:
        raise InputError(f"{len(ids)} candidates; expected the target and {negatives} negatives")
    owner: dict[str, str] = {}  # title -> id
    candidates = []
    for item in ids:
        if item not in catalog.row:
            raise InputError(f"candidate {shown(item)} is unknown; expected an id of the titles file")
        candidate = catalog.row[item]
        if candidate in candidates:
            raise InputError(f"candidate {item!r} appears twice; expected each once")
        title = catalog.titles[candidate]
        if title in owner:
            raise InputError(
                f"candidates {owner[title]!r} and {item!r} have one title {shown(title)}; expected different ones"
            )
        if candidate in seen and candidate != example.target:
            raise InputError(f"candidate {item!r} is one that user {shown(example.user)} has had; expected unseen negatives")
        owner[title] = item
        candidates.append(candidate)
    if example.target not in candidates:
        raise InputError(f"target {wanted[1]!r} is not among the candidates; expected it there")
    return replace(example, candidates=tuple(candidates))
