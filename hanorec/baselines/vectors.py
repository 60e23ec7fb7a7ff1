r"""Scores that are inner products of a user's state and an item's row: what is asked of them.

Every held-out item has a state of its own, since a sequence model has read on between two of them;
those of a matrix model are equal for one user. T = held-out items of a split, N = items, L = how
many items a state is made from, d = width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hanorec.base.errors import InputError
from hanorec.baselines.matrix import MatrixModel
from hanorec.datasets.catalog import Catalog, data_hash
from hanorec.datasets.interactions import Example, Interactions, heldout_examples
from hanorec.ranking.full_ranking import target_ranks, user_rows
from hanorec.ranking.result import Evaluation, write_retriever
from hanorec.ranking.sampler import Seen

KS = (10, 20)


class Vectors(NamedTuple):
    """What scores are made of: score = inner product."""

    user: Tensor  # (T, d)
    item: Tensor  # (N, d)


@dataclass(frozen=True)
class Targets:
    """What of a split is to be found, and what is known before each of it."""

    split: str
    examples: list[Example]  # of `heldout_examples`, in its order
    users: Tensor  # (T,) row of each among the users of training
    sequences: Tensor  # (T, <= L) the last items before each, see `padded`
    seen: Seen  # row = number of the target: all items before it, each once
    pairs: Tensor  # (2, T'), number and item of those targets that their user had not before


# ---- what is asked ----


def load_targets(
    data: Interactions, n_items: int, split: str, length: int, device: torch.device
) -> Targets:
    """The held-out items of a split ("val" or "test").

    A target that its user had before is masked with all else before it, so it is left out of full
    ranking. InputError: nothing is left.
    """
    examples = heldout_examples(data, split, length)
    before: list[tuple[int, int]] = []  # number of a target, item
    pairs = []
    for number, had in enumerate(_had_before(data, split)):
        before += [(number, item) for item in had]
        if examples[number].target not in had:
            pairs.append((number, examples[number].target))
    if not pairs:
        raise InputError(
            f"{split}.tsv: {len(examples)} held-out items, none of them new to its user, expected "
            "at least one; split the interactions again"
        )
    if len(pairs) < len(examples):
        print(
            f"note: {len(examples) - len(pairs)} of {len(examples)} targets of the {split} split "
            "are left out of full ranking: the user had the item before"
        )
    row = {user: number for number, user in enumerate(data.train)}
    users = torch.tensor([row[example.user] for example in examples], device=device)
    sequences = padded([example.history for example in examples], n_items).to(device)
    seen = Seen(*torch.tensor(before, device=device).T, len(examples))
    return Targets(
        split, examples, users, sequences, seen, torch.tensor(pairs, device=device).T
    )


def _had_before(data: Interactions, split: str) -> list[dict[int, None]]:
    """The items that each target's user had before it, in the order of `heldout_examples`."""
    found = []
    for user, held_out in getattr(data, split).items():
        earlier = data.before(user, split)
        found += [dict.fromkeys(earlier + held_out[:n]) for n in range(len(held_out))]
    return found


def padded(sequences: Sequence[Sequence[int]], n_items: int) -> Tensor:
    """Item rows as one tensor (B, longest) int64, padded on the right with the number of items."""
    longest = max(map(len, sequences))
    return torch.tensor([[*rows, *[n_items] * (longest - len(rows))] for rows in sequences])


# ---- what a model answers ----


@torch.no_grad()
def matrix_vectors(model: MatrixModel, targets: Targets) -> Vectors:
    """The vectors of training, for val and test alike."""
    user, item = model.propagate()
    return Vectors(user[targets.users], item)


@torch.no_grad()
def sequence_vectors(model: nn.Module, batch: int, targets: Targets) -> Vectors:
    """A state from the last items before each target.

    model: of `hanorec.baselines.sequential`. batch: targets in one forward.
    """
    parts = zip(targets.users.split(batch), targets.sequences.split(batch), strict=True)
    states = [model.state(users, sequences) for users, sequences in parts]
    return Vectors(torch.cat(states), model.item_rows())


# ---- what follows from it ----


def evaluate(vectors: Vectors, targets: Targets) -> Evaluation:
    """Recall and NDCG of each target among all items that are new to its user.

    Returns:
        Means, the numbers of the targets (T',), and name -> (T',) values, as
        `hanorec.ranking.full_ranking.user_rows`.
    """
    ranks = target_ranks(vectors.user, vectors.item, targets.pairs, targets.seen)
    numbers, rows = user_rows(ranks, targets.pairs[0], KS)
    return {name: float(values.mean()) for name, values in rows.items()}, numbers, rows


def write_vectors(
    out: Path, vectors: Vectors, targets: Targets, catalog: Catalog, hold_out: int = 0
) -> None:
    """The files of `hanorec.ranking.retriever`, for the examples of one split.

    hold_out: how many of each user's last training items were not learnt from.
    """
    train = torch.stack([targets.seen.user, targets.seen.item])  # (2, E)
    write_retriever(
        out,
        {"user": vectors.user, "item": vectors.item, "train": train},
        users=[example.user for example in targets.examples],
        items=catalog.ids,
        split=targets.split,
        targets=[catalog.ids[example.target] for example in targets.examples],
        data=data_hash(catalog),
        hold_out=hold_out,
    )
