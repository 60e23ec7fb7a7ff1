#!/usr/bin/env python3
"""What NoDO's noise does to a language model before anything is learnt (HN-9): loss on English text, and the size of the weight change.

    python benchmarks/noise_curve.py MODEL [--targets all qv] [--alpha A ...] [--sigma S ...] [--draws N] [--rank R] [--text FILE]

A fresh adapter (B = 0, so without noise it is exactly the base) lies on all linears of the language model, as in training; `--targets qv`
keeps the noise on q_proj and v_proj alone. The noise moves a weight by D = s (B' A' - B A), s = alpha / r, whose expected square is

    E ‖D‖^2 = s^2 [ sigma_A^2 in ‖B‖^2 + sigma_B^2 out ‖A‖^2 + sigma_A^2 sigma_B^2 r in out ]      (Frobenius norms; sigma = strength of each side)

First table: mean and standard deviation of the loss over the draws, in nats a token. Second: ‖D‖ / ‖W‖, the median over the layers of a kind,
of the first draw, and beside it what the formula predicts. MODEL is any checkpoint that hanorec loads; benchmarks/smollm2_llava.py makes one
with real text weights.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from smollm2_llava import PASSAGE, text_nll

from hanorec.base.command import run
from hanorec.base.files import write_json
from hanorec.lora.layer import LoRALinear, add_lora, lora_layers, lora_noise, rms
from hanorec.mllm.load import load_backbone

TARGETS = {"all": None, "qv": ("q_proj", "v_proj")}


def expected_change(layer: LoRALinear, sigma_A: float, sigma_B: float) -> float:
    """Root of E ‖s (B' A' - B A)‖^2: the three terms of the product are uncorrelated."""
    r, wide, high = layer.r, layer.in_features, layer.out_features
    square = sigma_A**2 * wide * layer.B.square().sum() + sigma_B**2 * high * layer.A.square().sum() + (sigma_A * sigma_B) ** 2 * r * wide * high
    return layer.scale * square.sqrt().item()


def change(layer: LoRALinear) -> float:
    """‖s (B' A' - B A)‖ of the draw that the layer holds."""
    noise_A, noise_B = layer.noise
    return layer.scale * ((layer.B + noise_B) @ (layer.A + noise_A) - layer.B @ layer.A).norm().item()


def ratios(layers: dict[str, LoRALinear], sigma: float, mode: str) -> dict[str, tuple[float, float]]:
    """Kind of layer -> median of ‖D‖ / ‖W‖ under the present draw, and of its prediction."""
    found = defaultdict(list)
    for path, layer in layers.items():
        fresh = (3 * layer.in_features) ** -0.5
        sides = (sigma, sigma) if mode == "absolute" else (sigma * rms(layer.A), sigma * max(rms(layer.B), fresh))
        weight = layer.base.weight.norm().item()
        found[path.rpartition(".")[2]].append((change(layer) / weight, expected_change(layer, *sides) / weight))
    return {kind: tuple(map(statistics.median, zip(*pairs, strict=True))) for kind, pairs in found.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="a text file instead of the built-in passage")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0, 0.005, 0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=["all"])
    parser.add_argument("--mode", nargs="+", choices=["absolute", "relative"], default=["absolute", "relative"])
    parser.add_argument("--alpha", type=float, nargs="+", default=[32])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write OUT/noise.json, of which python -m hanorec.plots OUT draws the figure")
    parser.add_argument("--seed", type=int, default=2025)
    args = parser.parse_args()
    text = PASSAGE if args.text is None else args.text.read_text(encoding="utf-8")
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model)
    bare = text_nll(backbone, text)
    add_lora(backbone.model, args.rank, args.alpha[0], dropout=0.0)
    layers = lora_layers(backbone.model)
    columns = [(mode, targets, alpha) for mode in args.mode for targets in args.targets for alpha in args.alpha]
    print(f"{len(layers)} linears, r = {args.rank}; loss without adapter {bare:.3f}, with a fresh one {text_nll(backbone, text):.3f} nats a token\n")
    curves = [{"name": f"{mode}, {targets}, α/r = {alpha / args.rank:g}", "sigma": [], "mean": [], "deviation": []} for mode, targets, alpha in columns]
    print("σ_n | " + " | ".join(curve["name"] for curve in curves))
    print("---|" * len(columns) + "---")
    sizes = {}
    for sigma in args.sigma:
        cells = []
        for (mode, targets, alpha), curve in zip(columns, curves, strict=True):
            for layer in layers.values():
                layer.scale = alpha / args.rank
            noise, losses = torch.Generator().manual_seed(args.seed), []  # the same draws for every cell
            for draw in range(args.draws):
                with lora_noise(backbone.model, sigma, noise, mode):
                    if sigma > 0 and draw == 0:
                        sizes[mode, alpha, sigma] = ratios(layers, sigma, mode)
                    for path, layer in layers.items():
                        if TARGETS[targets] is not None and path.rpartition(".")[2] not in TARGETS[targets]:
                            layer.noise = None
                    losses.append(text_nll(backbone, text))
            mean, deviation = statistics.mean(losses), statistics.pstdev(losses)
            cells.append(f"{mean:.3f} ± {deviation:.3f}")
            for key, value in (("sigma", sigma), ("mean", mean), ("deviation", deviation)):
                curve[key].append(value)
        print(f"{sigma:g} | " + " | ".join(cells), flush=True)
    if args.out is not None:
        write_json(args.out / "noise.json", {"clean": bare, "curves": curves})
    if sizes:
        kinds = list(next(iter(sizes.values())))
        print("\nweight change, share of the weight: measured (predicted)\n")
        print("mode, α/r, σ_n | " + " | ".join(kinds))
        print("---|" * len(kinds) + "---")
        for (mode, alpha, sigma), found in sizes.items():
            print(f"{mode}, {alpha / args.rank:g}, {sigma:g} | " + " | ".join(f"{a:.3f} ({b:.3f})" for a, b in found.values()))


if __name__ == "__main__":
    run(main)
