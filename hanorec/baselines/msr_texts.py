r"""MLLM-MSR, generated: the base describes each image, and writes what a user likes (MR-1, MR-2).

Source: MLLM-MSR (arXiv 2408.09698; YuyangYe/MLLM-MSR), which samples both without a seed; here they
are greedy, shorter, and of the base that answers, too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hanorec.baselines.mllm_msr import KNOWN, Summaries, known_parts, last_block, running
from hanorec.datasets.catalog import Catalog, data_hash
from hanorec.datasets.interactions import Example, Rows
from hanorec.mllm import evaluation, prompts
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.generation import generate, kept_texts
from hanorec.run.inputs import seen_inputs

DESCRIPTION, SUMMARY = 64, 128  # tokens at most; ours, 200 and 1024 in MLLM-MSR

DESCRIBE = "Describe this picture in one or two sentences: what it shows, in which style and mood."
THEN = "Then the user chose these items, oldest first:\n"
SUMMARISE = "Say in a few sentences what the user likes now."


def generated(
    builder: PromptBuilder, examples: Sequence[Example], folder: Path, batch: int = 4
) -> Summaries:
    """The summaries that the base writes, greedily; adapters are taken off it.

    Descriptions and summaries are kept in `folder`, by item ids, with what they depend on; those of
    another base, of other data or prompts are refused.
    """
    backbone, catalog = builder.backbone, builder.shown
    evaluation.use_policy(backbone, "base")
    facts = seen_inputs(builder) | {
        "data": data_hash(builder.catalog),
        "dtype": str(backbone.model.dtype),
        "max_title_tokens": builder.config.max_title_tokens,
        "prompts": [DESCRIBE, KNOWN, THEN, SUMMARISE],
        "limits": [DESCRIPTION, SUMMARY],
    }

    def write(parts_of: Mapping[str, list[prompts.Part]], limit: int) -> list[str]:
        rows = []
        for key, parts in parts_of.items():
            name = f"of items {key}"  # for messages
            rows.append(prompts.encode_row(backbone, name, parts, builder.pictures, [[]]))
        return generate(backbone, rows, builder.pictures, limit, batch)

    def describe(ids: Sequence[str]) -> list[str]:
        return write({item: [catalog.row[item], DESCRIBE] for item in ids}, DESCRIPTION)

    shown: set[int] = set()
    for example in examples:
        shown.update(example.history)
    ids = [catalog.ids[row] for row in sorted(shown & builder.pictures.keys())]
    descriptions = kept_texts(folder / "descriptions.json", facts, ids, describe)

    def update(due: dict[Rows, str]) -> dict[Rows, str]:
        items = {" ".join(map(catalog.ids.__getitem__, rows)): rows for rows in due}

        def summarise(keys: Sequence[str]) -> list[str]:
            parts = {}
            for key in keys:
                rows = items[key]
                parts[key] = update_parts(catalog, descriptions, due[rows], last_block(rows))
            return write(parts, SUMMARY)

        texts = kept_texts(folder / "summaries.json", facts, list(items), summarise)
        return {rows: texts[key] for key, rows in items.items()}

    last = running([example.history for example in examples], "", update)
    return {(example.user, example.history): last[example.history] for example in examples}


def update_parts(
    catalog: Catalog, descriptions: Mapping[str, str], before: str, block: Rows
) -> list[prompts.Part]:
    """The prompt of one update: S_{k-1}, and each item's title with what its image shows."""
    parts = [*known_parts(before), THEN]
    for number, row in enumerate(block, 1):
        told = descriptions.get(catalog.ids[row])
        parts.append(f"{number}. {catalog.titles[row]}" + (f": {told}\n" if told else "\n"))
    return [*parts, SUMMARISE]
