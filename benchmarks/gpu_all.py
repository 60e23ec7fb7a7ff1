"""Every part of `python benchmarks/gpu.py all`, each a process of its own, one after the other."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from hanorec.base.errors import InputError
from hanorec.run.record import git_revision

HERE = Path(__file__).parent

# Rows, type and rounds of the Top-K kernel beside plain torch.
KERNEL = [
    ("41081", "float32", "3"), ("41081", "bfloat16", "3"), ("200000", "bfloat16", "2"),
    ("1000000", "bfloat16", "1"),
]
# Of a toy: one token an image, four steps instead of twelve.
SHORT = ["--max-pixels", "1024", "--history", "2", "--candidates", "4", "--users-to", "0.34"]


def parts(folder: Path, toy: bool) -> dict[str, list[list[str]]]:
    """What is run, by the part that it belongs to, as arguments of Python."""
    small = ["--toy"] if toy else []
    kernel = []
    for rows, dtype, rounds in [("600", "bfloat16", "1")] if toy else KERNEL:
        sizes = ["--rows", rows, "--dtype", dtype, "--rounds", rounds]
        where = ["--width", "32", "--queries", "100"] if toy else ["--device", "cuda"]
        kernel.append([file("topk.py"), *sizes, *where])

    model, out = str(folder / "model"), str(folder / "out")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1", file("gpu.py")]
    scripts = [
        [file("gpu.py"), "make", "tiny" if toy else "3B", model],
        [*torchrun, "run", model, out, *(SHORT if toy else [])],
    ]
    tests = ["-m", "pytest", "-q", str(HERE.parent / "tests" / "test_gpu.py")]
    return {
        "kernel": kernel,
        "step, scoring, parity": [[file("gpu_step.py"), *small]],
        "scripts": scripts,
        "tests": [tests + (["--collect-only"] if toy else [])],
    }


def file(name: str) -> str:
    return str(HERE / name)


def run_all(toy: bool) -> None:
    """Print the tables of all parts. InputError naming those that failed, once all have run."""
    if not toy and not torch.cuda.is_available():
        raise InputError("all: no GPU on this machine, expected one; give --toy to try it on a CPU")
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1"}
    if toy:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    device = "a CPU, toy sizes" if toy else torch.cuda.get_device_name()
    print(
        f"{device}; torch {torch.__version__}, transformers {transformers.__version__}, commit "
        f"{git_revision() or 'unknown'}"
    )
    failed, begin = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, commands in parts(Path(folder), toy).items():
            start = time.perf_counter()
            print(f"\n## {name}\n", flush=True)
            for words in commands:
                command = [sys.executable, *words]
                if subprocess.run(command, env=environment, check=False).returncode:
                    failed.append(name)
                    break
            print(f"\n{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\nall parts: {time.perf_counter() - begin:.0f} s")
    if failed:
        raise InputError(f"all: {', '.join(failed)} failed, expected none; see what it says above")
