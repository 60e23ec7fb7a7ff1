"""The step of DPO, and the scoring of candidates, at the shape of Qwen2.5-VL-3B in bfloat16, on a
GPU; and whether a GPU gives a CPU's losses.

    python benchmarks/gpu_step.py [step] [scoring] [parity] [--toy]

Random weights; prompts of 1,500 tokens with 15 images of 64, answers of 12, LoRA r = 8 on all
linears, no dropout. step: train_dpo.py's own, as in dpo_step.py, beside TRL's with PEFT, a side
after the other; each starts warm, the table has medians. Memory: all tensors at the peak, and what
hanorec.mllm.memory expects. TFLOP/s: of the least that the step has to compute. scoring: ten
candidates of 5 to 20 tokens. parity: the first losses of both training scripts in float32, on a
tiny checkpoint. --toy: small shapes on a CPU, which say nothing of speed.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from dpo_sides import RANK, Side, ours
from measure import interleaved
from scoring import LENGTHS
from torch import Tensor
from toys import Work, examples, forward_flops, load, model

from hanorec.datasets.posterland import make_posterland, words
from hanorec.mllm import memory
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.scoring import answer_log_probs
from hanorec.studies.scripts import script
from hanorec.studies.tiny import make_checkpoint

SHAPE = Work(
    vision=True, vocabulary=151_936, prompt=1500, width=2048, layers=36, mlp=11008, heads=16,
    kv_heads=2, vision_width=1280, vision_layers=32, images=15, dtype="bfloat16",
)
TOY = Work(
    vision=True, vocabulary=600, prompt=80, width=64, layers=1, mlp=96, heads=2, kv_heads=1,
    vision_width=32, vision_layers=1, images=1,
)
PLAIN, FULL = ["--ablation", "dpo"], ["--sigma", "0.05"]


# ---- step ----


def step(work: Work, device: str) -> None:
    """The table of sides, each built, warmed up, timed and forgotten in turn."""
    print("| step | prompts | ms | TFLOP/s | memory, GB | expected, GB |\n|---" + "|---" * 5 + "|")
    two = replace(work, prompts=2)
    if device == "cuda":
        row("plain DPO", two, device, PLAIN)
    row("plain DPO", work, device, PLAIN)
    row("HaNoRec: clean pass, noise", work, device, FULL)
    if device == "cuda":  # a compiler's minutes are no toy
        row("plain DPO, compiled", work, device, PLAIN, compiled=True)
        row("HaNoRec, compiled", work, device, FULL, compiled=True)
    if find_spec("trl") and find_spec("peft"):
        row("TRL and PEFT, reference live", two, device, None)
    else:
        print('TRL, PEFT: not installed, skipped (pip install -c constraints.txt -e ".[bench]")')


def row(
    name: str, work: Work, device: str, flags: list[str] | None, compiled: bool = False
) -> None:
    """One side's line. flags: of train_dpo.py; None: TRL."""
    try:
        seconds, peak = measured(partial(build, work, device, flags, compiled), device)
    except torch.OutOfMemoryError:
        print(f"| {name} | {work.prompts} | out of memory | | | |", flush=True)
        return
    finally:
        forget(device)
    passes = forward_flops(work, rank=RANK) + forward_flops(work, rank=RANK, backward=True)
    if flags is FULL:
        passes += forward_flops(work, rank=RANK)
    expected = "" if flags is None else f"{expected_bytes(work, flags, compiled, device) / 1e9:.3g}"
    print(
        f"| {name} | {work.prompts} | {1000 * seconds:.0f} | {passes / seconds / 1e12:.3g} | "
        f"{peak / 1e9:.3g} | {expected} |", flush=True,
    )


def forget(device: str) -> None:
    """Free what the last side held: the next one's peak is its own."""
    if device == "cuda":
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def build(work: Work, device: str, flags: list[str] | None, compiled: bool) -> Side:
    made = examples(work)
    if flags is not None:
        return ours(work, made, device, *flags, compiled=compiled)
    from dpo_trl import theirs

    return theirs(work, made, device)


def measured(make: Callable[[], Side], device: str) -> tuple[float, float]:
    """Median seconds of a step, and the peak of the device's memory; 0 on a CPU."""
    side, rounds = make(), 5 if device == "cuda" else 1
    for _ in range(3 if device == "cuda" else 1):
        side.step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(side.step() for _ in range(rounds))
    return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def expected_bytes(work: Work, flags: list[str], compiled: bool, device: str) -> int:
    """What `hanorec.mllm.memory` says of the same step."""
    bare = model(work, "meta")
    shape = memory.shape_of(bare.config.text_config, bare.dtype)
    d, f, r = shape.width, shape.mlp, RANK
    trained = shape.layers * r * (7 * d + 2 * shape.queries + 2 * shape.keys + 3 * f)
    answers = 2 * 12
    micro = memory.Work(
        work.prompts, work.prompt + answers, answers, packed=True, rank=r, noise=flags is FULL,
        compiled=compiled, device=device,
    )
    weights = sum(weight.nbytes for weight in bare.parameters())
    return memory.step_memory(shape, micro, weights, trained).total


# ---- scoring ----


@torch.no_grad()
def scoring(work: Work, device: str) -> None:
    """Ten candidates of a user: packed, with more or fewer users in a forward; a row a candidate.
    """
    backbone, rows, pictures = load(work, examples(work, LENGTHS), device)

    def scores(users: int, packed: bool) -> Tensor:
        found = []
        for start in range(0, len(rows), users):
            batch = collate(backbone, rows[start : start + users], pictures, packed)
            found.append(answer_log_probs(forward(backbone, batch), batch))
        return torch.cat(found)

    sides = {
        "a user alone": partial(scores, 1, True),
        "batches of 4": partial(scores, 4, True),
        "batches of 8": partial(scores, 8, True),
        "a row a candidate": partial(scores, 1, False),
    }
    apart = (sides["a user alone"]() - sides["a row a candidate"]()).abs().max().item()
    seconds = interleaved(sides, 2, device)
    print("| scoring 10 candidates | ms a user | TFLOP/s |\n|---|---|---|")
    flops = forward_flops(work, LENGTHS)
    for name, time in seconds.items():
        rate = "" if name == "a row a candidate" else f"{flops / time / 1e12:.3g}"
        print(f"| {name} | {1000 * time / work.prompts:.1f} | {rate} |")
    print(f"\nscores of the first and the last row are apart by at most {apart:.2g} nats")


# ---- parity ----


def parity(work: Work, device: str) -> None:
    """The losses of the scripts' first steps, on a CPU and on `device`, in float32, without dropout
    and noise, whose draws differ between devices.
    """
    tokens = ["--max-pixels", "1024", "--history", "2", "--candidates", "4"]
    steps = ["--targets-per-user", "1", "--epochs", "1", "--micro-batch", "4", "--accumulation"]
    flags = [*tokens, *steps, "2", "--lora-dropout", "0", "--dtype", "float32"]
    table = [f"| loss, float32 | CPU | {device} | apart |", "|---|---|---|---|"]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_checkpoint("qwen2_5_vl", place / "model", words())
        make_posterland(place / "data", users=24 if device == "cuda" else 8)  # 3 steps, or 1
        common = ["--model", str(place / "model"), "--data", str(place / "data"), *flags]
        for name, own in (("train_sft", []), ("train_dpo", ["--sigma", "0"])):
            logs = []
            for number, where in enumerate(("cpu", device)):
                out = place / f"{name}-{number}"
                script(name).main([*common, *own, "--device", where, "--out", str(out)])
                lines = (out / "log.jsonl").read_text().splitlines()
                logs.append([json.loads(line)["loss"] for line in lines])
            for number, (cpu, other) in enumerate(zip(*logs, strict=True)):
                apart = abs(other / cpu - 1)
                table.append(f"| {name}, step {number} | {cpu:.6f} | {other:.6f} | {apart:.1e} |")
                worst = max(worst, apart)
    print("\n" + "\n".join(table))
    if not worst <= 1e-3:
        sys.exit("error: the losses differ by more than Adam makes of rounding")


PARTS = {"step": step, "scoring": scoring, "parity": parity}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(argv)
    os.environ["TQDM_DISABLE"] = "1"
    if not args.toy and not torch.cuda.is_available():
        sys.exit("error: no GPU on this machine, expected one; --toy runs on a CPU")
    work, device = (TOY, "cpu") if args.toy else (SHAPE, "cuda")
    for part in args.parts or PARTS:
        print(f"\n### {part}\n", flush=True)
        users = replace(work, prompts=2 if args.toy else 8)
        PARTS[part](users if part == "scoring" else work, device)


if __name__ == "__main__":
    main()
