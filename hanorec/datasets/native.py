"""What every converter ends with: the command line, and the writing of the native layout."""

import argparse
import csv
import io
import re
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hanorec.base.errors import InputError
from hanorec.base.files import whole_folder, write_json, write_text
from hanorec.base.flags import Parser
from hanorec.datasets.covers import draw_cover
from hanorec.datasets.images import find_images
from hanorec.datasets.raw import MIN_ITEMS, Log, split


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """The command line common to all converters."""
    result = Parser(description, prog=f"python -m hanorec.datasets.{module}")
    result.add_argument("raw", type=Path, metavar="RAW", help="folder with the raw files")
    result.add_argument(
        "out", type=Path, metavar="OUT", help="folder to write; it must be new or empty"
    )
    result.add_argument("--name", help="dataset name (default: that of the source)")
    result.add_argument(
        "--min-rating", type=float, metavar="R", help="keep only interactions rated R or more"
    )
    result.add_argument(
        "--min-items",
        type=int,
        metavar="N",
        help=f"leave out users with fewer than N interactions "
        f"(N >= {MIN_ITEMS}; without it such a user is an error)",
    )
    covers = result.add_mutually_exclusive_group()
    covers.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="copy covers from DIR; the file stem is the item id",
    )
    covers.add_argument(
        "--draw-covers",
        action="store_true",
        help="draw plain stand-in covers from title and genres",
    )
    return result


def convert(
    args: argparse.Namespace,
    log: Log,
    titles: dict[str, str],
    genres: dict[str, list[str]],
    name: str,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Filter, split and write `log` as the options of `parser` say; print a summary.

    titles: item id -> title of every known item, also of those nobody had (they can be negatives).
    genres: item id -> genres; used for drawn covers only. source: what was read, for dataset.json.

    Returns the facts of dataset.json.
    """
    name = args.name or name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(
            f"name {name!r}; expected letters, digits, '.', '_' and '-', "
            f"since it names a file: pass --name"
        )
    out = args.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: exists and is not an empty folder; choose another OUT or remove it"
        )
    sequences, facts = split(log, titles, args.min_rating, args.min_items)
    with whole_folder(out) as hidden:
        covers, images = write_covers(
            hidden / "images", titles, genres, args.images, args.draw_covers
        )
        facts = {"name": name, "source": source, "covers": covers, **facts, "images": images}
        facts["items_without_image"] = len(titles) - images
        write_sequences(hidden, sequences)
        write_titles(hidden / f"{name}_titles.csv", titles)
        write_json(hidden / "dataset.json", facts)
    print(summary(facts))
    return facts


def write_sequences(folder: Path, sequences: dict[str, list[str]]) -> None:
    """train.tsv, val.tsv and test.tsv: the last item is test, the one before it val."""
    parts = {"train": slice(None, -2), "val": slice(-2, -1), "test": slice(-1, None)}
    for part, where in parts.items():
        with open(folder / f"{part}.tsv", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(
                f"{user}\t{' '.join(items[where])}\n" for user, items in sequences.items()
            )


def write_titles(path: Path, titles: dict[str, str]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("item", "title"))
    writer.writerows(titles.items())
    write_text(path, table.getvalue())


def write_covers(
    folder: Path,
    titles: dict[str, str],
    genres: dict[str, list[str]],
    images: Path | None,
    draw: bool,
) -> tuple[str, int]:
    """Copy or draw the covers. Returns their kind and the number of items that have one."""
    if images is None and not draw:
        return "none", 0
    folder.mkdir()
    if draw:
        for item, title in tqdm(titles.items(), desc="covers", disable=None):
            if "/" in item or "\\" in item or item in (".", ".."):
                raise InputError(
                    f"item {item!r}: not a file name, so it can have no cover; "
                    f"leave out --draw-covers"
                )
            draw_cover(title, genres.get(item, [])).save(folder / f"{item}.jpg", quality=85)
        return "drawn", len(titles)
    if not images.is_dir():
        raise InputError(f"--images {images}: not a folder; check the path")
    found = find_images(images, titles)
    if not found:
        raise InputError(
            f"--images {images}: no image file is named after an item; "
            f"expected e.g. {next(iter(titles))}.jpg"
        )
    for path in tqdm(found.values(), desc="covers", disable=None):
        shutil.copyfile(path, folder / path.name)
    return "real", len(found)


def summary(facts: dict[str, Any]) -> str:
    """The facts as a few printed lines."""
    few = facts["min_items"] or MIN_ITEMS
    return (
        f"{facts['name']}: {facts['users']} users, "
        f"{facts['items']} items ({facts['items_never_had']} never had), "
        f"{facts['interactions']} interactions, density {facts['density']:.4%}\n"
        f"  left out: {facts['users_left_out']} users with fewer than {few} interactions\n"
        f"  repeated (user, item) interactions, kept: {facts['repeated_interactions']}\n"
        f"  items that share a title with another: {facts['items_sharing_a_title']}\n"
        f"  images ({facts['covers']}): {facts['images']} matched, "
        f"{facts['items_without_image']} missing"
    )
