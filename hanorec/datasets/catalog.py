r"""The items of a dataset: id, title, image.

A dataset is a folder in the native layout, the one of the authors' release:

    <Name>_titles.csv     header item,title; UTF-8; csv quoting
    images/<id>.jpg       or .jpeg, .png, .webp; an item may lack one; a link must stay inside images/
    dataset.json          optional: {"name": ..., "covers": "real" | "drawn" | "none", ...}, written by the converters
    train.tsv val.tsv test.tsv      see interactions.py

Titles repeat in real catalogues, so an item is identified by its id, and inside the package by its row: 0, 1, ... in
file order.
"""

import csv
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_json, sha256
from hanorec.datasets.lines import numbered_lines, only_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


COVERS = ("real", "drawn", "none")


MAX_BYTES = 32 * 2**20  # of an image file


MAX_PIXELS = 40_000_000  # decoded: 120 MB of RGB


MAX_ASPECT = 200  # longer to shorter side; Qwen's preprocessor takes no more


@dataclass(frozen=True)
class Catalog:
    """N items; `ids`, `titles` and `images` have length N, and the index into them is the item's row."""

    directory: Path
    name: str
    ids: tuple[str, ...]
    titles: tuple[str, ...]
    images: tuple[Path | None, ...]
    covers: str  # "real" photographs or posters, "drawn" stand-ins made by a converter, or "none"

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
    facts = read_json(directory / "dataset.json") if (directory / "dataset.json").exists() else {}
    name, covers = _facts(directory / "dataset.json", facts, path.name.removesuffix("_titles.csv"), bool(found))
    images = tuple(found.get(item) for item in titles)
    return Catalog(directory, name, tuple(titles), tuple(titles.values()), images, covers)


def _read_titles(path: Path) -> dict[str, str]:
    """Item id -> title, in file order."""
    titles: dict[str, str] = {}
    lines: dict[str, int] = {}
    # strict: text after a closing quote is an error instead of being glued to the field
    reader = csv.reader((text for _, text in numbered_lines(path)), strict=True)
    before = 0
    try:
        for fields in reader:
            line, first = reader.line_num, before + 1
            before = line
            if line != first:
                raise InputError(
                    f"{path}:{first}: the row runs on to line {line}; expected one row a line, "
                    f"so close the quote or remove the break"
                )
            if line == 1:
                if fields != ["item", "title"]:
                    raise InputError(
                        f"{path}:1: header {shown(','.join(fields))}; expected 'item,title', so add or mend that line"
                    )
                continue
            if len(fields) != 2:
                raise InputError(
                    f"{path}:{line}: {len(fields)} fields {shown(fields)}; expected 2 (item,title), "
                    f"so put a title with a comma in double quotes"
                )
            item, title = fields[0], fields[1].strip()
            if not item or item.split() != [item]:
                raise InputError(
                    f"{path}:{line}: item id {shown(item)}; expected a name without spaces, "
                    f"since histories separate ids by them"
                )
            if item in titles:
                raise InputError(
                    f"{path}:{line}: item id {shown(item)} is already on line {lines[item]}; expected each id once, "
                    f"so remove one"
                )
            if not title:
                raise InputError(
                    f"{path}:{line}: item {shown(item)} has an empty title; expected text, so add one or remove the item"
                )
            titles[item], lines[item] = title, line
    except csv.Error as error:
        raise InputError(
            f"{path}:{before + 1}: not csv ({error}); expected item,title, so close the quotes of a quoted title, "
            f"double those inside it, and shorten a title of more than {csv.field_size_limit()} characters"
        ) from None
    if not titles:
        raise InputError(f"{path}: no items; expected the header item,title and one row an item")
    return titles


def data_hash(catalog: Catalog) -> str:
    """SHA-256 of the three splits and the titles: what candidates are drawn from."""
    files = [*(catalog.directory / f"{split}.tsv" for split in ("train", "val", "test")), *catalog.directory.glob("*_titles.csv")]
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()


def find_images(folder: Path, ids: dict[str, str] | set[str]) -> dict[str, Path]:
    """Item id -> image file in `folder` whose stem is the id. Other names are ignored; a missing folder has none.

    InputError: two files for one item, something that is no file, or a link that leads out of the folder: a data set from elsewhere
    must not reach for the files of the machine. `folder` itself may be a link.
    """
    found: dict[str, Path] = {}
    if not os.path.lexists(folder):
        return found
    if not folder.is_dir():
        raise InputError(f"{folder}: a file or a broken link; expected a folder of images, or nothing of that name")
    home = folder.resolve()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        item, suffix = os.path.splitext(entry.name)
        if suffix.lower() not in IMAGE_SUFFIXES or item not in ids:
            continue
        path = folder / entry.name
        if entry.is_symlink() and not (target := Path(os.path.realpath(path))).is_relative_to(home):
            raise InputError(f"{path}: a link to {target}, out of the image folder; expected the image itself, so copy it there")
        if not entry.is_file(follow_symlinks=False) and not path.is_file():
            raise InputError(f"{path}: a broken link, a folder or a device; expected an image file, so put it there or remove the entry")
        if item in found:
            raise InputError(f"{path}: item {item!r} also has {found[item].name}; expected one an item, so remove one")
        found[item] = path
    return found


def _facts(path: Path, facts: dict, name: str, any_image: bool) -> tuple[str, str]:
    """Name and covers as dataset.json states them, checked against what is on disk."""
    if not isinstance(facts, dict):
        raise InputError(f"{path}: holds a {type(facts).__name__}; expected an object {{...}}")
    name = facts.get("name", name)
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(f"{path}: name is {shown(name)}; expected printable text, so mend dataset.json")
    covers = facts.get("covers", "real" if any_image else "none")
    if covers not in COVERS:
        raise InputError(f"{path}: covers is {shown(covers)}; expected one of {', '.join(COVERS)}, so mend dataset.json")
    if any_image != (covers != "none"):
        state = "holds images of these items" if any_image else "holds no image of these items"
        raise InputError(f"{path}: covers is {covers!r}, but images/ {state}; mend dataset.json or the folder")
    return name, covers


def read_image(path: Path) -> Image.Image:
    """An RGB image, upright by its EXIF tag, on white where transparent. InputError names a file that is not whole.

    The limits on bytes, pixels and frames are checked on the header, before anything is decoded. An animation is refused, since which of
    its frames is the item's picture nobody said; the previews that a camera adds to a JPEG are no frames.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore the image or remove the entry") from None
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes; expected at most {MAX_BYTES}, so shrink the image")
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"{path}: {width} x {height} pixels; expected at most {MAX_PIXELS} in all, so shrink the image"
                )
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise InputError(f"{path}: {width} x {height} pixels; expected at most {MAX_ASPECT} times as long as wide, so crop or replace the image")
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise InputError(f"{path}: an animation; expected a still image, so save the frame that shows the item")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  decoders raise OSError, SyntaxError, struct.error ... on broken files
        raise InputError(f"{path}: not a whole JPEG, PNG or WebP image ({error}); replace the file") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, since convert() would clip everything above 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")
