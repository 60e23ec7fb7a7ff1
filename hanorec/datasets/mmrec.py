r"""A folder as users of the MMRec toolbox have it, read unchanged: pairs and features for BR-MRS.

    NAME.inter          tab-separated, with a header; the columns userID, itemID and x_label are
                        found by name, others not read
    text_feat.npy       (items, d_m) numbers, row = itemID; one of the two may be missing
    image_feat.npy
    names.json          optional, ours: {"users": [...], "items": [...]}, the name behind each id

Ids count from 0 without a gap (with names.json: up to its length); x_label is 0 (train), 1 (valid)
or 2 (test).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanorec.base.errors import InputError
from hanorec.base.files import read_object, whole_folder, write_json
from hanorec.datasets.columns import read_columns
from hanorec.datasets.lines import only_file

COLUMNS = ("userID", "itemID", "x_label")
KINDS = ("users", "items")  # what the first two columns number
SPLITS = ("train", "valid", "test")  # of x_label 0, 1, 2
FEATURES = {"t": "text_feat.npy", "v": "image_feat.npy"}


@dataclass(frozen=True)
class RankingData:
    """U users, I items.

    A pair is a column: user ids above, item ids below; no pair stands in two splits.
    """

    name: str
    users: tuple[str, ...]  # the name of each id
    items: tuple[str, ...]
    train: Tensor  # (2, E) int64
    valid: Tensor  # (2, T) int64
    test: Tensor
    features: dict[str, Tensor]  # "t" text, "v" image -> (I, d_m) float32

    def __repr__(self) -> str:
        size = f"{len(self.users)} users, {len(self.items)} items, {self.train.shape[1]} pairs"
        return f"<RankingData {self.name}: {size}>"

    def sha256(self) -> str:
        """Of everything that a run depends on."""
        digest = hashlib.sha256(json.dumps([self.users, self.items]).encode())
        features = [self.features[m] for m in sorted(self.features)]
        for tensor in (self.train, self.valid, self.test, *features):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


def read_mmrec(folder: Path) -> RankingData:
    """The folder's pairs and features, checked."""
    path = only_file(folder, "*.inter")
    table = read_columns(path, COLUMNS)  # (3, E) int64: users, items, labels
    _check_labels(path, table)

    names = read_names(folder / "names.json")
    sizes = [_count(path, table, row, names.get(kind)) for row, kind in enumerate(KINDS)]
    _check_each_once(path, table, sizes[1])

    pairs = {}
    for code, split in enumerate(SPLITS):
        pairs[split] = torch.from_numpy(table[:2, table[2] == code])
    features = {}
    for m, file in FEATURES.items():
        if (folder / file).exists():
            features[m] = read_features(folder / file, sizes[1])
    named = {}
    for kind, size in zip(KINDS, sizes, strict=True):
        named[kind] = tuple(names.get(kind) or map(str, range(size)))
    return RankingData(path.stem, **named, **pairs, features=features)


def _complain(path: Path, table: np.ndarray, place: int, what: str) -> None:
    """InputError that names the line and the values at position `place`."""
    user, item, label = table[:, place]
    raise InputError(
        f"{path}:{place + 2}: userID {user}, itemID {item}, x_label {label}: {what}"
    )


def _check_labels(path: Path, table: np.ndarray) -> None:
    """Every label is that of a split, and every split has a pair."""
    label = table[2]
    if (label > 2).any():
        what = (
            "expected x_label 0 (train), 1 (valid) or 2 (test); "
            "split the interactions into these"
        )
        _complain(path, table, (label > 2).argmax(), what)
    for code, split in enumerate(SPLITS):
        if not (label == code).any():
            raise InputError(
                f"{path}: no line with x_label {code} ({split}), "
                f"expected some; split the interactions again"
            )


def _count(path: Path, table: np.ndarray, row: int, names: list[str] | None) -> int:
    """How many users (row 0) or items (row 1) there are.

    It is the number of their names, which the ids must stay below; without names, it is the largest
    id and one, and no id below that may be missing.
    """
    kind, column, ids = KINDS[row], COLUMNS[row], table[row]
    if names is not None:
        size = len(names)
        if (ids >= size).any():
            what = (
                f"names.json names {size} {kind}, "
                f"expected a {column} below that; mend either file"
            )
            _complain(path, table, ids.argmax(), what)
        return size

    size = int(min(ids.max() + 1, len(ids)))  # an id of 18 digits must not cost memory
    present = np.bincount(ids[ids < size], minlength=size + 1) > 0  # its last entry is False
    missing = int(present.argmin())
    if missing <= ids.max():
        what = (
            f"no line has {column} {missing}, "
            f"expected every id from 0 to the largest, {ids.max()}; number the {kind} anew "
            f"from 0 without a gap, and order the rows of the features the same way"
        )
        _complain(path, table, ids.argmax(), what)
    return size


def _check_each_once(path: Path, table: np.ndarray, n_items: int) -> None:
    users, items, label = table
    _, first, place = np.unique(users * n_items + items, return_index=True, return_inverse=True)
    if len(first) == len(users):
        return
    twin = (first[place] != np.arange(len(users))).argmax()
    other = first[place[twin]]
    what = (
        f"line {other + 2} has this pair with x_label {label[other]}, "
        f"expected each pair once; remove one"
    )
    _complain(path, table, twin, what)


def read_names(path: Path) -> dict[str, list[str]]:
    """The names of users and items, or {} where there is no such file."""
    names = read_object(path) if path.exists() else {}
    for kind in KINDS if names else ():
        listed = names.get(kind)
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise InputError(
                f"{path}: {kind} is not a list of texts, "
                f'expected {{"users": [...], "items": [...]}}, a name for each id; '
                f"mend or remove it"
            )
    return names


def read_features(path: Path, n_items: int) -> Tensor:
    """The features of all items, (I, d_m) float32, mapped from the file and cast.

    Nothing in the file is ever executed.
    """
    remedy = "remake it from the same item list, a row an itemID, and save it with numpy.save"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path}: not an array of numbers ({str(error).splitlines()[0]}), "
            f"expected an .npy file without Python objects; {remedy}"
        ) from None
    if not isinstance(array, np.ndarray):
        what = "an archive of several arrays"
    elif array.ndim != 2 or array.dtype.kind not in "fiu":
        what = f"shape {array.shape} of {array.dtype}"
    else:
        what = None
    if what:
        raise InputError(f"{path}: {what}, expected numbers of shape ({n_items}, d); {remedy}")
    if len(array) != n_items or not array.shape[1]:
        raise InputError(
            f"{path}: shape {array.shape}, expected ({n_items}, d), "
            f"a row for each of the {n_items} items; {remedy}"
        )
    with np.errstate(over="ignore"):
        features = np.array(array, np.float32)  # (I, d_m)
    finite = np.isfinite(features)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise InputError(
            f"{path}: row {row}, column {column} is {array[row, column]}, "
            f"expected a finite number of float32; {remedy}"
        )
    return torch.from_numpy(features)


def write_mmrec(folder: Path, data: RankingData) -> None:
    """The folder that `read_mmrec` reads; whole or absent."""
    with whole_folder(folder) as hidden:
        parts = []
        for code, split in enumerate(SPLITS):
            pairs = getattr(data, split)
            parts.append(torch.cat([pairs, torch.full_like(pairs[:1], code)]))
        table = torch.cat(parts, 1).T.numpy()  # (pairs, 3)
        header = "\t".join(COLUMNS)
        np.savetxt(hidden / f"{data.name}.inter", table, "%d", "\t", header=header, comments="")
        for m, x in data.features.items():
            np.save(hidden / FEATURES[m], x.numpy(), allow_pickle=False)
        write_json(hidden / "names.json", {"users": data.users, "items": data.items})
