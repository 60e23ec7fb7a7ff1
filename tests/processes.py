"""Several processes as one run, for tests: forked ones over a file store, which start at once, and the real torchrun."""

import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent


def together(n, work):
    """Run `work()` in n forked processes that are the ranks of one gloo group. Returns their exit statuses: 0, 1 for an exception, -9 ...

    What `work` finds out goes into files. Tracebacks go to stderr, where pytest shows them if the test fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for r in range(n):
            child = os.fork()
            if child == 0:
                try:
                    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                    torch.set_num_threads(1)
                    dist.init_process_group("gloo", f"file://{folder}/store", rank=r, world_size=n)
                    work()
                    dist.barrier()  # nobody leaves while another still talks to it
                    os._exit(0)
                except BaseException:  # noqa: BLE001  whatever it was, the child must not go on as a second pytest
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def torchrun(n, script, *argv, **env):
    """`torchrun --nproc-per-node n script ...` as a user starts it: (exit code, stdout, stderr)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(script), *map(str, argv)]
    own = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own, cwd=ROOT, timeout=300)
    return done.returncode, done.stdout, done.stderr
