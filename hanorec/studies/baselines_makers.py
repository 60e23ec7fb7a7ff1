"""Who trains and scores the rows of the comparison, each by commands and functions that exist.

A maker trains into a folder, and scores the frozen candidates into another one, with metrics.json
and run.json in the layout of evaluate.py. What is finished is not done again, and refused where it
was made with other settings.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hanorec.base.config import DataConfig, EvalConfig
from hanorec.base.errors import InputError
from hanorec.base.settings import parse
from hanorec.baselines import matrix_training, sequence_training
from hanorec.baselines.config import MatrixConfig, SequenceConfig, VectorFiles
from hanorec.baselines.vectors import candidate_scores
from hanorec.datasets.interactions import Example
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_pictures, near_items
from hanorec.ranking.candidate_sets import HeldOut, frozen_sets, held_out
from hanorec.ranking.report import popularity
from hanorec.ranking.retriever import load_retriever
from hanorec.run.scored import write_scores
from hanorec.studies.runs import EVALUATION, TRAINING, train_once
from hanorec.studies.scripts import script

# Flags that a user may give, and whose they are.
STAGES = {
    "sft": "train_sft.py, for SFT, TALLRec, LLaRA and MLLM-MSR",
    "dpo": "train_dpo.py, for DPO and HaNoRec",
    "sprec": "train_sft.py and train_dpo.py, for all rounds of SPRec",
    "matrix": "hanorec.baselines.matrix_training",
    "sequence": "hanorec.baselines.sequence_training",
    "test": "evaluate.py, for all rows",
}


class Job(NamedTuple):
    """One row to be scored: its name, its trained folder, that of the row below, evaluate.py's
    flags, and where the report goes."""

    name: str
    trained: Path
    below: Path | None
    test: list[str]
    report: Path


class Maker(NamedTuple):
    """How a row is made.

    Attributes:
        stage: of `STAGES`, whose flags its training takes; "" where nothing is trained.
        kinds: the settings of its training.
        train: (flags, out, folder of CPU seconds).
        score: writes the report of a job.
        model: whether it needs a checkpoint.
        below: the flag of training that names the folder of the row below, or one in it.
        ranks_all: whether its training ends in a full ranking, in metrics.json.
    """

    stage: str
    kinds: Sequence[type]
    train: Callable[[list[str], Path, Path], None] | None
    score: Callable[[Job], None]
    model: bool = True
    below: tuple[str, str] | None = None
    ranks_all: bool = False


# ---- candidates ----


class Candidates(NamedTuple):
    """Who is asked what, and by which settings."""

    configs: tuple[DataConfig, EvalConfig]
    held: HeldOut
    sets: dict[str, list[Example]]


def load_candidates(test: Sequence[str]) -> Candidates:
    """The frozen sets, as evaluate.py has them; those that are missing are drawn now.

    InputError: they are of other data; hard ones are to be drawn without a checkpoint.
    """
    model, data, config = parse(EVALUATION, [*test, "--out", "."])
    held = held_out(data, config)

    def near() -> Tensor:
        if not model.model:
            raise InputError(
                f"{data.data}: no frozen hard candidates of {config.split}, which are drawn by a "
                "checkpoint's embeddings, expected --model; give it once, or --test '--sets "
                "random' to leave them out"
            )
        backbone = load_backbone(model.model, model.dtype, model.device, model.max_pixels)
        pictures = load_pictures(backbone, held.catalog, data)
        return near_items(PromptBuilder(backbone, held.catalog, pictures, data))

    sets = frozen_sets(held, data, config, near, f"input embeddings of {model.model}")
    return Candidates((data, config), held, sets)


def untrained_share(found: Candidates) -> float:
    """The share of the targets that no user has in training."""
    trained = set().union(*found.held.interactions.train.values())
    targets = [example.target for example in next(iter(found.sets.values()))]
    return float(np.mean([target not in trained for target in targets]))


# ---- makers ----


def score_popularity(job: Job) -> None:
    """How often each candidate was chosen in training."""
    found = load_candidates(job.test)
    scores = {}
    for kind, examples in found.sets.items():
        scores[kind] = popularity(found.held.interactions.train, examples)
    write_scores(job.report, job.name, scores, found.sets, found.held, found.configs)


def train_script(name: str, flags: list[str], out: Path, spent: Path) -> None:
    """By a script of the repository's root."""
    train_once(
        lambda argv: script(name).main(argv), TRAINING[name], flags, out, "adapter_config.json",
        spent / "training.json")


def score_adapter(job: Job) -> None:
    """By evaluate.py: the trained adapter, or the bare model."""
    adapter = "base" if job.trained is None else str(job.trained)
    flags = [*job.test, "--adapter", adapter, "--out", str(job.report)]
    script("evaluate").main(flags)


def train_vectors(
    main: Callable[[list[str]], None], kinds: Sequence[type], flags: list[str], out: Path,
    spent: Path,
) -> None:
    """By `hanorec.baselines.matrix_training` or `hanorec.baselines.sequence_training`."""
    train_once(main, kinds, flags, out, "metrics.json", spent / "training.json")


def score_vectors(job: Job) -> None:
    """Inner products of each example's state and its candidates."""
    found = load_candidates(job.test)
    split = found.configs[1].split
    retriever = load_retriever(job.trained / split, split)
    scores = {}
    for kind, examples in found.sets.items():
        scores[kind] = candidate_scores(retriever, found.held.catalog, examples)
    write_scores(job.report, job.name, scores, found.sets, found.held, found.configs)


def vector_maker(stage: str, module: ModuleType, config: type) -> Maker:
    """Of rows whose scores are inner products."""
    kinds = [VectorFiles, config]
    train = partial(train_vectors, module.main, kinds)
    return Maker(stage, kinds, train, score_vectors, model=False, ranks_all=True)


MAKERS = {
    "popularity": Maker("", (), None, score_popularity, model=False),
    "matrix": vector_maker("matrix", matrix_training, MatrixConfig),
    "sequence": vector_maker("sequence", sequence_training, SequenceConfig),
    "base": Maker("", (), None, score_adapter),
    "sft": Maker("sft", TRAINING["train_sft"], partial(train_script, "train_sft"), score_adapter),
    "dpo": Maker(
        "dpo", TRAINING["train_dpo"], partial(train_script, "train_dpo"), score_adapter,
        below=("--sft", "")),
}
