r"""Retrieve and rerank: BR-MRS takes the N best items of the whole catalogue for each user, HaNoRec puts them in order.

Nobody is helped: a target that is not retrieved counts as missed, before and after. T = examples, one target each; N = items retrieved.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hanorec.base.errors import InputError
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example
from hanorec.metrics import bootstrap_interval, ndcg_rows, paired_test
from hanorec.ranking.retriever import Retriever

KS = (1, 3, 5, 10, 20, 50)


def retrieve(retriever: Retriever, catalog: Catalog, examples: Sequence[Example], had: Sequence[Iterable[int]], n: int,
             seed: int) -> tuple[list[Example], np.ndarray]:
    """The examples with the retriever's n best items as candidates, and each candidate's place with the retriever, (T, n), 1 = best.

    had: the items that each example's user had before the target; none of them is retrieved. The candidates stand in the prompt in
    random order, as they do in training, so that the new order owes nothing to the old one.
    InputError: the retriever knows other items, or does not know a user; fewer than n items are left.
    """
    if retriever.items != catalog.ids:
        raise InputError(f"--retriever: it ranks {len(retriever.items)} items, {catalog.directory} has {len(catalog.ids)} or others, expected the "
                         "same in the same order; train it on this data")
    row = {user: number for number, user in enumerate(retriever.users)}
    if unknown := [example.user for example in examples if example.user not in row]:
        raise InputError(f"--retriever: it does not know user {unknown[0]!r}, expected all {len(examples)} users; train it on this data")
    had, users = [set(items) for items in had], torch.tensor([row[example.user] for example in examples])  # (T,)
    # The retriever leaves out training items; so many more, so that n are left without those had since (validation items).
    later = max(len(items) - degree for items, degree in zip(had, retriever.seen.degree[users].tolist(), strict=True))
    best = retriever.top_n(users, n + later).tolist()
    found, places = [], []
    for number, (example, order, before) in enumerate(zip(examples, best, had, strict=True)):
        order = [item for item in order if item not in before][:n]
        shuffle = np.random.default_rng([seed, number]).permutation(n)
        found.append(replace(example, candidates=tuple(order[i] for i in shuffle)))
        places.append(shuffle + 1)
    return found, np.array(places)


def target_places(places: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
    """The place of each target (T,) in (T, N) places of the candidates; infinity where it was not retrieved."""
    return np.array([place[e.candidates.index(e.target)] if e.target in e.candidates else np.inf for place, e in zip(places, examples, strict=True)])


def places_by_score(scores: np.ndarray) -> np.ndarray:
    """(T, N) scores -> (T, N) places, 1 = best; a tie counts against every item in it."""
    return (scores[:, None, :] >= scores[:, :, None]).sum(2)


def rerank_report(examples: Sequence[Example], before: np.ndarray, scores: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Recall and NDCG of the retriever's order and of every policy's, with intervals over users, and each against the retriever.

    before: (T, N) places with the retriever. scores: policy -> (T, N).
    """
    n = before.shape[1]
    places = {"retriever": before} | {policy: places_by_score(s) for policy, s in scores.items()}
    report: dict[str, Any] = {"top_n": n, "retrieved": float(np.isfinite(target_places(before, examples)).mean()), "orders": {}, "paired": []}
    rows = {}
    for name, place in places.items():
        rank = target_places(place, examples)
        rows[name] = {}
        for k in [k for k in KS if k <= n]:
            rows[name] |= {f"Recall@{k}": (rank <= k).astype(float), f"NDCG@{k}": ndcg_rows(rank, k)}
        report["orders"][name] = {"metrics": {metric: {"value": float(values.mean()), "interval": bootstrap_interval(values, seed=seed)}
                                              for metric, values in rows[name].items()},
                                  "ranks": [int(r) if np.isfinite(r) else None for r in rank]}
        if name != "retriever":
            report["paired"] += [{"order": name, "than": "retriever", "metric": metric, **paired_test(values, rows["retriever"][metric], seed=seed)}
                                 for metric, values in rows[name].items()]
    return report


def print_report(report: dict[str, Any]) -> None:
    print(f"\nretriever: {100 * report['retrieved']:.2f}% of the targets among the {report['top_n']} items retrieved, so no order can recall more")
    metrics = [name for name in next(iter(report["orders"].values()))["metrics"] if name != "NDCG@1"]  # it is Recall@1
    width = max(12, *map(len, report["orders"]))
    print(f"{'order, %':<{width}}" + "".join(f"{name:>11}" for name in metrics))
    for name, order in report["orders"].items():
        print(f"{name:<{width}}" + "".join(f"{100 * order['metrics'][metric]['value']:>11.2f}" for metric in metrics))
    for test in report["paired"]:
        if test["metric"] in ("Recall@3", "NDCG@3", "Recall@10", "NDCG@10"):
            print(f"{test['order']} - {test['than']}, {test['metric']}: {100 * test['difference']:+.2f} "
                  f"[{100 * test['low']:+.2f}, {100 * test['high']:+.2f}], p = {test['p']:.3f}")
    print(f"seconds a user: retrieval {report['seconds_per_user']['retrieval']:.4f}, " + ", ".join(
        f"{name} {value:.3f}" for name, value in report["seconds_per_user"].items() if name != "retrieval"))
