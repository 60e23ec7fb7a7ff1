"""One run of a recommender that learns to rank the catalogue: what stands around its loop.

Folder, data, validation, result; what its epochs share with other runs: `Epochs`. `RankingRun`
never sees how a loss is made: sampling, scores, losses and `backward` stay in the script, where
they are read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hanorec.base.config_brmrs import BrmrsFiles
from hanorec.base.distributed import join, rank, share, sum_gradients, usable_device
from hanorec.base.lock import unlock_folder
from hanorec.ranking.full_ranking import AT, evaluate
from hanorec.ranking.pairs import keep_data, run_data
from hanorec.ranking.result import Evaluation, write_metrics, write_model, write_retriever
from hanorec.ranking.sampler import NegativeSampler, Seen
from hanorec.run.checkpoint import drop_checkpoints
from hanorec.run.epochs import Epochs
from hanorec.run.record import all_settings, open_run, write_run

METRIC = f"Recall@{AT}"  # of the best epoch


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
        self.loop = Epochs(self.out, config, self.device, METRIC)
        self.generator = self.loop.generator

    def epochs(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, sampler: NegativeSampler
    ) -> Iterator[int]:
        """The epochs still to be done of a `hanorec.brmrs.model.BRMRS`, see `Epochs.still_to_do`.
        """
        self.model = model
        self.weights = list(model.parameters())
        self._prepare_evaluation(sampler)
        self._write_record()
        yield from self.loop.still_to_do(model, optimizer, lambda: self._evaluate("valid")[0])

    def batches(self) -> Iterator[tuple[Tensor, slice, float]]:
        """The steps of an epoch, each as (places of its train pairs, this rank's part, its weight).

        Several processes divide the triples; tables, graphs and draws are the same in all of them.
        One without a triple computes the first at weight 0.
        """
        for batch in self.loop.batches(len(self.users)):
            part = share(len(batch))
            weight = (part.stop - part.start) / len(batch)
            yield batch, part if weight else slice(0, 1), weight

    def update(self, batch: Tensor, weight: float, **means: float) -> None:
        """The optimizer's step with the gradients of all ranks, see `Epochs.update`.

        batch, weight: of `batches`. means: over this rank's part, the loss first, for the log.
        """
        values = sum_gradients(self.weights, *(weight * value for value in means.values()))
        self.loop.update(len(batch) / len(self.users), **dict(zip(means, values, strict=True)))

    def finish(self) -> None:
        """Evaluate the best epoch, on test for the first time, and write the result."""
        self.loop.use_best()
        valid, test = self._evaluate("valid"), self._evaluate("test")
        best, epochs = self.loop.best, self.loop.epoch
        if rank() == 0:
            write_model(self.out, best, METRIC, self.config)
            self._write_retriever()
            write_metrics(self.out, self.data.users, epochs, best.epoch, valid, test)
        drop_checkpoints(self.out)
        unlock_folder(self.out)
        names = ("Recall@10", "Recall@20", "NDCG@10", "NDCG@20")
        shown = ", ".join(f"{name} {test[0][name]:.4f}" for name in names)
        print(
            f"best epoch {best.epoch} of {epochs}; test: {shown}; "
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

    @torch.no_grad()
    def _evaluate(self, split: str) -> Evaluation:
        pairs, negatives = self.held_out[split]
        return evaluate(self.model.propagate(), pairs, self.seen, negatives)

    def _write_retriever(self) -> None:
        """Names, fused embeddings and pairs, of the model as it is."""
        with torch.no_grad():
            emb = self.model.propagate()
        tensors = {"user": emb.user["f"], "item": emb.item["f"], "train": self.data.train}
        names = {"users": self.data.users, "items": self.data.items}
        write_retriever(self.out, tensors, **names, hold_out=self.files.hold_out)

    def _write_record(self) -> None:
        """Not before all input has proved good."""
        facts = {
            "users": len(self.data.users),
            "items": len(self.data.items),
            "pairs": len(self.users),
            "weights": sum(weight.numel() for weight in self.weights),
        }
        inputs = {"data": self.data.sha256()}
        write_run(self.out, [self.files, self.config], inputs, **facts)
        keep_data(self.files, self.out, self.data)


def means_of(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each term, in one message from the GPU."""
    values = torch.stack([term.detach().mean() for term in terms.values()])
    return dict(zip(terms, values.tolist(), strict=True))
