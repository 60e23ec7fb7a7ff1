"""Figures of docs/audit.md that are drawn from its tables, which hold all that they show.

    python -m hanorec.studies.plots_audit docs/audit.md docs/figures
        ablation-Posterland.png, ablation-MovieLens-100K.png, noise.png

`python -m hanorec.studies.plots` draws the same of a run, from its results.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.plots_audit")
    result.add_argument("page", type=Path, help="docs/audit.md")
    result.add_argument("out", type=Path, help="folder for the figures")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import numpy as np

from hanorec.base.errors import InputError
from hanorec.studies.figures import save
from hanorec.studies.plots_results import METRIC, draw_differences, draw_noise
from hanorec.studies.tables import CONTROL

# **Posterland**, 5 seeds, 1500 users in all ... up to the next of them, or the first figure.
DATA = re.compile(
    r"^\*\*([\w-]+)\*\*, (\d+) seeds, (\d+) users(.*?)(?=^\*\*|^!)",
    re.MULTILINE | re.DOTALL,
)

# random candidates | NDCG@3 | − DPO | over users | over seeds | ..., and the rows below.
TABLE = re.compile(
    rf"^(\w+) candidates \| {METRIC} \| − {CONTROL} .*\n---.*\n((?:.* \| .*\n)+)", re.MULTILINE,
)


# (2.897 without noise), and further down σ_n | all, α/r = 1 | all, 2 | ..., and the rows below.
NOISE = re.compile(
    r"\((\S+) without noise\)[\s\S]*?^σ_n \| (.*)\n---.*\n((?:.* ± .*\n)+)", re.MULTILINE,
)


def read_tables(text: str) -> dict[str, dict[str, Any]]:
    """Data set -> candidate set -> what `hanorec.studies.tables.compare_rows` returns, as far as
    the page has it: one mean a row, in hundredths of a point."""
    found: dict[str, dict[str, Any]] = {}
    for name, seeds, users, tables in DATA.findall(text):
        found[name] = {}
        for kind, lines in TABLE.findall(tables):
            rows = dict(read_row(line) for line in lines.splitlines())
            found[name][kind] = {"seeds": int(seeds), "users": int(users), "rows": rows}
    return found


def read_row(line: str) -> tuple[str, dict[str, Any]]:
    """A row's name, and its values as shares of 1."""
    row, value, difference, over_users, over_seeds, *_ = map(str.strip, line.split("|"))
    entry: dict[str, Any] = {"values": {METRIC: numbers(value)[:1]}}
    if difference:
        low, high = numbers(over_users)
        entry["against_control"] = {
            "difference": numbers(difference)[0], "low": low, "high": high,
            "over_seeds": numbers(over_seeds),
        }
    return row, entry


def read_noise(text: str) -> dict[str, Any]:
    """What noise.json of `hanorec.studies.noise_curve` holds, from the table of entry 4."""
    clean, head, lines = NOISE.findall(text)[0]
    rows = [re.findall(r"\d+\.\d+", line) for line in lines.splitlines()]
    sigma, *columns = np.array(rows, np.float64).T.tolist()
    curves = []
    for number, name in enumerate(head.split(" | ")):
        layers, _, ratio = name.rpartition(", ")
        curves.append({
            "name": f"{layers}, α/r = {ratio.rpartition(' ')[2]}", "sigma": sigma,
            "mean": columns[2 * number], "deviation": columns[2 * number + 1],
        })
    return {"clean": float(clean), "curves": curves}


def numbers(cell: str) -> list[float]:
    """Those of a cell in percent, or in points, as shares."""
    return [float(word) / 100 for word in re.findall(r"[-+]?\d+\.\d+", cell)]


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    text = args.page.read_text(encoding="utf-8")
    tables = read_tables(text)
    if not (tables and NOISE.search(text)):
        raise InputError(f"{args.page}: no tables of the ablation and of noise; expected audit.md")
    drawn = {"noise.png": draw_noise("SmolLM2-135M", read_noise(text))}
    for name, sets in tables.items():
        drawn[f"ablation-{name}.png"] = draw_differences(f"{name}, test", CONTROL, sets)
    for name, figure in drawn.items():
        print(f"wrote {save(figure, args.out / name)}")
