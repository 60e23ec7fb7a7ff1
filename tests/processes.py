"""Processes of their own, for tests: children of a fork server, which start at once, and the real
torchrun.

Pytest's own process is never forked. Where there is a GPU, threads of autograd run in it, and a
fork of it can run no backward. The server is a process started afresh: it has imported what takes
long to import, has computed nothing, and sees no GPU.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).parent.parent

# Children compute on the CPU, and speak to each other on this machine alone.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "llava_next"]
PRELOADED = ["pytest", "toy", "evaluate", "train_brmrs", "train_dpo", "train_sft"]
PRELOADED += [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES]

CONTEXT = multiprocessing.get_context("forkserver")


def start(output, work, *arguments):
    """Start `work(*arguments)` in a child that prints into the file `output`. Returns the process.

    They travel by pickle: work is a function of a module, arguments are plain values. The first
    call starts the server, and so would any other if the server had died.
    """
    CONTEXT.set_forkserver_preload(PRELOADED)
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    child = CONTEXT.Process(target=_child, args=(output, work, *arguments))
    with mock.patch.dict(os.environ, ON_CPU | {"PYTHONPATH": os.pathsep.join(path)}):
        child.start()
    return child


def _child(output, work, *arguments):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    tqdm.set_lock(threading.RLock())  # the one between processes would outlive a child that dies
    work(*arguments)


def in_a_child(work, *arguments, kill_after=None):
    """Run `work(*arguments)` in a child, killed with SIGKILL after so many seconds.

    Returns its exit status: 0, 1 for an exception, -9, or what it passed to os._exit. What it has
    printed goes to stderr if that is not 0, where pytest shows it.
    """
    with tempfile.NamedTemporaryFile("r") as output:
        child = start(output.name, work, *arguments)
        child.join(kill_after)
        if child.exitcode is None:
            child.kill()
            child.join()
        if child.exitcode != 0:
            sys.stderr.write(output.read())
    return child.exitcode


def together(n, work, *arguments):
    """Run `work(*arguments)` in n children that are the ranks of one gloo group, of a thread each.

    Returns their exit statuses. What `work` finds out goes into files. What a child that failed has
    printed goes to stderr, where pytest shows it.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/output{r}" for r in range(n)]
        children = []
        for r, output in enumerate(outputs):
            child = start(output, _rank, f"{folder}/store", r, n, work, *arguments)
            children.append(child)
        for child, output in zip(children, outputs, strict=True):
            child.join()
            if child.exitcode != 0:
                sys.stderr.write(Path(output).read_text())
    return [child.exitcode for child in children]


def _rank(store, r, n, work, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=r, world_size=n)
    work(*arguments)
    dist.barrier()  # nobody leaves while another still talks to it
    os._exit(0)


def run_script(name, argv, *changes):
    """In a child: the main of a script by its name, after each change of what it uses."""
    for change in changes:
        change()
    importlib.import_module(name).main(argv)


def torchrun(n, script, *argv, **env):
    """`torchrun --nproc-per-node n script ...` as a user starts it, with no GPU to be seen.

    Returns (exit code, stdout, stderr).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), str(script), *map(str, argv)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ON_CPU | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env,
        cwd=ROOT,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr
