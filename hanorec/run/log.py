"""What a run tells of its steps (log.jsonl) and of its pairs (pairs.tsv)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hanorec.base.distributed import rank
from hanorec.base.files import write_text
from hanorec.mllm.tasks import Preference


def append_log(path: Path, record: dict[str, Any]) -> None:
    """One line of JSON, numbers rounded to 6 places; flushed, so that a run can be watched."""
    if rank() > 0:
        return
    line = {}
    for name, value in record.items():
        value = value.item() if isinstance(value, Tensor) else value
        line[name] = round(value, 6) if isinstance(value, float) else value
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def span(values: Tensor) -> list[float]:
    """The smallest and the largest value."""
    return [values.min().item(), values.max().item()]


def spread(name: str, values: Tensor) -> dict[str, float]:
    """For a log: the mean, the smallest and the largest value."""
    low, high = span(values)
    return {name: values.mean().item(), f"{name}_min": low, f"{name}_max": high}


def joined(ids: Sequence[str], rows: Sequence[int]) -> str:
    """The ids of an answer's items."""
    return " ".join(ids[row] for row in rows)


def write_pairs(
    path: Path,
    ids: Sequence[str],
    prompts: Sequence[Preference],
    e: Tensor,
    delta: Tensor,
    lam: Tensor,
) -> None:
    """What HaRS makes of each pair, a line a pair: how alike its items are, Delta, lambda.

    Args:
        ids: item ids of the catalogue. e: (N, d) unit rows. lam: (pairs,) or (prompts, n), in the
            order of the prompts. delta: (pairs,), or with --targets so many of each pair.
    """
    if rank() > 0:
        return
    lines = ["user\tchosen\trejected\tcosine\tdelta\tlambda"]
    delta = delta.view(lam.numel(), -1).mean(1)
    numbers = iter(zip(delta.tolist(), lam.flatten().tolist(), strict=True))
    for prompt in prompts:
        w, *rejected = prompt.items
        for l in rejected:
            cosine = (e[w] * e[l]).sum(1).mean().item()  # place by place, of a list's items
            values = [f"{x:.6f}" for x in (cosine, *next(numbers))]
            lines.append("\t".join([prompt.row.name, joined(ids, w), joined(ids, l), *values]))
    write_text(path, "\n".join(lines) + "\n")
