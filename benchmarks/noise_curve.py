#!/usr/bin/env python3
"""What NoDO's noise does to a language model before anything is learnt: loss on English text against the strength sigma_n (HN-9).

    python benchmarks/noise_curve.py MODEL [--text FILE] [--sigma S ...] [--draws N] [--rank R] [--alpha A]

A fresh adapter (B = 0, so without noise it is exactly the base) lies on all linears of the language model, as in training. The noise
moves every weight by scale * (B' A' - B A), scale = alpha / r. Per strength and mode: mean and standard deviation, over the draws, of
the loss in nats a token. MODEL is any checkpoint that hanorec loads; benchmarks/smollm2_llava.py makes one with real text weights.
"""

import argparse
import statistics
from pathlib import Path

import torch
from smollm2_llava import PASSAGE, text_nll

from hanorec.backbone import load_backbone
from hanorec.errors import run
from hanorec.lora import add_lora, lora_noise


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="a text file instead of the built-in passage")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0, 0.005, 0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--seed", type=int, default=2025)
    args = parser.parse_args()
    text = PASSAGE if args.text is None else args.text.read_text(encoding="utf-8")
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model)
    bare = text_nll(backbone, text)
    layers = add_lora(backbone.model, args.rank, args.alpha, dropout=0.0)
    print(f"{len(layers)} linears, r = {args.rank}, alpha = {args.alpha:g}; loss without adapter {bare:.3f}, "
          f"with a fresh one {text_nll(backbone, text):.3f} nats a token")
    print(f"{'sigma_n':>8}{'absolute':>18}{'relative':>18}")
    for sigma in args.sigma:
        cells = []
        for mode in ("absolute", "relative"):
            noise = torch.Generator().manual_seed(args.seed)  # the same draws for every strength and mode
            losses = []
            for _ in range(args.draws):
                with lora_noise(backbone.model, sigma, noise, mode):
                    losses.append(text_nll(backbone, text))
            cells.append(f"{statistics.mean(losses):.3f} +- {statistics.pstdev(losses):.3f}")
        print(f"{sigma:>8g}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    run(main)
