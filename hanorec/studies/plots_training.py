"""Figures of training, of `hanorec.studies.plots`: the curves of a run, step by step or by epoch.

Each function returns a figure and writes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hanorec.studies.figures import STYLES, panels

PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # behind a label

Records = Sequence[Mapping[str, Any]]  # of a log.jsonl


@dataclass(frozen=True)
class Panel:
    """label: of the y-axis, with the unit. lines: name in the log -> in the legend.

    reference: a value to hold the lines to, and what it is.
    """

    label: str
    lines: Mapping[str, str]
    reference: tuple[float, str] | None = None


def draw_curves(records: Records, name: str, facts: Mapping[str, Any]) -> Figure:
    """The curves of SFT or DPO; the band spans the pairs of a step, from smallest to largest.

    Args:
        name: the run's, for the title. facts: its run.json, or {}.
    """
    if "margin" in records[0]:
        noisy = bool(facts.get("sigma_n"))
        shown = dpo_panels(facts.get("settings", {}), "noisy policy" if noisy else "policy")
        title = f"{name}, σ_n = {facts['sigma_n']:g}" if noisy else name
    else:
        shown, title = SFT_PANELS, name
    return draw_panels(records, shown, title, "step", "optimizer step")


SFT_PANELS = [
    Panel("loss,\nnats a token of the answer", {"loss": "loss"}),
    Panel("norm of the gradient,\nbefore clipping", {"gradient_norm": "norm"}),
]


def dpo_panels(settings: Mapping[str, Any], policy: str) -> list[Panel]:
    """All that a run of DPO or HaNoRec logs. policy: the one that the loss has seen."""
    start = math.log(2), "ln 2: h = 0"
    if any(settings.get(added) for added in ("normalised", "kl_coef", "alignment_coef")):
        start = None  # the loss is not -log σ(β' h) alone
    beta0 = settings.get("beta0")
    rewards = {"chosen_reward": "chosen", "rejected_reward": "rejected", "margin": "margin"}
    return [
        Panel(f"loss of the\n{policy}, nats", {"loss": "loss"}, start),
        Panel(f"rewards of the\n{policy}, nats", rewards),
        Panel(f"share of pairs with h > 0,\n{policy}", {"accuracy": "share"}, (0.5, "1/2: a coin")),
        Panel("λ, hardness", {"lambda": "λ"}, (0.5, "1/2: Δ = 0")),
        Panel("η, responsiveness", {"eta": "η"}, (1, "1: at the start")),
        Panel("β' = η λ β0", {"beta": "β'"}, None if beta0 is None else (beta0, "β0")),
        Panel(f"KL of the {policy},\nnats a token", {"kl": "KL"}),
        Panel("norm of the gradient,\nbefore clipping", {"gradient_norm": "norm"}),
    ]


# One modality alone has no branches to compare, so the log of such a run lacks some of these.
BRMRS_PANELS = [
    Panel("Recall@20", {
        "valid_Recall@20": "fusion", "valid_Recall@20_t": "text", "valid_Recall@20_v": "image"}),
    Panel("share of targets where\nthe fused margin is largest", {"valid_win": "share"}),
    Panel("margin,\nin units of the scores", {
        "valid_gap_f": "fusion", "valid_gap_t": "text", "valid_gap_v": "image"}),
    Panel("share of targets,\nin the top 20 of", {
        "valid_unique_t": "text, not image", "valid_unique_v": "image, not text",
        "valid_synergy": "fusion alone", "valid_degradation": "a branch, not fusion"}),
]


def draw_brmrs(records: Records, name: str) -> Figure:
    """BR-MRS by epoch, on validation."""
    return draw_panels(records, BRMRS_PANELS, f"{name}, validation", "epoch", "epoch")


def draw_panels(
    records: Records, shown: Sequence[Panel], title: str, x: str, x_label: str,
) -> Figure:
    """The first panel, and those with a line that is not constant; in two rows if over three."""
    shown = [shown[0], *(panel for panel in shown[1:] if moves(records, panel))]
    columns = len(shown) if len(shown) <= 3 else -(-len(shown) // 2)
    figure, axes = panels(len(shown), 3.4, 2.6, columns)
    places = [record[x] for record in records]
    marker = "." if len(records) == 1 else None
    for axis, panel in zip(axes, shown, strict=True):
        lines = {name: of for name, of in panel.lines.items() if logged(records, name)}
        for (line, label), style in zip(lines.items(), STYLES, strict=False):
            values = logged(records, line)
            axis.plot(places, values, style, color="black", marker=marker, label=label)
            if band := logged(records, f"{line}_min"):
                axis.fill_between(places, band, logged(records, f"{line}_max"), color="0.85")
        if panel.reference:
            value, means = panel.reference
            axis.axhline(value, color="0.5", linewidth=1)
            axis.annotate(
                means, (1, value), (-2, 2), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", fontsize=7, bbox=PAPER)
        axis.margins(y=0.12)
        axis.set_ylabel(panel.label, fontsize=8)
        if len(lines) > 1:
            axis.legend(framealpha=0.7, fontsize=7)
    for axis in axes[-columns:]:
        axis.set_xlabel(x_label)
    figure.suptitle(title)
    return figure


def logged(records: Records, name: str) -> list[float]:
    """A column of the log; [] where it has none."""
    values = [record.get(name) for record in records]
    return [] if None in values else values


def moves(records: Records, panel: Panel) -> bool:
    """Whether a line of the panel, or its band, changes; that of a single step always does."""
    for line in panel.lines:
        for column in (line, f"{line}_min", f"{line}_max"):
            values = logged(records, column)
            if values and (len(values) == 1 or np.ptp(values) > 1e-9):
                return True
    return False
