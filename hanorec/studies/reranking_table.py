"""What `hanorec.studies.reranking` reads from its runs: the curve over w, its ends, the ceiling.

T = held-out items of a split, C = candidates of each. Wherever the target is not among them, it
counts as missed by everybody, see `hanorec.ranking.reranking`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.files import read_json, read_object
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.interactions import load_interactions
from hanorec.datasets.posterland import next_probabilities
from hanorec.metrics import ndcg_rows
from hanorec.ranking.fusion import fuse_scores
from hanorec.studies.reranking_places import shares
from hanorec.studies.tables import against, against_cells, head, line, percent

GRID = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # w of RC-2; 0 = the policy alone
METRICS = {"NDCG@3": 3, "NDCG@10": 10}
CHOICE = "NDCG@10"  # on validation: by it w is chosen
RETRIEVER, CEILING, TRUTH = "retriever alone", "ceiling", "generating probabilities"
PICKED = "chosen w"
KINDS = ("all", "cold", "warm")  # of targets

Rows = dict[str, np.ndarray]  # metric -> its value for each target (T,)


# ---- one seed ----


def read_seed(here: Path, data: str, policies: Mapping[str, str]) -> dict[str, Any]:
    """{split: {order: `Rows`}}, "cold": {split: (T,) bool}, "targets": {split: [user, target]}.

    An order is a policy with w, the retriever alone, or what no recommender reaches.
    """
    catalog = load_catalog(data)
    interactions = load_interactions(data, catalog)
    trained = set().union(*interactions.train.values())
    path = Path(data) / "truth.json"
    truth = read_json(path) if path.exists() else None
    found: dict[str, Any] = {"cold": {}, "targets": {}}
    for split in ("val", "test"):
        report = read_object(here / split / "metrics.json")
        users = report["users"]
        had = [set(interactions.before(user["user"], split)) for user in users]
        found[split] = orders(report, policies)
        found["cold"][split] = np.array([catalog.row[u["target"]] not in trained for u in users])
        found["targets"][split] = [[user["user"], user["target"]] for user in users]
        if truth:
            found[split][TRUTH] = _rows(_ranks(report, _probabilities(truth, users, had, catalog)))
    return found


def _probabilities(
    truth: Mapping[str, Any],
    users: Sequence[Mapping[str, Any]],
    had: Sequence[set[int]],
    catalog: Catalog,
) -> np.ndarray:
    """(T, C): those that Posterland's users chose by. had: the items before each target."""
    found = []
    for user, seen in zip(users, had, strict=True):
        p = next_probabilities(truth["items"], *truth["tastes"][user["user"]], seen)
        found.append(p[[catalog.row[item] for item in user["retrieved"]]])
    return np.array(found)


def orders(report: Mapping[str, Any], policies: Mapping[str, str]) -> dict[str, Rows]:
    """Every order of the lists of a report of evaluate.py --retriever.

    policies: our name of each -> the report's.
    """
    places = report["orders"]["retriever"]["ranks"]
    ranks = np.array([np.inf if place is None else place for place in places])
    found = {RETRIEVER: _rows(ranks), CEILING: _rows(np.where(np.isfinite(ranks), 1, np.inf))}
    retriever = np.array(report["scores"]["retriever"])  # (T, C)
    for name, reported in policies.items():
        policy = np.array(report["scores"][reported])  # (T, C)
        for w in GRID:
            found[order(name, w)] = _rows(_ranks(report, fuse_scores(policy, retriever, w)))
    return found


def order(policy: str, w: float) -> str:
    """The name of a policy's order."""
    return f"{policy}, w = {w:g}"


def _ranks(report: Mapping[str, Any], scores: np.ndarray) -> np.ndarray:
    """(T,) ranks of the targets by these scores (T, C), a tie counts against; missed = infinity."""
    ranks = np.full(len(scores), np.inf)
    for number, (user, own) in enumerate(zip(report["users"], scores, strict=True)):
        if report["orders"]["retriever"]["ranks"][number] is not None:
            ranks[number] = (own >= own[user["retrieved"].index(user["target"])]).sum()
    return ranks


def _rows(ranks: np.ndarray) -> Rows:
    return {metric: ndcg_rows(ranks, k) for metric, k in METRICS.items()}


# ---- all seeds ----


def summarise(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every order's values in each seed, over all targets, cold and warm ones; the w chosen in each
    seed; and each policy with its chosen w against the retriever.

    The retriever alone is among the choices: where it is chosen, the difference is 0.
    """
    policies = []
    for name in seeds[0]["val"]:
        if name.endswith(order("", 0.0)):
            policies.append(name.removesuffix(order("", 0.0)))
    chosen: dict[str, list[str]] = {}
    for policy in policies:
        chosen[policy] = [choose(seed["val"], policy) for seed in seeds]
    shared = all(seed["targets"]["test"] == seeds[0]["targets"]["test"] for seed in seeds)
    results: dict[str, Any] = {"seeds": len(seeds), "chosen": chosen, "kinds": {}}
    for kind in KINDS:
        tests = [_test_of(seed, kind, chosen, n) for n, seed in enumerate(seeds)]
        count = [len(rows[RETRIEVER][CHOICE]) for rows in tests]
        if min(count):
            results["kinds"][kind] = _summarise_kind(tests, policies, shared) | {"targets": count}
    results["places"] = {}
    for case in seeds[0]["places"]:
        results["places"][case] = [shares(seed["places"][case], (3, 10)) for seed in seeds]
    return results


def choose(val: Mapping[str, Rows], policy: str) -> str:
    """The order of the highest CHOICE, of the retriever's and the policy's; of equal ones the
    first."""
    names = [RETRIEVER, *(order(policy, w) for w in GRID)]
    return max(names, key=lambda name: val[name][CHOICE].mean())


def _test_of(
    seed: Mapping[str, Any], kind: str, chosen: Mapping[str, Sequence[str]], number: int
) -> dict[str, Rows]:
    """The test's orders of a seed, and the chosen ones, over targets of a kind."""
    cold = seed["cold"]["test"]  # (T,)
    keep = {"all": np.ones_like(cold), "cold": cold, "warm": ~cold}[kind]
    every = dict(seed["test"])
    every |= {f"{policy}, {PICKED}": every[names[number]] for policy, names in chosen.items()}
    found = {}
    for name, rows in every.items():
        found[name] = {metric: values[keep] for metric, values in rows.items()}
    return found


def _summarise_kind(
    tests: Sequence[Mapping[str, Rows]], policies: Sequence[str], shared: bool
) -> dict[str, Any]:
    """{"orders": {order: {metric: a mean a seed}}, "against": {policy: {metric: `against`}}}"""
    means: dict[str, Any] = {}
    for name in tests[0]:
        means[name] = {}
        for metric in METRICS:
            means[name][metric] = [float(one[name][metric].mean()) for one in tests]
    differences: dict[str, Any] = {}
    for policy in policies:
        differences[policy] = {}
        for metric in METRICS:
            own = [one[f"{policy}, {PICKED}"][metric] for one in tests]
            retriever = [one[RETRIEVER][metric] for one in tests]
            differences[policy][metric] = against(own, retriever, shared)
    return {"orders": means, "against": differences}


# ---- the page ----


def table(results: Mapping[str, Any]) -> str:
    """Markdown, in percent: the curve, the differences, and the retrievers' places."""
    seeds, kinds = results["seeds"], results["kinds"]
    lines = [f"Test, mean ± deviation over {seeds} seed(s), percent; w chosen on validation:"]
    for policy, names in results["chosen"].items():
        lines.append(f"{policy}: {'; '.join(names)}.")
    columns = ["order"]
    for kind, found in kinds.items():
        columns += [f"{metric}, {kind} ({sum(found['targets'])})" for metric in METRICS]
    lines += ["", *head(columns)]
    for name in kinds["all"]["orders"]:
        cells = [name]
        for found in kinds.values():
            cells += [percent(found["orders"][name][metric]) for metric in METRICS]
        lines.append(line(cells))

    columns = ["chosen w - retriever alone, points", "difference", "over targets", "over seeds",
               "above"]
    lines += ["", *head(columns)]
    for kind, found in kinds.items():
        for policy, by_metric in found["against"].items():
            for metric, test in by_metric.items():
                cells = against_cells({"against_control": test}, seeds)
                lines.append(line([f"{policy}, {metric}, {kind}", *cells]))

    lines += ["", *head(["place of the target", "first 3", "first 10", "median"])]
    for case, by_seed in results["places"].items():
        cells = []
        for k in (3, 10):
            cells.append(percent([one[f"first {k}"] for one in by_seed]))
        medians = ", ".join(f"{one['median']:g}" for one in by_seed)
        lines.append(line([case, *cells, medians]))
    return "\n".join(lines) + "\n"
