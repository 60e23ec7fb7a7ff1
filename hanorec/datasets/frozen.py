"""Candidate sets frozen in a file: by item id, with a hash and the facts they were drawn under.

The file is JSON that reads well line by line, and so is one of picks (picks.py):

    {"facts": {...},
    "sha256": "...",
    "rows": [
    {"candidates": [id, ...], "target": id, "user": user},
    ...
    ]}
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hanorec.base.errors import InputError, shown
from hanorec.base.facts import check_facts
from hanorec.base.files import read_object, write_text
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example, with_seen


def save_candidates(
    path: Path, examples: Iterable[Example], catalog: Catalog, **facts: Any
) -> str:
    """Freeze the sets by item id, a line a set, with the facts they were drawn under.

    Returns the SHA-256 of the rows.
    """
    rows = []
    for example in examples:
        if not example.candidates:
            raise InputError(
                f"{path}: user {shown(example.user)} has no candidates; draw them before saving"
            )
        target = catalog.ids[example.target]
        ids = [catalog.ids[row] for row in example.candidates]
        rows.append({"user": example.user, "target": target, "candidates": ids})
    return save_rows(path, rows, facts)


def save_rows(path: Path, rows: Iterable[Any], facts: Mapping[str, Any]) -> str:
    """Write the file with a line a row. Returns the SHA-256 of the rows."""
    texts = [_text(row) for row in rows]
    digest = _hash(texts)
    head = f'{{"facts": {_text(facts)},\n"sha256": "{digest}",\n"rows": [\n'
    write_text(path, head + ",\n".join(texts) + "\n]}\n")
    return digest


def read_rows(
    path: Path, count: int | None, kind: str, again: str, expected: Mapping[str, Any]
) -> list[Any]:
    """The rows of such a file, as they were saved.

    Args:
        count: how many there must be, None = any number.
        kind: what such a file is called. again: the remedy for one that does not fit.
        expected: facts, each of which must be the one that the file states.
    """
    stored = read_object(path)
    facts, rows = stored.get("facts"), stored.get("rows")
    if not isinstance(facts, dict) or not isinstance(rows, list) or "sha256" not in stored:
        raise InputError(f"{path}: not a {kind} file; expected facts, sha256 and rows; {again}")
    if _hash(map(_text, rows)) != stored["sha256"]:
        raise InputError(
            f"{path}: the rows do not have the stated sha256 {shown(stored['sha256'])}: "
            f"the file was edited; {again}"
        )

    def other_fact(name: str, found: Any, wanted: Any) -> str:
        return f"{path}: {name} is {shown(found)} in the file, expected {wanted!r}; {again}"

    check_facts(facts, expected, other_fact)
    if count is not None and len(rows) != count:
        raise InputError(f"{path}: {len(rows)} rows, expected {count}, one an example; {again}")
    return rows


def load_candidates(
    path: Path, examples: Sequence[Example], catalog: Catalog, **expected: Any
) -> list[Example]:
    """The examples with the frozen sets of `path`.

    expected: facts, each of which must be the one that the file states. InputError: the file was
    edited, or was drawn under other facts or for other examples, or a set cannot be scored.
    """
    again = "delete the file to draw again"
    rows = read_rows(path, len(examples), "candidate", again, expected)
    result = []
    pairs = zip(rows, with_seen(examples), strict=True)
    for number, (row, (example, seen)) in enumerate(pairs, start=1):
        try:
            checked = _checked(row, example, seen, catalog, expected.get("negatives"))
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}; {again}") from None
        result.append(checked)
    return result


def _text(value: Any) -> str:
    """Compact JSON, the same on every machine."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _hash(rows: Iterable[str]) -> str:
    """SHA-256 of the rows' list as compact JSON.

    It is fed the text of a row at a time, since the whole is as large as the file.
    """
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        text = f"{',' if number else ''}{row}"
        # half of a surrogate pair goes through: such an id is refused as unknown
        digest.update(text.encode("utf-8", "surrogatepass"))
    digest.update(b"]")
    return digest.hexdigest()


def _checked(
    row: Any,
    example: Example,
    seen: frozenset[int],
    catalog: Catalog,
    negatives: int | None,
) -> Example:
    """The example with the candidates of a stored row. InputError where it could not be scored."""
    ids = row.get("candidates") if isinstance(row, dict) else None
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
        raise InputError(
            f"is {shown(row)}; "
            f"expected an object with user, target and a list of candidate ids"
        )
    found = (row.get("user"), row.get("target"))
    wanted = (example.user, catalog.ids[example.target])
    if found != wanted:
        raise InputError(f"is for (user, target) {shown(found)}, expected {wanted}")
    if negatives is not None and len(ids) != negatives + 1:
        raise InputError(f"{len(ids)} candidates; expected the target and {negatives} negatives")

    owner: dict[str, str] = {}  # title -> id
    candidates = []
    for item in ids:
        if item not in catalog.row:
            raise InputError(
                f"candidate {shown(item)} is unknown; expected an id of the titles file"
            )
        candidate = catalog.row[item]
        if candidate in candidates:
            raise InputError(f"candidate {item!r} appears twice; expected each once")
        title = catalog.titles[candidate]
        if title in owner:
            raise InputError(
                f"candidates {owner[title]!r} and {item!r} have one title {shown(title)}; "
                f"expected different ones"
            )
        if candidate in seen and candidate != example.target:
            raise InputError(
                f"candidate {item!r} is one that user {shown(example.user)} has had; "
                f"expected unseen negatives"
            )
        owner[title] = item
        candidates.append(candidate)
    if example.target not in candidates:
        raise InputError(f"target {wanted[1]!r} is not among the candidates; expected it there")
    return replace(example, candidates=tuple(candidates))
