"""RecBole 1.2.1 as a peer, by copied weights: its numbers stand in tests/fixtures, where
benchmarks/recbole_parity.py put them.

RecBole counts items and users from 1, and row 0 is padding; in each of its losses over all items
padding is a class.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from hanorec.baselines.encoders import BERT4Rec, Caser, GRU4Rec
from hanorec.baselines.sequential import SASRec, step_ce, steps
from hanorec.brmrs.graph import interaction_graph, lightgcn
from hanorec.brmrs.losses import bpr_loss

FROZEN = load_file(Path(__file__).parent / "fixtures" / "recbole.safetensors")
N, U, L, D = 7, 3, 5, 6
TOLERANCE = 1e-5

BLOCK = {
    "q": "multi_head_attention.query", "k": "multi_head_attention.key",
    "v": "multi_head_attention.value", "out": "multi_head_attention.dense",
    "norms.0": "multi_head_attention.LayerNorm", "up": "feed_forward.dense_1",
    "down": "feed_forward.dense_2", "norms.1": "feed_forward.LayerNorm",
}


def apart(a, b):
    """Largest difference, over the largest entry of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def frozen(name):
    """The weights of one of RecBole's models: its own name of each -> tensor."""
    start = f"{name}/weight/"
    return {key.removeprefix(start): w for key, w in FROZEN.items() if key.startswith(start)}


def our_rows(theirs):
    """Ids or rows: 1 .. N -> 0 .. N - 1, padding 0 -> N; a mask token N + 1 stays."""
    if theirs.dtype == torch.int64:
        return torch.where(theirs == 0, N, theirs - 1 + (theirs == N + 1))
    return torch.cat([theirs[1 : N + 1], theirs[:1], theirs[N + 1 :]])


def item_table(theirs):
    """(N + 2, d): our table; a mask token that RecBole lacks is 0."""
    rows = our_rows(theirs)
    return torch.cat([rows, rows.new_zeros(N + 2 - len(rows), rows.shape[1])])


def linear(ours, theirs):
    return {f"{ours}.{side}": f"{theirs}.{side}" for side in ("weight", "bias")}


def encoder_weights(w):
    """RecBole's transformer -> the weights of our `Encoder`."""
    names = linear("norm", "LayerNorm")
    for b in range(2):
        for ours, theirs in BLOCK.items():
            names |= linear(f"blocks.{b}.{ours}", f"trm_encoder.layer.{b}.{theirs}")
    found = {f"encoder.{ours}": w[theirs] for ours, theirs in names.items()}
    found["encoder.items.weight"] = item_table(w["item_embedding.weight"])
    return found | {"encoder.positions": w["position_embedding.weight"]}


def sasrec(w):
    model = SASRec(N, L, D, 2, 2, 0.0, norm="post")
    model.load_state_dict(encoder_weights(w))
    return model


def gru4rec(w):
    model = GRU4Rec(N, D, 10, 0.0)
    model.load_state_dict({
        "items.weight": item_table(w["item_embedding.weight"]),
        "gru.weight_ih_l0": w["gru_layers.weight_ih_l0"],
        "gru.weight_hh_l0": w["gru_layers.weight_hh_l0"],
        "map.weight": w["dense.weight"], "map.bias": w["dense.bias"],
    })
    return model


def caser(w):
    """Their filters (n, 1, height, d) are ours (n, d, height)."""
    model = Caser(N, U, L, D, 3, 2, 0.0)
    found = {
        "items.weight": item_table(w["item_embedding.weight"]),
        "users.weight": w["user_embedding.weight"][1:],
        "down.weight": w["conv_v.weight"][:, 0, :, 0], "down.bias": w["conv_v.bias"],
        "map_filters.weight": w["fc1.weight"], "map_filters.bias": w["fc1.bias"],
        "map_state.weight": w["fc2.weight"], "map_state.bias": w["fc2.bias"],
    }
    for h in range(L):
        found[f"across.{h}.weight"] = w[f"conv_h.{h}.weight"][:, 0].transpose(1, 2)
        found[f"across.{h}.bias"] = w[f"conv_h.{h}.bias"]
    model.load_state_dict(found)
    return model


def bert4rec(w):
    model = BERT4Rec(N, L - 1, D, 2, 2, 0.0, 0.2)  # its L counts the mask token, too
    found = encoder_weights(w) | {"bias": w["output_bias"][1:]}
    for name in ("weight", "bias"):
        found[f"map.{name}"] = w[f"output_ffn.{name}"]
        found[f"norm.{name}"] = w[f"output_ln.{name}"]
    model.load_state_dict(found)
    return model


def prefixes():
    """RecBole's training rows: users (9,), histories (9, L), targets (9,)."""
    inputs, targets = steps(our_rows(FROZEN["sequences"]), N)
    users, step = (targets != N).nonzero(as_tuple=True)
    place = torch.arange(L)
    return users, inputs[users].masked_fill(place > step[:, None], N), targets[users, step]


MODELS = {"SASRec": sasrec, "GRU4Rec": gru4rec, "Caser": caser, "BERT4Rec": bert4rec}


def table(model):
    """(N + 2, d), of any of the models."""
    return (model.items if hasattr(model, "items") else model.encoder.items).weight


def of_next_items(name, model):
    """Scores (9, N) and RecBole's loss, in which padding is one more class."""
    users, histories, targets = prefixes()
    states = model.state(users, histories)
    if name == "Caser":
        # RecBole has a relu behind the last map, which the paper's scores do not have.
        states = states.relu()
    return states @ model.item_rows().T, step_ce(states, table(model)[: N + 1], targets)


def of_hidden_items(model, padding_bias):
    """The same of BERT4Rec. RecBole puts the mask token in the place of the oldest item, however
    short a history is, and leaves out of its loss what is hidden at the first place.
    """
    users, histories, _ = prefixes()
    scores = model.state(users, histories[:, 1:]) @ model.item_rows().T
    masked, places = our_rows(FROZEN["masked"]), FROZEN["places"]
    rows, counted = torch.arange(U)[:, None], places > 0
    states = model.encode(masked)[rows, places][counted]  # (S, d + 1)
    padding = torch.cat([table(model)[N], padding_bias])[None]
    classes = torch.cat([model.item_rows(), padding])
    return scores, step_ce(states, classes, our_rows(FROZEN["positives"])[counted])


def differences(name, w):
    """How far our scores, loss and gradient with the weights w are from RecBole's."""
    model = MODELS[name](w)
    if name == "BERT4Rec":
        scores, loss = of_hidden_items(model, w["output_bias"][:1])
    else:
        scores, loss = of_next_items(name, model)
    loss.backward()
    gradient = our_rows(FROZEN[f"{name}/gradient"])
    return {
        "scores": apart(scores, FROZEN[f"{name}/scores"][:, 1:]),
        "loss": apart(loss, FROZEN[f"{name}/loss"]),
        "gradient": apart(table(model).grad[: len(gradient)], gradient),
    }


@pytest.mark.parametrize("name", MODELS)
def test_scores_loss_and_gradient_are_recboles(name):
    found = differences(name, frozen(name))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_counts(name):
    """Each weight, moved by a hundredth, is noticed; but a key's bias cancels in the softmax."""
    for key, value in frozen(name).items():
        step = torch.linspace(-0.01, 0.01, value.numel()).view_as(value)
        found = differences(name, frozen(name) | {key: value + step * value.abs().max()})
        assert key.endswith("key.bias") or max(found.values()) > 10 * TOLERANCE, key


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_a_loss_of_whole_sequences_is_that_of_all_prefixes_without_padding_as_a_class(name):
    sequences, targets = our_rows(FROZEN["sequences"]), prefixes()[2]
    ours = MODELS[name](frozen(name)).loss(torch.arange(U), sequences, None, None)
    theirs = FROZEN[f"{name}/scores"]
    assert apart(ours, F.cross_entropy(theirs[:, 1:], targets)) < TOLERANCE
    assert apart(ours, FROZEN[f"{name}/loss"]) > 100 * TOLERANCE


def test_bert4rec_states_are_recboles_wherever_an_item_or_a_mask_stands():
    masked = our_rows(FROZEN["masked"])
    states = bert4rec(frozen("BERT4Rec")).encode(masked)[..., :-1]
    real = masked != N
    assert apart(states[real], FROZEN["BERT4Rec/states"][real]) < TOLERANCE


def test_bert4rec_counts_what_is_hidden_at_the_first_place():
    """RecBole's places are 0 there, which is its padding of places, too."""
    model, masked = bert4rec(frozen("BERT4Rec")), our_rows(FROZEN["masked"])
    hidden = masked == N + 1
    assert hidden[0, 0] and hidden.sum() == (FROZEN["places"] > 0).sum() + 1
    items = our_rows(FROZEN["sequences"])[:, :L]
    with_the_first = step_ce(model.encode(masked)[hidden], model.item_rows(), items[hidden])
    hidden[0, 0] = False
    without = step_ce(model.encode(masked)[hidden], model.item_rows(), items[hidden])
    assert apart(with_the_first, without) > 100 * TOLERANCE


def triples(users, items):
    """Differences of scores (3,) and rows (3, d) of the triples, all by RecBole's ids."""
    u, i, j = FROZEN["triples"]
    return (users[u] * (items[i] - items[j])).sum(1), (users[u], items[i], items[j])


def their_norm(rows):
    """Over the batch, not squared and not halved: not the term of LightGCN's authors."""
    return sum(x.norm() for x in rows) / len(rows[0])


def graph():
    users, place = (FROZEN["sequences"] > 0).nonzero(as_tuple=True)
    return interaction_graph(users, FROZEN["sequences"][users, place] - 1, U, N)


def lightgcn_differences(norm):
    w = {key: value.clone().requires_grad_() for key, value in frozen("LightGCN").items()}
    own = w["user_embedding.weight"], w["item_embedding.weight"]
    users, items = lightgcn(graph(), torch.cat([x[1:] for x in own]), 2).split([U, N])
    gap, _ = triples(F.pad(users, (0, 0, 1, 0)), F.pad(items, (0, 0, 1, 0)))
    _, rows = triples(*own)
    loss = bpr_loss(gap).mean() + 0.1 * norm(rows)
    loss.backward()
    return {
        "users": apart(users, FROZEN["LightGCN/users"][1:]),
        "items": apart(items, FROZEN["LightGCN/items"][1:]),
        "loss": apart(loss, FROZEN["LightGCN/loss"]),
        "gradient": apart(own[1].grad, FROZEN["LightGCN/gradient"]),
    }


def test_lightgcn_is_recboles():
    found = lightgcn_differences(their_norm)
    assert max(found.values()) < TOLERANCE, found


def test_the_authors_norm_would_be_noticed():
    def squared(rows):
        return sum(x.square().sum() for x in rows) / (2 * len(rows[0]))

    found = lightgcn_differences(squared)
    assert found["users"] < TOLERANCE
    assert found["loss"] > 100 * TOLERANCE < found["gradient"]


def test_bpr_is_recboles():
    w = {key: value.clone().requires_grad_() for key, value in frozen("BPR").items()}
    gap, _ = triples(w["user_embedding.weight"], w["item_embedding.weight"])
    loss = bpr_loss(gap).mean()
    loss.backward()
    assert apart(loss, FROZEN["BPR/loss"]) < TOLERANCE
    assert apart(w["item_embedding.weight"].grad, FROZEN["BPR/gradient"]) < TOLERANCE
