"""Several processes as one run: torch.distributed, started by torchrun. In a single process every function here changes nothing.

    torchrun --nproc-per-node 4 train_dpo.py ...

All ranks run the same script on the same data. What is divided is divided by `share`: n things in rank order, each once, whatever n and
the number of ranks. What belongs together again is put together by `gathered` (concatenation) or `summed` (a sum).
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def join(device: torch.device) -> None:
    """Join the other processes that torchrun started; gloo on CPU, NCCL on GPUs. Nothing without torchrun, or a second time."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int, of_rank: int | None = None) -> slice:
    """The part of 0 .. n - 1 that is this rank's: consecutive, the first n % ranks ones longer by one, empty where n is too small."""
    r, size = rank() if of_rank is None else of_rank, ranks()
    return slice(r * (n // size) + min(r, n % size), (r + 1) * (n // size) + min(r + 1, n % size))


def gathered(part: Tensor, n: int) -> Tensor:
    """Each rank's share (its rows, ...) of n rows -> all of them (n, ...), in order, on every rank."""
    if ranks() == 1:
        return part
    longest = -(-n // ranks())
    padded = part.new_zeros(longest, *part.shape[1:])  # collectives want equal shapes
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(ranks())]
    dist.all_gather(parts, padded)
    return torch.cat([p[: (s := share(n, r)).stop - s.start] for r, p in enumerate(parts)])


def summed(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in one message for all of them."""
    if ranks() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))
