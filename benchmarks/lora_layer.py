#!/usr/bin/env python3
"""One LoRA layer, forward and backward, against PEFT's: same weights, same input, same gradients;
and what NoDO's noise adds.

    python benchmarks/lora_layer.py [--tokens N] [--width D] [--rank R] [--rounds N] [--device cuda]

Base linear with bias, as in Qwen's attention; no dropout, as in a DPO step. The noise is drawn anew
in each call, as in each step.
"""

import argparse

import torch
from measure import agree, begin, gemm_rate, interleaved
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.lora.layer import LoRALinear, lora_noise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    begin(args.device)
    torch.manual_seed(0)
    n, d, r = args.tokens, args.width, args.rank
    base = nn.Sequential(nn.Linear(d, d)).requires_grad_(False).to(args.device)
    mine = nn.Sequential(LoRALinear(base[0], r, 32.0))
    theirs = get_peft_model(
        nn.Sequential(base[0]),
        LoraConfig(r=r, lora_alpha=32, lora_dropout=0.0, target_modules=["0"]),
    )
    weights = {
        "hanorec": [mine[0].A, mine[0].B],
        "PEFT": [w for name, w in theirs.named_parameters() if "lora_" in name],
    }
    with torch.no_grad():
        mine[0].B.normal_(std=0.02)
        for a, b in zip(*weights.values(), strict=True):
            b.copy_(a)
    x = torch.randn(1, n, d, device=args.device, requires_grad=True)
    g = torch.randn(1, n, d, device=args.device)  # gradient of the output

    def run(layer: nn.Module, trained: list[Tensor]) -> list[Tensor]:
        for weight in (x, *trained):
            weight.grad = None
        y = layer(x)
        y.backward(g)
        return [y.detach(), x.grad, *(weight.grad for weight in trained)]

    def noisy() -> None:
        with lora_noise(mine, 0.01, noise):
            run(mine, weights["hanorec"])

    def frozen() -> None:  # what both stand on
        x.grad = None
        F.linear(x, base[0].weight, base[0].bias).backward(g)

    noise = torch.Generator(args.device).manual_seed(0)
    both = zip(
        ("output", "gradient of x", "gradient of A", "gradient of B"),
        run(mine, weights["hanorec"]), run(theirs, weights["PEFT"]), strict=True,
    )
    for what, a, b in both:
        agree(what, a, b, 1e-5)
    rate = gemm_rate(args.device)
    # forward and gradient of x; six products with A or B
    floor = 2 * n * (2 * d * d + 6 * d * r) / rate
    seconds = interleaved(
        {
            "hanorec": lambda: run(mine, weights["hanorec"]), "hanorec with noise": noisy,
            "PEFT": lambda: run(theirs, weights["PEFT"]), "base linear alone": frozen,
        },
        args.rounds, args.device,
    )
    print(f"\nGEMM 1024: {rate / 1e9:.0f} GFLOP/s; floor {1000 * floor:.2f} ms\n")
    print("| layer | ms | times the floor | PEFT / this | this / hanorec |\n|---|---|---|---|---|")
    for name, time in seconds.items():
        print(
            f"| {name} | {1000 * time:.2f} | {time / floor:.2f} | {seconds['PEFT'] / time:.3f} | "
            f"{time / seconds['hanorec']:.3f} |"
        )


if __name__ == "__main__":
    main()
