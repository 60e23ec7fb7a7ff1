"""The feature file: what the frozen vision tower makes of a catalogue's images, computed once and
mapped into memory ever after.

    features-KEY.bin    the features of all images end to end, n tokens x width numbers each, in
                        the model's dtype, without a header
    features-KEY.json   the facts that they depend on, and each image's tokens and grid; written
                        last, as the mark of completeness

KEY is a hash of the facts, so the files of several bases, image sizes or states of the images lie
side by side in one folder. A file that does not state exactly the facts of the command that opens
it is refused.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hanorec.base.distributed import rank, run_on_all_ranks, share
from hanorec.base.errors import InputError
from hanorec.base.facts import check_facts
from hanorec.base.files import read_object, sha256, write_json
from hanorec.datasets.catalog import Catalog
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.feature_writer import Claim, write_data


def stored_pictures(
    backbone: Backbone, catalog: Catalog, folder: str | Path
) -> dict[int, ImageFeatures]:
    """Catalogue row -> features of its image, for all items that have one, from the feature file in
    `folder`; made if there is none.

    The features are views of the file: an item's bytes are read when they are used, so a catalogue
    may be larger than memory.
    """
    rows = [row for row, path in enumerate(catalog.images) if path is not None]
    if not rows:
        return {}
    facts = feature_facts(backbone, catalog)
    stem = Path(folder) / f"features-{_hash(facts)[:16]}"
    write_features(stem, facts, backbone, catalog, rows)
    return dict(zip(rows, open_features(stem, facts, backbone.width), strict=True))


# ---- the facts ----


def feature_facts(backbone: Backbone, catalog: Catalog) -> dict[str, Any]:
    """All that the features depend on: every weight outside the language model, the configuration,
    the image processor with its max_pixels, and the bytes of every image.

    Nothing is sampled and no time stamp is trusted.
    """
    config = backbone.config.to_dict()
    left_out = ("text_config", "_name_or_path")
    processor = backbone.image_processor
    facts = {
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "config": {name: value for name, value in config.items() if name not in left_out},
        "image_processor": processor.to_dict() | {"class": type(processor).__name__},
        "weights_sha256": _tower_sha256(backbone.model),
        "images_sha256": images_sha256(catalog),
    }
    return json.loads(json.dumps(facts))  # as the file will state them: lists for tuples


def _tower_sha256(model: nn.Module) -> str:
    """Of every weight outside the language model: name, shape and bytes."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if ".language_model." in name or name.startswith("lm_head."):
            continue
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def images_sha256(catalog: Catalog) -> str:
    """Of every item's id with the hash of its image. The ranks divide the images.

    Kept with the catalogue, so that a command reads the images once for it.
    """
    kept = vars(catalog)
    if "images_sha256" not in kept:
        kept["images_sha256"] = _images_sha256(catalog)
    return kept["images_sha256"]


def _images_sha256(catalog: Catalog) -> str:
    images = []
    for item, path in zip(catalog.ids, catalog.images, strict=True):
        if path is not None:
            images.append((item, path))

    def own_lines() -> str:
        return "".join(f"{item} {sha256(path)}\n" for item, path in images[share(len(images))])

    lines = "".join(run_on_all_ranks(own_lines))
    return hashlib.sha256(lines.encode()).hexdigest()


# ---- the file ----


def write_features(
    stem: Path, facts: dict[str, Any], backbone: Backbone, catalog: Catalog, rows: list[int]
) -> None:
    """Encode the images of `rows` into the file, unless it is whole.

    One run writes it while the others wait. What a killed run left has no .json, and is written
    anew. InputError where the file cannot be written; nothing of it stays then.
    """
    data, index = stem.with_suffix(".bin"), stem.with_suffix(".json")
    try:
        with Claim(data, index) as claim:
            if not run_on_all_ranks(claim.take)[0]:
                return
            print(f"{len(rows)} images of {catalog.name} are encoded once, into {data}")
            entries = write_data(data, backbone, catalog, rows)
            tokens = [entry.tokens for entry in entries]
            grids = [entry.grid for entry in entries]

            def finish() -> None:
                if rank() == 0:
                    write_index(index, facts, tokens, grids)

            run_on_all_ranks(finish)
    except OSError as error:
        raise InputError(
            f"{data}: cannot be written ({error.strerror}); image features are kept there, so free "
            "space or name a folder that can be written with --features"
        ) from None


def write_index(
    index: Path, facts: dict[str, Any], tokens: list[int], grids: list[list[int] | None]
) -> None:
    """The .json beside the data: the facts, and each image's tokens and grid, under a hash of all
    of it."""
    sha = _hash([facts, tokens, grids])
    write_json(index, {"facts": facts, "tokens": tokens, "grids": grids, "sha256": sha})


def open_features(stem: Path, facts: dict[str, Any], width: int) -> list[ImageFeatures]:
    """The pictures of a feature file, in its order; none of their bytes is read.

    InputError where it is not whole, was edited, or states other facts.
    """
    data, index = stem.with_suffix(".bin"), stem.with_suffix(".json")
    again = f"delete {data.name} and {index.name} to compute them again"
    stored = read_object(index)
    found, tokens, grids = (stored.get(name) for name in ("facts", "tokens", "grids"))

    def complaint(name: str, other: Any, value: Any) -> str:
        return (
            f"{index}: {name} is {other!r} in the file, expected {value!r}; features of something "
            f"else: {again}"
        )

    check_facts(found, facts, complaint)
    if _hash([found, tokens, grids]) != stored.get("sha256"):
        raise InputError(
            f"{index}: does not have the sha256 {stored.get('sha256')!r} that it states: the file "
            f"was edited; {again}"
        )
    dtype = getattr(torch, facts["dtype"])
    size = data.stat().st_size if data.exists() else 0
    expected = sum(tokens) * width * dtype.itemsize
    if size != expected:
        raise InputError(
            f"{data}: {size} bytes, expected {expected}; it was cut off or belongs to another "
            f"file: {again}"
        )

    # Read-only and shared: the system refuses a private or writable mapping that is larger than
    # memory.
    raw = np.memmap(data, mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tensor cannot be written, which is meant
        features = torch.from_numpy(raw).view(dtype).view(-1, width)  # (all tokens, d)
    pictures = []
    for part, grid in zip(features.split(tokens), grids, strict=True):
        pictures.append(ImageFeatures(part, None if grid is None else torch.tensor(grid)))
    return pictures


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
