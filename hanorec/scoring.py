"""EV-1's score, and the numbers that DPO-1 compares: log-probabilities of answers."""



import torch
from torch import Tensor

from hanorec.losses import token_log_probs
from hanorec.mllm.prompts import Batch


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
