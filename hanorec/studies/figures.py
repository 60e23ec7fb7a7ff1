"""What all figures share: panels, the order and the names of rows, and saving in grey.

A figure is a `Figure` of its own, never pyplot's, so a notebook shows it and no backend is set.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from hanorec.studies.runs import folder_name

# Lines are told apart by these, never by colour.
STYLES = ["-", "--", ":", "-."]
MARKERS = ["o", "s", "^", "D", "v", "x"]

# Every row that a study may have, in the order in which all figures show them.
ORDER = [
    "chance", "popularity", "base", "SFT, images shuffled", "SFT", "SFT continued",
    "DPO", "HaNoRec", "w/o HaRS", "w/o NoDO", "w/o SAM",
    "λ mean", "λ ranked", "λ ratio",
    "λ standardised", "λ standardised, reversed", "λ standardised, permuted",
    "λ standardised, normalised", "λ standardised, η ema",
    "noise 0.01", "noise relative 0.3", "noise relative 1",
    "HaNoRec, standardised, relative", "oracle",
]


def save(figure: Figure, path: Path) -> Path:
    """Write the figure in 32 shades of grey, so a third of the bytes; returns the path."""
    figure.savefig(path, dpi=100)
    with Image.open(path) as image:
        small = image.convert("L").quantize(32)
    small.save(path, optimize=True)
    return path


def panels(
    count: int,
    width: float = 3.2,
    height: float = 2.8,
    columns: int | None = None,
    **options: Any,
) -> tuple[Figure, Sequence[Any]]:
    """A figure of `count` axes, each of this width and height in inches; default: in one row."""
    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def run_name(folder: Path) -> str:
    """What a figure calls the run in this folder: "seed-2025 / w/o HaRS"."""
    folder = folder.resolve()
    return f"{folder.parent.name} / {row_name(folder.name)}"


def row_name(folder: str) -> str:
    """The row whose run lies in a folder of this name; else the folder's name itself."""
    for row in ORDER:
        if folder in (folder_name(row), row.replace("/", "")):
            return row
    return folder


def row_names(paths: Iterable[str]) -> dict[str, str]:
    """Path of a policy -> its row; the whole path where two would have one name."""
    names = {path: row_name(Path(path).name) for path in paths}
    found = list(names.values())
    return {path: name if found.count(name) == 1 else path for path, name in names.items()}


def in_order(rows: Iterable[str]) -> list[str]:
    """The rows in ORDER; those that it does not know come last, as they stand."""
    place: Mapping[str, int] = {row: number for number, row in enumerate(ORDER)}
    return sorted(rows, key=lambda row: place.get(row, len(ORDER)))


def percent(values: Sequence[float]) -> float:
    """The mean, in percent."""
    return 100 * float(np.mean(values))
