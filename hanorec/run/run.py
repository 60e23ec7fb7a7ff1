"""What both training stages of HaNoRec need around their loops."""

import math
from collections.abc import Sequence

from hanorec.base.errors import InputError


def cosine(step: int, steps: int) -> float:
    """The learning rate's factor at `step` of 0 .. steps - 1: from 1 down toward 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def check_finite(loss: float, norm: float, step: int, users: Sequence[str]) -> None:
    """Stop before a broken step reaches the weights: InputError names the step, the values and the users of the batch."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(f"step {step}: loss {loss}, gradient norm {norm}, expected finite numbers; users of the batch: "
                         f"{', '.join(users)}; nothing was updated, the last checkpoint stands: lower --learning-rate or --sigma, or look at these users' items and at the checkpoint's weights")
