"""What `hanorec.studies.brmrs_ablation` reads from its runs, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hanorec.metrics import shown_test
from hanorec.studies.tables import head, line, percent

METRICS = ["Recall@10", "Recall@20", "NDCG@10", "NDCG@20"]

BRANCHES = [
    "Recall@20_t", "Recall@20_v", "win", "unique_t", "unique_v", "synergy", "degradation",
]

TESTED = ["Recall@20", "NDCG@20"]


def table(results: Mapping[str, Any]) -> str:
    """Markdown, in percent."""
    seeds, rows = len(results["seed"]), results["rows"]
    lines = [f"Test, mean ± deviation over {seeds} seed(s), percent.\n"]
    lines += head(["row", *METRICS, "epochs"])
    for name, row in rows.items():
        epochs = f"{np.mean(row['epochs']):.0f}"
        lines.append(line([name, *_cells(row, METRICS), epochs]))

    if all(row["test"].keys() >= set(BRANCHES) for row in rows.values()):
        lines.append(
            "\nBranches, test, percent. Shares of targets by which branch has them in its top "
            "20.\n"
        )
        lines += head(["row", *BRANCHES])
        lines += [line([name, *_cells(row, BRANCHES)]) for name, row in rows.items()]

    paired = results["paired"]
    lines.append(
        "\nPaired over users, in points: difference [95% interval], p (least 0.0005), seeds above. "
        "The seeds are averaged first, so the interval holds their mean fixed. "
        f"{len(paired)} tests: one in twenty below 0.05 is to be expected by chance.\n"
    )
    lines += head(["row - control", *TESTED])
    for i in range(0, len(paired), len(TESTED)):
        tests = paired[i : i + len(TESTED)]  # of one row and one control
        cells = [f"{shown_test(t, 4)}, {t['seeds_above']} of {seeds}" for t in tests]
        lines.append(line([f"{tests[0]['row']} - {tests[0]['against']}", *cells]))
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """Mean and, over several seeds, deviation of each metric on test."""
    return [percent(row["test"][metric]) for metric in metrics]
