r"""MovieLens-1M and MovieLens-100K -> native layout. File names tell which of them RAW holds.

Both are ISO-8859-1:

1M      ratings.dat  UserID::MovieID::Rating::Timestamp
        movies.dat   MovieID::Title::Genre|Genre|...
100K    u.data       user<TAB>item<TAB>rating<TAB>time
        u.item       id|title|date|video date|URL|19 genre flags
"""

from pathlib import Path

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.datasets.covers import GENRES
from hanorec.datasets.lines import numbered_lines
from hanorec.datasets.native import convert, parser
from hanorec.datasets.raw import Log, add_title, split_fields

LATIN = "iso-8859-1"
FLAGS = ("unknown", *GENRES)  # the order of the flags in u.item, as in u.genre


def read_ratings(path: Path, separator: str) -> Log:
    """ratings.dat or u.data, whose fields stand in one order."""
    what = "user, item, rating, time"
    log = Log()
    for line, text in numbered_lines(path, LATIN, progress=True):
        user, item, rating, time = split_fields(path, line, text, separator, 4, what)
        log.add(path, line, user, item, time, rating)
    return log


def read_movies_1m(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Item id -> title, item id -> genres."""
    titles, genres = {}, {}
    for line, text in numbered_lines(path, LATIN):
        item, title, names = split_fields(path, line, text, "::", 3, "MovieID, Title, Genres")
        add_title(titles, path, line, item, title)
        genres[item] = names.split("|")
    return titles, genres


def read_movies_100k(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Item id -> title, item id -> genres."""
    count = 5 + len(FLAGS)
    what = "id, title, 2 dates, URL, 19 genre flags"
    titles, genres = {}, {}
    for line, text in numbered_lines(path, LATIN):
        fields = split_fields(path, line, text, "|", count, what)
        item, title, flags = fields[0], fields[1], fields[5:]
        add_title(titles, path, line, item, title)
        genres[item] = [genre for genre, flag in zip(FLAGS, flags, strict=True) if flag == "1"]
    return titles, genres


def main(argv: list[str] | None = None) -> None:
    about = "MovieLens-1M (ratings.dat, movies.dat) or 100K (u.data, u.item)"
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
        name, files = "MovieLens-1M", ["ratings.dat", "movies.dat"]
        titles, genres = read_movies_1m(args.raw / files[1])
        log = read_ratings(args.raw / files[0], "::")
    else:
        name, files = "MovieLens-100K", ["u.data", "u.item"]
        titles, genres = read_movies_100k(args.raw / files[1])
        log = read_ratings(args.raw / files[0], "\t")
    convert(args, log, titles, genres, name, {"format": name, "files": files})


if __name__ == "__main__":
    run(main)
