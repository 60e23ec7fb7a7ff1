"""How many tokens the rows of examples take, without a forward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from hanorec.datasets.interactions import Example
from hanorec.mllm import prompts
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.tasks import negatives_of

NUMBER = 8  # bytes of an item's number in its list, with what stands around it


@dataclass(frozen=True)
class Ruler:
    """Measures the rows that a builder makes of examples.

    Its pictures may be stand-ins, as those of `hanorec.mllm.outline.outline_builder`.
    """

    builder: PromptBuilder
    seed: int  # of a training run

    # ---- at once ----

    @cached_property
    def costs(self) -> list[int]:
        """The most tokens that each item can take in a list: a token of text is a byte or more."""
        around = sum(map(len, self.builder.backbone.around_image()))
        costs = []
        for row, title in enumerate(self.builder.shown.titles):
            picture = self.builder.pictures.get(row)
            of_image = 0 if picture is None else len(picture.features) + around
            costs.append(len(title.encode()) + NUMBER + of_image)
        return costs

    @cached_property
    def dearest(self) -> int:
        """That of the item that can take most."""
        return max(self.costs)

    @cached_property
    def frame(self) -> int:
        """The most tokens of all else: the turn, the questions, the longest answer."""
        turn = self.builder.backbone.turn
        texts = [turn.before, turn.after, turn.lead, turn.ending]
        texts += [prompts.HISTORY, prompts.WHICH, prompts.TITLE_ALONE, prompts.TITLES_ALONE]
        texts += [prompts.WHETHER, prompts.YES_OR_NO]
        answer = self.builder.config.targets * (self.dearest + NUMBER)
        return len("".join(texts).encode()) + answer

    def at_most(self, example: Example) -> int:
        """No row of the example takes more, whatever candidates may be drawn for it."""
        shown = [*example.history, *example.candidates]
        tokens = self.frame + sum(self.costs[row] for row in shown)
        if not example.candidates:
            tokens += self.builder.config.candidates * self.dearest
        return tokens

    # ---- exactly ----

    @cached_property
    def answer_length(self) -> Callable[[str], int]:
        """Tokens of an answer."""
        return cache(lambda text: len(prompts.answer_ids(self.builder.backbone, text)))

    def longest(self, example: Example, training: bool) -> tuple[int, int]:
        """Tokens of the example's longest row with the longest of its answers, and how many of them
        are of images.

        training: a row of the ranking task may be answered by any candidate in either case, since
        DPO rejects some, and of several titles (--targets) by those that take most tokens; of the
        binary task training takes two candidates, evaluation all.
        """
        return max(self._lengths(example, training))

    def _lengths(self, example: Example, training: bool) -> Iterator[tuple[int, int]]:
        backbone, pictures = self.builder.backbone, self.builder.pictures
        for parts, answers in self._prompts(example, training):
            ids, _ = prompts.prompt_ids(backbone, example.user, parts, pictures)
            yield len(ids) + max(map(self.answer_length, answers)), ids.count(backbone.image_token)

    def _prompts(
        self, example: Example, training: bool
    ) -> Iterator[tuple[list[prompts.Part], Sequence[str]]]:
        shown = self.builder.shown
        if self.builder.config.task == "ranking":
            titles = [shown.titles[row] for row in example.candidates]
            targets = self.builder.config.targets
            if targets > 1:
                longest = sorted(titles, key=self.answer_length, reverse=True)
                titles = ["\n".join(longest[:targets])]
            yield self.builder.ranking_parts(example), titles
            return
        items = list(example.candidates)
        if training:
            items = [example.target, negatives_of(example, self.seed)[0]]
        for item in items:
            parts = prompts.binary_parts(shown, example.history, item)
            yield parts, [prompts.YES, prompts.NO]

    def fits(self, example: Example, training: bool) -> bool:
        """Whether all rows of the example are within the context."""
        context = self.builder.backbone.context
        return self.at_most(example) <= context or self.longest(example, training)[0] <= context
