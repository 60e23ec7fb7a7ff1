"""One run of a recommender whose scores are inner products: what stands around its loop.

Folder, data, validation by full ranking, result; what its epochs share with other runs:
`hanorec.run.epochs.Epochs`. Losses and `backward` stay in the loops, `matrix_training` and
`sequence_training`, where they are read.

    OUT/log.jsonl, run.json                        a line an epoch; settings, hash of the data
    OUT/model.safetensors, model.json              the best epoch's weights
    OUT/val, OUT/test                              states of held-out items, for
                                                   `hanorec.ranking.retriever`; with --hold-out N
    OUT/train                                      of each user's last N training items, too
    OUT/metrics.json                               full ranking; written last: the run is finished
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hanorec.base.distributed import join, usable_device, world_size
from hanorec.base.errors import InputError
from hanorec.base.lock import unlock_folder
from hanorec.baselines.config import VectorFiles
from hanorec.baselines.vectors import Targets, Vectors, evaluate, load_targets, write_vectors
from hanorec.datasets.catalog import data_hash, load_catalog
from hanorec.datasets.interactions import load_interactions, without_last
from hanorec.ranking.result import write_metrics, write_model
from hanorec.run.checkpoint import drop_checkpoints
from hanorec.run.epochs import Epochs
from hanorec.run.record import all_settings, open_run, write_run

METRIC = "NDCG@10"  # of the best epoch


class VectorRun:
    """A run in its folder, new or gone on with.

    `batches` and `update` are those of `Epochs`.

    Args:
        config: settings, among them seed, batch, epochs, patience and every.
        length: L, from how many items a state is made.
    """

    def __init__(self, files: VectorFiles, config: Any, length: int = 1) -> None:
        self.files, self.config = files, config
        self.device = usable_device(files.device)
        join(self.device)
        if world_size() > 1:
            raise InputError(
                f"{world_size()} processes, expected one, which trains these recommenders; start "
                "the command without torchrun"
            )
        self.out = open_run(files.out, all_settings([files, config]), "metrics.json")
        self.catalog = load_catalog(files.data)
        self.data = load_interactions(files.data, self.catalog)
        self.n_users, self.n_items = len(self.data.train), len(self.catalog.ids)
        self.learnt = without_last(self.data, files.hold_out)
        self.users, self.items = self._train_pairs()  # (E,) each, every pair once
        self.targets = {}
        for split in ("val", "test"):
            self.targets[split] = load_targets(
                self.data, self.n_items, split, length, self.device
            )
        if files.hold_out:
            left_out = load_targets(self.learnt, self.n_items, "val", length, self.device)
            self.targets["train"] = replace(left_out, split="train")
        self.loop = Epochs(self.out, config, self.device, METRIC, config.every)
        self.batches, self.update = self.loop.batches, self.loop.update
        self.generator = self.loop.generator

    def epochs(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        vectors: Callable[[Targets], Vectors],
        pairs: int,
    ) -> Iterator[int]:
        """The epochs still to be done, see `Epochs.still_to_do`.

        vectors: of the model as it is. pairs: user and item, that an epoch has as targets.
        """
        self.vectors = vectors
        facts = {
            "users": self.n_users,
            "items": self.n_items,
            "pairs": pairs,
            "weights": sum(weight.numel() for weight in model.parameters()),
            "untrained_targets": {split: self._untrained(split) for split in self.targets},
        }
        inputs = {"data": data_hash(self.catalog)}
        write_run(self.out, [self.files, self.config], inputs, **facts)
        val = self.targets["val"]
        yield from self.loop.still_to_do(model, optimizer, lambda: evaluate(vectors(val), val)[0])

    def finish(self) -> None:
        """Evaluate the best epoch, on test for the first time, and write the result."""
        self.loop.use_best()
        found = {}
        for split, targets in self.targets.items():
            vectors = self.vectors(targets)
            found[split] = evaluate(vectors, targets)
            hold_out = self.files.hold_out
            write_vectors(self.out / split, vectors, targets, self.catalog, hold_out)
        best, epochs = self.loop.best, self.loop.epoch
        write_model(self.out, best, METRIC, self.config)
        names = [example.user for example in self.targets["test"].examples]
        write_metrics(self.out, names, epochs, best.epoch, found["val"], found["test"])
        drop_checkpoints(self.out)
        unlock_folder(self.out)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found["test"][0].items())
        print(
            f"best epoch {best.epoch} of {epochs}; test: {shown}; "
            f"wrote {self.out / 'metrics.json'}"
        )

    def _train_pairs(self) -> Tensor:
        """(2, E), each pair once. InputError for a user who has every item."""
        every = []
        for row, (user, items) in enumerate(self.learnt.train.items()):
            own = dict.fromkeys(items)
            if len(own) == self.n_items:
                raise InputError(
                    f"{self.files.data}/train.tsv: user {user!r} has all {self.n_items} items, "
                    "expected at least one that can be a negative; leave that user out"
                )
            every += [(row, item) for item in own]
        repeats = sum(map(len, self.learnt.train.values())) - len(every)
        if repeats:
            print(f"note: {repeats} train pairs repeat; as a pair each counts once")
        return torch.tensor(every, device=self.device).T

    def _untrained(self, split: str) -> float:
        """The share of targets that are items without a training pair, printed if above 0."""
        trained = set(self.items.tolist())
        examples = self.targets[split].examples
        n = sum(example.target not in trained for example in examples)
        if n:
            print(
                f"note: {n} of {len(examples)} targets of the {split} split are items without a "
                "training pair, which are learnt as negatives at most"
            )
        return n / len(examples)
