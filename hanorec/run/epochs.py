"""The epochs of a run that keeps its best one: order, log, checkpoints, when to stop.

`Epochs` never sees how a loss is made, nor what is validated: both are handed in.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hanorec.base.errors import InputError
from hanorec.base.progress import Progress
from hanorec.ranking.early_stopping import BestEpoch
from hanorec.run.checkpoint import load_checkpoint, save_checkpoint
from hanorec.run.log import append_log


class Epochs:
    """Epochs of a run in its folder, from the first one or from the newest checkpoint on.

    Args:
        config: with seed, batch, epochs and patience.
        metric: the best epoch is the one where this of the validation is highest.
        every: epochs from one validation and checkpoint to the next; after the last there is one.
    """

    def __init__(
        self, out: Path, config: Any, device: torch.device, metric: str, every: int = 1
    ) -> None:
        self.out, self.config, self.device = out, config, device
        self.metric, self.every = metric, every
        torch.manual_seed(config.seed)
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def still_to_do(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        validate: Callable[[], Mapping[str, float]],
    ) -> Iterator[int]:
        """The epochs still to be done, from 1, until `patience` validations bring nothing better.

        validate: metric -> its value on validation, of the model as it then is.
        """
        self.optimizer = optimizer
        self.weights = dict(model.named_parameters())
        self.best = BestEpoch(self.weights)
        # Weights, best weights, Adam's moments, the generator's state, the log's length.
        tensors = [*self.weights.values(), *self.best.weights.values()]
        random = {"loop": self.generator}
        self.epoch, facts = load_checkpoint(self.out, tensors, optimizer, random)
        self.best.go_on(facts)

        most, patience = self.config.epochs, self.config.patience * self.every
        bar, shown = Progress(self.out.name, most, self.epoch, "epoch"), {}
        while self.epoch < most and self.epoch - self.best.epoch < patience:
            self.epoch += 1
            self.means: Counter[str] = Counter()
            yield self.epoch
            # Safe here: the loop asks for the next epoch once it has done all of this one. If it
            # failed on the way, it never comes back, and nothing of the epoch is kept.
            bar.step(loss=next(iter(self.means.values()), math.nan), **shown)
            if self.epoch % self.every and self.epoch < most:
                self._log({})
                continue
            valid = validate()
            score = valid[self.metric]
            self.best.offer(self.epoch, score, self.weights)
            self._log(valid)
            facts = self.best.facts
            save_checkpoint(self.out, self.epoch, tensors, optimizer, random, **facts)
            shown = {f"valid {self.metric}": score, "best": self.best.score}
        bar.close()

    def batches(self, n: int) -> Iterator[Tensor]:
        """The steps of an epoch: places (B,) of a random order of 0 .. n - 1."""
        order = torch.randperm(n, generator=self.generator, device=self.device)
        yield from order.split(self.config.batch)

    def update(self, share: float, **means: float) -> None:
        """The optimizer's step.

        share: of the batch in its epoch. means: over the batch, the loss first, for the log.
        InputError before anything is updated, if the loss is not finite.
        """
        loss = next(iter(means.values()))
        if not math.isfinite(loss):
            raise InputError(
                f"epoch {self.epoch}: loss {loss}, expected a finite number; the last "
                "checkpoint stands: lower --learning-rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, value in means.items():
            self.means[name] += share * value

    @torch.no_grad()
    def use_best(self) -> None:
        """The model has the best epoch's weights from here on."""
        for name, weight in self.weights.items():
            weight.copy_(self.best.weights[name])

    def _log(self, valid: Mapping[str, float]) -> None:
        """The epoch's line in log.jsonl: means over its steps, metrics of validation if any."""
        record = {f"valid_{name}": value for name, value in valid.items()}
        append_log(self.out / "log.jsonl", {"epoch": self.epoch, **self.means, **record})
