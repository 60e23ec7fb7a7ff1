"""The two tasks as rows: what is asked, and which answers are compared, for SFT, for DPO and for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from hanorec import prompts
from hanorec.backbone import Backbone, Picture
from hanorec.candidates import draw_candidates, draw_hard_candidates
from hanorec.catalog import Catalog, load_catalog
from hanorec.config import DataConfig, TrainConfig
from hanorec.errors import InputError
from hanorec.interactions import Example, load_interactions, select_users, training_examples
from hanorec.items import encode_pictures, neighbors
from hanorec.prompts import Row


@dataclass(frozen=True)
class Source:
    """All that turns examples into rows."""

    backbone: Backbone
    catalog: Catalog
    pictures: dict[int, Picture]
    config: DataConfig

    def ranking_row(self, example: Example, answers: Sequence[int]) -> Row:
        """The ranking prompt of an example, answered by the titles of these catalogue rows."""
        parts = prompts.ranking_parts(self.catalog, example.history, example.candidates, self.config.candidate_images == "on")
        tokens = [prompts.answer_ids(self.backbone, self.catalog.titles[row]) for row in answers]
        return prompts.encode_row(self.backbone, example.user, parts, self.pictures, tokens)

    def binary_row(self, example: Example, target: int, answers: Sequence[str]) -> Row:
        """The binary prompt about one item, answered by Yes, No, or both."""
        parts = prompts.binary_parts(self.catalog, example.history, target)
        return prompts.encode_row(self.backbone, example.user, parts, self.pictures, [prompts.answer_ids(self.backbone, a) for a in answers])


def load_examples(backbone: Backbone, data: DataConfig, config: TrainConfig, whole_catalog: bool) -> tuple[Source, list[Example]]:
    """What both stages start from: the training examples with their candidates, and the pictures (of the whole catalogue or
    of what the prompts show)."""
    catalog = load_catalog(data.data)
    interactions = load_interactions(data.data, catalog)
    users = select_users(interactions.train, data.users_from, data.users_to, data.users_seed)
    examples = training_examples(interactions, config.targets_per_user, data.history, users)
    if without := len(users) - len({example.user for example in examples}):
        print(f"{without} of {len(users)} users have a single training item, so they give no example")
    if not examples:
        raise InputError(f"{data.data}: none of the {len(users)} users has two training items, expected some; choose other users or more data")
    print_missing_images(catalog)
    if config.draw == "random":
        examples = draw_candidates(examples, catalog, data.negatives, config.seed)
    whole_catalog = whole_catalog or config.draw == "hard"
    pictures = encode_pictures(backbone, catalog, range(len(catalog.ids)) if whole_catalog else used_rows(examples))
    if config.draw == "hard":
        _, _, index = neighbors(backbone, catalog, pictures, data.neighbors)
        examples = draw_hard_candidates(examples, catalog, index.cpu().numpy(), data.negatives, config.seed)
    return Source(backbone, catalog, pictures, data), examples


def print_missing_images(catalog: Catalog) -> None:
    """Items without an image are prompted by title alone; say how many there are."""
    if missing := sum(path is None for path in catalog.images):
        print(f"{missing} of {len(catalog.ids)} items of {catalog.name} have no image: prompts show their titles alone")


def used_rows(examples: Sequence[Example]) -> set[int]:
    """Every catalogue row that a prompt of these examples may show."""
    return {row for example in examples for row in (*example.history, *example.candidates)}


def negative_of(example: Example, seed: int) -> int:
    """One of the example's negatives, drawn uniformly; it depends on the seed and on the example's own candidate set."""
    negatives = [row for row in example.candidates if row != example.target]
    if not negatives:
        raise InputError(f"user {example.user!r}: no negative among the candidates, expected at least one; raise --negatives")
    return int(np.random.default_rng([seed, *example.candidates, *example.history]).choice(negatives))


def sft_rows(source: Source, examples: Sequence[Example], seed: int) -> list[Row]:
    """SFT-1's data. ranking: the target's title. binary: Yes on the target, and No on one negative."""
    rows = []
    for example in tqdm(examples, desc="prompts", disable=None, leave=False):
        if source.config.task == "ranking":
            rows.append(source.ranking_row(example, [example.target]))
        else:
            rows.append(source.binary_row(example, example.target, [prompts.YES]))
            rows.append(source.binary_row(example, negative_of(example, seed), [prompts.NO]))
    return rows


@dataclass(frozen=True)
class Pair:
    """One preference pair: a row with the answers (y_w, y_l), and the two items (w, l) whose likeness is its hardness."""

    row: Row
    chosen: int
    rejected: int


def preference_pairs(source: Source, examples: Sequence[Example], seed: int) -> list[Pair]:
    """ranking: the target's title against one negative's. binary: Yes against No on the target, No against Yes on one negative.

    Raises InputError where the two titles are equal: their log-probabilities always are, so nothing can be learnt.
    """
    pairs = []
    for example in tqdm(examples, desc="prompts", disable=None, leave=False):
        chosen, rejected = example.target, negative_of(example, seed)
        if source.config.task == "ranking":
            titles, ids = source.catalog.titles, source.catalog.ids
            if titles[chosen] == titles[rejected]:
                raise InputError(f"user {example.user!r}: items {ids[chosen]!r} and {ids[rejected]!r} have one title {titles[chosen]!r}, "
                                 "expected two; the answer is a title, so they cannot be a pair")
            pairs.append(Pair(source.ranking_row(example, [chosen, rejected]), chosen, rejected))
        else:
            pairs.append(Pair(source.binary_row(example, chosen, [prompts.YES, prompts.NO]), chosen, rejected))
            pairs.append(Pair(source.binary_row(example, rejected, [prompts.NO, prompts.YES]), chosen, rejected))
    return pairs


def scoring_rows(source: Source, examples: Sequence[Example]) -> list[Row]:
    """Evaluation. ranking: a row an example, its answers the candidates in order. binary: a row a candidate, Yes and No."""
    if source.config.task == "ranking":
        return [source.ranking_row(example, example.candidates) for example in examples]
    return [source.binary_row(example, c, [prompts.YES, prompts.NO]) for example in examples for c in example.candidates]


def single_answer(row: Row, a: int) -> Row:
    """The same prompt with one of its answers: the plain path that the packed one is compared with."""
    return replace(row, answers=[row.answers[a]])
