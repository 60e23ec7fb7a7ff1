r"""HaRS, the hardness-aware reweighting strategy: from item embeddings to one beta' per pair (HN-1 .. HN-8).

    items -> e -> clusters -> Delta -> lambda  (how alike are the two items of a pair: smaller = harder)
    rewards -> R -> eta                        (how does the policy respond: one number a global batch)
    beta' = eta * lambda * beta0

Everything here is a weight, so nothing here carries a gradient. P = pairs, N = items, d = width, K = neighbours.
Source of all: document 000, section 2.1; the options marked (ours) are not in the document.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.base.errors import InputError


def mean_pool(vectors: Tensor) -> Tensor:
    r"""One embedding of a title or an image: (..., n, d) token vectors or image features -> (..., d), in float32 or wider."""
    # HN-1: H_i = \frac{1}{n}\sum_{t} h_t \text{ over title tokens}, \quad X_i = \frac{1}{m}\sum_{p} x_p \text{ over patches}
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32)).mean(-2)


def fuse(H: Tensor, X: Tensor, has_image: Tensor | None = None) -> Tensor:
    r"""One unit vector an item from its text embedding H and its visual embedding X.

    Args:
        H, X: (N, d). has_image: (N,) bool, default all True; an item without an image uses H alone.
    Returns:
        e: (N, d), rows of length 1.
    Raises:
        InputError: a row that is not finite or has no direction (length 0), named by its number.
    """
    has_image = torch.ones(len(H), dtype=torch.bool, device=H.device) if has_image is None else has_image
    both = F.normalize(H, dim=1) + torch.where(has_image[:, None], F.normalize(X, dim=1), 0)  # (N, d)
    lengths = torch.stack([H.norm(dim=1), torch.where(has_image, X.norm(dim=1), 1), both.norm(dim=1)], 1)  # (N, 3)
    good = (lengths > lengths.new_tensor([0, 0, 1e-4])) & lengths.isfinite()  # opposite H and X leave nothing but rounding
    if not good.all():
        row = int((~good.all(1)).nonzero()[0])
        text, image, total = lengths[row].tolist()
        raise InputError(f"item row {row}: its text and image embeddings have lengths {text:.3g} and {image:.3g}, the sum of their "
                         f"directions {total:.3g}, expected all above 0; zero, opposite or not finite: mend the title or the image of that item")
    # HN-2: e_i = \operatorname{norm}(\operatorname{norm}(H_i) + \operatorname{norm}(X_i))
    return F.normalize(both, dim=1)


def cluster_gap(e: Tensor, scores: Tensor, index: Tensor, chosen: Tensor, rejected: Tensor,
                form: str = "union") -> Tensor:
    r"""Delta >= 0: how different the clusters of the chosen and the rejected item are; larger = easier to tell apart.

    Args:
        e: (N, d) unit rows. scores, index: (N, K) of `topk_neighbors`. chosen, rejected: (P,) int64 rows of e.
        form: "union" (default), "ranked" (authors' release: compares score profiles, not items),
            "cosine" (the ablation w/o SAM: no clusters, the two items alone; range 0 .. 2).
    Returns:
        delta: (P,), in 0 .. sqrt 2 for the first two forms.
    """
    if form == "cosine":
        return (1 - (e[chosen] * e[rejected]).sum(1)).clamp_min(0)  # equal rows can round below 0
    if form == "ranked":
        p_w, p_l = scores[chosen].softmax(1), scores[rejected].softmax(1)  # (P, K)
    elif form == "union":
        members = torch.cat([chosen[:, None], rejected[:, None], index[chosen], index[rejected]], 1)  # (P, 2 + 2K)
        # The union is a set: a member that stands further left as well counts once.
        repeats = (members[:, :, None] == members[:, None, :]).tril(-1).any(2)  # (P, 2 + 2K)
        s_w = torch.einsum("pud,pd->pu", e[members], e[chosen]).masked_fill(repeats, -torch.inf)
        s_l = torch.einsum("pud,pd->pu", e[members], e[rejected]).masked_fill(repeats, -torch.inf)
        p_w, p_l = s_w.softmax(1), s_l.softmax(1)  # (P, 2 + 2K)
    else:
        raise InputError(f"form {form!r} of the cluster gap: expected union, ranked or cosine")
    # HN-4: \Delta = \lVert p_w - p_l \rVert_2, \quad p_m = \operatorname{softmax}_{j \in U} s_{mj}, \quad U = \{w, l\} \cup N_K(w) \cup N_K(l)
    return (p_w - p_l).norm(dim=1)


def hardness(delta: Tensor, form: str = "sigmoid", mean: float | Tensor | None = None,
             std: float | Tensor | None = None) -> Tensor:
    r"""lambda > 0: smaller = harder.

    Args:
        delta: (P,). mean, std: of Delta over the training pairs (population std); default: those of delta.
        form: "sigmoid" (document; range 0.5 .. 0.805 at most, since 0 <= Delta <= sqrt 2), "ratio" (authors' release: the same up
            to a constant), "standardised" (ours: the whole range 0 .. 2, mean near 1).
    Returns:
        lam: (P,).
    """
    mean = delta.mean() if mean is None else torch.as_tensor(mean, dtype=delta.dtype, device=delta.device)
    if form == "sigmoid":
        # HN-5: \lambda = \sigma(\Delta)
        return delta.sigmoid()
    if form == "ratio":
        return delta.sigmoid() / mean.sigmoid()
    if form == "standardised":
        std = delta.std(correction=0) if std is None else torch.as_tensor(std, dtype=delta.dtype, device=delta.device)
        if not std > 0:
            raise InputError(f"standardised hardness: the gaps have standard deviation {std.item()}, expected more than 0; "
                             "all pairs are equally hard, so use the form sigmoid")
        return 2 * ((delta - mean) / std).sigmoid()
    raise InputError(f"form {form!r} of the hardness: expected sigmoid, ratio or standardised")


def misassigned(lam: Tensor, control: str, generator: torch.Generator | None = None) -> Tensor:
    r"""Controls of HaRS (ours): the lambdas (P,) given to the wrong pairs. Is it worth anything that each pair has its own?

    control: "reversed" (the hardest pair gets the largest, and so on), "permuted" (dealt out at random), "mean" (all alike), "none".
    """
    if control == "none":
        return lam
    if control == "reversed":
        order, wrong = lam.argsort(stable=True), torch.empty_like(lam)
        wrong[order] = lam[order.flip(0)]
        return wrong
    if control == "permuted":
        return lam[torch.randperm(len(lam), generator=generator).to(lam.device)]
    if control == "mean":
        return lam.mean().expand_as(lam)
    raise InputError(f"control {control!r} of the hardness: expected none, reversed, permuted or mean")


def reward_gap(h: Tensor, beta0: float) -> Tensor:
    r"""R: (P,) from the preference logit h (P,) of DPO-1; detached. Positive = the policy moved toward the chosen item."""
    # HN-6: R_i = \beta_0 h_i
    return (beta0 * h).detach()


def responsiveness(R: Tensor, trim: float | None = None, mean: float | None = None, std: float | None = None) -> Tensor:
    r"""eta > 0: one number for the global batch (all micro-batches and ranks of one optimizer step).

    Args:
        R: (P,) reward gaps, P >= 3.
        trim: None drops the smallest and the largest value (document); a fraction q in (0, 0.5) drops max(1, floor(q P))
            from each end.
        mean, std: option `ema` (ours): running statistics that normalise R instead of the batch's own mean. A batch
            that responds as usual then lies at 0 rather than at 1, so the denominator is sigma(0).
    Returns:
        eta: (). By default in (0, 1 / sigma(1) = 1.368), or up to 2 with running statistics; it depends on the skew
        of R, not on its sign or scale (while |mean R| > 1e-8). All rewards 0, as at the first step: 1.
    Raises:
        InputError: fewer than 3 pairs, trim out of range, rewards not finite, one running statistic without the other.
    """
    n = len(R)
    if trim is not None and not 0 < trim < 0.5:
        raise InputError(f"trim {trim}: expected a fraction between 0 and 0.5, or None to drop one reward at each end")
    if (mean is None) != (std is None) or not R.isfinite().all():
        raise InputError(f"rewards {R.tolist()}, running mean {mean} and std {std}: expected finite rewards, and both statistics or neither")
    drop = 1 if trim is None else max(1, int(trim * n))
    if n < 3 or 2 * drop >= n:
        raise InputError(f"responsiveness of {n} pairs, {drop} dropped from each end: at least {max(3, 2 * drop + 1)} pairs "
                         "are needed in a global batch; raise the micro-batch or the accumulation")
    R = R.detach()
    if mean is not None and std is not None:
        normalised, centre = (R - mean) / max(std, 1e-8), R.new_zeros(())
    else:
        scale = R.mean()
        if scale.abs() <= 1e-8:  # the mean says nothing about the scale: use mean |R| (all 0: nothing to divide)
            scale = R.abs().mean().clamp_min(torch.finfo(R.dtype).tiny)
        normalised = R / scale
        centre = normalised.mean()
    kept = normalised.sort().values[drop : n - drop]
    # HN-7: \eta = \sigma(\operatorname{mean} \tilde R_{\text{kept}}) \, / \, \sigma(\operatorname{mean} \tilde R), \quad \tilde R_i = R_i / \operatorname{mean}(R)
    return kept.mean().sigmoid() / centre.sigmoid()


@dataclass
class RunningReward:
    """Running mean and variance of R for the option `ema` of HN-7; the first batch sets them."""

    decay: float = 0.9
    mean: float | None = None
    variance: float = 0.0

    def update(self, R: Tensor) -> tuple[float, float]:
        """Mix in a global batch (P,); returns (mean, std)."""
        keep = 0.0 if self.mean is None else self.decay
        self.mean = keep * (self.mean or 0.0) + (1 - keep) * R.mean().item()
        self.variance = keep * self.variance + (1 - keep) * R.var(correction=0).item()
        return self.mean, self.variance**0.5


def pair_beta(lam: Tensor, eta: Tensor, beta0: float = 0.1, floor: float = 1e-6) -> Tensor:
    r"""beta': (P,) from lam (P,) and eta (); at least `floor`, detached: no gradient flows through a weight."""
    # HN-8: \beta'_i = \eta \, \lambda_i \, \beta_0
    return (eta * lam * beta0).clamp_min(floor).detach()
