"""The base checkpoint of the demo: a tiny Qwen2.5-VL that reads Posterland's posters and titles.

    python -m hanorec.studies.pretrain FIRST
        35 minutes on one core, 2,200 steps
    python -m hanorec.studies.pretrain OUT --start-from FIRST --minutes 11
        the one in hanorec/assets, 1,100 steps more

The schedule goes by the clock, so a second run gives a like checkpoint, not the same one.

A real MLLM comes with two skills that recommending needs: it names what a picture shows, and it
finds in a list what a question asks for. Random weights have neither, and LoRA on frozen random
weights learns neither. So this command trains all weights on the tasks of
`hanorec.studies.lessons`, on catalogues other than the demo's, and never on a user.
"""

import shutil
import time
from pathlib import Path

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.pretrain")
    result.add_argument("out", type=Path)
    result.add_argument("--minutes", type=float, default=35)
    result.add_argument(
        "--start-from", type=Path,
        help="go on from this checkpoint, with mostly ambiguous titles")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import numpy as np
import torch

from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder
from hanorec.datasets import posterland
from hanorec.mllm.backbone import Backbone
from hanorec.mllm.load import load_backbone
from hanorec.studies.lessons import (
    LIST,
    TOGETHER,
    WHICH_GOES,
    Pool,
    find_row,
    like_row,
    loss_and_accuracy,
    name_row,
)
from hanorec.studies.tiny import make_checkpoint

# (until which share of the time, [(task, list length, rows in a step)]): first reading, then
# finding in lists that grow.
STAGES = [
    (0.10, [(name_row, 1, 128)]),
    (0.20, [(name_row, 3, 16), (find_row, 3, 16), (like_row, 3, 16)]),
    (0.35, [(find_row, 5, 16), (like_row, 5, 16)]),
    (1.00, [(find_row, 10, 8), (like_row, 10, 24)]),
]

# Going on from there, on catalogues where hardly a title tells: short lists first, in which a
# poster can be found again.
LOOKING = [
    (0.45, [(name_row, 1, 16), (find_row, 2, 48)]),
    (0.60, [(find_row, 4, 24), (like_row, 3, 24)]),
    (1.00, [(find_row, 10, 8), (like_row, 10, 24)]),
]


def pretrain(
    out: Path, minutes: float = 35, start_from: Path | None = None, lr: float = 2e-3, seed: int = 0,
) -> None:
    """Train for `minutes` by the clock, so that the cost is known and the number of steps is not.

    Saved in bfloat16 (half the size). start_from: go on from that checkpoint through LOOKING
    instead of STAGES, on catalogues where 85% of the titles are ambiguous: as long as most titles
    tell, there is little to gain from looking at a poster, and the model does not.
    """
    if start_from is None:
        ambiguous, stages = posterland.AMBIGUOUS, STAGES
        texts = [f"{word} {word}" for word in posterland.words()]
        texts += 200 * [TOGETHER, WHICH_GOES, LIST, "Film is The film is"]
        make_checkpoint(
            "qwen2_5_vl", out, texts, width=128, layers=5, seed=seed, context=1024,
            vision_width=64, vocabulary=640)
    else:
        ambiguous, stages = 0.85, LOOKING
        shutil.copytree(start_from, out, dirs_exist_ok=True)
    backbone = load_backbone(str(out), dtype="float32", device="cpu")
    print(f"{sum(p.numel() for p in backbone.model.parameters()):,} parameters")
    backbone.model.requires_grad_(True).train()
    pools = [Pool(backbone, 100 + k, ambiguous) for k in range(6)]
    check, rng = Pool(backbone, 99, ambiguous), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(
        backbone.model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))

    start, step = time.time(), 0
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        step += 1
        stage = next(tasks for until, tasks in stages if share < until)
        pool = pools[step % len(pools)]
        # warm up, hold, run out
        rate = lr * min(1, step / 100) * min(1, 1.5 * (1 - share) + 0.01)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for make, size, rows in stage:
            tasks = [make(backbone, pool, size, rng) for _ in range(rows)]
            loss, _ = loss_and_accuracy(backbone, pool, tasks)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            report = _report(backbone, check, stage, np.random.default_rng(step))
            print(f"step {step}, {time.time() - start:.0f} s: {report}", flush=True)
    backbone.model.to(torch.bfloat16).eval().save_pretrained(out)


@torch.no_grad()
def _report(backbone: Backbone, pool: Pool, stage: list, rng: np.random.Generator) -> str:
    """Loss and accuracy of each task of the stage on 64 fresh rows."""
    report = []
    for make, size, _ in stage:
        tasks = [make(backbone, pool, size, rng) for _ in range(64)]
        loss, right = loss_and_accuracy(backbone, pool, tasks)
        told = f"loss {loss.item():.3f}, right tokens {right:.3f}"
        report.append(f"{make.__name__} of {size}: {told}")
    return "; ".join(report)


def main() -> None:
    args = parser().parse_args()
    not_one = args.start_from and not (args.start_from / "config.json").exists()
    if args.minutes <= 0 or not_one:
        raise InputError(
            f"--minutes {args.minutes}, --start-from {args.start_from}: expected more than 0 "
            "minutes, and a checkpoint folder or nothing")
    pretrain(claim_folder(args.out), args.minutes, args.start_from)
