r"""HaRS, the hardness-aware reweighting strategy: from item embeddings to one beta' per pair.

    items -> e -> clusters -> Delta -> lambda   how alike are a pair's items: smaller = harder
    rewards -> R -> eta                         how does the policy respond: one number a step
    beta' = eta * lambda * beta0

This is the document's reading of HN-1 .. HN-8 (HN-3: topk.py). Other readings: readings.py.
Everything here is a weight, so nothing here carries a gradient.
P = pairs, N = items, d = width, K = neighbours. Source: document 000, section 2.1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.base.errors import InputError

PAIRS_AT_ONCE = 1024  # of `cluster_gap`: bounds its memory


def mean_pool(vectors: Tensor) -> Tensor:
    r"""One embedding of a title or an image.

    Args:
        vectors: (..., n, d), of a title's tokens or an image's patches.
    Returns:
        (..., d), in float32 or wider.
    """
    wide = torch.promote_types(vectors.dtype, torch.float32)
    # HN-1: H_i = \operatorname{mean}_t h_t \text{ over title tokens},
    #       X_i = \operatorname{mean}_p x_p \text{ over patches}
    return vectors.to(wide).mean(-2)


def fuse(H: Tensor, X: Tensor, has_image: Tensor | None = None) -> Tensor:
    r"""One unit vector an item from its text embedding H and its visual embedding X.

    Args:
        H, X: (N, d).
        has_image: (N,) bool, default all True; an item without an image uses H alone.
    Returns:
        e: (N, d), rows of length 1.
    Raises:
        InputError: a row that is not finite or has no direction (length 0), named by its number.
    """
    if has_image is None:
        has_image = torch.ones(len(H), dtype=torch.bool, device=H.device)
    both = F.normalize(H, dim=1) + torch.where(has_image[:, None], F.normalize(X, dim=1), 0)
    _check_directions(H.norm(dim=1), torch.where(has_image, X.norm(dim=1), 1), both.norm(dim=1))
    # HN-2: e_i = \operatorname{norm}(\operatorname{norm}(H_i) + \operatorname{norm}(X_i))
    return F.normalize(both, dim=1)


def _check_directions(text: Tensor, image: Tensor, total: Tensor) -> None:
    """InputError for the first item of which a length (N,) is 0 or not finite."""
    lengths = torch.stack([text, image, total], 1)  # (N, 3)
    least = lengths.new_tensor([0, 0, 1e-4])  # opposite H and X leave nothing but rounding
    good = ((lengths > least) & lengths.isfinite()).all(1)  # (N,)
    if good.all():
        return
    row = int((~good).nonzero()[0])
    t, i, both = lengths[row].tolist()
    raise InputError(
        f"item row {row}: its text and image embeddings have lengths {t:.3g} and {i:.3g}, the sum "
        f"of their directions {both:.3g}, expected all above 0; zero, opposite or not finite: mend "
        "the title or the image of that item"
    )


def cluster_gap(
    e: Tensor,
    scores: Tensor,
    index: Tensor,
    chosen: Tensor,
    rejected: Tensor,
) -> Tensor:
    r"""Delta: how different the clusters of the chosen and the rejected item are.

    Any number of pairs: PAIRS_AT_ONCE of them hold (2 + 2K) d numbers each, 0.14 GB in float32 at
    K = 10, d = 1536, and no pair makes the CPU wait for a GPU.

    Args:
        e: (N, d) unit rows.
        scores, index: (N, K) of `topk_neighbors`.
        chosen, rejected: (P,) int64, rows of e.
    Returns:
        delta: (P,) in 0 .. 0.54 at K = 10 (docs/theory.md); larger = easier to tell apart.
    """
    parts = []
    for w, l in zip(chosen.split(PAIRS_AT_ONCE), rejected.split(PAIRS_AT_ONCE), strict=True):
        members = torch.cat([w[:, None], l[:, None], index[w], index[l]], 1)  # (p, 2 + 2K)
        # The union is a set: a member that stands further left as well counts once.
        repeats = (members[:, :, None] == members[:, None, :]).tril(-1).any(2)  # (p, 2 + 2K)
        s_w = torch.einsum("pud,pd->pu", e[members], e[w]).masked_fill(repeats, -torch.inf)
        s_l = torch.einsum("pud,pd->pu", e[members], e[l]).masked_fill(repeats, -torch.inf)
        p_w, p_l = s_w.softmax(1), s_l.softmax(1)  # (p, 2 + 2K)
        # HN-4: \Delta = \lVert p_w - p_l \rVert_2,
        #       p_i = \operatorname{softmax}_{j \in U} s_{ij},
        #       U = \{w, l\} \cup N_K(w) \cup N_K(l)
        parts.append((p_w - p_l).norm(dim=1))
    return torch.cat(parts)


def hardness(delta: Tensor) -> Tensor:
    r"""lambda: (P,) from delta (P,); smaller = harder.

    In 0.5 .. 0.631 at K = 10, of which Delta <= 0.54 (docs/theory.md).
    """
    # HN-5: \lambda = \sigma(\Delta)
    return delta.sigmoid()


def reward_gap(h: Tensor, beta0: float) -> Tensor:
    r"""R: (P,) from the preference logit h (P,) of DPO-1, detached.

    Positive = the policy moved toward the chosen item.
    """
    # HN-6: R_i = \beta_0 h_i
    return (beta0 * h).detach()


def responsiveness(R: Tensor) -> Tensor:
    r"""eta: one number for the global batch, all micro-batches and ranks of one optimizer step.

    Args:
        R: P >= 3 reward gaps, of any shape.
    Returns:
        eta: () in (0, 1 / sigma(1) = 1.368). It depends on the skew of R, not on its sign or scale
        (while |mean R| > 1e-8). All rewards 0, as at the first step: 1.
    Raises:
        InputError: fewer than 3 pairs, rewards that are not finite.
    """
    normalised = normalised_rewards(R)  # (P,)
    kept = without_extremes(normalised)  # (P - 2,)
    # HN-7: \tilde R_i = R_i / \operatorname{mean}(R),
    #       \eta = \sigma(\operatorname{mean}_{kept}\tilde R) / \sigma(\operatorname{mean}\tilde R)
    return kept.mean().sigmoid() / normalised.mean().sigmoid()


def normalised_rewards(R: Tensor) -> Tensor:
    r"""R / mean(R), as R. Where the mean says nothing about the scale: R / mean|R|."""
    if not R.isfinite().all():
        raise InputError(f"rewards {R.tolist()}: expected finite rewards")
    R = R.detach()
    scale = R.mean()
    if scale.abs() <= 1e-8:
        scale = R.abs().mean().clamp_min(torch.finfo(R.dtype).tiny)  # all 0: nothing to divide
    return R / scale


def without_extremes(values: Tensor, drop: int = 1) -> Tensor:
    r"""The values in order, without the `drop` smallest and largest: (P - 2 drop,)."""
    n = values.numel()
    if n < 3 or 2 * drop >= n:
        raise InputError(
            f"responsiveness of {n} pairs, {drop} dropped from each end: at least "
            f"{max(3, 2 * drop + 1)} pairs are needed in a global batch; raise the micro-batch or "
            "the accumulation"
        )
    return values.flatten().sort().values[drop : n - drop]


def pair_beta(lam: Tensor, eta: Tensor, beta0: float = 0.1, floor: float = 1e-6) -> Tensor:
    r"""beta': (P,) from lam (P,) and eta, () or (P,); at least `floor`.

    Detached: no gradient flows through a weight.
    """
    # HN-8: \beta'_i = \eta \, \lambda_i \, \beta_0
    return (eta * lam * beta0).clamp_min(floor).detach()
