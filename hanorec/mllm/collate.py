"""The packed batch [prompt | answer | answer ...]: rows side by side, as one forward takes them.

Answers that share a prompt share its row; a mask keeps them from seeing one another, and each
starts at the same position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.prompts import Row


@dataclass(frozen=True)
class Batch:
    """Rows side by side: prompts from the left, padded to P columns, then all answers, N columns.

    B rows, T = P + N, A answers a row, M answer tokens in all. With one answer a row it follows its
    prompt at once, and no mask is needed. L columns predict answers: the prompt's last, then the
    answers' own. The head runs on no others.
    """

    ids: Tensor  # (B, T)
    positions: Tensor  # (R, B, T)
    mask: Tensor | None  # (B, 1, N, T), see `answer_mask`; None where A = 1
    pictures: Tensor  # (n, d): features of all images, in order
    columns: Tensor  # (B, L): the columns whose logits predict answers
    labels: Tensor  # (B, L): the answers' tokens at their own columns, -100 elsewhere
    row: Tensor  # (M,) row of each answer token
    query: Tensor  # (M,) which of the L columns predicts it
    token: Tensor  # (M,)
    answer: Tensor  # (M,) number of its answer, from 0 to size[0] * size[1] - 1
    size: tuple[int, int]  # prompts, and answers to each: what `answer_log_probs` returns

    def __repr__(self) -> str:
        return f"<Batch: {self.ids.shape[0]} rows of {self.ids.shape[1]} columns, size {self.size}>"

    def to(self, device: torch.device) -> "Batch":
        """The batch with all its tensors on the device."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and device.type == "cuda":
                # From pinned memory the host need not wait: it collates on while the device works.
                value = value.pin_memory().to(device, non_blocking=True)
            moved[field.name] = value
        return Batch(**moved)


def collate(
    backbone: Backbone,
    rows: Sequence[Row],
    pictures: Mapping[int, ImageFeatures],
    packed: bool = True,
) -> Batch:
    """Pack and pad rows.

    packed=False is the plain path, a row an answer: its prompt is computed once for each of them.
    ValueError where the rows do not all have the same number of answers, or where placeholders and
    features of images differ in number: these would silently shift.
    """
    counts = [len(row.answers) for row in rows]
    if len(set(counts)) != 1:
        raise ValueError(f"rows with {counts} answers in one batch, expected equally many")
    size = len(rows), counts[0]
    if not packed:
        rows = one_answer_each(rows)

    count = len(rows[0].answers)  # A
    prompts = [len(row.prompt) for row in rows]
    lengths = [row.answer_tokens for row in rows]
    # Where a row's answers begin: one follows its prompt at once, several stand behind all prompts.
    starts = prompts if count == 1 else [max(prompts)] * len(rows)
    width = max(start + n for start, n in zip(starts, lengths, strict=True))  # T
    kept = max(lengths) + 1  # L

    ids = torch.full((len(rows), width), backbone.tokenizer.pad_token_id or 0)
    positions = torch.zeros(len(rows[0].positions), len(rows), width, dtype=torch.long)
    segment = torch.full((len(rows), width), -1)  # -1 pad, 0 prompt, 1 .. A answers
    columns = torch.zeros(len(rows), kept, dtype=torch.long)
    labels = torch.full((len(rows), kept), -100)
    where = []  # (row, query, token, answer) of each answer token
    for b, (row, start, n) in enumerate(zip(rows, starts, lengths, strict=True)):
        end = len(row.prompt)
        ids[b, :end] = torch.tensor(row.prompt)
        segment[b, :end] = 0
        positions[:, b, :end] = row.positions
        columns[b, : n + 1] = torch.tensor([end - 1, *range(start, start + n)])

        at = 0  # columns of this row's answers so far
        for a, answer in enumerate(row.answers):
            tokens = torch.tensor(answer)
            to = slice(start + at, start + at + len(answer))
            ids[b, to] = tokens
            labels[b, at + 1 : at + 1 + len(answer)] = tokens
            segment[b, to] = a + 1
            # Each answer starts anew, right behind the prompt.
            positions[:, b, to] = row.positions.max() + 1 + torch.arange(len(answer))
            # The prompt's last token predicts every answer's first.
            queries = [0, *range(at + 1, at + len(answer))]
            for query, token in zip(queries, answer, strict=True):
                where.append((b, query, token, b * count + a))
            at += len(answer)

    shown = image_rows(backbone, rows, pictures)
    places = int((ids == backbone.image_token).sum())
    if places != len(shown):
        raise ValueError(
            f"{places} image placeholders, {len(shown)} image features: expected as many"
        )
    row_of, query_of, token_of, answer_of = torch.tensor(where).T  # (M,) each
    return Batch(
        ids=ids,
        positions=positions,
        mask=None if count == 1 else answer_mask(segment, max(lengths)),
        pictures=shown,
        columns=columns,
        labels=labels,
        row=row_of,
        query=query_of,
        token=token_of,
        answer=answer_of,
        size=size,
    ).to(backbone.device)


def one_answer_each(rows: Sequence[Row]) -> list[Row]:
    """A row for each answer, in order, with the prompt of its own."""
    single = []
    for row in rows:
        single += [replace(row, answers=[answer]) for answer in row.answers]
    return single


def image_rows(
    backbone: Backbone, rows: Sequence[Row], pictures: Mapping[int, ImageFeatures]
) -> Tensor:
    """The features (n, d) of all images of these rows, in the order of their placeholders."""
    features = []
    for row in rows:
        features += [pictures[item].features for item in row.images]
    return torch.cat(features) if features else torch.zeros(0, backbone.width)


def answer_mask(segment: Tensor, n: int) -> Tensor:
    """Who the last n columns may look at: (B, T) segments -> (B, 1, n, T) additive float32.

    0 = it may look, lowest number = it may not. An answer's token sees the prompt (segment 0) and,
    at or before itself, its own answer; padding (-1) sees padding alone, since a row without any
    key has no softmax.
    """
    q = segment[:, None, -n:, None]  # (B, 1, n, 1)
    k = segment[:, None, None, :]  # (B, 1, 1, T)
    causal = torch.ones(n, segment.shape[1], dtype=torch.bool).tril(segment.shape[1] - n)
    allowed = causal & ((k == q) | ((k == 0) & (q > 0)))  # (B, 1, n, T)
    lowest = torch.finfo(torch.bfloat16).min  # finite in float32, too
    return torch.where(allowed, 0.0, lowest)
