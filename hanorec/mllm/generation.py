"""Texts that the language model writes, greedily or sampled, and the file that keeps them.

Decoding recomputes the whole row for each token, without a cache of keys and values: attention by
segments takes none, and so the logits are those of `hanorec.mllm.forward.forward`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanorec.base.batches import chunks
from hanorec.base.distributed import rank, run_on_all_ranks
from hanorec.base.errors import InputError, shown
from hanorec.base.facts import check_facts
from hanorec.base.files import read_object, write_json
from hanorec.base.progress import progress
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.prompts import Row

Choose = Callable[[int, Tensor], int]  # number of the row, logits (V,) -> the next token
BLOCKS = 50  # in which texts are made and kept: what an interrupted run loses is one of them

# ---- writing ----


def likeliest(row: int, logits: Tensor) -> int:
    """The token of the largest logit, of equal ones the first."""
    return int(logits.argmax())


def generate(
    backbone: Backbone,
    rows: Sequence[Row],
    pictures: Mapping[int, ImageFeatures],
    limit: int,
    batch: int = 4,
    choose: Choose = likeliest,
) -> list[str]:
    """How the model goes on behind each prompt: by default always the likeliest token, up to
    `limit` of them.

    A text ends where its turn does, or before any other marker of a turn or an image. It is
    stripped, and without NUL, which no file of texts can hold. Rows of one length share a forward
    first; the texts do not depend on it. Each rank writes all texts.

    Args:
        rows: prompts; their answers are not looked at.
        choose: another choice of the next token, see `nucleus`.
    Raises:
        InputError: a prompt with `limit` tokens behind it exceeds the model's context.
    """
    if limit < 1:
        raise InputError(f"{limit} tokens to write, expected at least 1; raise the limit")
    for row in rows:
        if len(row.prompt) + limit > backbone.context:
            raise InputError(
                f"{row.name}: {len(row.prompt)} tokens of prompt and up to {limit} to write, but "
                f"{backbone.path} has a context of {backbone.context}; lower the limit, or shorten "
                "the prompt"
            )
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    texts = [""] * len(rows)
    for part in progress(list(chunks(by_length, batch)), "writing"):
        written = continued(backbone, [rows[i] for i in part], pictures, limit, choose, part)
        for i, tokens in zip(part, written, strict=True):
            texts[i] = backbone.tokenizer.decode(tokens).replace("\0", "").strip()
    return texts


@torch.no_grad()
def continued(
    backbone: Backbone,
    rows: Sequence[Row],
    pictures: Mapping[int, ImageFeatures],
    limit: int,
    choose: Choose = likeliest,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """The tokens of `generate` behind each of these rows, which share a forward; without the one
    that ends them. numbers: by which `choose` knows them."""
    end = backbone.turn.whole[-1]
    written: list[list[int]] = [[] for _ in rows]
    unfinished = list(range(len(rows)))
    for _ in range(limit):
        # The last token of an answer is predicted, not read: any may stand there.
        parts = [replace(rows[i], answers=[[*written[i], end]]) for i in unfinished]
        micro = collate(backbone, parts, pictures)
        micro = replace(micro, columns=micro.columns[:, -2:-1])  # (b, 1): what predicts it
        logits = forward(backbone, micro)[:, 0]  # (b, V)
        going_on = []
        for i, own in zip(unfinished, logits, strict=True):
            token = choose(numbers[i] if numbers else i, own)
            if token != end and token not in backbone.markers:
                written[i].append(token)
                going_on.append(i)
        unfinished = going_on
        if not unfinished:
            break
    return written


def nucleus(seed: int, temperature: float = 0.95, top_p: float = 0.7) -> Choose:
    """Sampling from the likeliest tokens that together have the probability `top_p`.

    Each row draws from a stream of its own, so that a text does not depend on which rows share a
    forward. The token that takes the sum over top_p is one of them.
    """
    streams: dict[int, np.random.Generator] = {}

    def choose(row: int, logits: Tensor) -> int:
        stream = streams.setdefault(row, np.random.default_rng([seed, row]))
        p, tokens = (logits.double() / temperature).softmax(0).sort(descending=True, stable=True)
        before = p.cumsum(0) - p
        p = torch.where(before < top_p, p, 0.0).cumsum(0)
        number = int(torch.searchsorted(p, stream.random() * p[-1].item(), right=True))
        return int(tokens[min(number, int((before < top_p).sum()) - 1)])

    return choose


# ---- keeping ----


def kept_texts(
    path: str | Path,
    facts: Mapping[str, Any],
    keys: Sequence[str],
    make: Callable[[Sequence[str]], Sequence[str]],
) -> dict[str, str]:
    """Key -> text for these keys, from the file at `path`; what it lacks is made and added to it.

    It is written after each of `BLOCKS` blocks, so an interrupted run goes on where it was.

    Args:
        facts: all that the texts depend on: the base's fingerprint, the prompt, the limit.
        make: keys -> their texts, in order.
    Raises:
        InputError: the file states another fact, or was edited.
    """
    path = Path(path)
    texts = run_on_all_ranks(_read_texts, path, facts)[0]  # as rank 0 sees them
    missing = [key for key in dict.fromkeys(keys) if key not in texts]
    for block in chunks(missing, max(1, -(-len(missing) // BLOCKS))):
        texts |= zip(block, make(block), strict=True)
        if rank() == 0:
            write_json(path, {"facts": dict(facts), "sha256": _hash(texts), "texts": texts})
    return {key: texts[key] for key in keys}


def _read_texts(path: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """What the file holds; nothing where there is none."""
    if not path.exists():
        return {}
    again = "delete it to have them written again"
    stored = read_object(path)
    check_facts(stored.get("facts"), facts, lambda name, found, wanted: (
        f"{path}: {name} is {shown(found)} in the file, expected {wanted!r}: its texts were "
        f"written under other conditions; {again}"
    ))
    texts = stored.get("texts")
    if not isinstance(texts, dict) or _hash(texts) != stored.get("sha256"):
        raise InputError(
            f"{path}: its texts do not have the sha256 {shown(stored.get('sha256'))} that it "
            f"states, expected an unaltered file; {again}"
        )
    return texts


def _hash(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
