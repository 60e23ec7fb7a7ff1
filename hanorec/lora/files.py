"""Adapters to disk in PEFT's format, so that PEFT and vLLM load them.

Our own facts stand beside it in hanorec.json. Read again by loading.py.
"""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from hanorec.base.distributed import rank
from hanorec.base.files import write_bytes, write_json, write_text
from hanorec.lora.card import adapter_card
from hanorec.lora.layer import lora_layers
from hanorec.lora.stack import (
    base_fingerprint,
    checkpoint_fingerprint,
    scales_below,
    stacked,
    weights_by_key,
)

NO_PART_OF_A_POLICY = (
    "log.jsonl", "run.json", "pairs.tsv", "reference.safetensors", "checkpoint-*", "epoch-*",
    "*.png",
)


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    base: str,
    run: Path | None = None,
    **facts: Any,
) -> None:
    """Write the top adapter. All ranks call it, rank 0 writes.

    adapter_model.safetensors, hanorec.json, README.md, and adapter_config.json last, as the mark of
    completeness.

    Args:
        base: name or path of the base checkpoint.
        run: folder of the run that trained it, which README.md tells of.
        facts: what else hanorec.json should say (stage, settings, data hash).
    """
    directory, layers = Path(directory), lora_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no LoRA layer; call add_lora first")
    top, stands_on = next(iter(layers.values())), base_fingerprint(model)
    base_sha256 = checkpoint_fingerprint(model)
    if rank() > 0:
        return
    tensors = {
        key: weight.detach().cpu().contiguous() for key, weight in weights_by_key(layers).items()
    }
    data = save(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    write_bytes(directory / "adapter_model.safetensors", data)
    write_json(directory / "hanorec.json", {
        **facts,
        "base": base,
        "stands_on": stands_on,
        "base_sha256": base_sha256,
        "scales_below": scales_below(top),
        "adapter_sha256": digest,
    })
    alpha, whole = top.scale * top.r, (directory / "below").exists()
    card = adapter_card(base, [layer.r for layer in stacked(top)], alpha, whole, facts, run)
    write_text(directory / "README.md", card)
    leaves = sorted({path.rpartition(".")[2] for path in layers})
    stem = re.escape(_common_prefix(list(layers)))
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": top.r,
        "lora_alpha": alpha,
        "lora_dropout": top.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": rf"{stem}.*\.({'|'.join(leaves)})",
        "modules_to_save": None,
        "inference_mode": True,
    })


def _common_prefix(paths: list[str]) -> str:
    """Where all module paths begin, e.g. "model.language_model.", up to their layers."""
    first, last = min(paths).split("."), max(paths).split(".")
    shared = [a for a, b in zip(first, last, strict=False) if a == b]
    names = []
    for a, b in zip(first, last, strict=False):
        if a != b or a == "layers" or len(names) == len(shared):
            break
        names.append(a)
    return ".".join(names) + "." if names else ""


def save_policy(
    model: nn.Module,
    directory: str | Path,
    base: str,
    below: str | Path | None,
    **facts: Any,
) -> None:
    """`save_adapter`, with a copy of the adapter that it stands on in the folder "below".

    So the folder is whole by itself.
    """
    if below is not None and rank() == 0:
        shutil.copytree(
            below,
            Path(directory) / "below",
            dirs_exist_ok=True,  # there already, if a run was killed here
            ignore=shutil.ignore_patterns(*NO_PART_OF_A_POLICY),
        )
    save_adapter(model, directory, base, **facts)
