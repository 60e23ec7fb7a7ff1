"""All that a GPU can tell, with one command; and a part of it: SFT and DPO on random weights of
published shapes, their tokens a second and their peak of memory, beside what is expected.

    python benchmarks/gpu.py all [--toy]      every part below, and those of gpu_all.py
    python benchmarks/gpu.py make 3B MODEL    once: the checkpoint, random bfloat16 weights
    torchrun --nproc-per-node 1 benchmarks/gpu.py run MODEL OUT
        [any flag of train_sft.py, as --shard true or --checkpointing true]

all wants one GPU, some 15 GB of disk and about five minutes; --toy takes every part at a size that
says nothing, on a CPU. Sizes: 2B, 3B, 7B (Qwen2-VL-2B, Qwen2.5-VL-3B, -7B), and tiny for a CPU. The
data are Posterland's: 5 films of history, 10 candidates, up to 15 images of 64 tokens; only lengths
matter here. Each stage does 12 optimizer steps of 4 x 2 rows, of which the first two are not timed.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from gpu_all import run_all
from sizes import MICRO, MODELS, in_layers
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
)

from hanorec.base import command
from hanorec.base.distributed import world_size
from hanorec.base.files import claim_folder, write_json
from hanorec.datasets.posterland import make_posterland, words
from hanorec.mllm import builder, memory
from hanorec.run import run as training_run
from hanorec.studies.scripts import script
from hanorec.studies.tiny import make_checkpoint

# published name, heads, vocabulary
SHAPES = {
    "2B": ("Qwen2-VL-2B", 12, 151_936), "3B": ("Qwen2.5-VL-3B", 16, 151_936),
    "7B": ("Qwen2.5-VL-7B", 28, 152_064),
}
STEPS, SKIPPED = 12, 2
FLAGS = [
    "--max-pixels", str(224 * 224), "--micro-batch", str(MICRO), "--accumulation", "2",
    "--epochs", "1", "--targets-per-user", "1", "--lora-dropout", "0",
]


def make(size: str, out: Path) -> None:
    """A checkpoint folder: tokenizer and template of `hanorec.studies.tiny`, configuration and
    number of weights of the published model.
    """
    family = "qwen2_vl" if size == "2B" else "qwen2_5_vl"
    make_checkpoint(family, claim_folder(out), words())
    facts: dict[str, Any] = {"layers": 2, "width": 64, "kv": 32, "mlp": 192}
    if size != "tiny":
        name, heads, vocabulary = SHAPES[size]
        _, _, layers, width, kv, mlp = MODELS[name]
        facts = {"layers": layers, "width": width, "kv": kv, "mlp": mlp}
        config = json.loads((out / "config.json").read_text())
        text = config["text_config"] | {
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv * heads // width,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]
            },
        }
        text.pop("layer_types", None)
        vision = {
            "depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }
        vision |= (
            {"embed_dim": 1280, "hidden_size": width, "mlp_ratio": 4}
            if size == "2B"
            else {
                "hidden_size": 1280, "out_hidden_size": width, "intermediate_size": 3420,
                "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            }
        )
        kind = Qwen2VLConfig if size == "2B" else Qwen2_5_VLConfig
        tokens = {key: value for key, value in config.items() if key.endswith("_token_id")}
        tied = size != "7B"
        config = kind(
            text_config=text | {"tie_word_embeddings": tied}, vision_config=vision,
            tie_word_embeddings=tied, **tokens,
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawn in no time
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(out)
        pixels = {"shortest_edge": 224 * 224, "longest_edge": 224 * 224}
        Qwen2VLImageProcessor(
            patch_size=14, merge_size=2, temporal_patch_size=2, size=pixels
        ).save_pretrained(out)
    write_json(out / "shape.json", facts)
    print(f"wrote {out}")


def measure(stage: str, argv: list[str]) -> tuple[float, int, int, str]:
    """(seconds a step, peak bytes of this process's GPU, tokens of the whole batch's rows, what the
    script itself expects a step to take) of a training script.
    """
    times, tokens, said = [], [0], []
    log, collate, estimate = training_run.append_log, builder.collate, memory.step_memory

    def timed(path: Path, record: dict[str, Any]) -> None:
        log(path, record)
        times.append(time.perf_counter())

    def counting(backbone: Any, rows: Any, *rest: Any, **named: Any) -> Any:
        tokens[0] += sum(len(row.prompt) + sum(map(len, row.answers)) for row in rows)
        return collate(backbone, rows, *rest, **named)

    def expecting(*arguments: Any) -> memory.Memory:
        said.append(estimate(*arguments))
        return said[-1]

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with (
        mock.patch.object(training_run, "append_log", timed),
        mock.patch.object(builder, "collate", counting),
        mock.patch.object(memory, "step_memory", expecting),
    ):
        script(stage).main(argv)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return (
        (times[-1] - times[SKIPPED - 1]) / (len(times) - SKIPPED), peak,
        tokens[0] // len(times) * world_size(), f"{said[0].total / 1e9:.3g}",
    )


def run(model: Path, out: Path, flags: list[str]) -> None:
    facts, data = json.loads((model / "shape.json").read_text()), out / "data"
    # the scripts, which join the ranks, have yet to start
    speaks = int(os.environ.get("RANK", "0")) == 0
    if speaks and not (data / "dataset.json").exists():
        shutil.rmtree(data, ignore_errors=True)
        make_posterland(data, users=STEPS * MICRO * 2)
    while not (data / "dataset.json").exists():  # written last
        time.sleep(0.1)
    weights = in_layers(facts["layers"], facts["width"], facts["kv"], facts["mlp"])
    common = ["--model", str(model), "--data", str(data), *FLAGS, *flags]
    head = "stage | processes | s a step | tokens a second | TFLOP/s, forwards and backwards "
    lines = [head + "| peak memory, GB | expected, GB", "---|" * 6 + "---"]
    for stage, passes in (("train_sft", 4), ("train_dpo", 6)):
        seconds, peak, tokens, expected = measure(stage, [*common, "--out", str(out / stage)])
        lines.append(
            f"{stage} | {world_size()} | {seconds:.2f} | {tokens / seconds:,.0f} | "
            f"{passes * weights * tokens / seconds / 1e12:.4g} | {peak / 1e9:.1f} | {expected}"
        )
    if dist.is_initialized():
        lines.append(f"\nprocesses speak by {dist.get_backend()}")
    print("\n" + "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making, running = commands.add_parser("make"), commands.add_parser("run")
    making.add_argument("size", choices=[*SHAPES, "tiny"])
    making.add_argument("model", type=Path)
    running.add_argument("model", type=Path)
    running.add_argument("out", type=Path)
    commands.add_parser("all").add_argument("--toy", action="store_true")
    args, flags = parser.parse_known_args()
    if args.command == "make":
        make(args.size, args.model)
    elif args.command == "all":
        run_all(args.toy)
    else:
        run(args.model, args.out, flags)


if __name__ == "__main__":
    command.run(main)
