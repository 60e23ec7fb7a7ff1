"""Figures of a run folder, readable in grey: python -m hanorec.plots RUN

Drawn beside the file that each is made from, in RUN and in the folders below it. Needs matplotlib (pip install -e .[plots]).
    log.jsonl       curves.png       loss, rewards, λ, η and β' of a training run; of BR-MRS its branches
    pairs.tsv       pairs.png        β' of each pair against how alike its two items are
    metrics.json    metrics.png      of evaluate.py: each policy with its interval
                    similarity.png   and with --similarity (EV-4): are weak pairs of image and text weaker after training?
    results.json    metrics.png      of the demo: every row
    results-*.json  ablation-*.png  of the ablation: each row's difference to plain DPO
    noise.json      noise.png        of benchmarks/noise_curve.py: loss against the strength of the noise
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from PIL import Image

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import read_json, read_object
from hanorec.studies.stages import ROWS

STYLES = ["-", "--", ":", "-."]  # lines are told apart by these and by markers, never by colour


MARKERS = ["o", "s", "^", "D", "v", "x"]


def plot_run(folder: Path) -> list[Path]:
    """Draw all that the folder and its subfolders hold; returns the files written."""
    written = []
    for name, draw in DRAWN:
        for path in sorted(Path(folder).rglob(name)):
            if path.stat().st_size:  # a run may have just begun
                written += draw(path)
    return written


def save(figure: Figure, path: Path) -> list[Path]:
    """In 32 shades of grey, so a third of the bytes."""
    figure.savefig(path, dpi=100)
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("L").quantize(32)
    small.save(path, optimize=True)
    return [path]


def panels(count: int, width: float = 3.2, height: float = 2.8, **options: Any) -> tuple[Figure, Sequence[Any]]:
    """A figure of `count` axes side by side."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), constrained_layout=True, squeeze=False, **options)
    return figure, axes[0]


def bars(axis: Any, names: Sequence[str], mean: np.ndarray, error: np.ndarray, known: Sequence[str]) -> None:
    """Lying bars, the first on top; error (2, n): how far each interval reaches down and up. known: rows that no policy made, drawn pale."""
    y = np.arange(len(names))[::-1]
    axis.barh(y, mean, color=["0.9" if name in known else "0.6" for name in names], edgecolor="black")
    axis.errorbar(mean, y, xerr=error, fmt="none", color="black", capsize=3)
    axis.set_yticks(y, names)


def plot_log(path: Path) -> list[Path]:
    """Training curves of one stage. The band spans the smallest and the largest value in a step."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if "valid_Recall@20" in records[0]:
        return plot_brmrs(path, records)
    step = [r["step"] for r in records]
    shown = [["loss"], ["gradient_norm"]]
    if "margin" in records[0]:
        shown = [["loss"], ["chosen_reward", "rejected_reward", "margin"], ["accuracy"], ["lambda", "eta"], ["beta"], ["gradient_norm"]]
    figure, axes = panels(len(shown))
    for axis, names in zip(axes, shown, strict=True):
        for name, style in zip(names, STYLES, strict=False):
            axis.plot(step, [r[name] for r in records], style, color="black", label={"lambda": "λ", "eta": "η", "beta": "β'"}.get(name, name))
            if f"{name}_min" in records[0]:
                axis.fill_between(step, [r[f"{name}_min"] for r in records], [r[f"{name}_max"] for r in records], color="0.8")
        axis.set_xlabel("optimizer step")
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(path.parent.name)
    return save(figure, path.parent / "curves.png")


def plot_brmrs(path: Path, records: list[dict[str, Any]]) -> list[Path]:
    """BR-MRS by epoch, on validation: Recall@20 of each branch, how often the fused margin wins, the margins, and who finds the target."""
    names = {"Recall@20": ["Recall@20", "Recall@20_t", "Recall@20_v"], "win rate": ["win"], "margin": ["gap_f", "gap_t", "gap_v"],
             "share of targets": ["unique_t", "unique_v", "synergy", "degradation"]}
    shown = {title: [name for name in part if f"valid_{name}" in records[0]] for title, part in names.items()}
    shown = {title: part for title, part in shown.items() if part}  # one modality alone has branches to compare with nothing
    figure, axes = panels(len(shown), 3.4, 3)
    for axis, (title, part) in zip(axes, shown.items(), strict=True):
        for name, style in zip(part, STYLES, strict=False):
            axis.plot([r["epoch"] for r in records], [r[f"valid_{name}"] for r in records], style, color="black", label=name)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
        axis.legend(framealpha=0.7, fontsize=8)
    figure.suptitle(path.parent.name)
    return save(figure, path.parent / "curves.png")


def plot_pairs(path: Path) -> list[Path]:
    """β' of every pair, at the mean η of the run, against the cosine of its two items; the arrow of the method: alike = hard = low β'."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    cosine, lam = (np.array([float(row[column]) for row in rows]) for column in (3, 5))
    beta0 = read_object(path.parent / "run.json")["settings"]["beta0"]
    log = path.parent / "log.jsonl"
    eta = [json.loads(line)["eta"] for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else [1.0]
    beta = np.mean(eta) * lam * beta0
    figure, (axis,) = panels(1, 4.2, 3.2)
    axis.plot(cosine, beta, ".", color="0.3", markersize=3, label="a pair")
    axis.axhline(beta0, linestyle="--", color="black", label="β0, plain DPO")
    axis.set_xlabel("cosine of chosen and rejected item")
    axis.set_ylabel("β' = η λ β0")
    axis.set_ylim(0, None)
    axis.set_title(f"{len(rows)} pairs, η {np.mean(eta):.2f} ({min(eta):.2f} to {max(eta):.2f})", fontsize=9)
    axis.legend(fontsize=8)
    return save(figure, path.parent / "pairs.png")


def plot_evaluation(path: Path) -> list[Path]:
    """Of evaluate.py: NDCG@3 of every policy with its interval, and the similarity study if it is there."""
    report = read_object(path)
    if "sets" not in report:  # of train_brmrs.py, or of reranking
        return []
    figure, axes = panels(len(report["sets"]), 4.6, 1.6 + 0.3 * len(next(iter(report["sets"].values()))["policies"]), sharey=True)
    for axis, (kind, one) in zip(axes, report["sets"].items(), strict=True):
        rows = {"chance": one["chance"], "popularity": one["popularity"], **{Path(name).name: policy for name, policy in one["policies"].items()}}
        found = [row["metrics"]["NDCG@3"] for row in rows.values()]
        mean = np.array([f["value"] for f in found])
        bars(axis, list(rows), mean, np.abs(np.array([f["interval"] or [f["value"]] * 2 for f in found]).T - mean), ("chance", "popularity"))
        axis.set_xlabel("NDCG@3, 95% interval over users")
        axis.set_title(f"{kind} candidates", fontsize=10)
    written = save(figure, path.parent / "metrics.png")
    return written + (plot_similarity(path.parent / "similarity.png", report["similarity"]) if "similarity" in report else [])


def plot_similarity(out: Path, policies: dict[str, dict[str, list[float]]]) -> list[Path]:
    """EV-4: left the curve before and after each stage, right the change, which "weak get weaker" wants below zero on the left."""
    figure, (level, change) = panels(2, 4, 3)
    group = range(1, len(next(iter(policies.values()))["before"]) + 1)
    level.plot(group, next(iter(policies.values()))["before"], "-", color="black", linewidth=2, label="before training")
    for (name, curve), style, marker in zip(policies.items(), STYLES * 9, MARKERS * 9, strict=False):
        level.plot(group, curve["after"], style, marker=marker, markersize=4, color="0.4", label=Path(name).name)
        change.plot(group, np.subtract(curve["after"], curve["before"]), style, marker=marker, markersize=4, color="0.4", label=Path(name).name)
    change.axhline(0, color="black", linewidth=1)
    level.set_ylabel("mean cos(H, X)")
    change.set_ylabel("change of it")
    for axis in (level, change):
        axis.set_xlabel("tenth of the items, least alike first")
    level.legend(fontsize=8)
    return save(figure, out)


def plot_results(path: Path) -> list[Path]:
    """NDCG@3 of every row of the demo on both candidate sets, the bar over seeds or the bootstrap interval."""
    seeds = read_object(path).get("seeds")
    if not isinstance(seeds, list):  # the ablation of BR-MRS has a table instead
        return []
    figure, axes = panels(len(seeds[0]), 5.5, 4, sharey=True)
    for axis, kind in zip(axes, seeds[0], strict=True):
        names = [name for name in ROWS if name in seeds[0][kind]["rows"]]
        found = [[seed[kind]["rows"][name]["NDCG@3"] for name in names] for seed in seeds]
        mean = np.array([[f["value"] for f in row] for row in found]).mean(0)
        if len(seeds) > 1:
            error = np.tile(np.std([[f["value"] for f in row] for row in found], axis=0, ddof=1), (2, 1))
        else:
            error = np.abs(np.array([f["interval"] or [f["value"]] * 2 for f in found[0]]).T - mean)
        bars(axis, names, mean, error, ("chance", "popularity", "oracle"))
        axis.set_xlabel("NDCG@3")
        axis.set_title(f"{kind} candidates")
    return save(figure, path.parent / "metrics.png")


def plot_ablation(path: Path) -> list[Path]:
    """Each row's difference to plain DPO in NDCG@3: the thick bar is the interval over users, the thin one that over seeds."""
    written = []
    for data, sets in read_json(path).items():
        names = [name for name, entry in next(iter(sets.values()))["rows"].items() if "against_control" in entry]
        figure, axes = panels(len(sets), 4.6, 1.2 + 0.22 * len(names), sharey=True)
        y = np.arange(len(names))[::-1]
        for axis, (kind, one) in zip(axes, sets.items(), strict=True):
            for place, name in zip(y, names, strict=True):
                test = one["rows"][name]["against_control"]
                axis.plot([100 * test["low"], 100 * test["high"]], [place, place], color="0.6", linewidth=5, solid_capstyle="butt")
                if test["over_seeds"]:
                    axis.plot([100 * x for x in test["over_seeds"]], [place, place], color="black", linewidth=1)
                axis.plot(100 * test["difference"], place, "o", color="black", markersize=4)
            axis.axvline(0, color="black", linestyle=":", linewidth=1)
            axis.set_xlabel("NDCG@3 minus that of DPO, points")
            axis.set_title(f"{data}, {kind} candidates, {one['seeds']} seeds", fontsize=9)
        axes[0].set_yticks(y, names, fontsize=8)
        written += save(figure, path.with_name(f"{path.stem.replace('results', 'ablation')}-{data}.png"))
    return written


def plot_noise(path: Path) -> list[Path]:
    """The loss of a language model under HN-9 against σ_n, a line for each mode and choice of layers; the bar is a deviation over draws."""
    stored = read_object(path)
    figure, (axis,) = panels(1, 5, 3.4)
    for number, (curve, style, marker) in enumerate(zip(stored["curves"], STYLES * 9, MARKERS * 9, strict=False)):
        axis.errorbar(curve["sigma"], curve["mean"], curve["deviation"], linestyle=style, marker=marker, markersize=4, capsize=2,
                      color="0.1" if number < len(STYLES) else "0.6", label=curve["name"])
    axis.axhline(stored["clean"], color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.set_xlabel("σ_n")
    axis.set_ylabel("nats a token; the line is without noise")
    axis.legend(fontsize=7)
    return save(figure, path.parent / "noise.png")


DRAWN: list[tuple[str, Callable[[Path], list[Path]]]] = [
    ("log.jsonl", plot_log), ("pairs.tsv", plot_pairs), ("metrics.json", plot_evaluation), ("results.json", plot_results),
    ("results-*.json", plot_ablation), ("noise.json", plot_noise)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    written = plot_run(args.run)
    if not written:
        raise InputError(f"{args.run}: neither log.jsonl nor a file of results in it or below, expected the --out folder of a command")
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
