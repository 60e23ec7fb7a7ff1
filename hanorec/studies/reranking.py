"""Whether reranking pays: a policy trained on retrieved lists, added to the retriever that it
reranks.

    python -m hanorec.studies.reranking --out OUT [--seeds 3]
        Posterland, a third of whose films nobody has in training, made anew for each seed
    python -m hanorec.studies.reranking --out OUT --data DATA --model MODEL
            [--retriever brmrs|matrix|sequence] [--retrieval FLAGS] [--sft FLAGS] [--dpo FLAGS]
            [--test FLAGS]

With each seed: a retriever that has not learnt from the last items of train.tsv and one of all of
it; SFT and HaNoRec on the former's lists (--draw retrieved), and for comparison SFT on random ones
and the base; all of them on the latter's lists of validation and test (evaluate.py --retriever). By
RC-2 the scores are added; w is chosen on validation, by NDCG@10. FLAGS, one string each, are those
of the training and of evaluate.py.

OUT/seed-S holds the runs; what is finished is not done again. OUT/results.json and OUT/table.md:
every w with both ends, the lists' ceiling, cold and warm targets, and where each retriever places
training and validation targets.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hanorec.base import command
from hanorec.base.errors import InputError
from hanorec.base.files import write_json, write_text
from hanorec.base.flags import Parser
from hanorec.base.lock import lock_folder
from hanorec.base.terminal import aligned
from hanorec.datasets.posterland import make_posterland
from hanorec.studies import stages

USERS, COLD = 3600, 1 / 3
POSTERLAND = {
    # items are their features alone, so that a film without users has a place, too
    "retrieval": ["--item-embedding", "none", "--layers", "0", "--patience", "10"],
    "sft": [
        *stages.COMMON, "--epochs", "2", "--learning-rate", "4e-3", "--users-to", "0.6",
        "--targets-per-user", "1",
    ],
    "dpo": [
        *stages.COMMON, "--learning-rate", "5e-4", "--users-from", "0.6", "--users-to", "0.75",
        "--targets-per-user", "1", "--dataset", "movielens",
    ],
    "test": ["--users-from", "0.75", "--batch", "16"],
}


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.reranking")
    result.add_argument("--out", required=True, type=Path)
    result.add_argument("--data", help="folder in the native layout; none: cold Posterland")
    result.add_argument("--model", help="with --data: the checkpoint")
    result.add_argument("--retriever", choices=["brmrs", "matrix", "sequence"], default="brmrs")
    result.add_argument("--candidates", type=int, default=10, help="length of every list")
    result.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    result.add_argument("--seed", type=int, default=2025)
    result.add_argument("--users", type=int, default=USERS, help="of Posterland")
    for stage, default in POSTERLAND.items():
        result.add_argument(f"--{stage}", help=f"on Posterland: {shlex.join(default)}")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.baselines import matrix_training, sequence_training
from hanorec.baselines.config import MatrixConfig, SequenceConfig, VectorFiles
from hanorec.run.record import check_settings
from hanorec.studies.reranking_places import target_places
from hanorec.studies.reranking_table import read_seed, summarise, table
from hanorec.studies.runs import (
    EVALUATION,
    TRAINING,
    check_both,
    folder_name,
    is_evaluated,
    settings,
    timed,
    train_once,
    train_script,
)
from hanorec.studies.scripts import script

RETRIEVERS = {
    "brmrs": (lambda argv: script("train_brmrs").main(argv), [BrmrsFiles, BrmrsConfig]),
    "matrix": (matrix_training.main, [VectorFiles, MatrixConfig]),
    "sequence": (sequence_training.main, [VectorFiles, SequenceConfig]),
}
# Policy -> the script that trains it.
POLICIES = {
    "base": "", "SFT, random lists": "train_sft", "SFT": "train_sft", "HaNoRec": "train_dpo",
}


class Study(NamedTuple):
    """What all seeds share."""

    model: str
    retriever: str  # of RETRIEVERS
    candidates: int  # length of every list
    flags: dict[str, list[str]]  # of each stage


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags, and those of each stage. InputError for what does not go together."""
    args = parser().parse_args(argv)

    for name in ("seeds", "users"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.candidates < 2:
        raise InputError(f"--candidates {args.candidates}: expected at least 2, to be ordered")
    check_both(args.data, args.model)
    args.flags = {}
    for stage, default in POSTERLAND.items():
        own = getattr(args, stage)
        fits = args.data is None and (stage != "retrieval" or args.retriever == "brmrs")
        args.flags[stage] = shlex.split(own) if own is not None else default if fits else []
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_command(argv)
    model = args.model or str(stages.BASE)
    study = Study(model, args.retriever, args.candidates, args.flags)
    lock_folder(args.out)
    seeds = []
    for seed in range(args.seed, args.seed + args.seeds):
        here, data = args.out / f"seed-{seed}", args.data
        if data is None:
            data = str(here / "data")
            if not (here / "data" / "dataset.json").exists():
                make_posterland(here / "data", args.users, seed=seed, cold=COLD)
        seeds.append(run_seed(study, here, data, seed))

    results = summarise(seeds)
    text = table(results)
    write_json(args.out / "results.json", results)
    write_text(args.out / "table.md", text)
    print(f"{aligned(text)}\nwrote {args.out / 'results.json'} and table.md")


def run_seed(study: Study, here: Path, data: str, seed: int) -> dict[str, Any]:
    """What of a seed is not finished yet, and what `read_seed` reads from it."""
    plan = training_flags(study, here, data, seed)
    trained = {row: name for row, name in POLICIES.items() if name}
    every = [settings(TRAINING[name], plan[row]) for row, name in trained.items()]
    depth = max(one["targets_per_user"] for one in every)
    main_of, kinds = RETRIEVERS[study.retriever]
    for name, hold_out in (("cut", depth), ("full", 0)):
        print(f"\nseed {seed}: the retriever, {name}")
        flags = [*plan["retriever"], "--hold-out", str(hold_out)]
        train_once(main_of, kinds, flags, here / name, "metrics.json", spent(here, name))

    for row, name in trained.items():
        print(f"\nseed {seed}: {row}")
        train_script(name, plan[row], Path(policy(here, row)), spent(here, folder_name(row)))

    for split in ("val", "test"):
        evaluate(study, here, data, split)
    policies = {row: policy(here, row) for row in POLICIES}
    return read_seed(here, data, policies) | {"places": target_places(here, data, depth)}


def policy(here: Path, row: str) -> str:
    """What evaluate.py calls it."""
    return row if row == "base" else str(here / folder_name(row))


def training_flags(study: Study, here: Path, data: str, seed: int) -> dict[str, list[str]]:
    """What is trained -> its flags, but for --out."""
    common = ["--data", data, "--seed", str(seed)]
    prompts = [*common, "--model", study.model, "--candidates", str(study.candidates)]
    lists = [*prompts, "--draw", "retrieved", "--retriever", str(here / "cut")]
    features = ["--model", study.model] if study.retriever == "brmrs" else []
    return {
        "retriever": [*common, *features, *study.flags["retrieval"]],
        "SFT, random lists": [*prompts, *study.flags["sft"]],
        "SFT": [*lists, *study.flags["sft"]],
        "HaNoRec": [*lists, *study.flags["dpo"], "--sft", policy(here, "SFT")],
    }


def evaluate(study: Study, here: Path, data: str, split: str) -> None:
    """All policies on the lists of the retriever that knows all of train.tsv."""
    report, full = here / split, here / "full"
    folder = full if study.retriever == "brmrs" else full / split
    flags = [
        "--model", study.model, "--data", data, *study.flags["test"], "--split", split,
        "--retriever", str(folder), "--top-n", str(study.candidates),
    ]
    policies = []
    for row in POLICIES:
        policies += ["--adapter", policy(here, row)]
    if not is_evaluated(report):
        argv = [*flags, *policies, "--out", str(report)]
        timed(spent(here, split), lambda: script("evaluate").main(argv))
    check_settings(report, settings(EVALUATION, flags))


def spent(here: Path, name: str) -> Path:
    """The file of a stage's CPU seconds."""
    return here / "cpu" / f"{name}.json"
