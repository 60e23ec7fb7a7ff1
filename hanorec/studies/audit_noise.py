"""Parts of `hanorec.studies.audit` about NoDO's noise: what it does to rewards and to weights."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.hars import responsiveness, reward_gap
from hanorec.lora.layer import LoRALinear, adapters_off, lora_layers, lora_noise
from hanorec.mllm.backbone import Backbone, use_checkpointing
from hanorec.mllm.collate import Batch, collate
from hanorec.mllm.forward import forward, score_rows
from hanorec.scoring import answer_log_probs
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


# ---- entry 7: checkpointing ----


def part_checkpointing(out: Path) -> None:
    """The adapter's gradient on one micro-batch, where backward is inside the noise or after it."""
    grads = {}  # (checkpointed, sigma, inside) -> gradient, where there is one
    for checkpointed in (False, True):
        backbone, builder, rows = load_policy(out, "HaNoRec")
        if checkpointed:
            use_checkpointing(backbone)
        backbone.model.train()
        batch = collate(backbone, rows[:4], builder.pictures)
        for sigma, inside, gradient in _gradients(backbone, batch):
            grads[checkpointed, sigma, inside] = gradient

    rows = []
    for sigma in SIGMAS:
        right = grads[False, sigma, True]
        for name, key in (
            ("no checkpointing, backward after the noise", (False, sigma, False)),
            ("checkpointing, backward inside", (True, sigma, True)),
            ("checkpointing, backward after", (True, sigma, False)),
        ):
            if key in grads:
                error = (grads[key] - right).norm() / right.norm()
                cosine = F.cosine_similarity(grads[key], right, dim=0)
                rows.append([sigma, name, error.item(), cosine.item()])
    table("σ_n | | error of the gradient, relative | cosine with the right one", rows)


def _gradients(backbone: Backbone, batch: Batch) -> Iterator[tuple[float, bool, Tensor]]:
    """sigma, whether backward was inside the noise, and the adapter's gradient, flat.

    Where backward finds that the noise is gone, it says so, and there is no gradient.
    """
    trained = []
    for layer in lora_layers(backbone.model).values():
        trained += [layer.A.requires_grad_(), layer.B.requires_grad_()]
    for sigma in SIGMAS:
        with lora_noise(backbone.model, sigma, _draws()):
            found = torch.autograd.grad(_loss(backbone, batch), trained)
        yield sigma, True, torch.cat([g.flatten() for g in found])

        with lora_noise(backbone.model, sigma, _draws()):
            loss = _loss(backbone, batch)
        try:
            found = torch.autograd.grad(loss, trained)
        except RuntimeError as error:
            print(f"σ_n {sigma}, recomputed without the noise: {type(error).__name__}")
            continue
        yield sigma, False, torch.cat([g.flatten() for g in found])


def _loss(backbone: Backbone, batch: Batch) -> Tensor:
    """DPO-2 without a reference: one pair a prompt."""
    log_probs = answer_log_probs(forward(backbone, batch), batch)  # (P, 2)
    return -F.logsigmoid(BETA0 * (log_probs[:, 0] - log_probs[:, 1])).mean()
