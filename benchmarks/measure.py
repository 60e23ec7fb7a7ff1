"""What the benchmarks against peers share: CPU seconds of both sides in turn, agreement before any
ratio, the floor, peak memory.

Time is the process's CPU time on one thread (on a GPU the wall clock, synchronised). Each round
runs every side once, so that a slow minute of the machine meets all of them; the first round is a
warm-up; the table shows medians.
"""

import gc
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Sides = dict[str, Callable[[], object]]
PEERS = ("torch", "transformers", "trl", "peft")


def begin(device: str) -> None:
    """Pin the threads; say what is measured, and on what."""
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {version(name)}" for name in PEERS)
    where = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread, process time"
    print(f"float32, {where}; {versions}\n")


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(side: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    start = now(device)
    side()
    return now(device) - start


def interleaved(sides: Sides, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each side over `rounds` rounds after the warm-up."""
    clocks = {name: partial(timed, side, device) for name, side in sides.items()}
    return medians(clocks, rounds)


def medians(clocks: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The same of sides that each say how many seconds they took."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds + 1):
        for name, clock in clocks.items():
            times[name].append(clock())
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def agree(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Print how far apart both sides' results are, relative to the largest entry; no ratio is worth
    printing beyond the tolerance.
    """
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{what}: apart by {apart:.1e} of the largest (allowed {tolerance:.0e})")
    if not apart <= tolerance:
        sys.exit(
            f"error: {what} differ, so both sides do not compute the same thing; no ratio is "
            "printed"
        )


def gemm_rate(device: str, n: int = 1024) -> float:
    """Multiply-adds count two: FLOP/s of an n x n by n x n product, the best of five."""
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    a @ b
    times = []
    for _ in range(5):
        start = now(device)
        for _ in range(5):
            a @ b
        times.append((now(device) - start) / 5)
    return 2 * n**3 / min(times)


def peak_memory(command: list[str]) -> float:
    """MB that `command`, in a process of its own, prints as the last word of its last line.

    There glibc gives every freed tensor back at once: what it keeps for later use varies between
    equal runs by a third.
    """
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=own
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def measure_memory(side: Callable[[], object], device: str) -> float:
    """MB that one call takes at its peak above what the process holds before it.

    Linux: the resident set's high-water mark, reset before the call. (getrusage's ru_maxrss cannot
    be reset, and a child process starts with its parent's.)
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    side()
    return (status("VmHWM") - before) / 2**10


def status(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(field))
