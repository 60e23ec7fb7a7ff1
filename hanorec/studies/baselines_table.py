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

COLUMNS = [
    "row", "class", *METRICS, POOLED, "NDCG@3 over users", f"− {CONTROL}", "over users",
    "over seeds", "above", "p", "published: MicroLens, Netflix, MovieLens-1M",
]
COSTS = [
    "row", *FULL, "history", "trials", "chosen", "training pairs", "training CPU s",
    "scoring CPU s",
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
    """Markdown, in percent."""
    rows, seeds = results["rows"], len(results["seeds"])
    lines = []
    data = Path(results["data"]).resolve().name
    for kind, one in results["sets"].items():
        where = f"{data}, {results['split']}, {kind} candidates, {one['users']} targets"
        lines += [f"\n**{where}**\n", *head(COLUMNS)]
        for name, entry in one["rows"].items():
            lines.append(line([name, *_cells(rows.get(name, CHANCE), entry, seeds)]))
    lines += ["\n**Full ranking, and what each row took**\n", *head(COSTS)]
    lines += [line([name, *_cost_cells(row)]) for name, row in rows.items()]
    lines.append(_legend(results))
    for name in rows:
        if ROWS[name].said:
            lines.append(f"- {name}: {ROWS[name].said}.")
    return "\n".join(lines) + "\n"


CHANCE = {"class": "none", "named": True, "seeded": False, "published": []}


def _cells(row: Mapping[str, Any], entry: Mapping[str, Any], seeds: int) -> list[str]:
    """All columns of a candidate set's table but the name."""
    kind = row["class"] if row["named"] else f"{row['class']}, not named by the document"
    ends = entry.get("over_users")  # chance has none
    test = entry.get("against_control")
    return [
        kind,
        *(percent(entry["values"][metric], row["seeded"]) for metric in [*METRICS, POOLED]),
        f"[{100 * ends[0]:.2f}, {100 * ends[1]:.2f}]" if ends else "",
        *against_cells(entry, seeds),
        f"{test['p']:.4f}" if test else "",
        ", ".join("–" if value is None else f"{value:.2f}" for value in row["published"]),
    ]


def _cost_cells(row: Mapping[str, Any]) -> list[str]:
    full = row["full_ranking"]
    return [
        *(percent(full[name]) if full else "" for name in FULL),
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
