r"""Retrieve and rerank: BR-MRS takes the N best items of the whole catalogue for each user, HaNoRec
puts them in order.

Nobody is helped: a target that is not retrieved counts as missed, before and after, and so does one
that only its id brought among the N, since an item beyond them scores as high. T = examples, one
target each; N = items retrieved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hanorec.base.config import EvalConfig
from hanorec.base.terminal import aligned
from hanorec.datasets.interactions import Example, HeldOut
from hanorec.metrics import bootstrap_interval, ndcg_rows, paired_test, shown_test
from hanorec.ranking.fusion import fuse_scores

KS = (1, 3, 5, 10, 20, 50)

PRINTED = ("Recall@3", "NDCG@3", "Recall@10", "NDCG@10")  # of the paired tests


# ---- places ----


def target_places(places: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
    """The place of each target (T,) in (T, N) places of the candidates.

    It is infinity where the target was not retrieved.
    """
    found = np.full(len(examples), np.inf)
    for number, (place, example) in enumerate(zip(places, examples, strict=True)):
        if example.target in example.candidates:
            found[number] = place[example.candidates.index(example.target)]
    return found


def places_by_score(scores: np.ndarray) -> np.ndarray:
    """(T, N) scores -> (T, N) places, 1 = best; a tie counts against every item in it."""
    return (scores[:, None, :] >= scores[:, :, None]).sum(2)


# ---- the report ----


def rerank(
    held: HeldOut,
    examples: Sequence[Example],
    places: np.ndarray,
    found: np.ndarray,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    seconds: Mapping[str, float],
    config: EvalConfig,
) -> dict[str, Any]:
    """The report of a reranking, printed and returned: every order, and what each stage costs.

    Args:
        examples, places, found: of `hanorec.ranking.retrieving.retrieved`, the last one its scores
            (T, N); some may share a title.
        scores: policy -> {"sum": (T, N)}.
        seconds: "retrieval" and each policy -> what all examples took together.
        config: its seed, and w of RC-2 where it has one.
    """
    sums = {policy: of_policy["sum"] for policy, of_policy in scores.items()}
    ordering = sums
    if config.fuse is not None:
        ordering = {policy: fuse_scores(s, found, config.fuse) for policy, s in sums.items()}
        print(f"each policy's order is by RC-2, the retriever's score with w = {config.fuse:g}")
    report = rerank_report(examples, places, ordering, config.seed)
    report["seconds_per_user"] = {stage: s / len(examples) for stage, s in seconds.items()}
    report["users"] = _retrieved_items(examples, places, held.catalog.ids)
    report["scores"] = {"retriever": _in_order(examples, places, found)}
    for policy, of_policy in sums.items():
        report["scores"][policy] = _in_order(examples, places, of_policy)
    print_report(report)
    _say_equal_titles(examples, held.catalog.titles)
    return report


def _say_equal_titles(examples: Sequence[Example], titles: Sequence[str]) -> None:
    """A catalogue may hold a title twice, and then no policy can tell the two items apart."""
    equal = 0
    for example in examples:
        equal += len({titles[row] for row in example.candidates}) < len(example.candidates)
    if equal:
        print(
            f"note: {equal} of {len(examples)} users have retrieved items of one title; these "
            "score alike, and a tie counts against all of them"
        )


def rerank_report(
    examples: Sequence[Example],
    before: np.ndarray,
    scores: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """Recall and NDCG of the retriever's order and of every policy's, each with its interval over
    users, and each policy against the retriever.

    before: (T, N) places with the retriever, ties counted against. scores: policy -> (T, N).
    """
    n = before.shape[1]
    ranks = {"retriever": target_places(before, examples)}  # order -> (T,)
    for policy, of_policy in scores.items():
        ranks[policy] = target_places(places_by_score(of_policy), examples)
    missed = ranks["retriever"] > n  # (T,)
    for of_order in ranks.values():
        of_order[missed] = np.inf
    rows = {order: _metric_rows(rank, n) for order, rank in ranks.items()}

    paired = []
    for policy in scores:
        paired += _against_retriever(policy, rows[policy], rows["retriever"], seed)
    return {
        "top_n": n,
        "retrieved": float(np.isfinite(ranks["retriever"]).mean()),
        "orders": {order: _order_report(ranks[order], rows[order], seed) for order in ranks},
        "paired": paired,
    }


def _metric_rows(rank: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Metric -> its value for each target: (T,) in 0 .. 1."""
    rows = {}
    for k in KS:
        if k <= n:
            rows[f"Recall@{k}"] = (rank <= k).astype(float)
            rows[f"NDCG@{k}"] = ndcg_rows(rank, k)
    return rows


def _order_report(
    rank: np.ndarray, rows: Mapping[str, np.ndarray], seed: int
) -> dict[str, Any]:
    metrics = {}
    for metric, values in rows.items():
        interval = bootstrap_interval(values, seed=seed)
        metrics[metric] = {"value": float(values.mean()), "interval": interval}
    return {"metrics": metrics, "ranks": [int(r) if np.isfinite(r) else None for r in rank]}


def _against_retriever(
    policy: str,
    rows: Mapping[str, np.ndarray],
    retriever: Mapping[str, np.ndarray],
    seed: int,
) -> list[dict[str, Any]]:
    tests = []
    for metric, values in rows.items():
        test = paired_test(values, retriever[metric], seed=seed)
        tests.append({"order": policy, "than": "retriever", "metric": metric, **test})
    return tests


def _retrieved_items(
    examples: Sequence[Example], places: np.ndarray, ids: Sequence[str]
) -> list[dict[str, Any]]:
    """Each user's target and retrieved items by id, in the retriever's order."""
    users = []
    for example, place in zip(examples, places, strict=True):
        retrieved = [ids[example.candidates[i]] for i in _order(example, place)]
        users.append({"user": example.user, "target": ids[example.target], "retrieved": retrieved})
    return users


def _in_order(
    examples: Sequence[Example], places: np.ndarray, scores: np.ndarray
) -> list[list[float]]:
    """(T, N) scores of the candidates as they are, those of each user in the retriever's order."""
    rows = []
    for example, place, own in zip(examples, places, scores, strict=True):
        rows.append(own[_order(example, place)].tolist())
    return rows


def _order(example: Example, place: np.ndarray) -> np.ndarray:
    """The candidates as the retriever has them; of equal places the smaller row first."""
    return np.lexsort((example.candidates, place))


def print_report(report: Mapping[str, Any]) -> None:
    """`rerank_report`, with the seconds a user that each stage took."""
    print(
        f"\nretriever: {100 * report['retrieved']:.2f}% of the targets among the "
        f"{report['top_n']} items retrieved, so no order can recall more"
    )
    orders = report["orders"]
    metrics = [name for name in orders["retriever"]["metrics"] if name != "NDCG@1"]  # = Recall@1
    lines = [" | ".join(["order, %", *metrics])]
    for name, order in orders.items():
        values = [100 * order["metrics"][metric]["value"] for metric in metrics]
        lines.append(" | ".join([name, *(f"{value:.2f}" for value in values)]))
    print(aligned("\n".join(lines)), end="")

    for test in report["paired"]:
        if test["metric"] in PRINTED:
            print(f"{test['order']} - {test['than']}, {test['metric']}: {shown_test(test)}")

    seconds = dict(report["seconds_per_user"])
    retrieval = seconds.pop("retrieval")
    policies = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    print(f"seconds a user: retrieval {retrieval:.4f}, {policies}")
