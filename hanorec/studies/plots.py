"""Figures of a run folder, readable in grey: python -m hanorec.studies.plots RUN

Drawn beside the file that each is made from, in RUN and in the folders below it. Needs matplotlib
(pip install -e .[plots]).
    log.jsonl       curves.png       loss, rewards, λ, η and β' of a training run; of BR-MRS its
                                     branches
    pairs.tsv       pairs.png        β' of each pair against how alike its two items are
    metrics.json    metrics.png      of evaluate.py: each policy with its interval
                    similarity.png   and with --similarity (EV-4): are weak pairs of image and text
                                     weaker after training?
    results.json    metrics.png      of the demo: every row
    results-*.json  ablation-*.png   of the ablation: each row's difference to plain DPO
    noise.json      noise.png        of hanorec.studies.noise_curve: loss against the strength of
                                     the noise
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.studies.figures import STYLES, panels, save
from hanorec.studies.plots_results import plot_ablation, plot_evaluation, plot_noise, plot_results

DPO_PANELS = [
    ["loss"],
    ["chosen_reward", "rejected_reward", "margin"],
    ["accuracy"],
    ["lambda", "eta"],
    ["beta"],
    ["gradient_norm"],
]

SYMBOLS = {"lambda": "λ", "eta": "η", "beta": "β'"}

# One modality alone has no branches to compare, so the log of such a run lacks some of these.
BRMRS_PANELS = {
    "Recall@20": ["Recall@20", "Recall@20_t", "Recall@20_v"],
    "win rate": ["win"],
    "margin": ["gap_f", "gap_t", "gap_v"],
    "share of targets": ["unique_t", "unique_v", "synergy", "degradation"],
}


def plot_run(folder: Path) -> list[Path]:
    """Draw all that the folder and its subfolders hold; returns the files written."""
    written = []
    for name, draw in DRAWN:
        for path in sorted(Path(folder).rglob(name)):
            if path.stat().st_size:  # a run may have just begun
                written += draw(path)
    return written


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_log(path: Path) -> list[Path]:
    """Training curves of one stage. The band spans the smallest and largest value in a step."""
    records = read_log(path)
    first = records[0]
    if "valid_Recall@20" in first:
        return plot_brmrs(path, records)

    step = [record["step"] for record in records]
    shown = DPO_PANELS if "margin" in first else [["loss"], ["gradient_norm"]]
    figure, axes = panels(len(shown))
    for axis, names in zip(axes, shown, strict=True):
        for name, style in zip(names, STYLES, strict=False):
            values = [record[name] for record in records]
            axis.plot(step, values, style, color="black", label=SYMBOLS.get(name, name))
            if f"{name}_min" in first:
                low = [record[f"{name}_min"] for record in records]
                high = [record[f"{name}_max"] for record in records]
                axis.fill_between(step, low, high, color="0.8")
        axis.set_xlabel("optimizer step")
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(path.parent.name)
    return save(figure, path.parent / "curves.png")


def plot_brmrs(path: Path, records: list[dict[str, Any]]) -> list[Path]:
    """BR-MRS by epoch, on validation.

    Recall@20 of each branch, how often the fused margin wins, the margins, who finds the target.
    """
    shown = {}
    for title, names in BRMRS_PANELS.items():
        if logged := [name for name in names if f"valid_{name}" in records[0]]:
            shown[title] = logged

    epoch = [record["epoch"] for record in records]
    figure, axes = panels(len(shown), 3.4, 3)
    for axis, (title, names) in zip(axes, shown.items(), strict=True):
        for name, style in zip(names, STYLES, strict=False):
            values = [record[f"valid_{name}"] for record in records]
            axis.plot(epoch, values, style, color="black", label=name)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
        axis.legend(framealpha=0.7, fontsize=8)
    figure.suptitle(path.parent.name)
    return save(figure, path.parent / "curves.png")


def plot_pairs(path: Path) -> list[Path]:
    """β' of every pair, at the mean η of the run, against the cosine of its two items.

    What the method wants is seen at a glance: alike = hard = low β'.
    """
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    cosine = np.array([float(row[3]) for row in rows])
    lam = np.array([float(row[5]) for row in rows])
    beta0 = read_object(path.parent / "run.json")["settings"]["beta0"]
    log = path.parent / "log.jsonl"
    eta = [record["eta"] for record in read_log(log)] if log.exists() else [1.0]
    beta = np.mean(eta) * lam * beta0

    figure, (axis,) = panels(1, 4.2, 3.2)
    axis.plot(cosine, beta, ".", color="0.3", markersize=3, label="a pair")
    axis.axhline(beta0, linestyle="--", color="black", label="β0, plain DPO")
    axis.set_xlabel("cosine of chosen and rejected item")
    axis.set_ylabel("β' = η λ β0")
    axis.set_ylim(0, None)
    spread = f"η {np.mean(eta):.2f} ({min(eta):.2f} to {max(eta):.2f})"
    axis.set_title(f"{len(rows)} pairs, {spread}", fontsize=9)
    axis.legend(fontsize=8)
    return save(figure, path.parent / "pairs.png")


DRAWN: list[tuple[str, Callable[[Path], list[Path]]]] = [
    ("log.jsonl", plot_log),
    ("pairs.tsv", plot_pairs),
    ("metrics.json", plot_evaluation),
    ("results.json", plot_results),
    ("results-*.json", plot_ablation),
    ("noise.json", plot_noise),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    written = plot_run(args.run)
    if not written:
        raise InputError(
            f"{args.run}: neither log.jsonl nor a file of results in it or below, expected the "
            "--out folder of a command")
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
