"""A map of when HaRS and NoDO can help: three experiments, predicted first and judged after.

    python -m hanorec.studies.map --out OUT [--experiment E1 E2 E3] [--seeds 3]
        on Posterland, made anew for each seed
    python -m hanorec.studies.map --out OUT --model MODEL --data DATA [--sft FLAGS] [--noise FLAGS]
            [--labels FLAGS] [--over FLAGS] [--test FLAGS]
        on this data set

The same command again goes on where it stopped; an experiment at a time is the same as all at once.

    E1  noise kept in backward, or forgotten by it
    E2  which weights bear labels that are wrong
    E3  over-optimisation: one long run at a constant rate, read after the epochs of --reads

docs/map.md has the predictions with their reasons. FLAGS, one string each, are put behind the
defaults: those of train_sft.py, of train_dpo.py in each experiment, and of evaluate.py. OUT/E*.json
holds every user's values, OUT/map.md the verdicts and tables, of all experiments that are finished;
`python -m hanorec.studies.plots_map OUT/map.md FIGURES` draws them.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hanorec.base import command
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, write_json, write_text
from hanorec.base.flags import Parser
from hanorec.base.lock import lock_folder
from hanorec.base.terminal import aligned
from hanorec.studies import map_rows as rows
from hanorec.studies import stages

# Stage -> its default flags, and whose they are.
STAGES = {
    "sft": (rows.SFT, "train_sft.py"),
    "noise": (rows.KEPT_OR_FORGOTTEN, "train_dpo.py, E1"),
    "labels": (rows.WRONG_LABELS, "train_dpo.py, E2"),
    "over": (rows.OVER, "train_dpo.py, E3"),
    "test": (rows.TEST, "evaluate.py"),
}


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.map")
    result.add_argument("--out", required=True, type=Path)
    result.add_argument(
        "--experiment", nargs="+", choices=rows.SEEDS, default=list(rows.SEEDS), help="default all")
    result.add_argument(
        "--seeds", type=int,
        help="how many, from --seed on; default " + ", ".join(
            f"{count} in {name}" for name, count in rows.SEEDS.items()))
    result.add_argument("--seed", type=int, default=2025)
    result.add_argument(
        "--reads", type=int, nargs="+", default=list(rows.READS),
        help="epochs of E3 after which it is read, at least three; default %(default)s")
    result.add_argument("--data", help="folder in the native layout; none: Posterland")
    result.add_argument("--model", help="with --data: the checkpoint")
    for stage, (default, whose) in STAGES.items():
        result.add_argument(
            f"--{stage}", default="", help=f"{whose}, behind: {shlex.join(default)}")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

from hanorec.studies.map_experiments import run_epochs, run_labels, run_noise
from hanorec.studies.map_tables import page
from hanorec.studies.map_world import World
from hanorec.studies.runs import EVALUATION, TRAINING, check_both, settings

# Flags that this command sets itself, beside those of the rows.
SET_HERE = {
    "--out", "--model", "--data", "--seed", "--sft", "--reference", "--keep-epochs", "--adapter",
    "--sets", "--split",
}


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags, with those of each stage. InputError for what does not go together."""
    args = parser().parse_args(argv)

    if args.seeds is not None and not 1 <= args.seeds <= 10:
        raise InputError(f"--seeds {args.seeds}: expected 1 .. 10")
    if len(args.reads) < 3 or args.reads != sorted(set(args.reads)) or args.reads[0] < 1:
        raise InputError(
            f"--reads {' '.join(map(str, args.reads))}: expected at least three epochs from 1 on, "
            "ascending: a first, a last and what lies between")
    check_both(args.data, args.model)
    args.flags = {}
    for stage, (default, _) in STAGES.items():
        own, taken = shlex.split(getattr(args, stage)), SET_HERE.union(*rows.OWN.get(stage, []))
        for flag in own:
            if flag.startswith("--") and flag.partition("=")[0] in taken:
                raise InputError(
                    f"--{stage} {shlex.join(own)!r}: holds {flag}, expected flags without it; "
                    "this command sets it itself")
        args.flags[stage] = [*default, *own]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_command(argv)
    for experiment in args.experiment:
        check_flags(experiment, args)
    lock_folder(args.out)
    for experiment in args.experiment:
        worlds = []
        for seed in range(args.seed, args.seed + (args.seeds or rows.SEEDS[experiment])):
            world = World(
                args.out / f"seed-{seed}", args.model or str(stages.BASE), args.data, seed,
                args.flags["sft"], args.flags["test"])
            world.make()
            worlds.append(world)
        write_json(args.out / f"{experiment}.json", run_experiment(experiment, worlds, args))

    text = page(read_results(args.out))
    write_text(args.out / "map.md", text)
    print(f"{aligned(text)}\nwrote {args.out / 'map.md'}")


def check_flags(experiment: str, args: argparse.Namespace) -> None:
    """A wrong flag of any row ends the command before the first one trains."""
    places = ["--model", "M", "--data", "D"]
    settings(TRAINING["train_sft"], [*places, *args.flags["sft"]])
    settings(EVALUATION, [*places, *args.flags["test"]])
    stage = rows.STAGE[experiment]
    for own in rows.OWN[stage]:
        settings(TRAINING["train_dpo"], [*places, *args.flags[stage], *own])


def run_experiment(
    experiment: str, worlds: Sequence[World], args: argparse.Namespace,
) -> dict[str, Any]:
    """What E*.json holds: the cells, and what a reader of them has to know."""
    chosen, flags = {}, args.flags[rows.STAGE[experiment]]
    if experiment == "E1":
        cells = run_noise(worlds, flags)
    elif experiment == "E2":
        cells = run_labels(worlds, flags)
    else:
        cells, chosen = run_epochs(worlds, flags, args.reads)
    return {
        "reads": args.reads,
        "shared": args.data is not None,
        "seeds": [world.seed for world in worlds],
        "run": worlds[0].facts(experiment, rows.FIRST[experiment]),
        "cpu_seconds": sum(world.cpu_seconds(experiment) for world in worlds),
        "chosen": chosen,
        "cells": cells,
    }


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Experiment -> its results, of those that are finished."""
    found = {}
    for experiment in rows.SEEDS:
        if (out / f"{experiment}.json").exists():
            found[experiment] = read_object(out / f"{experiment}.json")
    return found
