"""Checkpoints: all that a training loop needs to go on as if it had never been stopped.

    OUT/checkpoint-STEP/state.safetensors   weights, the optimizer's moments, the generators' states
    OUT/checkpoint-STEP/state.json          step, facts of the loop, length of the log, hash of the
                                            tensors; written last

safetensors and JSON, nothing pickled. A checkpoint is written into a hidden folder, flushed to disk
and renamed; only then the one before it is deleted. So whenever a run is killed, the newest folder
of this name is whole. Data order and schedule are functions of seed and step and need no state.

Of several processes rank 0 writes, with the states of every rank's generators. A base that --shard
divides is frozen and never part of a checkpoint, and what is trained is whole on every rank, so
there is nothing that torch.distributed.checkpoint would have to put together.
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
from hanorec.base.files import read_object, whole_folder, write_bytes, write_json

Generators = Mapping[str, torch.Generator]
AGAIN = "the run cannot go on: choose another --out"


def generators(device: torch.device, **own: torch.Generator) -> dict[str, torch.Generator]:
    """Every source of randomness of a run: PyTorch's own, the device's (dropout), the loop's."""
    found = {"torch": torch.default_generator, **own}
    if device.type == "cuda":
        number = device.index or torch.cuda.current_device()
        found["cuda"] = torch.cuda.default_generators[number]
    return found


def save_checkpoint(
    out: Path,
    step: int,
    weights: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    random: Generators,
    **facts: Any,
) -> None:
    """The state after `step` optimizer steps. facts: what else the loop carries, as JSON."""
    tensors = {f"weight.{i}": weight for i, weight in enumerate(weights)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    for name, generator in random.items():
        own = generator.get_state()[None]
        tensors[f"random.{name}"] = all_gather(own, world_size())  # (ranks, bytes)
    if rank() > 0:
        return
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    state = {
        "step": step,
        "facts": facts,
        "log_bytes": _flushed_size(out / "log.jsonl"),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    final = out / f"checkpoint-{step:08d}"
    with whole_folder(final) as folder:
        write_bytes(folder / "state.safetensors", data)
        write_json(folder / "state.json", state)
    for other in out.glob("checkpoint-*"):
        if other != final:
            shutil.rmtree(other)


def load_checkpoint(
    out: Path,
    weights: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    random: Generators,
) -> tuple[int, dict[str, Any]]:
    """Put everything back as the newest checkpoint in `out` has it.

    The log loses the lines of later steps, which are about to be done again.

    Returns:
        (steps done, facts), or (0, {}) if there is no checkpoint.
    Raises:
        InputError: the checkpoint is damaged or does not fit.
    """
    log = out / "log.jsonl"
    if rank() == 0:
        _clear_half_written(out)
    found = sorted(out.glob("checkpoint-*"))
    if not found:
        if rank() == 0:
            log.unlink(missing_ok=True)
        return 0, {}
    path = found[-1]
    state = _read_state(path, log)
    tensors = _read_tensors(path, state.get("tensors_sha256"))
    _check_fit(path, tensors, weights, random)
    _restore(tensors, weights, optimizer, random)
    if rank() == 0 and log.exists():
        os.truncate(log, state["log_bytes"])
    barrier()  # a run without a step left would drop checkpoints while another rank still reads
    return state["step"], state["facts"]


def drop_checkpoints(out: Path) -> None:
    """Once the result itself is on disk."""
    for path in out.glob("checkpoint-*") if rank() == 0 else []:
        shutil.rmtree(path)


def _clear_half_written(out: Path) -> None:
    """What a killed run was writing: files and folders have hidden names until they are whole."""
    for path in {*out.glob(".checkpoint-*"), *out.glob(".*.tmp-*")}:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _read_state(path: Path, log: Path) -> dict[str, Any]:
    """state.json, if its values are of the right kind and the log is as long as it says."""
    state = read_object(path / "state.json")
    step, facts, log_bytes = (state.get(name) for name in ("step", "facts", "log_bytes"))
    whole = isinstance(step, int) and isinstance(facts, dict) and isinstance(log_bytes, int)
    if not whole:
        raise InputError(
            f"{path / 'state.json'}: step = {step!r}, facts = {facts!r}, log_bytes = "
            f"{log_bytes!r}, expected two whole numbers and an object: the file was edited; {AGAIN}"
        )
    size = log.stat().st_size if log.exists() else 0
    if size < log_bytes:
        raise InputError(
            f"{log}: {size} bytes, expected at least the {log_bytes} that it had at the "
            f"checkpoint: lines are lost; {AGAIN}"
        )
    return state


def _read_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whose bytes must have that hash."""
    file = path / "state.safetensors"
    try:
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(
                f"{file}: its hash is not the one in state.json, expected an unaltered file; "
                f"{AGAIN}"
            )
        return load(data)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); {AGAIN}") from None


def _check_fit(
    path: Path,
    tensors: Mapping[str, Tensor],
    weights: Sequence[Tensor],
    random: Generators,
) -> None:
    """InputError where the checkpoint has other weights or generators than this run."""
    wanted = {f"weight.{i}": weight.shape for i, weight in enumerate(weights)}
    stored = {name: t.shape for name, t in tensors.items() if name.startswith("weight.")}
    if stored != wanted:
        raise InputError(
            f"{path}: its weights have other shapes than this run's, expected the same model and "
            f"settings; {AGAIN}"
        )
    names = [name for name in tensors if name.startswith("random.")]
    kept = {name.removeprefix("random.") for name in names}
    if kept != set(random):
        raise InputError(
            f"{path}: holds the random generators {sorted(kept)}, this run has {sorted(random)}, "
            "expected the same: it was written on another kind of device; go on there, or choose "
            "another --out"
        )


@torch.no_grad()
def _restore(
    tensors: Mapping[str, Tensor],
    weights: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    random: Generators,
) -> None:
    """Weights, moments and generators as the checkpoint has them."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "weight":
            weights[int(rest)].copy_(tensor)
        elif kind == "optimizer":
            i, _, what = rest.partition(".")
            moments.setdefault(int(i), {})[what] = tensor
        else:
            # A view of a later row may not be aligned, which crashes: so a copy.
            random[rest].set_state(tensor[rank()].clone())
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _flushed_size(path: Path) -> int:
    """Bytes of a file, all of them on disk; 0 if there is none."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size
