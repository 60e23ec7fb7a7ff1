"""Columns of whole numbers in a tab-separated file, parsed as arrays.

A digit of a whole column is read at a time, since an object a line would take minutes and
gigabytes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hanorec.base.errors import InputError
from hanorec.datasets.lines import BOM

LONGEST = 18  # digits that fit into int64


def read_columns(path: Path, names: Sequence[str]) -> np.ndarray:
    """Columns of a tab-separated file, each of whole numbers from 0.

    Returns (len(names), lines) int64; position p stands on line p + 2. InputError names the line.
    """
    try:
        raw = path.read_bytes().removeprefix(BOM).replace(b"\r\n", b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not raw.endswith(b"\n"):
        raw += b"\n"
    header = raw.partition(b"\n")[0].decode("utf-8", "replace").split("\t")
    for name in names:
        if header.count(name) != 1:
            raise InputError(
                f"{path}:1: {header.count(name)} columns {name} in the header {header}, "
                f"expected one, tabs between columns; mend the header"
            )
    data = np.frombuffer(raw, np.uint8)
    starts, stops = _fields(path, data, header)
    table = np.zeros((len(names), len(starts)), np.int64)
    for row, name in enumerate(names):
        at = header.index(name)
        start, length = starts[:, at], stops[:, at] - starts[:, at]
        wrong = _parse(data, start, length, table[row])
        if wrong.any():
            line = int(wrong.argmax())
            value = raw[start[line] : start[line] + min(length[line], 40)]
            raise InputError(
                f"{path}:{line + 2}: {name} {value.decode('utf-8', 'replace')!r}, "
                f"expected a whole number from 0; mend the line or number the ids anew"
            )
    return table


def _fields(path: Path, data: np.ndarray, header: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where each field of each line below the header starts and stops: two (lines, columns)."""
    columns = len(header)
    stops = np.flatnonzero((data == ord("\t")) | (data == ord("\n")))
    line_ends = np.flatnonzero(data[stops] == ord("\n"))
    counts = np.diff(line_ends, prepend=-1)  # (1 + lines,) fields of each line
    if (counts != columns).any():
        line = int((counts != columns).argmax())
        raise InputError(
            f"{path}:{line + 1}: {counts[line]} fields, "
            f"expected {columns} ({', '.join(header)}); mend or remove the line"
        )
    starts = np.append(0, stops[:-1] + 1)
    return starts.reshape(-1, columns)[1:], stops.reshape(-1, columns)[1:]


def _parse(
    data: np.ndarray, start: np.ndarray, length: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Write the numbers at start .. start + length of `data` to `out`; True where there is none."""
    wrong = (length < 1) | (length > LONGEST)
    for k in range(min(LONGEST, length.max(initial=0))):
        inside = k < length
        place = np.minimum(start + k, len(data) - 1)
        digit = data[place] - np.uint8(ord("0"))  # other characters wrap to above 9
        wrong |= inside & (digit > 9)
        out[:] = np.where(inside, 10 * out + digit, out)
    return wrong
