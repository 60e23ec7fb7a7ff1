"""Does memory stay flat over a long run? python benchmarks/soak.py OUT [--steps 200]

Trains HaNoRec (noise, checkpoints every 10 steps, cached reference) on Posterland with the demo's
base model and prints the resident memory of the process by step, after the first 20 that warm it
up: the curve is flat if its slope is within its own scatter.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.command import run
from hanorec.base.files import claim_folder
from hanorec.datasets.posterland import make_posterland
from hanorec.run import run as training_run
from hanorec.studies.scripts import script
from hanorec.studies.stages import BASE

PAGE, WARM = 4096, 20


def resident() -> float:
    """MB of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    out = claim_folder(args.out)
    make_posterland(out / "data", users=args.steps * 8)
    memory, write = [], training_run.append_log

    def noted(path: Path, record: dict[str, Any]) -> None:
        write(path, record)
        memory.append(resident())

    training_run.append_log = noted
    script("train_dpo").main([
        "--model", str(BASE), "--data", str(out / "data"), "--out", str(out / "run"),
        "--micro-batch", "4", "--accumulation", "2", "--targets-per-user", "1", "--epochs", "1",
        "--save-every", "10",
    ])
    curve, steps = np.array(memory[WARM:]), np.arange(WARM, len(memory))
    slope, level = np.polyfit(steps, curve, 1)
    scatter = (curve - np.polyval([slope, level], steps)).std()
    print(
        f"{len(memory)} steps; resident MB at step {WARM}: {curve[0]:.0f}, in the middle: "
        f"{np.median(curve):.0f}, at the end: {curve[-1]:.0f}; "
        f"slope {1000 * slope:+.1f} kB a step, scatter {scatter:.1f} MB"
    )


if __name__ == "__main__":
    run(main)
