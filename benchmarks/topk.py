#!/usr/bin/env python3
"""The Top-K kernel against exact search by faiss (IndexFlatIP) and against plain torch (whole rows
of the matrix, then torch.topk).

    python benchmarks/topk.py [--rows 41081] [--width 1536] [--k 10] [--dtype float32]
        [--queries 4096] [--rounds 5] [--device cuda]
    python benchmarks/topk.py --table --device cuda    a row a size, plain torch and floor beside it
    python benchmarks/topk.py --toy                    the same table of toys, in seconds on a CPU

Ours answers every row. A peer answers the first --queries rows, and its seconds are scaled to all:
each query costs it one pass over the rows, however many there are. Neither peer can leave the row
itself out, so both are asked for K + 1. faiss: float32 on a CPU (`pip install faiss-cpu`). Floor:
the products of one half of the symmetric matrix, N^2 d FLOP, at the measured rate of a product.
"""

import argparse
import sys
from typing import Any, NamedTuple

import torch
from measure import interleaved, measure_memory, now, peak_memory
from torch import Tensor
from torch.nn import functional as F

from hanorec.topk import topk_neighbors

# scores no further apart count as equal: a peer returns them in this type
ROUNDING = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}


# rows, width, dtype of --table
SIZES = [
    (41_081, 1536, "float32"), (41_081, 1536, "bfloat16"), (200_000, 1536, "bfloat16"),
    (1_000_000, 1536, "bfloat16"),
]
TOYS = [(700, 32, "float32"), (1_000, 32, "bfloat16")]


class Row(NamedTuple):
    """A row of the table: seconds for all rows, megabytes beside the rows (results included)."""

    rows: int
    width: int
    dtype: str
    ours: float
    plain: float
    floor: float
    memory: float

    def __str__(self) -> str:
        return (
            f"| {self.rows:,} x {self.width} {self.dtype} | {self.ours:.3g} | {self.plain:.3g} | "
            f"{self.plain / self.ours:.2f} | {self.floor:.3g} | {self.ours / self.floor:.1f} | "
            f"{self.memory:.0f} |"
        )


HEAD = (
    "| Top-K | seconds | plain torch, seconds | times plain | floor, seconds | times the floor | "
    "memory, MB |\n|---|---|---|---|---|---|---|"
)


def unit_rows(args: argparse.Namespace) -> Tensor:
    generator = torch.Generator(args.device).manual_seed(0)
    e = torch.randn(args.rows, args.width, generator=generator, device=args.device)
    for block in e.split(4096):  # in place: at a million rows a copy would not fit beside it
        block.copy_(F.normalize(block, dim=1))
    return e.to(getattr(torch, args.dtype))  # (N, d)


def faiss_sides(e: Tensor, queries: int, k: int) -> tuple[Any, Any]:
    """Make the index, which holds a copy of the rows; search it."""
    import faiss

    faiss.omp_set_num_threads(1)

    def make() -> Any:
        index = faiss.IndexFlatIP(e.shape[1])
        index.add(e.numpy())
        return index

    return make, lambda index: torch.from_numpy(index.search(e[:queries].numpy(), k + 1)[1])


def plain(e: Tensor, queries: int, k: int) -> Tensor:
    return torch.cat([(rows @ e.T).topk(k + 1).indices for rows in e[:queries].split(1024)])


def without_itself(index: Tensor) -> Tensor:
    """(Q, K + 1) -> (Q, K): drop the row itself; where copies of it fill the list, the last place.
    """
    itself = index == torch.arange(len(index), device=index.device)[:, None]
    itself[:, -1] |= ~itself.any(1)
    return index[~itself].view(len(index), -1)


def product_rate(e: Tensor, device: str) -> float:
    """FLOP/s of a product of well-shaped blocks, the best of five; a CPU multiplies half precision
    as float32, as ours does.
    """
    a = e[: 2048 if device == "cpu" else 8192]
    a = a.float() if device == "cpu" else a
    times = []
    for _ in range(6):
        start = now(device)
        a @ a.T
        times.append(now(device) - start)
    return 2 * len(a) ** 2 * a.shape[1] / min(times[1:])


def compare(name: str, e: Tensor, ours: Tensor, theirs: Tensor, tolerance: float) -> str:
    """Rows whose sets differ, and how many of those by more than rounding: the scores in float64,
    sorted, are apart.
    """
    theirs = without_itself(theirs)
    rows = (ours.sort(1).values != theirs.sort(1).values).any(1).nonzero()[:, 0]
    wide = e[rows].double()

    def scores(index: Tensor) -> Tensor:
        return torch.einsum("rkd,rd->rk", e[index[rows]].double(), wide).sort(1).values

    beyond = int(((scores(ours) - scores(theirs)).abs() > tolerance).any(1).sum())
    if beyond:
        sys.exit(
            f"error: {beyond} of {len(theirs)} rows have other neighbours than {name} finds, "
            "beyond rounding; no ratio is printed"
        )
    return f"{len(rows)} of {len(theirs)}"


def measured(
    rows: int, width: int, dtype: str, k: int, queries: int, rounds: int, device: str
) -> Row:
    """Ours by groups of columns, as on a GPU (also on a CPU), against plain torch. No row where
    the neighbours differ beyond rounding.
    """
    e = unit_rows(argparse.Namespace(rows=rows, width=width, dtype=dtype, device=device))
    queries = min(queries, rows)
    sides: dict[str, Any] = {
        "ours": lambda: topk_neighbors(e, k, by_groups=True),
        "plain": lambda: plain(e, queries, k),
    }
    compare("plain torch", e, sides["ours"]()[1][:queries], sides["plain"](), ROUNDING[dtype])
    seconds = interleaved(sides, rounds, device)
    return Row(
        rows, width, dtype, seconds["ours"], seconds["plain"] * rows / queries,
        rows**2 * width / product_rate(e, device), measure_memory(sides["ours"], device),
    )


def table(device: str, toy: bool, k: int = 10, queries: int = 4096, rounds: int = 3) -> list[Row]:
    """Measure and print a row a size."""
    print(HEAD)
    found = []
    for rows, width, dtype in TOYS if toy else SIZES:
        found.append(measured(rows, width, dtype, k, queries, rounds, device))
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=41_081)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--dtype", choices=list(ROUNDING), default="float32")
    parser.add_argument(
        "--block", type=int, help="rows of a block of ours; default: the kernel's own"
    )
    parser.add_argument("--queries", type=int, default=4096, help="rows that a peer answers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--memory", metavar="SIDE",
        help="measure the peak memory of this side alone, beside the rows",
    )
    parser.add_argument("--table", action="store_true", help="a row for each of several sizes")
    parser.add_argument("--toy", action="store_true", help="the table, of toys")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table or args.toy:
        table(args.device, args.toy, args.k, args.queries, args.rounds)
        return
    queries = min(args.queries, args.rows)
    e = unit_rows(args)
    sides: dict[str, Any] = {
        "hanorec": lambda: topk_neighbors(e, args.k, args.block),
        "torch": lambda: plain(e, queries, args.k),
    }
    if args.device == "cpu" and args.dtype == "float32":
        make, search = faiss_sides(e, queries, args.k)
        if args.memory == "faiss":
            print(measure_memory(lambda: search(make()), "cpu"))
            return
        index = None if args.memory else make()
        sides["faiss"] = lambda: search(index)
    if args.memory:
        print(measure_memory(sides[args.memory], args.device))
        return

    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else "one CPU thread, process time"
    )
    print(
        f"{args.rows:,} x {args.width} {args.dtype}, K = {args.k}; {where}; medians of "
        f"{args.rounds} rounds\n"
    )
    rate = product_rate(e, args.device)
    results = {name: side() for name, side in sides.items()}
    differ = {name: compare(name, e, results["hanorec"][1][:queries], found, ROUNDING[args.dtype])
              for name, found in results.items() if name != "hanorec"}
    seconds = interleaved(sides, args.rounds, args.device)
    command = [__file__, *sys.argv[1:]]
    print(
        "| Top-K | rows answered | seconds for all rows | ours is faster | extra memory, MB | "
        "rows that differ, all within rounding |"
    )
    print("|---|---|---|---|---|---|")
    for name, time in seconds.items():
        answered = args.rows if name == "hanorec" else queries
        scaled = time * args.rows / answered
        ratio = "" if name == "hanorec" else f"{scaled / seconds['hanorec']:.2f} times"
        memory = peak_memory([*command, "--memory", name])
        print(
            f"| {name} | {answered:,} | {scaled:.2f} | {ratio} | {memory:.0f} | "
            f"{differ.get(name, '')} |"
        )
    flops = args.rows**2 * args.width
    print(
        f"\nfloor {flops / rate:.2f} s: N^2 d = {flops / 1e12:.2f} TFLOP at {rate / 1e9:.0f} "
        f"GFLOP/s; hanorec takes {seconds['hanorec'] * rate / flops:.2f} times that"
    )


if __name__ == "__main__":
    main()
