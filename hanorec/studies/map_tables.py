"""OUT/map.md of `hanorec.studies.map`: the verdict on each prediction, and the tables behind it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hanorec.studies.map_claims import (
    POINTS,
    Cells,
    Estimate,
    Order,
    Part,
    Prediction,
    estimate,
    higher,
    judge,
)
from hanorec.studies.map_predictions import E1, E2, exchanged_cell, of_epochs, tuned_cell
from hanorec.studies.map_rows import (
    CONTROL,
    GRID,
    LABELS,
    TUNED,
    WEIGHTS,
    epoch_cell,
    epoch_runs,
    label_cell,
    noise_cells,
)
from hanorec.studies.tables import head, line


def page(results: Mapping[str, dict[str, Any]]) -> str:
    """Markdown of the experiments that are there: `hanorec.studies.map` has their form."""
    lines = []
    for experiment, one in results.items():
        cells, shared = one["cells"], one["shared"]
        lines += ["", f"**{experiment}**: {caption(one)}", ""]
        lines += head(["", "predicted", "", "found"])
        for prediction in predictions(experiment, one["reads"]):
            found, figures = judge(cells, prediction, shared)
            shown = "; ".join(figure(part, value) for part, value in figures)
            lines.append(line([prediction.name, prediction.text, f"**{found}**", shown]))
        lines += ["", *TABLES[experiment](one, cells, shared)]
    return "\n".join(lines).strip() + "\n"


def predictions(experiment: str, reads: Sequence[int]) -> list[Prediction]:
    """Those of an experiment; reads: the epochs after which E3 was read."""
    return {"E1": E1, "E2": E2, "E3": of_epochs(reads)}[experiment]


def caption(one: Mapping[str, Any]) -> str:
    """What a run of the experiment was: pairs, steps, epochs, seeds, users."""
    run, first = one["run"], next(iter(one["cells"].values()))
    users = len(first[0]["h"]) if one["shared"] else sum(len(of_seed["h"]) for of_seed in first)
    return (
        f"{run['pairs']} pairs, {run['steps']} steps, {run['epochs']} epoch(s) a run; "
        f"{len(one['seeds'])} seed(s), {users} users in all; {one['cpu_seconds'] / 3600:.1f} CPU "
        "hours. NDCG@3 and accuracy in percent and points, 95% intervals over users and seeds.")


def figure(part: Part | Order, found: Estimate) -> str:
    """A part's figure, as the table of verdicts has it."""
    if isinstance(part, Order):
        what = f"Spearman of {' and '.join(part.measures)}"
    else:
        terms = []
        for cell, weight in part.weights.items():
            times = "" if abs(weight) == 1 else f"{abs(weight):g} · "
            terms.append(f"{'− ' if weight < 0 else ''}{times}({cell})")
        what = f"{part.measure} of {' '.join(terms)}"
    return f"{what}: {shown(found, signed=True)}"


def shown(found: Estimate, signed: bool = False) -> str:
    sign = "+" if signed else ""
    ends = f"[{found.low:{sign}.2f}, {found.high:{sign}.2f}]"
    return f"{found.mean:{sign}.2f} {ends if math.isfinite(found.low) else ''}".strip()


def value(cells: Cells, measure: str, cell: str, shared: bool) -> str:
    return shown(estimate(cells, Part(measure, {cell: 1.0}), shared))


def gap(cells: Cells, measure: str, cell: str, control: str, shared: bool) -> str:
    """Difference of a cell to its control, nothing for the control itself."""
    if cell == control:
        return ""
    return shown(estimate(cells, higher(measure, cell, control), shared), signed=True)


# ---- a table for each experiment ----


def noise_table(one: Mapping[str, Any], cells: Cells, shared: bool) -> list[str]:
    lines = head(["row", "cosine, start", "cosine, end", "clean h", "accuracy", "NDCG@3", "− DPO"])
    for cell in noise_cells():
        found = [
            value(cells, measure, cell, shared)
            for measure in ("cosine, start", "cosine, end", "h", *reversed(POINTS))]
        lines.append(line([cell, *found, gap(cells, "NDCG@3", cell, CONTROL, shared)]))
    return lines


def label_table(one: Mapping[str, Any], cells: Cells, shared: bool) -> list[str]:
    lines = head(["labels", "row", "accuracy", "− DPO", "NDCG@3", "− DPO"])
    for labels in LABELS:
        control = label_cell(CONTROL, labels)
        for row in WEIGHTS:
            cell, found = label_cell(row, labels), []
            for measure in reversed(POINTS):
                found.append(value(cells, measure, cell, shared))
                found.append(gap(cells, measure, cell, control, shared))
            lines.append(line([labels, row, *found]))
    return lines


def epoch_table(one: Mapping[str, Any], cells: Cells, shared: bool) -> list[str]:
    """First validation after each epoch, then test at the setting that validation chose."""
    reads = one["reads"]
    lines = head(["NDCG@3, validation", *(f"epoch {epoch}" for epoch in reads)])
    for run in epoch_runs():
        found = [value(cells, "NDCG@3", epoch_cell(run, epoch), shared) for epoch in reads]
        lines.append(line([run, *found]))

    lines += ["", *head([
        "NDCG@3, test", "negatives", "chosen", "posters as trained", "− DPO", "exchanged",
        "− DPO"])]
    for negatives in GRID:
        for row in TUNED:
            cell = tuned_cell(row, negatives)
            run, epoch = one["chosen"][cell]
            found = []
            for of_row in (tuned_cell, exchanged_cell):
                here, control = of_row(row, negatives), of_row(CONTROL, negatives)
                found.append(value(cells, "NDCG@3", here, shared))
                found.append(gap(cells, "NDCG@3", here, control, shared))
            lines.append(line([row, negatives, epoch_cell(run, epoch), *found]))
    return lines


TABLES = {"E1": noise_table, "E2": label_table, "E3": epoch_table}
