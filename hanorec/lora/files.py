"""Adapters on disk, and stacks of them: PEFT's format, so PEFT and vLLM load them.

Our own facts stand beside it in hanorec.json.
"""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hanorec.base.distributed import rank, whole
from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_object, sha256, write_bytes, write_json
from hanorec.lora.layer import LoRALinear, add_lora, lora_layers


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


# ---- adapter files ----


def base_fingerprint(model: nn.Module) -> str:
    """What the top adapter stands on, as a hash of the layers' paths, shapes and first values, adapters below included.

    Values are rounded to bfloat16 first, so that one checkpoint has one fingerprint whatever dtype it is loaded in. Ranks that divide a
    base must ask for it together.
    """
    digest = hashlib.sha256()
    for path, layer in lora_layers(model).items():
        below = layer.base
        while True:
            weights = [below.A, below.B] if isinstance(below, LoRALinear) else [below.weight]
            for weight in map(whole, weights):
                sample = weight.detach().flatten()[:256].to("cpu", torch.bfloat16).view(torch.int16)
                digest.update(f"{path} {tuple(weight.shape)} ".encode() + sample.numpy().tobytes())
            if not isinstance(below, LoRALinear):
                break
            below = below.base
    return digest.hexdigest()


def save_adapter(model: nn.Module, directory: str | Path, base: str, **facts: Any) -> None:
    """Write the top adapter: adapter_model.safetensors, hanorec.json, adapter_config.json (last, as the mark of completeness). All ranks
    call it, rank 0 writes.

    base: name or path of the base checkpoint. facts: what else hanorec.json should say (stage, settings, data hash).
    """
    directory, layers = Path(directory), lora_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no LoRA layer; call add_lora first")
    top, stands_on = next(iter(layers.values())), base_fingerprint(model)
    if rank() > 0:
        return
    tensors = {f"base_model.model.{path}.lora_{side}.weight": getattr(layer, side).detach().cpu().contiguous()
               for path, layer in layers.items() for side in "AB"}
    leaves = sorted({path.rpartition(".")[2] for path in layers})
    stem = re.escape(_common_prefix(list(layers)))
    data = save(tensors, metadata={"format": "pt"})
    write_bytes(directory / "adapter_model.safetensors", data)
    write_json(directory / "hanorec.json", {
        **facts, "base": base, "stands_on": stands_on, "adapter_sha256": hashlib.sha256(data).hexdigest()})
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": top.r,
        "lora_alpha": top.scale * top.r, "lora_dropout": top.dropout, "bias": "none", "fan_in_fan_out": False,
        "target_modules": rf"{stem}.*\.({'|'.join(leaves)})", "modules_to_save": None, "inference_mode": True})


def _common_prefix(paths: list[str]) -> str:
    """`model.language_model.` of a list of module paths: all leading names that they share and that are no index."""
    first, last = min(paths).split("."), max(paths).split(".")
    shared = [a for a, b in zip(first, last, strict=False) if a == b]
    names = []
    for a, b in zip(first, last, strict=False):
        if a != b or a == "layers" or len(names) == len(shared):
            break
        names.append(a)
    return ".".join(names) + "." if names else ""


def adapter_config(directory: str | Path) -> dict[str, Any]:
    """The checked adapter_config.json of a directory. InputError for a variant of LoRA that this code does not compute."""
    path = Path(directory) / "adapter_config.json"
    config = read_object(path)
    wanted = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False,
              "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    for key, value in wanted.items():
        if (config.get(key) or None) != (value or None):
            raise InputError(f"{path}: {key} = {shown(config.get(key))}, expected {value!r}; only plain LoRA is supported")
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout") or 0.0
    if not (_is_number(r) and isinstance(r, int) and r >= 1 and _is_number(alpha) and alpha > 0 and _is_number(dropout) and 0 <= dropout < 1):
        raise InputError(f"{path}: r = {shown(r)}, lora_alpha = {shown(alpha)}, lora_dropout = {shown(dropout)}, expected numbers: a whole r from 1, "
                         "lora_alpha above 0, lora_dropout from 0 to below 1; remake the file")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31  # so not NaN


def read_tensors(directory: str | Path, r: int) -> dict[str, Tensor]:
    """The tensors of an adapter of rank r: the rank is checked on them, before a model is given layers of a size that a file dictates."""
    path = Path(directory) / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; is {directory} an adapter folder?")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); save the adapter again") from None
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith("lora_A.weight")}
    for key, shape in shapes.items() or [("no lora_A.weight", ())]:
        if shape[:1] != (r,):
            raise InputError(f"{path}: {key} of shape {shape}, expected ({r}, ...) as adapter_config.json says; the two files are of adapters "
                             "of different rank: copy them again")
    return tensors


def attach_adapter(model: nn.Module, directory: str | Path) -> None:
    """Stack the saved adapter on top of the model, as its own rank and alpha say, and load it (frozen by a later one)."""
    config = adapter_config(directory)
    read_tensors(directory, config["r"])
    add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout") or 0.0)
    load_adapter(model, directory)


def save_policy(model: nn.Module, directory: str | Path, base: str, below: str | Path | None, **facts: Any) -> None:
    """`save_adapter`, with a copy of the adapter it stands on in the folder `below`, so that the folder is whole by itself."""
    if below is not None and rank() == 0:
        shutil.copytree(below, Path(directory) / "below", dirs_exist_ok=True,  # there already, if a run was killed here
                        ignore=shutil.ignore_patterns("log.jsonl", "run.json", "pairs.tsv", "reference.safetensors", "checkpoint-*", "*.png"))
    save_adapter(model, directory, base, **facts)


def attach_policy(model: nn.Module, directory: str | Path) -> None:
    """Attach what `save_policy` wrote: first what the adapter stands on, then the adapter."""
    if (Path(directory) / "below").exists():
        attach_policy(model, Path(directory) / "below")
    attach_adapter(model, directory)


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Fill the top adapter of the model from `directory`; a model without one gets it first.

    Strict: InputError where rank, scale, any key or shape differs, a value is not finite, the file was altered, or the adapter
    was trained on another base (or on another adapter below it). Nothing is loaded then.
    """
    directory = Path(directory)
    if not lora_layers(model):
        return attach_adapter(model, directory)
    config, layers, path = adapter_config(directory), lora_layers(model), directory / "adapter_model.safetensors"
    tensors = read_tensors(directory, config["r"])
    if (directory / "hanorec.json").exists():
        facts = read_object(directory / "hanorec.json")
        if facts.get("adapter_sha256") != sha256(path):
            raise InputError(f"{path}: its hash differs from the one in hanorec.json; the file was changed or half written: save it again")
        if not isinstance(facts.get("prompt", {}), dict):
            raise InputError(f"{directory / 'hanorec.json'}: prompt is {shown(facts['prompt'])}, expected an object; save the adapter again")
        if facts.get("stands_on") != base_fingerprint(model):
            raise InputError(f"{directory}: this adapter was trained on another base ({facts.get('base')}), or on another adapter "
                             "below it; load that base, and the adapters in the order in which they were trained")
    expected = {f"base_model.model.{name}.lora_{side}.weight": getattr(layer, side)
                for name, layer in layers.items() for side in "AB"}
    for name, layer in layers.items():
        scale = config["lora_alpha"] / config["r"]
        if layer.r != config["r"] or abs(layer.scale - scale) > 1e-9:
            raise InputError(f"{directory}: rank {config['r']}, scale {scale}, but {name} has rank {layer.r}, scale {layer.scale}; "
                             "add LoRA with the adapter's own r and alpha")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(f"{path}: {len(missing)} tensors are missing, e.g. {missing[0]}; the adapter is of another base model")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{path}: {len(extra)} tensors have no place in this model, e.g. {extra[0]}; the adapter is of another base model")
    for key, parameter in expected.items():
        if tensors[key].shape != parameter.shape or not tensors[key].is_floating_point():
            raise InputError(f"{path}: {key} is {tensors[key].dtype} {tuple(tensors[key].shape)}, expected floats of shape "
                             f"{tuple(parameter.shape)}; the adapter is of another base or rank")
        if not tensors[key].isfinite().all():
            raise InputError(f"{path}: {key} holds NaN or infinity; the training run broke, use an earlier adapter")
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])
