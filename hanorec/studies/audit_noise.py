"""Parts of `hanorec.studies.audit` about NoDO's noise: what it does to rewards and to weights."""

import statistics
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hanorec.hars import responsiveness, reward_gap
from hanorec.lora.layer import LoRALinear, adapters_off, lora_layers, lora_noise
from hanorec.mllm.forward import score_rows
from hanorec.studies.audit_run import BETA0, SEED, gaps, load_policy, table

SIGMAS = (0.01, 0.05, 0.1)


# ---- entry 12: noisy rewards ----


def part_rewards(out: Path) -> None:
    """Clean R against noisy R, on the trained policy; one draw a step."""
    backbone, builder, pairs = load_policy(out, "HaNoRec")
    pairs = pairs[:32]
    with adapters_off(backbone.model):
        reference = score_rows(backbone, pairs, builder.pictures, 32, "reference")[0]
    h = gaps(backbone, pairs, builder.pictures, reference)

    rows = []
    for sigma in SIGMAS:
        noise = torch.Generator().manual_seed(SEED)
        noisy = []
        for _ in range(8):
            with lora_noise(backbone.model, sigma, noise):
                noisy.append(gaps(backbone, pairs, builder.pictures, reference))
        change = torch.stack(noisy) - h  # (draws, P)
        etas = [responsiveness(reward_gap(one, BETA0)).item() for one in noisy]
        rows.append([
            sigma,
            h.std().item(),
            change.std().item(),
            float(np.mean([np.corrcoef(h, one)[0, 1] for one in noisy])),
            responsiveness(reward_gap(h, BETA0)).item(),
            f"{min(etas):.3f} .. {max(etas):.3f}",
            (change.mean(1).var() / change.var(0).mean()).item(),
        ])
    table(
        "σ_n | sd of clean h over pairs | sd of what a draw adds | correlation, clean with noisy h "
        "| η of clean R | of noisy R | variance of the step's mean / of one pair's, over draws",
        rows)


# ---- entry 5: noise and weights ----


def part_nodo(out: Path) -> None:
    backbone, _, _ = load_policy(out, "HaNoRec")
    layers = list(lora_layers(backbone.model).values())
    rows = []
    for sigma in SIGMAS:
        with torch.no_grad(), lora_noise(backbone.model, sigma, _draws()):
            sizes = [_sizes(layer, sigma) for layer in layers]
        medians = [statistics.median(column) for column in zip(*sizes, strict=True)]
        rows.append([sigma, *medians])
    r, scale = layers[0].r, layers[0].scale
    print(
        f"\nPosterland's base, r = {r}, s = {scale:g}; sizes as shares of ‖W‖, median over the "
        "layers")
    table(
        "σ_n | B = 0: s ‖B' A'‖ | predicted | after training: s ‖B' A' - B A‖ | what training "
        "itself did: s ‖B A‖",
        rows)

    print("\nentry of the change at B = 0, s √r σ √(1 / (3 width) + σ²), r = 8, s = 4:")
    rows = []
    for wide in (576, 1536, 2048, 3584, 4096):
        entries = [4 * 8**0.5 * s * (1 / (3 * wide) + s * s) ** 0.5 for s in SIGMAS]
        rows.append([wide, (3 * wide) ** -0.5, *entries])
    table("width | fresh A's RMS | σ_n = 0.01 | 0.05 | 0.1", rows)


def _draws() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _sizes(layer: LoRALinear, sigma: float) -> tuple[float, float, float, float]:
    """Sizes of changes of a weight under the draw that the layer holds, as shares of the weight.

    Of a fresh adapter (B = 0) as drawn and as predicted, of the trained one, and of what training
    itself did.
    """
    W = layer.base
    while isinstance(W, LoRALinear):
        W = W.base
    whole = W.weight.norm().item()
    eps_A, eps_B = layer.noise
    fresh_A = torch.empty_like(layer.A)
    nn.init.kaiming_uniform_(fresh_A, a=5**0.5, generator=_draws())
    r, wide, high = layer.r, layer.in_features, layer.out_features

    fresh = (eps_B @ (fresh_A + eps_A)).norm().item()
    expected = (high * r * (sigma**2 / 3 + wide * sigma**4)) ** 0.5
    change = (layer.B + eps_B) @ (layer.A + eps_A) - layer.B @ layer.A
    learnt = (layer.B @ layer.A).norm().item()
    parts = fresh, expected, change.norm().item(), learnt
    return tuple(layer.scale * part / whole for part in parts)
