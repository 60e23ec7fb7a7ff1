"""Memory and time of a real run, worked out from the published sizes of the models: python benchmarks/sizes.py

Nothing here is measured. P = weights of the language model's layers, T = tokens of a row, r = LoRA rank.
    weights      2 bytes each, vision tower included
    adapter      16 bytes each: float32 value, gradient, and AdamW's two moments
    activations  what backward needs of one token in one layer, in bfloat16: 6 vectors of the width and 4 of the MLP's;
                 with checkpointing the layer's input alone, and one layer's worth of the rest
    time         a row costs 2PT forward and 2PT backward (the base is frozen: gradients of activations alone); DPO adds the
                 reference and the clean policy, 2PT each
"""

GPU, SHARE = 989e12, 0.4  # H100, dense bfloat16; the share of it that we count on
T, MICRO, RANK = 1500, 4, 8
ROWS = 25_411 * 3 * 5  # MicroLens: users, targets, epochs
MODELS = {  # name: all weights, layers, width, key-value width, MLP width
    "Qwen2-VL-2B": (2.21e9, 28, 1536, 256, 8960),
    "Qwen2.5-VL-3B": (3.75e9, 36, 2048, 256, 11008),
    "Qwen2.5-VL-7B": (8.29e9, 28, 3584, 512, 18944),
}


def main() -> None:
    print("| | weights | adapter and optimizer | activations | the same, checkpointed | SFT | DPO |")
    print("|---|---|---|---|---|---|---|")
    for name, (total, layers, width, kv, mlp) in MODELS.items():
        linears = [(width, width), (width, kv), (width, kv), (width, width), (width, mlp), (width, mlp), (mlp, width)]
        in_layers = layers * sum(a * b for a, b in linears)
        adapter = layers * RANK * sum(a + b for a, b in linears)
        token = 2 * (6 * width + 4 * mlp)
        full = MICRO * T * layers * token
        checkpointed = MICRO * T * (2 * width * layers + token)
        hours = {stage: units * in_layers * T * ROWS / (GPU * SHARE) / 3600 for stage, units in [("SFT", 4), ("DPO", 8)]}
        print(f"| {name} | {2 * total / 1e9:.1f} GB | {16 * adapter / 1e9:.2f} GB ({adapter / 1e6:.1f} M) | {full / 1e9:.0f} GB | "
              f"{checkpointed / 1e9:.1f} GB | {hours['SFT']:.1f} h | {hours['DPO']:.1f} h |")


if __name__ == "__main__":
    main()
