"""Evaluation: HR@3, NDCG@3 and AUC of policies on the same frozen candidate sets (EV-1 .. EV-3).

    python evaluate.py --model MODEL --adapter SFT --adapter DPO --data DATA --out OUT
        OUT/metrics.json, a table
    python evaluate.py ... --out OUT --user ID --top-k K
        OUT/recommendations.json, the list printed
    python evaluate.py ... --out OUT --retriever BRMRS --top-n 20
        rerank what a trained recommender retrieves (train_brmrs.py, hanorec.baselines)

Every --adapter is one policy, with what it stands on; `--adapter base` is the bare model. The
candidate sets of --sets are drawn once, kept in the data folder and the same for every model. The
first policy is compared with each other one, user by user. Started by torchrun, several processes
divide the users; the files are the same.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import chain
from pathlib import Path

from hanorec.base import command
from hanorec.base.config import DataConfig, EvalConfig, ModelConfig
from hanorec.base.settings import parse

KINDS = [ModelConfig, DataConfig, EvalConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__, "evaluate")  # --help needs no torch

from torch import Tensor

from hanorec.base.distributed import join, rank, usable_device
from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder, write_json
from hanorec.datasets.interactions import Example
from hanorec.mllm import evaluation, tasks
from hanorec.mllm.backbone import ImageFeatures
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.load import load_backbone
from hanorec.mllm.written import compare_written
from hanorec.ranking.candidate_sets import frozen_sets, held_out, list_sets
from hanorec.ranking.report import Scores, compare_sets
from hanorec.ranking.reranking import rerank
from hanorec.ranking.retrieving import retrieved
from hanorec.run.inputs import check_evaluation, evaluation_inputs
from hanorec.run.record import close_run, compare_settings, prompt_settings


def main(argv: Sequence[str] | None = None) -> None:
    model, data, config = parse(KINDS, argv, __doc__, "evaluate")
    policies = config.adapter or ["base"]
    if len(set(policies)) < len(policies):
        raise InputError(f"--adapter {' '.join(policies)}: one policy twice; name each once")
    if config.user is not None:
        config = replace(config, sets="random")
    if config.retriever is not None and config.similarity:
        raise InputError(
            "--similarity with --retriever: expected one of the two, since reranking has no such "
            "report; run them apart"
        )
    join(usable_device(model.device))
    check_evaluation(data, config)
    out = Path(config.out)
    if rank() == 0:
        claim_folder(out)

    # What is loaded: the bare model and the data; when first needed, its images and their items'
    # neighbourhoods.
    backbone = load_backbone(model.model, model.dtype, model.device, model.max_pixels, config.shard)
    held = held_out(data, config)
    tasks.print_missing_images(held.catalog, data)

    @cache
    def pictures() -> dict[int, ImageFeatures]:
        return tasks.load_pictures(backbone, held.catalog, data)

    def near() -> Tensor:
        return tasks.near_items(PromptBuilder(backbone, held.catalog, pictures(), data))

    # Which candidates: frozen sets, or what the retriever finds in the whole catalogue.
    if data.targets > 1:
        sets = list_sets(held, data, config)
    elif config.retriever is None:
        embedding = f"input embeddings of {'titles, ' * (data.images == 'none')}{backbone.path}"
        sets = frozen_sets(held, data, config, near, embedding)
    else:
        examples, places, found, retrieval = retrieved(held, config)
        sets = {"retrieved": examples}
    shown = evaluation.shown_pictures(pictures(), data.images, config.seed)
    builder = PromptBuilder(backbone, held.catalog, shown, data)

    # What each policy makes of them: a list for one user, a reranking, or metrics on each set.
    name, report = "metrics.json", {"settings": asdict(data) | asdict(config)}
    if config.user is not None:
        (examples,) = sets.values()
        name = "recommendations.json"
        report = evaluation.recommend(builder, examples, policies, config)
    elif config.retriever is not None:
        scores, seconds = score_all(builder, sets, policies, config.batch)
        seconds = {"retrieval": retrieval, **seconds}
        report |= rerank(held, examples, places, found, scores["retrieved"], seconds, config)
    else:
        if config.similarity:
            evaluation.check_images(builder)
        for policy in policies:
            compare_settings(policy, prompt_settings(model, data, backbone))
        if data.targets == 1:  # a list of several has no score for each candidate
            scores, _ = score_all(builder, sets, policies, config.batch)
            report["sets"] = compare_sets(sets, scores, held, config.seed)
        if config.answers != "scored":
            report["written"] = compare_written(builder, sets, policies, config)
        if config.similarity:
            report["similarity"] = evaluation.similarity(builder, policies)

    if rank() == 0:
        write_json(out / name, report)
    close_run(out, [model, data, config], evaluation_inputs(builder, held, config))
    print(f"\nwrote {out / name}")


def score_all(
    builder: PromptBuilder,
    sets: Mapping[str, Sequence[Example]],
    policies: Sequence[str],
    batch: int,
) -> tuple[dict[str, Scores], dict[str, float]]:
    """EV-1 by every policy on every set: set -> `Scores`; and the seconds that each policy took.
    """
    rows = {kind: tasks.scoring_rows(builder, examples) for kind, examples in sets.items()}
    tasks.print_budget(list(chain(*rows.values())), batch, builder.backbone)
    scores, seconds = {kind: {} for kind in sets}, {}
    for policy in policies:
        evaluation.use_policy(builder.backbone, policy)
        start = time.perf_counter()
        for kind, examples in sets.items():
            scores[kind][policy] = evaluation.score(builder, rows[kind], len(examples), batch)
        seconds[policy] = time.perf_counter() - start
    return scores, seconds
