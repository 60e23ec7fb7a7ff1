"""The arithmetic of docs/scale.md: what is stored, moved and computed toward a billion users:
python benchmarks/scale.py

Nothing here is measured but the CPU rates it names; GPU hours are operations over 40% of an H100's
989 TFLOP/s in bfloat16, an assumption. Symbols as in benchmarks/sizes.py: P = weights of the
language model's layers, T = tokens of a row, N = items, U = users, d = width.
"""

from sizes import EPOCHS, MODELS, PATCHES, TARGETS, T, hours, in_layers

# Qwen2.5-VL's published shapes
MODELS = {"7B": MODELS["Qwen2.5-VL-7B"], "72B": (73.4e9, 0.70e9, 80, 8192, 1024, 29568)}
WORLDS = {
    "MicroLens": (25_411, 41_081), "1 M users, 1 M items": (1e6, 1e6),
    "1 B users, 100 M items": (1e9, 1e8),
}
IMAGE_TOKENS, K, HISTORY, BRMRS_WIDTH = 64, 10, 100, 64
# bytes: three positions as int64, a place in a list, and an integer of its own for the third of the
# tokens that are text
TOKEN = 44
RANK, LINK = 8, 50e9  # LoRA r; bytes a second between GPUs that do not share a box (400 Gbit/s)


def size(bytes_: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if bytes_ < 1000:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.3g} PB"


def span(h: float) -> str:
    return (
        f"{3600 * h:.0f} s"
        if h < 1 / 60
        else f"{60 * h:.0f} min"
        if h < 1
        else f"{h:.1f} h"
        if h < 48
        else f"{h / 24:,.0f} d"
        if h < 24 * 730
        else f"{h / 24 / 365:,.0f} y"
    )


def main() -> None:
    print("What is stored\n")
    print(
        "| | "
        + " | ".join(f"{w}, {m}" for w in WORLDS for m in MODELS)
        + " |\n"
        + "|---" * (1 + len(WORLDS) * len(MODELS))
        + "|"
    )
    stored = {
        "image features, 64 tokens an image (file)": lambda u, n, d: n * IMAGE_TOKENS * d * 2,
        (
            "e, N x d float32 (every rank; 5 times that while H and X are fused, in the host's "
            "memory)"
        ): lambda u, n, d: n * d * 4,
        "neighbours, N x K (every rank)": lambda u, n, d: n * K * 12,
        "interactions, 100 a user (every rank, as Python lists of 8 bytes)": lambda u, n, d: (
            u * HISTORY * 8
        ),
        "training rows, T tokens of 44 bytes, 3 a user (every rank)": lambda u, n, d: (
            u * TARGETS * T * TOKEN
        ),
        "candidate sets, 10 ids of 10 bytes, 190 in JSON (at most 1.07 GB)": lambda u, n, d: (
            u * 190
        ),
        "BR-MRS: tables of two modalities, Adam, best copy (every rank)": lambda u, n, d: (
            (u + n) * 2 * BRMRS_WIDTH * 4 * 4
        ),
    }
    for name, need in stored.items():
        print(
            f"| {name} | "
            + " | ".join(
                size(need(*world, shape[3]))
                for world in WORLDS.values()
                for shape in MODELS.values()
            )
            + " |"
        )

    print("\nHours on H100s at 40% (one epoch of SFT and DPO; 3 rows a user)\n")
    print(
        "| | GPUs | "
        + " | ".join(f"{w}, {m}" for w in WORLDS for m in MODELS)
        + " |\n"
        + "|---" * (2 + len(WORLDS) * len(MODELS))
        + "|"
    )
    work = {
        "encode the images": lambda u, n, s: 2 * s[1] * PATCHES * n,
        "exact Top-K": lambda u, n, s: n * n * s[3],
        "SFT": lambda u, n, s: 4 * in_layers(*s[2:]) * T * u * TARGETS,
        "reference, once": lambda u, n, s: 2 * in_layers(*s[2:]) * T * u * TARGETS,
        "DPO": lambda u, n, s: 6 * in_layers(*s[2:]) * T * u * TARGETS,
        "rank 10 candidates for every user": lambda u, n, s: 2 * in_layers(*s[2:]) * T * u,
    }
    for name, flops in work.items():
        for gpus in (8, 64, 512):
            print(
                f"| {name} | {gpus} | "
                + " | ".join(
                    span(hours(flops(*world, shape)) / gpus)
                    for world in WORLDS.values()
                    for shape in MODELS.values()
                )
                + " |"
            )

    print("\nA step of 32 rows and what its processes say to each other\n")
    print(
        "| | adapter, float32 | one all-reduce of it | base, bfloat16 | on each of 8, 64 GPUs "
        "with --shard | gathered a forward and backward | compute of a row, SFT, one GPU |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (total, _, layers, width, kv, mlp) in MODELS.items():
        adapter = 4 * layers * RANK * (2 * 2 * width + 2 * (width + kv) + 3 * (width + mlp))
        base = 2 * in_layers(layers, width, kv, mlp)
        whole = 2 * (total - in_layers(layers, width, kv, mlp))
        print(
            f"| {name} | {size(adapter)} | {1000 * 2 * adapter / LINK:.0f} ms | {size(2 * total)} "
            f"| {size(whole + base / 8)}, {size(whole + base / 64)} | "
            f"{size(2 * base)} in {2 * base / LINK:.1f} s | "
            f"{hours(4 * in_layers(layers, width, kv, mlp) * T) * 3600:.2f} s |"
        )
    print(f"\n{EPOCHS} epochs are the release's; the table's hours are for one.")


if __name__ == "__main__":
    main()
