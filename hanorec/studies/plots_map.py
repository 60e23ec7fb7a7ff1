"""Figures of `hanorec.studies.map`, readable in grey, drawn from its tables.

    python -m hanorec.studies.plots_map OUT/map.md FIGURES
    python -m hanorec.studies.plots_map docs/map.md docs/figures

Of the tables that are there: map-E1.png noise kept or forgotten, map-E2.png noise of labels against
form of the weights, map-E3.png epochs against beta0. Needs matplotlib (pip install -e .[plots]).
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.plots_map")
    result.add_argument("page", type=Path, help="map.md, of hanorec.studies.map or of the docs")
    result.add_argument("out", type=Path, help="folder for the figures")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import numpy as np
from matplotlib.figure import Figure

from hanorec.base.errors import InputError
from hanorec.studies.figures import MARKERS, STYLES, panels, save
from hanorec.studies.map_rows import CONTROL, GRID, RHOS, TUNED, WEIGHTS, epoch_run

Table = list[list[str]]  # the cells of its lines, the head first
Found = tuple[float, float, float]  # mean, and the ends of its interval


def draw_noise(table: Table) -> Figure:
    """E1: what each row has learnt against how near its first update is to the clean one."""
    figure, (axis,) = panels(1, 6.5, 3.4)
    figure.suptitle("map, E1: noise kept or forgotten", fontsize=10)
    for number, (cell, start, _, h, *_) in enumerate(table[1:]):
        x, y = read(start), read(h)
        axis.errorbar(
            x[0], y[0], xerr=reach([x]), yerr=reach([y]), color=shade(number),
            marker=MARKERS[number % len(MARKERS)], markersize=7, markerfacecolor="white",
            linestyle="", elinewidth=0.7, capsize=2, label=cell)
    axis.axhline(0, color="black", linestyle=":", linewidth=1)
    axis.set_xlabel("cosine of the first update with the clean one")
    axis.set_ylabel("clean h on pairs held out, nats")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_labels(table: Table) -> Figure:
    """E2: each form of the weights against plain DPO, over the share of labels that are wrong."""
    gaps = {(labels, row): gap for labels, row, _, gap, *_ in table}
    figure, axes = panels(2, 4, 3.4, sharey=True)
    figure.suptitle("map, E2: weights where labels are wrong", fontsize=10)
    for axis, which in zip(axes, ("hardest", "easiest"), strict=True):
        labels = ["none wrong", *(f"{which}, ρ {rho:g}" for rho in RHOS)]
        for number, row in enumerate(row for row in WEIGHTS if row != CONTROL):
            found = [read(gaps[name, row]) for name in labels]
            curve(axis, np.array([0, *RHOS]) + 0.008 * (number - 2), found, number, row)
        axis.axhline(0, color="black", linewidth=1)
        axis.set_xlabel(f"ρ, wrong labels of the {which} 30%")
    axes[0].set_ylabel("accuracy minus that of DPO, points")
    axes[1].legend(fontsize=7)
    return figure


def draw_epochs(table: Table) -> Figure:
    """E3: each row over the epochs, a panel for each kind of negatives and beta0."""
    head, *rows = table
    reads = np.array([int(name.removeprefix("epoch ")) for name in head[1:]])
    curves = {run: list(map(read, cells)) for run, *cells in rows}
    places: list[tuple[str, float]] = []
    for negatives, beta0s in GRID.items():
        places += [(negatives, beta0) for beta0 in beta0s]
    figure, axes = panels(len(places), 3.6, 3.4, sharey=True)
    figure.suptitle("map, E3: over-optimisation", fontsize=10)
    for axis, (negatives, beta0) in zip(axes, places, strict=True):
        for number, row in enumerate(TUNED):
            found = curves[epoch_run(row, negatives, beta0)]
            bars = number == 0  # the others' are as wide, and would hide the curves
            curve(axis, reads, found, number, row, bars)
        axis.set_xscale("log", base=2)
        axis.set_xticks(reads, map(str, reads))
        axis.set_xlabel("epochs, constant rate")
        axis.set_title(f"{negatives} negatives, β0 {beta0:g}", fontsize=9)
    axes[0].set_ylabel("NDCG@3 on validation, percent")
    axes[-1].legend(fontsize=7)
    return figure


def curve(
    axis: Any, x: np.ndarray, found: Sequence[Found], number: int, name: str, bars: bool = True,
) -> None:
    """A row's line, told apart by style, marker and shade; bars: with its intervals."""
    axis.errorbar(
        x, [mean for mean, _, _ in found], yerr=reach(found) if bars else None, label=name,
        linestyle=STYLES[number % len(STYLES)], marker=MARKERS[number % len(MARKERS)],
        color=shade(number), markersize=4, capsize=2, linewidth=1)


def reach(found: Sequence[Found]) -> np.ndarray:
    """How far the intervals reach down and up, (2, n)."""
    ends = [(mean - low, high - mean) for mean, low, high in found]
    return np.maximum(np.array(ends).T, 0)


def shade(number: int) -> str:
    return "0.1" if number < len(STYLES) else "0.55"


# How a table's head begins -> its figure, and who draws it.
DRAWN: dict[str, tuple[str, Callable[[Table], Figure]]] = {
    "row | cosine, start": ("map-E1.png", draw_noise),
    "labels | row": ("map-E2.png", draw_labels),
    "NDCG@3, validation": ("map-E3.png", draw_epochs),
}


def read(cell: str) -> Found:
    """"0.35 [0.30, 0.41]" as (mean, low, high), all three alike where there is no interval."""
    mean, *ends = map(float, re.findall(r"[-+]?\d+\.\d+", cell))
    low, high = ends or (mean, mean)
    return mean, low, high


def find_table(text: str, begin: str) -> Table:
    """That whose head begins so; empty where there is none."""
    found = re.search(rf"^{re.escape(begin)} \|.*\n---.*\n(.+ \| .*\n?)+", text, re.MULTILINE)
    if not found:
        return []
    head, _, *rows = found[0].splitlines()
    return [re.split(r" \| ?", line) for line in (head, *rows)]


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    text = args.page.read_text(encoding="utf-8")
    tables = {begin: table for begin in DRAWN if (table := find_table(text, begin))}
    if not tables:
        raise InputError(
            f"{args.page}: no table of an experiment, expected map.md of hanorec.studies.map")
    for begin, table in tables.items():
        name, draw = DRAWN[begin]
        print(f"wrote {save(draw(table), args.out / name)}")
