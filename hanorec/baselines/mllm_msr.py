r"""MLLM-MSR: a summary of what a user likes, brought up to date block by block of the history, then
Yes or No on one item (MR-2).

Two forms make the summaries, each in a file of its own: msr_texts.py has the base describe and
summarise ("generated"), msr_words.py collects words ("extractive", ours) for bases that cannot
write. What follows is the same for both: the loop of train_sft.py on the `sft_rows` of a
`ProfileBuilder`, and log P(Yes) - log P(No) of its `scoring_rows`.

Source: MLLM-MSR (arXiv 2408.09698; YuyangYe/MLLM-MSR), with one base for all stages.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hanorec.base.errors import InputError
from hanorec.datasets.interactions import Example, Rows
from hanorec.mllm import prompts
from hanorec.mllm.builder import PromptBuilder

BLOCK = 3  # items in an update (MLLM-MSR)
KNOWN = "What a user likes: "

S = TypeVar("S")
Summaries = dict[tuple[str, Rows], str]  # user and history -> S_K


# ---- stage 2: one update a block ----


def running(
    histories: Iterable[Rows], first: S, update: Callable[[dict[Rows, S]], Mapping[Rows, S]]
) -> dict[Rows, S]:
    r"""S_K of each history: its last summary, K = ceil(n / 3) updates after S_0.

    Args:
        histories: oldest first. first: S_0.
        update: {items up to and with block k: S_{k-1}} -> {the same items: S_k}, of all histories
            that have a k-th block at once.
    """
    histories = list(dict.fromkeys(histories))
    states = {(): first}
    for start in range(0, max(map(len, histories), default=0), BLOCK):
        due = {h[: start + BLOCK]: states[h[:start]] for h in histories if len(h) > start}
        # MR-2: S_k = f(S_{k-1}, B_k)
        states |= update(due)
    return {history: states[history] for history in histories}


def last_block(items: Rows) -> Rows:
    """The items of the block that `items` end with."""
    return items[(len(items) - 1) // BLOCK * BLOCK :]


# ---- stage 3: Yes or No ----


def known_parts(summary: str) -> list[prompts.Part]:
    """How a prompt begins: with what is known of the user; "" is nothing."""
    return [KNOWN, summary, "\n"] if summary else []


@dataclass(frozen=True)
class ProfileBuilder(PromptBuilder):
    """A builder whose binary prompt has a summary in place of the history, or with "" nothing."""

    summaries: Summaries

    def binary_row(self, example: Example, target: int, answers: Sequence[str]) -> prompts.Row:
        """The prompt about one item: the summary, its image and its title."""
        summary = self.summaries[example.user, example.history]
        item = prompts.listed(self.shown, [target])
        parts = [*known_parts(summary), prompts.WHETHER, *item, prompts.YES_OR_NO]
        return self._row(example, parts, answers)


def profile_builder(builder: PromptBuilder, summaries: Summaries) -> ProfileBuilder:
    """The builder of stage 3. InputError: it is not for the binary task."""
    if builder.config.task != "binary":
        raise InputError(
            f"--task {builder.config.task}: expected binary, since MLLM-MSR answers Yes or No on "
            "one item"
        )
    return ProfileBuilder(
        builder.backbone, builder.catalog, builder.pictures, builder.config, summaries
    )


# ---- controls ----


def no_summaries(summaries: Summaries) -> Summaries:
    """Nothing of the user: the prompt shows the target alone."""
    return dict.fromkeys(summaries, "")


def other_summaries(summaries: Summaries, seed: int) -> Summaries:
    """For each user the last summary of another one, by a cycle through all of them."""
    last = {user: text for (user, _), text in summaries.items()}
    if len(last) < 2:
        raise InputError(
            f"summaries of {len(last)} users, expected at least 2, so that another one's can be "
            "shown; widen --users-from, --users-to"
        )
    users = np.random.default_rng(seed).permutation(sorted(last)).tolist()
    giver = dict(zip(users, users[1:] + users[:1], strict=True))
    return {(user, history): last[giver[user]] for user, history in summaries}
