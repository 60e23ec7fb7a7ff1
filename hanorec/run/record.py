"""The record of a run: its folder, its settings, and what it stands on (run.json)."""

import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from hanorec.base import lock
from hanorec.base.config import DataConfig, ModelConfig
from hanorec.base.config_steps import StepConfig
from hanorec.base.distributed import barrier, rank, world_size
from hanorec.base.errors import InputError
from hanorec.base.facts import check_facts
from hanorec.base.files import read_object, write_json
from hanorec.mllm.backbone import Backbone
from hanorec.run.checkpoint import drop_checkpoints
from hanorec.run.inputs import comparable, turn_sha256

# What runs did before there was a setting for it, which they do not state.
# In prompts:
BEFORE = {"max_title_tokens": None, "images": "own", "quotes": "none", "targets": 1}
BEFORE_IN_RUNS = {
    **BEFORE,
    "schedule": "cosine",
    "keep_epochs": [],
    "drop_last": False,
    "retriever": None,
    "hold_out": 0,
    "fuse": None,
    "compile": False,
    **{field.name: field.default for field in fields(StepConfig)},
}

# ---- the folder ----


def open_run(out: str | Path, settings: Mapping[str, Any], result: str) -> Path:
    """The output folder of a run, as rank 0 finds it, which locks it until `unlock_folder`.

    That is a new or empty one, or that of the same run, stopped before it wrote `result`.
    InputError where it holds something else, a finished run, a run with other settings or on
    another number of processes, or where another process is at work in it.
    """
    out = Path(out)
    if rank() == 0:
        lock.lock_folder(out, lambda: _look_into(out, settings, result))
        if not _is_empty(out):
            print(f"{out}: going on with the run that was stopped here")
    barrier()
    return out


def close_run(out: Path, configs: Sequence[Any], inputs: dict[str, Any], **facts: Any) -> None:
    """`write_run` of a command that ends with it: then other processes may have the folder."""
    write_run(out, configs, inputs, **facts)
    if rank() == 0:
        lock.unlock_folder(out)


def _look_into(out: Path, settings: Mapping[str, Any], result: str) -> None:
    """InputError where `out` is no folder for the run, see `open_run`."""
    if not out.exists() or _is_empty(out):
        return
    if not out.is_dir() or not (out / "run.json").exists():
        raise InputError(
            f"{out}: exists and is not an empty folder, expected a new one, or a stopped run of "
            "the same command; choose another --out"
        )
    if (out / result).exists():
        drop_checkpoints(out)  # killed after the result, before these were deleted
        raise InputError(
            f"{out}: holds a finished run, expected a new folder; choose another --out or remove it"
        )
    before = read_object(out / "run.json").get("ranks", 1)
    if before != world_size():
        raise InputError(
            f"{out}: holds a stopped run on {before} processes, this one has {world_size()}, "
            "expected as many, since each draws from a stream of its own; start with torchrun "
            f"--nproc-per-node {before} to go on, or choose another --out"
        )
    check_settings(out, settings, "a stopped run")


def _is_empty(out: Path) -> bool:
    """A folder without any file but hidden ones."""
    return out.is_dir() and all(path.name.startswith(".") for path in out.iterdir())


def check_settings(out: Path, settings: Mapping[str, Any], what: str = "a run") -> None:
    """InputError where the run in `out` was started with other settings than these."""
    stored = read_object(out / "run.json").get("settings")
    stored = BEFORE_IN_RUNS | stored if isinstance(stored, dict) else stored
    check_facts(stored, settings, lambda name, found, wanted: (
        f"{out}: holds {what} with {name} = {found!r}, this command has {wanted!r}; give the same "
        "settings to go on, or choose another --out"
    ))


# ---- run.json ----


def write_run(
    out: Path,
    configs: Sequence[Any],
    inputs: dict[str, Any] | None = None,
    **facts: Any,
) -> None:
    """run.json: what was run, with what, on what. inputs: hashes of what the settings name.

    InputError where a run that goes on was started with other inputs: data, base or adapter were
    changed behind its names. A run of an earlier version stated fewer of them; these are compared.
    """
    if rank() > 0:
        return
    path, inputs = out / "run.json", inputs or {}
    if path.exists():
        stored = read_object(path).get("inputs")
        stated = comparable(stored, inputs)
        if len(stated) < len(inputs):
            missing = ", ".join(name for name in inputs if name not in stated)
            print(
                f"note: {path} was written by an earlier version, which did not state {missing}; "
                "that they have not changed is not checked"
            )
        check_facts(stored, stated, lambda name, found, wanted: (
            f"{path}: this run was started with {name} of hash {found}, which is {wanted} now, "
            "expected no change; put the old one back to go on, or choose another --out"
        ))
    write_json(path, {
        "command": Path(sys.argv[0]).name,
        "settings": all_settings(configs),
        "inputs": inputs,
        "ranks": world_size(),
        **facts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "git_revision": git_revision(),
    })


def all_settings(configs: Sequence[Any]) -> dict[str, Any]:
    """The settings of a command as one dictionary."""
    settings: dict[str, Any] = {}
    for config in configs:
        settings |= asdict(config)
    return settings


def git_revision() -> str | None:
    """The commit of the clone that runs, or None outside a clone or without git."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# ---- what an adapter was trained to read ----


def prompt_settings(
    model: ModelConfig, data: DataConfig, backbone: Backbone | None = None
) -> dict[str, Any]:
    """Kept in an adapter's hanorec.json, since another prompt is another input.

    backbone: with the hash of its chat template's frame, too.
    """
    settings = {
        "task": data.task,
        "history": data.history,
        "candidate_images": data.candidate_images,
        "max_pixels": model.max_pixels,
    }
    newer = {name: getattr(data, name) for name in BEFORE}
    if backbone is not None:
        return {**settings, **newer, "turn": turn_sha256(backbone)}
    # As earlier versions stated them in reference.safetensors.
    return settings | {name: value for name, value in newer.items() if value != BEFORE[name]}


def compare_settings(directory: str | Path, settings: dict[str, Any]) -> None:
    """Say where the prompts of this command differ from those that an adapter was trained on.

    It may be meant, so it is no error.
    """
    path = Path(directory) / "hanorec.json"
    trained = {}
    if path.exists():
        trained = BEFORE | read_object(path).get("prompt", {})
    for name, value in settings.items():
        if name not in trained or trained[name] == value:
            continue
        if name == "turn":
            print(
                f"note: {directory} was trained in the frame of another chat template, or of the "
                "same on another day, if it states the date"
            )
            continue
        print(
            f"note: {directory} was trained with {name} = {trained[name]}, this command uses "
            f"{value}"
        )
