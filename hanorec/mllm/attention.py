"""Attention of packed rows: a causal prompt, and answers that see it but not one another."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from hanorec.base.errors import InputError
from hanorec.lora.layer import language_model

ATTENTION = "prompt_and_answers"  # the name under which Transformers knows `segment_attention`


def use_segment_attention(model: nn.Module) -> None:
    """Let the language model attend by `segment_attention`; the vision tower keeps its own."""
    AttentionInterface.register(ATTENTION, segment_attention)
    language_model(model).set_attn_implementation(ATTENTION)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of [prompt | answer | answer ...] by segments, called as Transformers calls it.

    The prompt is causal and needs no mask: padding stands behind it, where none of its tokens
    looks. So the T x T mask of a packed row never exists, and half of the prompt's products are
    never computed.

    Args:
        query: (B, heads, T, width of a head). key, value: with as many heads or fewer.
        mask: (B, 1, N, T) of the last N columns, the answers; None where there is only a prompt.
        sliding_window: how many tokens each may see in this layer, itself included.
    Returns:
        (B, T, heads, width of a head), and no weights.
    Raises:
        InputError: a prompt is longer than the window, so that attention would have to be cut.
        ValueError: keys of a cache beside those of the queries, which would not be seen.
    """
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries, {key.shape[2]} keys: expected as many, whole rows without "
            "a cache; give use_cache=False"
        )
    attend = partial(
        F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    prompt = query.shape[2] - (0 if mask is None else mask.shape[2])  # P
    if sliding_window is not None and prompt > sliding_window:
        raise InputError(
            f"a text of {prompt} tokens is longer than the base's sliding_window of "
            f"{sliding_window}, expected at most as many; shorten it"
        )
    out = attend(query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], is_causal=True)
    if mask is not None:
        answers = attend(query[:, :, prompt:], key, value, attn_mask=mask.to(query.dtype))
        out = torch.cat([out, answers], 2)
    return out.transpose(1, 2), None
