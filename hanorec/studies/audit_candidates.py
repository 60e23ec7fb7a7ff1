"""Parts of `hanorec.studies.audit` about candidates: equal titles, and chance (entries 8, 9)."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hanorec.base.config import DataConfig
from hanorec.datasets.candidates import draw_candidates, near_count
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import heldout_examples, load_interactions
from hanorec.mllm.items import neighbors
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_pictures
from hanorec.studies import stages
from hanorec.studies.audit_run import SEED, table


def part_titles(folders: Sequence[str]) -> None:
    """Draws that do not look at titles, unlike ours.

    9 others at random, or 9 of the 50 nearest by the demo's base model.
    """
    backbone, rows = load_backbone(str(stages.BASE)), []
    for folder in folders:
        catalog = load_catalog(folder)
        titles = [title.casefold() for title in catalog.titles]
        distinct, n = set(titles), len(titles)
        shared = sum(count for count in Counter(titles).values() if count > 1)
        longer = sum(_begins_with_another(title, distinct) for title in distinct)
        pictures = load_pictures(backbone, catalog, DataConfig(data=folder))
        k = near_count(50, catalog)
        near = neighbors(backbone, catalog, pictures, k)[2].numpy()  # (N, 50)
        everyone = np.array([np.delete(np.arange(n), i) for i in range(n)])  # (N, N - 1)

        examples = heldout_examples(load_interactions(folder, catalog), "test", 5)
        rng, shares = np.random.default_rng(SEED), []
        for pool in (everyone, near):
            sets = []
            for e in 10 * examples:
                drawn = rng.choice(pool[e.target], 9, replace=False)
                sets.append([titles[row] for row in (e.target, *drawn)])
            shares.append(np.mean([_repeats(one) for one in sets]))
            shares.append(np.mean([_overlaps(one) for one in sets]))
        ours = 0
        for e in draw_candidates(examples, catalog, 9, SEED):
            ours += _repeats([titles[row] for row in e.candidates])
        percent = [f"{share:.2%}" for share in shares]
        rows.append([catalog.name, n, shared, longer, *percent, ours])
    table(
        "catalogue | items | items that share their title | titles that begin with another | "
        "random: a title twice | the target's begins another's, or the reverse | "
        "nearest: a title twice | the target's begins another's, or the reverse | "
        "ours: a title twice",
        rows)


def _begins_with_another(title: str, others: set[str]) -> bool:
    return any(title != other and title.startswith(other) for other in others)


def _repeats(titles: Sequence[str]) -> bool:
    """Whether a title stands twice."""
    return len(set(titles)) < len(titles)


def _overlaps(titles: Sequence[str]) -> bool:
    """Whether the first title begins another, longer one, or is begun by a shorter one."""
    first, *others = titles
    for other in others:
        if first != other and (first.startswith(other) or other.startswith(first)):
            return True
    return False


def part_chance(_: Path) -> None:
    """Chance of some candidate sets: how many targets, how many of them count, how many others."""
    rng = np.random.default_rng(SEED)
    sets = ((1, 1, 9), (1, 1, 4), (1, 1, 7), (3, 3, 4), (3, 3, 7), (3, 1, 4), (3, 1, 7))
    rows = []
    for positives, counted, negatives in sets:
        n = positives + negatives
        orders = rng.permuted(np.tile(np.arange(n), (200_000, 1)), axis=1)
        places = orders[:, :counted]  # (draws, counted), ranks from 0
        gains = [1 / math.log2(2 + k) for k in range(3)]
        ideal = sum(gains[:counted])
        gain = np.where(places < 3, 1 / np.log2(2 + places), 0).sum(1) / ideal
        hit = 1 - math.comb(n - counted, 3) / math.comb(n, 3)
        expected = sum(gains) * counted / n / ideal
        rows.append([
            f"{positives} + {negatives}" + (", one counts" if counted < positives else ""),
            f"{100 * hit:.1f} ({100 * (places < 3).any(1).mean():.1f})",
            f"{100 * 3 / n:.1f}",
            f"{100 * expected:.1f} ({100 * gain.mean():.1f})",
            "50.0",
        ])
    table(
        "targets + negatives | HR@3, any target that counts (simulated) | share of the targets in "
        "the first 3 | NDCG@3 (simulated) | AUC",
        rows)
