"""Figures of a run folder, readable in grey: python -m hanorec.plots RUN

A folder with log.jsonl gets curves.png (loss, margin, the weights of HaRS; of BR-MRS its branches); one with results.json (the demo)
gets metrics.png; folders below are drawn too. Needs matplotlib (pip install -e .[plots]).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from hanorec.demo import ROWS
from hanorec.errors import InputError, run
from hanorec.files import read_json


def plot_run(folder: Path) -> list[Path]:
    """Draw all that the folder and its subfolders hold; returns the files written."""
    folder = Path(folder)
    written = []
    for log in sorted(folder.rglob("log.jsonl")):
        if log.stat().st_size:  # a run may have just begun
            written.append(plot_log(log))
    if (folder / "results.json").exists() and "seeds" in read_json(folder / "results.json"):  # the ablation of BR-MRS has a table instead
        written.append(plot_results(folder / "results.json"))
    return written


def plot_log(path: Path) -> Path:
    """Training curves of one stage. The band spans the smallest and the largest value in a step."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if "valid_Recall@20" in records[0]:
        return plot_brmrs(path, records)
    step = [r["step"] for r in records]
    panels = [["loss"], ["gradient_norm"]]
    if "margin" in records[0]:
        panels = [["loss"], ["chosen_reward", "rejected_reward", "margin"], ["accuracy"], ["lambda", "eta"], ["beta"], ["gradient_norm"]]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8), constrained_layout=True)
    for axis, names in zip(axes, panels, strict=True):
        for name, style in zip(names, ("-", "--", ":"), strict=False):
            axis.plot(step, [r[name] for r in records], style, color="black", label=name)
            if f"{name}_min" in records[0]:
                axis.fill_between(step, [r[f"{name}_min"] for r in records], [r[f"{name}_max"] for r in records], color="0.8")
        axis.set_xlabel("optimizer step")
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(path.parent.name)
    out = path.parent / "curves.png"
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return out


def plot_brmrs(path: Path, records: list[dict[str, Any]]) -> Path:
    """BR-MRS by epoch, on validation: Recall@20 of each branch, how often the fused margin wins, the margins, and who finds the target."""
    names = {"Recall@20": ["Recall@20", "Recall@20_t", "Recall@20_v"], "win rate": ["win"], "margin": ["gap_f", "gap_t", "gap_v"],
             "share of targets": ["unique_t", "unique_v", "synergy", "degradation"]}
    panels = {title: [name for name in part if f"valid_{name}" in records[0]] for title, part in names.items()}
    panels = {title: part for title, part in panels.items() if part}  # one modality alone has branches to compare with nothing
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), constrained_layout=True, squeeze=False)
    for axis, (title, part) in zip(axes[0], panels.items(), strict=True):
        for name, style in zip(part, ("-", "--", ":", "-."), strict=False):
            axis.plot([r["epoch"] for r in records], [r[f"valid_{name}"] for r in records], style, color="black", label=name)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
        axis.legend(framealpha=0.7, fontsize=8)
    figure.suptitle(path.parent.name)
    out = path.parent / "curves.png"
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return out


def plot_results(path: Path) -> Path:
    """NDCG@3 of every row of the demo on both candidate sets, the bar over seeds or the bootstrap interval."""
    seeds = read_json(path)["seeds"]
    figure, axes = plt.subplots(1, len(seeds[0]), figsize=(5.5 * len(seeds[0]), 4), sharey=True, constrained_layout=True)
    for axis, kind in zip(np.atleast_1d(axes), seeds[0], strict=True):
        names = [name for name in ROWS if name in seeds[0][kind]["rows"]]
        found = [[seed[kind]["rows"][name]["NDCG@3"] for name in names] for seed in seeds]
        mean = np.array([[f["value"] for f in row] for row in found]).mean(0)
        if len(seeds) > 1:
            error = np.tile(np.std([[f["value"] for f in row] for row in found], axis=0, ddof=1), (2, 1))
        else:
            error = np.abs(np.array([f["interval"] or [f["value"]] * 2 for f in found[0]]).T - mean)
        y = np.arange(len(names))[::-1]
        axis.barh(y, mean, color=["0.9" if name in ("chance", "popularity", "oracle") else "0.6" for name in names], edgecolor="black")
        axis.errorbar(mean, y, xerr=error, fmt="none", color="black", capsize=3)
        axis.set_yticks(y, names)
        axis.set_xlabel("NDCG@3")
        axis.set_title(f"{kind} candidates")
    out = path.parent / "metrics.png"
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    written = plot_run(args.run)
    if not written:
        raise InputError(f"{args.run}: neither log.jsonl nor results.json in it or below, expected the --out folder of a command")
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
