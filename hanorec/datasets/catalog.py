r"""The items of a dataset: id, title, image.

A dataset is a folder in the native layout, the one of the authors' release:

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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_json, sha256
from hanorec.datasets.images import find_images
from hanorec.datasets.lines import numbered_lines, only_file

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

    @cached_property
    def row(self) -> dict[str, int]:
        """Item id -> row."""
        return {item: row for row, item in enumerate(self.ids)}


def load_catalog(directory: Path) -> Catalog:
    """Read the items of a native dataset. InputError names the file and the line."""
    directory = Path(directory)
    path = only_file(directory, "*_titles.csv")
    titles = _read_titles(path)
    found = find_images(directory / "images", titles)
    images = tuple(found.get(item) for item in titles)

    described = directory / "dataset.json"
    facts = read_json(described) if described.exists() else {}
    name = path.name.removesuffix("_titles.csv")
    name, covers = _facts(described, facts, name, bool(found))
    return Catalog(directory, name, tuple(titles), tuple(titles.values()), images, covers)


def _read_titles(path: Path) -> dict[str, str]:
    """Item id -> title, in file order."""
    titles: dict[str, str] = {}
    lines: dict[str, int] = {}  # item id -> its line
    # strict: text after a closing quote is an error instead of being glued to the field
    reader = csv.reader((text for _, text in numbered_lines(path)), strict=True)
    before = 0  # the last line of the row before
    try:
        for fields in reader:
            first, line = before + 1, reader.line_num
            before = line
            if line != first:
                raise InputError(
                    f"{path}:{first}: the row runs on to line {line}; "
                    f"expected one row a line, so close the quote or remove the break"
                )
            if line == 1:
                if fields != ["item", "title"]:
                    raise InputError(
                        f"{path}:1: header {shown(','.join(fields))}; "
                        f"expected 'item,title', so add or mend that line"
                    )
                continue
            item, title = _id_and_title(path, line, fields)
            if item in titles:
                raise InputError(
                    f"{path}:{line}: item id {shown(item)} is already on line {lines[item]}; "
                    f"expected each id once, so remove one"
                )
            if not title:
                raise InputError(
                    f"{path}:{line}: item {shown(item)} has an empty title; "
                    f"expected text, so add one or remove the item"
                )
            titles[item] = title
            lines[item] = line
    except csv.Error as error:
        raise InputError(
            f"{path}:{before + 1}: not csv ({error}); expected item,title, "
            f"so close the quotes of a quoted title, double those inside it, "
            f"and shorten a title of more than {csv.field_size_limit()} characters"
        ) from None
    if not titles:
        raise InputError(
            f"{path}: no items; expected the header item,title and one row an item"
        )
    return titles


def _id_and_title(path: Path, line: int, fields: list[str]) -> tuple[str, str]:
    """The two fields of a row; the title is stripped and may be empty."""
    if len(fields) != 2:
        raise InputError(
            f"{path}:{line}: {len(fields)} fields {shown(fields)}; expected 2 (item,title), "
            f"so put a title with a comma in double quotes"
        )
    item, title = fields
    if not item or item.split() != [item]:
        raise InputError(
            f"{path}:{line}: item id {shown(item)}; "
            f"expected a name without spaces, since histories separate ids by them"
        )
    return item, title.strip()


def _facts(path: Path, facts: dict, name: str, any_image: bool) -> tuple[str, str]:
    """Name and covers as dataset.json states them, checked against what is on disk."""
    if not isinstance(facts, dict):
        raise InputError(f"{path}: holds a {type(facts).__name__}; expected an object {{...}}")
    name = facts.get("name", name)
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(
            f"{path}: name is {shown(name)}; expected printable text, so mend dataset.json"
        )
    covers = facts.get("covers", "real" if any_image else "none")
    if covers not in COVERS:
        raise InputError(
            f"{path}: covers is {shown(covers)}; "
            f"expected one of {', '.join(COVERS)}, so mend dataset.json"
        )
    if any_image != (covers != "none"):
        state = "holds images of these items" if any_image else "holds no image of these items"
        raise InputError(
            f"{path}: covers is {covers!r}, but images/ {state}; mend dataset.json or the folder"
        )
    return name, covers


def data_hash(catalog: Catalog) -> str:
    """SHA-256 of the three splits and the titles: what candidates are drawn from."""
    files = [catalog.directory / f"{split}.tsv" for split in ("train", "val", "test")]
    files += catalog.directory.glob("*_titles.csv")
    hashes = "".join(sha256(path) for path in files)
    return hashlib.sha256(hashes.encode()).hexdigest()
