"""Every stage on Posterland, the generated catalogue, with one command and no download.

    python -m hanorec.demo --out DIR [--seeds N] [--device cuda]

For each seed: make the data, fine-tune (SFT) on one half of the users, then train on others, which
SFT did not see: DPO, HaNoRec as documented, its ablations, HaNoRec with standardised lambda and
relative noise, and SFT continued, which shows what the added users are worth without any preference
pair. All are evaluated on the same candidates, beside chance, popularity, the bare base model, SFT
with the posters shuffled, and the oracle (the probabilities that generated the data).

DIR receives results.json, table.md, plots, and DIR/seed-N with the data and every run. The settings
that differ from the published ones are COMMON, SFT and DPO in hanorec/studies/stages.py: the model
is a thousand times smaller, so it needs larger steps.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.demo")
    result.add_argument("--out", required=True, type=Path, help="new folder")
    result.add_argument(
        "--seeds", type=int, default=1, help="how many times all is repeated, data included")
    result.add_argument("--device", help="default: cpu, also where there is a GPU")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import torch

from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder, write_json, write_text
from hanorec.base.terminal import aligned
from hanorec.studies.clock import Clock
from hanorec.studies.stages import SHARES, run_seed, table, title_table


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")

    device = args.device or "cpu"
    if args.device is None and torch.cuda.is_available():
        print(
            "the demo runs on the CPU: a GPU would wait for the launches of so small a model; "
            "--device cuda takes it"
        )
    out, start, cpu = claim_folder(args.out), time.time(), time.process_time()
    found, ambiguous, stages = [], [], Clock(SHARES, args.seeds)
    for seed in range(2025, 2025 + args.seeds):
        results, titles = run_seed(out / f"seed-{seed}", seed, device, stages)
        found.append(results)
        ambiguous.append(titles)

    text = table(found) + title_table(found, ambiguous)
    write_json(out / "results.json", {
        "seeds": found,
        "seconds": time.time() - start,
        "cpu_seconds": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
    })
    spread = f"mean and deviation over {args.seeds} seeds"
    if args.seeds == 1:
        spread = "bootstrap 95% intervals over users"
    write_text(out / "table.md", f"# Posterland, {spread}\n{text}")
    print(aligned(text))

    try:
        from hanorec.studies.plots import plot_run
    except ImportError:
        print("no plots: matplotlib is not installed (pip install -e .[plots])")
    else:
        for path in plot_run(out):
            print(f"wrote {path}")
    seconds = time.time() - start
    print(f"wrote {out / 'results.json'} and {out / 'table.md'} in {seconds:.0f} s")
