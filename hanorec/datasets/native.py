r"""What every converter shares: the interaction log, the command line, and the writing of the native layout.

Split: leave-last, per user in order of time. The last item is test, the one before it val, the rest train. Equal times
keep the order of the raw file (a stable sort). A repeated (user, item) pair is kept as often as it occurs.
"""

import argparse
import csv
import io
import math
import re
import shutil
import tempfile
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hanorec.base.errors import InputError, shown
from hanorec.base.files import write_json, write_text
from hanorec.datasets.catalog import find_images
from hanorec.datasets.covers import draw_cover

MIN_ITEMS = 3  # train, val and test take at least one each


class Log:
    """Raw interactions as columns of 24 bytes a row, so that the 100 million of Netflix fit into memory."""

    def __init__(self) -> None:
        self.users: dict[str, int] = {}  # name -> code, in order of first appearance
        self.items: dict[str, int] = {}
        self.user, self.item = array("i"), array("i")  # codes
        self.time, self.rating = array("d"), array("d")  # NaN = the source has no ratings

    def add(
        self, path: Path, line: int, user: str, item: str, time: str | float, rating: str | float = math.nan
    ) -> None:
        """Append one interaction. InputError names path:line where an id is empty or has spaces, or a number is bad."""
        for kind, name, codes in (("user", user, self.users), ("item", item, self.items)):
            if name not in codes:
                check_id(path, line, kind, name)
                codes[name] = len(codes)
        self.user.append(self.users[user])
        self.item.append(self.items[item])
        self.time.append(number(path, line, "time", time))
        self.rating.append(rating if isinstance(rating, float) else number(path, line, "rating", rating))


def check_id(path: Path, line: int, kind: str, name: str) -> None:
    if name.split() != [name]:
        raise InputError(f"{path}:{line}: {kind} id {shown(name)}; expected a name without spaces, so mend the raw file")


def number(path: Path, line: int, kind: str, text: str | float) -> float:
    """`text` as a finite float."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}:{line}: {kind} {shown(text)}; expected a finite number, so mend the raw file")
    return value


def split_fields(path: Path, line: int, text: str, separator: str, count: int, what: str) -> list[str]:
    """The `count` fields of a line; `what` describes them in the error."""
    fields = text.split(separator)
    if len(fields) != count:
        raise InputError(
            f"{path}:{line}: {len(fields)} fields in {shown(text)}; expected {count} ({what}), "
            f"so mend or remove the line"
        )
    return fields


def add_title(titles: dict[str, str], path: Path, line: int, item: str, title: str) -> None:
    """Set the title of a new item. InputError names path:line where id or title is empty, or the id is not new."""
    check_id(path, line, "item", item)
    if item in titles:
        raise InputError(f"{path}:{line}: item {shown(item)} has an earlier line; expected each id once, so remove one")
    if not title.strip():
        raise InputError(
            f"{path}:{line}: item {shown(item)} has an empty title; expected text, so add one or remove the line"
        )
    titles[item] = title.strip()


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """The command line common to all converters."""
    result = argparse.ArgumentParser(prog=f"python -m hanorec.datasets.{module}", description=description)
    result.add_argument("raw", type=Path, metavar="RAW", help="folder with the raw files")
    result.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must be new or empty")
    result.add_argument("--name", help="dataset name (default: that of the source)")
    result.add_argument("--min-rating", type=float, metavar="R", help="keep only interactions rated R or more")
    result.add_argument(
        "--min-items", type=int, metavar="N",
        help=f"leave out users with fewer than N interactions (N >= {MIN_ITEMS}; without it such a user is an error)",
    )  # fmt: skip
    covers = result.add_mutually_exclusive_group()
    covers.add_argument("--images", type=Path, metavar="DIR", help="copy covers from DIR; the file stem is the item id")
    covers.add_argument("--draw-covers", action="store_true", help="draw plain stand-in covers from title and genres")
    return result


def convert(
    args: argparse.Namespace,
    log: Log,
    titles: dict[str, str],
    genres: dict[str, list[str]],
    name: str,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Filter, split and write `log` to args.out as the options say, print a summary, return the facts of dataset.json.

    titles: item id -> title of every known item, also of those nobody had (they can be negatives).
    genres: item id -> genres; used for drawn covers only. source: what was read, for dataset.json.
    """
    name = args.name or name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(
            f"name {name!r}; expected letters, digits, '.', '_' and '-', since it names a file: pass --name"
        )
    out = args.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; choose another OUT or remove it")
    sequences, facts = split(log, titles, args.min_rating, args.min_items)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        covers, images = write_covers(temporary / "images", titles, genres, args.images, args.draw_covers)
        facts = {"name": name, "source": source, "covers": covers, **facts, "images": images}
        facts["items_without_image"] = len(titles) - images
        write_sequences(temporary, sequences)
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("item", "title"), *titles.items()])
        write_text(temporary / f"{name}_titles.csv", table.getvalue())
        write_json(temporary / "dataset.json", facts)
        temporary.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(summary(facts))
    return facts


def split(
    log: Log, titles: dict[str, str], min_rating: float | None, min_items: int | None
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """User -> item ids in order of time, after the filters, and the facts about them."""
    if min_items is not None and min_items < MIN_ITEMS:
        raise InputError(f"--min-items {min_items}; expected at least {MIN_ITEMS}: train, val and test take one each")
    user, item = np.asarray(log.user), np.asarray(log.item)  # int32 views, no copy
    kept = np.arange(len(user))
    if min_rating is not None:
        rating = np.asarray(log.rating)
        if np.isnan(rating).any():
            raise InputError(f"--min-rating {min_rating}: this source has no ratings; leave the option out")
        kept = kept[rating >= min_rating]
    users, items = list(log.users), list(log.items)
    counts = np.bincount(user[kept], minlength=len(users))
    few = counts < (min_items or MIN_ITEMS)
    if few.any() and min_items is None:
        code = int(np.argmax(few))
        raise InputError(
            f"user {shown(users[code])}: {counts[code]} interactions, expected at least {MIN_ITEMS} "
            f"(train, val and test take one each); leave out the {few.sum()} such users with --min-items {MIN_ITEMS}"
        )
    if few.all():
        raise InputError(f"none of the {len(users)} users has {min_items or MIN_ITEMS} interactions; lower the filters")
    kept = kept[~few[user[kept]]]
    for code in np.unique(item[kept]).tolist():
        if items[code] not in titles:
            raise InputError(f"item {shown(items[code])} occurs in interactions but has no title; add it to the raw titles")
    kept = kept[
        np.lexsort((np.asarray(log.time)[kept], user[kept]))
    ]  # by user, then time; stable, so ties keep the raw order
    user, item = user[kept], item[kept]
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    sequences = {
        users[part_user]: [items[code] for code in part.tolist()]
        for part_user, part in zip(user[starts].tolist(), np.split(item, starts[1:]), strict=True)
    }
    facts = {
        "users": len(sequences),
        "items": len(titles),
        "items_never_had": len(titles) - len(np.unique(item)),
        "interactions": len(item),
        "density": len(item) / (len(sequences) * len(titles)),
        "repeated_interactions": len(item) - len(np.unique(user.astype(np.int64) * len(items) + item)),
        "items_sharing_a_title": sum(n for n in Counter(titles.values()).values() if n > 1),
        "min_rating": min_rating,
        "min_items": min_items,
        "users_left_out": int(few.sum()),
        "split": "leave-last: the last item is test, the one before it val, the rest train",
        "order": "by time; equal times keep the order of the raw file",
    }
    return sequences, facts


def write_sequences(folder: Path, sequences: dict[str, list[str]]) -> None:
    parts = {"train": slice(None, -2), "val": slice(-2, -1), "test": slice(-1, None)}
    for part, where in parts.items():
        with open(folder / f"{part}.tsv", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{user}\t{' '.join(items[where])}\n" for user, items in sequences.items())


def write_covers(
    folder: Path, titles: dict[str, str], genres: dict[str, list[str]], images: Path | None, draw: bool
) -> tuple[str, int]:
    """Copy or draw the covers. Returns the kind of covers and the number of items that have one."""
    if images is None and not draw:
        return "none", 0
    folder.mkdir()
    if draw:
        for item, title in tqdm(titles.items(), desc="covers", disable=None):
            if "/" in item or "\\" in item or item in (".", ".."):
                raise InputError(f"item {item!r}: not a file name, so it can have no cover; leave out --draw-covers")
            draw_cover(title, genres.get(item, [])).save(folder / f"{item}.jpg", quality=85)
        return "drawn", len(titles)
    if not images.is_dir():
        raise InputError(f"--images {images}: not a folder; check the path")
    found = find_images(images, titles)
    if not found:
        raise InputError(
            f"--images {images}: no image file is named after an item; expected e.g. {next(iter(titles))}.jpg"
        )
    for path in tqdm(found.values(), desc="covers", disable=None):
        shutil.copyfile(path, folder / path.name)
    return "real", len(found)


def summary(facts: dict[str, Any]) -> str:
    """The facts as a few printed lines."""
    return (
        f"{facts['name']}: {facts['users']} users, {facts['items']} items ({facts['items_never_had']} never had), "
        f"{facts['interactions']} interactions, density {facts['density']:.4%}\n"
        f"  left out: {facts['users_left_out']} users with fewer than {facts['min_items'] or MIN_ITEMS} interactions\n"
        f"  repeated (user, item) interactions, kept: {facts['repeated_interactions']}\n"
        f"  items that share a title with another: {facts['items_sharing_a_title']}\n"
        f"  images ({facts['covers']}): {facts['images']} matched, {facts['items_without_image']} missing"
    )
