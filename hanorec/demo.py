"""Every stage on Posterland, the generated catalogue, with one command and no download.

    python -m hanorec.demo --out DIR [--seeds N]

For each seed: make the data, fine-tune (SFT) on one half of the users, then train on the other half, which SFT did not see: DPO,
HaNoRec as documented, its ablations, HaNoRec with standardised lambda and relative noise, and SFT continued, which shows what the
additional users are worth without any preference pair. All are evaluated on the same candidates, beside chance, popularity, the
bare base model, SFT with the posters shuffled, and the oracle (the probabilities that generated the data).

DIR receives results.json, table.md, plots, and DIR/seed-N with the data and every run. The settings that differ from the published
ones are in SFT and DPO below: the model is a thousand times smaller, so it needs larger steps.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanorec.datasets import posterland
from hanorec.errors import InputError, run
from hanorec.files import read_json, write_json, write_text
from hanorec.training import claim_folder

BASE = Path(__file__).parent / "assets" / "posterland-base"
USERS, TEST_USERS = 900, 1 / 3  # all users' training sequences are used; the last items of a third are the test
SFT = ["--learning-rate", "2e-3", "--epochs", "3", "--micro-batch", "16", "--accumulation", "2", "--users-to", "0.5"]
DPO = ["--learning-rate", "5e-4", "--epochs", "1", "--micro-batch", "16", "--accumulation", "2", "--users-from", "0.5",
       "--dataset", "movielens"]
STAGES = {  # name -> (script, flags); all start from the SFT adapter and see the same users
    "HaNoRec": ("train_dpo", ["--ablation", "full"]),
    "w/o HaRS": ("train_dpo", ["--ablation", "no_hars"]),
    "w/o NoDO": ("train_dpo", ["--ablation", "no_nodo"]),
    "w/o SAM": ("train_dpo", ["--ablation", "no_sam"]),
    "DPO": ("train_dpo", ["--ablation", "dpo"]),
    "HaNoRec, standardised, relative": ("train_dpo", ["--ablation", "full", "--hardness", "standardised", "--noise", "relative"]),
    "SFT continued": ("train_sft", []),
}


def script(name: str) -> Callable[[Sequence[str]], None]:
    """`main` of a top-level script, which lives beside the package in a clone."""
    path = Path(__file__).parent.parent / f"{name}.py"
    if not path.exists():
        raise InputError(f"{path}: no such file; the demo runs the training scripts of a clone, so install with `pip install -e .`")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run_seed(out: Path, seed: int) -> dict[str, Any]:
    """All stages once; returns for each candidate set and row the metric of every test user, by the user's order."""
    data = out / "data"
    posterland.make_posterland(data, USERS, seed=seed)
    common = ["--model", str(BASE), "--data", str(data)]
    training = [*common, "--seed", str(seed), "--targets-per-user", "3"]
    script("train_sft")([*training, *SFT, "--out", str(out / "SFT")])
    for name, (command, flags) in STAGES.items():
        script(command)([*training, *(DPO if command == "train_dpo" else DPO[:-2]), *flags, "--sft", str(out / "SFT"), "--out", str(out / name)])
    testing = [*common, "--seed", str(seed), "--users-to", str(TEST_USERS), "--batch", "16"]
    policies = [str(out / name) for name in [*STAGES, "SFT"]] + ["base"]
    script("evaluate")([*testing, *(flag for p in policies for flag in ("--adapter", p)), "--out", str(out / "test")])
    script("evaluate")([*testing, "--adapter", str(out / "SFT"), "--images", "shuffled", "--out", str(out / "test-shuffled")])
    return collect(out)


def collect(out: Path) -> dict[str, Any]:
    """Rows of the table from the two reports: {set: {row: {metric: {"value", "interval"}, "NDCG by title": ...}}}."""
    summarise = script_attribute("evaluate", "summarise")
    truth = read_json(out / "data" / "truth.json")
    ambiguous = {item["id"]: item["ambiguous"] for item in truth["items"]}
    found: dict[str, Any] = {}
    for kind, report in read_json(out / "test" / "metrics.json")["sets"].items():
        shuffled = read_json(out / "test-shuffled" / "metrics.json")["sets"][kind]
        clear = np.array([not ambiguous[user["target"]] for user in report["users"]])
        policies = {Path(p).name: r for p, r in report["policies"].items()}
        policies |= {"SFT, posters shuffled": next(iter(shuffled["policies"].values())), "popularity": report["popularity"]}
        policies["oracle"] = summarise(*oracle(truth, out / "data", report["users"]), 0)
        rows = {"chance": {"metrics": report["chance"]["metrics"]}}
        for name in ["popularity", "base", "SFT, posters shuffled", "SFT", *sorted(set(STAGES), key=list(STAGES).index), "oracle"]:
            ndcg = np.array(policies[name]["rows"]["NDCG@3"])
            rows[name] = {"metrics": policies[name]["metrics"],
                          "NDCG@3 by title": {"clear": float(ndcg[clear].mean()), "ambiguous": float(ndcg[~clear].mean())}}
        found[kind] = {"rows": rows, "paired": report["paired"]}
    return found


def script_attribute(name: str, attribute: str) -> Any:
    """Another function of a script than its main."""
    return script(name).__globals__[attribute]


def oracle(truth: dict, data: Path, users: list[dict]) -> tuple[np.ndarray, list]:
    """The generating probabilities as scores, and the examples they belong to."""
    from hanorec.catalog import load_catalog
    from hanorec.interactions import Example, load_interactions

    catalog = load_catalog(data)
    interactions = load_interactions(data, catalog)
    scores, examples = [], []
    for user in users:
        seen = set(interactions.before(user["user"], "test"))
        candidates = tuple(catalog.row[c] for c in user["candidates"])
        p = posterland.next_probabilities(truth["items"], *truth["tastes"][user["user"]], seen)
        scores.append(p[list(candidates)])
        examples.append(Example(user["user"], (), catalog.row[user["target"]], frozenset(), candidates))
    return np.array(scores), examples


def table(seeds: list[dict[str, Any]]) -> str:
    """Markdown: mean over seeds in percent, with the bootstrap interval of the one seed or the deviation over several."""
    lines = []
    for kind in seeds[0]:
        lines += [f"\n### {kind} candidates\n", "| | HR@3 | NDCG@3 | AUC | NDCG@3, clear titles | ambiguous titles |", "|---|---|---|---|---|---|"]
        for name in seeds[0][kind]["rows"]:
            rows = [seed[kind]["rows"][name] for seed in seeds]
            cells = []
            for metric in ("HR@3", "NDCG@3", "AUC"):
                values = [100 * row["metrics"][metric]["value"] for row in rows]
                interval = rows[0]["metrics"][metric]["interval"]
                cells.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(seeds) > 1 and interval else
                                                          "" if not interval else " [{:.1f}, {:.1f}]".format(*(100 * x for x in interval))))
            for title in ("clear", "ambiguous"):
                parts = [row["NDCG@3 by title"][title] for row in rows if "NDCG@3 by title" in row]
                cells.append(f"{100 * np.mean(parts):.1f}" if parts else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="how many times all is repeated, data included")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")
    out, start, cpu = claim_folder(args.out), time.time(), time.process_time()
    found = [run_seed(out / f"seed-{2025 + s}", 2025 + s) for s in range(args.seeds)]
    text = table(found)
    write_json(out / "results.json", {"seeds": found, "seconds": time.time() - start, "cpu_seconds": time.process_time() - cpu,
                                      "threads": torch.get_num_threads()})
    spread = "bootstrap 95% intervals over users" if args.seeds == 1 else f"mean and deviation over {args.seeds} seeds"
    write_text(out / "table.md", f"# Posterland, {spread}\n{text}")
    print(text)
    try:
        from hanorec.plots import plot_run
    except ImportError:
        print("no plots: matplotlib is not installed (pip install -e .[plots])")
    else:
        for path in plot_run(out):
            print(f"wrote {path}")
    print(f"wrote {out / 'results.json'} and {out / 'table.md'} in {time.time() - start:.0f} s")


if __name__ == "__main__":
    run(main)
