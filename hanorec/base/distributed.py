"""Several processes as one run: torch.distributed, started by torchrun. In a single process every function here changes nothing.

    torchrun --nproc-per-node 4 train_dpo.py ...

All ranks run the same script on the same data. What is divided is divided by `share`: n things in rank order, each once, whatever n and
the number of ranks. What belongs together again is put together by `all_gather` (concatenation) or `all_reduce` (a sum). Rank 0 alone speaks
and writes files, but for the feature file, of which each writes its part.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hanorec.base.errors import InputError
from hanorec.mllm.backbone import _brief

PATIENCE = timedelta(hours=2)  # while rank 0 reads a base of 100 GB, or waits for another run's feature file; torchrun notices at once that a process died


def join(device: torch.device) -> None:
    """Join the other processes that torchrun started; gloo on CPU, NCCL on GPUs. Nothing without torchrun, or a second time."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
        sys.stderr.isatty = lambda: False  # progress bars want a terminal; errors are still shown


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Go on once every rank is here."""
    if world_size() > 1:
        dist.barrier()


def share(n: int, of_rank: int | None = None) -> slice:
    """The part of 0 .. n - 1 that is this rank's: consecutive, the first n % ranks ones longer by one, empty where n is too small."""
    r, size = rank() if of_rank is None else of_rank, world_size()
    return slice(r * (n // size) + min(r, n % size), (r + 1) * (n // size) + min(r + 1, n % size))


def dealt(parts: Sequence[Any]) -> Sequence[Any]:
    """This rank's of the parts, dealt out in turn: blocks that a single process would compute one after the other, so that they round as there."""
    return parts[rank() :: world_size()]


def all_gather(part: Tensor, n: int) -> Tensor:
    """Each rank's share (its rows, ...) of n rows -> all of them (n, ...), in order, on every rank."""
    if world_size() == 1:
        return part
    longest = -(-n // world_size())
    padded = part.new_zeros(longest, *part.shape[1:])  # collectives want equal shapes
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([p[: (s := share(n, r)).stop - s.start] for r, p in enumerate(parts)])


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in one message for all of them."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))


def sum_gradients(weights: Sequence[nn.Parameter], *numbers: float) -> tuple[float, ...]:
    """The gradients of a step, in place: each rank has those of its share of the batch, divided by counts of the whole batch, so their
    sum is that of a single process. numbers (losses, ...) travel in the same message; returns their sums."""
    if world_size() == 1:
        return numbers
    totals = torch.tensor(numbers, dtype=weights[0].dtype, device=weights[0].device)
    all_reduce([*(weight.grad for weight in weights), totals])
    return tuple(totals.tolist())


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by rank 0's."""
    for tensor in tensors if world_size() > 1 else []:
        dist.broadcast(tensor, 0)


def whole(weight: Tensor) -> Tensor:
    """A weight of which each rank may hold a part (backbone's --shard): all of it. The ranks must ask for it together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def run_on_all_ranks(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(*arguments)` of every rank, on every rank, in order. Where it raises bad input or a failing disk on
    one (ValueError, OSError), that error is raised on all: none waits for ever. Any other error ends its process, and torchrun the rest."""
    if world_size() == 1:
        return [work(*arguments)]
    try:
        outcome = work(*arguments), None
    except (ValueError, OSError) as error:  # bad input, a full disk
        outcome = None, error
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, outcome)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]


def own_seed(seed: int) -> int:
    """The seed of this rank's own stream of random numbers; rank 0's is that of a single process."""
    return int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0]) if rank() else seed


def own_stream(seed: int) -> None:
    """From here on this rank draws (dropout) from a stream of its own; rank 0 goes on as a single process would."""
    if rank() > 0:
        torch.manual_seed(own_seed(seed))


@contextmanager
def one_voice() -> Iterator[None]:
    """Around a command: the first process that fails keeps its exception, the others end in silence, so one cause gives one message.

    A process says so before it ends, at torchrun's store; those that then lose touch with it find that the cause is being told.
    """
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        if not _first_to_fail():
            time.sleep(1)  # torchrun ends all processes as soon as one has ended: the first one has yet to speak
            sys.exit(2)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise InputError("another process of this run was lost, expected all to live to its end; see what torchrun says of it, and give "
                             "the same command again to go on from the last checkpoint") from None
        raise


def _first_to_fail() -> bool:
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"failed, attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except dist.DistError:  # torchrun itself is gone
        return True


def usable_device(name: str) -> torch.device:
    """cpu, cuda (this process's own), or auto = cuda if there is one. InputError for a device that this machine does not have."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used ({_brief(error)}); expected cpu, or cuda on a machine with a GPU") from None
