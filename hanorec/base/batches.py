"""Global batches, and each rank's micro-batches of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanorec.base.distributed import all_gather, share, world_size
from hanorec.base.errors import InputError


def global_batches(
    n: int, size: int, seed: int, epoch: int, least: int = 1, multiple: int = 1
) -> list[list[int]]:
    """The optimizer steps of one epoch: a permutation of 0 .. n - 1 that is a function of seed and
    epoch, cut into `size`.

    A rest of fewer than `least` joins the step before it; the last n % `multiple` rows of the
    permutation are left out. Raises InputError where n or size itself is smaller than `least`.
    """
    used = n - n % multiple
    if min(used, size) < least:
        raise InputError(
            f"{used} training rows in steps of {size}, expected at least {least} in each step; use "
            "more users or targets, or raise --micro-batch or --accumulation"
        )
    order = np.random.default_rng([seed, epoch]).permutation(n)[:used].tolist()
    batches = list(chunks(order, size))
    if len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive parts of at most `size`."""
    for i in range(0, len(items), size):
        yield items[i : i + size]


def micro_batches(batch: Sequence[int], size: int) -> list[tuple[Sequence[int], int]]:
    """This rank's share of a global batch in micro-batches, each with its weight in the loss: 1.

    Every rank gets equally many, since the forwards of a divided base are collective: one that is
    short does a row at weight 0.
    """
    parts = [(part, 1) for part in chunks(batch[share(len(batch))], size)]
    longest_share = -(-len(batch) // world_size())
    most = -(-longest_share // size)  # micro-batches of the rank that has most
    return parts + [(batch[:1], 0)] * (most - len(parts))


def smallest_part(n: int, size: int) -> int:
    """The fewest rows that all ranks together have in one of their `micro_batches` of n rows."""
    together: Counter[int] = Counter()
    for r in range(world_size()):
        own = share(n, r)
        for number, part in enumerate(chunks(range(own.start, own.stop), size)):
            together[number] += len(part)
    return min(together.values())


def gather_batch(found: Sequence[Tensor], n: int) -> Tensor:
    """What all ranks found about a global batch of n rows, (n, ...) in its order, on every rank.

    found: of this rank's `micro_batches` each (b, ...), rows at weight 0 included; they are cut
    off here.
    """
    own = share(n)
    mine = torch.cat(list(found))[: own.stop - own.start]
    return all_gather(mine, n)


def total(losses: Sequence[Tensor]) -> float:
    """The sum of a step's losses, () each, read from the device once: whoever asks it for a number
    waits until all before it is computed."""
    found = 0.0
    for loss in torch.stack(list(losses)).tolist():
        found += loss
    return found
