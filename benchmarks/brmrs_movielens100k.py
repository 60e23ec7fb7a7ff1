"""BR-MRS on real interactions: MovieLens-100K, settings chosen on validation, every row of the
ablation over several seeds.

    python benchmarks/brmrs_movielens100k.py RAW OUT [--seeds N]

RAW: a folder with RecBole's ml-100k.inter and ml-100k.item (in the wheel of PyPI's recbole 1.2.1,
recbole/dataset_example/ml-100k). Ratings of 4 and 5, the 5-core, each user's pairs split 80 / 10 /
10 at random. There are no posters: the "image" features are a STAND-IN made of genres and year; the
text features are hashed words and letters of the title. No model made either.

First each row's own settings are chosen by validation Recall@20 from GRID, with a seed that is not
used again, the controls' as carefully as the method's; then every row is trained with N seeds.
OUT/grid.json, OUT/ablation/results.json and table.md; the same command again goes on where it
stopped.
"""

import argparse
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanorec.base.command import run
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.files import write_json
from hanorec.datasets import recbole
from hanorec.datasets.lines import only_file
from hanorec.datasets.mmrec import RankingData, write_mmrec
from hanorec.studies.brmrs_ablation import ROWS, run_row, run_rows

CORE, LEAST_RATING = 5, 4
WIDTH = 1024  # of the hashed text features
SEED = 1  # of the grid
GRID_PATIENCE = 10  # the choice needs no last digit
HARD = [
    {"lambda_h": 0.3, "pool": 2}, {"lambda_h": 0.3, "pool": 8},
    {"lambda_h": 1.0, "pool": 2}, {"lambda_h": 1.0, "pool": 8},
]
SYNERGY = [
    {"lambda_s": 0.3, "theta": 0.1}, {"lambda_s": 0.3, "theta": 1.0},
    {"lambda_s": 1.0, "theta": 0.1}, {"lambda_s": 1.0, "theta": 1.0},
]
GRID: dict[str, list[dict[str, Any]]] = {  # row -> candidates; what BPR chooses holds for all rows
    "BPR": [{"weight_decay": decay} for decay in (1e-4, 1e-3, 1e-2)],
    "BPR, hard by s_f": [{"pool": pool} for pool in (2, 4, 8)],
    "BPR + unimodal BPR": [{"unimodal_bpr": weight} for weight in (0.3, 1.0)],
    "BPR + same-modal hard": HARD,
    "BPR + random routing": [{"lambda_h": weight} for weight in (0.3, 1.0)],
    "BPR + CHNS": HARD,
    "BPR + Syn": SYNERGY,
    "BPR + Syn, detached": SYNERGY,
}
JOINT = {  # take what these rows chose
    "full": ("BPR + CHNS", "BPR + Syn"),
    "full, same-modal hard": ("BPR + same-modal hard", "BPR + Syn"),
    "full, random routing": ("BPR + random routing", "BPR + Syn"),
    "full, without BPR": ("BPR + CHNS", "BPR + Syn"),
}


def five_core(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Positions of the pairs that are left when users and items with fewer than 5 pairs go, until
    none has.
    """
    kept = np.arange(len(user))
    while True:
        rich = (np.bincount(user[kept])[user[kept]] >= CORE) & (
            np.bincount(item[kept])[item[kept]] >= CORE
        )
        if rich.all():
            return kept
        kept = kept[rich]


def title_features(titles: list[str]) -> np.ndarray:
    """(I, WIDTH): TF-IDF of the title's words and character trigrams, hashed into WIDTH places,
    rows of length 1. No model.
    """
    counts = np.zeros((len(titles), WIDTH))
    for row, title in enumerate(titles):
        terms = Counter()
        for word in title.lower().split():
            terms[f"w {word}"] += 1
            padded = f" {word} "
            terms.update(f"g {padded[k : k + 3]}" for k in range(len(word)))
        for term, n in terms.items():
            counts[row, zlib.crc32(term.encode()) % WIDTH] += n
    weight = np.log((1 + len(titles)) / (1 + (counts > 0).sum(0))) + 1
    x = np.log1p(counts) * weight
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def genre_year_features(genres: list[list[str]], years: list[int]) -> np.ndarray:
    """(I, 19 + 15): the STAND-IN FOR IMAGES. Genres as flags of length 1, and the year as 15
    overlapping bumps of length 1.
    """
    names = sorted(set().union(*genres))
    flags = np.zeros((len(genres), len(names)))
    for row, of_item in enumerate(genres):
        flags[row] = [name in of_item for name in names]
    centres = np.linspace(1925, 1998, 15)
    bumps = np.exp(-(((np.array(years)[:, None] - centres) / 5) ** 2))
    flags /= np.linalg.norm(flags, axis=1, keepdims=True)
    bumps /= np.linalg.norm(bumps, axis=1, keepdims=True)
    return np.concatenate([flags, bumps], 1)

def make_data(raw: Path) -> RankingData:
    """Ratings of 4 and 5, the 5-core, each user's pairs split 80 / 10 / 10 at random (seed 0)."""
    inter, items = only_file(raw, "*.inter"), only_file(raw, "*.item")
    log = recbole.read_interactions(inter, "user_id", "item_id", "timestamp", "rating")
    titles, genres = recbole.read_items(items, "item_id", "movie_title", "class")
    names, rows = recbole.read_rows(items)
    year = {
        fields[names.index("item_id")]: fields[names.index("release_year")] for _, fields in rows
    }
    user, item = np.asarray(log.user), np.asarray(log.item)
    kept = np.flatnonzero(np.asarray(log.rating) >= LEAST_RATING)
    kept = kept[five_core(user[kept], item[kept])]
    codes, user = np.unique(user[kept], return_inverse=True)
    item_codes, item = np.unique(item[kept], return_inverse=True)
    ids = [list(log.items)[code] for code in item_codes]

    rng, splits = np.random.default_rng(0), {"train": [], "valid": [], "test": []}
    for u in range(len(codes)):
        own = rng.permutation(np.flatnonzero(user == u))
        tenth = max(1, round(len(own) / 10))
        parts = np.split(own, [tenth, 2 * tenth])
        for split, part in zip(("test", "valid", "train"), parts, strict=True):
            splits[split].append(part)
    both, pairs = np.stack([user, item]), {}
    for split, parts in splits.items():
        pairs[split] = torch.from_numpy(both[:, np.concatenate(parts)])
    known = [int(year[i]) for i in ids if year[i].isdigit()]
    years = [int(year[i]) if year[i].isdigit() else round(np.mean(known)) for i in ids]
    features = {
        "t": title_features([titles[i] for i in ids]),
        "v": genre_year_features([genres[i] for i in ids], years),
    }
    return RankingData(
        "ml-100k", tuple(list(log.users)[code] for code in codes), tuple(ids), **pairs,
        features={m: torch.from_numpy(x).float() for m, x in features.items()},
    )


def choose(
    out: Path, files: BrmrsFiles, base: BrmrsConfig
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Row -> its settings, by validation Recall@20 of one seed, never rounded; and all that was
    tried.
    """
    chosen: dict[str, dict[str, Any]] = {}
    tried = []
    for row, candidates in GRID.items():
        for candidate in candidates:
            config = replace(base, **{**chosen.get("BPR", {}), **ROWS[row], **candidate})
            name = "-".join(f"{key}={value}" for key, value in candidate.items())
            print(f"\n{row}: {name}")
            result = run_row(out / "grid" / row / name, files, config)
            tried.append({
                "row": row, "settings": candidate, "valid_Recall@20": result["valid"]["Recall@20"],
                "epoch": result["best_epoch"],
            })
        own = [one for one in tried if one["row"] == row]
        best = max(own, key=lambda one: one["valid_Recall@20"])
        chosen[row] = {**chosen.get("BPR", {}), **best["settings"]}
    for row, parts in JOINT.items():
        chosen[row] = {}
        for part in parts:
            chosen[row] |= chosen[part]
    return chosen, tried


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--epochs", type=int, default=BrmrsConfig().epochs, help="fewer for a trial"
    )
    args = parser.parse_args()
    cpu = time.process_time()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "data").exists():
        write_mmrec(args.out / "data", make_data(args.raw))
    files = BrmrsFiles(data=str(args.out / "data"), out="", device="cpu")
    config = BrmrsConfig(epochs=args.epochs)
    chosen, tried = choose(args.out, files, replace(config, seed=SEED, patience=GRID_PATIENCE))
    write_json(
        args.out / "grid.json",
        {"chosen": chosen, "tried": tried, "cpu_seconds": time.process_time() - cpu},
    )
    rows = {name: replace(config, **{**changes, **chosen[name]}) for name, changes in ROWS.items()}
    run_rows(args.out / "ablation", files, rows, range(config.seed, config.seed + args.seeds))
    print(f"{time.process_time() - cpu:.0f} CPU seconds in this call")


if __name__ == "__main__":
    run(main)
