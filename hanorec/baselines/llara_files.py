"""LLaRA's two files: the item table that it is given, and the projector that it learns."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from hanorec.base.errors import InputError
from hanorec.base.files import read_object, write_bytes
from hanorec.baselines.llara import Projector
from hanorec.datasets.catalog import Catalog

PROJECTOR = "projector.safetensors"


def load_table(folder: str | Path, catalog: Catalog) -> Tensor:
    """m (N, d), a row an item, of the files that `hanorec.ranking.retriever` reads, too.

    InputError where they are missing or broken, or rank other items than those of the catalogue.
    """
    path, names = Path(folder) / "embeddings.safetensors", Path(folder) / "names.json"
    wanted = "expected the folder of a SASRec row's vectors, for LLaRA's item table"
    try:
        items = read_object(names).get("items")
        with safe_open(path, "pt") as file:
            m = file.get_tensor("item")
    except InputError as error:
        raise InputError(f"{error}, {wanted}") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}), {wanted}; check the path") from None
    if items != list(catalog.ids):
        count = len(items) if isinstance(items, list) else "no"
        raise InputError(
            f"{names}: lists {count} items, {catalog.directory} has {len(catalog.ids)} or others, "
            "expected the same in the same order; train the SASRec row on this data"
        )
    if m.ndim != 2 or len(m) != len(items) or not m.is_floating_point():
        raise InputError(
            f"{path}: item is {m.dtype} {tuple(m.shape)}, expected floats of shape "
            f"({len(items)}, d); train the SASRec row again"
        )
    broken = ~m.isfinite().all(1)  # (N,)
    if broken.any():
        first = items[int(broken.nonzero()[0])]
        raise InputError(
            f"{path}: NaN or infinity in the vectors of {int(broken.sum())} items, first that of "
            f"item {first!r}, expected finite numbers; train the SASRec row again, with a lower "
            "learning rate"
        )
    return m


def table_sha256(m: Tensor) -> str:
    """Of a table's numbers and shape."""
    digest = hashlib.sha256(f"{m.dtype} {tuple(m.shape)} ".encode())
    digest.update(m.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_projector(folder: Path, projector: Projector) -> str:
    """Write the projector beside the adapter. Returns the file's SHA-256, for hanorec.json."""
    tensors = {name: w.detach().cpu().contiguous() for name, w in projector.state_dict().items()}
    data = save(tensors)
    write_bytes(folder / PROJECTOR, data)
    return hashlib.sha256(data).hexdigest()


def load_projector(folder: str | Path, m: Tensor) -> Projector:
    """The projector of a finished run, for the table m that it was trained on.

    InputError where there is none, the file was altered, or the table is another one.
    """
    folder = Path(folder)
    path = folder / PROJECTOR
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}), expected the folder of a finished LLaRA "
            "run; check the path, or train it to its end"
        ) from None
    facts = read_object(folder / "hanorec.json")
    if facts.get("projector_sha256") != hashlib.sha256(data).hexdigest():
        raise InputError(
            f"{path}: its hash differs from the one in hanorec.json, expected an unaltered file; "
            "put it back, or train LLaRA again"
        )
    if facts.get("table_sha256") != table_sha256(m):
        raise InputError(
            f"{path}: was trained with another item table than this one of shape "
            f"{tuple(m.shape)}, expected the same numbers; give that one, or train LLaRA on this"
        )
    weights = load(data)
    width, d = weights["W1"].shape
    projector = Projector(d, width)
    projector.load_state_dict(weights)
    return projector
