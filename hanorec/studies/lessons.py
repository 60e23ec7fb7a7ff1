"""What the demo's base model is taught: three tasks on catalogues of `hanorec.datasets.posterland`.

    name   a list of films; "Film 4 is" -> its genre and style (the first lesson, forgotten in the
           end)
    find   such a list; "The space quiet film is" -> its title
    like   a few films of one genre and style, then ten candidates -> the title of the one that goes
           with them
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanorec.datasets import posterland
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.images import read_image
from hanorec.losses import token_log_probs
from hanorec.mllm import prompts
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.scoring import answer_logits

GENRES, STYLES = list(posterland.GENRES), list(posterland.STYLES)

TOGETHER, WHICH_GOES = "These films go together:\n", "Which of these candidates goes with them?\n"

LIST = "Here is a list of films:\n"


class Pool:
    """One generated catalogue: its items' cells, and the pixels of its posters, made once."""

    def __init__(
        self, backbone: Backbone, seed: int, ambiguous: float = posterland.AMBIGUOUS,
    ) -> None:
        self.items = posterland.make_items(seed, ambiguous)
        with tempfile.TemporaryDirectory() as folder:
            posterland.make_posterland(Path(folder), users=0, seed=seed, ambiguous=ambiguous)
            self.catalog: Catalog = load_catalog(folder)
            images = [read_image(path) for path in self.catalog.images]
        inputs = backbone.image_processor(images=images, return_tensors="pt")
        pixels = inputs["pixel_values"]
        self.pixels = pixels.view(len(images), -1, pixels.shape[-1])  # (N, patches, p)
        self.grids = inputs["image_grid_thw"]  # (N, 3)
        one_token = torch.zeros(1, backbone.width)  # encode_row needs only the number of features
        self.pictures = {i: ImageFeatures(one_token, grid) for i, grid in enumerate(self.grids)}
        self.cells: dict[tuple[int, int], list[int]] = {}
        for row, item in enumerate(self.items):
            self.cells.setdefault((item["genre"], item["style"]), []).append(row)

    def name_of(self, row: int) -> str:
        """Genre and style of an item in words: "space quiet"."""
        item = self.items[row]
        return f"{GENRES[item['genre']]} {STYLES[item['style']]}"


# A row, and how many tokens at the start of each answer are still the question.
Task = tuple[prompts.Row, list[int]]


def name_row(backbone: Backbone, pool: Pool, size: int, rng: np.random.Generator) -> Task:
    """name: a list of films, and for up to eight of them a question about genre and style.

    The questions are packed side by side.
    """
    rows = rng.choice(len(pool.items), size, replace=False).tolist()
    asked = rng.permutation(size)[:8]
    questions = [(f"Film {k + 1} is", f" {pool.name_of(rows[k])}") for k in asked]
    return _ask(backbone, pool, rows, questions)


def find_row(backbone: Backbone, pool: Pool, size: int, rng: np.random.Generator) -> Task:
    """find: a list of films of different cells, and up to eight cells, each asked for its title."""
    cells = list(pool.cells.values())
    rows = [int(rng.choice(cells[c])) for c in rng.permutation(len(cells))[:size]]
    questions = []
    for k in rng.permutation(size)[:8]:
        row = rows[k]
        questions.append((f"The {pool.name_of(row)} film is ", pool.catalog.titles[row]))
    return _ask(backbone, pool, rows, questions)


def _ask(
    backbone: Backbone, pool: Pool, rows: list[int], questions: list[tuple[str, str]],
) -> Task:
    """The list of these films, and the questions with their answers after it."""
    lengths, answers = [], []
    for question, answer in questions:
        asked = prompts.text_ids(backbone, question)
        lengths.append(len(asked))
        answers.append([*asked, *prompts.answer_ids(backbone, answer)])
    parts = [LIST, *prompts.listed(pool.catalog, rows)]
    return prompts.encode_row(backbone, "list", parts, pool.pictures, answers), lengths


def like_row(backbone: Backbone, pool: Pool, size: int, rng: np.random.Generator) -> Task:
    """like: two to five films of one cell, then `size` candidates, one of that cell.

    Some of the others share its genre or its style.
    """
    genre, style = int(rng.integers(len(GENRES))), int(rng.integers(len(STYLES)))
    cell = rng.permutation(pool.cells[genre, style])
    n = int(rng.integers(2, 6))
    near, far = [], []
    for (of_genre, of_style), members in pool.cells.items():
        if of_genre == genre and of_style == style:
            continue
        if of_genre == genre or of_style == style:
            near += members
        else:
            far += members

    n_near = int(rng.integers(0, size))
    wrong = {*rng.choice(near, n_near, replace=False).tolist()}
    wrong |= {*rng.choice(sorted(far), size - 1 - n_near, replace=False).tolist()}
    right = int(cell[n])
    candidates = rng.permutation([right, *wrong]).tolist()
    parts = [
        TOGETHER, *prompts.listed(pool.catalog, cell[:n].tolist()),
        WHICH_GOES, *prompts.listed(pool.catalog, candidates),
        prompts.TITLE_ALONE,
    ]
    answer = prompts.answer_ids(backbone, pool.catalog.titles[right])
    return prompts.encode_row(backbone, "like", parts, pool.pictures, [answer]), [0]


def loss_and_accuracy(backbone: Backbone, pool: Pool, tasks: list[Task]) -> tuple[Tensor, float]:
    """Mean cross-entropy () over the answers' M tokens, and the share that would be told right.

    Questions are left out of both, end tokens of the share; the vision tower is in the graph.
    """
    rows = [row for row, _ in tasks]
    images, answered = set(), []
    for row, asked in tasks:
        images.update(row.images)
        for answer, length in zip(row.answers, asked, strict=True):
            answered.append(torch.arange(len(answer)) >= length)
    images = sorted(images)
    seen = backbone.model.get_image_features(
        pixel_values=pool.pixels[images].flatten(0, 1), image_grid_thw=pool.grids[images])
    pictures = {}
    for i, features in zip(images, seen.pooler_output, strict=True):
        pictures[i] = ImageFeatures(features, pool.grids[i])

    batch = collate(backbone, rows, pictures)
    answered = torch.cat(answered)  # which of the batch's answer tokens are no question
    logits = answer_logits(forward(backbone, batch), batch)[answered]  # (M, V)
    token = batch.token[answered]  # (M,)
    told = token != backbone.tokenizer.eos_token_id  # the end token would only flatter
    right = (logits.argmax(-1) == token)[told]
    return -token_log_probs(logits, token).mean(), float(right.float().mean())
