"""What the MLLM knows of each item: its image features, and the embeddings H and X of HaRS (HN-1)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from hanorec.backbone import Backbone, Picture, hidden_states, image_features, prompt_positions
from hanorec.catalog import Catalog, read_image
from hanorec.hars import fuse, mean_pool
from hanorec.prompts import text_ids
from hanorec.topk import topk_neighbors

BATCH = 32  # images or titles in one forward


def encode_pictures(backbone: Backbone, catalog: Catalog, rows: Iterable[int]) -> dict[int, Picture]:
    """Catalogue row -> features of its image, for those of `rows` that have one.

    The vision tower is frozen in every stage, so each image needs it once. Held in memory: n tokens x width numbers an image.
    """
    todo = [row for row in sorted(set(rows)) if catalog.images[row] is not None]
    pictures: dict[int, Picture] = {}
    for start in tqdm(range(0, len(todo), BATCH), desc="images", disable=None, leave=False):
        part = todo[start : start + BATCH]
        pictures.update(zip(part, image_features(backbone, [read_image(catalog.images[row]) for row in part]), strict=True))
    return pictures


@torch.no_grad()
def item_embeddings(backbone: Backbone, catalog: Catalog, pictures: dict[int, Picture],
                    form: str = "input") -> tuple[Tensor, Tensor, Tensor]:
    """HN-1 for the whole catalogue.

    form: "input" = mean of the title's input embeddings, mean of the projected image features (the same before and after training);
        "hidden" = mean-pooled last hidden state of the title alone and of the image alone, under the adapters that are on.
    Returns:
        H (N, d), X (N, d) with zeros where there is no image, has_image (N,) bool; float32 on the CPU.
    """
    n = len(catalog.ids)
    H, X = torch.zeros(n, backbone.width), torch.zeros(n, backbone.width)
    has_image = torch.tensor([row in pictures for row in range(n)])
    titles = [text_ids(backbone, title) for title in catalog.titles]
    if form == "input":
        embed = backbone.model.get_input_embeddings()
        for row in range(n):
            H[row] = mean_pool(embed(torch.tensor(titles[row], device=backbone.device))).cpu()
            if row in pictures:
                X[row] = mean_pool(pictures[row].features)
        return H, X, has_image
    for start in tqdm(range(0, n, BATCH), desc="items", disable=None, leave=False):
        part = range(start, min(start + BATCH, n))
        H[list(part)] = _pooled_hidden(backbone, [(titles[row], None) for row in part])
        if seen := [row for row in part if row in pictures]:
            alone = [([backbone.image_token] * len(pictures[row].features), pictures[row]) for row in seen]
            X[seen] = _pooled_hidden(backbone, alone)
    return H, X, has_image


def _pooled_hidden(backbone: Backbone, inputs: list[tuple[list[int], Picture | None]]) -> Tensor:
    """Mean last hidden state of each token list on its own: (B, d)."""
    width = max(len(ids) for ids, _ in inputs)
    ids, mask = torch.zeros(len(inputs), width, dtype=torch.long), torch.zeros(len(inputs), width, dtype=torch.long)
    parts = [prompt_positions(backbone, tokens, [picture.grid] if picture else []) for tokens, picture in inputs]
    positions = torch.zeros(len(parts[0]), len(inputs), width, dtype=torch.long)
    for b, (tokens, _) in enumerate(inputs):  # padding on the right: a causal model never sees it
        ids[b, : len(tokens)], mask[b, : len(tokens)], positions[:, b, : len(tokens)] = torch.tensor(tokens), 1, parts[b]
    shown = [picture.features for _, picture in inputs if picture]
    features = torch.cat(shown) if shown else torch.zeros(0, backbone.width)
    device = backbone.device
    hidden = hidden_states(backbone, ids.to(device), positions.to(device), mask.to(device), features).cpu()
    return torch.stack([mean_pool(hidden[b, : len(tokens)]) for b, (tokens, _) in enumerate(inputs)])


def neighbors(backbone: Backbone, catalog: Catalog, pictures: dict[int, Picture], k: int,
              form: str = "input") -> tuple[Tensor, Tensor, Tensor]:
    """HN-1 to HN-3 in one go: e (N, d), scores (N, K), index (N, K), on the backbone's device."""
    e = fuse(*item_embeddings(backbone, catalog, pictures, form)).to(backbone.device)
    return e, *topk_neighbors(e, k)
