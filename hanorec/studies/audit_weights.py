"""Parts of `hanorec.studies.audit` about β': λ, η, and the pull of a pair."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from hanorec.hars import responsiveness, without_extremes
from hanorec.mllm.items import neighbors
from hanorec.readings import GAPS, HARDNESS
from hanorec.studies.audit_run import (
    BETA0,
    SEED,
    TRAINED,
    correlation,
    dpo_pairs,
    gaps,
    load_policy,
    log,
    quantiles,
    table,
)

EQUAL_PULL = math.log(1 + 2**0.5) / 0.05  # h at which β' = 0.05 and 0.1 pull alike


# ---- entry 1: λ ----


def part_lambda(out: Path) -> None:
    rows, plain = [], {}  # plain: λ of random negatives, by the form of HN-5
    for kind, name in (("random", "random"), ("same", "nearest of 9")):
        backbone, builder, pairs = dpo_pairs(out, kind)
        w, l = torch.tensor([(pair.chosen, pair.rejected[0]) for pair in pairs]).T
        for embedding in ("input", "hidden"):
            e, scores, index = neighbors(backbone, builder.catalog, builder.pictures, 10, embedding)
            cosine = (e[w] * e[l]).sum(1).double().numpy()
            for gap in ("union", "ranked", "cosine"):
                delta = GAPS[gap](e.double(), scores.double(), index, w, l)
                for form in ("sigmoid", "ratio", "standardised"):
                    lam = HARDNESS[form](delta).numpy()
                    if (name, embedding, gap) == ("random", "input", "union"):
                        plain[form] = lam
                    rows.append([
                        name, embedding, gap, form,
                        f"{lam.min():.3f} .. {lam.max():.3f}",
                        f"{lam.std() / lam.mean():.2%}",
                        *correlation(lam, cosine),
                    ])
    table(
        "negatives | embedding | HN-4 | HN-5 | λ | deviation / mean | Pearson with cos(w, l) | "
        "Spearman",
        rows)
    _shares(out, plain)


def _shares(out: Path, plain: Mapping[str, np.ndarray]) -> None:
    """How much of the variance of log β' over a run is λ's, and how much η's."""
    rows = []
    for stage in TRAINED:
        eta = np.array([line["eta"] for line in log(out, stage)])
        of_eta = np.log(eta).var()
        for form in ("sigmoid", "standardised"):
            of_lam = np.log(plain[form]).var()
            rows.append([
                stage,
                f"{eta.min():.3f} .. {eta.max():.3f}",
                float(np.median(np.abs(eta - 1))),
                float(of_eta**0.5),
                form,
                float(of_lam**0.5),
                float(of_lam / (of_lam + of_eta)),
            ])
    table(
        "stage | η of its steps | median of its distance from 1 | sd of log η | λ (random, input, "
        "union) | sd of log λ | λ's share of Var log β'",
        rows)


# ---- entries 2 and 3: η ----


def eta_of(R: np.ndarray) -> float:
    """HN-7 of rewards (P,)."""
    return responsiveness(torch.as_tensor(R)).item()


def settled_ema(R: np.ndarray, mean: float, std: float) -> float:
    """`hanorec.etas.ema_eta` where the running mean and deviation are these, once and for all.
    """
    kept = without_extremes(torch.as_tensor((R - mean) / std))
    return (kept.mean().sigmoid() / kept.new_zeros(()).sigmoid()).item()


def part_eta(_: Path) -> None:
    rng = np.random.default_rng(SEED)
    R = 0.3 + rng.standard_normal(32)
    table("R | η", [
        ["32 draws of N(0.3, 1)", eta_of(R)],
        ["-R", eta_of(-R)],
        ["100 R", eta_of(100 * R)],
        ["R / 1000", eta_of(R / 1000)],
    ])

    print("\nη = σ(1 + 2 (1 - c) / (P - 2)) / σ(1), c = (min R + max R) / (2 mean R)")
    shape = rng.standard_normal(32)
    shape = (shape - shape.mean()) / shape.std()
    rows = []
    for mean in (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, -0.001, -0.01, -0.1):
        c = ((mean + shape).min() + (mean + shape).max()) / 2 / mean
        closed = 1 / (1 + math.exp(-1 - 2 * (1 - c) / 30)) * (1 + math.exp(-1))
        rows.append([mean, c, closed, eta_of(mean + shape), eta_of(mean - shape)])
    table(
        "mean / std of R | c | η by the closed form | η, P = 32 draws of one shape | the same, "
        "extremes mirrored",
        rows)

    rows = []
    for P in (4, 8, 32, 128):
        for c in (0, 0.1, 0.3, 1, 3):
            draws = c + rng.standard_normal((4000, P))
            etas = np.array([eta_of(R) for R in draws])
            ema = [settled_ema(R, mean=c, std=1.0) for R in draws]
            rows.append([
                P, c, *quantiles(etas), f"{np.mean(etas < 0.5):.1%}", *quantiles(ema, (0.01, 0.99)),
            ])
    table("P | mean / std | η at 1% | 10% | 50% | 90% | 99% | η < 0.5 | `ema` at 1% | 99%", rows)


def part_micro(_: Path) -> None:
    rng = np.random.default_rng(SEED)
    rows = []
    for c in (0.1, 0.3, 1, 3):
        R = c + rng.standard_normal((2000, 32))
        whole = np.array([eta_of(batch) for batch in R])
        parts = np.array([eta_of(part) for part in R.reshape(-1, 4)]).reshape(2000, 8)
        rows.append([
            c,
            f"{whole.mean():.3f} ± {whole.std():.3f}",
            f"{parts.mean():.3f} ± {parts.std():.3f}",
            float(parts.std(1).mean()),
            f"{(parts < 0.5).mean():.1%}",
            f"{(whole < 0.5).mean():.1%}",
        ])
    table(
        "mean / std of R | η of 32 pairs | η of 4 pairs | deviation among the 8 micro-batches of a "
        "step | η < 0.5, of 4 | of 32",
        rows)


# ---- entry 6: the pull of a pair ----


def turning_point() -> float:
    """x with x σ(x) = 1, by bisection: there d/dβ' of β' σ(-β' h) changes its sign, x = β' h."""
    low, high = 1.0, 2.0
    for _ in range(60):
        mid = (low + high) / 2
        if mid / (1 + math.exp(-mid)) < 1:
            low = mid
        else:
            high = mid
    return low


def pull(beta: float, h: float) -> float:
    """|dL/dh| of HN-11: β' σ(-β' h)."""
    return beta / (1 + math.exp(beta * h))


def part_crossover(out: Path) -> None:
    x = turning_point()
    print(f"\nx* = {x:.4f}: |dL/dh| = β' σ(-β' h) grows with β' while β' h < x*, falls beyond")
    rows = [[beta, x / beta] for beta in (0.05, 0.06, 0.08, 0.1)]
    table("β' | h at which more β' no longer means more pull", rows)

    print(f"\npulls of β' = 0.05 and 0.1 are equal at h = ln(1 + √2) / 0.05 = {EQUAL_PULL:.2f}")
    rows = []
    for h in (-20, -5, 0, 5, 10, 17.63, 25, 40, 80):
        low, high = pull(0.05, h), pull(0.1, h)
        rows.append([h, low, high, low / high, 2 * low, high, 2 * low / high])
    table("h | pull at β' = 0.05 | at 0.1 | ratio | normalised, at 0.05 | at 0.1 | ratio", rows)

    rows = []
    for stage in TRAINED:
        backbone, builder, pairs = load_policy(out, stage)
        h = gaps(backbone, pairs, builder.pictures)
        steps = log(out, stage)
        rows.append([
            stage,
            len(steps),
            max(line["margin"] for line in steps) / BETA0,
            *quantiles(h),
            h.max().item(),
            f"{(h > x / 0.05).float().mean():.1%}",
            f"{(h > EQUAL_PULL).float().mean():.1%}",
        ])
    table(
        "stage | steps | largest mean h of a step (log) | h of its own pairs at the end: 1% | 10% "
        "| 50% | 90% | 99% | largest | past x*/0.05 | past 17.6",
        rows)
