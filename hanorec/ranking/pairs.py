r"""--data of BR-MRS, in either layout, as pairs and item features, with all that is left out said aloud.

In a native folder the features are what a checkpoint knows of the items: H of the title, X of the image (HN-1).
"""

from dataclasses import replace
from pathlib import Path

import torch

from hanorec.base.config_brmrs import BrmrsFiles
from hanorec.base.distributed import all_reduce
from hanorec.base.errors import InputError
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import load_interactions
from hanorec.datasets.mmrec import FEATURES, SPLITS, RankingData, read_mmrec
from hanorec.hars import mean_pool
from hanorec.mllm.items import encode, item_embeddings, own_rows
from hanorec.mllm.load import load_backbone


def load_ranking_data(files: BrmrsFiles) -> RankingData:
    """Read --data, whichever of the two layouts it has. InputError names file, line and value. Prints what was left out."""
    folder = Path(files.data)
    native = (folder / "train.tsv").exists()
    if native and list(folder.glob("*.inter")):
        raise InputError(f"{folder}: holds train.tsv and a file *.inter, expected one of the two layouts; move the other")
    if native:
        data = read_native(files)
    elif files.model is not None:
        raise InputError(f"--model {files.model}: {folder} has no train.tsv, so it is not in the native layout, and its features come from "
                         f"{' and '.join(FEATURES.values())}; leave --model out")
    else:
        data = read_mmrec(folder)
    parts = {split: getattr(data, split) for split in SPLITS}
    degree = torch.bincount(data.train[0], minlength=len(data.users))  # (U,)
    if (full := (degree == len(data.items)).nonzero()).numel():
        raise InputError(f"{folder}: user {data.users[int(full[0])]!r} has all {len(data.items)} items as training pairs, expected at least one that "
                         "can be a negative; leave that user out")
    for split in SPLITS[1:]:
        kept = degree[parts[split][0]] > 0
        if not kept.all():
            print(f"note: {int((~kept).sum())} of {len(kept)} pairs of the {split} split are left out: their user has no training pair")
            parts[split] = parts[split][:, kept]
    for split, pairs in parts.items():
        if not pairs.shape[1]:
            raise InputError(f"{folder}: no pairs in the {split} split, expected at least one of a user with training pairs; "
                             "split the interactions again")
    sizes = ", ".join(f"{pairs.shape[1]} {split}" for split, pairs in parts.items())
    widths = ", ".join(f"{FEATURES[m].split('_')[0]} {x.shape[1]}" for m, x in data.features.items()) or "none"
    print(f"{data.name}: {len(data.users)} users, {len(data.items)} items, pairs: {sizes}; feature widths: {widths}")
    return replace(data, **parts)


def read_native(files: BrmrsFiles) -> RankingData:
    """A native folder's pairs, each once, with H and X of the checkpoint --model as features.

    A held-out item that its user had before is masked in the ranking, so it is left out. An item without an image gets the mean X.
    """
    if files.model is None:
        raise InputError(f"{files.data} is in the native layout, whose item features come from a checkpoint, but there is no --model; add one")
    catalog = load_catalog(files.data)
    interactions = load_interactions(files.data, catalog)
    user_row = {user: row for row, user in enumerate(interactions.train)}
    seen: set[tuple[int, int]] = set()
    pairs = {}
    for split, sequences in zip(SPLITS, (interactions.train, interactions.val, interactions.test), strict=True):
        every = [(user_row[user], item) for user, items in sequences.items() for item in items]
        new = [pair for pair in dict.fromkeys(every) if pair not in seen]
        if len(new) < len(every):
            print(f"note: {len(every) - len(new)} of {len(every)} pairs of the {split} split are left out: the user had the item before")
        seen.update(new)
        pairs[split] = torch.tensor(new, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    backbone = load_backbone(files.model, files.dtype, files.device, files.max_pixels)
    H, X, _ = item_embeddings(backbone, catalog, {})
    has_image = torch.tensor([path is not None for path in catalog.images])
    for row, picture in encode(backbone, catalog, own_rows(has_image.nonzero()[:, 0].tolist())):
        X[row] = mean_pool(picture.features)
    all_reduce([X])  # each row is zero on all ranks but one
    features = {"t": H, "v": X}
    if not has_image.any():
        print("note: no item has an image, so there are no image features")
        del features["v"]
    elif not has_image.all():
        X[~has_image] = X[has_image].mean(0)
        print(f"note: {int((~has_image).sum())} of {len(has_image)} items have no image; their image features are the mean of the others")
    return RankingData(catalog.name, tuple(interactions.train), catalog.ids, **pairs, features=features)
