"""The best epoch of a training run so far, by a score on validation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class BestEpoch:
    """The weights of the epoch with the highest score, the first of equals.

    Scores are compared as they are, never rounded.

    Args:
        weights: name -> weight; copies of them are kept.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        self.score, self.epoch = -1.0, 0

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, beside the weights."""
        return {"score": self.score, "best_epoch": self.epoch}

    def go_on(self, facts: Mapping[str, Any]) -> None:
        """Back to what a checkpoint kept; without facts there was none."""
        self.score = facts.get("score", self.score)
        self.epoch = facts.get("best_epoch", self.epoch)

    @torch.no_grad()
    def offer(self, epoch: int, score: float, weights: Mapping[str, Tensor]) -> None:
        """Keep this epoch's weights if its score is above all before it."""
        if score > self.score:
            self.score, self.epoch = score, epoch
            for name, weight in weights.items():
                self.weights[name].copy_(weight)
