"""Several processes as one run: torch.distributed, started by torchrun. In a single process every
function here changes nothing.

    torchrun --nproc-per-node 4 train_dpo.py ...

All ranks run the same script on the same data. What is divided is divided by `share`: n things in
rank order, each once, whatever n and the number of ranks. What belongs together again is put
together by `all_gather` (concatenation) or `all_reduce` (a sum). Rank 0 alone speaks and writes
files, but for the feature file, of which each writes its part.
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

from hanorec.base.errors import InputError, brief

# While rank 0 reads a base of 100 GB, or waits for another run's feature file. That a process died
# torchrun notices at once.
PATIENCE = timedelta(hours=2)


def join(device: torch.device) -> None:
    """Join the other processes that torchrun started; gloo on CPU, NCCL on GPUs.

    Nothing without torchrun, or a second time.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=PATIENCE)
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


# ---- what is divided, and put together again ----


def share(n: int, of_rank: int | None = None) -> slice:
    """The part of 0 .. n - 1 that is this rank's.

    Consecutive, the first n % ranks ones longer by one, empty where n is too small.
    """
    r = rank() if of_rank is None else of_rank
    each, longer = divmod(n, world_size())
    return slice(r * each + min(r, longer), (r + 1) * each + min(r + 1, longer))


def dealt(parts: Sequence[Any]) -> Sequence[Any]:
    """This rank's of the parts, dealt out in turn.

    Parts are blocks that a single process would compute one after the other, so that they round as
    there.
    """
    return parts[rank() :: world_size()]


def all_gather(part: Tensor, n: int) -> Tensor:
    """Each rank's share (its rows, ...) of n rows -> all of them (n, ...), in order, on every rank.
    """
    if world_size() == 1:
        return part
    longest = -(-n // world_size())
    padded = part.new_zeros(longest, *part.shape[1:])  # collectives want equal shapes
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    for r, whole_part in enumerate(parts):
        own = share(n, r)
        parts[r] = whole_part[: own.stop - own.start]
    return torch.cat(parts)


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in one message for all of them."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))


def sum_gradients(weights: Sequence[nn.Parameter], *numbers: float) -> tuple[float, ...]:
    """Sum the gradients of a step over the ranks, in place.

    Each rank has those of its share of the batch, divided by counts of the whole batch, so their
    sum is that of a single process. A weight without a gradient has none on any rank. numbers
    (losses, ...) travel in the same message; returns their sums.
    """
    if world_size() == 1:
        return numbers
    totals = torch.tensor(numbers, dtype=weights[0].dtype, device=weights[0].device)
    found = [weight.grad for weight in weights if weight.grad is not None]
    all_reduce([*found, totals])
    return tuple(totals.tolist())


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by rank 0's."""
    for tensor in tensors if world_size() > 1 else []:
        dist.broadcast(tensor, 0)


def whole(weight: Tensor) -> Tensor:
    """All of a weight of which each rank may hold a part (`--shard`).

    The ranks must ask for it together.
    """
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def run_on_all_ranks(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(*arguments)` of every rank, on every rank, in order.

    Where it raises bad input or a failing disk on one (ValueError, OSError), that error is raised
    on all: none waits for ever. Any other error ends its process, and torchrun the rest.
    """
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


# ---- random numbers ----


def own_seed(seed: int) -> int:
    """The seed of this rank's own stream of random numbers; rank 0's is a single process's."""
    return int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0]) if rank() else seed


def own_stream(seed: int) -> None:
    """From here on this rank draws (dropout) from a stream of its own.

    Rank 0 goes on as a single process would.
    """
    if rank() > 0:
        torch.manual_seed(own_seed(seed))


# ---- how several processes end ----


@contextmanager
def one_voice() -> Iterator[None]:
    """Around a command: one cause gives one message.

    The first process that fails keeps its exception, the others end in silence. A process says so
    before it ends, at torchrun's store; those that then lose touch with it find that the cause is
    being told.
    """
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        if not _first_to_fail():
            # torchrun ends all processes as soon as one has ended: the first one has yet to speak
            time.sleep(1)
            sys.exit(2)
        lost = isinstance(error, RuntimeError) and "gloo" in str(error)
        if lost or isinstance(error, dist.DistError):
            raise InputError(
                "another process of this run was lost, expected all to live to its end; see what "
                "torchrun says of it, and give the same command again to go on from the last "
                "checkpoint"
            ) from None
        raise


def _first_to_fail() -> bool:
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"failed, attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except dist.DistError:  # torchrun itself is gone
        return True


# ---- the device ----


def usable_device(name: str) -> torch.device:
    """cpu, cuda (this process's own), or auto = cuda if there is one.

    InputError for a device that this machine does not have, and where torchrun started more
    processes on it than it has GPUs.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if 0 < gpus < processes:
            raise InputError(
                f"--device {name}: {processes} processes on this machine, which has {gpus} GPU"
                f"{'s' if gpus > 1 else ''}, expected a GPU for each; start torchrun with "
                f"--nproc-per-node {gpus}, or give --device cpu"
            )
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name}: cannot be used ({brief(error)}); expected cpu, or cuda on a machine "
            "with a GPU"
        ) from None
