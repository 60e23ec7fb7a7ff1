"""The policy behind lists of recommendations: its prompts are those that it was trained on."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanorec.base.batches import chunks
from hanorec.base.config import DataConfig, ModelConfig
from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_object
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example
from hanorec.mllm import evaluation, tasks
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.forward import score_batches
from hanorec.mllm.load import load_backbone
from hanorec.recommending.config import ListConfig
from hanorec.run.inputs import check_named_adapter
from hanorec.run.record import compare_settings, prompt_settings

STAGES = ("sft", "dpo", "export")  # of adapters that read the prompts made here


def trained_prompt(policy: str) -> dict[str, Any]:
    """What an adapter's prompts were made with, as its hanorec.json states it.

    Nothing where it states nothing, as one from elsewhere, and of `base`. InputError: no adapter,
    or one whose prompts hold more than items.
    """
    if policy == "base":
        return {}
    check_named_adapter("--adapter", policy)
    path = Path(policy) / "hanorec.json"
    facts = read_object(path) if path.exists() else {}
    if facts.get("stage", STAGES[0]) not in STAGES:
        raise InputError(
            f"--adapter {policy}: its stage is {shown(facts['stage'])}, expected one of "
            f"{', '.join(STAGES)}, whose prompts show items alone; choose another adapter"
        )
    stated = facts.get("prompt", {})
    if not isinstance(stated, dict):
        raise InputError(
            f"--adapter: {path}: prompt is {shown(stated)}, expected an object; save the adapter "
            "again"
        )
    known = {field.name for field in [*fields(DataConfig), *fields(ModelConfig)]}
    return {name: value for name, value in stated.items() if name in known}


def load_policy(config: ListConfig, prompt: Mapping[str, Any], catalog: Catalog) -> PromptBuilder:
    """Base and adapter, with what makes their prompts. InputError: an adapter of another base.

    prompt: of `trained_prompt`; `--history-length` goes before it.
    """
    own = dict(prompt)
    max_pixels = own.pop("max_pixels", ModelConfig.max_pixels)
    if config.history_length is not None:
        own["history"] = config.history_length
    model = ModelConfig(config.model, config.dtype, config.device, max_pixels)
    data = DataConfig(config.data, plain=config.plain, features=config.features, **own)
    backbone = load_backbone(model.model, model.dtype, model.device, model.max_pixels)
    policy = config.adapter or "base"
    evaluation.use_policy(backbone, policy)
    compare_settings(policy, prompt_settings(model, data, backbone))
    tasks.print_missing_images(catalog, data)
    return PromptBuilder(backbone, catalog, tasks.load_pictures(backbone, catalog, data), data)


def policy_scores(
    builder: PromptBuilder, examples: Sequence[Example], batch: int
) -> list[np.ndarray]:
    """EV-1 of each example's candidates, (C,) each, by this process alone.

    Examples of one C stand side by side, `batch` rows in a forward.
    """
    alike = defaultdict(list)  # C -> numbers of examples
    for number, example in enumerate(examples):
        alike[len(example.candidates)].append(number)
    found: dict[int, np.ndarray] = {}
    for numbers in alike.values():
        rows = tasks.scoring_rows(builder, [examples[number] for number in numbers])
        by_length = sorted(range(len(rows)), key=lambda i, rows=rows: len(rows[i].prompt))
        log_probs = torch.empty(len(rows), len(rows[0].answers))
        for part in chunks(by_length, batch):
            (scores,) = score_batches(builder.backbone, [builder.collate(rows, part)])
            log_probs[part] = scores.cpu().float()
        scores = evaluation.candidate_scores(builder, log_probs, len(numbers))
        found |= dict(zip(numbers, scores, strict=True))
    return [found[number] for number in range(len(examples))]
