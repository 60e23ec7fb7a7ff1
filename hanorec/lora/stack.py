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

    Adapters below count, too; of the base `checkpoint_fingerprint` sees more. Values are rounded to
    bfloat16 first, so that one checkpoint has one fingerprint whatever dtype it is loaded in. Ranks
    that divide a base must ask for it together.
    """
    digest = hashlib.sha256()
    for path, layer in lora_layers(model).items():
        for weight in map(whole, _weights_below(layer)):
            digest.update(f"{path} {tuple(weight.shape)} ".encode())
            sample = weight.detach().flatten()[:256].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def checkpoint_fingerprint(model: nn.Module) -> str:
    """The base as a hash of every weight that it has: its name, shape and `_sample`.

    So it sees what no adapter touches, too: embeddings, norms, head, vision tower and projector.
    Adapters do not count, and tied weights count once. At most 256 values of each weight are read,
    which takes a fraction of a second for a base of any size. Ranks that divide a base must ask for
    it together.
    """
    adapters = {path for path, part in model.named_modules() if isinstance(part, LoRALinear)}
    digest = hashlib.sha256()
    for path, weight in model.named_parameters():
        module, _, name = path.rpartition(".")
        if module in adapters:  # A and B
            continue
        while module.rpartition(".")[0] in adapters:  # its base
            module = module.rpartition(".")[0]
        weight = whole(weight)
        digest.update(f"{module}.{name} {tuple(weight.shape)} ".encode())
        digest.update(_sample(weight))
    return digest.hexdigest()


def _sample(weight: Tensor, most: int = 256) -> bytes:
    """Up to `most` of its values, evenly spaced from the first to the last.

    Rounded to bfloat16, as in `base_fingerprint`.
    """
    values = weight.detach().flatten()
    if len(values) > most:
        places = torch.arange(most, device=values.device) * (len(values) - 1) // (most - 1)
        values = values[places]
    return values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


def _weights_below(layer: LoRALinear) -> Iterator[Tensor]:
    """A and B of every adapter below this one, then the base's own weight."""
    layers = stacked(layer)
    for below in layers[1:]:
        yield below.A
        yield below.B
    yield layers[-1].base.weight


def stacked(layer: LoRALinear) -> list[LoRALinear]:
    """This adapter's layer and those below it, from the top down."""
    found = [layer]
    while isinstance(found[-1].base, LoRALinear):
        found.append(found[-1].base)
    return found


def scales_below(layer: LoRALinear) -> list[float]:
    """alpha / r of the adapters below this one, from the top down, as a file states them."""
    return [round(below.scale, 9) for below in stacked(layer)[1:]]


def weights_by_key(layers: dict[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """The weights of an adapter by the names that PEFT gives them."""
    found = {}
    for path, layer in layers.items():
        found[f"base_model.model.{path}.lora_A.weight"] = layer.A
        found[f"base_model.model.{path}.lora_B.weight"] = layer.B
    return found
