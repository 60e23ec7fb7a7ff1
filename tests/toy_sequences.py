"""Small sequence models with large weights, for the tests of the baselines."""

import torch

from hanorec.baselines.cl4srec import CL4SRec
from hanorec.baselines.encoders import BERT4Rec, Caser, GRU4Rec
from hanorec.baselines.sequential import SASRec
from hanorec.ranking.sampler import NegativeSampler

N, U, L, D = 9, 4, 6, 4
PAD, MASK = N, N + 1
CONTRAST = {"lam": 0.5, "tau": 1.0, "eta": 0.6, "gamma": 0.3, "beta": 0.6}
KINDS = ["SASRec", "CL4SRec", "GRU4Rec", "Caser", "BERT4Rec"]


def make(kind, n_items=N, n_users=U, d=D, dropout=0.0, std=0.4, **options):
    """A model in float64. std: of all its weights, large enough for attention to choose; None
    leaves those that a fresh model has.
    """
    torch.manual_seed(0)
    attention = n_items, L, d, 2, 2, dropout
    made = {
        "SASRec": lambda: SASRec(*attention, **options),
        "CL4SRec": lambda: CL4SRec(*attention, **CONTRAST | options),
        "GRU4Rec": lambda: GRU4Rec(n_items, d, 2 * d, dropout),
        "Caser": lambda: Caser(n_items, n_users, 4, d, 3, 2, dropout),
        "BERT4Rec": lambda: BERT4Rec(*attention, options.get("mask", 0.4)),
    }
    model = made[kind]().double()
    if std is not None:
        for name, weight in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            torch.nn.init.normal_(weight, float(norm), std)
    return model


def numpy(model):
    """Name -> float64 array of each weight."""
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def padded(*rows, width=None):
    """(B, T) int64, padded on the right."""
    width = width or max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


def sampler(n_items=N, n_users=U):
    """Of users who have item 0 alone, so that all others are drawn."""
    users = torch.arange(n_users)
    return NegativeSampler(users, torch.zeros_like(users), n_users, n_items)


def loss(model, sequences, seed=0, users=None):
    """A model's loss, with what it draws from a generator of this seed."""
    users = torch.arange(len(sequences)) if users is None else users
    generator = torch.Generator().manual_seed(seed)
    return model.loss(users, sequences, sampler(model.n_items), generator)
