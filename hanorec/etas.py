r"""Other readings of HN-7, and of which pairs it leaves in the loss: what a batch's rewards say.

    eta    R, state, trim -> eta         for `responsiveness`: one number, or one for each pair
    kept   R, state, trim -> weights     which pairs count in the loss, and how much: mean 1

R are the reward gaps of a batch, of any shape; state is a dictionary that the run keeps from step
to step. "Ours" is in neither the document nor the authors' release; beta-DPO is another method
(arXiv 2407.08639), here as the nearest published relative to compare with. By name: readings.py.
"""

from typing import Any

import torch
from torch import Tensor

from hanorec import hars
from hanorec.base.errors import InputError

DECAY = 0.9  # of the running statistics
SLOPE = 0.6  # beta-DPO: a
SHARE = 0.8  # beta-DPO: of a batch's pairs that stay in the loss

# ---- eta ----


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
    kept = hars.without_extremes(normalised, dropped(trim, R.numel()))
    return kept.mean().sigmoid() / normalised.mean().sigmoid()


def pair_eta(R: Tensor, state: dict[str, Any], trim: float | None = None) -> Tensor:
    r"""The document read pair by pair: each has its own reward gap, so its own state of learning.

    It is the only reading in which eta tells the pairs of a batch apart. An extreme cannot be left
    out of its own eta, so it is drawn in to the nearest that is kept.

    Args:
        R, state, trim: as in `batch_eta`.
    Returns:
        eta: as R, in 0 .. 1.368 where mean R is not next to 0.
    """
    normalised = hars.normalised_rewards(R)
    kept = hars.without_extremes(normalised, dropped(trim, R.numel()))
    # \eta_i = \sigma(\min(\max(\tilde R_i, \min_{kept}), \max_{kept}))
    #          / \sigma(\operatorname{mean}\tilde R)
    return normalised.clamp(kept[0], kept[-1]).sigmoid() / normalised.mean().sigmoid()


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
    kept = hars.without_extremes(normalised, dropped(trim, R.numel()))
    return kept.mean().sigmoid() / R.new_zeros(()).sigmoid()


def beta_dpo_eta(R: Tensor, state: dict[str, Any], trim: float | None = None) -> Tensor:
    r"""beta-DPO's: a batch whose mean margin is above the running one M_0 gets a larger beta.

    With `--control one` beta' is beta-DPO's beta for the whole batch. M_0 is mixed with this batch
    first, as there; here the first batch sets it, so its eta is 1.

    Args:
        R: (P,) reward gaps, which it calls margins. state: as in `ema_eta`. trim: unused.
    Returns:
        eta: (), at least 0.
    """
    mean, _ = running_statistics(R, state)
    # \eta = 1 + a \, (\operatorname{mean} R - M_0)
    return (1 + SLOPE * (R.detach().mean() - mean)).clamp_min(0)


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


# ---- which pairs count in the loss ----


def all_kept(
    R: Tensor,
    state: dict[str, Any],
    trim: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The document's: every pair counts as much, extremes are left out of eta alone."""
    return torch.ones_like(R)


def inner_kept(
    R: Tensor,
    state: dict[str, Any],
    trim: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The document's "filter extremes" read of the loss as well: an extreme pair does not count.

    As many as eta leaves out at each end; of equal rewards the ones that stand last are the larger.
    """
    drop = dropped(trim, R.numel())
    hars.without_extremes(R.detach(), drop)  # refuses too few pairs
    order = R.detach().flatten().argsort(stable=True)
    return _only(order[drop : R.numel() - drop], R)


def near_kept(
    R: Tensor,
    state: dict[str, Any],
    trim: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""beta-DPO's filter: a share of the pairs, drawn with a chance that falls with |R - M_0|.

    Args:
        state: M_0 and the variance, as `beta_dpo_eta` of this batch left them.
        generator: of the draw, on the CPU.
    """
    deviation = max(state["variance"] ** 0.5, 1e-8)
    distance = (R.detach().flatten().cpu() - state["mean"]) / deviation
    # p_i \propto \exp(-\tfrac12 ((R_i - M_0) / s)^2), \text{ drawn without replacement}
    # The key log p_i + Gumbel noise does that, and no chance is too small for it.
    uniform = torch.rand(len(distance), generator=generator, dtype=torch.float64)
    key = -0.5 * distance.double().square() - uniform.log().neg().log()
    count = max(1, int(SHARE * len(distance)))
    return _only(key.topk(count).indices.to(R.device), R)


def _only(kept: Tensor, R: Tensor) -> Tensor:
    """Weights as R: equal for the pairs whose numbers are in `kept`, 0 for the others, mean 1."""
    weights = R.new_zeros(R.numel())
    weights[kept] = R.numel() / len(kept)
    return weights.view_as(R)
