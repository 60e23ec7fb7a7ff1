"""From items to token ids: the two prompts, the answer, and the packed batch [prompt | answer | answer ...].

One shape serves every stage: SFT has one answer to a prompt, DPO two (chosen, rejected), evaluation one for each candidate.
Answers that share a prompt share its row; a mask keeps them from seeing one another, and each starts at the same position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby

import torch
from jinja2 import TemplateError
from torch import Tensor

from hanorec.backbone import Backbone, Picture, prompt_positions
from hanorec.catalog import Catalog
from hanorec.errors import InputError

Part = str | int  # a text, or the row of the item whose image stands here
SLOT = "\ue000"  # stands for the user's turn while the chat template is rendered; a private-use character
YES, NO = "Yes", "No"
HISTORY = "A user chose these items, oldest first:\n"
WHICH = "Which of these candidates does the user choose next?\n"
TITLE_ALONE = "Answer with the title alone."
WHETHER = "Does the user choose this item next?\n"
YES_OR_NO = f"Answer {YES} or {NO}."


def ranking_parts(catalog: Catalog, history: Sequence[int], candidates: Sequence[int], images: bool = True) -> list[Part]:
    """The ranking prompt: history and candidates, each title with its image; images=False leaves the candidates' images out."""
    return [HISTORY, *listed(catalog, history), WHICH, *listed(catalog, candidates, images), TITLE_ALONE]


def binary_parts(catalog: Catalog, history: Sequence[int], target: int) -> list[Part]:
    """The binary prompt: history and one target item."""
    return [HISTORY, *listed(catalog, history), WHETHER, *listed(catalog, [target]), YES_OR_NO]


def listed(catalog: Catalog, rows: Sequence[int], images: bool = True) -> list[Part]:
    """A numbered list of items, a line each: image if it has one, then title, so that the title's tokens have seen the image."""
    parts: list[Part] = []
    for number, row in enumerate(rows, 1):
        parts.append(f"{number}. ")
        if images and catalog.images[row] is not None:
            parts.append(row)
        parts.append(f"{catalog.titles[row]}\n")
    return parts


def text_ids(backbone: Backbone, text: str) -> list[int]:
    """Tokens of untrusted text: what looks like a special token in it is spelt out, so a title cannot open a turn or an image."""
    return backbone.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def answer_ids(backbone: Backbone, text: str) -> list[int]:
    """Tokens of an answer, end-of-turn included."""
    return [*text_ids(backbone, text), backbone.tokenizer.eos_token_id]


def turn(backbone: Backbone) -> tuple[list[int], list[int]]:
    """Tokens before and after the user's text, up to where the assistant's answer starts, from the chat template if there is one."""
    tokenizer = backbone.tokenizer
    if backbone.template is None:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [*start, *text_ids(backbone, "User: ")], text_ids(backbone, "\nAssistant: ")
    for content in (SLOT, [{"type": "text", "text": SLOT}]):  # text models want a string, LLaVA a list
        try:
            rendered = tokenizer.apply_chat_template([{"role": "user", "content": content}], chat_template=backbone.template,
                                                     tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError):  # a template may refuse the form that it is not made for
            continue
        if rendered.count(SLOT) == 1 and "'type'" not in rendered:
            return tuple(tokenizer.encode(side, add_special_tokens=False) for side in rendered.split(SLOT))
    raise InputError(f"{backbone.path}: its chat template does not render the user's text once, expected a template that does; "
                     "is it the template of another model?")


@dataclass(frozen=True)
class Row:
    """One prompt with the answers that share it. positions: (R, S) of the prompt. images: catalogue rows in order."""

    name: str  # for messages: the user
    prompt: list[int]
    positions: Tensor
    images: list[int]
    answers: list[list[int]]


def encode_row(backbone: Backbone, name: str, parts: list[Part], pictures: dict[int, Picture], answers: list[list[int]]) -> Row:
    """Tokens and positions of a prompt.

    Raises InputError where prompt and longest answer do not fit the model's context. Nothing is ever cut off.
    """
    before, after = turn(backbone)
    start, end = backbone.around_image()
    ids, images = list(before), []
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        if is_text:
            ids += text_ids(backbone, "".join(group))
            continue
        for item in group:
            images.append(item)
            ids += [*start, *[backbone.image_token] * len(pictures[item].features), *end]
    ids += after
    longest = len(ids) + max(len(answer) for answer in answers)
    if longest > backbone.context:
        raise InputError(f"user {name}: prompt and answer take {longest} tokens, but {backbone.path} has a context of "
                         f"{backbone.context}; lower --max-pixels, switch off --candidate-images, or shorten --history")
    positions = prompt_positions(backbone, ids, [pictures[row].grid for row in images])
    return Row(name, ids, positions, images, answers)


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the left. B rows, T tokens, A answers a row, M answer tokens in all."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (R, B, T)
    mask: Tensor  # (B, T) bool-like where A = 1, else (B, 1, T, T) additive: 0 = may look, lowest number = may not
    pictures: Tensor  # (n, d): features of all images, in order
    labels: Tensor  # (B, T): the answer's own tokens, -100 elsewhere; for A = 1
    keep: int  # all answers, and the position before them, lie in the last `keep` columns
    row: Tensor  # (M,) row of each answer token
    query: Tensor  # (M,) the column, among the last `keep`, whose logits predict it
    token: Tensor  # (M,)
    answer: Tensor  # (M,) number of its answer, row * A + a
    answers: int  # A

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()})


def collate(backbone: Backbone, rows: Sequence[Row], pictures: dict[int, Picture]) -> Batch:
    """Pack and pad rows. ValueError where they do not all have the same number of answers."""
    if len({len(row.answers) for row in rows}) != 1:
        raise ValueError(f"rows with {[len(row.answers) for row in rows]} answers in one batch, expected equally many")
    count, pad = len(rows[0].answers), backbone.tokenizer.pad_token_id or 0
    lengths = [sum(map(len, row.answers)) for row in rows]
    width, keep = max(len(row.prompt) + n for row, n in zip(rows, lengths, strict=True)), max(lengths) + 1
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    positions = torch.zeros(len(rows[0].positions), len(rows), width, dtype=torch.long)
    segment = torch.full((len(rows), width), -1)  # -1 pad, 0 prompt, 1 .. A answers
    where = []  # (row, query, token, answer)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        at = width - n - len(row.prompt)
        ids[b, at : width - n], segment[b, at : width - n] = torch.tensor(row.prompt), 0
        positions[:, b, at : width - n] = row.positions
        at, last = width - n, width - n - 1  # last = the prompt's last column, which predicts every answer's first token
        for a, answer in enumerate(row.answers):
            to = slice(at, at + len(answer))
            ids[b, to] = labels[b, to] = torch.tensor(answer)
            segment[b, to] = a + 1
            positions[:, b, to] = row.positions.max() + 1 + torch.arange(len(answer))  # each answer starts anew
            queries = [last, *range(at, at + len(answer) - 1)]
            where += [(b, q - (width - keep), t, b * count + a) for q, t in zip(queries, answer, strict=True)]
            at += len(answer)
    mask = (segment >= 0).long() if count == 1 else packed_mask(segment)
    flat = [pictures[i].features for row in rows for i in row.images]
    features = torch.cat(flat) if flat else torch.zeros(0, backbone.width)
    return Batch(ids, positions, mask, features, labels, keep, *torch.tensor(where).T, count).to(backbone.device)


def packed_mask(segment: Tensor) -> Tensor:
    """Who may look at whom: (B, T) segments -> (B, 1, T, T) additive float32. A token sees, at or before itself, the prompt
    (segment 0) and its own answer; padding (-1) sees padding alone, since a row without any key has no softmax."""
    q, k = segment[:, None, :, None], segment[:, None, None, :]
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool).tril()
    allowed = causal & ((k == q) | ((k == 0) & (q > 0)))  # (B, 1, T, T)
    return torch.where(allowed, 0.0, torch.finfo(torch.bfloat16).min)  # bfloat16's lowest is finite in float32 too
