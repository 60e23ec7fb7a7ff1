"""From rows to logits and log-probabilities: one forward, and many rows scored."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from tqdm import tqdm

from hanorec.base.batches import gather_batch, micro_batches
from hanorec.base.distributed import world_size
from hanorec.mllm.backbone import Backbone, ImageFeatures, hidden_states
from hanorec.mllm.prompts import Batch, Row, collate
from hanorec.scoring import answer_log_probs


def autocast(backbone: Backbone) -> AbstractContextManager:
    """bfloat16 arithmetic for a bfloat16 model on a GPU, else the model's own; losses leave it by themselves (losses.py)."""
    enabled = backbone.device.type == "cuda" and backbone.model.dtype == torch.bfloat16
    return torch.autocast(backbone.device.type, torch.bfloat16, enabled=enabled)


def forward(backbone: Backbone, batch: Batch) -> Tensor:
    """Logits (B, L, V) of the columns that predict answers; the head runs on no others."""
    hidden = hidden_states(backbone, batch.ids, batch.positions, batch.mask, batch.pictures)  # (B, T, d)
    kept = hidden.gather(1, batch.columns[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, L, d)
    return backbone.model.lm_head(kept)


@torch.no_grad()
def score_rows(backbone: Backbone, rows: Sequence[Row], pictures: Mapping[int, ImageFeatures], batch: int, about: str, plain: bool = False) -> tuple[Tensor, Tensor]:
    """`answer_log_probs` of many rows, `batch` at a time: sums (P, A) and means per token (P, A), float32, on the CPU.

    Every prompt is computed once, whatever the number of its answers; plain: once an answer. about: the name of the progress bar.
    The ranks divide the rows; each returns all.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))  # like lengths together: less padding
    order = [i for r in range(world_size()) for i in order[r :: world_size()]]  # long and short ones in each rank's share
    scores = []
    for part, _ in tqdm(micro_batches(order, batch), desc=about, disable=None, leave=False):
        micro = collate(backbone, [rows[i] for i in part], pictures, packed=not plain)
        with autocast(backbone):
            logits = forward(backbone, micro)
        scores.append(torch.stack([answer_log_probs(logits, micro, mean=mean) for mean in (False, True)], 1).cpu().float())  # (b, 2, A)
    found = torch.empty(len(rows), 2, len(rows[0].answers))
    found[order] = gather_batch(scores, len(rows))
    return found[:, 0], found[:, 1]
