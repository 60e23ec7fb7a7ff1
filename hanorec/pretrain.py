"""The base checkpoint of the demo: a tiny Qwen2.5-VL that has learnt to read Posterland's posters and titles.

    python -m hanorec.pretrain OUT [--minutes M]          the one in hanorec/assets was made with the defaults

A real MLLM comes with two skills that recommending needs: it names what a picture shows, and it finds in a list what a question
asks for. Random weights have neither, and LoRA on frozen random weights learns neither. So this command trains all weights, on
catalogues other than the demo's, and never on a user:
    name   a list of ten films; "Film 4 is" -> its genre and style
    find   the same list; "The space quiet film is" -> its title
    like   a few films of one genre and style, then ten candidates -> the title of the one that goes with them
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanorec import prompts
from hanorec.backbone import Backbone, Picture, hidden_states, load_backbone
from hanorec.catalog import Catalog, load_catalog, read_image
from hanorec.datasets import posterland
from hanorec.errors import run
from hanorec.losses import token_log_probs
from hanorec.tiny import make_checkpoint

GENRES, STYLES = list(posterland.GENRES), list(posterland.STYLES)
TOGETHER, WHICH_GOES = "These films go together:\n", "Which of these candidates goes with them?\n"
LIST = "Here is a list of films:\n"


class Pool:
    """One generated catalogue: its items' cells, and the pixels of its posters, preprocessed once."""

    def __init__(self, backbone: Backbone, seed: int) -> None:
        self.items = posterland.make_items(seed)
        with tempfile.TemporaryDirectory() as folder:
            posterland.make_posterland(Path(folder), users=0, seed=seed)
            self.catalog: Catalog = load_catalog(folder)
            images = [read_image(path) for path in self.catalog.images]
        inputs = backbone.image_processor(images=images, return_tensors="pt")
        self.pixels = inputs["pixel_values"].view(len(images), -1, inputs["pixel_values"].shape[-1])  # (N, patches, p)
        self.grids = inputs["image_grid_thw"]  # (N, 3)
        one_token = torch.zeros(1, backbone.width)  # encode_row needs only the number of features
        self.pictures = {i: Picture(one_token, grid) for i, grid in enumerate(self.grids)}
        self.cells: dict[tuple[int, int], list[int]] = {}
        for row, item in enumerate(self.items):
            self.cells.setdefault((item["genre"], item["style"]), []).append(row)

    def name_of(self, row: int) -> str:
        return f"{GENRES[self.items[row]['genre']]} {STYLES[self.items[row]['style']]}"


def list_row(backbone: Backbone, pool: Pool, rng: np.random.Generator) -> prompts.Row:
    """name and find: ten films of different cells, and eight questions with their answers, packed side by side."""
    cells = rng.permutation(len(pool.cells))[:10]
    rows = [int(rng.choice(list(pool.cells.values())[c])) for c in cells]
    texts = [f"Film {k + 1} is {pool.name_of(rows[k])}" for k in rng.permutation(10)[:4]]
    texts += [f"The {pool.name_of(rows[k])} film is {pool.catalog.titles[rows[k]]}" for k in rng.permutation(10)[:4]]
    parts = [LIST, *prompts.listed(pool.catalog, rows)]
    return prompts.encode_row(backbone, "list", parts, pool.pictures, [prompts.answer_ids(backbone, t) for t in texts])


def like_row(backbone: Backbone, pool: Pool, rng: np.random.Generator) -> prompts.Row:
    """like: two to five films of one cell, then ten candidates, one of that cell."""
    genre, style = int(rng.integers(len(GENRES))), int(rng.integers(len(STYLES)))
    cell = rng.permutation(pool.cells[genre, style])
    n = int(rng.integers(2, 6))
    others = [row for other, members in pool.cells.items() if other != (genre, style) for row in members]
    near = [row for row in others if pool.items[row]["genre"] == genre or pool.items[row]["style"] == style]
    n_near = int(rng.integers(0, 7))  # some candidates share one of the two
    wrong = {*rng.choice(near, n_near, replace=False).tolist()}
    wrong |= {*rng.choice(sorted(set(others) - set(near)), 9 - n_near, replace=False).tolist()}
    candidates = rng.permutation([int(cell[n]), *wrong]).tolist()
    parts = [TOGETHER, *prompts.listed(pool.catalog, cell[:n].tolist()), WHICH_GOES, *prompts.listed(pool.catalog, candidates),
             prompts.TITLE_ALONE]
    return prompts.encode_row(backbone, "like", parts, pool.pictures, [prompts.answer_ids(backbone, pool.catalog.titles[int(cell[n])])])


def loss_and_accuracy(backbone: Backbone, pool: Pool, rows: list[prompts.Row]) -> tuple[Tensor, float]:
    """Mean cross-entropy over the answers' tokens, the vision tower inside the graph; share of right tokens."""
    images = sorted({i for row in rows for i in row.images})
    seen = backbone.model.get_image_features(
        pixel_values=pool.pixels[images].flatten(0, 1), image_grid_thw=pool.grids[images]).pooler_output
    pictures = {i: Picture(features, pool.grids[i]) for i, features in zip(images, seen, strict=True)}
    batch = prompts.collate(backbone, rows, pictures)
    hidden = hidden_states(backbone, batch.ids, batch.positions, batch.mask, batch.pictures)[:, -batch.keep :]
    logits = backbone.model.lm_head(hidden[batch.row, batch.query])  # (M, V)
    return -token_log_probs(logits, batch.token).mean(), float((logits.argmax(-1) == batch.token).float().mean())


def pretrain(out: Path, minutes: float = 40, width: int = 128, layers: int = 5, batch: int = 16, lr: float = 2e-3, seed: int = 0) -> None:
    """Train for `minutes` of wall time, then save in bfloat16 (half the size; loaded as float32 it loses nothing that matters)."""
    make_checkpoint("qwen2_5_vl", out, [" ".join([w, w]) for w in posterland.words()] + [TOGETHER, WHICH_GOES, LIST, "Film is The film is"] * 200,
                    width, layers, seed, context=1024, vision_width=64, vocabulary=640)
    backbone = load_backbone(str(out), dtype="float32", device="cpu")
    print(f"{sum(p.numel() for p in backbone.model.parameters()):,} parameters")
    backbone.model.requires_grad_(True).train()
    pools = [Pool(backbone, 100 + k) for k in range(6)]
    check, rng = Pool(backbone, 99), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(backbone.model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    start, step = time.time(), 0
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200) * min(1, 3 * (1 - share) + 0.01)  # warm up, hold, run out
        pool = pools[step % len(pools)]
        optimizer.zero_grad()
        # Reading comes first: matching has nothing to match before items are read.
        for make, weight in [(list_row, 1.0), (like_row, 1.0 if share > 0.1 else 0.0)]:
            if weight:
                loss, _ = loss_and_accuracy(backbone, pool, [make(backbone, pool, rng) for _ in range(batch)])
                loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            with torch.no_grad():
                report = []
                for make in (list_row, like_row):
                    fresh = np.random.default_rng(step)
                    loss, right = loss_and_accuracy(backbone, check, [make(backbone, check, fresh) for _ in range(64)])
                    report.append(f"{make.__name__} loss {loss.item():.3f} right tokens {right:.3f}")
            print(f"step {step} {time.time() - start:.0f} s: {'; '.join(report)}", flush=True)
    backbone.model.to(torch.bfloat16).eval().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    args = parser.parse_args()
    pretrain(args.out, args.minutes)


if __name__ == "__main__":
    run(main)
