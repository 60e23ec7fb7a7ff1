r"""Other readings of what the document leaves open, each beside the one that it stands for.

    GAPS       e, scores, index, chosen, rejected -> delta      for `cluster_gap` (HN-4)
    HARDNESS   delta -> lambda                                  for `hardness` (HN-5)
    CONTROLS   lambda, generator -> lambda                      the same numbers on the wrong pairs
    ETAS       R, state, trim -> eta                            for `responsiveness` (HN-7), etas.py
    KEPT       R, state, trim, generator -> weights             which pairs count (HN-11), etas.py
    NOISES     layer -> scale of the noise on its A and B       for `absolute_noise` (HN-9)

The dictionaries at the end hold all of them by name, the document's included, which the equation
files compute. "Release" is the authors' public code, "ours" is in neither. Readings that change the
step itself and not one quantity: run/steps.py.
P = pairs, N = items, d = width, K = neighbours.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec import etas, hars
from hanorec.base.errors import InputError
from hanorec.lora.layer import LoRALinear, absolute_noise

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


def signed_gap(
    e: Tensor,
    scores: Tensor,
    index: Tensor,
    chosen: Tensor,
    rejected: Tensor,
) -> Tensor:
    r"""Ours: how close the chosen item's cluster lies around it, less the rejected item's; (P,).

    In -2 .. 2. A gap below 0 is the only way to a lambda under 0.5, so to the document's (0, 1).
    """
    # \Delta = \operatorname{mean}_K s_w - \operatorname{mean}_K s_l
    return scores[chosen].mean(1) - scores[rejected].mean(1)


def centroid_gap(
    e: Tensor,
    scores: Tensor,
    index: Tensor,
    chosen: Tensor,
    rejected: Tensor,
) -> Tensor:
    r"""Ours: distance of the two clusters' centres, each with its item; (P,) in 0 .. 2."""
    # \Delta = \lVert c_w - c_l \rVert_2,
    # c_m = \operatorname{mean}_{j \in \{m\} \cup N_K(m)} e_j
    w = torch.cat([chosen[:, None], index[chosen]], 1)  # (P, 1 + K)
    l = torch.cat([rejected[:, None], index[rejected]], 1)
    return (e[w].mean(1) - e[l].mean(1)).norm(dim=1)


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


def one_lambda(lam: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """All pairs get 1: eta alone weighs, and w/o SAM read as no hardness at all."""
    return torch.ones_like(lam)


# ---- the noise (HN-9): sigma_n times what ----


def relative_noise(layer: LoRALinear) -> tuple[float, float]:
    """Ours: the RMS of the layer's own A, and of its B, but of a fresh A while B is smaller."""
    fresh = (3 * layer.in_features) ** -0.5  # RMS of a fresh A: U(-1/sqrt in, 1/sqrt in)
    return rms(layer.A), max(rms(layer.B), fresh)


def rms(weight: Tensor) -> float:
    """Root mean square of the entries of a weight."""
    return weight.detach().square().mean().sqrt().item()


# ---- an explicit term for image and text (HN-12) ----


def alignment_kl(H: Tensor, X: Tensor) -> Tensor:
    r"""Ours: KL of what n items are to each other by image from what they are by text: ().

    "Aligns the semantic spaces of image and text" taken at its word: a space is, for each item, the
    distribution of likeness over the others. At least 0; 0 where both say the same of all pairs.

    Args:
        H, X: (n, d) text and visual embeddings of the same items, n >= 3. Gradients flow to both.
    """
    off = torch.eye(len(H), dtype=torch.bool, device=H.device)
    H, X = F.normalize(H, dim=1), F.normalize(X, dim=1)
    log_p = (H @ H.T)[~off].view(len(H), -1).log_softmax(1)  # (n, n - 1)
    log_q = (X @ X.T)[~off].view(len(X), -1).log_softmax(1)
    # \operatorname{mean}_i KL(p_i \Vert q_i),
    # p_i = \operatorname{softmax}_{j \ne i} \cos(H_i, H_j),
    # q_i = \operatorname{softmax}_{j \ne i} \cos(X_i, X_j)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


# ---- by name, as the flags name them; the first of each is the document's ----

GAPS: dict[str, Callable[..., Tensor]] = {
    "union": hars.cluster_gap,
    "ranked": ranked_gap,
    "signed": signed_gap,
    "centroid": centroid_gap,
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
    "one": one_lambda,
}
ETAS: dict[str, Callable[..., Tensor]] = {
    "batch": etas.batch_eta,
    "pair": etas.pair_eta,
    "ema": etas.ema_eta,
    "beta_dpo": etas.beta_dpo_eta,
}
KEPT: dict[str, Callable[..., Tensor]] = {
    "all": etas.all_kept,
    "inner": etas.inner_kept,
    "near": etas.near_kept,
}
NOISES: dict[str, Callable[[LoRALinear], tuple[float, float]]] = {
    "absolute": absolute_noise,
    "relative": relative_noise,
}
