r"""Log-probabilities of answers: EV-1's score, and the four numbers of DPO-1.

P = prompts, A = answers to each, M = answer tokens of a batch in all, V = vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from hanorec.losses import token_log_probs


class PackedAnswers(Protocol):
    """Where the answers of a batch stand; mllm/collate.py packs [prompt | answer | answer ...]."""

    row: Tensor  # (M,) row of each answer token
    query: Tensor  # (M,) which of the row's logits predicts it
    token: Tensor  # (M,)
    answer: Tensor  # (M,) number of its answer, 0 .. P A - 1
    size: tuple[int, int]  # P, A


def answer_logits(logits: Tensor, batch: PackedAnswers) -> Tensor:
    """For each answer token the logits that predict it: (B, L, V) -> (M, V)."""
    return logits[batch.row, batch.query]


def answer_log_probs(logits: Tensor, batch: PackedAnswers, mean: bool = False) -> Tensor:
    r"""log pi(answer | prompt) for every answer to every prompt: (B, L, V) -> (P, A) float32.

    mean: per token instead of the sum. The end-of-turn token counts, so that no answer is favoured
    as another's beginning.
    """
    token = token_log_probs(answer_logits(logits, batch), batch.token)  # (M,)
    prompts, answers = batch.size
    total = token.new_zeros(prompts * answers)
    # EV-1: \operatorname{score}(c) = \log\pi(y_c \mid x) = \sum_t \log\pi(y_{c,t} \mid x, y_{c,<t})
    total = total.index_add(0, batch.answer, token)
    if mean:
        total = total / torch.bincount(batch.answer, minlength=len(total))
    return total.view(prompts, answers)
