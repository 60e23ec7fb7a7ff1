r"""MovieLens-1M, -10M and -100K -> native layout. What RAW holds tells which of them it is.

    python -m hanorec.datasets.movielens RAW OUT [--images covers/]

1M, 10M ratings.dat  UserID::MovieID::Rating::Timestamp
        movies.dat   MovieID::Title::Genre|Genre|...
100K    u.data       user<TAB>item<TAB>rating<TAB>time
        u.item       id|title|date|video date|URL|19 genre flags

As published, 1M and 100K are ISO-8859-1 and 10M is UTF-8; each is read as what it is.
"""

from pathlib import Path

import numpy as np

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.datasets.covers import GENRES
from hanorec.datasets.fields import check_count, read_fields, split_fields
from hanorec.datasets.lines import numbered_lines, text_encoding
from hanorec.datasets.native import convert, parser
from hanorec.datasets.raw import Log, add_title

LARGEST_1M = 3952  # movie id of MovieLens-1M; those of 10M go up to 65133
FLAGS = ("unknown", *GENRES)  # the order of the flags in u.item, as in u.genre


def read_ratings(path: Path, separator: str) -> Log:
    """ratings.dat or u.data, whose fields stand in one order."""
    what = "user, item, rating, time"
    log = Log()
    for line, text in numbered_lines(path, text_encoding(path), progress=True):
        user, item, rating, time = split_fields(path, line, text, separator, 4, what)
        log.add(path, line, user, item, time, rating)
    return log


def read_movies_1m(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Item id -> title, item id -> genres."""
    titles, genres = {}, {}
    for line, text in numbered_lines(path, text_encoding(path)):
        item, title, names = split_fields(path, line, text, "::", 3, "MovieID, Title, Genres")
        add_title(titles, path, line, item, title)
        genres[item] = names.split("|")
    return titles, genres


def read_movies_100k(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Item id -> title, item id -> genres."""
    count = 5 + len(FLAGS)
    what = "id, title, 2 dates, URL, 19 genre flags"
    titles, genres = {}, {}
    _, rows = read_fields(path, "|", count, text_encoding(path))
    for line, fields in rows:
        check_count(path, line, fields, "|", count, what)
        item, title, flags = fields[0], fields[1], fields[5:]
        add_title(titles, path, line, item, title)
        genres[item] = [genre for genre, flag in zip(FLAGS, flags, strict=True) if flag == "1"]
    return titles, genres


def name_of(folder: Path, titles: dict[str, str], log: Log) -> str:
    """MovieLens-1M, or 10M, which has the same files.

    10M has a file of tags, half stars and larger ids.
    """
    largest = max((int(item) for item in titles if item.isdecimal()), default=0)
    half_stars = (np.asarray(log.rating) % 1 != 0).any()
    is_10m = (folder / "tags.dat").exists() or half_stars or largest > LARGEST_1M
    return "MovieLens-10M" if is_10m else "MovieLens-1M"


def main(argv: list[str] | None = None) -> None:
    about = "MovieLens-1M or 10M (ratings.dat, movies.dat) or 100K (u.data, u.item)"
    args = parser("movielens", about).parse_args(argv)
    is_1m = (args.raw / "ratings.dat").exists()
    is_100k = (args.raw / "u.data").exists()
    if is_1m == is_100k:
        found = "both ratings.dat and u.data" if is_1m else "neither ratings.dat nor u.data"
        raise InputError(
            f"{args.raw}: {found}; "
            f"expected one, the folder of MovieLens-1M or that of MovieLens-100K"
        )
    if is_1m:
        files = ["ratings.dat", "movies.dat"]
        titles, genres = read_movies_1m(args.raw / files[1])
        log = read_ratings(args.raw / files[0], "::")
        name = name_of(args.raw, titles, log)
    else:
        name, files = "MovieLens-100K", ["u.data", "u.item"]
        titles, genres = read_movies_100k(args.raw / files[1])
        log = read_ratings(args.raw / files[0], "\t")
    convert(args, log, titles, genres, name, {"format": name, "files": files})


if __name__ == "__main__":
    run(main)
