"""Figures of a run folder, readable in grey: python -m hanorec.studies.plots RUN

Drawn beside the file that each is made from, in RUN and in the folders below it. Needs matplotlib
(pip install -e .[plots]). In Python, `figures(path)` returns them instead.
    log.jsonl       curves.png       loss, rewards, λ, η and β' of a training run; of BR-MRS its
                                     branches
    pairs.tsv       pairs.png        β' of each pair against how alike its two items are
    metrics.json    metrics.png      of evaluate.py: each policy against DPO, or else SFT, paired
                    similarity.png   and with --similarity (EV-4): are weak pairs of image and text
                                     weaker after training?
    results.json    metrics.png      of the demo: each row against DPO
    results-*.json  ablation-*.png   of the ablation: the same, over its seeds
    noise.json      noise.png        of hanorec.studies.noise_curve: loss against the strength of
                                     the noise
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.plots")
    result.add_argument("run", type=Path)
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

from matplotlib.figure import Figure

from hanorec.base.errors import InputError
from hanorec.base.files import read_json, read_object
from hanorec.studies.figures import run_name, save
from hanorec.studies.plots_pairs import draw_pairs, generated_catalog, read_pairs
from hanorec.studies.plots_results import (
    compare_demo,
    compare_evaluation,
    draw_differences,
    draw_noise,
    draw_similarity,
)
from hanorec.studies.plots_training import draw_brmrs, draw_curves
from hanorec.studies.tables import CONTROL


def plot_run(folder: Path) -> list[Path]:
    """Draw all that the folder and its subfolders hold; returns the files written."""
    written = []
    for pattern in DRAWN:
        for path in sorted(Path(folder).rglob(pattern)):
            if path.stat().st_size:  # a run may have just begun
                found = figures(path)
                written += [save(figure, path.parent / name) for name, figure in found.items()]
    return written


def figures(path: Path) -> dict[str, Figure]:
    """The figures of one file, by the names that they are saved under; {} of another's file."""
    for pattern, draw in DRAWN.items():
        if path.match(pattern):
            return draw(path)
    raise InputError(f"{path}: no figure of such a file, expected one of {', '.join(DRAWN)}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_log(path: Path) -> dict[str, Figure]:
    records, name = read_log(path), run_name(path.parent)
    if "valid_Recall@20" in records[0]:
        return {"curves.png": draw_brmrs(records, name)}
    facts = path.with_name("run.json")
    known = read_object(facts) if facts.exists() else {}
    return {"curves.png": draw_curves(records, name, known)}


def of_pairs(path: Path) -> dict[str, Figure]:
    settings = read_object(path.with_name("run.json"))["settings"]
    log = path.with_name("log.jsonl")
    eta = [record["eta"] for record in read_log(log)] if log.exists() else [1.0]
    catalog = generated_catalog(settings["data"]) if "data" in settings else None
    figure = draw_pairs(
        read_pairs(path), run_name(path.parent), settings["beta0"], eta, catalog)
    return {"pairs.png": figure}


def of_evaluation(path: Path) -> dict[str, Figure]:
    report, name = read_object(path), run_name(path.parent)
    if "sets" not in report:  # of train_brmrs.py, or of reranking
        return {}
    control, compared = compare_evaluation(report["sets"])
    found = {"metrics.png": draw_differences(name, control, compared)}
    if "similarity" in report:
        found["similarity.png"] = draw_similarity(name, report["similarity"])
    return found


def of_demo(path: Path) -> dict[str, Figure]:
    seeds = read_object(path).get("seeds")
    if not isinstance(seeds, list):  # the ablation of BR-MRS has a table instead
        return {}
    name = path.parent.resolve().name
    return {"metrics.png": draw_differences(name, CONTROL, compare_demo(seeds))}


def of_ablation(path: Path) -> dict[str, Figure]:
    stem, found = path.stem.replace("results", "ablation"), {}
    for data, sets in read_json(path).items():
        found[f"{stem}-{data}.png"] = draw_differences(data, CONTROL, sets)
    return found


def of_noise(path: Path) -> dict[str, Figure]:
    return {"noise.png": draw_noise(run_name(path.parent), read_object(path))}


DRAWN: dict[str, Callable[[Path], dict[str, Figure]]] = {
    "log.jsonl": of_log,
    "pairs.tsv": of_pairs,
    "metrics.json": of_evaluation,
    "results.json": of_demo,
    "results-*.json": of_ablation,
    "noise.json": of_noise,
}


def main() -> None:
    args = parser().parse_args()
    written = plot_run(args.run)
    if not written:
        raise InputError(
            f"{args.run}: neither log.jsonl nor a file of results in it or below, expected the "
            "--out folder of a command")
    for path in written:
        print(f"wrote {path}")
