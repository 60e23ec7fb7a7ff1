r"""The fields of a text file's lines: quoted as csv does, or not at all.

No file says which of the two it is, and it is one or the other as a whole. Where every row is csv
with the right number of fields, the file is read so: quotes around a field go, doubled ones in it
are one, and separators and line breaks in it are text. Else a line is split at its separators, and
a quote is a character like any other.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hanorec.base.errors import InputError, shown
from hanorec.datasets.lines import numbered_lines

Lines = Iterable[tuple[int, str]]
Rows = Iterator[tuple[int, list[str]]]


def read_fields(
    path: Path,
    separator: str,
    count: int | None,
    encoding: str = "utf-8",
    rest: bool = False,
    progress: bool = False,
) -> tuple[bool, Rows]:
    """Whether the file is quoted, and an iterator over (number of the line, fields).

    Args:
        count: fields of a row; None = as many as the first has. In a quoted file every row has so
            many; in another one the caller must look.
        rest: without quoting, the last field is all that is left of its line.
    InputError: rows that are quoted beside rows that are not, so that one reading would spoil
    either; with `rest`, a file whose titles a spreadsheet has cut into columns.
    """
    lines = partial(numbered_lines, path, encoding)
    if _is_quoted(path, lines, separator, count):
        return True, _csv_rows(path, lines(progress=progress), separator)
    if rest:
        return False, _split(path, lines(progress=progress), separator, count - 1)
    return False, ((line, text.split(separator)) for line, text in lines(progress=progress))


def in_words(quoted: bool) -> str:
    """How a file was read, for people."""
    return "quoted as csv" if quoted else "not quoted"


def split_fields(
    path: Path, line: int, text: str, separator: str, count: int, what: str
) -> list[str]:
    """The `count` fields of a line; `what` describes them in the error."""
    fields = text.split(separator)
    check_count(path, line, fields, separator, count, what)
    return fields


def check_count(
    path: Path, line: int, fields: list[str], separator: str, count: int, what: str
) -> None:
    """InputError where a line has not `count` fields; `what` describes them."""
    if len(fields) != count:
        raise InputError(
            f"{path}:{line}: {len(fields)} fields in {shown(separator.join(fields))}; "
            f"expected {count} ({what}), so mend or remove the line"
        )


# ---- reading ----


def _csv_reader(lines: Lines, separator: str) -> Any:
    texts = (f"{text}\n" for _, text in lines)
    # strict: text behind a closing quote is an error instead of being glued to the field
    return csv.reader(texts, delimiter=separator, strict=True, skipinitialspace=True)


def _csv_rows(path: Path, lines: Lines, separator: str) -> Rows:
    """The rows of a quoted file, each with the number of its first line.

    A line break in a field, which would end an item's line in a prompt, becomes a space.
    """
    reader = _csv_reader(lines, separator)
    before = broken = 0  # before: the last line of the row before
    for fields in reader:
        for place, field in enumerate(fields):
            if "\n" in field:
                fields[place] = " ".join(map(str.strip, field.split("\n")))
                broken += 1
        yield before + 1, fields
        before = reader.line_num
    if broken:
        print(f"note: {broken} fields of {path.name} hold line breaks, which are read as spaces")


def _split(path: Path, lines: Lines, separator: str, most: int) -> Rows:
    """The lines of a file without quoting, split at the first `most` separators."""
    number = padded = 0
    for number, text in lines:
        fields = text.split(separator, most)
        padded += fields[-1].endswith(separator)
        yield number, fields
    if number > 1 and padded > number / 2:
        raise InputError(
            f"{path}: {padded} of {number} lines end with {separator!r}, as where a spreadsheet "
            f"has cut titles into columns; expected titles in one piece, so take the original file"
        )


# ---- which of the two ----


def _is_quoted(
    path: Path, lines: Callable[[], Lines], separator: str, count: int | None
) -> bool:
    if not _holds_a_quote(path):
        return False
    opened = re.compile(rf'(^|{re.escape(separator)}) *"')  # a field that begins with a quote
    if count is None:
        _, header = next(iter(lines()), (1, ""))
        count = len(header.split(separator))
    fault = _fault(lines(), separator, count)
    if fault is None:
        return any(opened.search(text) for _, text in lines())

    # Some row is no csv. Those that are, and hold quotes, are quoted, unless these are their text.
    bad, why = fault
    first, quoted, bare, sure = 0, 0, 0, False
    for number, text in lines():
        if _fault([(1, text)], separator, count):
            bare += 1
        elif opened.search(text):
            quoted += 1
            first = first or number
            if not sure and ('""' in text or len(text.split(separator)) > count):
                first, sure = number, True
    if sure or quoted > bare:
        raise InputError(
            f"{path}:{first}: this line is quoted as csv, but line {bad} is no csv ({why}); "
            f"expected quotes in all of it or in none, so mend either line"
        )
    if quoted:
        print(
            f"note: {path.name} is not quoted as csv (line {bad}: {why}), so {quoted} lines keep "
            f"their double quotes, e.g. line {first}"
        )
    return False


def _holds_a_quote(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return any(b'"' in part for part in iter(partial(file.read, 2**20), b""))
    except OSError:
        return False  # whoever reads the lines says so


def _fault(lines: Lines, separator: str, count: int) -> tuple[int, str] | None:
    """The number of the first row that is no csv of `count` fields, and what is wrong with it."""
    reader = _csv_reader(lines, separator)
    before = 0  # the last line of the row before
    try:
        for fields in reader:
            if len(fields) != count:
                return before + 1, f"{len(fields)} fields {shown(fields, 40)}"
            before = reader.line_num
    except csv.Error as error:
        return before + 1, str(error)
    return None
