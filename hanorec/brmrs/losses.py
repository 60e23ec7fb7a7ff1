r"""BR-MRS, the plain functions: hard negatives and the losses (BR-2 .. BR-6).

They take scores and know nothing of the model behind them, so they plug into any recommender.

    pool scores -> j_v, j_t            (what confuses the one modality ...)
    -> L_chns                          (... the other must tell apart)
    margins -> L_syn, L_BPR            (the fused branch must beat the better modality by theta,
                                        and be right)

Branches t (text), v (image), f (fused); a score s is a real number, larger = preferred; a margin is
Delta = s(u, i+) - s(u, i-), larger = better ranked. B = triples (u, i+, i-) of a batch, n = items
of a pool N(u), which `hanorec.ranking.sampler.NegativeSampler` draws (BR-1).

Every loss keeps dtype and device. Source of all: document 003, sections 4.1 to 4.3.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def hard_negatives(s_v: Tensor, s_t: Tensor) -> tuple[Tensor, Tensor]:
    r"""What confuses each modality most in a pool.

    Args:
        s_v, s_t: (B, n) scores of the pool's items under the two modalities.
    Returns:
        j_v, j_t: (B,) int64 positions in the pool; equal scores: the first. They carry no gradient.
    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes("hard_negatives", 2, s_v, s_t)
    # BR-2: j_v = \arg\max_{j \in N(u)} s_v(u, j), \quad j_t = \arg\max_{j \in N(u)} s_t(u, j)
    return s_v.argmax(1), s_t.argmax(1)


def chns_loss(t_pos: Tensor, t_at_jv: Tensor, v_pos: Tensor, v_at_jt: Tensor) -> Tensor:
    r"""Cross-modal hard negatives.

    Text must tell apart what confuses the image, and the image what confuses text.

    Args:
        t_pos, v_pos: (B,) scores of i+ under text and under the image.
        t_at_jv: (B,) text's score of the image's hard negative.
        v_at_jt: (B,) the image's score of text's hard negative.
    Returns:
        (B,); 2 ln 2 = 1.386 where both are undecided.
    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes("chns_loss", 1, t_pos, t_at_jv, v_pos, v_at_jt)
    # BR-3: L_{chns} = -[\log\sigma(s_t(u, i^+) - s_t(u, j_v))
    # + \log\sigma(s_v(u, i^+) - s_v(u, j_t))]
    return -(F.logsigmoid(t_pos - t_at_jv) + F.logsigmoid(v_pos - v_at_jt))


def synergy_loss(
    gap_f: Tensor, gap_t: Tensor, gap_v: Tensor, theta: float = 0.0, detach: bool = False
) -> Tensor:
    r"""The fused margin must exceed the better of the two unimodal margins by theta.

    Args:
        gap_f, gap_t, gap_v: (B,) margins of one triple (u, i+, i-).
        theta: in units of the scores.
        detach: option: no gradient to the unimodal margins. Without it (literal) the loss can also
            fall by worsening the better modality, at the same rate as by improving the fusion.
    Returns:
        (B,); ln 2 where the fused margin leads by exactly theta.
    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes("synergy_loss", 1, gap_f, gap_t, gap_v)
    best = torch.maximum(gap_t, gap_v)  # (B,)
    if detach:
        best = best.detach()
    # BR-4: L_{syn} = -\log\sigma(\Delta_f - \max(\Delta_t, \Delta_v) - \theta)
    return -F.logsigmoid(gap_f - best - theta)


def bpr_loss(gap: Tensor) -> Tensor:
    r"""Bayesian personalised ranking: (B,) margins -> (B,); ln 2 at 0, which is chance."""
    _check_shapes("bpr_loss", 1, gap)
    # BR-5: L_{BPR} = -\log\sigma(\Delta_f)
    return -F.logsigmoid(gap)


def total_loss(
    bpr: Tensor,
    chns: Tensor,
    syn: Tensor,
    squared_norm: Tensor,
    lambda_h: float,
    lambda_s: float,
    weight_decay: float,
    bpr_weight: float = 1.0,
) -> Tensor:
    r"""The objective of a batch.

    Args:
        bpr, chns, syn: (B,) of the functions above, or () means of them.
        squared_norm: () of the parameters, see `hanorec.brmrs.model.BRMRS.regulariser`.
        lambda_h, lambda_s, weight_decay: weights of CHNS, of synergy and of the norm.
        bpr_weight: 1, or 0 for the document's displayed formula, which leaves BPR out although its
            text counts it in.
    Returns:
        (): the mean over the batch.
    """
    # BR-6: L = L_{BPR} + \lambda_h L_{chns} + \lambda_s L_{syn} + \lambda \lVert\Theta\rVert_2^2
    return (
        bpr_weight * bpr.mean()
        + lambda_h * chns.mean()
        + lambda_s * syn.mean()
        + weight_decay * squared_norm
    )


def _check_shapes(name: str, dimensions: int, *tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != dimensions or 0 in shapes[0]:
        raise ValueError(
            f"{name}: shapes {shapes}, expected equal ones of {dimensions} "
            f"dimension{'s' * (dimensions > 1)}, none empty"
        )
