"""A small folder in MMRec's form whose preferences can be learnt: users and items of two kinds,
told by both features.
"""

import numpy as np

USERS, ITEMS, KINDS, WIDTHS = 30, 24, 2, {"text_feat.npy": 6, "image_feat.npy": 5}


def make_pairs(seed=0):
    """(U x 8, 3) rows userID, itemID, x_label: each user has 8 of the 12 items of its kind, 6 to
    train, 1 valid, 1 test.
    """
    rng, rows = np.random.default_rng(seed), []
    for user in range(USERS):
        own = rng.permutation(np.arange(user % KINDS, ITEMS, KINDS))[:8]
        rows += [
            (user, int(item), label)
            for item, label in zip(own, (0, 0, 0, 0, 0, 0, 1, 2), strict=True)
        ]
    missing = set(range(ITEMS)) - {item for _, item, _ in rows}
    assert not missing, "another seed, please"
    return rows


def make_features(seed=0):
    """File name -> (I, d) float64: the kind, under noise."""
    rng = np.random.default_rng(seed)
    kind = np.arange(ITEMS)[:, None] % KINDS
    return {file: rng.normal(size=(ITEMS, width)) + 2 * kind for file, width in WIDTHS.items()}


def write_folder(folder, rows=None, features=None, header="userID\titemID\tx_label", end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        header, *("\t".join(map(str, row)) for row in (make_pairs() if rows is None else rows))
    ]
    (folder / "toy.inter").write_bytes((end.join(lines) + end).encode())
    for file, x in (make_features() if features is None else features).items():
        np.save(folder / file, x)
    return folder
