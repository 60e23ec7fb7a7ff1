"""How a feature file comes to be: one run claims it, and its ranks encode and write it together.

Whatever can fail is done by `run_on_all_ranks`, so that no rank waits for one that has failed.
"""

import fcntl
import os
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import torch

from hanorec.base.distributed import barrier, rank, run_on_all_ranks
from hanorec.base.lock import flock, lies_at
from hanorec.datasets.catalog import Catalog
from hanorec.mllm import items
from hanorec.mllm.backbone import Backbone, ImageFeatures


class Claim:
    """A run's claim to write a file of data that no index marks as whole yet.

    `take` says whether this run has to write. If so, rank 0 holds a lock on the data until the
    block ends; other runs wait in their own `take` meanwhile. The lock ends with its process, in
    whatever way that ends. Where the block fails, the data is deleted before anybody goes on.
    """

    def __init__(self, data: Path, index: Path) -> None:
        self.data, self.index = data, index
        self.lock: BinaryIO | None = None  # rank 0's, of a run that has to write

    def take(self) -> bool:
        """On rank 0: whether the file has to be written; then it is empty, and locked. Elsewhere:
        False."""
        if rank() > 0 or self.index.exists():
            return False
        self.data.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(self.data)
        if self.index.exists():  # written while this process waited
            lock.close()
            return False
        self.lock = lock
        lock.truncate(0)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.lock is not None:
            with self.lock:  # closed, and so let go, when the data is gone
                if error is not None:
                    self.data.unlink(missing_ok=True)  # a full disk should not stay full
        if isinstance(error, ValueError | OSError):
            # `run_on_all_ranks` raised it on every rank. None ends, and torchrun no other, before
            # the data is gone.
            barrier()


def _locked(path: Path) -> BinaryIO:
    """The file, opened without cutting off what another process writes, and locked.

    While this process waits for the lock, the other one may delete the file: then a lock on it is
    worth nothing, and the file is opened anew.
    """
    while True:
        file = open(path, "ab")  # noqa: SIM115  closed by whoever asks for it
        flock(file, path.parent, fcntl.LOCK_EX)
        if lies_at(path, file):
            return file
        file.close()


class Entry(NamedTuple):
    """What the index says of one image."""

    tokens: int
    grid: list[int] | None


def write_data(data: Path, backbone: Backbone, catalog: Catalog, rows: list[int]) -> list[Entry]:
    """Encode the images of `rows` and write them end to end; all their entries, on every rank.

    The batches are those of a single process, dealt out to the ranks in turn. In each round every
    rank encodes one batch and writes it at its own place in the file.
    """
    own = _OwnBatches(data, backbone, catalog, rows)
    entries: list[Entry] = []
    tokens_before = 0  # in all rounds before
    while len(entries) < len(rows):
        found = run_on_all_ranks(own.encode_next)  # a list of entries for each rank
        of_lower_ranks = sum(entry.tokens for entry in chain(*found[: rank()]))
        run_on_all_ranks(own.write, tokens_before + of_lower_ranks)
        fresh = list(chain(*found))
        tokens_before += sum(entry.tokens for entry in fresh)
        entries += fresh
    run_on_all_ranks(own.flush)
    return entries


class _OwnBatches:
    """This rank's batches of images, one in memory at a time."""

    def __init__(
        self, data: Path, backbone: Backbone, catalog: Catalog, rows: list[int]
    ) -> None:
        self.data = data
        self.stream = items.encode(backbone, catalog, items.own_rows(rows))
        self.bytes_a_token = backbone.width * backbone.model.dtype.itemsize
        self.batch: list[ImageFeatures] = []

    def encode_next(self) -> list[Entry]:
        """Go on to the next batch, empty where there is none."""
        self.batch = [picture for _, picture in islice(self.stream, items.BATCH)]
        entries = []
        for features, grid in self.batch:
            entries.append(Entry(len(features), None if grid is None else grid.tolist()))
        return entries

    def write(self, tokens_before: int) -> None:
        """Write the batch where so many tokens stand before it."""
        with open(self.data, "r+b") as file:
            file.seek(tokens_before * self.bytes_a_token)
            file.writelines(map(_bytes_of, self.batch))

    def flush(self) -> None:
        """Have on disk what was written."""
        with open(self.data, "r+b") as file:
            os.fsync(file.fileno())


def _bytes_of(picture: ImageFeatures) -> np.ndarray:
    return picture.features.contiguous().view(torch.uint8).numpy()
