"""Part of `hanorec.studies.audit`: backward inside the noise, or after it has gone (entry 7)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.lora.layer import adapters_off, add_lora, lora_layers, lora_noise
from hanorec.losses import dpo_loss, prompt_logits
from hanorec.mllm.backbone import Backbone, use_checkpointing
from hanorec.mllm.collate import Batch, collate
from hanorec.mllm.forward import forward, score_batches
from hanorec.scoring import answer_log_probs
from hanorec.studies.audit_noise import SIGMAS
from hanorec.studies.audit_run import BETA0, SEED, dpo_pairs, load_policy, table


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


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _gradients(backbone: Backbone, batch: Batch) -> Iterator[tuple[float, bool, Tensor]]:
    """sigma, whether backward was inside the noise, and the adapter's gradient, flat.

    Where backward finds that the noise is gone, it says so, and there is no gradient.
    """
    trained = []
    for layer in lora_layers(backbone.model).values():
        trained += [layer.A.requires_grad_(), layer.B.requires_grad_()]
    for sigma in SIGMAS:
        with lora_noise(backbone.model, sigma, _draws(SEED)):
            found = torch.autograd.grad(_loss(backbone, batch), trained)
        yield sigma, True, _flat(found)

        with lora_noise(backbone.model, sigma, _draws(SEED)):
            loss = _loss(backbone, batch)
        try:
            found = torch.autograd.grad(loss, trained)
        except RuntimeError as error:
            print(f"σ_n {sigma}, recomputed without the noise: {type(error).__name__}")
            continue
        yield sigma, False, _flat(found)


def _loss(backbone: Backbone, batch: Batch) -> Tensor:
    """DPO-2 without a reference: one pair a prompt."""
    log_probs = answer_log_probs(forward(backbone, batch), batch)  # (P, 2)
    return -F.logsigmoid(BETA0 * (log_probs[:, 0] - log_probs[:, 1])).mean()


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


# ---- what an update is worth whose backward has forgotten the noise ----


def part_forgotten(out: Path) -> None:
    """Cosines of three gradients of a fresh adapter, r = 8 and alpha = 32, on 16 pairs, 5 draws.

    Of the noisy loss (literal), of the same where backward recomputes without the noise
    (forgotten), and of DPO without noise (clean). They need the data of RUN alone.
    """
    backbone, builder, pairs = dpo_pairs(out)
    rows = [pair.row for pair in pairs[:16]]
    batches = [builder.collate(rows, range(i, i + 4)) for i in range(0, 16, 4)]
    trained = []
    for layer in add_lora(backbone.model, r=8, alpha=32, dropout=0.0):
        trained += [layer.A, layer.B]
    use_checkpointing(backbone)
    backbone.model.train()
    with adapters_off(backbone.model):
        references = score_batches(backbone, batches)

    def gradient(sigma: float, seed: int, inside: bool) -> Tensor:
        total = torch.zeros(sum(w.numel() for w in trained), device=backbone.device)
        for batch, reference in zip(batches, references, strict=True):
            with lora_noise(backbone.model, sigma, _draws(seed)):  # one draw for all batches
                log_probs = answer_log_probs(forward(backbone, batch), batch)
                loss = dpo_loss(prompt_logits(log_probs, reference), BETA0).sum()
                found = torch.autograd.grad(loss, trained) if inside else ()
            total += _flat(found or torch.autograd.grad(loss, trained))
        return total

    clean = gradient(0.0, SEED, inside=True)
    lines = []
    for sigma in SIGMAS:
        cosines = []
        for seed in range(SEED, SEED + 5):
            literal = gradient(sigma, seed, inside=True)
            forgotten = gradient(sigma, seed, inside=False)
            of_draw = ((forgotten, literal), (forgotten, clean), (literal, clean))
            cosines.append([F.cosine_similarity(a, b, dim=0).item() for a, b in of_draw])
        columns = zip(*cosines, strict=True)
        shown = [f"{sum(x) / 5:.2f} ({min(x):.2f} .. {max(x):.2f})" for x in columns]
        lines.append([sigma, *shown])
    table("σ_n | forgotten, literal | forgotten, clean | literal, clean", lines)
