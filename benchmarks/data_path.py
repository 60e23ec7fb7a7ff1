"""The path of the data at scale: readers, each with shards of its own, stream interactions into
shuffled training examples in bounded memory.

    python benchmarks/data_path.py [--interactions 1e8] [--items 1e6] [--readers 4] [--targets 0]
        [--folder F]

A simulation: the training scripts do not read so, they hold their data in memory (docs/scale.md).
The interactions are drawn at random into shards on disk, 4 bytes each: a user's items lie together,
oldest first, beside the length of each sequence. Reader r of R takes shards r, r + R, ... in an
order that depends on the epoch, some 100,000 interactions at a time, whole users. It makes
(history, target) examples of the last --targets positions (0 = all that have a past), draws 9
distinct negatives that the user never had, and passes all of it through a shuffle buffer of fixed
size. Everything follows from seed, epoch and the number of readers.

Checked at the end, or exit code 1: over all readers each example came exactly once (their number,
and the sum modulo 2^64 of a hash of each (user, position), against the same from the lengths
alone).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from measure import status

from hanorec.ranking.sampler import NegativeSampler

# items of a prompt's history; candidates but for the target; items of a user
HISTORY, NEGATIVES, SHORTEST, LONGEST = 5, 9, 5, 20
USERS_PER_SHARD, CHUNK = 100_000, 100_000  # CHUNK: interactions in hand at once
# -1: no item
EXAMPLE = np.dtype([
    ("id", np.uint64),
    ("history", np.int32, HISTORY),
    ("target", np.int32),
    ("negatives", np.int32, NEGATIVES),
])


def generate(folder: Path, interactions: int, items: int, seed: int) -> int:
    """Shards of lengths (uint8) and items (int32), popular items far more often; returns the number
    of interactions.
    """
    users, total = round(2 * interactions / (SHORTEST + LONGEST)), 0
    for shard, first in enumerate(range(0, users, USERS_PER_SHARD)):
        rng = np.random.default_rng([seed, shard])
        count = min(USERS_PER_SHARD, users - first)
        lengths = rng.integers(SHORTEST, LONGEST + 1, count, dtype=np.uint8)
        uniform = rng.random(int(lengths.sum()), dtype=np.float32)
        drawn = (items * uniform**3).astype(np.int32).clip(max=items - 1)
        lengths.tofile(folder / f"{shard:06d}.lengths")
        drawn.tofile(folder / f"{shard:06d}.items")
        total += len(drawn)
    return total


def example_ids(
    first_user: int, lengths: np.ndarray, targets: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of users first_user, first_user + 1, ...: each example's id (user * 2^8 + position), user,
    from 0, and position in its sequence.
    """
    n = lengths.astype(np.int64)
    count = np.minimum(n - 1, targets) if targets else n - 1
    user = np.repeat(np.arange(len(n)), count)  # (E,)
    position = (n - count)[user] + np.arange(len(user)) - (count.cumsum() - count)[user]
    return ((first_user + user) * 256 + position).astype(np.uint64), user, position


def mixed(ids: np.ndarray) -> int:
    """The sum modulo 2^64 of a hash of each id (splitmix64): a lost example and another twice do
    not cancel.
    """
    z = ids + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((z ^ (z >> np.uint64(31))).sum(dtype=np.uint64))


def chunks(folder: Path, shards: list[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """First user, lengths, items: whole users, about CHUNK interactions at a time."""
    for shard in shards:
        lengths = np.fromfile(folder / f"{shard:06d}.lengths", np.uint8)
        ends = lengths.cumsum(dtype=np.int64)
        with open(folder / f"{shard:06d}.items", "rb") as file:
            start = 0
            while start < len(lengths):
                done = ends[start - 1] if start else 0
                stop = int(np.searchsorted(ends, done + CHUNK, side="right"))
                stop = max(start + 1, stop)
                part = lengths[start:stop]
                items = np.fromfile(file, np.int32, int(part.sum()))
                yield shard * USERS_PER_SHARD + start, part, items
                start = stop


def make_examples(
    first_user: int, lengths: np.ndarray, items: np.ndarray, targets: int, n_items: int,
    generator: torch.Generator,
) -> np.ndarray:
    """All examples (E,) of a chunk."""
    ids, user, position = example_ids(first_user, lengths, targets)
    start = lengths.cumsum(dtype=np.int64) - lengths
    found = np.empty(len(ids), EXAMPLE)
    found["id"], found["target"] = ids, items[start[user] + position]
    back = position[:, None] - np.arange(HISTORY, 0, -1)  # (E, H), oldest first
    found["history"] = np.where(back >= 0, items[start[user][:, None] + back.clip(min=0)], -1)
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    sampler = NegativeSampler(owner, torch.from_numpy(items).long(), len(lengths), n_items)
    who = torch.from_numpy(user)
    drawn = sampler.draw(who, NEGATIVES, generator).numpy()  # (E, 9), with replacement ...
    # ... so rows that hold an item twice are drawn again
    while len(twice := np.flatnonzero((np.diff(np.sort(drawn, 1)) == 0).any(1))):
        drawn[twice] = sampler.draw(who[twice], NEGATIVES, generator).numpy()
    found["negatives"] = drawn
    return found


def shuffled(
    parts: Iterator[np.ndarray], size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The examples through a buffer of `size`: each part joins it, and as many, drawn at random,
    leave it.
    """
    buffer = np.empty(0, EXAMPLE)
    for part in parts:
        buffer = np.concatenate([buffer, part])
        if (leaving := len(buffer) - size) > 0:
            chosen = rng.choice(len(buffer), leaving, replace=False)
            yield buffer[chosen]
            kept = np.ones(len(buffer), bool)
            kept[chosen] = False
            buffer = buffer[kept]
    yield buffer[rng.permutation(len(buffer))]


def stream(
    folder: Path, reader: int, readers: int, items: int, targets: int, buffer: int, seed: int,
    epoch: int = 0,
) -> Iterator[np.ndarray]:
    """One epoch of one reader: arrays of EXAMPLE."""
    rng = np.random.default_rng([seed, epoch, reader])
    shards = rng.permutation(range(reader, len(list(folder.glob("*.items"))), readers)).tolist()
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    parts = chunks(folder, shards)
    made = (make_examples(*part, targets, items, generator) for part in parts)
    return shuffled(made, buffer, rng)


@dataclass
class Tally:
    """What one reader did."""

    examples: int = 0
    hash: int = 0
    interactions: int = 0
    cpu: float = 0.0
    wall: float = 0.0
    peak: float = 0.0  # MB
    # MB before the first interaction
    imports: float = field(default_factory=lambda: status("VmRSS") / 2**10)


def read(args: argparse.Namespace) -> Tally:
    tally, cpu, wall = Tally(), time.process_time(), time.perf_counter()
    for part in stream(
        args.folder, args.reader, args.readers, int(args.items), args.targets, args.buffer,
        args.seed,
    ):
        tally.examples += len(part)
        tally.hash = (tally.hash + mixed(part["id"])) % 2**64
    tally.cpu, tally.wall, tally.peak = (
        time.process_time() - cpu, time.perf_counter() - wall, status("VmHWM") / 2**10
    )
    tally.interactions = sum(
        path.stat().st_size // 4
        for path in sorted(args.folder.glob("*.items"))[args.reader :: args.readers]
    )
    return tally


def expected(folder: Path, targets: int) -> tuple[int, int]:
    """Number and hash of all examples, from the lengths alone."""
    number = total = 0
    for shard, path in enumerate(sorted(folder.glob("*.lengths"))):
        ids, _, _ = example_ids(shard * USERS_PER_SHARD, np.fromfile(path, np.uint8), targets)
        number, total = number + len(ids), (total + mixed(ids)) % 2**64
    return number, total


def compare(tallies: list[Tally], wanted: tuple[int, int]) -> None:
    found = sum(t.examples for t in tallies), sum(t.hash for t in tallies) % 2**64
    if found != wanted:
        sys.exit(
            f"error: number and hash of the examples {found}, expected {wanted}: not each came once"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interactions", type=float, default=2e6)
    parser.add_argument("--items", type=float, default=1e6)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=2, help="readers that run side by side")
    parser.add_argument("--targets", type=int, default=0)
    parser.add_argument(
        "--buffer", type=int, default=2**18, help="examples in a reader's shuffle buffer"
    )
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument(
        "--folder", type=Path, help="where the shards go; default: a temporary folder"
    )
    parser.add_argument("--reader", type=int, help="be this reader of the shards in --folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.reader is not None:
        print(json.dumps(vars(read(args))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, cpu = Path(name), time.process_time()
        total = generate(folder, round(args.interactions), int(args.items), args.seed)
        print(
            (
                f"{total:,} interactions in {len(list(folder.glob('*.items')))} shards, drawn in "
                f"{time.process_time() - cpu:.0f} CPU s"
            ),
            flush=True,
        )
        command = [
            sys.executable, __file__, "--items", str(args.items), "--readers", str(args.readers),
            "--targets", str(args.targets), "--buffer", str(args.buffer), "--seed", str(args.seed),
            "--folder", name,
        ]
        tallies = []
        for first in range(0, args.readers, args.at_once):
            group = range(first, min(first + args.at_once, args.readers))
            running = [
                subprocess.Popen([*command, "--reader", str(r)], stdout=subprocess.PIPE, text=True)
                for r in group
            ]
            tallies += [Tally(**json.loads(process.communicate()[0])) for process in running]
        compare(tallies, expected(folder, args.targets))
    print(
        "\n| reader | interactions | examples | CPU s | interactions a CPU second | examples a "
        "CPU second | peak memory, MB (of which imports) |"
    )
    print("|---|---|---|---|---|---|---|")
    for r, t in enumerate(tallies):
        print(
            f"| {r} | {t.interactions:,} | {t.examples:,} | {t.cpu:.1f} | "
            f"{t.interactions / t.cpu:,.0f} | {t.examples / t.cpu:,.0f} | {t.peak:.0f} "
            f"({t.imports:.0f}) |"
        )
    rate = total / sum(t.cpu for t in tallies)
    print(
        f"\neach of {sum(t.examples for t in tallies):,} examples came once; {rate:,.0f} "
        "interactions a second a reader: 10^11 interactions "
        f"(10^9 users, 100 each) take 64 readers {1e11 / 64 / rate / 3600:.1f} hours"
    )


if __name__ == "__main__":
    main()
