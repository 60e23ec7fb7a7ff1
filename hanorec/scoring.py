"""Log-probabilities of answers: EV-1's score, and the four numbers of DPO-1."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from hanorec.backbone import Backbone, Picture, hidden_states
from hanorec.distributed import ranks
from hanorec.losses import token_log_probs
from hanorec.prompts import Batch, Row, collate
from hanorec.training import autocast, of_all, own_parts


def forward(backbone: Backbone, batch: Batch) -> Tensor:
    """Logits (B, L, V) of the columns that predict answers; the head runs on no others."""
    hidden = hidden_states(backbone, batch.ids, batch.positions, batch.mask, batch.pictures)  # (B, T, d)
    kept = hidden.gather(1, batch.columns[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, L, d)
    return backbone.model.lm_head(kept)


def answer_logits(logits: Tensor, batch: Batch) -> Tensor:
    """(B, L, V) -> (M, V): for each answer token the logits that predict it."""
    return logits[batch.row, batch.query]


def answer_log_probs(logits: Tensor, batch: Batch, mean: bool = False) -> Tensor:
    r"""log pi(answer | prompt) for every answer to every prompt: (B, L, V) -> batch.size float32.

    mean: per token instead of the sum. The end-of-turn token counts, so that no answer is favoured as another's beginning.
    """
    token = token_log_probs(answer_logits(logits, batch), batch.token)  # (M,)
    prompts, answers = batch.size
    total = token.new_zeros(prompts * answers)
    # EV-1: \operatorname{score}(c) = \log\pi(y_c \mid x) = \sum_t \log\pi(y_{c,t} \mid x, y_{c,<t})
    total = total.index_add(0, batch.answer, token)
    if mean:
        total = total / torch.bincount(batch.answer, minlength=len(total))
    return total.view(prompts, answers)


@torch.no_grad()
def score_rows(backbone: Backbone, rows: Sequence[Row], pictures: Mapping[int, Picture], batch: int, about: str, plain: bool = False) -> tuple[Tensor, Tensor]:
    """`answer_log_probs` of many rows, `batch` at a time: sums (P, A) and means per token (P, A), float32, on the CPU.

    Every prompt is computed once, whatever the number of its answers; plain: once an answer. about: the name of the progress bar.
    The ranks divide the rows; each returns all.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))  # like lengths together: less padding
    order = [i for r in range(ranks()) for i in order[r :: ranks()]]  # long and short ones in each rank's share
    scores = []
    for part, _ in tqdm(own_parts(order, batch), desc=about, disable=None, leave=False):
        micro = collate(backbone, [rows[i] for i in part], pictures, packed=not plain)
        with autocast(backbone):
            logits = forward(backbone, micro)
        scores.append(torch.stack([answer_log_probs(logits, micro, mean=mean) for mean in (False, True)], 1).cpu().float())  # (b, 2, A)
    found = torch.empty(len(rows), 2, len(rows[0].answers))
    found[order] = of_all(scores, len(rows))
    return found[:, 0], found[:, 1]
