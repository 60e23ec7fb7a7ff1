"""From items to token ids: the two prompts, the answer, and the row of a prompt with its answers.

One shape serves every stage: SFT has one answer to a prompt, DPO two (chosen, rejected), evaluation
one for each candidate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from torch import Tensor

from hanorec.base.errors import InputError, shown
from hanorec.datasets.catalog import Catalog
from hanorec.mllm.backbone import Backbone, ImageFeatures, prompt_positions
from hanorec.mllm.checks import window

Part = str | int  # a text, or the row of the item whose image stands here

HISTORY = "A user chose these items, oldest first:\n"
WHICH = "Which of these candidates does the user choose next?\n"
TITLE_ALONE = "Answer with the title alone."
TITLES_ALONE = "Answer with the titles of the next {} alone, a line each, the latest first."

YES, NO = "Yes", "No"
WHETHER = "Does the user choose this item next?\n"
YES_OR_NO = f"Answer {YES} or {NO}."


# ---- texts ----


def ranking_parts(
    catalog: Catalog,
    history: Sequence[int],
    candidates: Sequence[int],
    images: bool = True,
    targets: int = 1,
) -> list[Part]:
    """The ranking prompt: history and candidates, each title with its image; images=False leaves
    the candidates' images out. targets: how many titles the answer has."""
    return [
        HISTORY,
        *listed(catalog, history),
        WHICH,
        *listed(catalog, candidates, images),
        TITLE_ALONE if targets == 1 else TITLES_ALONE.format(targets),
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
#
# A prompt is tokenized in one piece, as Transformers does it. Untrusted text is cut inside of all
# that the tokenizer would read as a marker, so that a title cannot open a turn or an image; what
# stands behind a cut is another piece.


def text_ids(backbone: Backbone, text: str) -> list[int]:
    """Tokens of an untrusted text that stands alone."""
    return _tokens(backbone, _with_text(backbone, [""], text), add_tokens=False)


def answer_ids(backbone: Backbone, text: str) -> list[int]:
    """Tokens of an answer as the assistant's turn has it, from the prompt's end to the end token.
    """
    turn = backbone.turn
    pieces = _with_text(backbone, [turn.lead], text)
    pieces[-1] += turn.ending
    ids = _tokens(backbone, [turn.opening + pieces[0], *pieces[1:]], turn.add_tokens)
    known = list(turn.prompt)
    whole = ids[: len(known)] == known
    # else a token would reach from the prompt into the answer, but the prompt is fixed
    ids = ids[len(known) :] if whole else _going_on(backbone, pieces)
    of_turn = _count_markers(backbone, turn.whole) - _count_markers(backbone, known)
    _check_markers(backbone, ids, of_turn, f"the title {shown(text)}")
    return ids


def _with_text(backbone: Backbone, pieces: list[str], text: str) -> list[str]:
    """The pieces with an untrusted text put to their end."""
    first, *rest = backbone.inside_markers.split(text)
    return [*pieces[:-1], pieces[-1] + first, *rest]


def _tokens(backbone: Backbone, pieces: Sequence[str], add_tokens: bool) -> list[int]:
    """Tokens of a text in pieces, with the tokenizer's own if they are to be added."""
    first = backbone.tokenizer.encode(pieces[0], add_special_tokens=add_tokens)
    return first + _going_on(backbone, pieces[1:])


def _going_on(backbone: Backbone, pieces: Sequence[str]) -> list[int]:
    """Tokens of pieces from the middle of a text.

    Each is tokenized behind a line break, so that no tokenizer takes it for a beginning and puts
    its space before it.
    """
    encode = partial(backbone.tokenizer.encode, add_special_tokens=False)
    ids: list[int] = []
    line_break = encode("\n")
    for piece in pieces:
        behind = encode("\n" + piece)
        apart = behind[: len(line_break)] == line_break
        ids += behind[len(line_break) :] if apart else encode(piece)
    return ids


def _count_markers(backbone: Backbone, ids: Sequence[int]) -> int:
    unknown = backbone.tokenizer.unk_token_id  # is any character that the vocabulary lacks
    return sum(token in backbone.markers and token != unknown for token in ids)


def _check_markers(backbone: Backbone, ids: Sequence[int], expected: int, where: str) -> None:
    """InputError where the tokenizer has found markers in untrusted text all the same, say because
    it changes letters before it looks for them."""
    found = _count_markers(backbone, ids)
    if found != expected:
        raise InputError(
            f"{where}: the tokenizer of {backbone.path} reads {found} markers of turns and images, "
            f"expected {expected}: it takes a part of a title for one; change that title"
        )


# ---- rows ----


@dataclass(frozen=True)
class Row:
    """One prompt of S tokens with the answers that share it."""

    name: str  # for messages: the user
    prompt: list[int]
    positions: Tensor  # (R, S) of the prompt, as in `prompt_positions`
    images: list[int]  # catalogue rows, in the order of the prompt
    answers: list[list[int]]

    def __repr__(self) -> str:
        asked = f"{len(self.prompt)} tokens, {len(self.images)} images"
        return f"<Row: {self.name}, {asked}, {len(self.answers)} answers>"

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

    Raises InputError where prompt and longest answer do not fit the model's context, see
    `too_long`. Nothing is cut off here.
    """
    ids, images = prompt_ids(backbone, name, parts, pictures)
    longest = len(ids) + max(len(answer) for answer in answers)
    if longest > backbone.context:
        of_images = ids.count(backbone.image_token)
        raise InputError(too_long(backbone, name, parts, longest, of_images))
    positions = prompt_positions(backbone, ids, [pictures[row].grid for row in images])
    return Row(name, ids, positions, images, answers)


def prompt_ids(
    backbone: Backbone, name: str, parts: list[Part], pictures: Mapping[int, ImageFeatures]
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and the catalogue rows of the images in it."""
    turn, images, pieces = backbone.turn, [], [backbone.turn.before]
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        if is_text:  # joined, since a marker may reach over several
            pieces = _with_text(backbone, pieces, "".join(group))
            continue
        for item in group:
            images.append(item)
            # Around what has no grid stands nothing: LLaVA-NeXT's images, and vectors of no image.
            without = pictures[item].grid is None
            pieces[-1] += backbone.vector_text if without else backbone.image_text
    pieces[-1] += turn.after
    short = _tokens(backbone, pieces, turn.add_tokens)  # with one token an image
    grids = sum(pictures[item].grid is not None for item in images)
    of_images = len(images) + grids * sum(map(len, backbone.around_image()))
    markers = _count_markers(backbone, turn.prompt) + of_images
    _check_markers(backbone, short, markers, f"user {name}")
    ids, numbers = [], iter(images)
    for token in short:
        is_image = token == backbone.image_token
        ids += [token] * (len(pictures[next(numbers)].features) if is_image else 1)
    return ids, images


def too_long(
    backbone: Backbone, name: str, parts: Sequence[Part], longest: int, of_images: int
) -> str:
    """What to say of a prompt that takes `longest` tokens with its answer, `of_images` of them for
    images: how much its longest title takes, and the remedies that can help."""
    fixed = (HISTORY, WHICH, WHETHER)
    titles = [part[:-1] for part in parts if str(part).endswith("\n") and part not in fixed]
    title = max(titles, key=lambda title: len(text_ids(backbone, title)), default="")
    takes = len(text_ids(backbone, title))
    candidates = parts[parts.index(WHICH) :] if WHICH in parts else []
    remedies = ["shorten --history", "or cut long titles with --max-title-tokens"]
    if longest - of_images <= backbone.context:  # without its images it would fit
        if any(isinstance(part, int) for part in candidates):
            remedies.insert(0, "switch off --candidate-images")
        if not backbone.images_are_smallest:
            remedies.insert(0, "lower --max-pixels")
    limit = f"context of {backbone.context}"
    if backbone.context == window(backbone.config.text_config):
        limit = f"sliding_window of {backbone.context} tokens (config.json; null means none)"
    return (
        f"user {name}: prompt and answer take {longest} tokens, {of_images} of them images, but "
        f"{backbone.path} has a {limit}; the longest title, {shown(title)}, "
        f"takes {takes} tokens: {', '.join(remedies)}"
    )
