"""All that a run would refuse or remark in what a language model is shown of a data folder: titles
as tokens, and rows that exceed its context.

Weights are not needed, so hard candidate sets, which hang on them, are not looked at: the rows are
those of random ones, drawn with the seed of the runs.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache

from tqdm import tqdm

from hanorec.base.errors import InputError, shown
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.inspection import Findings
from hanorec.datasets.interactions import Example
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.prompts import answer_ids, text_ids
from hanorec.mllm.remedies import Long, Sizes, Trials, remedies
from hanorec.mllm.ruler import Ruler
from hanorec.mllm.tasks import negatives_of

# ---- titles ----


def inspect_titles(builder: PromptBuilder, findings: Findings) -> dict[int, int]:
    """Looks at all titles as tokens.

    Returns the items whose titles differ in spelling alone, each with the number of its group: one
    for each sequence of tokens.
    """
    with redirect_stdout(io.StringIO()):  # what it says of cut titles is one of the findings
        cut = builder.shown.titles
    whole, most = builder.catalog.titles, builder.config.max_title_tokens
    longer = [row for row, title in enumerate(whole) if title != cut[row]]
    findings.note(
        f"titles of more than {most} tokens (--max-title-tokens), cut in prompts and answers",
        (f"{_item(builder, row)}, {_tokens(builder, whole[row])} tokens" for row in longer),
    )

    rows_of: dict[tuple[int, ...], list[int]] = {}
    known: dict[str, tuple[int, ...]] = {}
    for row, title in enumerate(tqdm(cut, "titles", leave=False, disable=None)):
        if title not in known:
            try:
                known[title] = tuple(answer_ids(builder.backbone, title))
            except InputError as error:
                findings.error(error)
                known[title] = ()
        rows_of.setdefault(known[title], []).append(row)

    groups = []
    for tokens, rows in rows_of.items():
        if tokens and len({whole[row] for row in rows}) > 1:
            groups.append(rows)
    findings.note(
        "titles that are one sequence of tokens to the model, so that a prompt which has two of "
        "them as answers is refused; change one in the titles file, or raise --max-title-tokens "
        "where it was set",
        (_items(builder, rows) for rows in groups),
    )
    alike = {}
    for number, rows in enumerate(groups):
        alike.update(dict.fromkeys(rows, number))
    return alike


def _item(builder: PromptBuilder, row: int) -> str:
    return f"item {shown(builder.catalog.ids[row])} {shown(builder.catalog.titles[row])}"


def _items(builder: PromptBuilder, rows: Sequence[int]) -> str:
    return " and ".join(_item(builder, row) for row in rows)


def _tokens(builder: PromptBuilder, title: str) -> int:
    return len(text_ids(builder.backbone, title))


# ---- rows ----


def inspect_rows(
    builder: PromptBuilder,
    alike: Mapping[int, int],
    examples: Mapping[str, Sequence[Example]],
    sizes: Sizes,
    max_pixels: int,
    seed: int,
    findings: Findings,
) -> None:
    """Draws the candidates of the examples, and looks at their rows.

    Args:
        builder: of `hanorec.mllm.outline.outline_builder`, with these `sizes` and `max_pixels`.
        alike: of `inspect_titles`.
        examples: "train", "val", "test" -> those that have enough candidates.
    """
    # Titles are cut already, so that no trial of another builder cuts them again.
    config = replace(builder.config, max_title_tokens=None)
    ruler = Ruler(replace(builder, catalog=builder.shown, config=config), seed)
    context = builder.backbone.context
    found: list[Long] = []
    for split, every in examples.items():
        training = split == "train"
        todo = every if alike else [e for e in every if ruler.at_most(e) > context]
        catalog = builder.shown if training else builder.catalog
        drawn = draw_candidates(todo, catalog, config.candidates - config.targets, seed)
        for example in tqdm(drawn, f"rows of {split}.tsv", leave=False, disable=None):
            try:
                check_alike(builder, alike, example, training, seed)
                if ruler.at_most(example) <= context:
                    continue
                tokens, of_images = ruler.longest(example, training)
            except InputError as error:
                findings.error(error)
                continue
            if tokens > context:
                found.append(Long(split, example, tokens, of_images))
    if found:
        found.sort(key=lambda row: row.tokens, reverse=True)
        help = remedies(Trials(ruler, found, sizes, max_pixels))
        kind = f"rows exceed the context of {context} tokens; {help}"
        takes = cache(lambda row: _tokens(builder, builder.shown.titles[row]))
        findings.errors[kind] = [_described(builder, row, takes) for row in found]


def check_alike(
    builder: PromptBuilder, alike: Mapping[int, int], example: Example, training: bool, seed: int
) -> None:
    """InputError where a ranking prompt has two of a group as answers: any candidates in
    evaluation, in training the target and the item that DPO rejects, with its defaults. An answer
    of several titles (--targets) may have any."""
    if not alike or builder.config.task != "ranking" or builder.config.targets > 1:
        return
    answers = list(example.candidates)
    if training:
        answers = [example.target, *negatives_of(example, seed)]
    groups: dict[int, list[int]] = {}
    for row in answers:
        if row in alike:
            groups.setdefault(alike[row], []).append(row)
    for rows in groups.values():
        tokens = [answer_ids(builder.backbone, builder.shown.titles[row]) for row in rows]
        builder.check_answers(example, rows, tokens)


def _described(builder: PromptBuilder, row: Long, takes: Callable[[int], int]) -> str:
    """takes: how many tokens the title of an item does."""
    example = row.example
    longest = max([*example.history, *example.candidates], key=takes)
    return (
        f"{row.split}.tsv: user {shown(example.user)}: {row.tokens} tokens, {row.of_images} of "
        f"them images; the longest title is that of {_item(builder, longest)}, "
        f"{takes(longest)} tokens"
    )
