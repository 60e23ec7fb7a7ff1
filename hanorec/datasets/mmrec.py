r"""A folder as users of the MMRec toolbox have it, read unchanged: pairs and item features for BR-MRS.

    NAME.inter                        tab-separated, with a header; the columns userID, itemID and x_label are found by name, others not read
    text_feat.npy, image_feat.npy     (items, d_m) numbers, row = itemID; one of the two may be missing
    names.json                        optional, ours: {"users": [...], "items": [...]}, the name behind each id

Ids count from 0 without a gap (with names.json: up to its length); x_label is 0 (train), 1 (valid) or 2 (test).
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanorec.base.errors import InputError
from hanorec.base.files import read_object, write_json
from hanorec.datasets.lines import BOM, only_file

COLUMNS = ("userID", "itemID", "x_label")
SPLITS = ("train", "valid", "test")  # of x_label 0, 1, 2
FEATURES = {"t": "text_feat.npy", "v": "image_feat.npy"}
LONGEST = 18  # digits that fit into int64


@dataclass(frozen=True)
class RankingData:
    """U users, I items. A pair is a column: user ids above, item ids below; no pair stands in two splits."""

    name: str
    users: tuple[str, ...]  # the name of each id
    items: tuple[str, ...]
    train: Tensor  # (2, E) int64
    valid: Tensor  # (2, T) int64
    test: Tensor
    features: dict[str, Tensor]  # "t" text, "v" image -> (I, d_m) float32

    def sha256(self) -> str:
        """Of everything that a run depends on."""
        digest = hashlib.sha256(json.dumps([self.users, self.items]).encode())
        for tensor in (self.train, self.valid, self.test, *(self.features[m] for m in sorted(self.features))):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


def read_mmrec(folder: Path) -> RankingData:
    """The folder's pairs and features, checked."""
    path = only_file(folder, "*.inter")
    table = read_columns(path, COLUMNS)
    users, items, label = table  # (E,) each

    def complain(place: int, what: str) -> None:
        raise InputError(f"{path}:{place + 2}: userID {users[place]}, itemID {items[place]}, x_label {label[place]}: {what}")

    if (label > 2).any():
        complain(int((label > 2).argmax()), "expected x_label 0 (train), 1 (valid) or 2 (test); split the interactions into these")
    for code, split in enumerate(SPLITS):
        if not (label == code).any():
            raise InputError(f"{path}: no line with x_label {code} ({split}), expected some; split the interactions again")
    names = read_names(folder / "names.json")
    sizes = {}
    for column, kind, ids in (("userID", "users", users), ("itemID", "items", items)):
        sizes[kind] = len(names.get(kind, range(min(ids.max() + 1, len(ids)))))
        if kind in names and (ids >= sizes[kind]).any():
            complain(int(ids.argmax()), f"names.json names {sizes[kind]} {kind}, expected a {column} below that; mend either file")
        present = np.bincount(ids[ids < sizes[kind]], minlength=sizes[kind] + 1) > 0  # its last entry is False
        if kind not in names and int(present.argmin()) <= ids.max():
            complain(int(ids.argmax()), f"no line has {column} {present.argmin()}, expected every id from 0 to the largest, {ids.max()}; number the "
                     f"{kind} anew from 0 without a gap, and order the rows of the features the same way")
    _, first, place = np.unique(users * sizes["items"] + items, return_index=True, return_inverse=True)
    if len(first) < len(users):
        twin = int((first[place] != np.arange(len(users))).argmax())
        complain(twin, f"line {first[place[twin]] + 2} has this pair with x_label {label[first[place[twin]]]}, expected each pair once; remove one")
    pairs = {split: torch.from_numpy(table[:2, label == code]) for code, split in enumerate(SPLITS)}
    features = {m: read_features(folder / file, sizes["items"]) for m, file in FEATURES.items() if (folder / file).exists()}
    named = {kind: tuple(names.get(kind) or map(str, range(size))) for kind, size in sizes.items()}
    return RankingData(path.stem, **named, **pairs, features=features)


def read_names(path: Path) -> dict[str, list[str]]:
    """The names of users and items, or {} where there is no such file."""
    names = read_object(path) if path.exists() else {}
    for kind in ("users", "items") if names else ():
        if not isinstance(names.get(kind), list) or not all(isinstance(name, str) for name in names[kind]):
            raise InputError(f"{path}: {kind} is not a list of texts, expected {{\"users\": [...], \"items\": [...]}}, a name for each id; mend or remove it")
    return names


def read_columns(path: Path, names: Sequence[str]) -> np.ndarray:
    r"""Columns of a tab-separated file, each of whole numbers from 0: (len(names), lines) int64; position p stands on line p + 2.

    The bytes are parsed as arrays, a digit of a whole column at a time, since an object a line would take minutes and gigabytes.
    """
    try:
        raw = path.read_bytes().removeprefix(BOM).replace(b"\r\n", b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    raw += b"" if raw.endswith(b"\n") else b"\n"
    header = raw.partition(b"\n")[0].decode("utf-8", "replace").split("\t")
    for name in names:
        if header.count(name) != 1:
            raise InputError(f"{path}:1: {header.count(name)} columns {name} in the header {header}, expected one, tabs between columns; mend the header")
    data = np.frombuffer(raw, np.uint8)
    stops = np.flatnonzero((data == ord("\t")) | (data == ord("\n")))  # where each field ends
    fields = np.diff(np.flatnonzero(data[stops] == ord("\n")), prepend=-1)  # (1 + lines,) of each line
    if (fields != len(header)).any():
        line = int((fields != len(header)).argmax())
        raise InputError(f"{path}:{line + 1}: {fields[line]} fields, expected {len(header)} ({', '.join(header)}); mend or remove the line")
    starts = np.append(0, stops[:-1] + 1).reshape(-1, len(header))[1:]  # (lines, columns)
    stops = stops.reshape(-1, len(header))[1:]
    table = np.zeros((len(names), len(starts)), np.int64)
    for row, name in enumerate(names):
        at = header.index(name)
        start, length = starts[:, at], stops[:, at] - starts[:, at]
        wrong = (length < 1) | (length > LONGEST)
        for k in range(min(LONGEST, length.max(initial=0))):
            digit = data[np.minimum(start + k, len(data) - 1)] - np.uint8(ord("0"))  # other characters wrap to above 9
            inside = k < length
            wrong |= inside & (digit > 9)
            table[row] = np.where(inside, 10 * table[row] + digit, table[row])
        if wrong.any():
            line = int(wrong.argmax())
            value = raw[start[line] : start[line] + min(length[line], 40)].decode("utf-8", "replace")
            raise InputError(f"{path}:{line + 2}: {name} {value!r}, expected a whole number from 0; mend the line or number the ids anew")
    return table


def read_features(path: Path, n_items: int) -> Tensor:
    """The features of all items, (I, d_m) float32, mapped from the file and cast; nothing in the file is ever executed."""
    remedy = "remake it from the same item list, a row an itemID, and save it with numpy.save"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not an array of numbers ({str(error).splitlines()[0]}), expected an .npy file without Python objects; {remedy}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        what = f"shape {array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else "an archive of several arrays"
        raise InputError(f"{path}: {what}, expected numbers of shape ({n_items}, d); {remedy}")
    if len(array) != n_items or not array.shape[1]:
        raise InputError(f"{path}: shape {array.shape}, expected ({n_items}, d), a row for each of the {n_items} items; {remedy}")
    with np.errstate(over="ignore"):
        features = np.array(array, np.float32)  # (I, d_m)
    finite = np.isfinite(features)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise InputError(f"{path}: row {row}, column {column} is {array[row, column]}, expected a finite number of float32; {remedy}")
    return torch.from_numpy(features)


def write_mmrec(folder: Path, data: RankingData) -> None:
    """The folder that `read_mmrec` reads; whole or absent."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.tmp-"))
    try:
        table = [torch.cat([getattr(data, split), torch.full_like(getattr(data, split)[:1], code)]) for code, split in enumerate(SPLITS)]
        np.savetxt(temporary / f"{data.name}.inter", torch.cat(table, 1).T.numpy(), "%d", "\t", header="\t".join(COLUMNS), comments="")
        for m, x in data.features.items():
            np.save(temporary / FEATURES[m], x.numpy(), allow_pickle=False)
        write_json(temporary / "names.json", {"users": data.users, "items": data.items})
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
