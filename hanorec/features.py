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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanorec.backbone import Backbone, Picture
from hanorec.catalog import Catalog
from hanorec.errors import InputError
from hanorec.files import read_object, sha256, write_json
from hanorec.items import encode


def stored_pictures(backbone: Backbone, catalog: Catalog, folder: str | Path) -> dict[int, Picture]:
    """Catalogue row -> features of its image, for all items that have one, from the feature file in `folder`; made if there is none.

    The features are views of the file: an item's bytes are read when they are used, so a catalogue may be larger than memory.
    """
    rows = [row for row, path in enumerate(catalog.images) if path is not None]
    if not rows:
        return {}
    facts = feature_facts(backbone, catalog)
    stem = Path(folder) / f"features-{_hash(facts)[:16]}"
    if not stem.with_suffix(".json").exists():
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
    images = [f"{item} {sha256(path)}\n" for item, path in zip(catalog.ids, catalog.images, strict=True) if path is not None]
    facts = {
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "config": {name: value for name, value in config.items() if name not in ("text_config", "_name_or_path")},
        "image_processor": backbone.image_processor.to_dict() | {"class": type(backbone.image_processor).__name__},
        "weights_sha256": digest.hexdigest(),
        "images_sha256": hashlib.sha256("".join(images).encode()).hexdigest()}
    return json.loads(json.dumps(facts))  # as the file will state them: lists for tuples, texts for keys


def write_features(stem: Path, facts: dict[str, Any], backbone: Backbone, catalog: Catalog, rows: list[int]) -> None:
    """Encode the images of `rows` batch by batch into the file. What a stopped run left has no .json, and is written anew.

    A lock lets one process write while the others wait for it; it ends with its process, in whatever way that ends.
    """
    data, index = stem.with_suffix(".bin"), stem.with_suffix(".json")
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        with open(data, "ab") as file:  # "wb" would cut off what another process is writing
            fcntl.flock(file, fcntl.LOCK_EX)
            if index.exists():  # written while this process waited
                return
            print(f"{len(rows)} images of {catalog.name} are encoded once, into {data}")
            tokens, grids = [], []
            try:
                file.truncate(0)
                for _, (features, grid) in encode(backbone, catalog, rows):
                    file.write(features.contiguous().view(torch.uint8).numpy())
                    tokens.append(len(features))
                    grids.append(None if grid is None else grid.tolist())
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(0)  # a full disk should not stay full
                raise
            write_index(index, facts, tokens, grids)
    except OSError as error:
        raise InputError(f"{data}: cannot be written ({error.strerror}); image features are kept there, so free space or name a folder "
                         "that can be written with --features") from None


def write_index(index: Path, facts: dict[str, Any], tokens: list[int], grids: list[list[int] | None]) -> None:
    """The .json beside the data: the facts, and each image's tokens and grid, under a hash of all of it."""
    write_json(index, {"facts": facts, "tokens": tokens, "grids": grids, "sha256": _hash([facts, tokens, grids])})


def open_features(stem: Path, facts: dict[str, Any], width: int) -> list[Picture]:
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
    return [Picture(part, None if grid is None else torch.tensor(grid)) for part, grid in zip(features.split(tokens), grids, strict=True)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
