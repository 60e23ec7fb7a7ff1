r"""Netflix Prize -> native layout.

    python -m hanorec.datasets.netflix RAW OUT [--max-users N]

The raw files are read as streams; see --max-users for machines with little memory.

    combined_data_1.txt ... _4.txt      MovieID:, then lines CustomerID,Rating,YYYY-MM-DD
    movie_titles.csv                    id,year,title; as published it is ISO-8859-1 and not
                                        quoted, and a title may hold commas; saved again as UTF-8,
                                        or quoted as csv, it is read as what it is

A date is all the time there is, and the files go movie by movie, so the ratings of one day are in
order of movie id.
"""

from collections.abc import Iterator
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np

from hanorec.base.command import run
from hanorec.base.errors import InputError, shown
from hanorec.datasets.fields import in_words, read_fields, split_fields
from hanorec.datasets.lines import numbered_lines, text_encoding
from hanorec.datasets.native import convert, parser
from hanorec.datasets.raw import Log, add_title


def read_ratings(paths: list[Path]) -> Iterator[tuple[Path, int, str, str, str, str]]:
    """Yield (path, line, movie, customer, rating, date)."""
    what = "CustomerID, Rating, YYYY-MM-DD"
    for path in paths:
        movie = None
        for line, text in numbered_lines(path, progress=True):
            if text.endswith(":"):
                movie = text[:-1]
                continue
            if movie is None:
                raise InputError(
                    f"{path}:{line}: {shown(text)} before any movie; "
                    f"expected a line such as '1:' first"
                )
            yield path, line, movie, *split_fields(path, line, text, ",", 3, what)


@cache  # there are only some two thousand days
def day(text: str) -> int:
    """The number of the day; ValueError where `text` is no ISO date."""
    return date.fromisoformat(text).toordinal()


def read_log(paths: list[Path], users: set[str] | None) -> Log:
    """The ratings of `users` (None = all)."""
    log = Log()
    for path, line, movie, user, rating, text in read_ratings(paths):
        if users is not None and user not in users:
            continue
        try:
            time = day(text)
        except ValueError:
            raise InputError(
                f"{path}:{line}: date {shown(text)}; expected YYYY-MM-DD, so mend the raw file"
            ) from None
        log.add(path, line, user, movie, time, rating)
    return log


def sample_users(paths: list[Path], count: int, seed: int) -> set[str]:
    """`count` of the users, drawn uniformly: one pass over the files of its own."""
    if count < 1:
        raise InputError(f"--max-users {count}; expected at least 1")
    users = sorted({user for _, _, _, user, _, _ in read_ratings(paths)})
    order = np.random.default_rng(seed).permutation(len(users))
    return {users[i] for i in order[:count]}


def read_titles(path: Path) -> tuple[dict[str, str], bool]:
    """Item id -> title, and whether titles were quoted."""
    titles: dict[str, str] = {}
    quoted, rows = read_fields(path, ",", 3, text_encoding(path), rest=True)
    for line, fields in rows:
        if len(fields) != 3:
            raise InputError(
                f"{path}:{line}: {len(fields)} fields in {shown(','.join(fields))}; "
                f"expected id,year,title, so mend the line"
            )
        add_title(titles, path, line, fields[0], fields[2])
    return titles, quoted


def main(argv: list[str] | None = None) -> None:
    options = parser("netflix", "Netflix Prize: combined_data_*.txt, movie_titles.csv")
    options.add_argument(
        "--max-users",
        type=int,
        metavar="N",
        help="a seeded sample of N users, taken before the filters",
    )
    options.add_argument(
        "--seed", type=int, default=2025, help="of the sample (default 2025)"
    )
    args = options.parse_args(argv)
    paths = sorted(args.raw.glob("combined_data_*.txt"))
    if not paths:
        raise InputError(
            f"{args.raw}: no file combined_data_*.txt; "
            f"expected those of the Netflix Prize, so check the path"
        )
    titles, quoted = read_titles(args.raw / "movie_titles.csv")
    print(f"read movie_titles.csv ({in_words(quoted)})")
    files = [path.name for path in paths] + ["movie_titles.csv"]
    source = {"format": "Netflix Prize", "files": files}
    if quoted:
        source["titles_quoted"] = True
    users = None
    if args.max_users is not None:
        users = sample_users(paths, args.max_users, args.seed)
        source["user_sample"] = len(users)
        source["user_sample_seed"] = args.seed
        source["user_sample_taken"] = "before the filters"
        print(f"a seeded sample of {len(users)} users (seed {args.seed})")
    convert(args, read_log(paths, users), titles, {}, "Netflix", source)


if __name__ == "__main__":
    run(main)
