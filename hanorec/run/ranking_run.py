"""One run of a recommender that learns to rank the catalogue: what stands around its loop.

Folder, data, validation, the best epoch, checkpoints, result. `RankingRun` never sees how a loss
is made: sampling, scores, losses and `backward` stay in the script, where they are read.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hanorec.base.config_brmrs import BrmrsFiles
from hanorec.base.distributed import join, rank, share, sum_gradients, usable_device
from hanorec.base.errors import InputError
from hanorec.base.lock import unlock_folder
from hanorec.ranking.early_stopping import BestEpoch
from hanorec.ranking.full_ranking import AT, Embeddings, evaluate
from hanorec.ranking.pairs import keep_data, run_data
from hanorec.ranking.result import Evaluation, write_metrics, write_model, write_retriever
from hanorec.ranking.sampler import NegativeSampler, Seen
from hanorec.run.checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint
from hanorec.run.log import append_log
from hanorec.run.record import all_settings, open_run, write_run


class RankingRun:
    """A run in its folder, new or gone on with.

    Args:
        files: what it is trained on, and where the run goes.
        config: settings, among them seed, batch, epochs and patience.
    """

    def __init__(self, files: BrmrsFiles, config: Any) -> None:
        self.files, self.config = files, config
        self.device = usable_device(files.device)
        join(self.device)
        self.out = open_run(files.out, all_settings([files, config]), "metrics.json")
        self.data = run_data(files, self.out)
        self.users, self.items = self.data.train.to(self.device)  # (E,) each
        torch.manual_seed(config.seed)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)

    def epochs(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, sampler: NegativeSampler
    ) -> Iterator[int]:
        """The epochs still to be done, from 1, until `patience` of them bring nothing better.

        Goes on from the newest checkpoint. model: its `propagate` gives the `Embeddings`.
        """
        self.model, self.optimizer = model, optimizer
        self.weights = dict(model.named_parameters())
        self.best = BestEpoch(self.weights)
        self._prepare_evaluation(sampler)
        self._write_record()
        # Weights, best weights, Adam's moments, the generator's state, the log's length.
        tensors = [*self.weights.values(), *self.best.weights.values()]
        random = {"loop": self.generator}
        self.epoch, facts = load_checkpoint(self.out, tensors, optimizer, random)
        self.best.go_on(facts)

        most, patience = self.config.epochs, self.config.patience
        bar = tqdm(total=most, initial=self.epoch, desc="epochs", disable=None)
        while self.epoch < most and self.epoch - self.best.epoch < patience:
            self.epoch += 1
            self.means: Counter[str] = Counter()
            yield self.epoch
            # Safe here: the loop asks for the next epoch once it has done all of this one. If it
            # failed on the way, it never comes back, and nothing of the epoch is kept.
            self._validate()
            facts = self.best.facts
            save_checkpoint(self.out, self.epoch, tensors, optimizer, random, **facts)
            bar.update()
            shown = {f"valid Recall@{AT}": f"{self.recall:.4f}", "best": f"{self.best.score:.4f}"}
            bar.set_postfix(shown)
        bar.close()

    def batches(self) -> Iterator[tuple[Tensor, slice, float]]:
        """The steps of an epoch, each as (places of its train pairs, this rank's part, its weight).

        Several processes divide the triples; tables, graphs and draws are the same in all of them.
        One without a triple computes the first at weight 0.
        """
        order = torch.randperm(len(self.users), generator=self.generator, device=self.device)
        for batch in order.split(self.config.batch):
            part = share(len(batch))
            weight = (part.stop - part.start) / len(batch)
            yield batch, part if weight else slice(0, 1), weight

    def update(self, batch: Tensor, weight: float, **means: float) -> None:
        """The optimizer's step with the gradients of all ranks.

        batch, weight: of `batches`. means: over this rank's part, the loss first, for the log.
        InputError before anything is updated, if the loss is not finite.
        """
        values = sum_gradients(
            list(self.weights.values()), *(weight * value for value in means.values())
        )
        if not math.isfinite(values[0]):
            raise InputError(
                f"epoch {self.epoch}: loss {values[0]}, expected a finite number; the last "
                "checkpoint stands: lower --learning-rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, value in zip(means, values, strict=True):
            self.means[name] += value * len(batch) / len(self.users)

    def finish(self) -> None:
        """Evaluate the best epoch, on test for the first time, and write the result."""
        self.model.load_state_dict(self.best.weights)
        with torch.no_grad():
            emb = self.model.propagate()
        valid, test = self._evaluate(emb, "valid"), self._evaluate(emb, "test")
        if rank() == 0:
            write_model(self.out, self.best, self.config)
            write_retriever(self.out, self.data, emb)
            write_metrics(self.out, self.data, self.epoch, self.best.epoch, valid, test)
        drop_checkpoints(self.out)
        unlock_folder(self.out)
        names = ("Recall@10", "Recall@20", "NDCG@10", "NDCG@20")
        shown = ", ".join(f"{name} {test[0][name]:.4f}" for name in names)
        print(
            f"best epoch {self.best.epoch} of {self.epoch}; test: {shown}; "
            f"wrote {self.out / 'metrics.json'}"
        )

    def _prepare_evaluation(self, sampler: NegativeSampler) -> None:
        self.seen = Seen(self.users, self.items, len(self.data.users))
        # One negative for each held-out pair, the same in every epoch: branch margins are measured
        # against it.
        self.held_out = {}
        for split in ("valid", "test"):
            pairs = getattr(self.data, split).to(self.device)  # (2, T)
            self.held_out[split] = pairs, sampler.fixed(pairs[0])

    def _evaluate(self, emb: Embeddings, split: str) -> Evaluation:
        pairs, negatives = self.held_out[split]
        return evaluate(emb, pairs, self.seen, negatives)

    def _validate(self) -> None:
        """Log the epoch, and keep it if it is the best so far."""
        with torch.no_grad():
            emb = self.model.propagate()
        report, _, _ = self._evaluate(emb, "valid")
        self.recall = report[f"Recall@{AT}"]
        self.best.offer(self.epoch, self.recall, self.weights)
        valid = {f"valid_{name}": value for name, value in report.items()}
        append_log(self.out / "log.jsonl", {"epoch": self.epoch, **self.means, **valid})

    def _write_record(self) -> None:
        """Not before all input has proved good."""
        facts = {
            "users": len(self.data.users),
            "items": len(self.data.items),
            "pairs": len(self.users),
            "weights": sum(weight.numel() for weight in self.weights.values()),
        }
        inputs = {"data": self.data.sha256()}
        write_run(self.out, [self.files, self.config], inputs, **facts)
        keep_data(self.files, self.out, self.data)


def means_of(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each term, in one message from the GPU."""
    values = torch.stack([term.detach().mean() for term in terms.values()])
    return dict(zip(terms, values.tolist(), strict=True))
