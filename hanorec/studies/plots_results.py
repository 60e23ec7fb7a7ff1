"""Figures of results, of `hanorec.studies.plots`: evaluations, tables, and the noise curve."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import ScalarFormatter

from hanorec.base.files import read_json, read_object
from hanorec.studies.figures import MARKERS, STYLES, bars, panels, reach, save
from hanorec.studies.stages import ROWS


def plot_evaluation(path: Path) -> list[Path]:
    """Of evaluate.py: NDCG@3 of every policy with its interval, and the similarity study if any."""
    report = read_object(path)
    if "sets" not in report:  # of train_brmrs.py, or of reranking
        return []

    policies = next(iter(report["sets"].values()))["policies"]
    figure, axes = panels(len(report["sets"]), 4.6, 1.6 + 0.3 * len(policies), sharey=True)
    for axis, (kind, one) in zip(axes, report["sets"].items(), strict=True):
        rows = {"chance": one["chance"], "popularity": one["popularity"]}
        rows |= {Path(name).name: policy for name, policy in one["policies"].items()}
        found = [row["metrics"]["NDCG@3"] for row in rows.values()]
        mean = np.array([metric["value"] for metric in found])
        bars(axis, list(rows), mean, reach(mean, found), ("chance", "popularity"))
        axis.set_xlabel("NDCG@3, 95% interval over users")
        axis.set_title(f"{kind} candidates", fontsize=10)
    written = save(figure, path.parent / "metrics.png")

    if "similarity" in report:
        written += plot_similarity(path.parent / "similarity.png", report["similarity"])
    return written


def plot_similarity(out: Path, policies: dict[str, dict[str, list[float]]]) -> list[Path]:
    """EV-4: left the curve before and after each stage, right the change.

    "Weak get weaker" wants the change to be below zero on the left.
    """
    before = next(iter(policies.values()))["before"]
    group = range(1, len(before) + 1)
    figure, (level, change) = panels(2, 4, 3)
    level.plot(group, before, "-", color="black", linewidth=2, label="before training")
    looks = zip(policies.items(), STYLES * 9, MARKERS * 9, strict=False)
    for (name, curve), style, marker in looks:
        look = {"marker": marker, "markersize": 4, "color": "0.4", "label": Path(name).name}
        level.plot(group, curve["after"], style, **look)
        change.plot(group, np.subtract(curve["after"], curve["before"]), style, **look)
    change.axhline(0, color="black", linewidth=1)
    level.set_ylabel("mean cos(H, X)")
    change.set_ylabel("change of it")
    for axis in (level, change):
        axis.set_xlabel("tenth of the items, least alike first")
    level.legend(fontsize=8)
    return save(figure, out)


def plot_results(path: Path) -> list[Path]:
    """NDCG@3 of every row of the demo on both candidate sets.

    The interval is the deviation over seeds, or the bootstrap interval of one seed.
    """
    seeds = read_object(path).get("seeds")
    if not isinstance(seeds, list):  # the ablation of BR-MRS has a table instead
        return []

    figure, axes = panels(len(seeds[0]), 5.5, 4, sharey=True)
    for axis, kind in zip(axes, seeds[0], strict=True):
        names = [name for name in ROWS if name in seeds[0][kind]["rows"]]
        values, found = [], []
        for seed in seeds:
            found = [seed[kind]["rows"][name]["NDCG@3"] for name in names]
            values.append([metric["value"] for metric in found])
        mean = np.mean(values, 0)
        if len(seeds) > 1:
            error = np.tile(np.std(values, axis=0, ddof=1), (2, 1))
        else:
            error = reach(mean, found)
        bars(axis, names, mean, error, ("chance", "popularity", "oracle"))
        axis.set_xlabel("NDCG@3")
        axis.set_title(f"{kind} candidates")
    return save(figure, path.parent / "metrics.png")


def plot_ablation(path: Path) -> list[Path]:
    """Each row's difference to plain DPO in NDCG@3.

    The thick bar is the interval over users, the thin one that over seeds.
    """
    written = []
    for data, sets in read_json(path).items():
        rows = next(iter(sets.values()))["rows"]
        names = [name for name, entry in rows.items() if "against_control" in entry]
        y = np.arange(len(names))[::-1]
        figure, axes = panels(len(sets), 4.6, 1.2 + 0.22 * len(names), sharey=True)
        for axis, (kind, one) in zip(axes, sets.items(), strict=True):
            for place, name in zip(y, names, strict=True):
                test = one["rows"][name]["against_control"]
                over_users = [100 * test["low"], 100 * test["high"]]
                level = [place, place]
                axis.plot(over_users, level, color="0.6", linewidth=5, solid_capstyle="butt")
                if test["over_seeds"]:
                    over_seeds = [100 * end for end in test["over_seeds"]]
                    axis.plot(over_seeds, level, color="black", linewidth=1)
                axis.plot(100 * test["difference"], place, "o", color="black", markersize=4)
            axis.axvline(0, color="black", linestyle=":", linewidth=1)
            axis.set_xlabel("NDCG@3 minus that of DPO, points")
            axis.set_title(f"{data}, {kind} candidates, {one['seeds']} seeds", fontsize=9)
        axes[0].set_yticks(y, names, fontsize=8)
        stem = path.stem.replace("results", "ablation")
        written += save(figure, path.with_name(f"{stem}-{data}.png"))
    return written


def plot_noise(path: Path) -> list[Path]:
    """The loss of a language model under HN-9 against σ_n.

    A line for each mode and choice of layers; the bar is a deviation over draws.
    """
    stored = read_object(path)
    figure, (axis,) = panels(1, 5, 3.4)
    looks = zip(stored["curves"], STYLES * 9, MARKERS * 9, strict=False)
    for number, (curve, style, marker) in enumerate(looks):
        axis.errorbar(
            curve["sigma"], curve["mean"], curve["deviation"],
            linestyle=style, marker=marker, markersize=4, capsize=2,
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
