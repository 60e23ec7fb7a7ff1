"""Adapters from disk, put on a model: all is checked before anything is loaded."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_object, sha256
from hanorec.lora.layer import LoRALinear, add_lora, lora_layers
from hanorec.lora.stack import base_fingerprint, weights_by_key

PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def adapter_config(directory: str | Path) -> dict[str, Any]:
    """The checked adapter_config.json of a directory.

    InputError for a variant of LoRA that this code does not compute.
    """
    path = Path(directory) / "adapter_config.json"
    config = read_object(path)
    for key, value in PLAIN_LORA.items():
        if (config.get(key) or None) != (value or None):
            raise InputError(
                f"{path}: {key} = {shown(config.get(key))}, expected {value!r}; only plain LoRA is "
                "supported"
            )
    r, alpha = config.get("r"), config.get("lora_alpha")
    dropout = config.get("lora_dropout") or 0.0
    numbers = _is_number(r) and _is_number(alpha) and _is_number(dropout)
    if not (numbers and isinstance(r, int) and r >= 1 and alpha > 0 and 0 <= dropout < 1):
        raise InputError(
            f"{path}: r = {shown(r)}, lora_alpha = {shown(alpha)}, lora_dropout = "
            f"{shown(dropout)}, expected numbers: a whole r from 1, lora_alpha above 0, "
            "lora_dropout from 0 to below 1; remake the file"
        )
    return config


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**31  # so not NaN


def read_tensors(directory: str | Path, r: int) -> dict[str, Tensor]:
    """The tensors of an adapter of rank r.

    The rank is checked on them, before a model is given layers of a size that a file dictates.
    """
    path = Path(directory) / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; is {directory} an adapter folder?")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); save the adapter again"
        ) from None
    keys = [key for key in tensors if key.endswith("lora_A.weight")]
    shapes = [(key, tuple(tensors[key].shape)) for key in keys] or [("no lora_A.weight", ())]
    for key, shape in shapes:
        if shape[:1] != (r,):
            raise InputError(
                f"{path}: {key} of shape {shape}, expected ({r}, ...) as adapter_config.json says; "
                "the two files are of adapters of different rank: copy them again"
            )
    return tensors


def attach_adapter(model: nn.Module, directory: str | Path) -> None:
    """Stack the saved adapter on top of the model, as its own rank and alpha say, and load it."""
    config = adapter_config(directory)
    read_tensors(directory, config["r"])
    add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0)
    load_adapter(model, directory)


def attach_policy(model: nn.Module, directory: str | Path) -> None:
    """Attach what `save_policy` wrote: first what the adapter stands on, then the adapter."""
    if (Path(directory) / "below").exists():
        attach_policy(model, Path(directory) / "below")
    attach_adapter(model, directory)


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
    tensors = read_tensors(directory, config["r"])
    _check_origin(model, directory)
    _check_scale(layers, directory, config)
    _check_tensors(layers, directory / "adapter_model.safetensors", tensors)
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


def _check_scale(layers: dict[str, LoRALinear], directory: Path, config: dict[str, Any]) -> None:
    scale = config["lora_alpha"] / config["r"]
    for name, layer in layers.items():
        if layer.r != config["r"] or abs(layer.scale - scale) > 1e-9:
            raise InputError(
                f"{directory}: rank {config['r']}, scale {scale}, but {name} has rank {layer.r}, "
                f"scale {layer.scale}; add LoRA with the adapter's own r and alpha"
            )


def _check_tensors(layers: dict[str, LoRALinear], path: Path, tensors: dict[str, Tensor]) -> None:
    """Every weight of the layers has a tensor of its shape, of finite floats; none is left over."""
    expected = weights_by_key(layers)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise InputError(
            f"{path}: {len(missing)} tensors are missing, e.g. {missing[0]}; the adapter is of "
            "another base model"
        )
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise InputError(
            f"{path}: {len(extra)} tensors have no place in this model, e.g. {extra[0]}; the "
            "adapter is of another base model"
        )
    for key, parameter in expected.items():
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
