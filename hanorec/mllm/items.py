"""What the MLLM knows of each item: its image features, and the embeddings H and X of HaRS (HN-1)."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby

import torch
from torch import Tensor
from tqdm import tqdm

from hanorec.base.distributed import all_gather, all_reduce, dealt, rank, share, world_size
from hanorec.datasets.catalog import Catalog, read_image
from hanorec.hars import fuse, mean_pool
from hanorec.mllm.backbone import Backbone, ImageFeatures, hidden_states, image_features, prompt_positions
from hanorec.mllm.prompts import text_ids
from hanorec.mllm.topk_ring import topk_neighbors_ring
from hanorec.topk import topk_neighbors

BATCH = 32  # images or titles in one forward


def encode_pictures(backbone: Backbone, catalog: Catalog, rows: Iterable[int]) -> dict[int, ImageFeatures]:
    """Catalogue row -> features of its image, for those of `rows` that have one: n tokens x width numbers an image, all in memory.

    The commands read the same from the feature file (features.py).
    """
    return dict(encode(backbone, catalog, rows))


def encode(backbone: Backbone, catalog: Catalog, rows: Iterable[int]) -> Iterator[tuple[int, ImageFeatures]]:
    """`encode_pictures` as a stream, in the order of rows, of which one batch is in memory."""
    todo = [row for row in sorted(set(rows)) if catalog.images[row] is not None]
    for start in tqdm(range(0, len(todo), BATCH), desc="images", disable=None, leave=False):
        part = todo[start : start + BATCH]
        yield from zip(part, image_features(backbone, [read_image(catalog.images[row]) for row in part]), strict=True)


def own_rows(rows: list[int]) -> list[int]:
    """This rank's part of `rows`, which have images: whole batches of `encode`."""
    return list(chain(*dealt([rows[start : start + BATCH] for start in range(0, len(rows), BATCH)])))


def item_embeddings(backbone: Backbone, catalog: Catalog, pictures: Mapping[int, ImageFeatures],
                    form: str = "input") -> tuple[Tensor, Tensor, Tensor]:
    """HN-1 for the whole catalogue.

    form: "input" = mean of the title's input embeddings, mean of the projected image features (the same before and after training);
        "hidden" = mean-pooled last hidden state of the title alone and of the image alone, under the adapters that are on.
    Returns:
        H (N, d), X (N, d) with zeros where there is no image, has_image (N,) bool; float32 on the CPU.
    """
    n = len(catalog.ids)
    X, has_image = torch.zeros(n, backbone.width), torch.tensor([row in pictures for row in range(n)])
    H = _pooled(backbone, [(text_ids(backbone, title), None) for title in catalog.titles], form)
    if pictures:
        token, shown = backbone.image_token, [pictures[row] for row in range(n) if row in pictures]
        X[has_image] = _pooled(backbone, [([token] * len(picture.features), picture) for picture in shown], form)
    return H, X, has_image


@torch.no_grad()
def _pooled(backbone: Backbone, inputs: list[tuple[list[int], ImageFeatures | None]], form: str) -> Tensor:
    """The mean vector (B, d) of each title, or image, on its own. Those of one shape go together, so that nothing is padded.

    The batches are those of a single process, dealt out to the ranks. A rank that runs out repeats the last one: where the model is
    divided too, all must run it equally often.
    """
    pooled, embed, device = torch.zeros(len(inputs), backbone.width), backbone.model.get_input_embeddings(), backbone.device
    shapes = [(len(ids), [] if picture is None or picture.grid is None else picture.grid.tolist()) for ids, picture in inputs]
    groups = [list(group) for _, group in groupby(sorted(range(len(inputs)), key=shapes.__getitem__), shapes.__getitem__)]
    batches = [group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)]
    rounds = -(-len(batches) // world_size())
    for number in tqdm(range(rank(), rounds * world_size(), world_size()), desc="items", disable=None, leave=False):
        batch = batches[min(number, len(batches) - 1)]
        ids = torch.tensor([inputs[i][0] for i in batch], device=device)  # (b, n)
        seen = [picture for i in batch if (picture := inputs[i][1]) is not None]
        if form == "input":
            vectors = torch.stack([picture.features for picture in seen]) if seen else embed(ids)  # (b, n, d)
        else:
            positions = prompt_positions(backbone, inputs[batch[0]][0], [picture.grid for picture in seen[:1]])  # (R, n), the same for all
            features = torch.cat([picture.features for picture in seen]) if seen else pooled[:0]  # (b n, d), or none
            vectors = hidden_states(backbone, ids, positions[:, None].expand(-1, len(batch), -1).to(device), None, features)
        if number < len(batches):
            pooled[batch] = mean_pool(vectors).cpu()
    all_reduce([pooled])  # each row is zero on all ranks but one
    return pooled


def neighbors(backbone: Backbone, catalog: Catalog, pictures: Mapping[int, ImageFeatures], k: int,
              form: str = "input") -> tuple[Tensor, Tensor, Tensor]:
    """HN-1 to HN-3 in one go: e (N, d), scores (N, K), index (N, K), on the backbone's device."""
    e = fuse(*item_embeddings(backbone, catalog, pictures, form)).to(backbone.device)
    if world_size() == 1:
        return e, *topk_neighbors(e, k)
    scores, index = topk_neighbors_ring(e[share(len(e))], len(e), k)
    return e, all_gather(scores, len(e)), all_gather(index, len(e))
