"""What posters add to the base: its last stage once more, with titles alone, with posters, and with
other films' posters, which are as many tokens.

    python benchmarks/movielens1m_titles.py DATA OUT --base BASE [--seeds 2025 2026] [--test FLAGS]

BASE: what benchmarks/movielens1m_base.py made of DATA. All rows begin at BASE/names, have the same
rankings in the same order, and are asked, on the same candidates, in the form that taught them.

OUT/seed-S/ROW: the checkpoint `base`, and `test`, what evaluate.py writes; OUT/table.md is printed.
The same command goes on.
"""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from movielens1m_base import open_folder
from movielens1m_stages import Scale, teach_ranking

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, sha256, write_text
from hanorec.datasets.catalog import data_hash, load_catalog
from hanorec.ranking.report import METRICS
from hanorec.run.checkpoint import drop_checkpoints
from hanorec.run.record import check_settings
from hanorec.studies.runs import EVALUATION, folder_name, is_evaluated, read_report, settings
from hanorec.studies.scripts import script
from hanorec.studies.tables import against_cells, compare_rows, head, line, percent

CONTROL = "titles alone"
ROWS = {  # row -> --images
    CONTROL: "none",
    "titles and posters": "own",
    "titles and other films' posters": "shuffled",
}

Seed = Mapping[str, dict[str, Any]]  # row -> its evaluation


def make_row(args: argparse.Namespace, seed: int, row: str) -> dict[str, Any]:
    """Teach and evaluate what is still to be done, and read the evaluation."""
    here = args.out / f"seed-{seed}" / folder_name(row)
    base, work, images = here / "base", here / "work", ROWS[row]
    asked = ["--model", str(base), "--data", str(args.data), "--images", images]
    asked += ["--candidate-images", args.candidate_images, "--device", args.device]
    asked += shlex.split(args.test)
    wanted = settings(EVALUATION, asked)  # a wrong flag is refused before hours of teaching
    if not base.exists():
        print(f"\n{row}, seed {seed}")
        teach_ranking(
            args.base / "names", base, work, args.data, args.candidate_images, args.scale, seed,
            args.device, clock=lambda: False, images=images,
        )
        drop_checkpoints(work)
    report = here / "test"
    if not is_evaluated(report):
        script("evaluate").main([*asked, "--out", str(report)])
    del wanted["model"]  # the folder may have been moved
    check_settings(report, wanted)
    return read_report(report)["sets"]


def table(seeds: list[Seed]) -> str:
    """For each candidate set the rows, and what posters add in NDCG@3."""
    lines = []
    for kind in seeds[0][CONTROL]:
        sets = [{row: found[kind] for row, found in seed.items()} for seed in seeds]
        found = compare_rows(sets, CONTROL, METRICS)
        lines.append(
            f"\n**{kind} candidates**, {found['users']} users, {found['seeds']} seed(s), percent; "
            f"− {CONTROL}: NDCG@3, points, 95% interval over users; over seeds; seeds above\n"
        )
        lines += head(["row", *METRICS, f"− {CONTROL}", "over users", "over seeds", "above"])
        for row, entry in found["rows"].items():
            values = [percent(entry["values"][metric]) for metric in METRICS]
            lines.append(line([row, *values, *against_cells(entry, len(seeds))]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2025, 2026])
    parser.add_argument("--test", default="", help="flags of evaluate.py")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    known = args.base / "settings.json"
    if not known.exists():
        raise InputError(
            f"{known}: no such file; expected in --base the OUT of benchmarks/movielens1m_base.py"
        )
    wanted = data_hash(load_catalog(args.data))
    of_base = read_object(known)
    if of_base["data"] != wanted:
        raise InputError(
            f"{args.base}: made of data of hash {of_base['data']}, {args.data} has {wanted}; give "
            "the data folder that the base was made of"
        )
    names = args.base / "names" / "model.safetensors"
    if not names.exists():
        raise InputError(
            f"{names}: no such file, expected the base's stage `names`; let "
            "benchmarks/movielens1m_base.py come so far"
        )
    args.scale, args.candidate_images = Scale(**of_base["scale"]), of_base["candidate_images"]
    taught = {key: of_base[key] for key in ("data", "scale", "candidate_images")}
    open_folder(args.out, {**taught, "names": sha256(names)})
    seeds = []
    for seed in args.seeds:
        seeds.append({row: make_row(args, seed, row) for row in ROWS})
    text = table(seeds)
    write_text(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    run(main)
