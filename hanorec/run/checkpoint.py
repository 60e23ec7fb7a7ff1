"""Checkpoints: all that a training loop needs to go on as if it had never been stopped. safetensors and JSON, nothing pickled.

    OUT/checkpoint-STEP/state.safetensors     weights, the optimizer's moments, the states of the random generators
    OUT/checkpoint-STEP/state.json            step, facts of the loop, length of the log, hash of the tensors; written last

A checkpoint is written into a hidden folder, flushed to disk and renamed; only then the one before it is deleted. So whenever a run
is killed, the newest folder of this name is whole. Data order and schedule are functions of seed and step and need no state.

Of several processes rank 0 writes, with the states of every rank's generators. A base that --shard divides is frozen and never part of
a checkpoint, and what is trained is whole on every rank, so there is nothing that torch.distributed.checkpoint would have to put together.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hanorec.base.distributed import all_gather, barrier, rank, world_size
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, write_bytes, write_json

Generators = Mapping[str, torch.Generator]


def generators(device: torch.device, **own: torch.Generator) -> dict[str, torch.Generator]:
    """Every source of randomness of a run: PyTorch's own, that of the device (dropout), and the loop's."""
    found = {"torch": torch.default_generator, **own}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.default_generators[device.index or torch.cuda.current_device()]
    return found


def save_checkpoint(out: Path, step: int, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer, random: Generators, **facts: Any) -> None:
    """The state after `step` optimizer steps. facts: what else the loop carries, as JSON. The log's length is kept."""
    states = {name: all_gather(generator.get_state()[None], world_size()) for name, generator in random.items()}  # (ranks, bytes)
    if rank() > 0:
        return
    tensors = {f"weight.{i}": weight for i, weight in enumerate(weights)}
    tensors |= {f"optimizer.{i}.{name}": value for i, state in optimizer.state_dict()["state"].items() for name, value in state.items()}
    tensors |= {f"random.{name}": state for name, state in states.items()}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    hidden, final = out / f".checkpoint-{step:08d}", out / f"checkpoint-{step:08d}"
    try:
        write_bytes(hidden / "state.safetensors", data)
        write_json(hidden / "state.json", {"step": step, "facts": facts, "log_bytes": _flushed_size(out / "log.jsonl"),
                                           "tensors_sha256": hashlib.sha256(data).hexdigest()})
        _flush_folder(hidden)
        os.replace(hidden, final)
    except BaseException:  # a full disk: make room again, the checkpoint before this one is whole
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    _flush_folder(out)
    for other in out.glob("checkpoint-*"):
        if other != final:
            shutil.rmtree(other)


def load_checkpoint(out: Path, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer, random: Generators) -> tuple[int, dict[str, Any]]:
    """Put everything back as the newest checkpoint in `out` has it; returns (steps done, facts), or (0, {}) if there is none.

    The log loses the lines of later steps, which are about to be done again. InputError where the checkpoint is damaged or does not fit.
    """
    if rank() == 0:
        for half_written in [*out.glob(".checkpoint-*"), *out.glob(".*.tmp-*")]:
            shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
    found = sorted(out.glob("checkpoint-*"))
    if not found:
        if rank() == 0:
            (out / "log.jsonl").unlink(missing_ok=True)
        return 0, {}
    path, again = found[-1], "the run cannot go on: choose another --out"
    stored = read_object(path / "state.json")
    step, facts, log_bytes = (stored.get(name) for name in ("step", "facts", "log_bytes"))
    if not (isinstance(step, int) and isinstance(facts, dict) and isinstance(log_bytes, int)):
        raise InputError(f"{path / 'state.json'}: step = {step!r}, facts = {facts!r}, log_bytes = {log_bytes!r}, expected two whole numbers and an "
                         f"object: the file was edited; {again}")
    log = out / "log.jsonl"
    if (size := log.stat().st_size if log.exists() else 0) < log_bytes:
        raise InputError(f"{log}: {size} bytes, expected at least the {log_bytes} that it had at the checkpoint: lines are lost; {again}")
    try:
        data = (path / "state.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != stored.get("tensors_sha256"):
            raise InputError(f"{path / 'state.safetensors'}: its hash is not the one in state.json, expected an unaltered file; {again}")
        tensors = load(data)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path / 'state.safetensors'}: cannot be read ({error}); {again}") from None
    shapes = {f"weight.{i}": tuple(weight.shape) for i, weight in enumerate(weights)}
    if {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("weight.")} != shapes:
        raise InputError(f"{path}: its weights have other shapes than this run's, expected the same model and settings; {again}")
    if (kept := {name.removeprefix("random.") for name in tensors if name.startswith("random.")}) != set(random):
        raise InputError(f"{path}: holds the random generators {sorted(kept)}, this run has {sorted(random)}, expected the same: it was written on "
                         f"another kind of device; go on there, or choose another --out")
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight.copy_(tensors[f"weight.{i}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            i, _, what = rest.partition(".")
            state.setdefault(int(i), {})[what] = tensor
        elif kind == "random":
            random[rest].set_state(tensor[rank()].clone())  # a view of a later row may not be aligned, which crashes
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if rank() == 0 and log.exists():
        os.truncate(log, log_bytes)
    barrier()  # a run that has no step left would go on to `drop_checkpoints` while another still reads
    return step, facts


def drop_checkpoints(out: Path) -> None:
    """Once the result itself is on disk."""
    for path in out.glob("checkpoint-*") if rank() == 0 else []:
        shutil.rmtree(path)


def _flushed_size(path: Path) -> int:
    """Bytes of a file, all of them on disk; 0 if there is none."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _flush_folder(path: Path) -> None:
    """Names are on disk, too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
