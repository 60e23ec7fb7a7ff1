r"""The items of a dataset: id, title, image.

A dataset is a folder in the native layout. The authors' release has the same file names, but each
line of its TSV files holds a history and what follows it, so its folders are none of these:

    <Name>_titles.csv     header item,title; UTF-8; csv quoting
    images/<id>.jpg       or .jpeg, .png, .webp; an item may lack one; see images.py
    dataset.json          optional: {"name": ..., "covers": "real" | "drawn" | "none", ...},
                          written by the converters
    train.tsv val.tsv test.tsv      see interactions.py

Titles repeat in real catalogues, so an item is identified by its id, and inside the package by its
row: 0, 1, ... in file order.
"""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hanorec.base.errors import Fault, InputError, refuse, shown
from hanorec.base.files import read_json, sha256
from hanorec.datasets.images import Ignored, find_images, say_ignored
from hanorec.datasets.lines import numbered_lines, one_spelling, only_file

COVERS = ("real", "drawn", "none")


@dataclass(frozen=True)
class Catalog:
    """N items; `ids`, `titles` and `images` have length N: the index into them is the item's row.

    covers: "real" photographs or posters, "drawn" stand-ins made by a converter, or "none".
    """

    directory: Path
    name: str
    ids: tuple[str, ...]
    titles: tuple[str, ...]
    images: tuple[Path | None, ...]
    covers: str

    def __repr__(self) -> str:
        shown = sum(path is not None for path in self.images)
        return f"<Catalog {self.name}: {len(self.ids)} items, {shown} with an image>"

    @cached_property
    def row(self) -> dict[str, int]:
        """Item id -> row."""
        return {item: row for row, item in enumerate(self.ids)}


def load_catalog(
    directory: Path,
    fault: Fault = refuse,
    ignored: Ignored = say_ignored,
    images: bool = True,
) -> Catalog:
    """Read the items of a native dataset. InputError names the file and the line.

    Args:
        fault, ignored: what becomes of a fault, and of image files that are ignored.
        images: False = no item has one, and images/ is not looked at.
    """
    directory = Path(directory)
    path = only_file(directory, "*_titles.csv")
    titles = _read_titles(path, fault)
    found = find_images(directory / "images", titles, fault, ignored) if images else {}
    paths = tuple(found.get(item) for item in titles)
    name = path.name.removesuffix("_titles.csv")
    any_image = bool(found) if images else None
    name, covers = _facts(directory / "dataset.json", name, any_image, fault)
    return Catalog(directory, name, tuple(titles), tuple(titles.values()), paths, covers)


def _read_titles(path: Path, fault: Fault) -> dict[str, str]:
    """Item id -> title, in file order."""
    titles: dict[str, str] = {}
    lines: dict[str, int] = {}  # item id -> its line
    for line, fields in _rows(path, fault):
        if line == 1:
            if fields != ["item", "title"]:
                fault(InputError(
                    f"{path}:1: header {shown(','.join(fields))}; "
                    f"expected 'item,title', so add or mend that line"
                ))
            continue
        row = _id_and_title(path, line, fields, fault)
        if row is None:
            continue
        item, title = row
        if item in titles:
            fault(InputError(
                f"{path}:{line}: item id {shown(item)} is already on line {lines[item]}; "
                f"expected each id once, so remove one"
            ))
            continue
        if not title:
            fault(InputError(
                f"{path}:{line}: item {shown(item)} has an empty title; "
                f"expected text, so add one or remove the item"
            ))
        titles[item] = title
        lines[item] = line
    if not titles:
        fault(InputError(
            f"{path}: no items; expected the header item,title and one row an item"
        ))
    return titles


def _rows(path: Path, fault: Fault) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every row. Each line is one: what a quote left open takes of the next lines
    is a fault."""
    source = numbered_lines(path, fault=fault)
    lines: list[tuple[int, str]] = []  # as far as they were read

    def texts(place: int) -> Iterator[str]:
        while True:
            if place == len(lines):
                more = next(source, None)
                if more is None:
                    return
                lines.append(more)
            yield lines[place][1]
            place += 1

    place = 0
    while True:
        # strict: text after a closing quote is an error instead of being glued to the field
        reader = csv.reader(texts(place), strict=True)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            line, text = lines[place]
            fault(InputError(
                f"{path}:{line}: not csv ({error}); expected item,title, "
                f"so close the quotes of a quoted title, double those inside it, "
                f"and shorten a title of more than {csv.field_size_limit()} characters"
            ))
            place += 1
            if "," in text:
                yield line, text.split(",", 1)
            continue
        if fields is None:
            return
        line, _ = lines[place]
        place += reader.line_num
        if reader.line_num > 1:
            fault(InputError(
                f"{path}:{line}: the row runs on to line {lines[place - 1][0]}; "
                f"expected one row a line, so close the quote or remove the break"
            ))
        yield line, fields


def _id_and_title(
    path: Path, line: int, fields: list[str], fault: Fault
) -> tuple[str, str] | None:
    """The two fields of a row; the title is stripped, in one spelling, and may be empty.

    None where there is only one.
    """
    if len(fields) != 2:
        fault(InputError(
            f"{path}:{line}: {len(fields)} fields {shown(fields)}; expected 2 (item,title), "
            f"so put a title with a comma in double quotes"
        ))
        return (fields[0], ",".join(fields[1:])) if len(fields) > 2 else None
    item, title = fields
    if not item or item.split() != [item]:
        fault(InputError(
            f"{path}:{line}: item id {shown(item)}; "
            f"expected a name without spaces, since histories separate ids by them"
        ))
    return item, one_spelling(title.strip())


def _facts(path: Path, name: str, any_image: bool | None, fault: Fault) -> tuple[str, str]:
    """Name and covers as dataset.json states them, checked against what is on disk.

    name: what it is without that file. any_image: None where nobody has looked.
    """
    covers = "real" if any_image else "none"
    facts = _read_facts(path, fault)
    if facts is None:
        return name, covers
    stated = facts.get("name", name)
    if not isinstance(stated, str) or not stated or not stated.isprintable():
        fault(InputError(
            f"{path}: name is {shown(stated)}; expected printable text, so mend dataset.json"
        ))
        stated = name
    covers = facts.get("covers", covers)
    if covers not in COVERS:
        fault(InputError(
            f"{path}: covers is {shown(covers)}; "
            f"expected one of {', '.join(COVERS)}, so mend dataset.json"
        ))
    elif any_image is not None and any_image != (covers != "none"):
        state = "holds images of these items" if any_image else "holds no image of these items"
        fault(InputError(
            f"{path}: covers is {covers!r}, but images/ {state}; mend dataset.json or the folder"
        ))
    return stated, covers


def _read_facts(path: Path, fault: Fault) -> dict[str, Any] | None:
    """What dataset.json holds; None without it."""
    if not path.exists():
        return None
    try:
        facts = read_json(path)
    except InputError as error:
        fault(error)
        return None
    if not isinstance(facts, dict):
        fault(InputError(
            f"{path}: holds a {type(facts).__name__}; expected an object {{...}}"
        ))
        return None
    return facts


def data_hash(catalog: Catalog) -> str:
    """SHA-256 of the three splits and the titles: what candidates are drawn from."""
    files = [catalog.directory / f"{split}.tsv" for split in ("train", "val", "test")]
    files += catalog.directory.glob("*_titles.csv")
    hashes = "".join(sha256(path) for path in files)
    return hashlib.sha256(hashes.encode()).hexdigest()
