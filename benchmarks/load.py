"""Large data: how long a catalogue of 200,000 items and a million users take to read, and how much
memory, before any model is loaded.

    python benchmarks/load.py [--items N] [--users N]

The data set is generated in a temporary folder (some 250 MB): images are empty files, since nothing
here opens them; a user has 3 to 22 items in train.tsv, by popularity, one in val.tsv and one in
test.tsv. All stages run in one fresh process, as in train_sft.py and evaluate.py, and keep their
results. CPU = process time on one thread. Memory = resident set: at its peak during the stage, and
after it.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import status

from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.frozen import load_candidates, save_candidates
from hanorec.datasets.interactions import (
    heldout_examples,
    load_interactions,
    select_users,
    training_examples,
)


def generate(folder: Path, items: int, users: int) -> None:
    """A native data set; ids are shuffled numbers, titles three words and a number."""
    rng = np.random.default_rng(2025)
    words = [
        "Silent", "Comet", "Rose", "Letter", "Grand", "Canyon", "Misty", "Verdict", "Funny",
        "Rocket",
    ]
    ids = [str(i) for i in rng.permutation(items) + 10_000_000]
    with open(folder / "Load_titles.csv", "w", encoding="utf-8") as file:
        file.write("item,title\n")
        for n, three in enumerate(rng.integers(10, size=(items, 3)).tolist()):
            title = " ".join(words[w] for w in three)
            file.write(f"{ids[n]},{title} {n}\n")
    (folder / "images").mkdir()
    for item in ids:
        (folder / "images" / f"{item}.jpg").touch()
    popularity = rng.lognormal(0, 1.5, items).cumsum()
    with (
        open(folder / "train.tsv", "w") as train, open(folder / "val.tsv", "w") as val,
        open(folder / "test.tsv", "w") as test,
    ):
        for start in range(0, users, 10_000):
            count = min(10_000, users - start)
            lengths = rng.integers(5, 25, count)  # val and test included
            rows = np.searchsorted(popularity, rng.uniform(0, popularity[-1], int(lengths.sum())))
            for user, part in enumerate(np.split(rows, lengths.cumsum()[:-1]), start):
                *most, last_but_one, last = [ids[row] for row in part.tolist()]
                train.write(f"user{user}\t{' '.join(most)}\n")
                val.write(f"user{user}\t{last_but_one}\n")
                test.write(f"user{user}\t{last}\n")


def stage(
    name: str, describe: Callable[[Any], str], what: Callable[..., Any], *arguments: Any,
    **options: Any,
) -> Any:
    """Run one stage and print its line of the table."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    start = time.process_time()
    result = what(*arguments, **options)
    seconds = time.process_time() - start
    peak, after = status("VmHWM") / 2**10, status("VmRSS") / 2**10
    print(
        f"| {name} | {describe(result)} | {seconds:.1f} | {peak:,.0f} MB | {after:,.0f} MB |",
        flush=True,
    )
    return result


def measure(folder: Path) -> None:
    """All stages, in this process."""
    def sets(found: list[Any]) -> str:
        return f"{len(found):,} sets of {len(found[0].candidates)}"

    def examples(found: list[Any]) -> str:
        return f"{len(found):,} examples"

    path = folder / "candidates.json"
    print(f"| the imports | | | | {status('VmRSS') / 2**10:,.0f} MB |")
    catalog = stage(
        "load_catalog", lambda c: f"{len(c.ids):,} items, {sum(map(bool, c.images)):,} images",
        load_catalog, folder,
    )
    data = stage(
        "load_interactions",
        lambda d: f"{len(d.train):,} users, {sum(map(len, d.train.values())):,} training items",
        load_interactions, folder, catalog,
    )
    users = stage(
        "select_users, all", lambda u: f"{len(u):,} users", select_users, data.train, 0, 1, 2025
    )
    training = stage("training_examples", examples, training_examples, data, 3, 5, users)
    training = stage("draw_candidates, training", sets, draw_candidates, training, catalog)
    training = None  # evaluation does not hold these
    heldout = stage("heldout_examples, test", examples, heldout_examples, data, "test")
    drawn = stage("draw_candidates, test", sets, draw_candidates, heldout, catalog)
    stage(
        "save_candidates", lambda _: f"{path.stat().st_size / 2**20:.0f} MB file", save_candidates,
        path, drawn, catalog, seed=2025,
    )
    drawn = None
    stage("load_candidates", sets, load_candidates, path, heldout, catalog, seed=2025)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, help="measure this data set instead of a generated one"
    )
    args = parser.parse_args()
    if args.folder:
        return measure(args.folder)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), args.items, args.users)
        sizes = " + ".join(
            f"{path.name} {path.stat().st_size / 2**20:.0f} MB"
            for path in sorted(Path(folder).glob("*.[ct]sv"))
        )
        print(
            f"{sizes}\n\n| stage | result | CPU s | peak | after |\n|---|---|---|---|---|",
            flush=True,
        )
        subprocess.run([sys.executable, __file__, "--folder", folder], check=True)


if __name__ == "__main__":
    main()
