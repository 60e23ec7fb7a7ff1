r"""`--data` of BR-MRS, in either layout, as pairs and item features.

What is left out is said aloud. In a native folder the features are what a checkpoint knows of the
items: H of the title, X of the image (HN-1).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hanorec.base.config_brmrs import BrmrsFiles
from hanorec.base.distributed import all_reduce, rank, run_on_all_ranks
from hanorec.base.errors import InputError
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.interactions import Interactions, load_interactions, without_last
from hanorec.datasets.mmrec import FEATURES, SPLITS, RankingData, read_mmrec, write_mmrec
from hanorec.hars import mean_pool
from hanorec.mllm.items import encode, item_embeddings, own_rows
from hanorec.mllm.load import load_backbone

KEPT = "data"  # in OUT: a native folder's pairs and features, as they were when the run began


def run_data(files: BrmrsFiles, out: Path) -> RankingData:
    """The data of a run: what it kept when it began, else `load_ranking_data`."""
    if run_on_all_ranks((out / KEPT).exists)[0]:  # as rank 0 sees it
        return read_mmrec(out / KEPT)
    return load_ranking_data(files)


def keep_data(files: BrmrsFiles, out: Path, data: RankingData) -> None:
    """Keep a native folder's pairs and features in `out`, if that is not done yet.

    So the features are computed once, and a run that goes on has the data that it began with.
    """
    if files.model is not None and rank() == 0 and not (out / KEPT).exists():
        write_mmrec(out / KEPT, data)


def load_ranking_data(files: BrmrsFiles) -> RankingData:
    """Read `--data`, whichever of the two layouts it has, and print what was left out.

    Raises:
        InputError: it names file, line and value.
    """
    data = _read_either(files)
    _refuse_full_users(files.data, data)
    data = _without_strangers(data)
    for split in SPLITS:
        if not getattr(data, split).shape[1]:
            raise InputError(
                f"{Path(files.data)}: no pairs in the {split} split, expected at least one of a "
                "user with training pairs; split the interactions again"
            )
    _print_sizes(data)
    return data


def _read_either(files: BrmrsFiles) -> RankingData:
    folder = Path(files.data)
    native = (folder / "train.tsv").exists()
    if native and list(folder.glob("*.inter")):
        raise InputError(
            f"{folder}: holds train.tsv and a file *.inter, expected one of the two layouts; "
            "move the other"
        )
    if native:
        return read_native(files)
    if files.model is not None:
        raise InputError(
            f"--model {files.model}: {folder} has no train.tsv, so it is not in the native layout, "
            f"and its features come from {' and '.join(FEATURES.values())}; leave --model out"
        )
    if files.hold_out:
        raise InputError(
            f"--hold-out {files.hold_out}: {folder} has no train.tsv, so it does not say in which "
            "order a user had the items, expected the native layout; leave --hold-out out"
        )
    return read_mmrec(folder)


def _degrees(data: RankingData) -> Tensor:
    """How many training pairs each user has: (U,)."""
    return torch.bincount(data.train[0], minlength=len(data.users))


def _refuse_full_users(folder: str, data: RankingData) -> None:
    full = (_degrees(data) == len(data.items)).nonzero()
    if len(full):
        raise InputError(
            f"{Path(folder)}: user {data.users[int(full[0])]!r} has all {len(data.items)} items as "
            "training pairs, expected at least one that can be a negative; leave that user out"
        )


def _without_strangers(data: RankingData) -> RankingData:
    """The data without held-out pairs of users who have no training pair."""
    degree, parts = _degrees(data), {}
    for split in SPLITS[1:]:
        pairs = getattr(data, split)  # (2, T)
        kept = degree[pairs[0]] > 0  # (T,)
        if not kept.all():
            print(
                f"note: {int((~kept).sum())} of {len(kept)} pairs of the {split} split are left "
                "out: their user has no training pair"
            )
            parts[split] = pairs[:, kept]
    return replace(data, **parts)


def _print_sizes(data: RankingData) -> None:
    sizes = ", ".join(f"{getattr(data, split).shape[1]} {split}" for split in SPLITS)
    widths = [f"{FEATURES[m].split('_')[0]} {x.shape[1]}" for m, x in data.features.items()]
    print(
        f"{data.name}: {len(data.users)} users, {len(data.items)} items, pairs: {sizes}; "
        f"feature widths: {', '.join(widths) or 'none'}"
    )


def read_native(files: BrmrsFiles) -> RankingData:
    """A native folder's pairs, each once, with what the checkpoint `--model` knows of the items."""
    if files.model is None:
        raise InputError(
            f"{files.data} is in the native layout, whose item features come from a checkpoint, "
            "but there is no --model; add one"
        )
    catalog = load_catalog(files.data)
    interactions = load_interactions(files.data, catalog)
    pairs = _native_pairs(interactions)
    if files.hold_out:
        cut = without_last(interactions, files.hold_out)
        pairs["train"] = _columns(_pairs(cut.train, interactions))
    features = _native_features(files, catalog)
    users = tuple(interactions.train)
    return RankingData(catalog.name, users, catalog.ids, **pairs, features=features)


def _native_pairs(interactions: Interactions) -> dict[str, Tensor]:
    """Split -> (2, E) pairs, each in the first split that has it.

    A held-out item that its user had before is masked in the ranking, so it is left out.
    """
    sequences = (interactions.train, interactions.val, interactions.test)
    seen: set[tuple[int, int]] = set()
    pairs = {}
    for split, of_split in zip(SPLITS, sequences, strict=True):
        every = _pairs(of_split, interactions)
        new = [pair for pair in dict.fromkeys(every) if pair not in seen]
        if len(new) < len(every):
            print(
                f"note: {len(every) - len(new)} of {len(every)} pairs of the {split} split are "
                "left out: the user had the item before"
            )
        seen.update(new)
        pairs[split] = _columns(new)
    return pairs


def _pairs(
    of_split: Mapping[str, Sequence[int]], interactions: Interactions
) -> list[tuple[int, int]]:
    """User and item of every interaction."""
    user_row = {user: row for row, user in enumerate(interactions.train)}
    every = []
    for user, items in of_split.items():
        every += [(user_row[user], item) for item in items]
    return every


def _columns(pairs: Iterable[tuple[int, int]]) -> Tensor:
    """(2, E) of the pairs, each once."""
    once = list(dict.fromkeys(pairs))
    return torch.tensor(once, dtype=torch.int64).reshape(-1, 2).T.contiguous()


def _native_features(files: BrmrsFiles, catalog: Catalog) -> dict[str, Tensor]:
    """H and X of the checkpoint, (I, d) each; an item without an image gets the mean X."""
    backbone = load_backbone(files.model, files.dtype, files.device, files.max_pixels)
    H, X, _ = item_embeddings(backbone, catalog, {})  # without pictures, so X is zero so far
    has_image = torch.tensor([path is not None for path in catalog.images])  # (I,)
    pictured = has_image.nonzero()[:, 0].tolist()
    for row, picture in encode(backbone, catalog, own_rows(pictured)):
        X[row] = mean_pool(picture.features)
    all_reduce([X])  # each row is zero on all ranks but one
    if not has_image.any():
        print("note: no item has an image, so there are no image features")
        return {"t": H}
    if not has_image.all():
        X[~has_image] = X[has_image].mean(0)
        print(
            f"note: {int((~has_image).sum())} of {len(has_image)} items have no image; their image "
            "features are the mean of the others"
        )
    return {"t": H, "v": X}
