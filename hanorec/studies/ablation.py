"""The ablation table of document 000, with controls, over seeds and data sets. The same command again goes on where it stopped.

    python -m hanorec.ablation --out OUT [--seeds 5] [--rows "DPO;HaNoRec"] [--split val]              on Posterland, made anew for each seed
    python -m hanorec.ablation --out OUT --model MODEL --data DATA [--data DATA2] [--sft FLAGS] [--dpo FLAGS] [--continued FLAGS] [--test FLAGS]

For each seed: SFT, then every row of ROWS from that SFT adapter, each evaluated on the same candidates. FLAGS, one string each,
are those of train_sft.py, of train_dpo.py, of train_sft.py again (the row "SFT continued") and of evaluate.py, the same for all rows.
OUT/DATA/seed-S/ROW is a run of a script, OUT/DATA/seed-S/SPLIT/ROW its evaluation; OUT/results-SPLIT.json and OUT/table-SPLIT.md hold what
is read from them: mean and deviation over the seeds, and for each row the difference to DPO (the row w/o ALL) on the same users, in two
ways: with an interval over users, and with one over seeds.
"""

import argparse
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.command import run
from hanorec.base.config import DataConfig, DpoConfig, EvalConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.files import read_json, read_object, write_json, write_text
from hanorec.base.settings import parse
from hanorec.datasets.posterland import make_posterland
from hanorec.metrics import paired_test
from hanorec.run.record import all_settings, check_settings
from hanorec.studies import stages as demo

# Row -> (script, flags). Rows about lambda have no noise and rows about noise no lambda, so that one thing differs from DPO at a time.
ROWS: dict[str, tuple[str, list[str]]] = {
    "DPO": ("train_dpo", ["--ablation", "dpo"]),
    "SFT continued": ("train_sft", []),
    "HaNoRec": ("train_dpo", ["--ablation", "full"]),
    "w/o HaRS": ("train_dpo", ["--ablation", "no_hars"]),
    "w/o NoDO": ("train_dpo", ["--ablation", "no_nodo"]),
    "w/o SAM": ("train_dpo", ["--ablation", "no_sam"]),
    "λ mean": ("train_dpo", ["--ablation", "no_nodo", "--control", "mean"]),
    "λ standardised": ("train_dpo", ["--ablation", "no_nodo", "--hardness", "standardised"]),
    "λ standardised, reversed": ("train_dpo", ["--ablation", "no_nodo", "--hardness", "standardised", "--control", "reversed"]),
    "λ standardised, permuted": ("train_dpo", ["--ablation", "no_nodo", "--hardness", "standardised", "--control", "permuted"]),
    "λ standardised, normalised": ("train_dpo", ["--ablation", "no_nodo", "--hardness", "standardised", "--normalised", "true"]),
    "noise 0.01": ("train_dpo", ["--ablation", "no_hars", "--sigma", "0.01"]),
    "noise relative 0.3": ("train_dpo", ["--ablation", "no_hars", "--sigma", "0.3", "--noise", "relative"]),
    "λ ranked": ("train_dpo", ["--ablation", "no_nodo", "--gap", "ranked"]),
    "λ ratio": ("train_dpo", ["--ablation", "no_nodo", "--hardness", "ratio"]),
    "λ standardised, η ema": ("train_dpo", ["--ablation", "no_nodo", "--hardness", "standardised", "--eta", "ema"]),
    "noise relative 1": ("train_dpo", ["--ablation", "no_hars", "--sigma", "1", "--noise", "relative"]),
}


PUBLISHED = {"HaNoRec": 56.73, "w/o HaRS": 51.26, "w/o NoDO": 54.38, "w/o SAM": 53.91, "DPO": 49.82}  # NDCG@3 on MicroLens, document 000


POSTERLAND = {"sft": demo.SFT, "dpo": demo.DPO, "continued": demo.DPO, "test": demo.TEST}  # flags of each stage


TRAINING = {"train_sft": [ModelConfig, DataConfig, TrainConfig], "train_dpo": [ModelConfig, DataConfig, TrainConfig, DpoConfig]}


EVALUATION = [ModelConfig, DataConfig, EvalConfig]


METRICS = ["HR@3", "NDCG@3", "AUC"]


CONTROL = "DPO"


T_975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t for 2 .. 10 seeds


def folder_name(row: str) -> str:
    """A row's name as a folder: letters and digits of any script."""
    return re.sub(r"[^\w.]+", "-", row).strip("-")


def settings(kinds: Sequence[type], flags: Sequence[str]) -> dict[str, Any]:
    """What a script makes of these flags, but for what differs from row to row by place alone."""
    return {name: value for name, value in all_settings(parse(kinds, [*flags, "--out", "."])).items() if name not in ("out", "adapter")}


def run_row(here: Path, row: str, script: str, flags: Sequence[str], test: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate what of one row is not finished yet, and read its evaluation. flags, test: all that the scripts need but --out;
    without a script it is the base model.

    InputError where what is finished was made with other settings.
    """
    split = settings(EVALUATION, test)["split"]
    out, report, spent = here / folder_name(row), here / split / folder_name(row), here / "cpu" / f"{folder_name(row)}.json"
    if script:
        if not (out / "adapter_config.json").exists():
            start = time.process_time()
            demo.script(script).main([*flags, "--out", str(out)])
            write_json(spent, time.process_time() - start)
        check_settings(out, settings(TRAINING[script], flags))
    if not (report / "run.json").exists():  # written last
        for half in report.glob("*"):
            half.unlink()
        demo.script("evaluate").main([*test, "--adapter", str(out) if script else "base", "--out", str(report)])
    check_settings(report, settings(EVALUATION, test))
    inputs = read_object(report / "run.json")["inputs"]
    found = read_object(report / "metrics.json")["sets"]
    return {"sets": {kind: {**next(iter(one["policies"].values())), "users": one["users"], "popularity": one["popularity"], "chance": one["chance"]}
                     for kind, one in found.items()},
            "evaluated_on": {name: value for name, value in inputs.items() if name == "data" or name.startswith("candidates_")},
            "cpu_seconds": read_json(spent) if spent.exists() else None}


def run_rows(here: Path, model: str, data: str, seed: int, flags: Mapping[str, Sequence[str]],
             rows: Mapping[str, tuple[str, list[str]]]) -> dict[str, dict[str, Any]]:
    """Base, SFT and all rows with one seed on one data set: row -> `run_row`. flags: of "sft", "dpo", "continued" and "test"."""
    common = ["--model", model, "--data", data]
    training, test = [*common, "--seed", str(seed)], [*common, *flags["test"]]
    plan: dict[str, tuple[str, list[str]]] = {"base": ("", []), "SFT": ("train_sft", [*training, *flags["sft"]])}
    for row, (script, own) in rows.items():
        stage = [*(flags["dpo"] if script == "train_dpo" else flags["continued"]), *own, "--sft", str(here / "SFT")]
        if script == "train_dpo" and row != CONTROL:  # the same pairs, so the same reference; it is refused where they are not
            stage += ["--reference", str(here / folder_name(CONTROL) / "reference.safetensors")]
        plan[row] = script, [*training, *stage]
    for script, stage in plan.values():
        if script:
            settings(TRAINING[script], stage)  # a wrong flag of any row ends the command before the first one trains
    found = {}
    for row, (script, stage) in plan.items():
        print(f"\n{here}: {row}")
        found[row] = run_row(here, row, script, stage, test)
        for name, value in found["base"]["evaluated_on"].items():
            if (other := found[row]["evaluated_on"].get(name)) != value:
                raise InputError(f"{here}: the row {row!r} was evaluated on {name} of hash {other}, expected {value} as for the base model: the data "
                                 "folder was changed; choose another --out")
    return found


def summarise(seeds: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """Over the seeds of one data set: {set: {row: values of each metric, CPU seconds, difference to DPO in NDCG@3}}.

    Where all seeds have the same users, each user's values are averaged over the seeds before users are resampled; else the users of
    all seeds are the sample. Either way the interval over users holds the trained models fixed; the one over seeds is Student's, of the
    seeds' mean differences (2 to 10 seeds).
    """
    result: dict[str, Any] = {}
    for kind in seeds[0]["SFT"]["sets"]:
        sets = [{row: one["sets"][kind] for row, one in seed.items()} for seed in seeds]
        users = [[(u["user"], u["target"], *u["candidates"]) for u in one["SFT"]["users"]] for one in sets]
        shared = all(u == users[0] for u in users)
        result[kind] = {"users": len(users[0]) if shared else sum(map(len, users)), "seeds": len(seeds), "same_users": shared, "rows": {}}
        for row in seeds[0]:
            values = {metric: [one[row]["metrics"][metric]["value"] for one in sets] for metric in METRICS}
            entry = {"values": values, "cpu_seconds": [seed[row]["cpu_seconds"] for seed in seeds]}
            if row != CONTROL:
                own, other = ([one[r]["rows"]["NDCG@3"] for one in sets] for r in (row, CONTROL))
                join = (lambda parts: np.mean(parts, 0)) if shared else np.concatenate
                gaps = np.array([np.mean(a) - np.mean(b) for a, b in zip(own, other, strict=True)])
                half = T_975[len(gaps) - 2] * gaps.std(ddof=1) / len(gaps) ** 0.5 if 1 < len(gaps) <= 10 else None
                entry["against_control"] = {**paired_test(join(own), join(other)), "seeds": gaps.tolist(), "above": int((gaps > 0).sum()),
                                            "over_seeds": None if half is None else [gaps.mean() - half, gaps.mean() + half]}
            result[kind]["rows"][row] = entry
        for name in ("popularity", "chance"):
            result[kind]["rows"][name] = {"values": {m: [one["SFT"][name]["metrics"][m]["value"] for one in sets] for m in METRICS}}
    return result


def table(results: Mapping[str, Any], split: str) -> str:
    """Markdown, in percent: a table for each data set and candidate set."""
    lines = []
    for data, sets in results.items():
        for kind, one in sets.items():
            pairs = "the same users in every seed, averaged over the seeds" if one["same_users"] else "users of all seeds together"
            caption = (f"\n**{data}, {kind} candidates**, {split}: mean ± deviation over {one['seeds']} seed(s), percent. Difference to {CONTROL} in "
                       f"NDCG@3, in points: 95% interval over {one['users']} users ({pairs}); 95% interval over the seeds; seeds above.\n")
            lines += [caption,
                      "row | " + " | ".join(METRICS) + f" | − {CONTROL} | over users | over seeds | above | CPU s | published, MicroLens",
                      "---|" * (len(METRICS) + 6) + "---"]
            for row in ["chance", "popularity", *[r for r in one["rows"] if r not in ("chance", "popularity")]]:
                entry = one["rows"][row]
                cells = [f"{100 * np.mean(v):.2f}" + (f" ± {100 * np.std(v, ddof=1):.2f}" if len(v) > 1 and row != "chance" else "")
                         for v in (entry["values"][m] for m in METRICS)]
                test = entry.get("against_control")
                if test is None:
                    cells += [""] * 4
                else:
                    spread = test["over_seeds"]
                    cells += [f"{100 * test['difference']:+.2f}", f"[{100 * test['low']:+.2f}, {100 * test['high']:+.2f}]",
                              f"[{100 * spread[0]:+.2f}, {100 * spread[1]:+.2f}]" if spread else "", f"{test['above']} of {one['seeds']}"]
                cpu = [seconds for seconds in entry.get("cpu_seconds", []) if seconds is not None]
                cells += [f"{np.mean(cpu):.0f}" if cpu else "", f"{PUBLISHED[row]:.2f}" if row in PUBLISHED else ""]
                lines.append(" | ".join([row, *cells]))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hanorec.ablation", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--data", action="append", help="folder in the native layout; may be repeated. None: Posterland, with the demo's model and settings")
    parser.add_argument("--model", help="with --data: the checkpoint")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --seed on")
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument("--rows", help="names of rows, between semicolons; default all, and DPO always: " + "; ".join(ROWS))
    parser.add_argument("--split", choices=["val", "test"], default="test", help="val to choose settings, test for reports")
    for stage, default in POSTERLAND.items():
        parser.add_argument(f"--{stage}", help=f"on Posterland: {shlex.join(default)}")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")
    if (args.data is None) != (args.model is None):
        raise InputError(f"--data {args.data} with --model {args.model}: expected both, or neither for Posterland")
    names = list(ROWS) if args.rows is None else [CONTROL, *(name.strip() for name in args.rows.split(";"))]
    if unknown := [name for name in names if name not in ROWS]:
        raise InputError(f"--rows: no row {unknown[0]!r}, expected some of {'; '.join(ROWS)}")
    flags = {stage: default if args.data is None else [] for stage, default in POSTERLAND.items()}
    flags |= {stage: shlex.split(own) for stage in flags if (own := getattr(args, stage)) is not None}
    if any(flag.partition("=")[0] == "--split" for flag in flags["test"]):
        raise InputError(f"--test {args.test!r}: holds --split, expected the flags of evaluate.py without it; give --split to this command itself")
    flags["test"] = [*flags["test"], "--split", args.split]
    results = {}
    for data in args.data or ["Posterland"]:
        here, seeds = args.out / Path(data).resolve().name, []
        for seed in range(args.seed, args.seed + args.seeds):
            if args.data is None and not (here / f"data-{seed}" / "dataset.json").exists():
                make_posterland(here / f"data-{seed}", demo.USERS, seed=seed)
            source, model = (data, args.model) if args.data else (str(here / f"data-{seed}"), str(demo.BASE))
            seeds.append(run_rows(here / f"seed-{seed}", model, source, seed, flags, {name: ROWS[name] for name in ROWS if name in names}))
        results[here.name] = summarise(seeds)
    write_json(args.out / f"results-{args.split}.json", results)
    write_text(args.out / f"table-{args.split}.md", text := table(results, args.split))
    print(f"{text}\nwrote {args.out / f'results-{args.split}.json'} and table-{args.split}.md")


if __name__ == "__main__":
    run(main)
