"""From items to token ids: the two prompts, the answer, and the row of a prompt with its answers.

One shape serves every stage: SFT has one answer to a prompt, DPO two (chosen, rejected), evaluation
one for each candidate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from hanorec.base.errors import InputError
from hanorec.datasets.catalog import Catalog
from hanorec.mllm.backbone import Backbone, ImageFeatures, prompt_positions

Part = str | int  # a text, or the row of the item whose image stands here

HISTORY = "A user chose these items, oldest first:\n"
WHICH = "Which of these candidates does the user choose next?\n"
TITLE_ALONE = "Answer with the title alone."

YES, NO = "Yes", "No"
WHETHER = "Does the user choose this item next?\n"
YES_OR_NO = f"Answer {YES} or {NO}."

# Stands for the user's turn while the chat template is rendered; a private-use character.
SLOT = "\ue000"


# ---- texts ----


def ranking_parts(
    catalog: Catalog, history: Sequence[int], candidates: Sequence[int], images: bool = True
) -> list[Part]:
    """The ranking prompt: history and candidates, each title with its image; images=False leaves
    the candidates' images out."""
    return [
        HISTORY,
        *listed(catalog, history),
        WHICH,
        *listed(catalog, candidates, images),
        TITLE_ALONE,
    ]


def binary_parts(catalog: Catalog, history: Sequence[int], target: int) -> list[Part]:
    """The binary prompt: history and one target item."""
    return [HISTORY, *listed(catalog, history), WHETHER, *listed(catalog, [target]), YES_OR_NO]


def listed(catalog: Catalog, rows: Sequence[int], images: bool = True) -> list[Part]:
    """A numbered list of items, a line each: image if it has one, then title, so that the title's
    tokens have seen the image."""
    parts: list[Part] = []
    for number, row in enumerate(rows, 1):
        parts.append(f"{number}. ")
        if images and catalog.images[row] is not None:
            parts.append(row)
        parts.append(f"{catalog.titles[row]}\n")
    return parts


# ---- tokens ----


def text_ids(backbone: Backbone, text: str) -> list[int]:
    """Tokens of untrusted text: what looks like a special token in it is spelt out, so a title
    cannot open a turn or an image.

    Some checkpoints have markers of turns among their tokens that are not called special; the text
    is cut within those.
    """
    encode = backbone.tokenizer.encode
    ids: list[int] = []
    for piece in backbone.inside_tokens.split(text):
        ids += encode(piece, add_special_tokens=False, split_special_tokens=True)
    return ids


def answer_ids(backbone: Backbone, text: str) -> list[int]:
    """Tokens of an answer, end-of-turn included."""
    return [*text_ids(backbone, text), backbone.tokenizer.eos_token_id]


def turn(backbone: Backbone) -> tuple[list[int], list[int]]:
    """Tokens before and after the user's text, up to where the assistant's answer starts, from the
    chat template if there is one.

    InputError where the template is broken, or is no frame around one text.
    """
    tokenizer = backbone.tokenizer
    if backbone.template is None:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [*start, *text_ids(backbone, "User: ")], text_ids(backbone, "\nAssistant: ")
    for content in (SLOT, [{"type": "text", "text": SLOT}]):  # text models: a string, LLaVA: a list
        rendered = _rendered(backbone, content)
        if rendered is None or rendered.count(SLOT) != 1 or "'type'" in rendered:
            continue
        before, after = rendered.split(SLOT)
        before = tokenizer.encode(before, add_special_tokens=False)
        after = tokenizer.encode(after, add_special_tokens=False)
        if backbone.image_token in before or backbone.image_token in after:
            break
        return before, after
    raise InputError(
        f"{backbone.path}: its chat template does not render the user's text once and without an "
        "image of its own, expected a template that does; is it the template of another model?"
    )


def _rendered(backbone: Backbone, content: Any) -> str | None:
    """The chat template around a user's message; None where it refuses this form of content."""
    message = {"role": "user", "content": content}
    try:
        return backbone.tokenizer.apply_chat_template(
            [message], chat_template=backbone.template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError):  # a template may refuse the form that it is not made for
        return None
    # 1 / 0, a range of 10^9, a macro that calls itself
    except (ValueError, ArithmeticError, RecursionError, LookupError, AttributeError) as error:
        raise InputError(
            f"{backbone.path}: its chat template cannot be rendered "
            f"({type(error).__name__}: {error}), expected one that renders a user's message; copy "
            "the template of the same checkpoint"
        ) from None


# ---- rows ----


@dataclass(frozen=True)
class Row:
    """One prompt of S tokens with the answers that share it."""

    name: str  # for messages: the user
    prompt: list[int]
    positions: Tensor  # (R, S) of the prompt, as in `prompt_positions`
    images: list[int]  # catalogue rows, in the order of the prompt
    answers: list[list[int]]

    @property
    def answer_tokens(self) -> int:
        """How many tokens its answers have, in all."""
        return sum(map(len, self.answers))


def encode_row(
    backbone: Backbone,
    name: str,
    parts: list[Part],
    pictures: Mapping[int, ImageFeatures],
    answers: list[list[int]],
) -> Row:
    """Tokens and positions of a prompt.

    Raises InputError where prompt and longest answer do not fit the model's context. Nothing is
    ever cut off.
    """
    before, after = turn(backbone)
    start, end = backbone.around_image()
    ids, images = list(before), []
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        if is_text:  # in one piece, since tokens may reach over its parts
            ids += text_ids(backbone, "".join(group))
            continue
        for item in group:
            images.append(item)
            ids += [*start, *[backbone.image_token] * len(pictures[item].features), *end]
    ids += after
    longest = len(ids) + max(len(answer) for answer in answers)
    if longest > backbone.context:
        raise InputError(
            f"user {name}: prompt and answer take {longest} tokens, but {backbone.path} has a "
            f"context of {backbone.context}; lower --max-pixels, switch off --candidate-images, or "
            "shorten --history"
        )
    positions = prompt_positions(backbone, ids, [pictures[row].grid for row in images])
    return Row(name, ids, positions, images, answers)
