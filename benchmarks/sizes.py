"""Memory and time of a real run, worked out from the published sizes of models and data sets:
python benchmarks/sizes.py

Nothing here is measured. P = weights of the language model's layers, T = tokens of a row, r = LoRA
rank.
    weights      2 bytes each, vision tower included
    adapter      16 bytes each: float32 value, gradient, and AdamW's two moments
    activations  what backward needs of one token in one layer, in bfloat16: 6 vectors of the width
                 and 4 of the MLP's; with checkpointing the layer's input alone, and one layer's
                 worth of the rest
    time         a row costs 2PT forward and 2PT backward (the base is frozen: gradients of
                 activations alone). SFT 4PT. DPO adds the clean policy, 2PT, at every step, and the
                 reference, 2PT, once for all epochs. The plain path (--plain) computes the prompt
                 for both answers, and the reference in every epoch: 2 x (4 + 2 + 2) PT.
    vision tower 2 x weights x patches an image, once a catalogue
"""

GPU, SHARE = 989e12, 0.4  # H100, dense bfloat16; the share of it that we count on
T, MICRO, RANK, EPOCHS, PATCHES = 1500, 4, 8, 5, 256
# users, items (document 000)
DATA = {"MicroLens": (25_411, 41_081), "Netflix": (13_187, 17_366), "MovieLens-1M": (6_040, 3_952)}
TARGETS = 3  # training rows a user, at most
MODELS = {  # name: all weights, vision tower's, layers, width, key-value width, MLP width
    "Qwen2-VL-2B": (2.21e9, 0.67e9, 28, 1536, 256, 8960),
    "Qwen2.5-VL-3B": (3.75e9, 0.67e9, 36, 2048, 256, 11008),
    "Qwen2.5-VL-7B": (8.29e9, 0.68e9, 28, 3584, 512, 18944),
}


def in_layers(layers: int, width: int, kv: int, mlp: int) -> float:
    """P."""
    return layers * (2 * width * width + 2 * width * kv + 3 * width * mlp)


def activations(layers: int, width: int, mlp: int, checkpointed: bool = False) -> int:
    """Bytes of one token."""
    layer = 2 * (6 * width + 4 * mlp)
    return 2 * width * layers + layer if checkpointed else layers * layer


def hours(flops: float) -> float:
    return flops / (GPU * SHARE) / 3600


def main() -> None:
    rows = DATA["MicroLens"][0] * TARGETS * EPOCHS
    print(
        "| | weights | adapter and optimizer | activations | the same, checkpointed | SFT | DPO |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (total, _, layers, width, kv, mlp) in MODELS.items():
        adapter = layers * RANK * (2 * 2 * width + 2 * (width + kv) + 3 * (width + mlp))
        full, checkpointed = (
            MICRO * T * activations(layers, width, mlp, on) for on in (False, True)
        )
        unit = in_layers(layers, width, kv, mlp) * T * rows
        print(
            f"| {name} | {2 * total / 1e9:.1f} GB | {16 * adapter / 1e9:.2f} GB "
            f"({adapter / 1e6:.1f} M) | {full / 1e9:.0f} GB | "
            f"{checkpointed / 1e9:.1f} GB | {hours(4 * unit):.1f} h | "
            f"{hours((6 + 2 / EPOCHS) * unit):.1f} h |"
        )
    print(
        "\n| one epoch, H100 hours | images, once | reference, once | SFT | DPO | DPO, plain path |"
    )
    print("|---|---|---|---|---|---|")
    for name, (_, vision, layers, width, kv, mlp) in MODELS.items():
        for data, (users, items) in DATA.items():
            unit = in_layers(layers, width, kv, mlp) * T * users * TARGETS
            print(
                f"| {name}, {data} | {hours(2 * vision * PATCHES * items):.2f} | "
                f"{hours(2 * unit):.2f} | {hours(4 * unit):.2f} | "
                f"{hours(6 * unit):.2f} | {hours(16 * unit):.2f} |"
            )


if __name__ == "__main__":
    main()
