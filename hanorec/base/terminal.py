"""Markdown as a terminal shows it: tables in columns, and no line wider than 100."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest
from textwrap import wrap

WIDTH = 100
GAP = 2  # between columns
RULE = re.compile(r"[|\s:-]*-[|\s:-]*")


def aligned(text: str) -> str:
    """The same text with its tables in columns; what is too wide is broken.

    A table too wide for a line is shown in parts, each with the first column.
    """
    lines = []
    for is_table, block in groupby(text.splitlines(), lambda line: "|" in line):
        block = list(block)
        if is_table:
            lines += _table([_cells(line) for line in block if not RULE.fullmatch(line)])
        for line in [] if is_table else block:
            lines += wrap(line.replace("**", ""), WIDTH) or [""]
    return "\n".join(lines) + "\n"


def _cells(line: str) -> list[str]:
    line = line.strip().replace("**", "")
    if line.startswith("|"):
        line = line[1:].removesuffix("|")
    return [cell.strip() for cell in line.split("|")]


def _table(rows: Sequence[list[str]]) -> list[str]:
    """Lines of the table's parts, with an empty line between them."""
    columns = list(zip_longest(*rows, fillvalue=""))
    first = min(max(map(len, columns[0])), WIDTH // 3)
    lines: list[str] = []
    for part in _parts(columns[1:], WIDTH - first):
        widths = [first, *(width for _, width in part)]
        lines += [""] if lines else []
        for number, row in enumerate(zip(columns[0], *(column for column, _ in part), strict=True)):
            lines += _row(row, widths)
            if number == 0:
                lines.append((" " * GAP).join("-" * width for width in widths))
    return lines or [row[0] for row in rows]


def _parts(
    columns: Sequence[Sequence[str]], room: int
) -> Iterator[list[tuple[Sequence[str], int]]]:
    """Columns with their widths, as many together as there is room for."""
    part: list[tuple[Sequence[str], int]] = []
    left = room
    for column in columns:
        width = min(max(map(len, column)), room - GAP)
        if part and width + GAP > left:
            yield part
            part, left = [], room
        part.append((column, width))
        left -= width + GAP
    if part:
        yield part


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A row, in several lines where a cell is too wide."""
    broken = [wrap(cell, width) if width else [] for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for pieces in zip_longest(*broken, fillvalue=""):
        padded = [f"{piece:<{width}}" for piece, width in zip(pieces, widths, strict=True)]
        lines.append((" " * GAP).join(padded).rstrip())
    return lines
