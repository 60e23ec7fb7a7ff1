"""Preference pairs that are told the wrong way round, and posters that hang on the wrong items.

What `hanorec.studies.map` does to data, so that it knows what is wrong with them. Neither touches a
script: swapped pairs are handed to train_dpo.py in the place of its own, exchanged posters lie in a
data folder.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanorec.base.config import DpoConfig
from hanorec.base.errors import InputError
from hanorec.base.files import whole_folder
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import Example
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.tasks import Preference, preferences
from hanorec.readings import GAPS
from hanorec.studies.map_rows import SHARE, WrongLabels


def hardness_gaps(builder: PromptBuilder, prompts: Sequence[Preference], dpo: DpoConfig) -> Tensor:
    """HN-4's Delta (P,) of the first pair of each prompt, in the form of the settings."""
    e, scores, index = builder.neighbors(dpo.k, dpo.embedding)
    w = torch.tensor([prompt.chosen for prompt in prompts], device=e.device)
    l = torch.tensor([prompt.rejected[0] for prompt in prompts], device=e.device)
    return GAPS[dpo.gap_form](e, scores, index, w, l)


def told_wrong(delta: np.ndarray, wrong: WrongLabels, seed: int) -> np.ndarray:
    """Which of P pairs are told wrong, ascending numbers; delta: (P,), small = hard.

    Those of a smaller rho are among those of a larger one.
    """
    order = delta.argsort(kind="stable")
    if wrong.which == "easiest":
        order = order[::-1]
    group = order[: round(SHARE * len(delta))]
    drawn = np.random.default_rng(seed).permutation(group)
    return np.sort(drawn[: round(wrong.rho * len(group))])


def swapped(prompt: Preference) -> Preference:
    """The pair the other way round: the rejected item is told to be the chosen one."""
    row = replace(prompt.row, answers=prompt.row.answers[::-1])
    (rejected,) = prompt.rejected
    return Preference(row, rejected, [prompt.chosen])


def wrong_preferences(wrong: WrongLabels) -> Callable[..., list[Preference]]:
    """`preferences` with wrong labels, by the document's Delta."""

    def found(
        builder: PromptBuilder, examples: Sequence[Example], seed: int, count: int, kind: str
    ) -> list[Preference]:
        if count > 1:
            raise InputError(
                f"--rejected {count} with wrong labels: expected 1, since a prompt of several "
                "pairs cannot have one of them the other way round")
        prompts = preferences(builder, examples, seed, count, kind)
        delta = hardness_gaps(builder, prompts, DpoConfig()).cpu().numpy()
        for i in told_wrong(delta, wrong, seed):
            prompts[i] = swapped(prompts[i])
        return prompts

    return found


def exchange_posters(data: str, out: Path, seed: int) -> None:
    """Copy a data folder; half of the items with an image get that of another one of that half."""
    catalog = load_catalog(Path(data))
    shown = [row for row, image in enumerate(catalog.images) if image is not None]
    half = np.random.default_rng(seed).permutation(shown)[: len(shown) // 2]
    if len(half) < 2:
        raise InputError(
            f"{data}: {len(shown)} items have an image, expected at least 4 to exchange half of "
            "them; leave the experiment E3 out, or use a data set with images")
    with whole_folder(out) as folder:
        shutil.copytree(
            data, folder, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("features-*", "candidates_*", ".*"))
        for row in half:
            (folder / catalog.images[row].relative_to(catalog.directory)).unlink()
        for row, other in zip(half, np.roll(half, 1), strict=True):
            source = catalog.images[other]
            place = catalog.images[row].relative_to(catalog.directory).with_suffix(source.suffix)
            shutil.copyfile(source, folder / place)
