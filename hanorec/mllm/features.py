"""The feature file: what the frozen vision tower makes of a catalogue's images, computed once and mapped into memory ever after.

    features-KEY.bin    the features of all images end to end, n tokens x width numbers each, in the model's dtype, without a header
    features-KEY.json   the facts that they depend on, and each image's tokens and grid; written last, as the mark of completeness

KEY is a hash of the facts, so the files of several bases, image sizes or states of the images lie side by side in one folder. A
file that does not state exactly the facts of the command that opens it is refused.
"""

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from hanorec.base.distributed import barrier, rank, run_on_all_ranks, share
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, sha256, write_json
from hanorec.datasets.catalog import Catalog
from hanorec.mllm import items
from hanorec.mllm.backbone import Backbone, ImageFeatures


def stored_pictures(backbone: Backbone, catalog: Catalog, folder: str | Path) -> dict[int, ImageFeatures]:
    """Catalogue row -> features of its image, for all items that have one, from the feature file in `folder`; made if there is none.

    The features are views of the file: an item's bytes are read when they are used, so a catalogue may be larger than memory.
    """
    rows = [row for row, path in enumerate(catalog.images) if path is not None]
    if not rows:
        return {}
    facts = feature_facts(backbone, catalog)
    stem = Path(folder) / f"features-{_hash(facts)[:16]}"
    write_features(stem, facts, backbone, catalog, rows)
    return dict(zip(rows, open_features(stem, facts, backbone.width), strict=True))


def feature_facts(backbone: Backbone, catalog: Catalog) -> dict[str, Any]:
    """All that the features depend on: every weight outside the language model, the configuration, the image processor with its
    max_pixels, and the bytes of every image. Nothing is sampled and no time stamp is trusted."""
    config, digest = backbone.config.to_dict(), hashlib.sha256()
    for name, weight in backbone.model.state_dict().items():
        if ".language_model." not in name and not name.startswith("lm_head."):
            digest.update(f"{name} {tuple(weight.shape)} ".encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    images = [(item, path) for item, path in zip(catalog.ids, catalog.images, strict=True) if path is not None]
    lines = run_on_all_ranks(lambda: [f"{item} {sha256(path)}\n" for item, path in images[share(len(images))]])
    facts = {
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "config": {name: value for name, value in config.items() if name not in ("text_config", "_name_or_path")},
        "image_processor": backbone.image_processor.to_dict() | {"class": type(backbone.image_processor).__name__},
        "weights_sha256": digest.hexdigest(),
        "images_sha256": hashlib.sha256("".join(chain(*lines)).encode()).hexdigest()}
    return json.loads(json.dumps(facts))  # as the file will state them: lists for tuples, texts for keys


def write_features(stem: Path, facts: dict[str, Any], backbone: Backbone, catalog: Catalog, rows: list[int]) -> None:
    """Encode the images of `rows` batch by batch into the file, unless it is whole. What a stopped run left has no .json, and is written anew.

    The batches are those of a single process, dealt out to the ranks in turn, and each rank writes its own at their place in the file.
    """
    data, index = stem.with_suffix(".bin"), stem.with_suffix(".json")
    stream = items.encode(backbone, catalog, items.own_rows(rows))
    part: list[ImageFeatures] = []  # this rank's batch of the round

    def encode() -> list[tuple[int, list[int] | None]]:
        part[:] = [picture for _, picture in islice(stream, items.BATCH)]
        return [(len(features), None if grid is None else grid.tolist()) for features, grid in part]

    def write(tokens_before: int) -> None:
        with open(data, "r+b") as file:
            file.seek(tokens_before * backbone.width * backbone.model.dtype.itemsize)
            file.writelines(features.contiguous().view(torch.uint8).numpy() for features, _ in part)

    def flush() -> None:
        with open(data, "r+b") as file:
            os.fsync(file.fileno())

    try:
        with _claimed(data, index) as claimed:
            if not claimed:
                return
            print(f"{len(rows)} images of {catalog.name} are encoded once, into {data}")
            tokens: list[int] = []
            grids: list[list[int] | None] = []
            written = 0  # tokens of all rounds before
            # Whatever can fail is done by `run_on_all_ranks`, so that no rank waits for one that has failed.
            while len(tokens) < len(rows):
                found = run_on_all_ranks(encode)
                run_on_all_ranks(write, written + sum(n for n, _ in chain(*found[: rank()])))
                for n, grid in chain(*found):
                    tokens.append(n)
                    grids.append(grid)
                    written += n
            run_on_all_ranks(flush)
            run_on_all_ranks(lambda: write_index(index, facts, tokens, grids) if rank() == 0 else None)
    except OSError as error:
        raise InputError(f"{data}: cannot be written ({error.strerror}); image features are kept there, so free space or name a folder "
                         "that can be written with --features") from None


@contextmanager
def _claimed(data: Path, index: Path) -> Iterator[bool]:
    """Whether these ranks have to write the file. If so, rank 0 holds a lock on it until it is whole or, after a failure, gone.

    The lock lets one run write while the others wait for it; it ends with its process, in whatever way that ends.
    """
    lock = None

    def claim() -> bool:
        nonlocal lock
        if rank() == 0 and not index.exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            lock = _locked(data)
            if index.exists():  # written while this process waited
                lock = lock.close()
            else:
                lock.truncate(0)
        return lock is not None

    try:
        yield run_on_all_ranks(claim)[0]
    except BaseException as error:
        if lock is not None:
            data.unlink()  # a full disk should not stay full
        if isinstance(error, ValueError | OSError):  # `run_on_all_ranks` raised it on every rank: none ends, and torchrun no other, before the file is gone
            barrier()
        raise
    finally:
        if lock is not None:
            lock.close()


def _locked(path: Path) -> BinaryIO:
    """The file, opened without cutting off what another process writes, and locked. It may be deleted while this process waits."""
    while True:
        file = open(path, "ab")  # noqa: SIM115  closed by whoever asks for it
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and path.samefile(f"/proc/self/fd/{file.fileno()}"):
            return file
        file.close()


def write_index(index: Path, facts: dict[str, Any], tokens: list[int], grids: list[list[int] | None]) -> None:
    """The .json beside the data: the facts, and each image's tokens and grid, under a hash of all of it."""
    write_json(index, {"facts": facts, "tokens": tokens, "grids": grids, "sha256": _hash([facts, tokens, grids])})


def open_features(stem: Path, facts: dict[str, Any], width: int) -> list[ImageFeatures]:
    """The pictures of a feature file, in its order; none of their bytes is read. InputError where it is not whole, was edited, or
    states other facts."""
    data, index = stem.with_suffix(".bin"), stem.with_suffix(".json")
    again = f"delete {data.name} and {index.name} to compute them again"
    stored = read_object(index)
    found, tokens, grids = (stored.get(name) for name in ("facts", "tokens", "grids"))
    for name, value in facts.items():
        other = found.get(name) if isinstance(found, dict) else None
        if other != value:
            raise InputError(f"{index}: {name} is {other!r} in the file, expected {value!r}; features of something else: {again}")
    if _hash([found, tokens, grids]) != stored.get("sha256"):
        raise InputError(f"{index}: does not have the sha256 {stored.get('sha256')!r} that it states: the file was edited; {again}")
    dtype = getattr(torch, facts["dtype"])
    size, expected = data.stat().st_size if data.exists() else 0, sum(tokens) * width * dtype.itemsize
    if size != expected:
        raise InputError(f"{data}: {size} bytes, expected {expected}; it was cut off or belongs to another file: {again}")
    # Read-only and shared: a private or writable mapping of a file larger than memory is refused by the system.
    raw = np.memmap(data, mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tensor cannot be written, which is meant
        features = torch.from_numpy(raw).view(dtype).view(-1, width)  # (all tokens, d)
    return [ImageFeatures(part, None if grid is None else torch.tensor(grid)) for part, grid in zip(features.split(tokens), grids, strict=True)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
