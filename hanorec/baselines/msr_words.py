r"""MLLM-MSR, extractive: what a user likes as words of titles, for bases that cannot write (MR-1).

The words of an image are those of the catalogue's titles that lie nearest to it among the base's
input embeddings; the words of a user are those that most of the history's items carry, the latest
most of all. Ours; MLLM-MSR has a model write both, see mllm_msr.py.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from hanorec.base.batches import chunks
from hanorec.baselines.mllm_msr import Summaries, last_block, running
from hanorec.datasets.interactions import Example, Rows
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.items import item_embeddings

IMAGE_WORDS, WORDS, DECAY = 3, 12, 0.8  # m, q and a


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters, each once."""
    return list(dict.fromkeys(re.findall(r"\w+", text.casefold())))


def nearest_words(X: Tensor, H: Tensor, m: int) -> Tensor:
    r"""The m words nearest to each image, the nearest first; of equal ones the first: (N, m) int64.

    Args:
        X: mean features of N images, (N, d). H: mean input embeddings of W words, (W, d).
    """
    # MR-1: c_i = \operatorname{top-}m_x \; \cos(H_x, X_i)
    cosine = F.normalize(X, dim=1) @ F.normalize(H, dim=1).T  # (N, W)
    return cosine.argsort(dim=1, descending=True, stable=True)[:, :m]


def weigh(
    before: Mapping[str, float], carried: Sequence[Sequence[str]], a: float
) -> dict[str, float]:
    r"""w_k(x) = a w_{k-1}(x) + n_k(x) of every word x whose weight is not 0.

    Args:
        before: w_{k-1}. carried: the words of each item of block k, of which n_k(x) have x.
    """
    n = Counter()
    for words in carried:
        n.update(set(words))
    weights = {x: a * before.get(x, 0.0) + n[x] for x in {**before, **n}}
    return {x: weight for x, weight in weights.items() if weight}


def heaviest(weights: Mapping[str, float], q: int) -> list[str]:
    """The q words of the greatest weight; equal ones by alphabet."""
    return sorted(weights, key=lambda x: (-weights[x], x))[:q]


def carried_words(builder: PromptBuilder, m: int = IMAGE_WORDS) -> list[list[str]]:
    """The words of every item of the catalogue: those of its title, and m of its image."""
    catalog = builder.catalog
    of_titles = [words_of(title) for title in catalog.titles]
    known: dict[str, None] = {}
    for words in of_titles:
        known |= dict.fromkeys(words)
    every = tuple(known)
    as_items = replace(catalog, ids=every, titles=every, images=(None,) * len(every))
    H, _, _ = item_embeddings(builder.backbone, as_items, {})  # (W, d)
    _, X, has_image = item_embeddings(builder.backbone, catalog, builder.pictures)  # (N, d)
    carried = [list(words) for words in of_titles]
    for rows in chunks(has_image.nonzero()[:, 0].tolist(), 256):
        for row, near in zip(rows, nearest_words(X[rows], H, m).tolist(), strict=True):
            carried[row] += [every[x] for x in near]
    return carried


def extractive(
    builder: PromptBuilder, examples: Sequence[Example], q: int = WORDS, a: float = DECAY
) -> Summaries:
    """The q heaviest words of each example's history, as a text; the adapters do not matter."""
    carried = carried_words(builder)

    def update(due: dict[Rows, dict[str, float]]) -> dict[Rows, dict[str, float]]:
        found = {}
        for rows, before in due.items():
            found[rows] = weigh(before, [carried[row] for row in last_block(rows)], a)
        return found

    weights = running([example.history for example in examples], {}, update)
    found = {}
    for example in examples:
        found[example.user, example.history] = ", ".join(heaviest(weights[example.history], q))
    return found
