"""Memory and time of a real run, worked out from the published sizes of models and data sets:
python benchmarks/sizes.py

P = weights of the language model's layers, T = tokens of a row.
    memory       as `hanorec.mllm.memory` counts it, beside what one H100 has measured (at 529e433)
    time         a row costs 2PT forward and 2PT backward (the base is frozen: gradients of
                 activations alone). SFT 4PT. DPO adds the clean policy, 2PT, at every step, and the
                 reference, 2PT, once for all epochs. The plain path of 529e433 computed the prompt
                 for both answers, and the reference in every epoch: 2 x (4 + 2 + 2) PT.
    vision tower 2 x weights x patches an image, once a catalogue
Rates: what that H100 reached at the shape of Qwen2.5-VL-3B; other shapes are taken to reach them.
"""

from dataclasses import replace

from hanorec.mllm.memory import Memory, Shape, Work, step_memory

GPU, SHARE = 989e12, 0.4  # H100, dense bfloat16; the share of it that we count on, if unmeasured
SFT, DPO, FORWARD = 200e12, 188e12, 361e12  # FLOP/s, measured
T, MICRO, RANK, EPOCHS, PATCHES = 1500, 4, 8, 5, 256
# users, items (document 000)
DATA = {"MicroLens": (25_411, 41_081), "Netflix": (13_187, 17_366), "MovieLens-1M": (6_040, 3_952)}
TARGETS = 3  # training rows a user, at most
MODELS = {  # name: all weights, vision tower's, layers, width, key-value width, MLP width
    "Qwen2-VL-2B": (2.21e9, 0.67e9, 28, 1536, 256, 8960),
    "Qwen2.5-VL-3B": (3.75e9, 0.67e9, 36, 2048, 256, 11008),
    "Qwen2.5-VL-7B": (8.29e9, 0.68e9, 28, 3584, 512, 18944),
}


HEADS = {"Qwen2-VL-2B": 12, "Qwen2.5-VL-3B": 16, "Qwen2.5-VL-7B": 28}
VOCABULARY = 151_936
PACKED = Work(MICRO, T + 24, 24, packed=True, rank=RANK)  # two answers of 12

# What one H100 took at its peak, GB (529e433): Qwen2.5-VL-3B, without dropout.
SCRIPT = replace(PACKED, tokens=1075, answers=8, noise=True)
MEASURED = {
    "train_sft.py: a micro-batch of 4, 1,071 tokens": (
        27.0, replace(SCRIPT, tokens=1071, answers=4, packed=False, noise=False)
    ),
    "train_dpo.py: a micro-batch of 4, 1,075 tokens": (27.8, SCRIPT),
    "plain DPO, 4 prompts of 1,500 tokens": (35.9, PACKED),
    "HaNoRec: the same, noise and clean pass": (36.0, replace(PACKED, noise=True)),
    "plain DPO, reference live": (43.7, PACKED),
    "HaNoRec, compiled": (29.7, replace(PACKED, noise=True, compiled=True)),
}


def in_layers(layers: int, width: int, kv: int, mlp: int) -> float:
    """P."""
    return layers * (2 * width * width + 2 * width * kv + 3 * width * mlp)


def shape(name: str) -> Shape:
    _, _, layers, width, kv, mlp = MODELS[name]
    return Shape(layers, width, width, kv, HEADS[name], mlp, VOCABULARY, 2)


def memory(name: str, work: Work) -> Memory:
    """Of a step."""
    total, _, layers, width, kv, mlp = MODELS[name]
    adapter = layers * RANK * (2 * 2 * width + 2 * (width + kv) + 3 * (width + mlp))
    return step_memory(shape(name), work, int(2 * total), adapter)


def hours(flops: float, rate: float = GPU * SHARE) -> float:
    return flops / rate / 3600


def main() -> None:
    rows = DATA["MicroLens"][0] * TARGETS * EPOCHS
    print(
        "| | weights | adapter and optimizer | activations, without and with dropout | "
        "checkpointed, with | in passing | SFT | DPO |"
    )
    print("|---|---|---|---|---|---|---|---|")
    full = replace(PACKED, noise=True, dropout=True)
    for name, (_, _, layers, width, kv, mlp) in MODELS.items():
        dropped, bare, checkpointed = (
            memory(name, work)
            for work in (full, replace(full, dropout=False), replace(full, checkpointing=True))
        )
        unit = in_layers(layers, width, kv, mlp) * T * rows
        reference = hours(2 / EPOCHS * unit, FORWARD)
        print(
            f"| {name} | {bare.weights / 1e9:.1f} GB | {bare.adapter / 1e9:.2f} GB | "
            f"{bare.activations / 1e9:.0f}, {dropped.activations / 1e9:.0f} GB | "
            f"{checkpointed.activations / 1e9:.1f} GB | {bare.passing / 1e9:.1f} GB | "
            f"{hours(4 * unit, SFT):.1f} h | {hours(6 * unit, DPO) + reference:.1f} h |"
        )
    print("\n| a step | measured, GB | estimate, GB | apart |\n|---|---|---|---|")
    for name, (measured, work) in MEASURED.items():
        expected = memory("Qwen2.5-VL-3B", work).total / 1e9
        print(f"| {name} | {measured} | {expected:.1f} | {expected / measured - 1:+.1%} |")
    print(
        "\n| one epoch, H100 hours | images, once | reference, once | SFT | DPO | DPO, plain path |"
    )
    print("|---|---|---|---|---|---|")
    for name, (_, vision, layers, width, kv, mlp) in MODELS.items():
        for data, (users, items) in DATA.items():
            unit = in_layers(layers, width, kv, mlp) * T * users * TARGETS
            print(
                f"| {name}, {data} | {hours(2 * vision * PATCHES * items):.2f} | "
                f"{hours(2 * unit, FORWARD):.2f} | {hours(4 * unit, SFT):.2f} | "
                f"{hours(6 * unit, DPO):.2f} | {hours(16 * unit, DPO):.2f} |"
            )


if __name__ == "__main__":
    main()
