"""From rows to logits and log-probabilities: one forward, and many rows scored."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hanorec.base.batches import gather_batch, micro_batches
from hanorec.base.distributed import world_size
from hanorec.base.progress import progress
from hanorec.lora.layer import adapters_off
from hanorec.losses import kl_divergence
from hanorec.mllm.backbone import Backbone, ImageFeatures, hidden_states
from hanorec.mllm.collate import Batch, collate
from hanorec.mllm.prompts import Row
from hanorec.scoring import answer_log_probs, answer_logits


def autocast(backbone: Backbone) -> AbstractContextManager:
    """bfloat16 arithmetic for a bfloat16 model on a GPU, else the model's own."""
    enabled = backbone.device.type == "cuda" and backbone.model.dtype == torch.bfloat16
    return torch.autocast(backbone.device.type, torch.bfloat16, enabled=enabled)


def forward(backbone: Backbone, batch: Batch) -> Tensor:
    """Logits (B, L, V) of the columns that predict answers, under `autocast`.

    The head runs on no other columns.
    """
    with autocast(backbone):
        hidden = hidden_states(
            backbone, batch.ids, batch.positions, batch.mask, batch.pictures
        )  # (B, T, d)
        columns = batch.columns[..., None].expand(-1, -1, hidden.shape[-1])  # (B, L, d)
        return backbone.model.lm_head(hidden.gather(1, columns))


@torch.no_grad()
def score_batches(backbone: Backbone, batches: Sequence[Batch]) -> list[Tensor]:
    """`answer_log_probs` of each batch, (P, A) each, without gradients."""
    return [answer_log_probs(forward(backbone, batch), batch) for batch in batches]


def reference_kl(backbone: Backbone, batch: Batch, logits: Tensor) -> Tensor:
    """KL of the policy, which gave `logits`, from the reference, its top adapter off: ()."""
    with torch.no_grad(), adapters_off(backbone.model):
        ref_logits = forward(backbone, batch)
    return kl_divergence(answer_logits(logits, batch), answer_logits(ref_logits, batch))


@torch.no_grad()
def score_rows(
    backbone: Backbone,
    rows: Sequence[Row],
    pictures: Mapping[int, ImageFeatures],
    batch: int,
    about: str,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """`answer_log_probs` of many rows, `batch` at a time.

    The ranks divide the rows; each returns all.

    Args:
        rows: P prompts of A answers each. about: the name of the progress bar.
        plain: compute a prompt once an answer, instead of once, whatever the number of answers.
    Returns:
        Sums (P, A) and means per token (P, A), float32, on the CPU.
    """
    # Like lengths together: less padding.
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    # A rank's share is consecutive; so dealt out, each has long and short ones in it.
    order: list[int] = []
    for r in range(world_size()):
        order += by_length[r :: world_size()]

    scores = []
    for part, _ in progress(micro_batches(order, batch), about):
        micro = collate(backbone, [rows[i] for i in part], pictures, packed=not plain)
        logits = forward(backbone, micro)
        sums = answer_log_probs(logits, micro)
        means = answer_log_probs(logits, micro, mean=True)
        scores.append(torch.stack([sums, means], 1).cpu().float())  # (b, 2, A)

    found = torch.empty(len(rows), 2, len(rows[0].answers))
    found[order] = gather_batch(scores, len(rows))
    return found[:, 0], found[:, 1]
