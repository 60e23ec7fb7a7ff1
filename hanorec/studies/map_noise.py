"""How near a step of a row of E1 is to the step of DPO without noise, at the same weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.base.settings import parse
from hanorec.lora.layer import adapters_off, add_lora, lora_layers
from hanorec.lora.loading import attach_policy
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.forward import score_rows
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import Preference, load_examples, preferences
from hanorec.readings import HARDNESS
from hanorec.run.steps import Stage, step_for
from hanorec.studies.map_labels import hardness_gaps
from hanorec.studies.runs import TRAINING
from hanorec.studies.scripts import script

DRAWS = 3


def cosines(flags: Sequence[str], clean: Sequence[str], adapter: Path | None) -> list[float]:
    """Cosine of a row's gradient with the clean one, on one batch of a step for each of `DRAWS`.

    Args:
        flags: all that train_dpo.py needs for the row but `--out`. clean: that the row without
            noise needs; of the same pairs.
        adapter: the policy's; None: a fresh one, before the first step.
    """
    model, data, train, *_ = parse(TRAINING["train_dpo"], [*flags, "--out", "."])
    torch.manual_seed(train.seed)
    backbone = load_backbone(model.model, model.dtype, model.device, model.max_pixels)
    builder, examples = load_examples(backbone, data, train)
    prompts = preferences(builder, examples, train.seed)
    attach_policy(backbone.model, adapter or train.sft)
    if adapter is None:
        add_lora(backbone.model, train.lora_rank, train.lora_alpha, train.lora_dropout)
    trained = []
    for layer in lora_layers(backbone.model).values():
        trained += [layer.A.requires_grad_(), layer.B.requires_grad_()]

    size = min(train.micro_batch * train.accumulation, len(prompts))
    found = []
    for draw in range(DRAWS):
        order = torch.randperm(len(prompts), generator=_seeded(draw))
        batch = [prompts[i] for i in order[:size].tolist()]
        with adapters_off(backbone.model):
            rows = [prompt.row for prompt in batch]
            reference, _ = score_rows(
                backbone, rows, builder.pictures, train.micro_batch, "reference")
        reference = reference.to(backbone.device)
        of_row, of_clean = (
            gradient(builder, batch, reference, one, trained, draw) for one in (flags, clean))
        found.append(F.cosine_similarity(of_row, of_clean, dim=0).item())
    return found


def gradient(
    builder: PromptBuilder,
    batch: Sequence[Preference],
    reference: Tensor,
    flags: Sequence[str],
    trained: Sequence[nn.Parameter],
    draw: int,
) -> Tensor:
    """The gradient (n,) that a step of train_dpo.py with these flags has on this batch.

    reference: log pi_ref (B, 2). draw: the seed of its noise.
    """
    _, _, train, dpo, readings = parse(TRAINING["train_dpo"], [*flags, "--out", "."])
    lam = torch.ones(len(batch), 1, device=reference.device)
    if dpo.hars:
        lam = HARDNESS[dpo.hardness](hardness_gaps(builder, batch, dpo))[:, None]
    stage = Stage(builder, batch, reference, lam, _seeded(draw, reference.device), train, dpo)
    numbers = list(range(len(batch)))
    documented = script("train_dpo").document_step
    step = step_for(readings, builder.backbone, [(0, numbers)], train, dpo, documented)
    for weight in trained:
        weight.grad = None
    step(stage, numbers, 1)  # not the first, whose clean rewards are known to be 0
    return torch.cat([weight.grad.flatten() for weight in trained])


def _seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
