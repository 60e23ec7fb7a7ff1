"""The record of a run: its folder, run.json, the log."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from hanorec.base.config import DataConfig, ModelConfig
from hanorec.base.distributed import barrier, rank, world_size
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, sha256, write_json
from hanorec.datasets.catalog import Catalog, data_hash
from hanorec.lora.files import base_fingerprint
from hanorec.run.checkpoint import drop_checkpoints


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
        "command": Path(sys.argv[0]).name, "settings": all_settings(configs), "inputs": inputs, "ranks": world_size(), **facts,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                     "numpy": np.__version__},
        "git_revision": git_revision()})


def input_hashes(model: nn.Module, catalog: Catalog, sft: str | None) -> dict[str, str | None]:
    """What a training run stands on: the base with the adapters below the one being trained, the SFT adapter's file, the data."""
    return {"stands_on": base_fingerprint(model), "adapter": sft and sha256(Path(sft) / "adapter_model.safetensors"), "data": data_hash(catalog)}


def git_revision() -> str | None:
    """The commit of the clone that runs, or None outside a clone or without git."""
    root = Path(__file__).parent.parent.parent
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


def open_run(out: str | Path, settings: Mapping[str, Any], result: str) -> Path:
    """The output folder of a run: a new or empty one, or that of the same run, stopped before it wrote `result`. Rank 0 decides.

    InputError where it holds something else, a finished run, a run with other settings or on another number of processes.
    """
    if rank() == 0:
        _open_run(Path(out), settings, result)
    barrier()
    return Path(out)


def _open_run(out: Path, settings: Mapping[str, Any], result: str) -> None:
    if not out.exists() or (out.is_dir() and not any(not path.name.startswith(".") for path in out.iterdir())):
        out.mkdir(parents=True, exist_ok=True)
        return
    if not out.is_dir() or not (out / "run.json").exists():
        raise InputError(f"{out}: exists and is not an empty folder, expected a new one, or a stopped run of the same command; choose another --out")
    if (out / result).exists():
        drop_checkpoints(out)  # killed after the result, before these were deleted
        raise InputError(f"{out}: holds a finished run, expected a new folder; choose another --out or remove it")
    record = read_object(out / "run.json")
    if (before := record.get("ranks", 1)) != world_size():
        raise InputError(f"{out}: holds a stopped run on {before} processes, this one has {world_size()}, expected as many, since each draws from a stream of "
                         f"its own; start with torchrun --nproc-per-node {before} to go on, or choose another --out")
    check_settings(out, settings, "a stopped run")
    print(f"{out}: going on with the run that was stopped here")


def check_settings(out: Path, settings: Mapping[str, Any], what: str = "a run") -> None:
    """InputError where the run in `out` was started with other settings than these."""
    stored = read_object(out / "run.json").get("settings")
    stored = stored if isinstance(stored, dict) else {}
    for name, value in json.loads(json.dumps(settings)).items():
        if stored.get(name) != value:
            raise InputError(f"{out}: holds {what} with {name} = {stored.get(name)!r}, this command has {value!r}; give the same "
                             "settings to go on, or choose another --out")
