"""What each part of BR-MRS is worth, beside controls that cost as much.

    python -m hanorec.studies.brmrs_ablation --data DATA --out OUT [--seeds N] [--model MODEL]
        [any flag of train_brmrs.py]

Trains every row of ROWS with N seeds, OUT/ROW/seed-S each a run of train_brmrs.py, and writes
OUT/results.json and OUT/table.md: mean and deviation over the seeds, and paired tests on the values
of each test user, averaged over the seeds. The flags are those of the row "full"; the other rows
change what their name says. The same command again skips finished runs; with a larger N it adds
seeds.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from hanorec.base import command
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.errors import InputError
from hanorec.base.settings import check, option, parse


@dataclass(frozen=True)
class SeedsConfig:
    """How often every row is trained."""

    group = "study"

    seeds: int = option(5, "how many, from --seed on")

    def __post_init__(self) -> None:
        check(self, seeds=1)


KINDS = [SeedsConfig, BrmrsFiles, BrmrsConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__)  # --help needs no torch

import numpy as np

from hanorec.base.files import read_object, write_json, write_text
from hanorec.base.lock import lock_folder
from hanorec.base.terminal import aligned
from hanorec.datasets.mmrec import write_mmrec
from hanorec.metrics import paired_test
from hanorec.ranking.pairs import load_ranking_data
from hanorec.run.record import all_settings, check_settings
from hanorec.studies.brmrs_table import TESTED, table
from hanorec.studies.scripts import script

BPR = {"lambda_h": 0.0, "lambda_s": 0.0}

# Name -> what differs from "full".
ROWS: dict[str, dict[str, Any]] = {
    "BPR": BPR,
    "BPR, hard by s_f": {**BPR, "hard_fused": True},
    "BPR + unimodal BPR": {**BPR, "unimodal_bpr": 1.0},
    "BPR + same-modal hard": {"lambda_s": 0.0, "routing": "same"},
    "BPR + random routing": {"lambda_s": 0.0, "routing": "random"},
    "BPR + CHNS": {"lambda_s": 0.0},
    "BPR + Syn": {"lambda_h": 0.0},
    "BPR + Syn, detached": {"lambda_h": 0.0, "detach": True},
    "full, same-modal hard": {"routing": "same"},
    "full, random routing": {"routing": "random"},
    "full": {},
    "full, without BPR": {"bpr_weight": 0.0},
}

Runs = Mapping[str, Sequence[dict[str, Any]]]  # row -> `run_row` of each seed


# ---- running ----


def run_row(out: Path, files: BrmrsFiles, config: BrmrsConfig) -> dict[str, Any]:
    """metrics.json of one run: read where it is finished, else trained, or gone on with, now."""
    files = replace(files, out=str(out))
    if not (out / "metrics.json").exists():
        script("train_brmrs").train(files, config)
    settings = all_settings([files, config])
    del settings["out"]  # the folder may have been moved
    check_settings(out, settings)
    data = read_object(out / "run.json")["inputs"]["data"]
    return {"data": data, **read_object(out / "metrics.json")}


def run_rows(
    out: Path, files: BrmrsFiles, rows: Mapping[str, BrmrsConfig], seeds: Sequence[int]
) -> dict[str, Any]:
    """Train all rows with all seeds, a seed at a time, and write results.json and table.md."""
    if files.model is not None:
        files = with_features(out, files)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for seed in seeds:
        for name, config in rows.items():
            print(f"\n{name}, seed {seed}")
            folder = out / re.sub(r"\W+", "-", name).strip("-") / f"seed-{seed}"
            found[name].append(run_row(folder, files, replace(config, seed=seed)))

    results = {
        "data": _data_of_all(out, files, found),
        "seed": list(seeds),
        "rows": {name: _row_results(rows[name], of_seed) for name, of_seed in found.items()},
        "paired": compare(found),
    }
    text = table(results)
    write_json(out / "results.json", results)
    write_text(out / "table.md", text)
    print(f"\n{aligned(text)}\nwrote {out / 'results.json'} and {out / 'table.md'}")
    return results


def with_features(out: Path, files: BrmrsFiles) -> BrmrsFiles:
    """A native folder as a copy in `out`, with its features, which are computed once."""
    if not (out / "data").exists():
        data = load_ranking_data(files)
        out.mkdir(parents=True, exist_ok=True)
        write_mmrec(out / "data", data)
    return replace(files, data=str(out / "data"), model=None)


# ---- results ----


def _data_of_all(out: Path, files: BrmrsFiles, found: Runs) -> str:
    """The hash of the data that all runs are on."""
    hashes = set()
    for of_seed in found.values():
        hashes |= {one["data"] for one in of_seed}
    if len(hashes) > 1:
        raise InputError(
            f"{out}: its runs are on {len(hashes)} different states of {files.data}, expected one; "
            "remove the runs of the others"
        )
    return hashes.pop()


def _row_results(config: BrmrsConfig, of_seed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What of a row's settings is not the default, and what its runs found, each a list by seed."""
    changes = {}
    for key, value in all_settings([config]).items():
        if key != "seed" and value != getattr(BrmrsConfig(), key):
            changes[key] = value
    results = {"settings": changes, "epochs": [one["best_epoch"] for one in of_seed]}
    for split in ("valid", "test"):
        results[split] = {}
        for key in of_seed[0][split]:
            results[split][key] = [one[split][key] for one in of_seed]
    return results


def compare(found: Runs) -> list[dict[str, Any]]:
    """Each row against each one above it, on the same users.

    Each user's values are averaged over the seeds.
    """
    tests = []
    for above, row in combinations(found, 2):
        for metric in TESTED:
            test = _test(found[row], found[above], metric)
            tests.append({"row": row, "against": above, "metric": metric, **test})
    return tests


def _test(
    row: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]], metric: str
) -> dict[str, Any]:
    """One row against one control, each a list of runs by seed."""
    means = []
    for of_seed in (row, control):
        means.append(np.mean([one["rows"][metric] for one in of_seed], axis=0))  # (U,)
    above = [a["test"][metric] > b["test"][metric] for a, b in zip(row, control, strict=True)]
    return {**paired_test(*means), "seeds_above": sum(above)}


def main(argv: Sequence[str] | None = None) -> None:
    study, files, config = parse(KINDS, argv, __doc__)
    rows = {name: replace(config, **changes) for name, changes in ROWS.items()}
    out = Path(files.out)
    lock_folder(out)
    run_rows(out, files, rows, range(config.seed, config.seed + study.seeds))
