"""BPR-MF and LightGCN, trained on pairs (LG-1, LG-2).

    python -m hanorec.baselines.matrix_training --data DATA --out OUT               LightGCN
    python -m hanorec.baselines.matrix_training --data DATA --out OUT --layers 0    BPR-MF

DATA: a folder in the native layout; its pairs are drawn uniformly, so a user with many counts as
often. What OUT receives: `hanorec.baselines.vector_run`. The best epoch is the one with the highest
NDCG@10 on validation, in the ranking of all items. The same command again goes on with a stopped
run from its last checkpoint, and ends as if it had never been stopped.
"""

from collections.abc import Sequence
from functools import partial

from hanorec.base import command
from hanorec.base.settings import parse
from hanorec.baselines.config import MatrixConfig, VectorFiles

KINDS = [VectorFiles, MatrixConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__)  # --help needs no torch

import torch

from hanorec.baselines.matrix import MatrixModel
from hanorec.baselines.vector_run import VectorRun
from hanorec.baselines.vectors import matrix_vectors
from hanorec.brmrs.graph import interaction_graph
from hanorec.ranking.sampler import NegativeSampler


def main(argv: Sequence[str] | None = None) -> None:
    train(*parse(KINDS, argv, __doc__))


def train(files: VectorFiles, config: MatrixConfig) -> None:
    run = VectorRun(files, config)
    users, items = run.users, run.items  # (E,) each: the train pairs
    sizes = run.n_users, run.n_items
    graph = interaction_graph(users, items, *sizes)
    model = MatrixModel(*sizes, graph, config.layers, config.dim, config.weight_decay)
    model.to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    sampler = NegativeSampler(users, items, *sizes)

    for _ in run.epochs(model, optimizer, partial(matrix_vectors, model), len(users)):
        for batch in run.batches(len(users)):
            u, i = users[batch], items[batch]  # (B,) each
            j = sampler.draw(u, 1, run.generator)[:, 0]  # (B,), by BR-1
            loss = model.loss(u, i, j)  # (), LG-2
            loss.backward()
            run.update(len(batch) / len(users), loss=loss.item())
    run.finish()
