"""The run that parts of `hanorec.studies.audit` read, and what they measure and print with."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hanorec.base.config import DataConfig, TrainConfig
from hanorec.base.lock import lock_folder
from hanorec.datasets.posterland import make_posterland
from hanorec.lora.layer import adapters_off
from hanorec.lora.loading import attach_policy
from hanorec.losses import preference_logit
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.forward import score_rows
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import Preference, load_examples, preferences
from hanorec.studies import stages
from hanorec.studies.scripts import script

SEED, BETA0 = 2025, 0.1

TRAINED = ["HaNoRec", "no_nodo"]  # the run's policies
DPO_USERS = {"users_from": 0.5, "users_to": 0.667}  # those of `stages.DPO`


# ---- the run ----


def make_run(out: Path) -> None:
    """Posterland, its four trainings and two evaluations; what is finished stays."""
    lock_folder(out)
    data = out / "data"
    if not (data / "dataset.json").exists():
        make_posterland(data, stages.USERS, seed=SEED)
    common = ["--model", str(stages.BASE), "--data", str(data)]

    long_dpo = [*stages.DPO, "--epochs", "5", "--sft", str(out / "SFT")]
    training = {
        "SFT": ("train_sft", stages.SFT),
        "binary": ("train_sft", [*stages.SFT, "--task", "binary", "--users-to", "0.15"]),
        "HaNoRec": ("train_dpo", [*long_dpo, "--dataset", "movielens"]),
        "no_nodo": ("train_dpo", [*long_dpo, "--ablation", "no_nodo"]),
    }
    for name, (command, flags) in training.items():
        if not (out / name / "adapter_config.json").exists():
            own = ["--seed", str(SEED), *flags, "--out", str(out / name)]
            script(command).main([*common, *own])

    evaluations = {
        "test": ["--adapter", str(out / "no_nodo")],
        "test-binary": [
            "--task", "binary", "--sets", "random", "--users-to", "0.704",
            "--adapter", str(out / "binary"), "--adapter", "base",
        ],
    }
    for name, flags in evaluations.items():
        if not (out / name / "run.json").exists():
            own = [*stages.TEST, *flags, "--out", str(out / name)]
            script("evaluate").main([*common, *own])


def dpo_pairs(
    out: Path, kind: str = "random",
) -> tuple[Backbone, PromptBuilder, list[Preference]]:
    """The preference pairs of the run's DPO stages, from its base model.

    kind: which negatives, see `hanorec.mllm.tasks.views`.
    """
    backbone = load_backbone(str(stages.BASE))
    data = DataConfig(data=str(out / "data"), **DPO_USERS)
    config = TrainConfig(out="", targets_per_user=1)
    builder, examples = load_examples(backbone, data, config)
    return backbone, builder, preferences(builder, examples, SEED, kind=kind)


def load_policy(out: Path, stage: str) -> tuple[Backbone, PromptBuilder, list[Row]]:
    """A policy of the run, in eval mode, with the rows of its own pairs."""
    backbone, builder, pairs = dpo_pairs(out)
    attach_policy(backbone.model, out / stage)
    backbone.model.eval()
    return backbone, builder, [pair.row for pair in pairs]


@torch.no_grad()
def gaps(
    backbone: Backbone, rows: Sequence[Row], pictures: Mapping[int, ImageFeatures],
    reference: Tensor | None = None,
) -> Tensor:
    """h (P,) of the policy under the noise that is open now.

    reference: log-probabilities (P, 2); None: those of the policy without its top adapter.
    """
    policy = score_rows(backbone, rows, pictures, 32, "pairs")[0]
    if reference is None:
        with adapters_off(backbone.model):
            reference = score_rows(backbone, rows, pictures, 32, "reference")[0]
    return preference_logit(*policy.T, *reference.T)


def log(out: Path, stage: str) -> list[dict[str, Any]]:
    """The records of a stage's log."""
    lines = (out / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- what is printed ----


def table(header: str, rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table; header: the columns' names, a bar between two."""
    print(f"\n{header}\n" + "|".join(["---"] * header.count("|") + ["---"]))
    for row in rows:
        print(" | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))


def quantiles(values: ArrayLike, at: Sequence[float] = (0.01, 0.1, 0.5, 0.9, 0.99)) -> list[float]:
    return [float(x) for x in np.quantile(np.asarray(values, np.float64), at)]


def ranks(values: np.ndarray) -> np.ndarray:
    """Positions in ascending order, ties sharing their mean: (n,) -> (n,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Pearson and Spearman of two (n,)."""
    return float(np.corrcoef(a, b)[0, 1]), float(np.corrcoef(ranks(a), ranks(b))[0, 1])
