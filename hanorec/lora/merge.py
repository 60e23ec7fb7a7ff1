"""A stack of adapters as one adapter, or as the base's own weights."""

import torch
from torch import nn

from hanorec.lora.layer import LoRALinear, lora_layers
from hanorec.lora.stack import replace_module, stacked


@torch.no_grad()
def collapse_adapters(model: nn.Module) -> None:
    r"""Turn a stack into one exact adapter, in place.

    A = [A1; A2], B = [s1 B1, s2 B2], bottom first, with scale 1, so r = alpha = r1 + r2.
    """
    for path, top in lora_layers(model).items():
        stack = stacked(top)
        r = sum(layer.r for layer in stack)

        one = LoRALinear(stack[-1].base, r, r, top.dropout)
        one.A.copy_(torch.cat([layer.A for layer in reversed(stack)]))  # (r, in)
        one.B.copy_(torch.cat([layer.scale * layer.B for layer in reversed(stack)], 1))  # (out, r)
        replace_module(model, path, one.train(top.training))


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    r"""Add every adapter of the stack to the base, W + s B A, and remove the LoRALinears.

    The sum is computed in the adapters' dtype (float32) and stored in the weight's.
    """
    collapse_adapters(model)
    for path, layer in lora_layers(model).items():
        weight = layer.base.weight  # (out, in)
        weight.copy_(weight.to(layer.A.dtype) + layer.scale * layer.B @ layer.A)
        replace_module(model, path, layer.base)
