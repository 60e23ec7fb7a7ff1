"""From examples to rows, and from rows to batches, with all that it takes in one hand."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from hanorec.base.config import DataConfig
from hanorec.base.errors import InputError, shown
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example
from hanorec.mllm import items, prompts
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.collate import Batch, collate


@dataclass(frozen=True)
class PromptBuilder:
    """All that turns examples into rows, and rows into batches."""

    backbone: Backbone
    catalog: Catalog
    pictures: dict[int, ImageFeatures]
    config: DataConfig

    def __repr__(self) -> str:
        return f"<PromptBuilder: {self.config.task}, {self.backbone.family}, {self.catalog.name}>"

    @cached_property
    def shown(self) -> Catalog:
        """The catalogue as prompts and answers show it: with --max-title-tokens, long titles are
        cut, and counted aloud."""
        most = self.config.max_title_tokens
        if most is None:
            return self.catalog
        whole = self.catalog.titles
        titles = tuple(cut_title(self.backbone, title, most) for title in whole)
        cut = sum(title != full for title, full in zip(titles, whole, strict=True))
        print(
            f"note: {cut} of {len(whole)} titles take more than {most} tokens (--max-title-tokens) "
            "and are cut in prompts and answers"
        )
        return replace(self.catalog, titles=titles)

    def ranking_row(
        self, example: Example, answers: Sequence[int], chosen: int | None = None
    ) -> prompts.Row:
        """The ranking prompt of an example, answered by the titles of these catalogue rows.

        chosen: how many of them, from the first, are written as the user's own; default all.
        InputError where two titles are one sequence of tokens, so that no answer could tell them
        apart. Items of one title are not looked at: no candidate set holds them, a retriever may.
        """
        texts = [self.shown.titles[row] for row in answers]
        row = self._row(example, self.ranking_parts(example), self.quoted(texts, chosen))
        self.check_answers(example, answers, row.answers)
        return row

    def list_row(
        self, example: Example, answers: Sequence[Sequence[int]], chosen: int | None = None
    ) -> prompts.Row:
        """`ranking_row` where each answer is the titles of a list (--targets), a line each."""
        texts = []
        for answer in answers:
            texts.append("\n".join(self.shown.titles[row] for row in answer))
        return self._row(example, self.ranking_parts(example), self.quoted(texts, chosen))

    def quoted(self, texts: Sequence[str], chosen: int | None = None) -> list[str]:
        """Answers as --quotes writes them, the first `chosen` of them as the user's own."""
        quoted = list(texts)
        if self.config.quotes == "chosen":
            quoted[:chosen] = [f'"{text}"' for text in texts[:chosen]]
        return quoted

    def ranking_parts(self, example: Example) -> list[prompts.Part]:
        """Texts and images of an example's ranking prompt."""
        images, targets = self.config.candidate_images == "on", self.config.targets
        return prompts.ranking_parts(
            self.shown, example.history, example.candidates, images, targets
        )

    def binary_row(self, example: Example, target: int, answers: Sequence[str]) -> prompts.Row:
        """The binary prompt about one item, answered by Yes, No, or both."""
        parts = prompts.binary_parts(self.shown, example.history, target)
        return self._row(example, parts, answers)

    def check_answers(
        self, example: Example, answers: Sequence[int], tokens_of: Sequence[list[int]]
    ) -> None:
        """InputError as in `ranking_row`. tokens_of: the tokens of each answer."""
        ids, titles = self.catalog.ids, self.catalog.titles
        owner: dict[tuple[int, ...], int] = {}  # tokens -> the first item that has them
        for item, tokens in zip(answers, tokens_of, strict=True):
            other = owner.setdefault(tuple(tokens), item)
            if titles[other] == titles[item]:
                continue
            was_cut = self.shown.titles[item] != titles[item]
            remedy = "raise --max-title-tokens" if was_cut else "change one in the titles file"
            raise InputError(
                f"user {example.user!r}: items {ids[other]!r} and {ids[item]!r} have the titles "
                f"{shown(titles[other])} and {shown(titles[item])}, which are one sequence of "
                f"tokens to {self.backbone.path}, expected two; the answer is a title, so they "
                f"cannot be told apart: {remedy}"
            )

    def _row(
        self, example: Example, parts: list[prompts.Part], answers: Sequence[str]
    ) -> prompts.Row:
        tokens = [prompts.answer_ids(self.backbone, answer) for answer in answers]
        return prompts.encode_row(self.backbone, example.user, parts, self.pictures, tokens)

    def collate(self, rows: Sequence[prompts.Row], part: Sequence[int]) -> Batch:
        """The batch of those `rows` whose numbers are in `part`; unpacked with --plain."""
        chosen = [rows[i] for i in part]
        return collate(self.backbone, chosen, self.pictures, packed=not self.config.plain)

    def neighbors(self, k: int, form: str = "input") -> tuple[Tensor, Tensor, Tensor]:
        """HN-1 to HN-3 of the catalogue, see `hanorec.mllm.items.neighbors`.

        InputError where there are not so many others: k is --k.
        """
        n = len(self.catalog.ids)
        if not 1 <= k <= n - 1:
            raise InputError(
                f"--k {k}: K = {k} neighbours of {n} items, expected 1 .. {n - 1}; choose a "
                "smaller --k"
            )
        return items.neighbors(self.backbone, self.catalog, self.pictures, k, form)


def cut_title(backbone: Backbone, title: str, most: int) -> str:
    """The title, or the longest beginning of it that takes at most `most` tokens."""

    def takes(length: int) -> int:
        return len(prompts.text_ids(backbone, title[:length]))

    if takes(len(title)) <= most:
        return title
    # More letters take more tokens, but where a token ends with them: hence the steps back.
    length = bisect_right(range(len(title) + 1), most, key=takes) - 1
    while takes(length) > most:
        length -= 1
    beginning = title[:length].rstrip()
    if not beginning:
        raise InputError(
            f"--max-title-tokens {most}: the title {shown(title)} has a first character of more "
            f"tokens; raise it"
        )
    return beginning
