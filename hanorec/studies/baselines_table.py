"""What the comparison reads from its runs: a table for each candidate set, and what to know of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.baselines.rows import ALWAYS, CONTROL, ROWS
from hanorec.metrics import bootstrap_interval
from hanorec.ranking.report import METRICS
from hanorec.studies.baselines_runs import METRIC, Comparison
from hanorec.studies.tables import (
    against_cells,
    compare_rows,
    head,
    line,
    mean_cell,
    percent,
    values_of,
)

POOLED = "pooled AUC"
FULL = ["Recall@10", "NDCG@10", "Recall@20", "NDCG@20"]

VALUES = ["row", "class", *METRICS, POOLED, "published: MicroLens, Netflix, MovieLens-1M"]
DIFFERENCES = [
    "row", "NDCG@3 over users", f"− {CONTROL}", "over users", "over seeds", "above", "p",
]
COSTS = [
    "row", "history", "trials", "chosen", "training pairs", "training CPU s", "scoring CPU s",
]

LEGEND = """
Mean ± deviation over {seeds} seed(s) of training, percent.

- AUC: mean over users. Pooled AUC: all pairs of a positive and a negative, whatever user they come
  from.
- NDCG@3 over users: 95% interval of its mean, users drawn with replacement, seeds averaged.
- − {control}, where that is a row: paired difference in NDCG@3, in points; 95% interval over users
  (seeds averaged, the trained models held fixed) and over seeds (Student's); seeds above; p of a
  sign-flip test over users, not corrected for the number of rows.
- Published: NDCG@3 of document 000, on candidates that it does not state; MLLM-MSR's is inferred
  from HaNoRec's gain over it. Nothing here reproduces them.
- Chosen: by {metric} on validation, random candidates, seed {first}, of {trials} trial(s) of each
  trained row, on top of those of the row that it stands on; a variant (L = 5) is a row of its
  own. Rows by inner product also keep the epoch with the highest NDCG@10 on validation, in the
  ranking of all items; the others train a fixed number of epochs.{val}
- Recall and NDCG: full ranking of all items that the user did not have before, all users of
  {split}.tsv; targets that the user had are left out.
- History: how many of a user's last items a row reads before it answers; rows without a number
  know no order.
- Training pairs: (user, item) pairs, prompts or preference pairs that the row's own training sees
  in an epoch (SPRec: in all its rounds), beside those of the row that it stands on.
- CPU seconds: mean over seeds, of the processes that finished it, the chosen trial alone.
- {untrained:.1%} of the targets are items without a training pair; rows by inner product know
  nothing of them.

Adaptations, and what rows are:
"""


# ---- from the runs ----


def summarise(
    study: Comparison,
    seeds: Mapping[int, Mapping[str, dict[str, Any]]],
    untrained: float,
    popular: Mapping[str, float],
) -> dict[str, Any]:
    """Over the seeds, each {row: what `Comparison.run_row` returns}.

    Args:
        untrained: share of the targets without a training pair. popular: popularity's full ranking.
    """
    of_seeds = list(seeds.values())
    sets = {}
    for kind in next(iter(of_seeds[0].values()))["sets"]:
        sets[kind] = _summarise_set([_of_kind(one, kind) for one in of_seeds])
    rows = {}
    for name in study.rows:
        rows[name] = _row_facts(study, name, [one[name] for one in of_seeds])
        rows[name]["history"] = study.history(name, min(seeds))
    rows[ALWAYS]["full_ranking"] = {metric: [popular[metric]] for metric in FULL}
    return {
        "data": study.data,
        "split": study.split,
        "seeds": list(seeds),
        "untrained_targets": untrained,
        "sets": sets,
        "rows": rows,
    }


def _of_kind(seed: Mapping[str, dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Row -> its evaluation on one candidate set, the pooled AUC among its metrics."""
    found = {}
    for row, one in seed.items():
        own = one["sets"][kind]
        pooled = {POOLED: {"value": own["pooled_AUC"], "interval": None}}
        found[row] = {**own, "metrics": {**own["metrics"], **pooled}}
    return found


def _summarise_set(sets: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    found = compare_rows(sets, CONTROL, [*METRICS, POOLED])
    for row, one in found["rows"].items():
        of_seeds = [seed[row]["rows"]["NDCG@3"] for seed in sets]
        one["over_users"] = bootstrap_interval(np.mean(of_seeds, 0))
    chance = [next(iter(seed.values()))["chance"] for seed in sets]
    values = values_of(chance, METRICS)
    found["rows"] = {"chance": {"values": {**values, POOLED: values["AUC"]}}, **found["rows"]}
    return found


def _row_facts(
    study: Comparison, name: str, of_seeds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What of a row does not depend on the candidates; lists are by seed."""
    row, settings = ROWS[name], study.settings_of(name)
    full: dict[str, list[float]] = {}
    for one in of_seeds:
        for metric, value in one["full_ranking"].items():
            full.setdefault(metric, []).append(value)
    trials = []
    for setting, value in zip(settings, study.tried[name], strict=False):
        trials.append({"setting": str(setting), METRIC: value})
    return {
        "class": row.kind,
        "named": row.named,
        "seeded": bool(row.grid or row.below),  # by its training, or that of what it stands on
        "trials": trials,
        "chosen": str(settings[study.number(name)]) if row.grid else None,
        "full_ranking": full,
        "training_pairs": of_seeds[0]["pairs"],
        "training_cpu_seconds": [one["training"] for one in of_seeds],
        "scoring_cpu_seconds": [one["scoring"] for one in of_seeds],
        "published": row.published,
    }


# ---- as Markdown ----


def table(results: Mapping[str, Any]) -> str:
    """Markdown, in percent: first the row's NDCG@3 on all sets, then two tables for each set."""
    rows, seeds = results["rows"], len(results["seeds"])
    where = f"{Path(results['data']).resolve().name}, {results['split']}"
    lines = [f"\n**{where}, NDCG@3 on each set of candidates, and full ranking**\n"]
    lines += _body(["row", *results["sets"], *FULL], _glance(results))
    for kind, one in results["sets"].items():
        values, differences = {}, {}
        for name, entry in one["rows"].items():
            values[name] = _values(rows.get(name, CHANCE), entry)
            differences[name] = _differences(entry, seeds)
        lines += [
            f"\n**{where}, {kind} candidates, {one['users']} targets**\n", *_body(VALUES, values),
            f"\n**NDCG@3 of the same, and its difference to {CONTROL}**\n",
            *_body(DIFFERENCES, differences),
        ]
    costs = {name: _costs(row) for name, row in rows.items()}
    lines += ["\n**What each row took**\n", *_body(COSTS, costs), _legend(results)]
    for name in rows:
        if ROWS[name].said:
            lines.append(f"- {name}: {ROWS[name].said}.")
    return "\n".join(lines) + "\n"


CHANCE = {"class": "none", "named": True, "seeded": False, "published": [], "full_ranking": {}}


def _body(columns: Sequence[str], cells: Mapping[str, Sequence[str]]) -> list[str]:
    """A table's lines, given {row: its cells behind the name}."""
    return [*head(columns), *(line([name, *own]) for name, own in cells.items())]


def _glance(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """NDCG@3 of each candidate set, and the full ranking."""
    cells = {}
    for name in next(iter(results["sets"].values()))["rows"]:
        row = results["rows"].get(name, CHANCE)
        of_sets = [one["rows"][name]["values"]["NDCG@3"] for one in results["sets"].values()]
        full = row["full_ranking"]
        cells[name] = [
            *(percent(values, row["seeded"]) for values in of_sets),
            *(percent(full[metric]) if full else "" for metric in FULL),
        ]
    return cells


def _values(row: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    return [
        row["class"] if row["named"] else f"{row['class']}, not named by the document",
        *(percent(entry["values"][metric], row["seeded"]) for metric in [*METRICS, POOLED]),
        ", ".join("–" if value is None else f"{value:.2f}" for value in row["published"]),
    ]


def _differences(entry: Mapping[str, Any], seeds: int) -> list[str]:
    ends = entry.get("over_users")  # chance has none
    test = entry.get("against_control")
    return [
        f"[{100 * ends[0]:.2f}, {100 * ends[1]:.2f}]" if ends else "",
        *against_cells(entry, seeds),
        f"{test['p']:.4f}" if test else "",
    ]


def _costs(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["history"] or ""),
        str(len(row["trials"]) or ""),
        row["chosen"] or "",
        "" if row["training_pairs"] is None else f"{row['training_pairs']:,}",
        mean_cell(row["training_cpu_seconds"]),
        mean_cell(row["scoring_cpu_seconds"]),
    ]


def _legend(results: Mapping[str, Any]) -> str:
    tried = max(len(row["trials"]) for row in results["rows"].values())
    val = ""
    if results["split"] == "val":
        val = " Figures on validation, as these are, flatter every row that had a choice."
    return LEGEND.format(
        seeds=len(results["seeds"]), first=results["seeds"][0], control=CONTROL, metric=METRIC,
        trials=tried or 1, val=val, split=results["split"], untrained=results["untrained_targets"])
