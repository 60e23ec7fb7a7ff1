r"""Other readings of what the document leaves open, each beside the one that it stands for.

    GAPS       e, scores, index, chosen, rejected -> delta      for `cluster_gap` (HN-4)
    HARDNESS   delta -> lambda                                  for `hardness` (HN-5)
    CONTROLS   lambda, generator -> lambda                      the same numbers on the wrong pairs
    ETAS       R, state, trim -> eta                            for `responsiveness` (HN-7)
    NOISES     layer -> scale of the noise on its A and B       for `absolute_noise` (HN-9)

The dictionaries at the end hold all of them by name, the document's included, which the equation
files compute. "Release" is the authors' public code, "ours" is in neither.
P = pairs, N = items, d = width, K = neighbours.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hanorec import hars
from hanorec.base.errors import InputError
from hanorec.lora.layer import LoRALinear, absolute_noise

DECAY = 0.9  # of the running statistics of `ema_eta`

# ---- the gap (HN-4): how different are the two items of a pair ----


def ranked_gap(
    e: Tensor,
    scores: Tensor,
    index: Tensor,
    chosen: Tensor,
    rejected: Tensor,
) -> Tensor:
    r"""Release: distance of the two items' score profiles, sorted by rank. Shapes: `cluster_gap`.

    It compares how fast similarity falls off around each item, not the items themselves.
    """
    # \Delta = \lVert \operatorname{softmax}_K(s_w) - \operatorname{softmax}_K(s_l) \rVert_2
    return (scores[chosen].softmax(1) - scores[rejected].softmax(1)).norm(dim=1)


def cosine_gap(
    e: Tensor,
    scores: Tensor,
    index: Tensor,
    chosen: Tensor,
    rejected: Tensor,
) -> Tensor:
    r"""The ablation w/o SAM: no clusters, the two items alone; (P,) in 0 .. 2."""
    # \Delta = 1 - \langle e_w, e_l \rangle; equal rows can round below 0
    return (1 - (e[chosen] * e[rejected]).sum(1)).clamp_min(0)


# ---- the hardness (HN-5): smaller = harder ----


def ratio_hardness(delta: Tensor) -> Tensor:
    r"""Release: sigma(Delta) over that of the mean gap, so the same up to a constant: (P,)."""
    # \lambda = \sigma(\Delta) / \sigma(\operatorname{mean} \Delta)
    return delta.sigmoid() / delta.mean().sigmoid()


def standardised_hardness(delta: Tensor) -> Tensor:
    r"""Ours: the whole range 0 .. 2 with its mean near 1: (P,).

    Raises InputError where all gaps are equal.
    """
    std = delta.std(correction=0)
    if not std > 0:
        raise InputError(
            f"standardised hardness: the gaps have standard deviation {std.item()}, expected more "
            "than 0; all pairs are equally hard, so use the form sigmoid"
        )
    # \lambda = 2 \sigma((\Delta - \operatorname{mean} \Delta) / \operatorname{std} \Delta)
    return 2 * ((delta - delta.mean()) / std).sigmoid()


# ---- controls (ours): is it worth anything that each pair has its own lambda? ----


def unchanged(lam: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """No control: each pair keeps its lambda (P,)."""
    return lam


def reversed_lambda(lam: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The hardest pair gets the largest lambda, the next one the second largest, and so on."""
    order = lam.argsort(stable=True)
    wrong = torch.empty_like(lam)
    wrong[order] = lam[order.flip(0)]
    return wrong


def permuted_lambda(lam: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The lambdas are dealt out at random, by a generator on the CPU."""
    return lam[torch.randperm(len(lam), generator=generator).to(lam.device)]


def mean_lambda(lam: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """All pairs get the mean."""
    return lam.mean().expand_as(lam)


# ---- the responsiveness (HN-7): state is a dictionary that the run keeps from step to step ----


def batch_eta(R: Tensor, state: dict[str, Any], trim: float | None = None) -> Tensor:
    r"""The document's, from this batch alone; with trim its "extremes" are a fraction of each end.

    Args:
        R: (P,) reward gaps. state: unused.
        trim: None drops the smallest and the largest reward; a fraction q in (0, 0.5) drops
            max(1, floor(q P)) from each end.
    Returns:
        eta: ().
    """
    if trim is None:
        return hars.responsiveness(R)
    normalised = hars.normalised_rewards(R)
    kept = hars.without_extremes(normalised, dropped(trim, len(R)))
    return kept.mean().sigmoid() / normalised.mean().sigmoid()


def ema_eta(R: Tensor, state: dict[str, Any], trim: float | None = None) -> Tensor:
    r"""Ours: rewards normalised by a running mean and deviation, so that eta reacts to learning.

    A batch that responds as usual lies at 0, so the denominator is sigma(0).

    Args:
        R: (P,) reward gaps. trim: as in `batch_eta`.
        state: "mean" and "variance", updated here; empty before the first batch, which sets them.
    Returns:
        eta: () in 0 .. 2.
    """
    mean, std = running_statistics(R, state)
    # \tilde R_i = (R_i - m) / s \text{ with running } m, s
    normalised = (R.detach() - mean) / max(std, 1e-8)
    kept = hars.without_extremes(normalised, dropped(trim, len(R)))
    return kept.mean().sigmoid() / R.new_zeros(()).sigmoid()


def running_statistics(R: Tensor, state: dict[str, Any]) -> tuple[float, float]:
    """Mix a global batch (P,) into state["mean"] and state["variance"]; returns (mean, std)."""
    if not R.isfinite().all():
        raise InputError(f"rewards {R.tolist()}: expected finite rewards")
    keep = DECAY if state else 0.0
    mean, variance = R.mean().item(), R.var(correction=0).item()
    state["mean"] = keep * state.get("mean", 0.0) + (1 - keep) * mean
    state["variance"] = keep * state.get("variance", 0.0) + (1 - keep) * variance
    return state["mean"], state["variance"] ** 0.5


def dropped(trim: float | None, n: int) -> int:
    """How many of n rewards count as extremes at each end."""
    if trim is None:
        return 1
    if not 0 < trim < 0.5:
        raise InputError(
            f"trim {trim}: expected a fraction between 0 and 0.5, or None to drop one reward at "
            "each end"
        )
    return max(1, int(trim * n))


# ---- the noise (HN-9): sigma_n times what ----


def relative_noise(layer: LoRALinear) -> tuple[float, float]:
    """Ours: the RMS of the layer's own A, and of its B, but of a fresh A while B is smaller."""
    fresh = (3 * layer.in_features) ** -0.5  # RMS of a fresh A: U(-1/sqrt in, 1/sqrt in)
    return rms(layer.A), max(rms(layer.B), fresh)


def rms(weight: Tensor) -> float:
    """Root mean square of the entries of a weight."""
    return weight.detach().square().mean().sqrt().item()


# ---- by name, as the flags name them; the first of each is the document's ----

GAPS: dict[str, Callable[..., Tensor]] = {
    "union": hars.cluster_gap,
    "ranked": ranked_gap,
    "cosine": cosine_gap,
}
HARDNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": hars.hardness,
    "ratio": ratio_hardness,
    "standardised": standardised_hardness,
}
CONTROLS: dict[str, Callable[..., Tensor]] = {
    "none": unchanged,
    "reversed": reversed_lambda,
    "permuted": permuted_lambda,
    "mean": mean_lambda,
}
ETAS: dict[str, Callable[..., Tensor]] = {
    "batch": batch_eta,
    "ema": ema_eta,
}
NOISES: dict[str, Callable[[LoRALinear], tuple[float, float]]] = {
    "absolute": absolute_noise,
    "relative": relative_noise,
}
