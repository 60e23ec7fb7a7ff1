r"""MicroLens -> native layout. Covers come from --images (file stem = item id).

    python -m hanorec.datasets.microlens RAW OUT [--images covers/]

*_pairs.csv     header user,item,timestamp (ms)     used when it is there: it states the times
*_pairs.tsv     user<TAB>id id id ...               already in order
*_titles.csv    or *_title_en.csv: item,title       quoted as csv, as MicroLens-50k is, or not at
                                                    all: then everything after the first comma is
                                                    the title
"""

from pathlib import Path

from hanorec.base.command import run
from hanorec.base.errors import InputError, shown
from hanorec.datasets.fields import check_count, in_words, read_fields, split_fields
from hanorec.datasets.lines import numbered_lines, only_file
from hanorec.datasets.native import convert, parser
from hanorec.datasets.raw import Log, add_title

HEADER = "user,item,timestamp"


def read_pairs_csv(path: Path) -> Log:
    log = Log()
    _, rows = read_fields(path, ",", 3, progress=True)
    for line, fields in rows:
        if line == 1:
            header = ",".join(fields)
            if header != HEADER:
                raise InputError(
                    f"{path}:1: header {shown(header)}; expected {HEADER!r}, so mend the file"
                )
            continue
        check_count(path, line, fields, ",", 3, HEADER)
        log.add(path, line, *fields)
    return log


def read_pairs_tsv(path: Path) -> Log:
    log = Log()
    for line, text in numbered_lines(path, progress=True):
        user, items = split_fields(path, line, text, "\t", 2, "user<TAB>id id id ...")
        if user in log.users:
            raise InputError(
                f"{path}:{line}: user {shown(user)} has an earlier line; "
                f"expected one line a user, so join them"
            )
        for position, item in enumerate(items.split()):
            log.add(path, line, user, item, position)
    return log


def read_titles(path: Path) -> tuple[dict[str, str], bool, bool]:
    """Item id -> title, whether the first line was a header, and whether titles were quoted.

    Ids are digits, so a first line without one is a header.
    """
    titles: dict[str, str] = {}
    has_header = False
    quoted, rows = read_fields(path, ",", 2, rest=True)
    for line, fields in rows:
        if len(fields) != 2:
            raise InputError(
                f"{path}:{line}: no comma in {shown(fields[0])}; "
                f"expected item,title, so mend or remove the line"
            )
        item, title = fields
        if line == 1 and not item.isdigit():
            has_header = True
            continue
        add_title(titles, path, line, item, title)
    return titles, has_header, quoted


def main(argv: list[str] | None = None) -> None:
    about = "MicroLens: *_pairs.csv or *_pairs.tsv, *_titles.csv or *_title_en.csv"
    args = parser("microlens", about).parse_args(argv)
    titles_path = only_file(args.raw, "*_titles.csv", "*_title_en.csv")
    titles, has_header, quoted = read_titles(titles_path)
    if any(args.raw.glob("*_pairs.csv")):
        pairs = only_file(args.raw, "*_pairs.csv")
        log = read_pairs_csv(pairs)
    else:
        pairs = only_file(args.raw, "*_pairs.tsv")
        log = read_pairs_tsv(pairs)
    source = {
        "format": "MicroLens",
        "files": [pairs.name, titles_path.name],
        "titles_header": has_header,
    }
    if quoted:
        source["titles_quoted"] = True
    header = "with a header" if has_header else "without a header"
    print(f"read {pairs.name} and {titles_path.name} ({header}, {in_words(quoted)})")
    convert(args, log, titles, {}, pairs.stem.removesuffix("_pairs"), source)


if __name__ == "__main__":
    run(main)
