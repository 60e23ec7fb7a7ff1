r"""LLaRA: behind each title in the prompt stands the item's vector of a sequential recommender.

The vector is a row of that recommender's frozen item table, brought to the width of the language
model by a projector, the one new thing to learn beside the adapter.

    LL-1  `Projector`           from a row of the table to a vector among token embeddings
    LL-2  `hybrid_probability`  how often a step's prompts have the vectors
    LL-3  `hybrid_parts`        the prompt with the vectors

Source: arXiv 2312.02445 and its authors' code. N = items, d = width of the table, D = width of the
language model.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example
from hanorec.mllm.backbone import ImageFeatures
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.prompts import HISTORY, TITLE_ALONE, WHICH, Part, Row, encode_row


class Projector(nn.Module):
    r"""LL-1. W1 (D, d), b1 (D,), W2 (D, D), b2 (D,), drawn from the same ranges as `nn.Linear`'s.

    Source: arXiv 2312.02445; two layers with GELU and this start in the authors' code.
    """

    def __init__(self, d: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.W1 = nn.Parameter(torch.empty(width, d))
        self.b1 = nn.Parameter(torch.empty(width))
        self.W2 = nn.Parameter(torch.empty(width, width))
        self.b2 = nn.Parameter(torch.empty(width))
        for weight, fan_in in [(self.W1, d), (self.b1, d), (self.W2, width), (self.b2, width)]:
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5, generator)

    def forward(self, m: Tensor) -> Tensor:
        """Rows of the table (n, d) -> vectors (n, D)."""
        # LL-1: v_i = W_2 \operatorname{gelu}(W_1 m_i + b_1) + b_2
        return F.linear(F.gelu(F.linear(m, self.W1, self.b1)), self.W2, self.b2)


def item_vectors(projector: Projector, m: Tensor, items: Iterable[int]) -> dict[int, ImageFeatures]:
    """v_i of these items of the table m (N, d), in the form in which a batch takes image features.

    A single vector without a grid. It passes gradients to the projector.
    """
    rows = sorted(set(items))
    v = projector(m[rows])  # (n, D)
    return {row: ImageFeatures(v[n : n + 1], None) for n, row in enumerate(rows)}


def hybrid_probability(step: int, steps: int) -> float:
    r"""LL-2: the share of hybrid steps grows from 0 to 1 in the course of training.

    Args:
        step: tau = 0 .. T - 1, of `steps` = T optimizer steps in all.
    Returns:
        p in [0, 1): with this probability the step's prompts have vectors, else titles alone.
    """
    # LL-2: p(\tau) = \tau / T
    return step / steps


def hybrid_parts(
    catalog: Catalog, history: Sequence[int], candidates: Sequence[int]
) -> list[Part]:
    r"""LL-3: the wording of the ranking prompt without images, a vector behind each title.

    What is learnt is the title of the target under this prompt, SFT-1.
    """
    # LL-3: x = (\dots, \text{title}_i, v_i, \dots), \quad L = -\log\pi(y_w \mid x)
    return [HISTORY, *_titled(catalog, history), WHICH, *_titled(catalog, candidates), TITLE_ALONE]


def _titled(catalog: Catalog, rows: Sequence[int]) -> list[Part]:
    parts: list[Part] = []
    for number, row in enumerate(rows, 1):
        parts += [f"{number}. {catalog.titles[row]}", row, "\n"]
    return parts


def hybrid_row(builder: PromptBuilder, example: Example, text: Row) -> Row:
    """The example's hybrid prompt, with the answers of its prompt of titles alone."""
    parts = hybrid_parts(builder.shown, example.history, example.candidates)
    place = ImageFeatures(torch.zeros(1, builder.backbone.width), None)
    places = dict.fromkeys((*example.history, *example.candidates), place)
    return encode_row(builder.backbone, text.name, parts, places, text.answers)
