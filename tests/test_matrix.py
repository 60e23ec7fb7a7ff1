"""BPR-MF and LightGCN against loops in float64, in their limits, and against torch_geometric."""

import math

import numpy as np
import oracle_matrix
import pytest
import torch
from toy_pairs import normal

from hanorec.baselines.matrix import MatrixModel, triple_loss
from hanorec.brmrs.graph import interaction_graph, lightgcn
from hanorec.brmrs.losses import bpr_loss

U, N, D = 5, 7, 3
# Every node has an edge but item 6; user 0 has many, user 4 one.
PAIRS = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 4), (2, 1), (2, 5), (3, 5), (3, 2), (4, 0)]
TRIPLES = [(0, 1, 4), (1, 4, 2), (1, 0, 6), (4, 0, 5)]  # a user twice


def graph(pairs=PAIRS, n_users=U, n_items=N):
    users, items = torch.tensor(pairs).T
    return interaction_graph(users, items, n_users, n_items).double()


def model(layers, weight_decay=0.0, pairs=PAIRS, sizes=(U, N)):
    made = MatrixModel(*sizes, graph(pairs, *sizes), layers, D, weight_decay).double()
    with torch.no_grad():
        made.x.copy_(normal(sum(sizes), D, seed=1))
    return made


def loss(made):
    return made.loss(*torch.tensor(TRIPLES).T).item()


@pytest.mark.equation("LG-1")
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_propagation_matches_the_oracle(layers):
    made = model(layers)
    expected = oracle_matrix.lightgcn(PAIRS, U, N, made.x.tolist(), layers)
    user, item = made.propagate()
    # the graph's weights were rounded to float32
    np.testing.assert_allclose(torch.cat([user, item]).detach(), expected, atol=1e-6)
    other = oracle_matrix.lightgcn(PAIRS[1:], U, N, made.x.tolist(), layers)
    assert np.allclose(other, expected) == (layers == 0)  # an edge less would be noticed


@pytest.mark.equation("LG-2")
@pytest.mark.parametrize("layers", [0, 3])
def test_the_loss_matches_the_oracle(layers):
    """And readings of other codes would be noticed: the norm of propagated rows, of all rows, and
    without the square.
    """
    made, decay = model(layers, weight_decay=0.3), 0.3
    x = made.x.detach()
    z = torch.cat(made.propagate()).detach()
    expected = oracle_matrix.triple_loss(TRIPLES, U, x.tolist(), z.tolist(), decay)
    assert loss(made) == pytest.approx(expected, rel=1e-12)

    bpr = oracle_matrix.triple_loss(TRIPLES, U, x.tolist(), z.tolist(), 0)
    of_propagated = oracle_matrix.triple_loss(TRIPLES, U, z.tolist(), z.tolist(), decay)
    of_all = bpr + decay * x.square().sum().item() / (2 * len(TRIPLES))
    unsquared = bpr + decay * 2 * (expected - bpr) ** 0.5
    for other in (of_all, unsquared, *([of_propagated] if layers else [])):
        assert other != pytest.approx(expected, rel=1e-3)


def test_without_layers_it_is_matrix_factorisation():
    """Of the tables P and Q alone: no graph, BPR, and half the squared length of three rows."""
    made = model(0, weight_decay=0.3)
    P, Q = made.x.detach().split([U, N])
    user, item = made.propagate()
    assert torch.equal(user, P) and torch.equal(item, Q)
    terms = []
    for u, i, j in TRIPLES:
        length = (P[u] @ P[u] + Q[i] @ Q[i] + Q[j] @ Q[j]).item()
        gap = (P[u] @ Q[i] - P[u] @ Q[j]).item()
        terms.append(math.log1p(math.exp(-gap)) + 0.3 * length / 2)
    assert loss(made) == pytest.approx(np.mean(terms), rel=1e-12)
    assert loss(model(0, 0.3, PAIRS[:5])) == loss(made)
    assert loss(model(1, 0.3, PAIRS[:5])) != pytest.approx(loss(model(1, 0.3)), rel=1e-3)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_root_of_the_degree_stays(layers):
    """D^(-1/2) B D^(-1/2) D^(1/2) 1 = D^(1/2) 1: an eigenvector with the eigenvalue 1. The degrees
    themselves are none.
    """
    pairs = [*PAIRS, (3, 6)]
    users, items = np.array(pairs).T
    counts = np.concatenate([np.bincount(users), np.bincount(items)])
    degree = torch.tensor(counts, dtype=torch.float64)[:, None]
    A = graph(pairs)
    assert torch.allclose(lightgcn(A, degree.sqrt(), layers), degree.sqrt(), atol=1e-6)
    assert not torch.allclose(lightgcn(A, degree, layers), degree, atol=0.1)


def test_one_user_and_one_item_meet_in_the_middle():
    """A swaps the two, so after one layer both are their mean; after two the own row counts
    twice.
    """
    made = model(1, pairs=[(0, 0)], sizes=(1, 1))
    user, item = made.propagate()
    assert torch.equal(user, item)
    assert torch.allclose(user[0], made.x.mean(0), atol=1e-15)
    twice = model(2, pairs=[(0, 0)], sizes=(1, 1))
    expected = (2 * twice.x[0] + twice.x[1]) / 3
    assert torch.allclose(twice.propagate()[0][0], expected, atol=1e-15)


def test_undecided_is_ln_2():
    made = model(3)
    with torch.no_grad():
        made.x.zero_()
    assert loss(made) == pytest.approx(math.log(2), rel=1e-15)


def test_the_gradient():
    """Of LG-2 through LG-1, by finite differences; and of the loss by itself."""
    made, triples = model(2, weight_decay=0.3), torch.tensor(TRIPLES).T

    def of_table(x):
        with torch.no_grad():
            made.x.copy_(x)
        user, item = lightgcn(made.graph, x, 2).split([U, N])
        u, i, j = user[triples[0]], item[triples[1]], item[triples[2]]
        rows = torch.stack([x[triples[0]], x[U + triples[1]], x[U + triples[2]]], 1)
        return triple_loss((u * (i - j)).sum(1), rows, 0.3)

    x = made.x.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(of_table, (x,))
    of_table(x).backward()
    made.loss(*triples).backward()
    assert torch.allclose(made.x.grad, x.grad, rtol=1e-12)
    gap = normal(4, seed=2).requires_grad_()
    rows = normal(4, 3, D, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, r: triple_loss(g, r, 0.3), (gap, rows))
    assert torch.equal(triple_loss(gap, rows, 0), bpr_loss(gap).mean())


def test_torch_geometric_computes_the_same():
    """Its LightGCN at K = 3, in float64, with our vectors."""
    models = pytest.importorskip("torch_geometric.nn.models")
    made = model(3)
    theirs = models.LightGCN(U + N, D, num_layers=3).double()
    with torch.no_grad():
        theirs.embedding.weight.copy_(made.x)
    users, items = torch.tensor(PAIRS).T
    edges = torch.stack([torch.cat([users, U + items]), torch.cat([U + items, users])])
    expected = theirs.get_embedding(edges)
    assert torch.allclose(torch.cat(made.propagate()), expected, atol=1e-6)
    assert not torch.allclose(torch.cat(model(2).propagate()), expected, atol=1e-3)
