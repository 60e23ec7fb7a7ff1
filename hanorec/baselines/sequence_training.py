"""SASRec, GRU4Rec, Caser, BERT4Rec and CL4SRec, trained on each user's items in their order.

    python -m hanorec.baselines.sequence_training --data DATA --out OUT --method sasrec

DATA: a folder in the native layout. A batch is users, each with its last items of train.tsv and a
loss at all of their positions. What OUT receives: `hanorec.baselines.vector_run`. The best epoch is
the one with the highest NDCG@10 on validation, in the ranking of all items. The same command again
goes on with a stopped run from its last checkpoint, and ends as if it had never been stopped.
"""

from collections.abc import Sequence
from functools import partial

from hanorec.base import command
from hanorec.base.settings import parse
from hanorec.baselines.config import SequenceConfig, VectorFiles

KINDS = [VectorFiles, SequenceConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__)  # --help needs no torch

import torch
from torch import nn

from hanorec.base.errors import InputError
from hanorec.baselines.cl4srec import CL4SRec
from hanorec.baselines.encoders import BERT4Rec, Caser, GRU4Rec
from hanorec.baselines.sequential import SASRec
from hanorec.baselines.vector_run import VectorRun
from hanorec.baselines.vectors import padded, sequence_vectors
from hanorec.datasets.interactions import Interactions, Rows
from hanorec.ranking.sampler import NegativeSampler


def main(argv: Sequence[str] | None = None) -> None:
    train(*parse(KINDS, argv, __doc__))


def train(files: VectorFiles, config: SequenceConfig) -> None:
    run = VectorRun(files, config, config.history or config.length)
    rows, sequences = training_sequences(run.learnt, config)
    users = torch.tensor(rows, device=run.device)
    model = new_model(config, run.n_users, run.n_items).to(run.device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    sampler = NegativeSampler(run.users, run.items, run.n_users, run.n_items)

    vectors = partial(sequence_vectors, model, config.batch)
    pairs = sum(len(items) - 1 for items in sequences)  # the first item is no target
    for _ in run.epochs(model, optimizer, vectors, pairs):
        for batch in run.batches(len(users)):
            items = padded([sequences[n] for n in batch.tolist()], run.n_items)  # (B, <= L + 1)
            loss = model.loss(users[batch], items.to(run.device), sampler, run.generator)  # ()
            loss.backward()
            run.update(len(batch) / len(users), loss=loss.item())
    run.finish()


def new_model(config: SequenceConfig, n_users: int, n_items: int) -> nn.Module:
    """The model that `--method` names, with its own ones of the settings."""
    length, d, dropout = config.length, config.dim, config.dropout
    attention = n_items, length, d, config.blocks, config.heads, dropout
    if config.method == "gru4rec":
        return GRU4Rec(n_items, d, config.hidden, dropout)
    if config.method == "caser":
        filters = config.horizontal, config.vertical
        return Caser(n_items, n_users, length, d, *filters, dropout)
    if config.method == "bert4rec":
        return BERT4Rec(*attention, config.mask)
    if config.method == "cl4srec":
        return CL4SRec(
            *attention, config.norm, config.loss, lam=config.contrast, tau=config.temperature,
            eta=config.crop, gamma=config.hide, beta=config.reorder,
        )
    return SASRec(*attention, config.norm, config.loss)


def training_sequences(
    data: Interactions, config: SequenceConfig
) -> tuple[list[int], list[Rows]]:
    """What is trained on: users, as numbers of their lines in train.tsv, and their last items.

    Those are L inputs and the target of the last of them; of Caser, whose windows slide, all. A
    user with a single item has nothing to predict. InputError: no user has two.
    """
    most = None if config.method == "caser" else config.length + 1
    users, sequences = [], []
    for row, items in enumerate(data.train.values()):
        if len(items) > 1:
            users.append(row)
            sequences.append(items[-most:] if most else items)
    alone = len(data.train) - len(users)
    if not users:
        raise InputError(
            f"train.tsv: {alone} users with a single item each, expected some with two, an input "
            "and a target; train on more data"
        )
    if alone:
        print(
            f"note: {alone} of {len(data.train)} users have a single training item, so none to "
            "predict; no sequence model is trained on them"
        )
    return users, sequences
