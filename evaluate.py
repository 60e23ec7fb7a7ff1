"""Evaluation: HR@3, NDCG@3 and AUC of one or more policies on the same frozen candidate sets (EV-1 .. EV-3).

    python evaluate.py --model MODEL --adapter SFT --adapter DPO --data DATA --out OUT      OUT/metrics.json, a table
    python evaluate.py ... --out OUT --user ID --top-k K                          OUT/recommendations.json, the list printed
    python evaluate.py ... --out OUT --retriever BRMRS --top-n 20                 rerank what train_brmrs.py's model retrieves

Every --adapter is one policy, with what it stands on; `--adapter base` is the bare model. Two candidate sets, drawn once, kept in
the data folder and the same for every model: `random` (unseen items) and `hard` (unseen items near the positive). The first
policy is compared with each other one, user by user. Started by torchrun, several processes divide the users; the files are the same.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanorec.base.command import run
from hanorec.base.config import DataConfig, EvalConfig, ModelConfig
from hanorec.base.distributed import barrier, join, rank, run_on_all_ranks, usable_device
from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder, sha256, write_json
from hanorec.base.settings import parse
from hanorec.datasets.candidates import (
    draw_candidates,
    draw_hard_candidates,
    load_candidates,
    save_candidates,
)
from hanorec.datasets.catalog import Catalog, data_hash, load_catalog
from hanorec.datasets.interactions import (
    Example,
    Interactions,
    heldout_examples,
    load_interactions,
    select_users,
)
from hanorec.lora.files import attach_policy, remove_adapters
from hanorec.metrics import auc_rows, bootstrap_interval, ndcg_rows, paired_test, pooled_auc, rank_of_positive, similarity_groups
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.forward import score_rows
from hanorec.mllm.items import item_embeddings, neighbors
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import PromptBuilder, load_pictures, print_budget, print_missing_images, scoring_rows
from hanorec.ranking.reranking import print_report, rerank_report, retrieve
from hanorec.ranking.retriever import load_retriever
from hanorec.run.record import compare_settings, prompt_settings, write_run

AT = 3  # the document's cut-off


def held_out(data: DataConfig, config: EvalConfig) -> tuple[Catalog, Interactions, list[Example], set[str]]:
    """The catalogue, the interactions, every held-out item, and the users asked for."""
    catalog = load_catalog(data.data)
    interactions = load_interactions(data.data, catalog)
    examples = heldout_examples(interactions, config.split, data.history)
    if not examples:
        raise InputError(f"{Path(data.data) / config.split}.tsv: no user, expected at least one held-out item")
    if config.user is not None:
        users = {config.user}
        if config.user not in {e.user for e in examples}:
            raise InputError(f"--user {config.user!r}: not in {config.split}.tsv of {data.data}; expected one of its {len(examples)} users")
    else:
        users = set(select_users(interactions.train, data.users_from, data.users_to, data.users_seed))
    chosen = [e for e in examples if e.user in users]
    if not chosen:
        raise InputError(f"{data.data}: none of the {len(users)} users chosen is in {config.split}.tsv, expected some; widen --users-from, --users-to")
    if repeats := sum(e.target in interactions.before(e.user, config.split) for e in chosen):
        print(f"note: {repeats} of {len(chosen)} targets are items that their user had before; copying from the history finds them")
    print_missing_images(catalog)
    return catalog, interactions, examples, users


def candidate_sets(backbone: Backbone, data: DataConfig, config: EvalConfig) -> tuple[PromptBuilder, dict[str, list[Example]]]:
    """The frozen sets of each kind, drawn now if the data folder has none yet, for the users asked for."""
    catalog, _, examples, users = held_out(data, config)
    pictures, sets = {}, {}
    for kind in ("random", "hard") if config.sets == "both" else (config.sets,):
        path = Path(data.data) / f"candidates_{config.split}_{kind}.json"
        facts = {"kind": kind, "neighbors": data.neighbors if kind == "hard" else None, "split": config.split, "seed": config.seed,
                 "negatives": data.candidates - 1, "data_sha256": data_hash(catalog)}
        missing, near = not run_on_all_ranks(path.exists)[0], None  # as rank 0 sees it, which draws
        if missing and kind == "hard":
            pictures = load_pictures(backbone, catalog, data)
            near = neighbors(backbone, catalog, pictures, data.neighbors)[2].cpu().numpy()
        if missing and rank() == 0:
            if near is None:
                save_candidates(path, draw_candidates(examples, catalog, data.candidates - 1, config.seed), catalog, **facts)
            else:
                drawn = draw_hard_candidates(examples, catalog, near, data.candidates - 1, config.seed)
                save_candidates(path, drawn, catalog, **facts, embedding=f"input embeddings of {backbone.path}")
        barrier()
        sets[kind] = [e for e in load_candidates(path, examples, catalog, **facts) if e.user in users]
    return PromptBuilder(backbone, catalog, shown_pictures(pictures or load_pictures(backbone, catalog, data), config), data), sets


def shown_pictures(pictures: dict[int, ImageFeatures], config: EvalConfig) -> dict[int, ImageFeatures]:
    """Each item's own picture; --images shuffled: another item's, by a cycle through all owners, so that nobody keeps its own."""
    if config.images == "own":
        return pictures
    owners = np.random.default_rng(config.seed).permutation(list(pictures)).tolist()
    return {row: pictures[other] for row, other in zip(owners, np.roll(owners, 1).tolist(), strict=True)}


def retrieved(backbone: Backbone, data: DataConfig, config: EvalConfig) -> tuple[PromptBuilder, list[Example], np.ndarray, float]:
    """The users asked for with what --retriever finds for them, its places (T, N), and the seconds it took."""
    catalog, interactions, examples, users = held_out(data, config)
    chosen = [e for e in examples if e.user in users]
    retriever, start = load_retriever(config.retriever), time.perf_counter()
    had = [interactions.before(e.user, config.split) for e in chosen]
    found, places = retrieve(retriever, catalog, chosen, had, config.top_n, config.seed)
    seconds = time.perf_counter() - start
    return PromptBuilder(backbone, catalog, shown_pictures(load_pictures(backbone, catalog, data), config), data), found, places, seconds


def rerank(source: PromptBuilder, examples: list[Example], places: np.ndarray, seconds: float, policies: Sequence[str], config: EvalConfig) -> dict[str, Any]:
    """The report of `hanorec.rerank`, with what each stage costs a user."""
    rows = scoring_rows(source, examples)
    print_budget(rows, config.batch, source.backbone)
    scores, spent = {}, {"retrieval": seconds / len(examples)}
    for policy in policies:
        use_policy(source.backbone, policy)
        start = time.perf_counter()
        scores[policy] = score(source, rows, len(examples), config.batch)["sum"]
        spent[policy] = (time.perf_counter() - start) / len(examples)
    report = rerank_report(examples, places, scores, config.seed) | {"seconds_per_user": spent}
    ids = source.catalog.ids
    report["users"] = [{"user": e.user, "target": ids[e.target], "retrieved": [ids[e.candidates[i]] for i in np.argsort(place)]}
                       for e, place in zip(examples, places, strict=True)]
    print_report(report)
    return report


def score(source: PromptBuilder, rows: list[Row], users: int, batch: int) -> dict[str, np.ndarray]:
    """EV-1 for every candidate of every user: {"sum": (U, C), "mean": (U, C)}; binary: log P(Yes) - log P(No). rows: `scoring_rows`."""
    both = score_rows(source.backbone, rows, source.pictures, batch, "users", source.config.plain)  # each (rows, A)
    if source.config.task == "binary":
        both = [log_probs[:, 0] - log_probs[:, 1] for log_probs in both]
    return {kind: values.double().numpy().reshape(users, -1) for kind, values in zip(("sum", "mean"), both, strict=True)}


def summarise(scores: np.ndarray, examples: list[Example], seed: int) -> dict[str, Any]:
    """Metrics with bootstrap 95% intervals, accuracy by the positive's position, and the values of each user."""
    positive = np.array([e.candidates.index(e.target) for e in examples])
    ranks = rank_of_positive(scores, positive)
    own = np.take_along_axis(scores, positive[:, None], 1)[:, 0]
    negative = scores[np.arange(scores.shape[1]) != positive[:, None]].reshape(len(scores), -1)
    rows = {f"HR@{AT}": (ranks <= AT).astype(float), f"NDCG@{AT}": ndcg_rows(ranks, AT), "AUC": auc_rows(own, negative)}
    by_position = {str(p): {"users": int((positive == p).sum()), "accuracy": float((ranks[positive == p] == 1).mean())}
                   for p in range(scores.shape[1]) if (positive == p).any()}
    return {"metrics": {name: {"value": float(r.mean()), "interval": bootstrap_interval(r, seed=seed)} for name, r in rows.items()},
            "pooled_AUC": pooled_auc(own, negative.ravel()), "accuracy_by_position": by_position,
            "rows": {name: r.tolist() for name, r in rows.items()}, "ranks": ranks.tolist()}


def chance(candidates: int) -> dict[str, float]:
    """What a random order of the candidates reaches."""
    top = min(AT, candidates)
    return {f"HR@{AT}": top / candidates, f"NDCG@{AT}": float(ndcg_rows(np.arange(1, candidates + 1), AT).mean()), "AUC": 0.5}


def popularity(source: PromptBuilder, examples: list[Example]) -> np.ndarray:
    """Scores (U, C): how often each candidate was chosen in train.tsv."""
    train = load_interactions(source.config.data, source.catalog).train
    count = Counter(row for rows in train.values() for row in rows)
    return np.array([[float(count[c]) for c in e.candidates] for e in examples])


def print_table(kind: str, rows: dict[str, dict[str, Any]]) -> None:
    """One candidate set: a line a policy, value and interval in percent."""
    names = [f"HR@{AT}", f"NDCG@{AT}", "AUC"]
    width = max(12, *map(len, rows))
    print(f"\n{kind + ' candidates':<{width}}" + "".join(f"{name:>26}" for name in names))
    for name, result in rows.items():
        cells = [result["metrics"][n] for n in names]
        text = [f"{100 * c['value']:.2f}" + ("" if c["interval"] is None else " [{:.2f}, {:.2f}]".format(*(100 * x for x in c["interval"])))
                for c in cells]
        print(f"{name:<{width}}" + "".join(f"{t:>26}" for t in text))


def recommend(source: PromptBuilder, examples: list[Example], policies: Sequence[str], config: EvalConfig) -> list[dict[str, Any]]:
    """The Top-K titles of one user for each policy, from the user's random candidate set, or from what was retrieved; printed and returned."""
    lists = []
    for example in examples:
        if config.top_k > len(example.candidates):
            raise InputError(f"--top-k {config.top_k}: user {config.user!r} has {len(example.candidates)} candidates; choose 1 .. that many")
        print(f"user {config.user}, history: " + " | ".join(source.catalog.titles[row] for row in example.history))
        for policy in policies:
            use_policy(source.backbone, policy)
            scores = score(source, scoring_rows(source, [example]), 1, config.batch)["sum"][0]
            best = np.argsort(-scores, kind="stable")[: config.top_k]
            rows = [{"id": source.catalog.ids[example.candidates[c]], "title": source.catalog.titles[example.candidates[c]],
                     "score": float(scores[c]), "chosen": example.candidates[c] == example.target} for c in best]
            lists.append({"user": config.user, "policy": policy, "items": rows})
            print(f"{policy}:")
            for place, row in enumerate(rows, 1):
                print(f"  {place}. {row['title']} (id {row['id']}, score {row['score']:.3f}){'  <- chosen' if row['chosen'] else ''}")
    return lists


def similarity(source: PromptBuilder, policies: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """EV-4 for each policy against the bare model, from last hidden states: mean cosine of ten groups of items, weakest first."""
    cosine = {}
    for policy in ["base", *policies]:
        use_policy(source.backbone, policy)
        H, X, has_image = item_embeddings(source.backbone, source.catalog, source.pictures, "hidden")
        cosine[policy] = torch.cosine_similarity(H, X)[has_image].numpy()
    groups = {policy: similarity_groups(cosine["base"], cosine[policy]) for policy in policies}
    for policy, (before, after) in groups.items():
        print(f"\nimage-text similarity, ten groups, {policy}\n  before {np.round(before, 3)}\n  after  {np.round(after, 3)}")
    return {policy: {"before": before.tolist(), "after": after.tolist()} for policy, (before, after) in groups.items()}


def use_policy(backbone: Backbone, policy: str) -> None:
    """Put exactly this policy's adapters on the base."""
    remove_adapters(backbone.model)
    if policy != "base":
        attach_policy(backbone.model, policy)
    backbone.model.eval()


def evaluated_hashes(source: PromptBuilder, config: EvalConfig, sets: Iterable[str], policies: Sequence[str]) -> dict[str, str]:
    """What was evaluated on what: the data, the candidate sets, and every policy's adapter."""
    files = {f"candidates_{kind}": Path(source.config.data) / f"candidates_{config.split}_{kind}.json" for kind in sets if kind != "retrieved"}
    if config.retriever is not None:
        files["retriever"] = Path(config.retriever) / "embeddings.safetensors"
    files |= {policy: Path(policy) / "adapter_model.safetensors" for policy in policies if policy != "base"}
    return {"data": data_hash(source.catalog)} | {name: sha256(path) for name, path in files.items()}


def compare(source: PromptBuilder, sets: dict[str, list[Example]], policies: Sequence[str], config: EvalConfig, prompt: dict[str, Any]) -> dict[str, Any]:
    """The report of every policy on every candidate set, printed and returned. prompt: the settings that its adapter should have seen."""
    if config.similarity and sum(path is not None for path in source.catalog.images) < 10:
        raise InputError(f"--similarity: {source.config.data} has fewer than 10 images, expected at least one for each of the ten groups")
    rows = {kind: scoring_rows(source, examples) for kind, examples in sets.items()}
    print_budget([row for part in rows.values() for row in part], config.batch, source.backbone)
    report: dict[str, Any] = {"sets": {}}
    scores = {}
    for policy in policies:
        use_policy(source.backbone, policy)
        compare_settings(policy, prompt)
        for kind, examples in sets.items():
            scores[policy, kind] = score(source, rows[kind], len(examples), config.batch)
    for kind, examples in sets.items():
        results = {p: summarise(scores[p, kind]["sum"], examples, config.seed) for p in policies}
        means = {p: summarise(scores[p, kind]["mean"], examples, config.seed) for p in policies}
        known = {"popularity": summarise(popularity(source, examples), examples, config.seed),
                 "chance": {"metrics": {k: {"value": v, "interval": None} for k, v in chance(len(examples[0].candidates)).items()}}}
        tests = [{"better": policies[0], "than": other, "metric": name, **paired_test(results[policies[0]]["rows"][name], results[other]["rows"][name], seed=config.seed)}
                 for other in policies[1:] for name in results[other]["rows"]]
        report["sets"][kind] = {
            "users": [{"user": e.user, "target": source.catalog.ids[e.target], "candidates": [source.catalog.ids[c] for c in e.candidates]}
                      for e in examples],
            "policies": results, "policies_mean_score": means, **known, "paired": tests,
            "scores": {p: scores[p, kind]["sum"].tolist() for p in policies}}
        print_table(kind, {**results, **{f"{p} (mean score)": m for p, m in means.items()}, **known})
        for test in tests:
            print(f"{test['better']} - {test['than']}, {test['metric']}: {100 * test['difference']:+.2f} "
                  f"[{100 * test['low']:+.2f}, {100 * test['high']:+.2f}], p = {test['p']:.3f}")
    if config.similarity:
        report["similarity"] = similarity(source, policies)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    model_config, data, config = parse([ModelConfig, DataConfig, EvalConfig], argv, __doc__)
    policies = config.adapter or ["base"]
    if len(set(policies)) < len(policies):
        raise InputError(f"--adapter {' '.join(policies)}: one policy twice; name each once")
    if config.user is not None:
        config = replace(config, sets="random")
    if config.retriever is not None and config.similarity:
        raise InputError("--similarity with --retriever: expected one of the two, since reranking has no such report; run them apart")
    join(usable_device(model_config.device))
    out = Path(config.out)
    if rank() == 0:
        claim_folder(out)
    backbone = load_backbone(model_config.model, model_config.dtype, model_config.device, model_config.max_pixels, config.shard)
    if config.retriever is not None:
        source, found, places, seconds = retrieved(backbone, data, config)
        sets = {"retrieved": found}
    else:
        source, sets = candidate_sets(backbone, data, config)
    name, settings = "metrics.json", {"settings": asdict(data) | asdict(config)}
    if config.user is not None:
        name, report = "recommendations.json", recommend(source, next(iter(sets.values())), policies, config)
    elif config.retriever is not None:
        report = settings | rerank(source, found, places, seconds, policies, config)
    else:
        report = settings | compare(source, sets, policies, config, prompt_settings(model_config, data))
    if rank() == 0:
        write_json(out / name, report)
    write_run(out, [model_config, data, config], evaluated_hashes(source, config, sets, policies))
    print(f"\nwrote {out / name}")


if __name__ == "__main__":
    run(main)
