"""What one candidate set says of a recommender, with chance and popularity beside it (EV-2, EV-3).

U = users, C = candidates of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hanorec.base.terminal import aligned
from hanorec.datasets.interactions import Example, HeldOut, item_counts
from hanorec.metrics import (
    auc_rows,
    bootstrap_interval,
    ndcg_rows,
    paired_test,
    pooled_auc,
    rank_of_positive,
    shown_test,
)

AT = 3  # the document's cut-off

METRICS = (f"HR@{AT}", f"NDCG@{AT}", "AUC")

# policy -> its scores (U, C): "sum", and a language model's per token beside it, "mean"
Scores = Mapping[str, Mapping[str, np.ndarray]]


def compare_sets(
    sets: Mapping[str, Sequence[Example]], scores: Mapping[str, Scores], held: HeldOut, seed: int
) -> dict[str, dict[str, Any]]:
    """Candidate set -> what `compare` says of it; printed."""
    report = {}
    for kind, examples in sets.items():
        report[kind] = compare(examples, scores[kind], held, seed)
        print_set(kind, report[kind])
    return report


def compare(
    examples: Sequence[Example], scores: Scores, held: HeldOut, seed: int
) -> dict[str, Any]:
    """The report of one candidate set: metrics of every policy, what they stand beside, tests."""
    results = {policy: summarise(of["sum"], examples, seed) for policy, of in scores.items()}
    means = {}
    for policy, of in scores.items():
        if "mean" in of:
            means[policy] = summarise(of["mean"], examples, seed)
    popular = popularity(held.interactions.train, examples)
    return {
        "users": by_id(examples, held.catalog.ids),
        "policies": results,
        "policies_mean_score": means,
        "popularity": summarise(popular, examples, seed),
        "chance": chance(len(examples[0].candidates)),
        "paired": paired_tests(results, seed),
        "scores": {policy: of["sum"].tolist() for policy, of in scores.items()},
    }


def summarise(scores: np.ndarray, examples: Sequence[Example], seed: int) -> dict[str, Any]:
    """Metrics with bootstrap 95% intervals, and what they are made of.

    That is the values of each user, the ranks, accuracy by the positive's position in the prompt,
    and the AUC over all pairs.

    scores: (U, C), in the order of each example's candidates.
    """
    positive = np.array([e.candidates.index(e.target) for e in examples])  # (U,)
    ranks = rank_of_positive(scores, positive)  # (U,)
    own = np.take_along_axis(scores, positive[:, None], 1)[:, 0]  # (U,)
    others = np.arange(scores.shape[1]) != positive[:, None]  # (U, C)
    negative = scores[others].reshape(len(scores), -1)  # (U, C - 1)
    rows = {
        f"HR@{AT}": (ranks <= AT).astype(float),
        f"NDCG@{AT}": ndcg_rows(ranks, AT),
        "AUC": auc_rows(own, negative),
    }
    metrics = {}
    for name, values in rows.items():
        interval = bootstrap_interval(values, seed=seed)
        metrics[name] = {"value": float(values.mean()), "interval": interval}
    return {
        "metrics": metrics,
        "pooled_AUC": pooled_auc(own, negative.ravel()),
        "accuracy_by_position": _accuracy_by_position(ranks, positive, scores.shape[1]),
        "rows": {name: values.tolist() for name, values in rows.items()},
        "ranks": ranks.tolist(),
    }


def _accuracy_by_position(
    ranks: np.ndarray, positive: np.ndarray, candidates: int
) -> dict[str, dict[str, float]]:
    """Position of the positive -> how many users have it there, and how often it is ranked first.

    A model that looks at positions instead of items gives itself away here.
    """
    found = {}
    for position in range(candidates):
        here = positive == position  # (U,)
        if here.any():
            accuracy = float((ranks[here] == 1).mean())
            found[str(position)] = {"users": int(here.sum()), "accuracy": accuracy}
    return found


def chance(candidates: int) -> dict[str, Any]:
    """What a random order of the candidates reaches, in the form of `summarise`."""
    top = min(AT, candidates)
    every_rank = np.arange(1, candidates + 1)
    values = {
        f"HR@{AT}": top / candidates,
        f"NDCG@{AT}": float(ndcg_rows(every_rank, AT).mean()),
        "AUC": 0.5,
    }
    return {"metrics": {name: {"value": v, "interval": None} for name, v in values.items()}}


def popularity(
    train: Mapping[str, Sequence[int]], examples: Sequence[Example]
) -> np.ndarray:
    """Scores (U, C): how often each candidate was chosen in training.

    train: user -> catalogue rows.
    """
    count = item_counts(train)
    scores = []
    for example in examples:
        scores.append([float(count[row]) for row in example.candidates])
    return np.array(scores)


def paired_tests(results: Mapping[str, dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The first of the results of `summarise` against each other one, metric by metric."""
    (best, first), *others = results.items()
    tests = []
    for name, other in others:
        for metric, rows in other["rows"].items():
            test = paired_test(first["rows"][metric], rows, seed=seed)
            tests.append({"better": best, "than": name, "metric": metric, **test})
    return tests


def by_id(examples: Sequence[Example], ids: Sequence[str]) -> list[dict[str, Any]]:
    """Each user's target and candidates by id."""
    users = []
    for example in examples:
        candidates = [ids[row] for row in example.candidates]
        target = ids[example.target]
        users.append({"user": example.user, "target": target, "candidates": candidates})
    return users


def print_table(kind: str, rows: Mapping[str, dict[str, Any]]) -> None:
    """One candidate set: a line a policy, value and interval in percent."""
    lines = [" | ".join([f"{kind} candidates", *METRICS])]
    for name, result in rows.items():
        cells = [_cell(result["metrics"][metric]) for metric in METRICS]
        lines.append(" | ".join([name, *cells]))
    print("\n" + aligned("\n".join(lines)), end="")


def _cell(metric: Mapping[str, Any]) -> str:
    text = f"{100 * metric['value']:.2f}"
    if metric["interval"] is None:
        return text
    low, high = metric["interval"]
    return f"{text} [{100 * low:.2f}, {100 * high:.2f}]"


def print_tests(tests: Sequence[Mapping[str, Any]]) -> None:
    """`paired_tests`, a line each."""
    for test in tests:
        print(f"{test['better']} - {test['than']}, {test['metric']}: {shown_test(test)}")


def print_set(kind: str, report: Mapping[str, Any]) -> None:
    """One candidate set's report: each policy twice, by both of its scores, and the tests."""
    rows = dict(report["policies"])
    for policy, result in report["policies_mean_score"].items():
        rows[f"{policy} (mean score)"] = result
    rows |= {name: report[name] for name in ("popularity", "chance")}
    print_table(kind, rows)
    print_tests(report["paired"])
