"""What the MLLM knows of each item: its image features, and the embeddings H and X of HaRS (HN-1).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from hanorec.base.batches import chunks
from hanorec.base.distributed import all_gather, all_reduce, dealt, share, world_size
from hanorec.base.progress import progress
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.images import read_image
from hanorec.hars import fuse, mean_pool
from hanorec.mllm.backbone import (
    Backbone,
    ImageFeatures,
    hidden_states,
    image_features,
    prompt_positions,
)
from hanorec.mllm.prompts import text_ids
from hanorec.mllm.topk_ring import topk_neighbors_ring
from hanorec.topk import topk_neighbors

BATCH = 32  # images or titles in one forward


# ---- image features ----


def encode_pictures(
    backbone: Backbone, catalog: Catalog, rows: Iterable[int]
) -> dict[int, ImageFeatures]:
    """Catalogue row -> features of its image, for those of `rows` that have one: n tokens x width
    numbers an image, all in memory.

    The commands read the same from the feature file (features.py).
    """
    return dict(encode(backbone, catalog, rows))


def encode(
    backbone: Backbone, catalog: Catalog, rows: Iterable[int]
) -> Iterator[tuple[int, ImageFeatures]]:
    """`encode_pictures` as a stream, in the order of rows, of which one batch is in memory."""
    todo = [row for row in sorted(set(rows)) if catalog.images[row] is not None]
    batches = list(chunks(todo, BATCH))
    for batch in progress(batches, "images"):
        yield from zip(batch, _encode_batch(backbone, catalog, batch), strict=True)


def _encode_batch(backbone: Backbone, catalog: Catalog, rows: list[int]) -> list[ImageFeatures]:
    images = [read_image(catalog.images[row]) for row in rows]
    return image_features(backbone, images)


def own_rows(rows: list[int]) -> list[int]:
    """This rank's part of `rows`, which have images: whole batches of `encode`."""
    batches = list(chunks(rows, BATCH))
    return list(chain(*dealt(batches)))


# ---- embeddings ----


class _Input(NamedTuple):
    """What one vector is the mean of: a title, or an image."""

    ids: list[int]  # n tokens of the title, or n placeholders of the image
    picture: ImageFeatures | None  # n features of the image; None: it is a title


def item_embeddings(
    backbone: Backbone,
    catalog: Catalog,
    pictures: Mapping[int, ImageFeatures],
    form: str = "input",
) -> tuple[Tensor, Tensor, Tensor]:
    """HN-1 for the whole catalogue.

    Args:
        form: "input" = mean of the title's input embeddings, mean of the projected image features
            (the same before and after training); "hidden" = mean-pooled last hidden state of the
            title alone and of the image alone, under the adapters that are on.
    Returns:
        H (N, d), X (N, d) with zeros where there is no image, has_image (N,) bool; float32 on the
        CPU.
    """
    n = len(catalog.ids)
    has_image = torch.tensor([row in pictures for row in range(n)])

    titles = [_Input(text_ids(backbone, title), None) for title in catalog.titles]
    H = _pooled(backbone, titles, form)

    X = torch.zeros(n, backbone.width)
    if pictures:
        shown = [pictures[row] for row in range(n) if row in pictures]
        token = backbone.image_token
        images = [_Input([token] * len(picture.features), picture) for picture in shown]
        X[has_image] = _pooled(backbone, images, form)
    return H, X, has_image


def hidden_embeddings(
    backbone: Backbone,
    catalog: Catalog,
    pictures: Mapping[int, ImageFeatures],
    rows: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """HN-1's "hidden" form of these catalogue rows, which all have an image, with gradients.

    H and X, (n, d) each, on the backbone's device. Each rank computes all of them.
    """
    token = backbone.image_token
    titles = [_Input(text_ids(backbone, catalog.titles[row]), None) for row in rows]
    shown = [pictures[row] for row in rows]
    images = [_Input([token] * len(picture.features), picture) for picture in shown]
    found = []
    for inputs in (titles, images):
        order, vectors = [], []
        for batch in _batches_of_one_shape(inputs):
            order += batch
            hidden = _hidden_vectors(backbone, [inputs[i] for i in batch])  # (b, n, d)
            vectors.append(mean_pool(hidden))
        place = torch.tensor(order, device=backbone.device).argsort()
        found.append(torch.cat(vectors)[place])
    return found[0], found[1]


@torch.no_grad()
def _pooled(backbone: Backbone, inputs: list[_Input], form: str) -> Tensor:
    """The mean vector of each of the B titles, or images, on its own: (B, d).

    The batches are those of a single process, dealt out to the ranks.
    """
    vectors_of = _input_vectors if form == "input" else _hidden_vectors
    turns = _own_turns(_batches_of_one_shape(inputs))
    pooled = torch.zeros(len(inputs), backbone.width)
    for batch, counts in progress(turns, "items"):
        vectors = vectors_of(backbone, [inputs[i] for i in batch])  # (b, n, d)
        if counts:
            pooled[batch] = mean_pool(vectors).cpu()
    all_reduce([pooled])  # each row is zero on all ranks but one
    return pooled


def _batches_of_one_shape(inputs: list[_Input]) -> list[list[int]]:
    """Numbers of inputs: each once, those of one shape together, so that nothing is padded."""

    def shape(i: int) -> tuple[int, list[int]]:
        ids, picture = inputs[i]
        has_grid = picture is not None and picture.grid is not None
        return len(ids), picture.grid.tolist() if has_grid else []

    batches: list[list[int]] = []
    for _, alike in groupby(sorted(range(len(inputs)), key=shape), shape):
        batches += chunks(list(alike), BATCH)
    return batches


def _own_turns(batches: list[list[int]]) -> list[tuple[list[int], bool]]:
    """This rank's batches, and whether they count.

    A rank that runs out repeats the last one of all, which does not count: where the model is
    divided too, all must run it equally often.
    """
    rounds = -(-len(batches) // world_size())
    turns = [(batch, True) for batch in dealt(batches)]
    while len(turns) < rounds:
        turns.append((batches[-1], False))
    return turns


def _input_vectors(backbone: Backbone, batch: list[_Input]) -> Tensor:
    """What stands at the language model's input, (b, n, d), for titles or images of one shape."""
    if batch[0].picture is not None:
        return torch.stack([picture.features for _, picture in batch])
    ids = torch.tensor([ids for ids, _ in batch], device=backbone.device)  # (b, n)
    return backbone.model.get_input_embeddings()(ids)


def _hidden_vectors(backbone: Backbone, batch: list[_Input]) -> Tensor:
    """The last hidden states, (b, n, d), of titles or images of one shape, each on its own."""
    ids = torch.tensor([ids for ids, _ in batch], device=backbone.device)  # (b, n)
    pictures = [picture for _, picture in batch if picture is not None]  # b, or none

    first_grid = [picture.grid for picture in pictures[:1]]
    positions = prompt_positions(backbone, batch[0].ids, first_grid)  # (R, n), the same for all
    positions = positions[:, None].expand(-1, len(batch), -1).to(backbone.device)  # (R, b, n)

    features = torch.zeros(0, backbone.width)
    if pictures:
        features = torch.cat([picture.features for picture in pictures])  # (b n, d)
    return hidden_states(backbone, ids, positions, None, features)


def neighbors(
    backbone: Backbone,
    catalog: Catalog,
    pictures: Mapping[int, ImageFeatures],
    k: int,
    form: str = "input",
) -> tuple[Tensor, Tensor, Tensor]:
    """HN-1 to HN-3 in one go: e (N, d), scores (N, K), index (N, K), on the backbone's device."""
    e = fuse(*item_embeddings(backbone, catalog, pictures, form)).to(backbone.device)
    if world_size() == 1:
        return e, *topk_neighbors(e, k)
    scores, index = topk_neighbors_ring(e[share(len(e))], len(e), k)
    return e, all_gather(scores, len(e)), all_gather(index, len(e))
