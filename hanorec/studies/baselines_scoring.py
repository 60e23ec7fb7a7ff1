"""How rows of the comparison are scored on the frozen candidates, each into a report like those of
evaluate.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hanorec.base.config import DataConfig, EvalConfig, ModelConfig
from hanorec.base.errors import InputError
from hanorec.base.settings import parse
from hanorec.baselines.vectors import Vectors, evaluate, load_targets
from hanorec.datasets.interactions import Example, HeldOut, item_counts
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_pictures, near_items
from hanorec.ranking.candidate_sets import frozen_sets, held_out
from hanorec.ranking.report import popularity
from hanorec.ranking.retriever import load_retriever
from hanorec.ranking.retrieving import candidate_scores
from hanorec.run.inputs import seen_inputs
from hanorec.run.scored import write_scores
from hanorec.studies.runs import EVALUATION
from hanorec.studies.scripts import script


class Job(NamedTuple):
    """One row to be scored.

    Attributes:
        trained: its folder. below: that of the row that it stands on. beside: that one's report
            on the same candidates.
        test: evaluate.py's flags, but for the policy and the report's folder.
        report: where metrics.json and run.json go.
    """

    name: str
    trained: Path | None
    below: Path | None
    beside: Path | None
    test: list[str]
    report: Path


class Asked(NamedTuple):
    """Who is asked what, and by which settings."""

    model: ModelConfig
    data: DataConfig
    config: EvalConfig
    held: HeldOut
    sets: dict[str, list[Example]]


def load_asked(test: Sequence[str]) -> Asked:
    """The frozen sets, as evaluate.py has them; those that are missing are drawn now.

    InputError: they are of other data; hard ones are to be drawn without a checkpoint.
    """
    model, data, config = parse(EVALUATION, [*test, "--out", "."])
    asked = Asked(model, data, config, held_out(data, config), {})

    def near() -> Tensor:
        if not model.model:
            raise InputError(
                f"{data.data}: no frozen hard candidates of {config.split}, which are drawn by a "
                "checkpoint's embeddings, expected --model; give it, or leave them out: --test "
                "'--sets random', or '--sets matched'"
            )
        return near_items(load_builder(asked))

    about = f"input embeddings of {'titles, ' * (data.images == 'none')}{model.model}"
    asked.sets.update(frozen_sets(asked.held, data, config, near, about))
    return asked


def load_builder(asked: Asked) -> PromptBuilder:
    """The checkpoint, and what its prompts are made of."""
    model, data, catalog = asked.model, asked.data, asked.held.catalog
    backbone = load_backbone(model.model, model.dtype, model.device, model.max_pixels)
    return PromptBuilder(backbone, catalog, load_pictures(backbone, catalog, data), data)


def untrained_share(asked: Asked) -> float:
    """The share of the targets that no user has in training."""
    trained = set().union(*asked.held.interactions.train.values())
    targets = [example.target for example in next(iter(asked.sets.values()))]
    return float(np.mean([target not in trained for target in targets]))


def write_report(
    job: Job, asked: Asked, scores: Mapping[str, np.ndarray], builder: PromptBuilder | None = None
) -> None:
    """The report of a row: candidate set -> (U, C). builder: where a checkpoint made them."""
    configs = [asked.data, asked.config, *([asked.model] if builder else [])]
    seen = seen_inputs(builder) if builder else {}
    write_scores(job.report, job.name, scores, asked.sets, asked.held, configs, **seen)


def score_popularity(job: Job) -> None:
    """How often each candidate was chosen in training."""
    asked, scores = load_asked(job.test), {}
    for kind, examples in asked.sets.items():
        scores[kind] = popularity(asked.held.interactions.train, examples)
    write_report(job, asked, scores)


def rank_popular(asked: Asked) -> dict[str, float]:
    """Recall and NDCG of popularity among all items, as the rows by inner product have them."""
    held, device = asked.held, torch.device("cpu")
    targets = load_targets(
        held.interactions, len(held.catalog.ids), asked.config.split, 1, device
    )
    count = item_counts(held.interactions.train)
    item = torch.tensor([[float(count[row])] for row in range(len(held.catalog.ids))])  # (N, 1)
    return evaluate(Vectors(torch.ones(len(targets.examples), 1), item), targets)[0]


def score_vectors(job: Job) -> None:
    """Inner products of each example's state and its candidates."""
    asked, scores = load_asked(job.test), {}
    split = asked.config.split
    retriever = load_retriever(job.trained / split, split)
    for kind, examples in asked.sets.items():
        scores[kind] = candidate_scores(retriever, asked.held.catalog, examples)
    write_report(job, asked, scores)


def score_adapter(job: Job) -> None:
    """By evaluate.py: the trained adapter, or the bare model."""
    policy = "base" if job.trained is None else str(job.trained)
    script("evaluate").main([*job.test, "--adapter", policy, "--out", str(job.report)])
