"""Figures of `hanorec.studies.map`, readable in grey: python -m hanorec.studies.plots_map OUT

Of what is finished: E1.png noise kept or forgotten, E2.png noise of labels against form of the
weights, E3.png epochs against beta0. Needs matplotlib (pip install -e .[plots]).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.plots_map")
    result.add_argument("out", type=Path, help="--out of hanorec.studies.map")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import numpy as np
from matplotlib.figure import Figure

from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.studies.figures import MARKERS, STYLES, panels, save
from hanorec.studies.map_claims import Estimate, Part, estimate, higher
from hanorec.studies.map_rows import (
    CONTROL,
    GRID,
    RHOS,
    TUNED,
    WEIGHTS,
    epoch_cell,
    epoch_run,
    label_cell,
    noise_cells,
)


def draw_noise(one: dict[str, Any]) -> Figure:
    """E1: what each row has learnt against how near its first update is to the clean one."""
    figure, (axis,) = panels(1, 6.5, 3.4)
    for number, cell in enumerate(noise_cells()):
        x, y = (
            estimate(one["cells"], Part(measure, {cell: 1.0}), one["shared"])
            for measure in ("cosine, start", "h"))
        axis.errorbar(
            x.mean, y.mean, xerr=reach([x]), yerr=reach([y]), color=shade(number),
            marker=MARKERS[number % len(MARKERS)], linestyle="", capsize=2, label=cell)
    axis.axhline(0, color="black", linestyle=":", linewidth=1)
    axis.set_xlabel("cosine of the first update with the clean one")
    axis.set_ylabel("clean h on pairs held out, nats")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_labels(one: dict[str, Any]) -> Figure:
    """E2: each form of the weights against plain DPO, over the share of labels that are wrong."""
    figure, axes = panels(2, 4, 3.4, sharey=True)
    for axis, which in zip(axes, ("hardest", "easiest"), strict=True):
        labels = ["none wrong", *(f"{which}, ρ {rho:g}" for rho in RHOS)]
        for number, row in enumerate(row for row in WEIGHTS if row != CONTROL):
            found = []
            for name in labels:
                part = higher("accuracy", label_cell(row, name), label_cell(CONTROL, name))
                found.append(estimate(one["cells"], part, one["shared"]))
            curve(axis, np.array([0, *RHOS]) + 0.008 * (number - 2), found, number, row)
        axis.axhline(0, color="black", linewidth=1)
        axis.set_xlabel(f"ρ, wrong labels of the {which} 30%")
    axes[0].set_ylabel("accuracy minus that of DPO, points")
    axes[1].legend(fontsize=7)
    return figure


def draw_epochs(one: dict[str, Any]) -> Figure:
    """E3: each row over the epochs, a panel for each kind of negatives and beta0."""
    places: list[tuple[str, float]] = []
    for negatives, beta0s in GRID.items():
        places += [(negatives, beta0) for beta0 in beta0s]
    figure, axes = panels(len(places), 3.6, 3.4, sharey=True)
    reads = np.array(one["reads"])
    for axis, (negatives, beta0) in zip(axes, places, strict=True):
        for number, row in enumerate(TUNED):
            run_name, found = epoch_run(row, negatives, beta0), []
            for epoch in one["reads"]:
                part = Part("NDCG@3", {epoch_cell(run_name, epoch): 1.0})
                found.append(estimate(one["cells"], part, one["shared"]))
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
    axis: Any, x: np.ndarray, found: Sequence[Estimate], number: int, name: str,
    bars: bool = True,
) -> None:
    """A row's line, told apart by style, marker and shade; bars: with its intervals."""
    axis.errorbar(
        x, [one.mean for one in found], yerr=reach(found) if bars else None, label=name,
        linestyle=STYLES[number % len(STYLES)], marker=MARKERS[number % len(MARKERS)],
        color=shade(number), markersize=4, capsize=2, linewidth=1)


def reach(found: Sequence[Estimate]) -> np.ndarray:
    """How far the intervals reach down and up, (2, n); 0 where there is none."""
    ends = np.array([[one.mean - one.low, one.high - one.mean] for one in found]).T
    return np.where(np.isfinite(ends), np.maximum(ends, 0), 0)


def shade(number: int) -> str:
    return "0.1" if number < len(STYLES) else "0.55"


DRAWN: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "E1": draw_noise,
    "E2": draw_labels,
    "E3": draw_epochs,
}


def main(argv: Sequence[str] | None = None) -> None:
    out = parser().parse_args(argv).out
    finished = [name for name in DRAWN if (out / f"{name}.json").exists()]
    if not finished:
        raise InputError(
            f"{out}: holds none of {', '.join(f'{name}.json' for name in DRAWN)}, expected --out "
            "of hanorec.studies.map with an experiment that is finished")
    for name in finished:
        figure = DRAWN[name](read_object(out / f"{name}.json"))
        path = save(figure, out / f"{name}.png")
        print(f"wrote {path}")
