"""The three experiments of `hanorec.studies.map`: all cells of each, over the seeds."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hanorec.base.files import read_json, write_json
from hanorec.studies.map_claims import Cells
from hanorec.studies.map_noise import cosines
from hanorec.studies.map_predictions import MIDDLE, exchanged_cell, tuned_cell
from hanorec.studies.map_rows import (
    BETA0,
    CONTROL,
    GRID,
    LABELS,
    TUNED,
    WEIGHTS,
    epoch_cell,
    epoch_run,
    epoch_runs,
    label_cell,
    noise_cells,
)
from hanorec.studies.map_world import Measures, World
from hanorec.studies.runs import folder_name, timed

METRIC = "NDCG@3"  # on validation: by it beta0 and epoch are chosen


def run_noise(worlds: Sequence[World], flags: Sequence[str]) -> Cells:
    """E1: each cell read at its end, with the cosines of its step at the start and at the end."""
    found: dict[str, list[Measures]] = defaultdict(list)
    for world in worlds:
        for cell, own in noise_cells().items():
            print(f"\n{world.here}: E1, {cell}")
            control = "" if cell == CONTROL else CONTROL
            out = world.policy("E1", cell, [*flags, *own], control)
            (measured,) = world.read("E1", cell, [out])
            for name, adapter in (("start", None), ("end", out)):
                where = f"{cell}, cosine, {name}"
                measured[f"cosine, {name}"] = kept_cosines(world, where, flags, own, adapter)
            found[cell].append(measured)
    return found


def kept_cosines(
    world: World, name: str, flags: Sequence[str], own: Sequence[str], adapter: Path | None,
) -> list[float]:
    """`cosines` of a cell with these flags of its own, computed once and kept under this name."""
    if own == noise_cells()[CONTROL]:
        return [1.0]
    kept = world.folder("E1", "cosines") / f"{folder_name(name)}.json"
    if not kept.exists():
        step = world.dpo_flags([*flags, *own])
        clean = world.dpo_flags([*flags, *noise_cells()[CONTROL]])
        timed(
            world.spent("E1", name), lambda: write_json(kept, cosines(step, clean, adapter)))
    return read_json(kept)


def run_labels(worlds: Sequence[World], flags: Sequence[str]) -> Cells:
    """E2: each row with each set of labels, on right labels of users held out."""
    found: dict[str, list[Measures]] = defaultdict(list)
    for world in worlds:
        for labels, wrong in LABELS.items():
            for row, own in WEIGHTS.items():
                cell = label_cell(row, labels)
                print(f"\n{world.here}: E2, {cell}")
                control = "" if row == CONTROL else label_cell(CONTROL, labels)
                out = world.policy("E2", cell, [*flags, *own], control, wrong)
                found[cell] += world.read("E2", cell, [out])
    return found


def run_epochs(
    worlds: Sequence[World], flags: Sequence[str], reads: Sequence[int],
) -> tuple[Cells, dict[str, tuple[str, int]]]:
    """E3: validation after each epoch of `reads`; then each row on test, at its own best setting.

    Returns:
        The cells, and tuned cell -> (run, epoch), those with the highest mean `METRIC` on
        validation; of equal ones the first.
    """
    flags = [*flags, "--epochs", str(reads[-1]), "--keep-epochs", *map(str, reads)]
    found: dict[str, list[Measures]] = defaultdict(list)
    for world in worlds:
        for run, (control, own) in epoch_runs().items():
            print(f"\n{world.here}: E3, {run}")
            out = world.policy("E3", run, [*flags, *own], control)
            kept = [out / f"epoch-{epoch}" for epoch in reads]
            measured = world.read("E3", run, kept, "val")
            for epoch, one in zip(reads, measured, strict=True):
                found[epoch_cell(run, epoch)].append(one)

    run = epoch_run(CONTROL, "random", BETA0)
    middle = best(found, [epoch_cell(run, epoch) for epoch in reads[1:-1]])
    found[f"{run}, {MIDDLE}"] = found[middle]

    chosen = {}
    for negatives, beta0s in GRID.items():
        for row in TUNED:
            grid = {}
            for beta0 in beta0s:
                run = epoch_run(row, negatives, beta0)
                grid |= {epoch_cell(run, epoch): (run, epoch) for epoch in reads}
            cell = tuned_cell(row, negatives)
            run, epoch = chosen[cell] = grid[best(found, list(grid))]
            for world in worlds:
                adapter = world.folder("E3", run) / f"epoch-{epoch}"
                name = f"{run}, epoch {epoch}"
                print(f"\n{world.here}: E3, {name}, test")
                found[cell] += world.read("E3", name, [adapter])
                found[exchanged_cell(row, negatives)] += world.read(
                    "E3", name, [adapter], exchanged=True)
    return found, chosen


def best(found: Mapping[str, Sequence[Measures]], cells: Sequence[str]) -> str:
    """The first of the cells with the highest mean of `METRIC` over the seeds."""
    return max(cells, key=lambda cell: np.mean([np.mean(one[METRIC]) for one in found[cell]]))
