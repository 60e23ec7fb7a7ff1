"""What posters are worth to policies that were trained with them, on the same frozen candidates.

    python benchmarks/movielens1m_images.py DATA OUT --model BASE --runs ABLATION/ml-1m/seed-*
        [--rows "SFT;DPO;HaNoRec"] [--test FLAGS]

DATA: MovieLens-1M in the native layout with real posters and movies.dat. --runs: a folder a seed of
`hanorec.studies.ablation`, whose flags of evaluate.py, --test, are to be given again. Every policy
is asked four times: with the posters as they are; with every film showing another one's; without
any; and with drawn covers, which say title and genres (OUT/drawn, a copy of DATA, has one for each
film). Then EV-4: the cosine of titles and posters in ten groups of films, before and after.

OUT/CONDITION/seed-S: what evaluate.py writes; OUT/table.md is printed. The same command goes on.
"""

import argparse
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from movielens1m_names import read_genres

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, whole_folder, write_text
from hanorec.base.lock import lock_folder
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.covers import draw_cover
from hanorec.datasets.interactions import load_interactions
from hanorec.metrics import paired_test
from hanorec.run.record import check_settings
from hanorec.studies.runs import EVALUATION, folder_name, is_evaluated, settings
from hanorec.studies.scripts import script
from hanorec.studies.tables import head, line, percent

OWN = "own posters"
CONDITIONS = {  # name -> what evaluate.py is told; --similarity is EV-4
    OWN: ["--images", "own", "--similarity", "true"],
    "other films' posters": ["--images", "shuffled"],
    "no posters": ["--images", "none"],
    "drawn covers": ["--images", "own"],  # of another folder
}
Seeds = Sequence[dict[str, Any]]  # metrics.json of each


def draw_covers(catalog: Catalog, genres: Mapping[str, list[str]], out: Path) -> None:
    """A copy of the data, candidates included, in which every film has a drawn cover alone."""
    with whole_folder(out) as folder:
        for path in catalog.directory.iterdir():
            if path.suffix in (".tsv", ".csv") or path.name.startswith("candidates_"):
                shutil.copyfile(path, folder / path.name)
        (folder / "images").mkdir()
        for item, title in zip(catalog.ids, catalog.titles, strict=True):
            draw_cover(title, genres[item]).save(folder / "images" / f"{item}.png")


def evaluate_all(args: argparse.Namespace) -> dict[str, Seeds]:
    """Condition -> metrics.json of each seed, computed where it is missing."""
    found = {}
    for name, own in CONDITIONS.items():
        data, drawn = args.data, args.out / "drawn"
        if name == "drawn covers":
            if not drawn.exists():
                catalog = load_catalog(args.data)
                draw_covers(catalog, read_genres(args.data, catalog), drawn)
            data = drawn
        seeds = []
        for seed in args.runs:
            adapters = []
            for row in args.rows:
                adapters += ["--adapter", str(seed / folder_name(row))]
            asked = ["--model", args.model, "--data", str(data), *adapters]
            asked += [*shlex.split(args.test), *own]
            report = args.out / folder_name(name) / seed.name
            if not is_evaluated(report):
                script("evaluate").main([*asked, "--out", str(report)])
            check_settings(report, settings(EVALUATION, asked))
            seeds.append(read_object(report / "metrics.json"))
        found[name] = seeds
    return found


# ---- from the reports to the tables ----


def ndcg(seeds: Seeds, kind: str, place: int) -> np.ndarray:
    """(U,) NDCG@3 of one of the rows, averaged over the seeds."""
    of_seeds = []
    for one in seeds:
        policies = list(one["sets"][kind]["policies"].values())
        of_seeds.append(policies[place]["rows"]["NDCG@3"])
    return np.mean(of_seeds, 0)


def condition_lines(found: Mapping[str, Seeds], rows: Sequence[str], kind: str) -> list[str]:
    """NDCG@3 with own posters, and what the other conditions change in it."""
    others = [name for name in CONDITIONS if name != OWN]
    lines = [f"\n**{kind} candidates**, NDCG@3, percent; differences to own posters in points\n"]
    lines += head(["row", OWN, *others])
    for place, row in enumerate(rows):
        own = ndcg(found[OWN], kind, place)
        cells = [row, percent([own.mean()])]
        for name in others:
            cells.append(difference(ndcg(found[name], kind, place), own))
        lines.append(line(cells))
    return lines


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Mean of a - b (U,), in points, with its interval over users."""
    test = paired_test(a, b)
    low, high = 100 * test["low"], 100 * test["high"]
    return f"{100 * test['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def user_groups(
    data: Path, users: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Group -> (U,) bool, by which films of a user's prompt and target have no poster.

    asked: evaluate.py's settings.
    """
    catalog = load_catalog(data)
    interactions = load_interactions(data, catalog)
    without = {row for row, path in enumerate(catalog.images) if path is None}
    target = np.array([catalog.row[user["target"]] in without for user in users])
    history = []
    for user in users:
        before = interactions.before(user["user"], asked["split"])
        history.append(not without.isdisjoint(before[-asked["history"] :]))
    history = np.array(history)
    return {
        "the target has no poster": target,
        "a film of the history has none": history & ~target,
        "all have one": ~target & ~history,
    }


def group_lines(
    seeds: Seeds, rows: Sequence[str], kind: str, groups: Mapping[str, np.ndarray]
) -> list[str]:
    """NDCG@3 with own posters, films without a poster told apart."""
    counts = [f"{name} ({int(of.sum())})" for name, of in groups.items()]
    lines = [f"\n**{kind} candidates**, {OWN}, NDCG@3 by group (users)\n", *head(["row", *counts])]
    for place, row in enumerate(rows):
        values = ndcg(seeds, kind, place)
        cells = [percent([values[of].mean()]) if of.any() else "" for of in groups.values()]
        lines.append(line([row, *cells]))
    return lines


def similarity_lines(seeds: Seeds, rows: Sequence[str]) -> list[str]:
    """EV-4: the weakest and the strongest tenth, averaged over the seeds."""
    lines = ["\n**EV-4**: cosine of title and poster, tenths of the films by it, own posters\n"]
    lines += head([
        "row", "weakest, before", "after", "strongest, before", "after",
        "change of weakest − strongest", "seeds below 0",
    ])
    for place, row in enumerate(rows):
        ends, changes = [], []
        for one in seeds:
            of_row = list(one["similarity"].values())[place]
            before, after = np.array(of_row["before"]), np.array(of_row["after"])
            ends.append([before[0], after[0], before[-1], after[-1]])
            changes.append((after - before)[0] - (after - before)[-1])
        cells = [f"{value:.3f}" for value in np.mean(ends, 0)]
        below = f"{sum(change < 0 for change in changes)} of {len(changes)}"
        lines.append(line([row, *cells, f"{np.mean(changes):+.3f}", below]))
    return lines


def table(found: Mapping[str, Seeds], rows: Sequence[str], data: Path) -> str:
    """All of it, as Markdown."""
    own, lines = found[OWN], []
    asked = own[0]["settings"]
    for kind, of_set in own[0]["sets"].items():
        lines += condition_lines(found, rows, kind)
        lines += group_lines(own, rows, kind, user_groups(data, of_set["users"], asked))
    lines += similarity_lines(own, rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="a folder a seed")
    parser.add_argument("--rows", default="SFT;DPO;HaNoRec", help="between semicolons")
    parser.add_argument("--test", default="", help="flags of evaluate.py")
    args = parser.parse_args()
    args.rows = [row.strip() for row in args.rows.split(";")]
    for seed in args.runs:
        for row in args.rows:
            if not (seed / folder_name(row) / "adapter_config.json").exists():
                raise InputError(
                    f"{seed / folder_name(row)}: no adapter, expected the row {row!r} of "
                    "hanorec.studies.ablation; run it first, or leave the row out of --rows"
                )
    lock_folder(args.out)
    text = table(evaluate_all(args), args.rows, args.data)
    write_text(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    run(main)
