"""From items to token ids: the two prompts, the answer, and the packed batch [prompt | answer | answer ...].

One shape serves every stage: SFT has one answer to a prompt, DPO two (chosen, rejected), evaluation one for each candidate.
Answers that share a prompt share its row; a mask keeps them from seeing one another, and each starts at the same position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby

import torch
from jinja2 import TemplateError
from torch import Tensor

from hanorec.base.errors import InputError
from hanorec.datasets.catalog import Catalog
from hanorec.mllm.backbone import Backbone, ImageFeatures, prompt_positions

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
    """Tokens of untrusted text: what looks like a special token in it is spelt out, so a title cannot open a turn or an image.

    Some checkpoints have markers of turns among their tokens that are not called special; the text is cut within those.
    """
    pieces = backbone.inside_tokens.split(text)
    return [token for piece in pieces for token in backbone.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)]


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
        except (ValueError, ArithmeticError, RecursionError, LookupError, AttributeError) as error:  # 1 / 0, a range of 10^9, a macro that calls itself
            raise InputError(f"{backbone.path}: its chat template cannot be rendered ({type(error).__name__}: {error}), expected one that renders a "
                             "user's message; copy the template of the same checkpoint") from None
        if rendered.count(SLOT) == 1 and "'type'" not in rendered:
            sides = tuple(tokenizer.encode(side, add_special_tokens=False) for side in rendered.split(SLOT))
            if any(backbone.image_token in side for side in sides):
                break
            return sides
    raise InputError(f"{backbone.path}: its chat template does not render the user's text once and without an image of its own, expected a "
                     "template that does; is it the template of another model?")


@dataclass(frozen=True)
class Row:
    """One prompt with the answers that share it. positions: (R, S) of the prompt. images: catalogue rows in order."""

    name: str  # for messages: the user
    prompt: list[int]
    positions: Tensor
    images: list[int]
    answers: list[list[int]]


def encode_row(backbone: Backbone, name: str, parts: list[Part], pictures: Mapping[int, ImageFeatures], answers: list[list[int]]) -> Row:
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
    """Rows side by side: prompts from the left, padded to P columns, then all answers, N columns. B rows, T = P + N, A answers a row,
    M answer tokens in all. With one answer a row it follows its prompt at once, and no mask is needed."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (R, B, T)
    mask: Tensor | None  # (B, 1, N, T) additive, 0 = the answer's token may look, lowest number = it may not; None where A = 1
    pictures: Tensor  # (n, d): features of all images, in order
    columns: Tensor  # (B, L): the columns whose logits predict answers: the prompt's last, then the answers'; the head runs on no others
    labels: Tensor  # (B, L): the answers' tokens at their own columns, -100 elsewhere
    row: Tensor  # (M,) row of each answer token
    query: Tensor  # (M,) which of the L columns predicts it
    token: Tensor  # (M,)
    answer: Tensor  # (M,) number of its answer, from 0 to size[0] * size[1] - 1
    size: tuple[int, int]  # prompts, and answers to each: the shape of what `answer_log_probs` returns

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()})


def collate(backbone: Backbone, rows: Sequence[Row], pictures: Mapping[int, ImageFeatures], packed: bool = True) -> Batch:
    """Pack and pad rows. packed=False is the plain path, a row an answer: its prompt is computed once for each of them.

    ValueError where the rows do not all have the same number of answers.
    """
    if len({len(row.answers) for row in rows}) != 1:
        raise ValueError(f"rows with {[len(row.answers) for row in rows]} answers in one batch, expected equally many")
    size = len(rows), len(rows[0].answers)
    if not packed:
        rows = [replace(row, answers=[answer]) for row in rows for answer in row.answers]
    count, pad = len(rows[0].answers), backbone.tokenizer.pad_token_id or 0
    prompts, lengths = [len(row.prompt) for row in rows], [sum(map(len, row.answers)) for row in rows]
    starts = prompts if count == 1 else [max(prompts)] * len(rows)  # where a row's answers begin
    width, kept = max(start + n for start, n in zip(starts, lengths, strict=True)), max(lengths) + 1
    ids = torch.full((len(rows), width), pad)
    positions = torch.zeros(len(rows[0].positions), len(rows), width, dtype=torch.long)
    segment = torch.full((len(rows), width), -1)  # -1 pad, 0 prompt, 1 .. A answers
    columns, labels = torch.zeros(len(rows), kept, dtype=torch.long), torch.full((len(rows), kept), -100)
    where = []  # (row, query, token, answer)
    for b, (row, start, n) in enumerate(zip(rows, starts, lengths, strict=True)):
        end = len(row.prompt)
        ids[b, :end], segment[b, :end] = torch.tensor(row.prompt), 0
        positions[:, b, :end] = row.positions
        columns[b, : n + 1] = torch.tensor([end - 1, *range(start, start + n)])
        at = 0  # columns of this row's answers so far
        for a, answer in enumerate(row.answers):
            to = slice(start + at, start + at + len(answer))
            ids[b, to] = labels[b, at + 1 : at + 1 + len(answer)] = torch.tensor(answer)
            segment[b, to] = a + 1
            positions[:, b, to] = row.positions.max() + 1 + torch.arange(len(answer))  # each answer starts anew
            queries = [0, *range(at + 1, at + len(answer))]  # the prompt's last token predicts every answer's first
            where += [(b, q, t, b * count + a) for q, t in zip(queries, answer, strict=True)]
            at += len(answer)
    mask = None if count == 1 else answer_mask(segment, max(lengths))
    flat = [pictures[i].features for row in rows for i in row.images]
    features = torch.cat(flat) if flat else torch.zeros(0, backbone.width)
    return Batch(ids, positions, mask, features, columns, labels, *torch.tensor(where).T, size).to(backbone.device)


def answer_mask(segment: Tensor, n: int) -> Tensor:
    """Who the last n columns may look at: (B, T) segments -> (B, 1, n, T) additive float32. An answer's token sees the prompt
    (segment 0) and, at or before itself, its own answer; padding (-1) sees padding alone, since a row without any key has no softmax."""
    q, k = segment[:, None, -n:, None], segment[:, None, None, :]
    causal = torch.ones(n, segment.shape[1], dtype=torch.bool).tril(segment.shape[1] - n)
    allowed = causal & ((k == q) | ((k == 0) & (q > 0)))  # (B, 1, n, T)
    return torch.where(allowed, 0.0, torch.finfo(torch.bfloat16).min)  # bfloat16's lowest is finite in float32 too
