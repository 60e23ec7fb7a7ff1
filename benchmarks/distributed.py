"""What several processes cost: time and bytes of an optimizer step on 2 processes against 1, at the
same global batch.

    python benchmarks/distributed.py [--repeats 3]

The demo's base model on Posterland, LoRA r = 8, global batches of 16 rows, gloo on one machine. A
run has 12 steps; from the end of the second on each step is timed, and a run counts with its median
step. CPU time is the sum over the processes; each has one thread. Kinds take turns, a ratio is of
runs next to each other, and the table has medians over the repeats, of ratios with the smallest and
the largest. Bytes are what a rank hands to collectives. Wall times want an idle machine with a core
for each process.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from processes import run_script, together

from hanorec.datasets.posterland import make_posterland
from hanorec.run import run as training_run
from hanorec.studies.scripts import script as load_script
from hanorec.studies.stages import BASE

COMMON = [
    "--micro-batch", "8", "--accumulation", "2", "--lora-dropout", "0", "--epochs", "1",
    "--targets-per-user", "1", "--save-every", "1000", "--device", "cpu",
]
KINDS = {
    "1 process": (1, []), "2 processes": (2, []), "2 processes, --shard": (2, ["--shard", "true"])
}
# FSDP's is the last, before PyTorch 2.13 the one before
CALLS = ["all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "all_gather_single"]


def counted(tally: list[int]) -> None:
    """From here on `tally` grows by the bytes that this process hands to collectives."""
    def wrap(call: Any, place: int) -> Any:
        def inner(*arguments: Any, **named: Any) -> Any:
            tensor = (
                arguments[place]
                if len(arguments) > place
                else named.get("input_tensor", named.get("input"))
            )
            tally[0] += tensor.numel() * tensor.element_size()
            return call(*arguments, **named)
        return inner

    for name in filter(partial(hasattr, dist), CALLS):
        setattr(
            dist, name, wrap(getattr(dist, name), 0 if name in ("all_reduce", "broadcast") else 1)
        )


def timed(script: str, flags: list[str], folder: str) -> None:
    """In a child: the script, and into a file of the rank what its median step took."""
    tally, ends = [0], []
    counted(tally)
    log = training_run.append_log

    def at_the_end_of_a_step(*arguments: Any) -> None:
        log(*arguments)
        ends.append([time.perf_counter(), time.process_time(), tally[0]])

    training_run.append_log = at_the_end_of_a_step
    run_script(script, [*flags, "--out", f"{folder}/out"])
    median = np.median(np.diff(ends[1:], axis=0), 0).tolist()
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(median))


def run(n: int, script: str, flags: list[str]) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds of all processes, bytes of one rank) of the median step of a
    script on n processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        if together(n, timed, script, flags, folder) != [0] * n:
            raise SystemExit("a process failed; its traceback is above")
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    walls, cpus, sizes = zip(*found, strict=True)
    return max(walls), sum(cpus), max(sizes)


def ratio(these: Sequence[float], those: Sequence[float]) -> str:
    """Of runs next to each other: the median, the smallest and the largest."""
    found = [a / b for a, b in zip(these, those, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} .. {max(found):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    print(
        "stage | | ms a step, wall | CPU, all processes | wall, times 1 process | CPU, times 1 "
        "process | bytes a step | times the adapter"
    )
    print("---|" * 7 + "---")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_posterland(data, users=192)
        common = ["--model", str(BASE), "--data", str(data), *COMMON]
        for script in ("train_sft", "train_dpo"):
            adapter = 4 * adapter_size(common)  # float32; makes the feature file, too
            found: dict[str, list[tuple[float, float, int]]] = {kind: [] for kind in KINDS}
            for _ in range(args.repeats):
                for kind, (n, flags) in KINDS.items():
                    found[kind].append(run(n, script, [*common, *flags]))
            if not found["2 processes, --shard"][0][2] > found["2 processes"][0][2]:
                raise SystemExit(
                    "error: --shard sends no more than without it, expected the gathered layers "
                    "on top; FSDP calls a collective that CALLS lacks"
                )
            for kind, measured in found.items():
                walls, cpus, sizes = zip(*measured, strict=True)
                wall, cpu, size = map(statistics.median, (walls, cpus, sizes))
                shown = ["1", "1"]
                if kind != "1 process":
                    one_wall, one_cpu, _ = zip(*found["1 process"], strict=True)
                    shown = [ratio(walls, one_wall), ratio(cpus, one_cpu)]
                print(
                    f"{script} | {kind} | {1000 * wall:.0f} | {1000 * cpu:.0f} | "
                    f"{' | '.join(shown)} | {size:,.0f} | {size / adapter:.2f}",
                    flush=True,
                )


def adapter_size(common: list[str]) -> int:
    """Weights of the adapter, as run.json states them."""
    with tempfile.TemporaryDirectory() as folder:
        load_script("train_sft").main([*common, "--users-to", "0.2", "--out", f"{folder}/out"])
        return int(json.loads(Path(folder, "out", "run.json").read_text())["trained_weights"])


if __name__ == "__main__":
    main()
