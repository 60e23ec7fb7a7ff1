"""The stages of the demo: what is run on Posterland, and what is read from the runs.

`hanorec.demo` is the command.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.errors import InputError
from hanorec.base.files import read_json
from hanorec.datasets import posterland
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import Example, load_interactions

BASE = Path(__file__).parent.parent / "assets" / "posterland-base"


USERS = 2700


COMMON = ["--micro-batch", "16", "--accumulation", "2", "--lora-rank", "16", "--lora-dropout", "0", "--epochs", "1"]


SFT = [*COMMON, "--learning-rate", "4e-3", "--users-to", "0.5"]  # 1,350 users, 3 targets each


DPO = [*COMMON, "--learning-rate", "5e-4", "--users-from", "0.5", "--users-to", "0.667", "--targets-per-user", "1"]  # 451 others


TEST = ["--users-from", "0.667", "--users-to", "0.778", "--batch", "16"]  # 300 users whom no stage saw


STAGES = {  # name -> (script, flags); all start from the SFT adapter and see the same users
    "HaNoRec": ("train_dpo", ["--ablation", "full"]),
    "w/o HaRS": ("train_dpo", ["--ablation", "no_hars"]),
    "w/o NoDO": ("train_dpo", ["--ablation", "no_nodo"]),
    "w/o SAM": ("train_dpo", ["--ablation", "no_sam"]),
    "DPO": ("train_dpo", ["--ablation", "dpo"]),
    "HaNoRec, standardised, relative": ("train_dpo", ["--ablation", "full", "--hardness", "standardised", "--noise", "relative"]),
    "SFT continued": ("train_sft", []),
}


SHUFFLED = "SFT, images shuffled"


ROWS = ["chance", "popularity", "base", SHUFFLED, "SFT", "SFT continued", "DPO", "HaNoRec", "w/o HaRS", "w/o NoDO", "w/o SAM",
        "HaNoRec, standardised, relative", "oracle"]


def script(name: str) -> Any:
    """A top-level script as a module; it lives beside the package in a clone."""
    path = Path(__file__).parent.parent.parent / f"{name}.py"
    if not path.exists():
        raise InputError(f"{path}: no such file; the demo runs the training scripts of a clone, so install with `pip install -e .`")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_stages(out: Path, model: Path, data: Path, seed: int, sft: list[str], dpo: list[str], test: list[str], noise: str) -> None:
    """Train every stage and evaluate them all on the same candidates: out/SFT, out/HaNoRec ..., out/test, out/test-shuffled.

    The seed is of training alone; users and candidates are the data's own.
    """
    common = ["--model", str(model), "--data", str(data)]
    training = [*common, "--seed", str(seed)]
    script("train_sft").main([*training, *sft, "--out", str(out / "SFT")])
    for name, (command, flags) in STAGES.items():
        preset = ["--dataset", noise] if command == "train_dpo" else []
        script(command).main([*training, *dpo, *flags, *preset, "--sft", str(out / "SFT"), "--out", folder(out, name)])
    policies = [folder(out, name) for name in [*STAGES, "SFT"]] + ["base"]
    script("evaluate").main([*common, *test, *(flag for p in policies for flag in ("--adapter", p)), "--out", str(out / "test")])
    script("evaluate").main([*common, *test, "--adapter", str(out / "SFT"), "--images", "shuffled", "--out", str(out / "test-shuffled")])


def folder(out: Path, name: str) -> str:
    """Where a stage's adapter lies; its name may hold a slash."""
    return str(out / name.replace("/", ""))


def collect(out: Path) -> dict[str, Any]:
    """From the two reports: {set: {"rows": {name: {metric: {"value", "interval"}}}, "NDCG": {name: per user}, "users", "paired"}}."""
    found: dict[str, Any] = {}
    for kind, report in read_json(out / "test" / "metrics.json")["sets"].items():
        shuffled = read_json(out / "test-shuffled" / "metrics.json")["sets"][kind]
        results = {name: report["policies"][folder(out, name)] for name in [*STAGES, "SFT"]} | {"base": report["policies"]["base"]}
        results |= {SHUFFLED: next(iter(shuffled["policies"].values())), "popularity": report["popularity"]}
        found[kind] = {"rows": {name: r["metrics"] for name, r in results.items()} | {"chance": report["chance"]["metrics"]},
                       "NDCG": {name: r["rows"]["NDCG@3"] for name, r in results.items()}, "users": report["users"],
                       "paired": report["paired"]}
    return found


def table(seeds: list[dict[str, Any]]) -> str:
    """Markdown: percent, with the bootstrap interval of the one seed, or mean and deviation over several."""
    lines = []
    for kind in seeds[0]:
        lines += [f"\n**{kind} candidates** | HR@3 | NDCG@3 | AUC", "---|---|---|---"]
        for name in [name for name in ROWS if name in seeds[0][kind]["rows"]]:
            cells = []
            for metric in ("HR@3", "NDCG@3", "AUC"):
                found = [seed[kind]["rows"][name][metric] for seed in seeds]
                values, interval = [100 * f["value"] for f in found], found[0]["interval"]
                spread = f" ± {np.std(values, ddof=1):.1f}" if len(seeds) > 1 else " [{:.1f}, {:.1f}]".format(*(100 * x for x in interval or (0, 0)))
                cells.append(f"{np.mean(values):.1f}{spread if interval else ''}")
            lines.append(f"{name} | " + " | ".join(cells))
    return "\n".join(lines) + "\n"


def add_oracle(found: dict[str, Any], data: Path) -> None:
    """The row of the generating probabilities themselves, for the same users and candidates."""
    evaluate, catalog = script("evaluate"), load_catalog(data)
    interactions, truth = load_interactions(data, catalog), read_json(data / "truth.json")
    for kind in found.values():
        scores, examples = [], []
        for user in kind["users"]:
            candidates = tuple(catalog.row[c] for c in user["candidates"])
            p = posterland.next_probabilities(truth["items"], *truth["tastes"][user["user"]], set(interactions.before(user["user"], "test")))
            scores.append(p[list(candidates)])
            examples.append(Example(user["user"], (), catalog.row[user["target"]], frozenset(), candidates))
        result = evaluate.summarise(np.array(scores), examples, seed=0)
        kind["rows"]["oracle"], kind["NDCG"]["oracle"] = result["metrics"], result["rows"]["NDCG@3"]


def title_table(seeds: list[dict[str, Any]], ambiguous: list[dict[str, bool]]) -> str:
    """NDCG@3 on users whose next film has a clear title, and on those whose next film only its poster tells."""
    lines = ["\n**NDCG@3 by the target's title** | clear | only the poster tells", "---|---|---"]
    for kind in seeds[0]:
        for name in ("oracle", "SFT", SHUFFLED):
            parts = [[], []]
            for seed, of_item in zip(seeds, ambiguous, strict=True):
                hidden = np.array([of_item[user["target"]] for user in seed[kind]["users"]])
                ndcg = np.array(seed[kind]["NDCG"][name])
                for part, mask in zip(parts, (~hidden, hidden), strict=True):
                    part.append(100 * ndcg[mask].mean())
            lines.append(f"{name}, {kind} | {np.mean(parts[0]):.1f} | {np.mean(parts[1]):.1f}")
    return "\n".join(lines) + "\n"
