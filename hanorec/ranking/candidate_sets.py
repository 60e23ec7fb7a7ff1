"""Who is evaluated on what: held-out items, and the frozen candidate sets around them.

Three kinds of sets, drawn once, kept in the data folder and the same for every model: `random`
(unseen items), `hard` (unseen items near the positive) and `matched` (unseen items about as popular
as the positive).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hanorec.base.config import DataConfig, EvalConfig
from hanorec.base.distributed import barrier, rank, run_on_all_ranks
from hanorec.base.errors import InputError
from hanorec.base.files import sha256
from hanorec.datasets.candidates import draw_candidates, draw_hard_candidates, near_count
from hanorec.datasets.catalog import data_hash, load_catalog
from hanorec.datasets.frozen import load_candidates, save_candidates
from hanorec.datasets.interactions import (
    Example,
    HeldOut,
    Interactions,
    had_before,
    heldout_examples,
    item_counts,
    load_interactions,
    select_users,
)
from hanorec.datasets.lists import check_lists, list_examples, whole_sequences
from hanorec.datasets.matched import draw_matched_candidates

KINDS = {  # of `--sets`
    "random": ["random"],
    "hard": ["hard"],
    "matched": ["matched"],
    "both": ["random", "hard"],
    "all": ["random", "hard", "matched"],
}


def held_out(data: DataConfig, config: EvalConfig) -> HeldOut:
    """Read the data folder, and choose the users of `config`. InputError: there is nobody."""
    catalog = load_catalog(data.data, images=data.images != "none")
    interactions = load_interactions(data.data, catalog)
    every = heldout_examples(interactions, config.split, data.history)
    if not every:
        raise InputError(
            f"{Path(data.data) / config.split}.tsv: no user, expected at least one held-out item"
        )
    users = _users(data, config, interactions, every)
    held = HeldOut(catalog, interactions, every, users)
    chosen = held.asked(every)
    if not chosen:
        raise InputError(
            f"{data.data}: none of the {len(users)} users chosen is in {config.split}.tsv, "
            "expected some; widen --users-from, --users-to"
        )
    repeats = len(had_before(interactions, config.split, chosen))
    if repeats:
        print(
            f"note: {repeats} of {len(chosen)} targets are items that their user had before; "
            "copying from the history finds them"
        )
    return held


def _users(
    data: DataConfig, config: EvalConfig, interactions: Interactions, every: list[Example]
) -> set[str]:
    """`--user`, or the fraction of all that the data's settings name."""
    if config.user is None:
        chosen = select_users(
            interactions.train, data.users_from, data.users_to, data.users_seed
        )
        return set(chosen)
    if config.user not in {example.user for example in every}:
        raise InputError(
            f"--user {config.user!r}: not in {config.split}.tsv of {data.data}; expected one of "
            f"its {len(every)} users"
        )
    return {config.user}


def candidates_path(data: DataConfig, config: EvalConfig, kind: str) -> Path:
    """The file that keeps the sets of a kind."""
    return Path(data.data) / f"candidates_{config.split}_{kind}.json"


def frozen_sets(
    held: HeldOut,
    data: DataConfig,
    config: EvalConfig,
    near: Callable[[], Tensor],
    embedding: str,
) -> dict[str, list[Example]]:
    """Kind -> the examples of the users asked for, with their candidates.

    Sets that the data folder does not have yet are drawn now, for all users.

    Args:
        near: gives (N, M) int64, row i = the M items nearest to i. It is called on all ranks, and
            only where a hard set is to be drawn.
        embedding: in what space they are near, for the file's facts.
    """
    sets = {}
    for kind in KINDS[config.sets]:
        facts = {
            "kind": kind,
            "neighbors": None if kind == "random" else near_count(data.neighbors, held.catalog),
            "split": config.split,
            "seed": config.seed,
            "negatives": data.candidates - 1,
            "data_sha256": data_hash(held.catalog),
        }
        path = candidates_path(data, config, kind)
        if not run_on_all_ranks(path.exists)[0]:  # as rank 0 sees it, which draws
            index = near() if kind == "hard" else None
            if rank() == 0:
                _draw(path, held, facts, index, embedding)
        barrier()
        sets[kind] = held.asked(load_candidates(path, held.every, held.catalog, **facts))
    return sets


def list_sets(held: HeldOut, data: DataConfig, config: EvalConfig) -> dict[str, list[Example]]:
    """With --targets above 1: the last items of each user's sequence amid random negatives.

    The targets may reach back into earlier splits. A function of --seed, so kept in no file.
    InputError where nobody has enough items.
    """
    sequences = whole_sequences(held.interactions, config.split, sorted(held.users))
    examples = list_examples(sequences, data.targets, data.history, data.targets)
    check_lists(data.data, config.split, sequences, examples, data.targets)
    without = len(sequences) - len(examples)
    if without:
        print(f"note: {without} of {len(sequences)} users have too few items for --targets")
    negatives = data.candidates - data.targets
    drawn = draw_candidates(examples, held.catalog, negatives, config.seed)
    return {f"last {data.targets}": drawn}


def _draw(
    path: Path,
    held: HeldOut,
    facts: dict[str, Any],
    near: Tensor | None,
    embedding: str,
) -> None:
    """Draw the sets of all users and keep them in `path`. near: of hard ones."""
    every, catalog = held.every, held.catalog
    negatives, seed = facts["negatives"], facts["seed"]
    if facts["kind"] == "hard":
        facts = {**facts, "embedding": embedding}
        drawn = draw_hard_candidates(every, catalog, near.cpu().numpy(), negatives, seed)
    elif facts["kind"] == "matched":
        count = item_counts(held.interactions.train)
        counts = np.array([count[row] for row in range(len(catalog.ids))])
        drawn = draw_matched_candidates(
            every, catalog, counts, facts["neighbors"], negatives, seed
        )
    else:
        drawn = draw_candidates(every, catalog, negatives, seed)
    save_candidates(path, drawn, catalog, **facts)


def input_hashes(
    held: HeldOut, data: DataConfig, config: EvalConfig, policies: Sequence[str]
) -> dict[str, str]:
    """What was evaluated on what: the data, the candidates, and every policy's adapters."""
    files = {}
    if data.targets > 1:
        pass  # candidates are in no file
    elif config.retriever is None:
        for kind in KINDS[config.sets]:
            files[f"candidates_{kind}"] = candidates_path(data, config, kind)
    else:
        files["retriever"] = Path(config.retriever) / "embeddings.safetensors"
        files["retriever_names"] = Path(config.retriever) / "names.json"
    for policy in policies:
        files |= policy_files(policy)
    hashes = {name: sha256(path) for name, path in files.items()}
    return {"data": data_hash(held.catalog), **hashes}


def policy_files(policy: str) -> dict[str, Path]:
    """Name -> file of weights, of a policy's adapters; the bare base has none."""
    files = {}
    name, folder = policy, Path(policy)
    while policy != "base" and folder.exists():  # and what it stands on
        files[name] = folder / "adapter_model.safetensors"
        name, folder = f"{name}/below", folder / "below"
    return files
