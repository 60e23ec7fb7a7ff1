r"""RecBole's atomic files (.inter, .item) -> native layout.

    python -m hanorec.datasets.recbole RAW OUT [--images covers/]

Both are tab separated, quoted as csv or not at all; the header types each column, as in
user_id:token<TAB>timestamp:float. Text (token_seq) is words separated by spaces, so a genre field
becomes one genre a word.
"""

from collections.abc import Iterator
from pathlib import Path

from hanorec.base.command import run
from hanorec.base.errors import InputError, shown
from hanorec.datasets.fields import check_count, in_words, read_fields
from hanorec.datasets.lines import only_file
from hanorec.datasets.native import convert, parser
from hanorec.datasets.raw import Log, add_title

FIELDS = {  # option -> the columns it looks for: the first that is there counts
    "user": "user_id",
    "item": "item_id",
    "time": "timestamp",
    "rating": "rating",
    "title": "title,movie_title",
    "genre": "genre,class,categories",
}


def read_rows(
    path: Path, progress: bool = False
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The column names, and an iterator over (line number, fields)."""
    quoted, rows = read_fields(path, "\t", None, progress=progress)
    _, header = next(rows, (1, [""]))
    names = []
    for field in header:
        name, _, kind = field.partition(":")
        if not name or not kind:
            raise InputError(
                f"{path}:1: header {shown(header)}; "
                f"expected typed columns such as user_id:token, separated by tabs"
            )
        names.append(name)
    print(f"read {path.name} ({in_words(quoted)})")
    return names, _counted(path, names, rows)


def _counted(
    path: Path, names: list[str], rows: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, list[str]]]:
    """The rows, each with a field for each column."""
    what = ", ".join(names)
    for line, fields in rows:
        check_count(path, line, fields, "\t", len(names), what)
        yield line, fields


def column(path: Path, names: list[str], wanted: str, option: str) -> int:
    """The position of a column.

    `wanted` may be several names with commas between: the first that is there counts.
    """
    for name in wanted.split(","):
        if name in names:
            return names.index(name)
    raise InputError(
        f"{path}:1: no column {wanted!r} among {shown(', '.join(names))}; "
        f"name the right one with {option}"
    )


def read_interactions(path: Path, user: str, item: str, time: str, rating: str) -> Log:
    """The log of an .inter file, by the names of its columns.

    time "none": the order of the file; rating "none": no ratings.
    """
    names, rows = read_rows(path, progress=True)
    user_at = column(path, names, user, "--user-field")
    item_at = column(path, names, item, "--item-field")
    time_at = rating_at = None
    if time != "none":
        time_at = column(path, names, time, "--time-field (none: the order of the file)")
    if rating != "none":
        rating_at = column(path, names, rating, "--rating-field (none: no ratings)")
    log = Log()
    for line, fields in rows:
        order = line if time_at is None else fields[time_at]
        rated = () if rating_at is None else (fields[rating_at],)
        log.add(path, line, fields[user_at], fields[item_at], order, *rated)
    return log


def read_items(
    path: Path, item: str, title: str, genre: str
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Item id -> title, item id -> genres of an .item file. genre "none": no genres."""
    names, rows = read_rows(path)
    item_at = column(path, names, item, "--item-field")
    title_at = column(path, names, title, "--title-field")
    genre_at = None
    if genre != "none":
        genre_at = column(path, names, genre, "--genre-field (none: no genres)")
    titles, genres = {}, {}
    for line, fields in rows:
        add_title(titles, path, line, fields[item_at], fields[title_at])
        genres[fields[item_at]] = [] if genre_at is None else fields[genre_at].split()
    return titles, genres


def main(argv: list[str] | None = None) -> None:
    options = parser(
        "recbole",
        "RecBole atomic files: one .inter and one .item. "
        "Several names: the first that is there.",
    )
    for kind, default in FIELDS.items():
        options.add_argument(
            f"--{kind}-field", default=default, metavar="NAME", help=f"default {default}"
        )
    args = options.parse_args(argv)
    inter = only_file(args.raw, "*.inter")
    items = only_file(args.raw, "*.item")
    genre_field = args.genre_field if args.draw_covers else "none"  # nothing else uses genres
    titles, genres = read_items(items, args.item_field, args.title_field, genre_field)
    log = read_interactions(
        inter, args.user_field, args.item_field, args.time_field, args.rating_field
    )
    source = {"format": "RecBole atomic files", "files": [inter.name, items.name]}
    source |= {f"{kind}_field": getattr(args, f"{kind}_field") for kind in FIELDS}
    convert(args, log, titles, genres, inter.stem, source)


if __name__ == "__main__":
    run(main)
