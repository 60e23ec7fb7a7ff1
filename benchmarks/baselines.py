r"""LightGCN and SASRec beside RecBole 1.2.1's: forward and backward on equal tensors, and an epoch.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/baselines.py [--rounds N] [--epoch]

RecBole cannot share hanorec's environment. This file needs only RecBole's (Python 3.11), where the
equations of the baselines load, too:

    pip install "torch==2.13.0" "numpy<2" "scipy<1.13" "pandas<2.3" "setuptools<81" recbole==1.2.1

CPU time of one thread, medians of rounds in which both sides take turns. Weights are copied and the
losses without dropout compared before anything is timed. LightGCN: 2,048 triples over the graph of
6,040 x 3,706 nodes and about 1,000,000 pairs of MovieLens-1M's shape, 3 layers, d 64. SASRec: 128
sequences of 200 items, d 64, 2 blocks, 2 heads, RecBole's form ("post"), dropout 0.5.

An epoch (--epoch, minutes): hanorec trains each user's sequence at all of its positions at once,
RecBole a prefix at a time; its epoch is its step times its number of steps.
"""

import argparse
import time
from functools import partial

import numpy as np
import scipy.sparse
import torch
from measure import agree, interleaved, version
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import LightGCN
from recbole.model.sequential_recommender import SASRec as RecBoleSASRec
from torch import Tensor

from hanorec.baselines.matrix import MatrixModel
from hanorec.baselines.sequential import SASRec, last, step_ce
from hanorec.brmrs.graph import interaction_graph
from hanorec.ranking.sampler import NegativeSampler

USERS, ITEMS, EACH = 6040, 3706, 166  # of MovieLens-1M; items a user
D, LAYERS, BATCH, DECAY = 64, 3, 2048, 1e-4
LENGTH, SEQUENCES, HEADS, BLOCKS, DROPOUT = 200, 128, 2, 2, 0.5

SETTINGS = {
    "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "NEG_PREFIX": "neg_", "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "length", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": "cpu",
    "loss_type": "CE", "embedding_size": D, "hidden_size": D, "inner_size": 4 * D,
    "n_heads": HEADS, "hidden_act": "gelu", "layer_norm_eps": 1e-8,
    "hidden_dropout_prob": DROPOUT, "attn_dropout_prob": DROPOUT, "initializer_range": 0.02,
    "reg_weight": DECAY, "require_pow": True,  # the squared norm, halved, as in LG-2
}


class Data:
    """As much of a RecBole dataset as a model asks for; ids count from 1, 0 is padding."""

    def __init__(self, users: Tensor, items: Tensor) -> None:
        self.users, self.items = users.numpy() + 1, items.numpy() + 1

    def num(self, field: str) -> int:
        return {"user": USERS, "item": ITEMS}[field] + 1

    def inter_matrix(self, form: str) -> scipy.sparse.coo_matrix:
        ones = np.ones(len(self.users))
        return scipy.sparse.coo_matrix((ones, (self.users, self.items)), (USERS + 1, ITEMS + 1))


def interactions() -> tuple[Tensor, Tensor]:
    """Distinct pairs (E,), in each user's order; items by a power law, as in real logs."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(10, ITEMS + 10) ** 0.7
    popularity /= popularity.sum()
    rows = [rng.choice(ITEMS, EACH, replace=False, p=popularity) for _ in range(USERS)]
    return torch.arange(USERS).repeat_interleave(EACH), torch.from_numpy(np.concatenate(rows))


def report(name: str, seconds: dict[str, float]) -> None:
    ours, theirs = seconds["ours"], seconds["theirs"]
    print(
        f"{name}: hanorec {1e3 * ours:.1f} ms, RecBole {1e3 * theirs:.1f} ms, "
        f"ratio {ours / theirs:.2f}", flush=True
    )


# ---- LightGCN ----


def lightgcn(users: Tensor, items: Tensor, rounds: int, epoch: bool) -> None:
    graph = interaction_graph(users, items, USERS, ITEMS)
    model = MatrixModel(USERS, ITEMS, graph, LAYERS, D, DECAY)
    peer = LightGCN(SETTINGS | {"n_layers": LAYERS}, Data(users, items))
    with torch.no_grad():
        peer.user_embedding.weight[1:] = model.x[:USERS]
        peer.item_embedding.weight[1:] = model.x[USERS:]
    sampler = NegativeSampler(users, items, USERS, ITEMS)
    pairs = torch.randperm(len(users))[:BATCH]
    u, i = users[pairs], items[pairs]
    j = sampler.draw(u, 1)[:, 0]
    triple = Interaction({"user": u + 1, "item": i + 1, "neg_item": j + 1})

    def ours() -> None:
        model.zero_grad()
        model.loss(u, i, j).backward()

    def theirs() -> None:
        peer.zero_grad()
        peer.calculate_loss(triple).backward()

    ours()
    theirs()
    agree("LightGCN, loss", model.loss(u, i, j)[None], peer.calculate_loss(triple), 1e-5)
    agree("LightGCN, gradient", model.x.grad[:USERS], peer.user_embedding.weight.grad[1:], 1e-4)
    report("LightGCN, a step", interleaved({"ours": ours, "theirs": theirs}, rounds, "cpu"))
    if epoch:
        start, order = time.process_time(), torch.randperm(len(users)).split(BATCH)
        optimizer = torch.optim.Adam(model.parameters())
        for batch in order:
            u, i = users[batch], items[batch]
            j = sampler.draw(u, 1)[:, 0]
            ours()
            optimizer.step()
        print(f"LightGCN, an epoch of {len(order)} steps: {time.process_time() - start:.0f} s")


# ---- SASRec ----


def copied(peer: RecBoleSASRec, model: SASRec) -> None:
    """RecBole's weights in ours."""
    encoder = model.encoder
    with torch.no_grad():
        encoder.items.weight[:ITEMS] = peer.item_embedding.weight[1:]
        encoder.positions.copy_(peer.position_embedding.weight)
    encoder.norm.load_state_dict(peer.LayerNorm.state_dict())
    for block, layer in zip(encoder.blocks, peer.trm_encoder.layer, strict=True):
        attention, feed_forward = layer.multi_head_attention, layer.feed_forward
        parts = {
            block.q: attention.query, block.k: attention.key, block.v: attention.value,
            block.out: attention.dense, block.norms[0]: attention.LayerNorm,
            block.up: feed_forward.dense_1, block.down: feed_forward.dense_2,
            block.norms[1]: feed_forward.LayerNorm,
        }
        for own, other in parts.items():
            own.load_state_dict(other.state_dict())


def last_step_loss(
    model: SASRec, sequences: Tensor, targets: Tensor, generator: torch.Generator | None
) -> Tensor:
    """What RecBole trains: the item after the last one."""
    states = last(model.encode(sequences, generator), sequences, ITEMS)
    return step_ce(states, model.item_rows(), targets)


def sasrec(users: Tensor, items: Tensor, rounds: int, epoch: bool) -> None:
    peer = RecBoleSASRec(SETTINGS | {"n_layers": BLOCKS}, Data(users, items))
    for weight in peer.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # else attention is uniform and hides errors
    sequences = torch.randint(ITEMS, (SEQUENCES, LENGTH + 1))
    inputs, targets = sequences[:, :-1], sequences[:, -1]
    rows = Interaction({
        "item_list": inputs + 1, "length": torch.full((SEQUENCES,), LENGTH), "item": targets + 1,
    })
    generator = torch.Generator().manual_seed(0)
    models = {
        norm: SASRec(ITEMS, LENGTH, D, BLOCKS, HEADS, DROPOUT, norm) for norm in ("post", "pre")
    }
    copied(peer, models["post"])
    peer.eval()
    with torch.no_grad():
        state = models["post"].state(targets, inputs)
        agree("SASRec, states", state, peer.forward(inputs + 1, rows["length"]), 1e-4)
    peer.train()

    def step(norm: str) -> None:
        models[norm].zero_grad()
        last_step_loss(models[norm], inputs, targets, generator).backward()

    def theirs() -> None:
        peer.zero_grad()
        peer.calculate_loss(rows).backward()

    def all_steps() -> None:
        models["pre"].zero_grad()
        models["pre"].loss(targets, sequences, None, generator).backward()

    sides = {"ours": partial(step, "post"), "pre": partial(step, "pre"), "theirs": theirs}
    seconds = interleaved(sides | {"all": all_steps}, rounds, "cpu")
    report("SASRec, the last position of each sequence", seconds)
    report("SASRec, the same, hanorec's default block", seconds | {"ours": seconds["pre"]})
    print(f"SASRec, all {LENGTH} positions, hanorec's training step: {1e3 * seconds['all']:.0f} ms")
    if epoch:
        model, rows = models["pre"], items.view(USERS, EACH)
        optimizer = torch.optim.Adam(model.parameters())
        start = time.process_time()
        for batch in torch.randperm(USERS).split(SEQUENCES):
            model.zero_grad()
            model.loss(batch, rows[batch], None, generator).backward()
            optimizer.step()
        spent = time.process_time() - start
        steps = USERS * (EACH - 1) // SEQUENCES
        print(
            f"SASRec, an epoch: hanorec {spent:.0f} s; RecBole {steps} steps, one a prefix, of "
            f"{LENGTH} positions each: {steps * seconds['theirs']:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epoch", action="store_true", help="time a whole epoch, too")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, recbole {version('recbole')}, one CPU thread\n")
    pairs = interactions()
    lightgcn(*pairs, flags.rounds, flags.epoch)
    sasrec(*pairs, flags.rounds, flags.epoch)


if __name__ == "__main__":
    main()
