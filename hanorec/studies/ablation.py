"""The ablation table of document 000, with controls, over seeds and data sets.

    python -m hanorec.studies.ablation --out OUT [--seeds 5] [--rows "DPO;HaNoRec"] [--split val]
        on Posterland, made anew for each seed
    python -m hanorec.studies.ablation --out OUT --model MODEL --data DATA [--data DATA2]
            [--sft FLAGS] [--dpo FLAGS] [--continued FLAGS] [--test FLAGS]
        on these data sets

The same command again goes on where it stopped.

For each seed: SFT, then every row of ROWS from that SFT adapter, each evaluated on the same
candidates. FLAGS, one string each, are those of train_sft.py, of train_dpo.py, of train_sft.py
again (the row "SFT continued") and of evaluate.py, the same for all rows. OUT/DATA/seed-S/ROW is a
run of a script, OUT/DATA/seed-S/SPLIT/ROW its evaluation; OUT/results-SPLIT.json and
OUT/table-SPLIT.md hold what is read from them: mean and deviation over the seeds, and for each row
the difference to DPO (the row w/o ALL) on the same users, in two ways: with an interval over users,
and with one over seeds.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from hanorec.base import command
from hanorec.base.errors import InputError
from hanorec.base.files import write_json, write_text
from hanorec.base.flags import Parser
from hanorec.base.lock import lock_folder
from hanorec.base.terminal import aligned
from hanorec.datasets.posterland import make_posterland
from hanorec.studies import stages
from hanorec.studies.tables import CONTROL, summarise, table

NO_NODO = ["--ablation", "no_nodo"]
NO_HARS = ["--ablation", "no_hars"]
STANDARDISED = [*NO_NODO, "--hardness", "standardised"]
RELATIVE = [*NO_HARS, "--noise", "relative"]

# Row -> (script, flags). Rows about lambda have no noise and rows about noise no lambda, so that
# one thing differs from DPO at a time.
ROWS: dict[str, tuple[str, list[str]]] = {
    "DPO": ("train_dpo", ["--ablation", "dpo"]),
    "SFT continued": ("train_sft", []),
    "HaNoRec": ("train_dpo", ["--ablation", "full"]),
    "w/o HaRS": ("train_dpo", NO_HARS),
    "w/o NoDO": ("train_dpo", NO_NODO),
    "w/o SAM": ("train_dpo", ["--ablation", "no_sam"]),
    "λ mean": ("train_dpo", [*NO_NODO, "--control", "mean"]),
    "λ standardised": ("train_dpo", STANDARDISED),
    "λ standardised, reversed": ("train_dpo", [*STANDARDISED, "--control", "reversed"]),
    "λ standardised, permuted": ("train_dpo", [*STANDARDISED, "--control", "permuted"]),
    "λ standardised, normalised": ("train_dpo", [*STANDARDISED, "--normalised", "true"]),
    "noise 0.01": ("train_dpo", [*NO_HARS, "--sigma", "0.01"]),
    "noise relative 0.3": ("train_dpo", [*RELATIVE, "--sigma", "0.3"]),
    "λ ranked": ("train_dpo", [*NO_NODO, "--gap", "ranked"]),
    "λ ratio": ("train_dpo", [*NO_NODO, "--hardness", "ratio"]),
    "λ standardised, η ema": ("train_dpo", [*STANDARDISED, "--eta", "ema"]),
    "noise relative 1": ("train_dpo", [*RELATIVE, "--sigma", "1"]),
}

# Flags of each stage on Posterland.
POSTERLAND = {
    "sft": stages.SFT,
    "dpo": stages.DPO,
    "continued": stages.DPO,
    "test": stages.TEST,
}


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.ablation")
    result.add_argument("--out", required=True, type=Path)
    result.add_argument(
        "--data", action="append",
        help="folder in the native layout; may be repeated. None: Posterland, with the demo's "
        "model and settings")
    result.add_argument("--model", help="with --data: the checkpoint")
    result.add_argument("--seeds", type=int, default=5, help="how many, from --seed on")
    result.add_argument("--seed", type=int, default=2025)
    result.add_argument(
        "--rows",
        help="names of rows, between semicolons; default all, and DPO always: " + "; ".join(ROWS))
    result.add_argument(
        "--split", choices=["val", "test"], default="test",
        help="val to choose settings, test for reports")
    for stage, default in POSTERLAND.items():
        result.add_argument(f"--{stage}", help=f"on Posterland: {shlex.join(default)}")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

from hanorec.studies.runs import check_both, run_rows


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags, with the names of its rows, and the flags of each stage.

    InputError for what does not go together.
    """
    args = parser().parse_args(argv)

    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")
    check_both(args.data, args.model)
    names = list(ROWS)
    if args.rows is not None:
        names = [CONTROL, *(name.strip() for name in args.rows.split(";"))]
    if unknown := [name for name in names if name not in ROWS]:
        raise InputError(f"--rows: no row {unknown[0]!r}, expected some of {'; '.join(ROWS)}")
    args.rows = [name for name in ROWS if name in names]

    args.flags = {}
    for stage, default in POSTERLAND.items():
        own = getattr(args, stage)
        if own is not None:
            args.flags[stage] = shlex.split(own)
        else:
            args.flags[stage] = default if args.data is None else []
    if any(flag.partition("=")[0] == "--split" for flag in args.flags["test"]):
        raise InputError(
            f"--test {args.test!r}: holds --split, expected the flags of evaluate.py without it; "
            "give --split to this command itself")
    args.flags["test"] = [*args.flags["test"], "--split", args.split]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_command(argv)
    rows = {name: ROWS[name] for name in args.rows}
    results = {}
    for data in args.data or ["Posterland"]:
        here, seeds = args.out / Path(data).resolve().name, []
        for seed in range(args.seed, args.seed + args.seeds):
            source, model = data, args.model
            if args.data is None:
                lock_folder(here)
                world = here / f"data-{seed}"
                source, model = str(world), str(stages.BASE)
                if not (world / "dataset.json").exists():
                    make_posterland(world, stages.USERS, seed=seed)
            seeds.append(run_rows(here / f"seed-{seed}", model, source, seed, args.flags, rows))
        results[here.name] = summarise(seeds)

    report, text = args.out / f"results-{args.split}.json", table(results, args.split)
    write_json(report, results)
    write_text(args.out / f"table-{args.split}.md", text)
    print(f"{aligned(text)}\nwrote {report} and table-{args.split}.md")
