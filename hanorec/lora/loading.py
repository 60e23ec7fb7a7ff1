"""Adapters from disk, put on a model: all is checked before anything is loaded."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_object, sha256
from hanorec.lora.folder import adapter_config, check_tensor_file
from hanorec.lora.layer import LoRALinear, add_lora, language_model, lora_layers
from hanorec.lora.stack import (
    base_fingerprint,
    checkpoint_fingerprint,
    scales_below,
    weights_by_key,
)


def attach_adapter(model: nn.Module, directory: str | Path) -> None:
    """Stack the saved adapter on top of the model, as its own rank and alpha say, and load it."""
    config = adapter_config(directory)
    check_tensor_file(directory, config["r"])
    add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0)
    load_adapter(model, directory)


def attach_policy(model: nn.Module, directory: str | Path) -> None:
    """Attach what `save_policy` wrote: first what the adapter stands on, then the adapter."""
    if (Path(directory) / "below").exists():
        attach_policy(model, Path(directory) / "below")
    attach_adapter(model, directory)


def continued_lora(model: nn.Module, r: int, alpha: float, dropout: float) -> list[LoRALinear]:
    """The layers of the adapter that is on top already, to be trained on, with this dropout.

    InputError where its rank or alpha is another.
    """
    layers = list(lora_layers(model).values())
    for layer in layers:
        if (layer.r, layer.scale * layer.r) != (r, alpha):
            raise InputError(
                f"--continue-sft: the adapter of --sft has rank {layer.r} and alpha "
                f"{layer.scale * layer.r:g}, expected {r} and {alpha:g}; give --lora-rank "
                f"{layer.r} --lora-alpha {layer.scale * layer.r:g}"
            )
        layer.dropout = dropout
    return layers


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Fill the top adapter of the model from `directory`; a model without one gets it first.

    Strict: InputError where rank, scale, any key or shape differs, a value is not finite, the file
    was altered, or the adapter was trained on another base (or on another adapter below it).
    Nothing is loaded then.
    """
    directory, layers = Path(directory), lora_layers(model)
    if not layers:
        return attach_adapter(model, directory)
    config = adapter_config(directory)
    check_tensor_file(directory, config["r"])
    path = directory / "adapter_model.safetensors"
    tensors = _named_as_now(model, directory, load_file(path))
    _check_origin(model, directory)
    _check_scale(layers, directory, config)
    _check_names(model, path, tensors)
    _check_tensors(layers, path, tensors)
    with torch.no_grad():
        for key, parameter in weights_by_key(layers).items():
            parameter.copy_(tensors[key])


def _check_origin(model: nn.Module, directory: Path) -> None:
    """hanorec.json, if there is one: the file is the one that it names, trained on this model."""
    if not (directory / "hanorec.json").exists():
        return
    path, facts = directory / "adapter_model.safetensors", read_object(directory / "hanorec.json")
    if facts.get("adapter_sha256") != sha256(path):
        raise InputError(
            f"{path}: its hash differs from the one in hanorec.json; the file was changed or half "
            "written: save it again"
        )
    if not isinstance(facts.get("prompt", {}), dict):
        raise InputError(
            f"{directory / 'hanorec.json'}: prompt is {shown(facts['prompt'])}, expected an "
            "object; save the adapter again"
        )
    if facts.get("stands_on") != base_fingerprint(model):
        raise InputError(
            f"{directory}: this adapter was trained on another base ({facts.get('base')}), or on "
            "another adapter below it; load that base, and the adapters in the order in which they "
            "were trained"
        )
    # Adapters of earlier versions do not state it.
    if facts.get("base_sha256") not in (None, checkpoint_fingerprint(model)):
        raise InputError(
            f"{directory}: this adapter was trained on another base ({facts.get('base')}): weights "
            "of the vision tower, embeddings, norms or head are others, or linears in part; load "
            "that base"
        )
    scales = scales_below(next(iter(lora_layers(model).values())))
    if facts.get("scales_below") not in (None, scales):
        raise InputError(
            f"{directory}: this adapter was trained on adapters of scale "
            f"{shown(facts['scales_below'])}, those below it have {scales}: lora_alpha was changed "
            "in an adapter_config.json below it; load the adapter that it was trained on"
        )


def _check_scale(layers: dict[str, LoRALinear], directory: Path, config: dict[str, Any]) -> None:
    scale = config["lora_alpha"] / config["r"]
    for name, layer in layers.items():
        if layer.r != config["r"] or abs(layer.scale - scale) > 1e-9:
            raise InputError(
                f"{directory}: rank {config['r']}, scale {scale}, but {name} has rank {layer.r}, "
                f"scale {layer.scale}; add LoRA with the adapter's own r and alpha"
            )


# What stood before "layers" in the names of 2024, of LLaVA-NeXT and of Qwen2-VL. An adapter of the
# language model by itself has the second, too, and computes the same on it here.
OLDER_STEMS = ("language_model.model.", "model.")


def _named_as_now(
    model: nn.Module, directory: Path, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors by the names of this model's layers, where they have older ones."""
    expected = weights_by_key(lora_layers(model)).keys()
    (stem,) = [path for path, part in model.named_modules() if part is language_model(model)]
    for older in OLDER_STEMS:
        old, new = (f"base_model.model.{path}layers." for path in (older, f"{stem}."))
        renamed = {}
        for key, tensor in tensors.items():
            renamed[new + key.removeprefix(old) if key.startswith(old) else key] = tensor
        certain = len(renamed) == len(tensors) and not expected & tensors.keys()
        if certain and expected & renamed.keys():
            if renamed.keys() == expected:
                print(
                    f"note: {directory}: its tensors have older names, {old}..., all of which are "
                    f"read as {new}..."
                )
            return renamed
    return tensors


def _check_names(model: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """InputError where a weight of the adapter has no tensor, or a tensor no place."""
    layers = lora_layers(model)
    expected = weights_by_key(layers)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        present = expected.keys() & tensors.keys()
        reason = "the adapter is of another base model"
        adapted = {key.rpartition(".lora_")[0] for key in present}
        if len(present) == 2 * len(adapted) > 0:  # A and B of each
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
            reason = (
                f"it adapts {len(adapted)} of the {len(layers)} linears of the language model "
                f"({leaves}), expected all; train one on all of them (target_modules), or use the "
                "base that it is of, if this is another base model"
            )
        raise InputError(f"{path}: {len(missing)} tensors are missing, e.g. {missing[0]}; {reason}")
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        reason = "the adapter is of another base model"
        modules = dict(model.named_modules())
        module = extra[0].removeprefix("base_model.model.").rpartition(".lora_")[0]
        if module and (module in modules or f"model.{module}" in modules):
            reason = (
                f"{module} is no linear of the language model, which are all that this code "
                "adapts; train one on them alone (target_modules)"
            )
        raise InputError(
            f"{path}: {len(extra)} tensors have no place in this model, e.g. {extra[0]}; {reason}"
        )


def _check_tensors(layers: dict[str, LoRALinear], path: Path, tensors: dict[str, Tensor]) -> None:
    """Every tensor has the shape of its weight, and finite floats."""
    for key, parameter in weights_by_key(layers).items():
        found = tensors[key]
        if found.shape != parameter.shape or not found.is_floating_point():
            raise InputError(
                f"{path}: {key} is {found.dtype} {tuple(found.shape)}, expected floats of shape "
                f"{tuple(parameter.shape)}; the adapter is of another base or rank"
            )
        if not found.isfinite().all():
            raise InputError(
                f"{path}: {key} holds NaN or infinity; the training run broke, use an earlier "
                "adapter"
            )
