"""Rejected items in a file: what a policy picked among the candidates of each training example.

`hanorec.baselines.sprec` writes it, `train_dpo.py --negatives FILE` reads it. Its rows, in the
order of the examples:

    {"candidates": [id, ...], "rejected": id, "scores": [number, ...], "target": id, "user": user}
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.errors import InputError, shown
from hanorec.datasets.catalog import Catalog, data_hash
from hanorec.datasets.frozen import read_rows, save_rows
from hanorec.datasets.interactions import Example

AGAIN = "pick again, with the data, users, candidates and seed of this command"


def save_picks(
    path: Path,
    examples: Sequence[Example],
    scores: np.ndarray,
    picks: Sequence[int],
    catalog: Catalog,
) -> None:
    """Keep the picks by item id, with what the policy made of the candidates.

    Args:
        scores: (E, C), of each example's candidates in order. picks: E catalogue rows.
    """
    rows = []
    for example, own, pick in zip(examples, scores.tolist(), picks, strict=True):
        rows.append({**named(example, catalog), "scores": own, "rejected": catalog.ids[pick]})
    save_rows(path, rows, _facts(catalog))


def load_picks(path: Path, examples: Sequence[Example], catalog: Catalog) -> list[int]:
    """The catalogue row that was picked for each example.

    InputError: the file was edited, is of other data, or does not hold these examples one by one;
    or a pick is the target, or no candidate.
    """
    rows = read_rows(path, len(examples), "picks", AGAIN, _facts(catalog))
    picks = []
    for number, (row, example) in enumerate(zip(rows, examples, strict=True), start=1):
        row = row if isinstance(row, dict) else {}
        for name, wanted in named(example, catalog).items():
            if row.get(name) != wanted:
                raise InputError(
                    f"{path}: row {number}: {name} is {shown(row.get(name))}, expected {wanted!r}, "
                    f"as example {number} of user {example.user!r} has it; {AGAIN}"
                )
        negatives = [catalog.ids[c] for c in example.candidates if c != example.target]
        if row.get("rejected") not in negatives:
            raise InputError(
                f"{path}: row {number}: rejected is {shown(row.get('rejected'))}, expected a "
                f"candidate other than the target, of {negatives}; {AGAIN}"
            )
        picks.append(catalog.row[row["rejected"]])
    return picks


def picks_by_name(path: Path, catalog: Catalog) -> dict[str, str]:
    """The picks of a file: user, target and candidates as one text -> item id."""
    rows = read_rows(path, None, "picks", AGAIN, _facts(catalog))
    return {_key(row): row["rejected"] for row in rows}


def equal_picks(
    before: Mapping[str, str], examples: Sequence[Example], picks: Sequence[int], catalog: Catalog
) -> dict[str, Any]:
    """How many examples were picked for before, see `picks_by_name`, and the share of them with the
    same pick now, if there are any."""
    equal = []
    for example, pick in zip(examples, picks, strict=True):
        key = _key(named(example, catalog))
        if key in before:
            equal.append(before[key] == catalog.ids[pick])
    share = sum(equal) / len(equal) if equal else None
    return {"picked_before": len(equal), "equal_picks": share}


def named(example: Example, catalog: Catalog) -> dict[str, Any]:
    """An example's user, target and candidates by id."""
    return {
        "user": example.user,
        "target": catalog.ids[example.target],
        "candidates": [catalog.ids[row] for row in example.candidates],
    }


def _facts(catalog: Catalog) -> dict[str, str]:
    return {"kind": "picks", "data_sha256": data_hash(catalog)}


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row["user"], row["target"], row["candidates"]])
