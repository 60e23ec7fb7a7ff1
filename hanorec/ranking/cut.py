"""Training rows whose candidates a retriever finds, by one that does not know the targets.

A retriever that has learnt from a target ranks it higher than it will rank what is held out, and a
policy trained on its lists would learn to trust them. So it is trained with --hold-out N, on each
user's items before their last N of train.tsv, and names.json says so; those N are the targets. The
retriever of the test, of all of train.tsv, knows as little of its own targets.

    OUT/train       of a recommender of hanorec.baselines: a state before each of those N items
    OUT             of train_brmrs.py: a vector of each user
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hanorec.base.batches import chunks
from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_object
from hanorec.datasets.candidates import check_negatives, generator_of, shuffled, take
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example, with_seen
from hanorec.ranking.retriever import Retriever, check_retriever, load_retriever
from hanorec.ranking.retrieving import retriever_rows

AT_ONCE = 2**21  # scores of one block of examples


def cut_folder(folder: str | Path) -> Path:
    """Where `--retriever` keeps what it knows before the training targets."""
    states = Path(folder) / "train"
    return states if states.exists() else Path(folder)


def check_cut(folder: str | Path, targets_per_user: int) -> None:
    """InputError where `--retriever` is none, or one that has learnt from training targets.

    Only names and headers are read, so it costs little before a model is loaded.
    """
    folder = cut_folder(folder)
    path = folder / "names.json"
    names = read_object(path) if path.exists() else {"split": "none"}
    if names.get("split", "train") != "train":
        raise InputError(
            f"--retriever {folder}: neither a finished folder of train_brmrs.py nor one with "
            "states before training targets, expected the --out folder of either command; train "
            f"it with --hold-out {targets_per_user}, or check the path"
        )
    check_retriever(folder, "train")
    left_out = names.get("hold_out", 0)
    if not isinstance(left_out, int) or left_out < targets_per_user:
        raise InputError(
            f"--retriever {folder}: trained without each user's last {shown(left_out)} training "
            f"items, expected at least {targets_per_user}, which are the targets of "
            f"--targets-per-user {targets_per_user} and which it must not know; train it with "
            f"--hold-out {targets_per_user}"
        )


def load_cut(folder: str | Path, targets_per_user: int) -> Retriever:
    """The retriever of `check_cut`."""
    check_cut(folder, targets_per_user)
    return load_retriever(cut_folder(folder), "train")


def draw_retrieved(
    examples: Sequence[Example],
    retriever: Retriever,
    catalog: Catalog,
    trained: set[int],
    negatives: int,
    seed: int,
) -> list[Example]:
    """The examples whose target is among the retriever's best, with these as candidates: the
    target and `negatives` others, titles all different, in random order.

    An example whose target is not found is left out, and how many these are is printed: nobody
    reranks it in the test, and if the target took some item's place, what does not fit the list
    would be the answer.

    Args:
        trained: item rows that somebody has in training. Others could not have been chosen yet, so
            they are no negatives: else a policy would learn that they are never the answer.
    Raises:
        InputError: the retriever knows other items, or does not know a user; too few items; no
            target is found.
    """
    check_negatives(negatives)
    titles, rows = catalog.titles, list(catalog.row.values())
    result = []
    orders = _orders(examples, retriever, catalog, trained)
    for (example, seen), order in zip(with_seen(examples), orders, strict=True):
        taken: list[int] = []
        take(order, taken, {titles[example.target]}, negatives, seen, titles)
        if len(taken) < negatives:
            raise InputError(
                f"user {shown(example.user)}: {len(taken)} unseen items with titles of their own "
                f"that somebody has in training, {negatives} negatives wanted; use fewer "
                "(--candidates) or add interactions"
            )
        others = set(order[: order.index(example.target)]) - seen
        if len(others) <= negatives:
            rng = generator_of(seed, example, seen, catalog)
            result.append(shuffled(rng, example, taken, rows))
    print(
        f"--draw retrieved: {len(result)} of {len(examples)} targets are among the retriever's "
        f"{negatives + 1} best; the others are left out"
    )
    if not result:
        raise InputError(
            f"--retriever: none of the {len(examples)} targets is among its {negatives + 1} best, "
            "expected some; train it longer, or raise --candidates"
        )
    return result


def _orders(
    examples: Sequence[Example], retriever: Retriever, catalog: Catalog, trained: set[int]
) -> Iterator[list[int]]:
    """The items that somebody has in training, best first for each example; of equal scores the
    smaller row first."""
    users = retriever_rows(retriever, catalog, examples)  # (E,)
    items = torch.tensor(sorted(trained))  # (I',)
    for part in chunks(users.tolist(), max(1, AT_ONCE // len(items))):
        scores: Tensor = retriever.user[torch.tensor(part)] @ retriever.item[items].T  # (b, I')
        yield from items[scores.argsort(dim=1, descending=True, stable=True)].tolist()
