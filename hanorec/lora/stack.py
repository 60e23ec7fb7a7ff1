"""Stacks of adapters on a base: what stands on what, and how they come off again."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hanorec.base.distributed import whole
from hanorec.lora.layer import LoRALinear, lora_layers


@torch.no_grad()
def remove_adapters(model: nn.Module) -> None:
    """Back to the bare base model."""
    while layers := lora_layers(model):
        for path, layer in layers.items():
            replace_module(model, path, layer.base)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` points."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def base_fingerprint(model: nn.Module) -> str:
    """What the top adapter stands on, as a hash of the layers' paths, shapes and first values.

    Adapters below count, too. Values are rounded to bfloat16 first, so that one checkpoint has one
    fingerprint whatever dtype it is loaded in. Ranks that divide a base must ask for it together.
    """
    digest = hashlib.sha256()
    for path, layer in lora_layers(model).items():
        for weight in map(whole, _weights_below(layer)):
            digest.update(f"{path} {tuple(weight.shape)} ".encode())
            sample = weight.detach().flatten()[:256].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _weights_below(layer: LoRALinear) -> Iterator[Tensor]:
    """A and B of every adapter below this one, then the base's own weight."""
    below = layer.base
    while isinstance(below, LoRALinear):
        yield below.A
        yield below.B
        below = below.base
    yield below.weight


def weights_by_key(layers: dict[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """The weights of an adapter by the names that PEFT gives them."""
    found = {}
    for path, layer in layers.items():
        found[f"base_model.model.{path}.lora_A.weight"] = layer.A
        found[f"base_model.model.{path}.lora_B.weight"] = layer.B
    return found
