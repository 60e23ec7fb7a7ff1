"""The arithmetic of docs/scale.md: what is stored, moved and computed toward a billion users:
python benchmarks/scale.py

GPU hours are operations over the rates that one H100 reached at 3B and 529e433 (RATES, and the
Top-K's); where there is none, over 40% of its 989 TFLOP/s in bfloat16, an assumption. P = weights
of the language model's layers, T = tokens of a row, N = items, U = users, d = width.
"""

import itertools
from collections.abc import Callable

from sizes import (
    DPO,
    EPOCHS,
    FORWARD,
    GPU,
    MODELS,
    PATCHES,
    SFT,
    SHARE,
    TARGETS,
    T,
    hours,
    in_layers,
)

Model = tuple[float, float, int, int, int, int]  # as in benchmarks/sizes.py

# Qwen2.5-VL's published shapes
MODELS: dict[str, Model] = {
    "7B": MODELS["Qwen2.5-VL-7B"],
    "72B": (73.4e9, 0.70e9, 80, 8192, 1024, 29568),
}
WORLDS = {
    "MicroLens": (25_411, 41_081), "1 M users, 1 M items": (1e6, 1e6),
    "1 B users, 100 M items": (1e9, 1e8),
}
CASES = list(itertools.product(WORLDS.items(), MODELS.items()))
IMAGE_TOKENS, K, HISTORY, BRMRS_WIDTH = 64, 10, 100, 64
# bytes: three positions as int64, a place in a list, and an integer of its own for the third of the
# tokens that are text
TOKEN = 44
# Top-K, one H100, commit 529e433 (docs/performance.md): the rate of products in float32, as e is;
# and what 10^6 x 1536 rows in bfloat16 took beside their products, seconds a pair of rows
PRODUCTS = 51e12
SELECTING = (15.8 - 1e12 * 1536 / 635e12) / 1e12
RANK, LINK = 8, 50e9  # LoRA r; bytes a second between GPUs that do not share a box (400 Gbit/s)


def size(bytes_: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if bytes_ < 1000:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.3g} PB"


def span(h: float) -> str:
    if h < 1 / 60:
        return f"{3600 * h:.0f} s"
    if h < 1:
        return f"{60 * h:.0f} min"
    if h < 48:
        return f"{h:.1f} h"
    if h < 24 * 730:
        return f"{h / 24:,.0f} d"
    return f"{h / 24 / 365:,.0f} y"


# Bytes by users, items and width.
STORED: dict[str, Callable[[float, float, int], float]] = {
    "image features, 64 tokens an image (file)": lambda u, n, d: n * IMAGE_TOKENS * d * 2,
    "e, N x d float32 (every rank; 5 times that while H and X are fused, in the host's memory)":
        lambda u, n, d: n * d * 4,
    "neighbours, N x K (every rank)": lambda u, n, d: n * K * 12,
    "interactions, 100 a user (every rank, as Python lists of 8 bytes)":
        lambda u, n, d: u * HISTORY * 8,
    "training rows, T tokens of 44 bytes, 3 a user (every rank)":
        lambda u, n, d: u * TARGETS * T * TOKEN,
    "candidate sets, 10 ids of 10 bytes, 190 in JSON (at most 1.07 GB)":
        lambda u, n, d: u * 190,
    "BR-MRS: tables of two modalities, Adam, best copy (every rank)":
        lambda u, n, d: (u + n) * 2 * BRMRS_WIDTH * 4 * 4,
}

# Operations by users, items and a row of MODELS.
WORK: dict[str, Callable[[float, float, Model], float]] = {
    "encode the images": lambda u, n, s: 2 * s[1] * PATCHES * n,
    # as operations at the rate of all others
    "exact Top-K": lambda u, n, s: n * n * (s[3] / PRODUCTS + SELECTING) * GPU * SHARE,
    "SFT": lambda u, n, s: 4 * in_layers(*s[2:]) * T * u * TARGETS,
    "reference, once": lambda u, n, s: 2 * in_layers(*s[2:]) * T * u * TARGETS,
    "DPO": lambda u, n, s: 6 * in_layers(*s[2:]) * T * u * TARGETS,
    "rank 10 candidates for every user": lambda u, n, s: 2 * in_layers(*s[2:]) * T * u,
}

RATES = {
    "SFT": SFT, "DPO": DPO, "reference, once": FORWARD, "rank 10 candidates for every user": FORWARD
}


def head(*first: str) -> None:
    """The head of a table: a nameless column, these, then one for each world and model."""
    columns = [*first, *(f"{world}, {model}" for (world, _), (model, _) in CASES)]
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")


def line(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    print("What is stored\n")
    head()
    for name, need in STORED.items():
        line(name, *(size(need(*world, shape[3])) for (_, world), (_, shape) in CASES))

    print("\nHours on H100s (one epoch of SFT and DPO; 3 rows a user)\n")
    head("GPUs")
    for name, flops in WORK.items():
        rate = RATES.get(name, GPU * SHARE)
        needed = [hours(flops(*world, shape), rate) for (_, world), (_, shape) in CASES]
        for gpus in (8, 64, 512):
            line(name, str(gpus), *(span(h / gpus) for h in needed))

    print("\nA step of 32 rows and what its processes say to each other\n")
    print(
        "| | adapter, float32 | one all-reduce of it | base, bfloat16 | on each of 8, 64 GPUs "
        "with --shard | gathered a forward and backward | compute of a row, SFT, one GPU |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (total, _, layers, width, kv, mlp) in MODELS.items():
        weights = in_layers(layers, width, kv, mlp)
        adapter = 4 * layers * RANK * (2 * 2 * width + 2 * (width + kv) + 3 * (width + mlp))
        base, whole = 2 * weights, 2 * (total - weights)
        line(
            name,
            size(adapter),
            f"{1000 * 2 * adapter / LINK:.0f} ms",
            size(2 * total),
            f"{size(whole + base / 8)}, {size(whole + base / 64)}",
            f"{size(2 * base)} in {2 * base / LINK:.1f} s",
            f"{hours(4 * weights * T, SFT) * 3600:.2f} s",
        )
    print(f"\n{EPOCHS} epochs are the release's; the table's hours are for one.")


if __name__ == "__main__":
    main()
