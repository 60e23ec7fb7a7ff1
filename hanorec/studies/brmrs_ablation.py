"""What each part of BR-MRS is worth, beside controls that cost as much.

    python -m hanorec.brmrs_ablation --data DATA --out OUT [--seeds N] [--model MODEL] [any flag of train_brmrs.py]

Trains every row of ROWS with N seeds, OUT/ROW/seed-S each a run of train_brmrs.py, and writes OUT/results.json and OUT/table.md: mean
and deviation over the seeds, and paired tests on the values of each test user, averaged over the seeds. The flags are those of the
row "full"; the other rows change what their name says. The same command again skips finished runs; with a larger N it adds seeds.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.command import run
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, write_json, write_text
from hanorec.base.settings import parse
from hanorec.datasets.mmrec import write_mmrec
from hanorec.metrics import paired_test
from hanorec.ranking.pairs import load_ranking_data
from hanorec.run.record import all_settings, check_settings
from hanorec.studies.stages import script

BPR = {"lambda_h": 0.0, "lambda_s": 0.0}


ROWS: dict[str, dict[str, Any]] = {  # name -> what differs from "full"
    "BPR": BPR,
    "BPR, hard by s_f": {**BPR, "hard_fused": True},
    "BPR + unimodal BPR": {**BPR, "unimodal_bpr": 1.0},
    "BPR + same-modal hard": {"lambda_s": 0.0, "routing": "same"},
    "BPR + random routing": {"lambda_s": 0.0, "routing": "random"},
    "BPR + CHNS": {"lambda_s": 0.0},
    "BPR + Syn": {"lambda_h": 0.0},
    "BPR + Syn, detached": {"lambda_h": 0.0, "detach": True},
    "full": {},
    "full, without BPR": {"bpr_weight": 0.0},
}


CONTROLS = list(ROWS)[:5]


METRICS = ["Recall@10", "Recall@20", "NDCG@10", "NDCG@20"]


BRANCHES = ["Recall@20_t", "Recall@20_v", "win", "unique_t", "unique_v", "synergy", "degradation"]


TESTED = ["Recall@20", "NDCG@20"]


def run_row(out: Path, files: BrmrsFiles, config: BrmrsConfig) -> dict[str, Any]:
    """metrics.json of one run: read where it is finished, else trained, or gone on with, now."""
    files = replace(files, out=str(out))
    if not (out / "metrics.json").exists():
        script("train_brmrs").train(files, config)
    check_settings(out, {name: value for name, value in all_settings([files, config]).items() if name != "out"})
    return {"data": read_object(out / "run.json")["inputs"]["data"], **read_object(out / "metrics.json")}


def run_rows(out: Path, files: BrmrsFiles, rows: dict[str, BrmrsConfig], seeds: Sequence[int]) -> dict[str, Any]:
    """Train all rows with all seeds, a seed at a time, and write results.json and table.md."""
    if files.model is not None:  # a native folder: its features are computed once
        if not (out / "data").exists():
            data = load_ranking_data(files)
            out.mkdir(parents=True, exist_ok=True)
            write_mmrec(out / "data", data)
        files = replace(files, data=str(out / "data"), model=None)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for seed in seeds:
        for name, config in rows.items():
            print(f"\n{name}, seed {seed}")
            folder = re.sub(r"\W+", "-", name).strip("-")
            found[name].append(run_row(out / folder / f"seed-{seed}", files, replace(config, seed=seed)))
    hashes = {one["data"] for of_row in found.values() for one in of_row}
    if len(hashes) > 1:
        raise InputError(f"{out}: its runs are on {len(hashes)} different states of {files.data}, expected one; remove the runs of the others")
    results = {"data": hashes.pop(), "seed": list(seeds), "rows": {}, "paired": compare(found)}
    for name, of_seed in found.items():
        changes = {key: value for key, value in all_settings([rows[name]]).items() if value != getattr(BrmrsConfig(), key) and key != "seed"}
        results["rows"][name] = {"settings": changes, "epochs": [one["best_epoch"] for one in of_seed],
                                 **{split: {key: [one[split][key] for one in of_seed] for key in of_seed[0][split]} for split in ("valid", "test")}}
    write_json(out / "results.json", results)
    write_text(out / "table.md", text := table(results))
    print(f"\n{text}\nwrote {out / 'results.json'} and {out / 'table.md'}")
    return results


def compare(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each row that is no control against each control: each user's values, averaged over the seeds, on the same users."""
    mean = {name: {metric: np.mean([one["rows"][metric] for one in of_seed], axis=0) for metric in TESTED} for name, of_seed in found.items()}
    return [{"row": name, "against": control, "metric": metric, **paired_test(mean[name][metric], mean[control][metric]),
             "seeds_above": sum(a["test"][metric] > b["test"][metric] for a, b in zip(found[name], found[control], strict=True))}
            for name in found if name not in CONTROLS for control in CONTROLS if control in found for metric in TESTED]


def table(results: dict[str, Any]) -> str:
    """Markdown, in percent."""
    def cell(values: list[float]) -> str:
        return f"{100 * np.mean(values):.2f}" + (f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else "")

    lines = [f"Test, mean ± deviation over {len(results['seed'])} seed(s), percent.\n", "row | " + " | ".join([*METRICS, "epochs"]),
             "---|" * (len(METRICS) + 1) + "---"]
    for name, row in results["rows"].items():
        lines.append(" | ".join([name, *(cell(row["test"][metric]) for metric in METRICS), f"{np.mean(row['epochs']):.0f}"]))
    if all(key in row["test"] for row in results["rows"].values() for key in BRANCHES):
        lines += ["\nBranches, test, percent. Shares of targets by which branch has them in its top 20.\n", "row | " + " | ".join(BRANCHES),
                  "---|" * len(BRANCHES) + "---"]
        lines += [" | ".join([name, *(cell(row["test"][key]) for key in BRANCHES)]) for name, row in results["rows"].items()]
    caption = ("\nPaired over users, in points: difference [95% interval], p (least 0.0005), seeds above. The seeds are averaged first, so the "
               f"interval holds their mean fixed. {len(results['paired'])} tests: one in twenty below 0.05 is to be expected by chance.\n")
    lines += [caption, "row - control | " + " | ".join(TESTED), "---|---|---"]
    for i in range(0, len(results["paired"]), len(TESTED)):
        part = results["paired"][i : i + len(TESTED)]
        lines.append(" | ".join([f"{part[0]['row']} - {part[0]['against']}", *(
            f"{100 * t['difference']:+.2f} [{100 * t['low']:+.2f}, {100 * t['high']:+.2f}], p = {t['p']:.4f}, {t['seeds_above']} of {len(results['seed'])}" for t in part)]))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hanorec.brmrs_ablation", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", help="native layout only, as in train_brmrs.py")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --seed (2025) on")
    args, flags = parser.parse_known_args(argv)
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")
    places = ["--data", args.data, "--out", args.out, *(["--model", args.model] if args.model else [])]
    files, config = parse([BrmrsFiles, BrmrsConfig], [*flags, *places], __doc__)
    rows = {name: replace(config, **changes) for name, changes in ROWS.items()}
    run_rows(Path(args.out), files, rows, range(config.seed, config.seed + args.seeds))


if __name__ == "__main__":
    run(main)
