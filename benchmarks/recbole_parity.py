r"""What RecBole 1.2.1 computes with given weights, frozen for tests/test_recbole_parity.py.

    python benchmarks/recbole_parity.py tests/fixtures/recbole.safetensors

RecBole cannot share hanorec's environment; this file needs only its own (Python 3.11):

    pip install "torch==2.13.0" "numpy<2" "scipy<1.13" "pandas<2.3" "setuptools<81" \
        recbole==1.2.1 safetensors

Of each model: all weights under RecBole's names, scores, the loss, and the gradient of the table of
items. Weights are drawn twenty times as large as RecBole's first ones (0.02), biases and
norms too: else attention is uniform, and an error in it would not show. RecBole counts ids from 1,
and 0 is padding. A sequence model sees one row a prefix, as it trains.
"""

import argparse

import numpy as np
import scipy.sparse
import torch
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import BPR, LightGCN
from recbole.model.sequential_recommender import BERT4Rec, Caser, GRU4Rec, SASRec
from safetensors.torch import save_file

USERS, ITEMS, LENGTH, WIDTH, STD = 3, 7, 5, 6, 0.4
# The items of each user, the last one a target alone; the second is a repeat.
SEQUENCES = [[1, 2, 3, 4, 5, 6], [7, 7, 2, 5], [3, 1]]
MASKED_PLACES = [[0, 3], [1, 2], [1]]  # of BERT4Rec, from 0
TRIPLES = [[1, 2, 3, 1], [4, 7, 1, 6], [7, 3, 2, 7]]  # users, items, negatives

SETTINGS = {
    "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "NEG_PREFIX": "neg_", "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "length", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": "cpu",
    "loss_type": "CE", "embedding_size": WIDTH, "hidden_size": WIDTH, "inner_size": 4 * WIDTH,
    "n_layers": 2, "n_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0,
    "initializer_range": 0.02, "num_layers": 1, "nh": 3, "nv": 2, "reg_weight": 0.0,
    "mask_ratio": 0.4, "MASK_ITEM_SEQ": "masked", "POS_ITEMS": "positives",
    "NEG_ITEMS": "negatives", "MASK_INDEX": "places", "require_pow": False,
}
OWN = {"GRU4Rec": {"hidden_size": 10}, "LightGCN": {"reg_weight": 0.1}}


class Data:
    """As much of a RecBole dataset as a model asks for."""

    user_num = USERS + 1

    def num(self, field):
        return {"user": USERS, "item": ITEMS}[field] + 1

    def inter_matrix(self, form):
        users = np.repeat(np.arange(1, USERS + 1), [len(row) for row in SEQUENCES])
        items = np.concatenate(SEQUENCES)
        pairs = np.unique(np.stack([users, items], 1), axis=0)
        shape = USERS + 1, ITEMS + 1
        return scipy.sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape)


def padded(rows, width=LENGTH):
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def prefixes():
    """Every step as RecBole has it: a history and the item after it."""
    owners, histories, targets = [], [], []
    for user, row in enumerate(SEQUENCES, 1):
        for cut in range(1, len(row)):
            owners.append(user)
            histories.append(row[:cut])
            targets.append(row[cut])
    return Interaction({
        "user": torch.tensor(owners), "item_list": padded(histories),
        "length": torch.tensor([len(row) for row in histories]), "item": torch.tensor(targets),
    })


def hidden():
    """BERT4Rec's training rows: the inputs, masked; where, padded by 0 on the left; what."""
    rows = [row[:LENGTH] for row in SEQUENCES]
    masked, places, items = padded(rows), [], []
    for number, at in enumerate(MASKED_PLACES):
        masked[number, at] = ITEMS + 1
        missing = [0] * (2 - len(at))
        places.append(missing + at)
        items.append(missing + [rows[number][place] for place in at])
    items = torch.tensor(items)
    return Interaction({
        "masked": masked, "places": torch.tensor(places), "positives": items, "negatives": items,
    })


def triples():
    users, items, negatives = map(torch.tensor, TRIPLES)
    return Interaction({"user": users, "item": items, "neg_item": negatives})


def outputs(model):
    """What is compared beside the loss: name -> tensor."""
    if isinstance(model, LightGCN):
        users, items = model.forward()
        return {"users": users, "items": items}
    if isinstance(model, BPR):
        return {}  # its scores are in its loss
    scores = {"scores": model.full_sort_predict(prefixes())}
    if isinstance(model, BERT4Rec):
        return scores | {"states": model.forward(hidden()["masked"])}
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out")
    out = parser.parse_args().out
    torch.manual_seed(0)
    frozen = {"sequences": padded(SEQUENCES, LENGTH + 1), "triples": torch.tensor(TRIPLES)}
    frozen |= {key: hidden()[key] for key in ("masked", "places", "positives")}
    for kind in (SASRec, GRU4Rec, Caser, BERT4Rec, LightGCN, BPR):
        name = kind.__name__
        model = kind(SETTINGS | OWN.get(name, {}), Data()).eval()
        for key, weight in model.named_parameters():
            norm = "norm" in key.lower() or "_ln" in key
            torch.nn.init.normal_(weight, float(norm and key.endswith("weight")), STD)
            frozen[f"{name}/weight/{key}"] = weight.detach().clone()
        batches = {BERT4Rec: hidden, LightGCN: triples, BPR: triples}
        loss = model.calculate_loss(batches.get(kind, prefixes)())
        loss.backward()
        frozen[f"{name}/loss"] = loss
        frozen[f"{name}/gradient"] = model.item_embedding.weight.grad
        for key, value in outputs(model).items():
            frozen[f"{name}/{key}"] = value
    save_file({key: value.detach().contiguous() for key, value in frozen.items()}, out)
    print(f"{len(frozen)} arrays in {out}")


if __name__ == "__main__":
    main()
