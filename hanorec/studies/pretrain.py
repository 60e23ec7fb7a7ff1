"""The base checkpoint of the demo: a tiny Qwen2.5-VL that has learnt to read Posterland's posters and titles.

    python -m hanorec.pretrain FIRST                                    35 minutes on one core, 2,200 steps
    python -m hanorec.pretrain OUT --start-from FIRST --minutes 11      the one in hanorec/assets, 1,100 steps more

The schedule goes by the clock, so a second run gives a like checkpoint, not the same one.

A real MLLM comes with two skills that recommending needs: it names what a picture shows, and it finds in a list what a question
asks for. Random weights have neither, and LoRA on frozen random weights learns neither. So this command trains all weights, on
catalogues other than the demo's, and never on a user:
    name   a list of films; "Film 4 is" -> its genre and style (the first lesson, forgotten in the end)
    find   such a list; "The space quiet film is" -> its title
    like   a few films of one genre and style, then ten candidates -> the title of the one that goes with them
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder
from hanorec.datasets import posterland
from hanorec.datasets.catalog import Catalog, load_catalog, read_image
from hanorec.losses import token_log_probs
from hanorec.mllm import prompts
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.scoring import answer_logits
from hanorec.studies.tiny import make_checkpoint

GENRES, STYLES = list(posterland.GENRES), list(posterland.STYLES)


TOGETHER, WHICH_GOES = "These films go together:\n", "Which of these candidates goes with them?\n"


LIST = "Here is a list of films:\n"


class Pool:
    """One generated catalogue: its items' cells, and the pixels of its posters, preprocessed once."""

    def __init__(self, backbone: Backbone, seed: int, ambiguous: float = posterland.AMBIGUOUS) -> None:
        self.items = posterland.make_items(seed, ambiguous)
        with tempfile.TemporaryDirectory() as folder:
            posterland.make_posterland(Path(folder), users=0, seed=seed, ambiguous=ambiguous)
            self.catalog: Catalog = load_catalog(folder)
            images = [read_image(path) for path in self.catalog.images]
        inputs = backbone.image_processor(images=images, return_tensors="pt")
        self.pixels = inputs["pixel_values"].view(len(images), -1, inputs["pixel_values"].shape[-1])  # (N, patches, p)
        self.grids = inputs["image_grid_thw"]  # (N, 3)
        one_token = torch.zeros(1, backbone.width)  # encode_row needs only the number of features
        self.pictures = {i: ImageFeatures(one_token, grid) for i, grid in enumerate(self.grids)}
        self.cells: dict[tuple[int, int], list[int]] = {}
        for row, item in enumerate(self.items):
            self.cells.setdefault((item["genre"], item["style"]), []).append(row)

    def name_of(self, row: int) -> str:
        return f"{GENRES[self.items[row]['genre']]} {STYLES[self.items[row]['style']]}"


Task = tuple[prompts.Row, list[int]]  # a row, and how many tokens at the start of each answer are still the question


def name_row(backbone: Backbone, pool: Pool, size: int, rng: np.random.Generator) -> Task:
    """name: a list of films, and for up to eight of them a question about the genre and style, packed side by side."""
    rows = rng.choice(len(pool.items), size, replace=False).tolist()
    asked = rng.permutation(size)[:8]
    return _ask(backbone, pool, rows, [(f"Film {k + 1} is", f" {pool.name_of(rows[k])}") for k in asked])


def find_row(backbone: Backbone, pool: Pool, size: int, rng: np.random.Generator) -> Task:
    """find: a list of films of different cells, and for up to eight of them its cell as the question, its title as the answer."""
    cells = list(pool.cells.values())
    rows = [int(rng.choice(cells[c])) for c in rng.permutation(len(cells))[:size]]
    asked = rng.permutation(size)[:8]
    return _ask(backbone, pool, rows, [(f"The {pool.name_of(rows[k])} film is ", pool.catalog.titles[rows[k]]) for k in asked])


def _ask(backbone: Backbone, pool: Pool, rows: list[int], questions: list[tuple[str, str]]) -> Task:
    asked = [prompts.text_ids(backbone, question) for question, _ in questions]
    answers = [[*q, *prompts.answer_ids(backbone, answer)] for q, (_, answer) in zip(asked, questions, strict=True)]
    row = prompts.encode_row(backbone, "list", [LIST, *prompts.listed(pool.catalog, rows)], pool.pictures, answers)
    return row, [len(q) for q in asked]


def like_row(backbone: Backbone, pool: Pool, size: int, rng: np.random.Generator) -> Task:
    """like: two to five films of one cell, then `size` candidates, one of that cell, some that share its genre or its style."""
    genre, style = int(rng.integers(len(GENRES))), int(rng.integers(len(STYLES)))
    cell = rng.permutation(pool.cells[genre, style])
    n = int(rng.integers(2, 6))
    others = [row for other, members in pool.cells.items() if other != (genre, style) for row in members]
    near = [row for row in others if pool.items[row]["genre"] == genre or pool.items[row]["style"] == style]
    n_near = int(rng.integers(0, size))
    wrong = {*rng.choice(near, n_near, replace=False).tolist()}
    wrong |= {*rng.choice(sorted(set(others) - set(near)), size - 1 - n_near, replace=False).tolist()}
    candidates = rng.permutation([int(cell[n]), *wrong]).tolist()
    parts = [TOGETHER, *prompts.listed(pool.catalog, cell[:n].tolist()), WHICH_GOES, *prompts.listed(pool.catalog, candidates),
             prompts.TITLE_ALONE]
    answer = prompts.answer_ids(backbone, pool.catalog.titles[int(cell[n])])
    return prompts.encode_row(backbone, "like", parts, pool.pictures, [answer]), [0]


def loss_and_accuracy(backbone: Backbone, pool: Pool, tasks: list[Task]) -> tuple[Tensor, float]:
    """Mean cross-entropy over the answers' tokens, questions left out, the vision tower inside the graph; share of right tokens but for the end."""
    rows = [row for row, _ in tasks]
    images = sorted({i for row in rows for i in row.images})
    seen = backbone.model.get_image_features(
        pixel_values=pool.pixels[images].flatten(0, 1), image_grid_thw=pool.grids[images]).pooler_output
    pictures = {i: ImageFeatures(features, pool.grids[i]) for i, features in zip(images, seen, strict=True)}
    batch = prompts.collate(backbone, rows, pictures)
    answer = torch.cat([torch.arange(len(a)) >= q for row, asked in tasks for a, q in zip(row.answers, asked, strict=True)])
    logits, token = answer_logits(forward(backbone, batch), batch)[answer], batch.token[answer]  # (M, V), (M,)
    right = (logits.argmax(-1) == token)[token != backbone.tokenizer.eos_token_id]  # the end token would only flatter
    return -token_log_probs(logits, token).mean(), float(right.float().mean())


# (until which share of the time, [(task, list length, rows in a step)]): first reading, then finding in lists that grow
STAGES = [
    (0.10, [(name_row, 1, 128)]),
    (0.20, [(name_row, 3, 16), (find_row, 3, 16), (like_row, 3, 16)]),
    (0.35, [(find_row, 5, 16), (like_row, 5, 16)]),
    (1.00, [(find_row, 10, 8), (like_row, 10, 24)]),
]


LOOKING = [  # going on from there, on catalogues where hardly a title tells: short lists first, in which a poster can be found again
    (0.45, [(name_row, 1, 16), (find_row, 2, 48)]),
    (0.60, [(find_row, 4, 24), (like_row, 3, 24)]),
    (1.00, [(find_row, 10, 8), (like_row, 10, 24)]),
]


def pretrain(out: Path, minutes: float = 35, start_from: Path | None = None, lr: float = 2e-3, seed: int = 0) -> None:
    """Train for `minutes` by the clock, so that the cost is known and the number of steps is not; save in bfloat16 (half the size).

    start_from: go on from that checkpoint through LOOKING instead of STAGES, on catalogues where 85% of the titles are ambiguous: as
    long as most titles tell, there is little to gain from looking at a poster, and the model does not.
    """
    if start_from is None:
        texts = [f"{word} {word}" for word in posterland.words()] + 200 * [TOGETHER, WHICH_GOES, LIST, "Film is The film is"]
        make_checkpoint("qwen2_5_vl", out, texts, width=128, layers=5, seed=seed, context=1024, vision_width=64, vocabulary=640)
    else:
        shutil.copytree(start_from, out, dirs_exist_ok=True)
    ambiguous = posterland.AMBIGUOUS if start_from is None else 0.85
    stages = STAGES if start_from is None else LOOKING
    backbone = load_backbone(str(out), dtype="float32", device="cpu")
    print(f"{sum(p.numel() for p in backbone.model.parameters()):,} parameters")
    backbone.model.requires_grad_(True).train()
    pools = [Pool(backbone, 100 + k, ambiguous) for k in range(6)]
    check, rng = Pool(backbone, 99, ambiguous), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(backbone.model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    start, step = time.time(), 0
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        step += 1
        stage, pool = next(tasks for until, tasks in stages if share < until), pools[step % len(pools)]
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 100) * min(1, 1.5 * (1 - share) + 0.01)  # warm up, hold, run out
        optimizer.zero_grad()
        for make, size, rows in stage:
            loss, _ = loss_and_accuracy(backbone, pool, [make(backbone, pool, size, rng) for _ in range(rows)])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            with torch.no_grad():
                fresh = np.random.default_rng(step)
                report = []
                for make, size, _ in stage:
                    loss, right = loss_and_accuracy(backbone, check, [make(backbone, check, size, fresh) for _ in range(64)])
                    report.append(f"{make.__name__} of {size}: loss {loss.item():.3f}, right tokens {right:.3f}")
            print(f"step {step}, {time.time() - start:.0f} s: {'; '.join(report)}", flush=True)
    backbone.model.to(torch.bfloat16).eval().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--start-from", type=Path, help="go on from this checkpoint, with mostly ambiguous titles")
    args = parser.parse_args()
    if args.minutes <= 0 or (args.start_from and not (args.start_from / "config.json").exists()):
        raise InputError(f"--minutes {args.minutes}, --start-from {args.start_from}: expected more than 0 minutes, and a checkpoint folder or nothing")
    pretrain(claim_folder(args.out), args.minutes, args.start_from)


if __name__ == "__main__":
    run(main)
