"""What both training scripts need around their loops: batches, the schedule, the log, and the record of the run."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from hanorec.backbone import Backbone
from hanorec.catalog import Catalog, data_hash
from hanorec.config import DataConfig, ModelConfig
from hanorec.distributed import gathered, rank, ranks, share
from hanorec.errors import InputError
from hanorec.files import read_object, sha256, write_json
from hanorec.lora import fingerprint
from hanorec.prompts import Row


def global_batches(n: int, size: int, seed: int, epoch: int, least: int = 1) -> list[list[int]]:
    """The optimizer steps of one epoch: a permutation of 0 .. n - 1 that is a function of seed and epoch, cut into `size`.

    A rest of fewer than `least` joins the step before it. Raises InputError where n or size itself is smaller.
    """
    if min(n, size) < least:
        raise InputError(f"{n} training rows in steps of {size}, expected at least {least} in each step; use more users or targets, or raise "
                         "--micro-batch or --accumulation")
    order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    batches = [order[i : i + size] for i in range(0, n, size)]
    if len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Micro-batches: consecutive parts of at most `size`."""
    for i in range(0, len(items), size):
        yield items[i : i + size]


def own_parts(batch: Sequence[int], size: int) -> list[tuple[Sequence[int], int]]:
    """This rank's share of a global batch in micro-batches, each with its weight in the loss: 1.

    Every rank gets equally many, since the forwards of a divided base are collective: one that is short does a row at weight 0.
    """
    parts = [(part, 1) for part in chunks(batch[share(len(batch))], size)]
    longest = -(-len(batch) // ranks())
    return parts + [(batch[:1], 0)] * (-(-longest // size) - len(parts))


def of_all(found: Sequence[Tensor], n: int) -> Tensor:
    """What the micro-batches of `own_parts` found about their rows, each (b, ...) -> (n, ...) of the whole batch, in its order, on every rank."""
    own = share(n)
    return gathered(torch.cat(list(found))[: own.stop - own.start], n)


def cosine(step: int, steps: int) -> float:
    """The learning rate's factor at `step` of 0 .. steps - 1: from 1 down toward 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def autocast(backbone: Backbone) -> AbstractContextManager:
    """bfloat16 arithmetic for a bfloat16 model on a GPU, else the model's own; losses leave it by themselves (losses.py)."""
    enabled = backbone.device.type == "cuda" and backbone.model.dtype == torch.bfloat16
    return torch.autocast(backbone.device.type, torch.bfloat16, enabled=enabled)


def use_checkpointing(backbone: Backbone) -> None:
    """Recompute each layer's activations in backward, without the reentrant variant, which would lose the noise of NoDO."""
    model = backbone.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its name before 5.23
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # else the frozen embeddings would be given gradients


def print_budget(rows: Sequence[Row], micro_batch: int, backbone: Backbone) -> None:
    """Tokens of a micro-batch at its largest, so that memory can be judged before it runs out."""
    prompt, answer = max(len(row.prompt) for row in rows), max(sum(map(len, row.answers)) for row in rows)
    image = max(sum(token == backbone.image_token for token in row.prompt) for row in rows)
    print(f"{len(rows)} rows; prompts of up to {prompt} tokens ({image} of them images), answers of up to {answer}; "
          f"a micro-batch of {micro_batch} takes at most {micro_batch * (prompt + answer):,} tokens; context {backbone.context}")


def prompt_settings(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """What an adapter was trained to read; kept in its hanorec.json, since another prompt is another input."""
    return {"task": data.task, "history": data.history, "candidate_images": data.candidate_images, "max_pixels": model.max_pixels}


def compare_settings(directory: str | Path, settings: dict[str, Any]) -> None:
    """Say where the prompts of this command differ from those that a saved adapter was trained on. It may be meant, so no error."""
    path = Path(directory) / "hanorec.json"
    trained = read_object(path).get("prompt", {}) if path.exists() else {}
    for name, value in settings.items():
        if name in trained and trained[name] != value:
            print(f"note: {directory} was trained with {name} = {trained[name]}, this command uses {value}")


def all_settings(configs: Sequence[Any]) -> dict[str, Any]:
    """The settings of a command as one dictionary."""
    return {name: value for config in configs for name, value in asdict(config).items()}


def write_run(out: Path, configs: Sequence[Any], inputs: dict[str, Any] | None = None, **facts: Any) -> None:
    """run.json: what was run, with what, on what. inputs: hashes of what the settings name.

    InputError where a run that goes on was started with other inputs: data, base or adapter were changed behind its names.
    """
    if rank() > 0:
        return
    path, inputs = out / "run.json", inputs or {}
    if path.exists():
        started = read_object(path).get("inputs", {})
        for name, value in inputs.items():
            if started.get(name) != value:
                raise InputError(f"{path}: this run was started with {name} of hash {started.get(name)}, which is {value} now, expected no "
                                 "change; put the old one back to go on, or choose another --out")
    write_json(path, {
        "command": Path(sys.argv[0]).name, "settings": all_settings(configs), "inputs": inputs, "ranks": ranks(), **facts,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                     "numpy": np.__version__},
        "git_revision": git_revision()})


def input_hashes(model: nn.Module, catalog: Catalog, sft: str | None) -> dict[str, str | None]:
    """What a training run stands on: the base with the adapters below the one being trained, the SFT adapter's file, the data."""
    return {"stands_on": fingerprint(model), "adapter": sft and sha256(Path(sft) / "adapter_model.safetensors"), "data": data_hash(catalog)}


def git_revision() -> str | None:
    """The commit of the clone that runs, or None outside a clone or without git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def append_log(path: Path, record: dict[str, Any]) -> None:
    """One line of JSON; flushed, so that a run can be watched."""
    if rank() > 0:
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}) + "\n")


def check_finite(loss: float, norm: float, step: int, users: Sequence[str]) -> None:
    """Stop before a broken step reaches the weights: InputError names the step, the values and the users of the batch."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(f"step {step}: loss {loss}, gradient norm {norm}, expected finite numbers; users of the batch: "
                         f"{', '.join(users)}; nothing was updated, the last checkpoint stands: lower --learning-rate or --sigma, or look at these users' items and at the checkpoint's weights")
