"""The examples of a data folder, and the rows that each stage makes of them: SFT, DPO, evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hanorec.base.batches import chunks
from hanorec.base.config import NEGATIVES, DataConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.datasets.candidates import draw_candidates, draw_hard_candidates, near_count
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.interactions import (
    Example,
    check_some,
    load_interactions,
    select_users,
    training_examples,
)
from hanorec.datasets.lists import list_examples
from hanorec.datasets.picks import load_picks
from hanorec.hars import fuse
from hanorec.mllm import prompts
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.features import stored_pictures
from hanorec.mllm.items import encode_pictures, item_embeddings, neighbors
from hanorec.mllm.prompts import Row
from hanorec.ranking.cut import draw_retrieved, load_cut

# ---- what both stages start from ----


def load_examples(
    backbone: Backbone, data: DataConfig, config: TrainConfig
) -> tuple[PromptBuilder, list[Example]]:
    """The training examples with their candidates, and the pictures."""
    catalog = load_catalog(data.data, images=data.images != "none")
    interactions = load_interactions(data.data, catalog)
    users = select_users(interactions.train, data.users_from, data.users_to, data.users_seed)
    if data.targets == 1:
        examples = training_examples(interactions, config.targets_per_user, data.history, users)
    else:
        own = {user: interactions.train[user] for user in users}
        examples = list_examples(own, data.targets, data.history, config.targets_per_user)
    without = len(users) - len({example.user for example in examples})
    if without:
        few = "a single training item"
        if data.targets > 1:
            few = f"fewer than {data.targets + 1} training items, or one twice among the last"
        print(f"{without} of {len(users)} users have {few}, so they give no example")
    check_some(data.data, examples, users)
    print_missing_images(catalog, data)
    negatives = data.candidates - data.targets
    builder = PromptBuilder(backbone, catalog, {}, data)
    if config.draw == "random":
        examples = draw_candidates(examples, builder.shown, negatives, config.seed)
    if config.draw == "retrieved":
        retriever = load_cut(config.retriever, config.targets_per_user)
        trained = set().union(*interactions.train.values())
        examples = draw_retrieved(
            examples, retriever, builder.shown, trained, negatives, config.seed
        )
    builder.pictures.update(load_pictures(backbone, catalog, data))
    if config.draw == "hard":
        near = near_items(builder).cpu().numpy()
        examples = draw_hard_candidates(examples, builder.shown, near, negatives, config.seed)
    return builder, examples


def near_items(builder: PromptBuilder) -> Tensor:
    """The items that hard negatives are drawn from, (N, M) int64: the --neighbors nearest of each.

    In a small catalogue these are all others.
    """
    wanted = builder.config.neighbors
    k = near_count(wanted, builder.catalog)
    if k < wanted:
        print(f"note: --neighbors {wanted}, but an item has only {k} others: all are taken")
    _, _, index = neighbors(builder.backbone, builder.catalog, builder.pictures, k)
    return index


def load_pictures(
    backbone: Backbone, catalog: Catalog, data: DataConfig
) -> dict[int, ImageFeatures]:
    """Features of every image of the catalogue, from the feature file; --plain computes them anew.
    """
    if data.plain:
        return encode_pictures(backbone, catalog, range(len(catalog.ids)))
    return stored_pictures(backbone, catalog, data.features or data.data)


def print_missing_images(catalog: Catalog, data: DataConfig) -> None:
    """Items without an image are prompted by title alone; say how many there are, unless --images
    says it of all."""
    missing = sum(path is None for path in catalog.images)
    if missing and data.images != "none":
        print(
            f"{missing} of {len(catalog.ids)} items of {catalog.name} have no image: prompts show "
            "their titles alone"
        )


def print_budget(rows: Sequence[Row], micro_batch: int, backbone: Backbone) -> None:
    """Tokens of a micro-batch at its largest, so that memory can be judged before it runs out."""
    prompt = max(len(row.prompt) for row in rows)
    answer = max(row.answer_tokens for row in rows)
    image = max(row.prompt.count(backbone.image_token) for row in rows)
    print(
        f"{len(rows)} rows; prompts of up to {prompt} tokens ({image} of them images), answers of "
        f"up to {answer}; a micro-batch of {micro_batch} takes at most "
        f"{micro_batch * (prompt + answer):,} tokens; context {backbone.context}"
    )


# ---- negatives ----


def negatives_of(
    example: Example, seed: int, count: int = 1, near: Sequence[Tensor] = ()
) -> list[int]:
    """`count` of the example's negatives: at random, or those nearest to the target in one of the
    views in `near`, drawn at random.

    near: unit rows (N, d) of the catalogue, see `views`. A view in which the target is all zeros
    (it has no image) gives way to the first. The draw depends on the seed and on the example's own
    prompt.
    """
    negatives = [row for row in example.candidates if row not in example.targets]
    if len(negatives) < count:
        raise InputError(
            f"user {example.user!r}: {len(negatives)} negatives among the candidates, expected at "
            f"least {count}; raise --candidates"
        )
    rng = np.random.default_rng([seed, *example.candidates, *example.history])
    if not near:
        return rng.choice(negatives, count, replace=False).tolist()
    view = near[rng.integers(len(near))]
    if not view[example.target].any():
        view = near[0]
    likeness = view[negatives] @ view[example.target]  # (C - 1,)
    nearest = likeness.argsort(descending=True, stable=True)[:count]
    return [negatives[i] for i in nearest.tolist()]


def views(builder: PromptBuilder, kind: str) -> list[Tensor]:
    r"""What `negatives_of` calls near.

    random: nothing. same: e of HN-2, both modalities at once. chns: title alone, or image alone, so
    that the rejected item is what one modality confuses with the chosen one and the other has to
    tell apart (the argmax of BR-2, with the likeness to the chosen item as the modality's score).
    """
    if kind == "random":
        return []
    H, X, has_image = item_embeddings(builder.backbone, builder.catalog, builder.pictures)
    if kind == "same":
        return [fuse(H, X, has_image)]
    return [F.normalize(H, dim=1), F.normalize(X, dim=1)]


def rejected_items(
    builder: PromptBuilder, examples: Sequence[Example], seed: int, count: int, kind: str
) -> list[list[int]]:
    """`count` rejected items for each example: drawn as `views` knows the kind, or one that a file
    of picks names, see `load_picks`."""
    if kind not in NEGATIVES:
        return [[pick] for pick in load_picks(Path(kind), examples, builder.catalog)]
    near = views(builder, kind)
    return [negatives_of(example, seed, count, near) for example in examples]


# ---- the rows of each stage ----


def sft_rows(builder: PromptBuilder, examples: Sequence[Example], seed: int) -> list[Row]:
    """SFT-1's data. ranking: the target's title. binary: Yes on the target, and No on one negative.
    """
    rows = []
    for example in tqdm(examples, desc="prompts", disable=None, leave=False):
        if builder.config.targets > 1:
            rows.append(builder.list_row(example, [example.targets]))
        elif builder.config.task == "ranking":
            rows.append(builder.ranking_row(example, [example.target]))
        else:
            negative = negatives_of(example, seed)[0]
            rows.append(builder.binary_row(example, example.target, [prompts.YES]))
            rows.append(builder.binary_row(example, negative, [prompts.NO]))
    return rows


@dataclass(frozen=True)
class Preference:
    """One prompt and its preference pairs: a row with the answers (y_w, y_l, y_l ...), and the
    items (w, l, l ...) behind them, with --targets above 1 the first of each answer's."""

    row: Row
    chosen: int
    rejected: list[int]
    lists: list[list[int]] | None = None  # all items of each answer, where it has several

    @property
    def items(self) -> list[list[int]]:
        """The items of each answer, (1 + n, --targets), the chosen one's first."""
        return self.lists or [[item] for item in (self.chosen, *self.rejected)]


def preferences(
    builder: PromptBuilder,
    examples: Sequence[Example],
    seed: int,
    count: int = 1,
    kind: str = "random",
) -> list[Preference]:
    """ranking: the target's title against those of `count` negatives. binary: Yes against No on the
    target, No against Yes on one.

    kind: which negatives, see `rejected_items`. Raises InputError where two titles are equal: their
    log-probabilities always are, so nothing can be learnt; and for the binary task with a count
    above 1.
    """
    if builder.config.task == "binary" and count > 1:
        raise InputError(
            f"--rejected {count} with --task binary: expected 1, since the only other answer is "
            "No; use --task ranking"
        )
    size = builder.config.targets
    found, items = [], rejected_items(builder, examples, seed, count * size, kind)
    for i, example in enumerate(tqdm(examples, desc="prompts", disable=None, leave=False)):
        chosen, rejected = example.target, items[i]
        if size > 1:
            found.append(_list_preference(builder, example, rejected))
            continue
        if builder.config.task == "ranking":
            check_titles(builder.catalog, example, rejected)
            rows = [builder.ranking_row(example, [chosen, *rejected], chosen=1)]
        else:
            rows = [
                builder.binary_row(example, chosen, [prompts.YES, prompts.NO]),
                builder.binary_row(example, rejected[0], [prompts.NO, prompts.YES]),
            ]
        found += [Preference(row, chosen, rejected) for row in rows]
    return found


def _list_preference(
    builder: PromptBuilder, example: Example, rejected: Sequence[int]
) -> Preference:
    """The targets in one answer against as many of the rejected items in each of the others."""
    lists = [list(example.targets), *map(list, chunks(rejected, len(example.targets)))]
    row = builder.list_row(example, lists, chosen=1)
    return Preference(row, example.target, [one[0] for one in lists[1:]], lists)


def check_titles(catalog: Catalog, example: Example, rejected: Sequence[int]) -> None:
    """InputError where a rejected item has the title of the chosen one, the example's target."""
    chosen = example.target
    for row in rejected:
        if catalog.titles[chosen] == catalog.titles[row]:
            raise InputError(
                f"user {example.user!r}: items {catalog.ids[chosen]!r} and {catalog.ids[row]!r} "
                f"have one title {catalog.titles[chosen]!r}, expected two; the answer is a title, "
                "so they cannot be a pair"
            )


def scoring_rows(builder: PromptBuilder, examples: Sequence[Example]) -> list[Row]:
    """Evaluation. ranking: a row an example, its answers the candidates in order. binary: a row a
    candidate, Yes and No."""
    rows = []
    for example in examples:
        if builder.config.task == "ranking":
            rows.append(builder.ranking_row(example, example.candidates))
            continue
        for candidate in example.candidates:
            rows.append(builder.binary_row(example, candidate, [prompts.YES, prompts.NO]))
    return rows
