"""The stages of the demo: what is run on Posterland, and what is read from the runs.

`hanorec.demo` is the command.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.files import read_json
from hanorec.datasets import posterland
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import Example, load_interactions
from hanorec.ranking.report import METRICS, summarise
from hanorec.studies.clock import Clock
from hanorec.studies.scripts import PACKAGE, script

BASE = PACKAGE / "assets" / "posterland-base"

USERS = 2700

COMMON = [
    "--micro-batch", "16", "--accumulation", "2",
    "--lora-rank", "16", "--lora-dropout", "0", "--epochs", "1",
]

# 1,350 users, 3 targets each
SFT = [*COMMON, "--learning-rate", "4e-3", "--users-to", "0.5"]

# 451 others
DPO = [
    *COMMON, "--learning-rate", "5e-4",
    "--users-from", "0.5", "--users-to", "0.667", "--targets-per-user", "1",
]

# 300 users whom no stage saw
TEST = ["--users-from", "0.667", "--users-to", "0.778", "--batch", "16"]

# Name -> (script, flags); all start from the SFT adapter and see the same users.
STAGES = {
    "HaNoRec": ("train_dpo", ["--ablation", "full"]),
    "w/o HaRS": ("train_dpo", ["--ablation", "no_hars"]),
    "w/o NoDO": ("train_dpo", ["--ablation", "no_nodo"]),
    "w/o SAM": ("train_dpo", ["--ablation", "no_sam"]),
    "DPO": ("train_dpo", ["--ablation", "dpo"]),
    "HaNoRec, standardised, relative": (
        "train_dpo",
        ["--ablation", "full", "--hardness", "standardised", "--noise", "relative"],
    ),
    "SFT continued": ("train_sft", []),
}

SHUFFLED = "SFT, images shuffled"
DATA, EVALUATION = "the data", "evaluation of all"

# What is done for a seed, in this order, and about how much of it: forwards of a row, a backward
# counted as two.
SHARES = {
    DATA: 300,
    "SFT": 3 * 4050,
    "HaNoRec": 5 * 451,
    "w/o HaRS": 4 * 451,
    "w/o NoDO": 5 * 451,
    "w/o SAM": 5 * 451,
    "DPO": 4 * 451,
    "HaNoRec, standardised, relative": 5 * 451,
    "SFT continued": 3 * 451,
    EVALUATION: 9 * 2 * 300,  # policies, sets, users
    SHUFFLED: 2 * 300,
}

ROWS = [
    "chance", "popularity", "base", SHUFFLED, "SFT", "SFT continued",
    "DPO", "HaNoRec", "w/o HaRS", "w/o NoDO", "w/o SAM",
    "HaNoRec, standardised, relative", "oracle",
]


def run_seed(
    out: Path, seed: int, device: str, clock: Clock
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Make Posterland, run all stages on it, and read them.

    clock: of `SHARES`.
    Returns: what `collect` finds, with the oracle's row; item -> is its title ambiguous.
    """
    data = out / "data"
    clock.begin(DATA)
    posterland.make_posterland(data, USERS, seed=seed)
    place = ["--device", device]
    sft, dpo, test = ([*flags, *place] for flags in (SFT, DPO, TEST))
    run_stages(out, BASE, data, seed, sft, dpo, test, noise="movielens", clock=clock)
    found = collect(out)
    add_oracle(found, data)
    items = read_json(data / "truth.json")["items"]
    return found, {item["id"]: item["ambiguous"] for item in items}


def run_stages(
    out: Path, model: Path, data: Path, seed: int,
    sft: list[str], dpo: list[str], test: list[str], noise: str, clock: Clock,
) -> None:
    """Train every stage and evaluate them all on the same candidates.

    They lie in out/SFT, out/HaNoRec ..., out/test and out/test-shuffled. The seed is of training
    alone; users and candidates are the data's own. sft, dpo, test: flags of the scripts; noise:
    the preset that train_dpo.py calls `--dataset`.
    """
    common = ["--model", str(model), "--data", str(data)]
    training = [*common, "--seed", str(seed)]
    below = str(out / "SFT")
    clock.begin("SFT")
    script("train_sft").main([*training, *sft, "--out", below])
    for name, (command, flags) in STAGES.items():
        preset = ["--dataset", noise] if command == "train_dpo" else []
        places = ["--sft", below, "--out", folder(out, name)]
        clock.begin(name)
        script(command).main([*training, *dpo, *flags, *preset, *places])

    policies = []
    for name in [*STAGES, "SFT"]:
        policies += ["--adapter", folder(out, name)]
    policies += ["--adapter", "base"]
    clock.begin(EVALUATION)
    script("evaluate").main([*common, *test, *policies, "--out", str(out / "test")])

    shuffled = ["--adapter", below, "--images", "shuffled", "--out", str(out / "test-shuffled")]
    clock.begin(SHUFFLED)
    script("evaluate").main([*common, *test, *shuffled])


def folder(out: Path, name: str) -> str:
    """Where a stage's adapter lies; its name may hold a slash."""
    return str(out / name.replace("/", ""))


def collect(out: Path) -> dict[str, Any]:
    """What the two reports of a seed say, candidate set by candidate set.

    Returns: {set: {"rows": {row: {metric: {"value", "interval"}}},
    "NDCG": {row: NDCG@3 per user}, "users": .., "paired": ..}}, the last two as in the report.
    """
    reports = read_json(out / "test" / "metrics.json")["sets"]
    shuffled = read_json(out / "test-shuffled" / "metrics.json")["sets"]
    found: dict[str, Any] = {}
    for kind, report in reports.items():
        policies = report["policies"]
        results = {name: policies[folder(out, name)] for name in [*STAGES, "SFT"]}
        results["base"] = policies["base"]
        results[SHUFFLED] = next(iter(shuffled[kind]["policies"].values()))
        results["popularity"] = report["popularity"]
        rows = {name: one["metrics"] for name, one in results.items()}
        rows["chance"] = report["chance"]["metrics"]
        found[kind] = {
            "rows": rows,
            "NDCG": {name: one["rows"]["NDCG@3"] for name, one in results.items()},
            "users": report["users"],
            "paired": report["paired"],
        }
    return found


def add_oracle(found: dict[str, Any], data: Path) -> None:
    """The row of the generating probabilities themselves, for the same users and candidates."""
    catalog = load_catalog(data)
    interactions, truth = load_interactions(data, catalog), read_json(data / "truth.json")
    for kind in found.values():
        scores, examples = [], []
        for user in kind["users"]:
            name, target = user["user"], catalog.row[user["target"]]
            candidates = tuple(catalog.row[item] for item in user["candidates"])
            genre, style = truth["tastes"][name]
            seen = set(interactions.before(name, "test"))
            p = posterland.next_probabilities(truth["items"], genre, style, seen)
            scores.append(p[list(candidates)])
            examples.append(Example(name, (), target, frozenset(), candidates))
        result = summarise(np.array(scores), examples, seed=0)
        kind["rows"]["oracle"] = result["metrics"]
        kind["NDCG"]["oracle"] = result["rows"]["NDCG@3"]


def table(seeds: list[dict[str, Any]]) -> str:
    """Markdown: percent, with the bootstrap interval of the one seed, or mean and deviation."""
    lines = []
    for kind in seeds[0]:
        lines += [f"\n**{kind} candidates** | " + " | ".join(METRICS), "---|---|---|---"]
        for name in ROWS:
            if name in seeds[0][kind]["rows"]:
                rows = [seed[kind]["rows"][name] for seed in seeds]
                cells = [_cell(rows, metric) for metric in METRICS]
                lines.append(" | ".join([name, *cells]))
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict[str, Any]], metric: str) -> str:
    """One metric of one row over the seeds; what has no interval (chance) varies with nothing."""
    values, interval = [100 * row[metric]["value"] for row in rows], rows[0][metric]["interval"]
    spread = ""
    if interval and len(rows) > 1:
        spread = f" ± {np.std(values, ddof=1):.1f}"
    elif interval:
        low, high = interval
        spread = f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{np.mean(values):.1f}{spread}"


def title_table(seeds: list[dict[str, Any]], ambiguous: list[dict[str, bool]]) -> str:
    """NDCG@3 of users whose next film has a clear title, and where only its poster tells."""
    lines = [
        "\n**NDCG@3 by the target's title** | clear | only the poster tells",
        "---|---|---",
    ]
    for kind in seeds[0]:
        for name in ("oracle", "SFT", SHUFFLED):
            clear, hidden = [], []  # a mean a seed
            for seed, of_item in zip(seeds, ambiguous, strict=True):
                tells_nothing = np.array([of_item[user["target"]] for user in seed[kind]["users"]])
                ndcg = np.array(seed[kind]["NDCG"][name])
                clear.append(100 * ndcg[~tells_nothing].mean())
                hidden.append(100 * ndcg[tells_nothing].mean())
            lines.append(f"{name}, {kind} | {np.mean(clear):.1f} | {np.mean(hidden):.1f}")
    return "\n".join(lines) + "\n"
