#!/usr/bin/env python3
"""One step of plain DPO against TRL's DPOTrainer with PEFT: same weights, same pairs, same loss,
same update.

    python benchmarks/dpo_step.py text|vision [--vocabulary V] [--prepared] [--tower WIDTH LAYERS]
        [--rounds N] [--device cuda]

text: Qwen2, prompts of 512 tokens. vision: Qwen2.5-VL, 519 tokens of which five images of 224 x
224. Both: 4 pairs, answers of 12 tokens, LoRA r = 8 on all linears of the language model; sizes in
toys.py.

hanorec's rows run train_dpo.py's own `main`, timed from where its loop is given a step to where it
asks for the next: collate, policy forward, loss, backward, clip, AdamW, and what it logs. The
reference is known, as it always is there. TRL's step: collate, reference, forward, loss, backward,
clip, AdamW; live: the reference runs in each step; cached: its log-probabilities are known
(precompute_ref_log_probs, which it refuses for images). hanorec keeps the features of the images,
unless the row says otherwise. The clean pass of HaRS and the noise of NoDO are no part of plain
DPO: their rows say what they cost on top. "answers only": TRL runs the head on answer positions
alone where it finds Triton, and on all positions elsewhere, so on a CPU; these rows give it the
former there too, and are the ones to judge the method by.

Without TRL and PEFT (`pip install -c constraints.txt -e ".[bench]"`) hanorec's rows stand alone.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from dpo_sides import RANK, Side, ours
from measure import agree, begin, gemm_rate, measure_memory, medians, peak_memory
from toys import Example, Work, examples, forward_flops

PLAIN = "hanorec"  # the side whose adapter the peers start from


def theirs(*work: Any, **options: Any) -> Side:
    """Of dpo_trl.py, which takes TRL some seconds to import: only where it is needed."""
    from dpo_trl import theirs as make

    return make(*work, **options)


def build(work: Work, made: list[Example], device: str) -> dict[str, Callable[..., Side]]:
    """Every row of the table."""

    def script(*flags: str, **options: Any) -> Callable[..., Side]:
        return partial(ours, work, made, device, *flags, **options)

    def peer(**options: Any) -> Callable[..., Side]:
        return partial(theirs, work, made, device, **options)

    plain = ["--ablation", "dpo"]
    sides = {
        PLAIN: script(*plain),
        "hanorec + clean pass": script("--ablation", "no_nodo"),
        "hanorec + noise": script("--ablation", "no_hars", "--sigma", "0.01"),
        "hanorec + both": script("--sigma", "0.01"),
    }
    if work.vision:
        sides = {"hanorec, images in each step": script(*plain, tower=True)} | sides
    if not (find_spec("trl") and find_spec("peft")):
        return sides
    sides["TRL live"] = peer()
    if device == "cpu":
        sides["TRL live, answers only"] = peer(answers_only=True)
    if not work.vision:  # TRL refuses to precompute for images
        sides["TRL cached"] = peer(cached=True)
        if device == "cpu":
            sides["TRL cached, answers only"] = peer(cached=True, answers_only=True)
    return sides


def check(sides: dict[str, Side]) -> None:
    """The first step of every plain side: the loss, which is not ln 2, and the gradient of each
    LoRA weight, after clipping.
    """
    for side in sides.values():
        side.step()
    first = next(iter(sides.values()))
    print(f"loss of the first step {first.losses[0]:.6f} (ln 2 = 0.693147)")
    for name, side in sides.items():
        if "+" not in name and side is not first:
            agree(
                f"loss, {name}", torch.tensor(first.losses[0]), torch.tensor(side.losses[0]), 1e-4
            )
            agree(f"gradient, {name}", first.gradient(), side.gradient(), 1e-3)
    print()


def table(seconds: dict[str, float], floors: dict[str, float], memory: dict[str, float]) -> None:
    peers = [name for name in seconds if name.startswith("TRL")]
    print(
        "| step | seconds | times its floor | peak memory, MB | "
        + " | ".join(f"{peer} / this" for peer in peers)
        + " |"
    )
    print("|---" * (4 + len(peers)) + "|")
    for name, time in seconds.items():
        ratios = ["" if name in peers else f"{seconds[peer] / time:.2f}" for peer in peers]
        print(
            f"| {name} | {time:.3f} | {time / floors[name]:.2f} | {memory[name]:.0f} | "
            + " | ".join(ratios)
            + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["text", "vision"])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--prepared", action="store_true", help="leave the collators out on both sides"
    )
    parser.add_argument(
        "--tower", type=int, nargs=2, default=[160, 5], metavar=("WIDTH", "LAYERS"),
        help="the vision tower's",
    )
    parser.add_argument(
        "--memory", metavar="SIDE", help="measure the peak of one step of this side alone"
    )
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    # of libraries that call one another's old names
    warnings.filterwarnings("ignore", category=FutureWarning)
    work = Work(
        vision=args.kind == "vision", vocabulary=args.vocabulary,
        prompt=519 if args.kind == "vision" else 512, vision_width=args.tower[0],
        vision_layers=args.tower[1],
    )
    made = examples(work)
    makers = build(work, made, args.device)
    if args.memory:
        torch.set_num_threads(1)
        print(measure_memory(makers[args.memory](prepared=args.prepared).step, args.device))
        return
    begin(args.device)
    if not any(name.startswith("TRL") for name in makers):
        print('note: no TRL or no PEFT: pip install -c constraints.txt -e ".[bench]"\n')
    command = [__file__, *sys.argv[1:]]
    memory = {name: peak_memory([*command, "--memory", name]) for name in makers}
    sides: dict[str, Side] = {}
    for name, make in makers.items():
        start = {"adapter": sides[PLAIN].adapter} if name.startswith("TRL") else {}
        sides[name] = make(prepared=args.prepared, **start)
    check(sides)
    rate = gemm_rate(args.device)
    print(f"GEMM 1024: {rate / 1e9:.0f} GFLOP/s")
    train = forward_flops(work, rank=RANK) + forward_flops(work, rank=RANK, backward=True)
    floors = {
        name: (
            train
            + forward_flops(work) * ("live" in name)
            + forward_flops(work, rank=RANK) * ("clean" in name or "both" in name)
        )
        / rate
        for name in sides
    }
    seconds = medians({name: side.step for name, side in sides.items()}, args.rounds)
    table(seconds, floors, memory)


if __name__ == "__main__":
    main()
