"""Figures of results, of `hanorec.studies.plots`: differences between rows, similarity, noise.

Each function returns a figure and writes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from hanorec.studies.figures import MARKERS, STYLES, in_order, panels, percent, row_names
from hanorec.studies.stages import SHUFFLED
from hanorec.studies.tables import CONTROL, compare_rows

METRIC = "NDCG@3"

# Rows far from all others, named with their values instead of drawn.
LANDMARKS = ("chance", "popularity", SHUFFLED, "oracle")

Compared = Mapping[str, Mapping[str, Any]]  # candidate set -> what `compare_rows` returns


def compare_evaluation(sets: Mapping[str, Any]) -> tuple[str, Compared]:
    """Of a metrics.json of evaluate.py: the row that the others are held to, and the comparison.

    That row is DPO where there is one, else SFT, the base, or popularity.
    """
    names = row_names(next(iter(sets.values()))["policies"])
    held_to = [name for name in (CONTROL, "SFT", "base") if name in names.values()]
    control = held_to[0] if held_to and len(names) > 1 else "popularity"
    compared = {}
    for kind, one in sets.items():
        rows = {name: one["policies"][path] for path, name in names.items()}
        rows["popularity"] = one["popularity"]
        rows = {name: {**row, "users": one["users"]} for name, row in rows.items()}
        compared[kind] = compare_rows([rows], control, [METRIC])
        chance = one["chance"]["metrics"][METRIC]["value"]
        compared[kind]["rows"]["chance"] = {"values": {METRIC: [chance]}}
    return control, compared


def compare_demo(seeds: Sequence[Mapping[str, Any]]) -> Compared:
    """Of a results.json of the demo: each row against DPO, over users and over seeds."""
    compared = {}
    for kind in seeds[0]:
        sets = []
        for seed in seeds:
            one, rows = seed[kind], {}
            for name, values in one["NDCG"].items():
                rows[name] = {
                    "metrics": one["rows"][name], "rows": {METRIC: values}, "users": one["users"]}
            sets.append(rows)
        compared[kind] = compare_rows(sets, CONTROL, [METRIC])
        chance = [seed[kind]["rows"]["chance"][METRIC]["value"] for seed in seeds]
        compared[kind]["rows"]["chance"] = {"values": {METRIC: chance}}
    return compared


def draw_differences(name: str, control: str, sets: Compared) -> Figure:
    """Each row's NDCG@3 minus that of the control, paired by user; beside it the row's own.

    The thick bar is the 95% interval over users, the thin one that over seeds.
    """
    first = next(iter(sets.values()))["rows"]
    rows = [row for row in in_order(first) if row not in LANDMARKS or row == control]
    y = np.arange(len(rows))[::-1]
    figure, axes = panels(len(sets), 4.6, 1.5 + 0.23 * len(rows), sharey=True)
    for axis, (kind, one) in zip(axes, sets.items(), strict=True):
        for place, row in zip(y, rows, strict=True):
            entry = one["rows"][row]
            _draw_difference(axis, place, entry.get("against_control"))
            axis.annotate(
                f"{percent(entry['values'][METRIC]):.1f}", (1.02, place),
                xycoords=("axes fraction", "data"), va="center", fontsize=8,
                annotation_clip=False)
        axis.annotate(
            f"{METRIC}, %", (1.02, 1.01), xycoords="axes fraction", va="bottom", fontsize=7)
        axis.axvline(0, color="black", linestyle=":", linewidth=1)
        axis.set_xlabel(f"{METRIC} minus that of {control}, points")
        axis.set_title(_caption(kind, one), fontsize=9)
        axis.margins(y=0.5 / len(rows))
    axes[0].set_yticks(y, rows, fontsize=8)
    several = next(iter(sets.values()))["seeds"] > 1
    bars = "thick: over users, thin: over seeds" if several else "over users"
    figure.suptitle(f"{name}: paired differences, 95% intervals ({bars})", fontsize=10)
    return figure


def _draw_difference(axis: Any, place: float, test: Mapping[str, Any] | None) -> None:
    """One row at its place on the y-axis; an open dot is the control itself."""
    if test is None:
        axis.plot(0, place, "o", color="black", markerfacecolor="white", markersize=4)
        return
    over_users = [100 * test["low"], 100 * test["high"]]
    axis.plot(over_users, [place, place], color="0.6", linewidth=5, solid_capstyle="butt")
    if test["over_seeds"]:
        over_seeds = [100 * end for end in test["over_seeds"]]
        axis.plot(over_seeds, [place, place], color="black", linewidth=1)
    axis.plot(100 * test["difference"], place, "o", color="black", markersize=4)


def _caption(kind: str, one: Mapping[str, Any]) -> str:
    """Candidate set, how many users and seeds, and the landmarks, two a line."""
    seeds = "1 seed" if one["seeds"] == 1 else f"{one['seeds']} seeds"
    lines = [f"{kind} candidates, {one['users']} users, {seeds}"]
    marks = []
    for row in LANDMARKS:
        if row in one["rows"]:
            marks.append(f"{row} {percent(one['rows'][row]['values'][METRIC]):.1f}")
    for first in range(0, len(marks), 2):
        lines.append(", ".join(marks[first : first + 2]))
    return "\n".join(lines)


def draw_similarity(name: str, policies: Mapping[str, Mapping[str, list[float]]]) -> Figure:
    """EV-4: left the curve before and after each stage, right the change.

    "Weak get weaker" wants the change to be below zero on the left.
    """
    before = next(iter(policies.values()))["before"]
    group = range(1, len(before) + 1)
    figure, (level, change) = panels(2, 4, 3.2)
    level.plot(group, before, "-", color="black", linewidth=2, label="before training")
    names = row_names(policies)
    of_row = {names[path]: curve for path, curve in policies.items()}
    looks = zip(in_order(of_row), STYLES * 9, MARKERS * 9, strict=False)
    for row, style, marker in looks:
        curve = of_row[row]
        look = {"marker": marker, "markersize": 4, "color": "0.4", "label": row}
        level.plot(group, curve["after"], style, **look)
        change.plot(group, np.subtract(curve["after"], curve["before"]), style, **look)
    change.axhline(0, color="black", linewidth=1)
    level.set_ylabel("mean cos(H, X)")
    change.set_ylabel("mean cos(H, X), after less before")
    for axis in (level, change):
        axis.set_xlabel("tenth of the items, least alike first")
    level.legend(fontsize=8)
    figure.suptitle(f"{name}: do weak pairs of image and text get weaker?", fontsize=10)
    return figure


def draw_noise(name: str, stored: Mapping[str, Any]) -> Figure:
    """The loss of a language model under HN-9 against sigma_n.

    A line for each mode and choice of layers; the bar is a deviation over draws.
    """
    figure, (axis,) = panels(1, 5, 3.6)
    looks = zip(stored["curves"], STYLES * 9, MARKERS * 9, strict=False)
    for number, (curve, style, marker) in enumerate(looks):
        axis.errorbar(
            curve["sigma"], curve["mean"], curve["deviation"],
            linestyle=style, marker=marker, markersize=4, capsize=2,
            color="0.1" if number < len(STYLES) else "0.6", label=curve["name"])
    axis.axhline(stored["clean"], color="black", linewidth=1, label="without noise")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.set_xlabel("σ_n")
    axis.set_ylabel("loss of the noisy model, nats a token")
    axis.legend(fontsize=7)
    figure.suptitle(name)
    return figure
