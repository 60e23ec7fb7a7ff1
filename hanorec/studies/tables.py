"""What the ablation reads from its runs: mean, deviation and intervals, and a Markdown table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hanorec.metrics import paired_test
from hanorec.ranking.report import METRICS

CONTROL = "DPO"  # the row w/o ALL, to which the others are held

# NDCG@3 on MicroLens, document 000
PUBLISHED = {
    "HaNoRec": 56.73,
    "w/o HaRS": 51.26,
    "w/o NoDO": 54.38,
    "w/o SAM": 53.91,
    "DPO": 49.82,
}

T_975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t for 2 .. 10 seeds

VALUES = ["row", *METRICS, "CPU s", "published, MicroLens"]
DIFFERENCES = ["row", f"− {CONTROL}", "over users", "over seeds", "above"]


def summarise(seeds: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """Over the seeds of one data set, each {row: what `hanorec.studies.runs.run_row` returns}.

    Returns: {set: {"users", "seeds", "same_users", "rows": {row: values of each metric, CPU
    seconds, difference to DPO in NDCG@3}}}.

    Where all seeds have the same users, each user's values are averaged over the seeds before
    users are resampled; else the users of all seeds are the sample. Either way the interval over
    users holds the trained models fixed; the one over seeds is Student's, of the seeds' mean
    differences (2 to 10 seeds).
    """
    return {kind: _summarise_set(seeds, kind) for kind in seeds[0]["SFT"]["sets"]}


def _summarise_set(seeds: Sequence[Mapping[str, dict[str, Any]]], kind: str) -> dict[str, Any]:
    sets = []  # a seed: {row: its evaluation on this candidate set}
    for seed in seeds:
        sets.append({row: one["sets"][kind] for row, one in seed.items()})
    found = compare_rows(sets, CONTROL, METRICS)
    for row, one in found["rows"].items():
        one["cpu_seconds"] = [seed[row]["cpu_seconds"] for seed in seeds]
    for name in ("popularity", "chance"):
        found["rows"][name] = {"values": values_of([one["SFT"][name] for one in sets], METRICS)}
    return found


def compare_rows(
    sets: Sequence[Mapping[str, dict[str, Any]]], control: str, metrics: Sequence[str],
) -> dict[str, Any]:
    """Every row over the seeds, and against the control where there is one.

    sets: a seed's {row: its evaluation on one candidate set}.
    """
    users = [_users(next(iter(one.values()))) for one in sets]
    shared = all(of_seed == users[0] for of_seed in users)
    rows: dict[str, Any] = {}
    for row in sets[0]:
        rows[row] = {"values": values_of([one[row] for one in sets], metrics)}
        if row != control and control in sets[0]:
            own = [one[row]["rows"]["NDCG@3"] for one in sets]
            other = [one[control]["rows"]["NDCG@3"] for one in sets]
            rows[row]["against_control"] = against(own, other, shared)

    count = len(users[0]) if shared else sum(len(of_seed) for of_seed in users)
    return {"users": count, "seeds": len(sets), "same_users": shared, "rows": rows}


def _users(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Who was asked what: users are the same where their target and candidates are, too."""
    return [(user["user"], user["target"], *user["candidates"]) for user in evaluation["users"]]


def values_of(
    seeds: Sequence[Mapping[str, Any]], metrics: Sequence[str],
) -> dict[str, list[float]]:
    """Metric -> its value in each seed."""
    values = {}
    for metric in metrics:
        values[metric] = [one["metrics"][metric]["value"] for one in seeds]
    return values


def half_width(values: np.ndarray) -> float:
    """Of Student's 95% interval of the mean of one value a seed, of 2 to 10 seeds."""
    return T_975[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5


def against(
    own: Sequence[Sequence[float]], control: Sequence[Sequence[float]], shared: bool,
) -> dict[str, Any]:
    """A row against the control, each by seeds and users; shared: the users are the same."""
    gaps = np.array([np.mean(a) - np.mean(b) for a, b in zip(own, control, strict=True)])
    over_seeds = None
    if 1 < len(gaps) <= 10:
        half = half_width(gaps)
        over_seeds = [gaps.mean() - half, gaps.mean() + half]
    if shared:
        test = paired_test(np.mean(own, 0), np.mean(control, 0))
    else:
        test = paired_test(np.concatenate(own), np.concatenate(control))
    return {
        **test,
        "seeds": gaps.tolist(),
        "above": int((gaps > 0).sum()),
        "over_seeds": over_seeds,
    }


def table(results: Mapping[str, Any], split: str) -> str:
    """Markdown, in percent: two tables for each data set and candidate set of the results."""
    lines = []
    for data, sets in results.items():
        for kind, one in sets.items():
            lines += [_caption(data, kind, split, one), *head(VALUES)]
            known = ["chance", "popularity"]
            for row in [*known, *(name for name in one["rows"] if name not in known)]:
                lines.append(line([row, *_values(row, one["rows"][row])]))
            lines += ["", *head(DIFFERENCES)]
            for row, entry in one["rows"].items():
                if "against_control" in entry:
                    lines.append(line([row, *against_cells(entry, one["seeds"])]))
    return "\n".join(lines) + "\n"


def _caption(data: str, kind: str, split: str, one: Mapping[str, Any]) -> str:
    pairs = "users of all seeds together"
    if one["same_users"]:
        pairs = "the same users in every seed, averaged over the seeds"
    return (
        f"\n**{data}, {kind} candidates**, {split}: mean ± deviation over {one['seeds']} seed(s), "
        f"percent; then the difference to {CONTROL} in NDCG@3, in points: 95% interval over "
        f"{one['users']} users ({pairs}); 95% interval over the seeds; seeds above.\n")


def _values(row: str, entry: Mapping[str, Any]) -> list[str]:
    """The cells of `VALUES`, but for the row's name."""
    cells = [percent(entry["values"][metric], row != "chance") for metric in METRICS]
    cells.append(mean_cell(entry.get("cpu_seconds", [])))
    cells.append(f"{PUBLISHED[row]:.2f}" if row in PUBLISHED else "")
    return cells


def head(columns: Sequence[str]) -> list[str]:
    """The two lines above a table's rows."""
    return [line(columns), "---|" * (len(columns) - 1) + "---"]


def line(cells: Iterable[str]) -> str:
    return " | ".join(cells)


def percent(values: Sequence[float], spread: bool = True) -> str:
    """The mean over the seeds and, of several, their deviation."""
    cell = f"{100 * np.mean(values):.2f}"
    if len(values) > 1 and spread:
        cell += f" ± {100 * np.std(values, ddof=1):.2f}"
    return cell


def mean_cell(values: Sequence[float | None]) -> str:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.0f}" if known else ""


def against_cells(entry: Mapping[str, Any], seeds: int) -> list[str]:
    """The difference to the control, its two intervals, and the seeds above."""
    test = entry.get("against_control")
    if test is None:
        return [""] * 4
    spread = test["over_seeds"]
    return [
        f"{100 * test['difference']:+.2f}",
        _interval([test["low"], test["high"]]),
        _interval(spread) if spread else "",
        f"{test['above']} of {seeds}",
    ]


def _interval(ends: Iterable[float]) -> str:
    low, high = ends
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]"
