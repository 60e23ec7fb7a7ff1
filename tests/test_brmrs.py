r"""BR-1 .. BR-6: sampler, losses, graphs, model and objective against the oracle, their limits, and
negative controls.
"""

import doctest
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from hanorec.base.config_brmrs import BrmrsConfig
from hanorec.base.errors import InputError
from hanorec.brmrs.graph import interaction_graph, lightgcn, likeness_graph, smooth
from hanorec.brmrs.losses import bpr_loss, chns_loss, hard_negatives, synergy_loss, total_loss
from hanorec.brmrs.model import BRMRS, rivals, unit_rows
from hanorec.ranking.full_ranking import scores
from hanorec.ranking.sampler import NegativeSampler
from train_brmrs import step_loss

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
LN2 = math.log(2)
U, I = 12, 9  # users and items of the toy below


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampler_of(positives, n_items):
    """positives: a list of item lists, one a user."""
    pairs = [(u, i) for u, items in enumerate(positives) for i in items]
    users, items = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return NegativeSampler(users, items, len(positives), n_items)


# ---- BR-1: the pool ----


@pytest.mark.equation("BR-1")
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.lists(st.integers(0, n - 1), max_size=14), min_size=1, max_size=6),
        )
    )
)
@QUICK
def test_the_free_items_of_a_user_in_order(case):
    """r = 0 .. free - 1 gives each item that is no positive exactly once; positives come unsorted
    and repeat. Uniform r, so uniform items.
    """
    n_items, positives = case
    free = [oracle.free_items(items, n_items) for items in positives]
    if not all(free):
        with pytest.raises(InputError, match=f"user {free.index([])} has all {n_items} items"):
            sampler_of(positives, n_items)
        return
    sampler = sampler_of(positives, n_items)
    for user, expected in enumerate(free):
        assert sampler.free[user] == len(expected)
        found = sampler.free_item(torch.tensor([user]), torch.arange(len(expected))[None])
        assert found[0].tolist() == expected


ODD = [
    [0, 1, 8], [], [8], [0], [0, 2, 4, 6, 8], [7, 6, 5, 4, 3, 2, 1, 0], [1, 2, 3, 4, 5, 6, 7, 8],
    [0, 1, 2, 3, 5, 6, 7, 8],
]


def worst_surplus(draws, positives, n_items):
    """Largest standardised chi-square over users: sum (count - m)^2 / m of uniform counts has mean
    free - 1, variance about 2 (free - 1).
    """
    worst = 0.0
    for row, items in zip(draws, positives, strict=True):
        free = oracle.free_items(items, n_items)
        counts = np.bincount(row, minlength=n_items)
        if counts.sum() != counts[free].sum():
            return math.inf  # a positive was drawn
        if len(free) > 1:
            m, freedom = len(row) / len(free), len(free) - 1
            surplus = sum((counts[j] - m) ** 2 / m for j in free) - freedom
            worst = max(worst, surplus / math.sqrt(2 * freedom))
    return worst


@pytest.mark.equation("BR-1")
def test_draws_are_uniform_and_never_a_positive():
    """Beside the textbook's rejecting loop; users with positives at both ends, none, and all items
    but one. Controls: a sampler that steps from a positive to the next item, and one that forgets
    the positives, both fail.
    """
    users = torch.arange(len(ODD))
    draws = sampler_of(ODD, 9).draw(users, 9000, seeded(1))
    assert draws.shape == (8, 9000) and draws.dtype == torch.int64
    assert worst_surplus(draws.numpy(), ODD, 9) < 4
    textbook = [oracle.draw_by_rejection(items, 9, 9000, random.Random(1)) for items in ODD]
    assert worst_surplus(textbook, ODD, 9) < 4
    assert draws[5].unique().tolist() == [8]
    assert draws[6].unique().tolist() == [0]
    assert draws[7].unique().tolist() == [4]

    naive = sampler_of([[]] * 8, 9).draw(users, 9000, seeded(1))
    assert worst_surplus(naive.numpy(), ODD, 9) == math.inf
    stepped = naive.clone()
    for row, items in zip(stepped, ODD, strict=True):
        while (taken := torch.isin(row, torch.tensor(items, dtype=torch.int64))).any():
            row[taken] = (row[taken] + 1) % 9
    assert worst_surplus(stepped.numpy(), ODD, 9) > 20


@pytest.mark.equation("BR-1")
def test_draws_are_independent():
    """Neighbouring draws of one user, of 9 free items: equal with probability 1/9. The generator
    alone decides.
    """
    sampler = sampler_of(ODD, 9)
    draws = sampler.draw(torch.ones(300, dtype=torch.int64), 31, seeded(2))
    repeated = (draws[:, 1:] == draws[:, :-1]).double().mean()
    assert abs(repeated - 1 / 9) < 5 * math.sqrt(8 / 81 / 9000)
    assert torch.equal(draws, sampler.draw(torch.ones(300, dtype=torch.int64), 31, seeded(2)))


@pytest.mark.equation("BR-1")
def test_a_large_catalogue():
    """Keys of 50,000 users and 60,000 items exceed 32 bits and a float32's integers; the last
    user's items lie at both ends.
    """
    sampler = NegativeSampler(
        torch.tensor([49_999, 49_999, 0]), torch.tensor([0, 59_999, 7]), 50_000, 60_000
    )
    found = sampler.free_item(
        torch.tensor([49_999, 0, 25_000]),
        torch.tensor([[0, 59_996, 59_997], [6, 7, 59_998], [0, 7, 59_999]]),
    )
    assert found.tolist() == [[1, 59_997, 59_998], [6, 8, 59_999], [0, 7, 59_999]]


@pytest.mark.equation("BR-1")
@pytest.mark.parametrize(
    ("users", "items", "message"),
    [([0, 1], [2, 3], "train pair 1: item 3, expected 0 .. 2"),
     ([0, -1], [2, 2], "train pair 1: user -1, expected 0 .. 1"),
     ([0, 1], [2], "expected two int64 vectors"),
     ([1, 1, 1, 0], [0, 1, 2, 0], "user 1 has all 3 items.*leave that user out")],
)
def test_train_pairs_that_cannot_be_are_refused(users, items, message):
    with pytest.raises(InputError, match=message):
        NegativeSampler(torch.tensor(users), torch.tensor(items), 2, 3)


def test_ids_that_are_no_integers_are_refused():
    with pytest.raises(InputError, match=r"users \(1,\) torch.float32"):
        NegativeSampler(torch.zeros(1), torch.zeros(1), 2, 3)


# ---- BR-2: the hardest of the pool ----


@pytest.mark.equation("BR-2")
@pytest.mark.parametrize("n", [1, 2, 7])
def test_hard_negatives_match_the_oracle(n):
    """Rounded scores, so that rows have ties: the first of equal ones."""
    s_v, s_t = normal(50, n, seed=1).round(), normal(50, n, seed=2).round()
    j_v, j_t = hard_negatives(s_v, s_t)
    assert (j_v.tolist(), j_t.tolist()) == oracle.hard_negatives(s_v, s_t)
    assert j_v.dtype == j_t.dtype == torch.int64 and j_v.shape == (50,)


@pytest.mark.equation("BR-2")
def test_no_gradient_through_the_argmax():
    """A step without a graph, CHNS alone: E^t moves only at i+ and at j_v, E^v only at i+ and at
    j_t, though the whole pool was scored.
    """
    model, users, items = toy(
        layers=0, lambda_s=0.0, bpr_weight=0.0, weight_decay=0.0, fusion="concat"
    )
    sampler = NegativeSampler(users, items, U, I)
    loss, _ = step_loss(model, users[:1], items[:1], sampler, model.config, seeded(3))
    loss.backward()
    pool = sampler.draw(users[:1], 5, seeded(3))[0, 1:]
    emb = model.propagate()
    hardest = {m: int(pool[scores(emb, m, users[:1], pool[None]).argmax()]) for m in "tv"}
    moved = {m: set(model.item[m].grad.abs().sum(1).nonzero().flatten().tolist()) for m in "tv"}
    assert moved == {"t": {int(items[0]), hardest["v"]}, "v": {int(items[0]), hardest["t"]}}
    assert hardest["t"] != hardest["v"] and len(set(pool.tolist())) > 2


# ---- BR-3, BR-4, BR-5: the losses ----


@pytest.mark.equation("BR-3", "BR-4", "BR-5")
@DTYPES
def test_the_losses_match_the_oracle(dtype):
    a, b, c, d = (3 * normal(40, seed=k, dtype=dtype) for k in range(4))
    for ours, theirs in [
        (chns_loss(a, b, c, d), oracle.chns_loss(a, b, c, d)),
        (bpr_loss(a), oracle.bpr_loss(a)),
        (synergy_loss(a, b, c), oracle.synergy_loss(a, b, c)),
        (synergy_loss(a, b, c, 0.7, detach=True), oracle.synergy_loss(a, b, c, 0.7)),
    ]:
        assert ours.dtype == dtype and ours.shape == (40,)
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.equation("BR-3")
def test_chns_is_cross_modal():
    """Text knows that i+ beats the image's rival, the image that i+ beats text's: almost 0.
    Control: each against its own rival costs.
    """
    t_pos, t_at_jv, t_at_jt = (torch.tensor([x]) for x in (0.0, -20.0, 5.0))
    v_pos, v_at_jt, v_at_jv = (torch.tensor([x]) for x in (0.0, -20.0, 5.0))
    assert chns_loss(t_pos, t_at_jv, v_pos, v_at_jt) < 1e-7
    assert chns_loss(t_pos, t_at_jt, v_pos, v_at_jv) > 10


@pytest.mark.equation("BR-3", "BR-4", "BR-5")
def test_the_losses_where_nothing_is_decided():
    """Margins 0: ln 2, and 2 ln 2 for CHNS; synergy at a lead of exactly theta: ln 2."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert bpr_loss(zero) == synergy_loss(zero, zero, zero) == pytest.approx(LN2)
    assert chns_loss(one, one, zero, zero) == pytest.approx(2 * LN2)
    assert synergy_loss(1.75 * one, one, zero, theta=0.75) == pytest.approx(LN2)
    assert synergy_loss(1.75 * one, one, zero, theta=0.5) < LN2
    assert synergy_loss(1.75 * one, one, zero, theta=1) > LN2


@pytest.mark.equation("BR-3", "BR-4", "BR-5")
@DTYPES
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_huge_margins_are_finite_and_keep_their_gradient(size, dtype):
    """Hopeless triples cost their margin and pull with slope -1. Control: log(gamma + sigmoid) is
    flat exactly there.
    """
    x = torch.tensor([-size, size], dtype=dtype, requires_grad=True)
    zero = torch.zeros(2, dtype=dtype)
    for loss in (
        bpr_loss(x), chns_loss(x, zero, 10 * zero + 50, zero), synergy_loss(x, zero, zero - 1)
    ):
        np.testing.assert_allclose(loss.detach(), [size, 0], atol=1e-20)
        (slope,) = torch.autograd.grad(loss.sum(), x)
        assert slope.tolist() == [-1, 0]
    (flat,) = torch.autograd.grad(-torch.log(1e-10 + torch.sigmoid(x)).sum(), x)
    assert flat[0] == 0


@pytest.mark.equation("BR-3", "BR-4", "BR-5")
def test_gradcheck():
    a, b, c, d = (normal(6, seed=k).requires_grad_() for k in range(4))
    assert gradcheck(chns_loss, (a, b, c, d))
    assert gradcheck(lambda f, t, v: synergy_loss(f, t, v, 0.1), (a, b, c))
    assert gradcheck(lambda f: synergy_loss(f, b.detach(), c.detach(), 0.1, True), (a,))
    assert gradcheck(bpr_loss, (a,))


@pytest.mark.equation("BR-4")
def test_the_literal_loss_can_fall_by_worsening_a_modality_and_the_detached_one_cannot():
    """d L / d Delta_f = -sigma(-x), x the lead less theta. Literal: the better modality gets
    +sigma(-x), so descent lowers its margin; the other gets exactly 0. Detached: both get exactly
    nothing.
    """
    f, t, v = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.0, 2.0, -0.5))
    synergy_loss(f, t, v, 0.1).backward()
    assert f.grad == -t.grad == pytest.approx(-oracle.sigmoid(1.1)) and v.grad == 0
    f.grad = t.grad = v.grad = None
    synergy_loss(f, t, v, 0.1, detach=True).backward()
    assert f.grad == pytest.approx(-oracle.sigmoid(1.1)) and t.grad is None and v.grad is None


@pytest.mark.equation("BR-2", "BR-3", "BR-4", "BR-5")
def test_wrong_shapes_are_refused():
    one, two, square = torch.zeros(1), torch.zeros(2), torch.zeros(2, 2)
    for call in (
        lambda: hard_negatives(square, torch.zeros(2, 3)), lambda: hard_negatives(two, two),
        lambda: hard_negatives(torch.zeros(2, 0), torch.zeros(2, 0)),
        lambda: chns_loss(two, two, two, one), lambda: chns_loss(square, square, square, square),
        lambda: synergy_loss(two, two, two[:, None]), lambda: synergy_loss(one, two, two),
        lambda: bpr_loss(square),
    ):
        with pytest.raises(ValueError, match="expected equal ones of"):
            call()


# ---- BR-6: the total ----


@pytest.mark.equation("BR-6")
@DTYPES
@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1e-4, 1.0), (0.3, 2.0, 0.0, 0.0), (0.0, 0.0, 0.5, 1.0)]
)
def test_total_loss_matches_the_oracle(weights, dtype):
    bpr, chns, syn = (normal(20, seed=k, dtype=dtype).abs() for k in range(3))
    norm = torch.tensor(7.0, dtype=dtype)
    loss = total_loss(bpr, chns, syn, norm, *weights)
    assert loss.shape == () and loss.dtype == dtype
    assert loss == pytest.approx(
        oracle.total_loss(bpr, chns, syn, norm, *weights), rel=TOLERANCE[dtype]
    )
    assert total_loss(bpr.mean(), chns.mean(), syn.mean(), norm, *weights) == pytest.approx(
        loss.item(), rel=TOLERANCE[dtype]
    )


@pytest.mark.equation("BR-6")
def test_the_displayed_formula_is_bpr_weight_0():
    bpr, other, zero = torch.tensor([5.0]), torch.tensor([1.0]), torch.zeros(())
    assert total_loss(bpr, other, other, zero, 2, 3, 1, bpr_weight=0) == 5
    assert total_loss(bpr, other, other, zero, 2, 3, 1) == 10


# ---- the graphs ----


def toy_pairs():
    """30 pairs, some twice; every user has one or more, users 0 and 1 the same item."""
    users = torch.cat([torch.arange(U), torch.randint(U, (18,), generator=seeded(5))])
    return users, torch.cat([torch.tensor([4, 4]), torch.randint(I, (28,), generator=seeded(6))])


def test_the_interaction_graph_and_lightgcn_match_the_oracle():
    users, items = toy_pairs()
    A = interaction_graph(users, items, U, I)
    A_ = oracle.interaction_graph(zip(users, items, strict=True), U, I)
    np.testing.assert_allclose(A.to_dense(), A_, atol=1e-7)
    x = normal(U + I, 3, seed=7)
    for layers in (0, 1, 3):
        np.testing.assert_allclose(
            lightgcn(A.double(), x, layers), oracle.lightgcn(A_, x.numpy(), layers), atol=1e-6
        )
    assert torch.equal(lightgcn(A.double(), x, 0), x)


def test_an_edge_by_hand():
    """Two users share one item: each edge 1 / sqrt(1 * 2). A user and an item without pairs have
    empty rows, not NaN.
    """
    A = interaction_graph(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]), 3, 2).to_dense()
    expected = torch.zeros(5, 5)
    expected[0, 3] = expected[1, 3] = expected[3, 0] = expected[3, 1] = 2**-0.5
    assert torch.allclose(A, expected)


def test_the_gradient_of_the_product():
    """Written out by hand, since A is symmetric. Control: for a matrix that is not, it would be
    wrong.
    """
    A = interaction_graph(*toy_pairs(), U, I).double()
    x = normal(U + I, 2, seed=8).requires_grad_()
    assert gradcheck(lambda y: smooth(A, y), (x,))
    assert gradcheck(lambda y: lightgcn(A, y, 2), (x,))
    crooked = torch.triu(normal(4, 4, seed=9)).to_sparse_csr()
    assert not gradcheck(
        lambda y: smooth(crooked, y), (normal(4, 2, seed=10).requires_grad_(),),
        raise_exception=False,
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 3, I - 1])
def test_the_graphs_of_likeness_match_the_oracle(k, alpha):
    """Items by who bought them, with an item nobody bought and one without any feature; users by
    what they bought.
    """
    users, items = toy_pairs()
    users, items = users[items != 2], items[items != 2]
    features = [normal(I, 4, seed=11), normal(I, 3, seed=12)]
    features[0][7] = features[1][7] = 0
    sets = [{int(u) for u, j in zip(users, items, strict=True) if j == i} for i in range(I)]
    A = likeness_graph(items, users, I, U, features, k, alpha)
    np.testing.assert_allclose(
        A.to_dense(), oracle.likeness_graph(sets, [f.tolist() for f in features], k, alpha),
        atol=1e-7,
    )
    sets = [{int(i) for v, i in zip(users, items, strict=True) if v == u} for u in range(U)]
    A = likeness_graph(users, items, U, I, [normal(U, 5, seed=13)], k, alpha)
    np.testing.assert_allclose(
        A.to_dense(), oracle.likeness_graph(sets, [normal(U, 5, seed=13).tolist()], k, alpha),
        atol=1e-7,
    )


def test_the_overlap_can_bring_in_a_pair_that_no_feature_would():
    """Rows 0 and 1 share their only user and have opposite features: first at alpha = 0.9, no edge
    at alpha = 0.1.
    """
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.9, 0.1], [0.8, 0.2]])
    graph = lambda alpha: likeness_graph(
        torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 4, 2, [x], 1, alpha
    ).to_dense()
    assert graph(0.9)[0, 1] > 0 and graph(0.1)[0, 1] == 0


# ---- the model ----


def toy(**options):
    """A model with random weights in float64, and its train pairs."""
    config = BrmrsConfig(**{"dim": 5, "theta": 0.1, "pool": 4, **options})
    users, items = toy_pairs()
    torch.manual_seed(0)
    model = BRMRS(
        U, I,
        {
            "t": normal(I, 4, seed=1, dtype=torch.float32),
            "v": normal(I, 3, seed=2, dtype=torch.float32),
        },
        users, items, config,
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # large enough that margins differ
    return model, users, items


def leaky(x):
    return np.where(x > 0, x, 0.01 * x)


def embeddings_by_hand(model, users, items):
    """User and item embeddings of t, v and f with dense matrices and the oracle's graphs."""
    config = model.config
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    graph = oracle.interaction_graph(zip(users, items, strict=True), U, I)
    buyers = [{int(u) for u, j in zip(users, items, strict=True) if j == i} for i in range(I)]
    bought = [{int(i) for v, i in zip(users, items, strict=True) if v == u} for u in range(U)]
    x = {}
    for m, raw in (
        ("t", normal(I, 4, seed=1, dtype=torch.float32).double().numpy()),
        ("v", normal(I, 3, seed=2, dtype=torch.float32).double().numpy()),
    ):
        raw = raw - raw.mean(0) if config.normalise else raw
        x[m] = raw / np.linalg.norm(raw, axis=1, keepdims=True) if config.normalise else raw
    user, item = {}, {}
    for m in "tv":
        p = weights.get(f"user.{m}", weights.get("user.shared"))
        q = x[m] @ weights[f"W.{m}"] + weights.get(f"item.{m}", 0)
        if config.item_graph:
            likeness = oracle.likeness_graph(
                buyers, list(x.values()), config.item_graph, config.graph_alpha
            )
            q = q + likeness @ q
        if config.user_graph:
            taste = [
                np.array([sum(x[m][i] for i in sorted(items_)) for items_ in bought]) for m in "tv"
            ]
            p = p + oracle.likeness_graph(bought, taste, config.user_graph, config.graph_alpha) @ p
        z = oracle.lightgcn(graph, np.concatenate([p, q]), config.layers)
        user[m], item[m] = z[:U], z[U:]
    p, q = np.concatenate([user["t"], user["v"]], 1), np.concatenate([item["t"], item["v"]], 1)
    if config.fusion == "sum":
        p, q = user["t"] + user["v"], item["t"] + item["v"]
    if config.fusion == "mlp":
        hidden = leaky(
            np.concatenate([q, item["t"] * item["v"]], 1) @ weights["item_mlp.0.weight"].T
            + weights["item_mlp.0.bias"]
        )
        q = np.concatenate(
            [q, hidden @ weights["item_mlp.2.weight"].T + weights["item_mlp.2.bias"]], 1
        )
        p = np.concatenate([p, p @ weights["user_map.weight"].T], 1)
    return {**user, "f": p}, {**item, "f": q}


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 0}, {"fusion": "concat"}, {"fusion": "sum", "layers": 1},
     {"user_embedding": "shared"}, {"item_embedding": "none"}, {"normalise": False},
     {"item_graph": 2}, {"user_graph": 3, "graph_alpha": 0.2},
     {"item_graph": 8, "user_graph": 1, "layers": 3}],
)
def test_the_embeddings_match_those_by_hand(options):
    model, users, items = toy(**options)
    emb = model.propagate()
    user, item = embeddings_by_hand(model, users, items)
    for m in "tvf":
        # the graphs' weights were float32
        np.testing.assert_allclose(emb.user[m].detach(), user[m], atol=1e-5)
        np.testing.assert_allclose(emb.item[m].detach(), item[m], atol=1e-5)
    chosen = torch.tensor([[0, 8], [3, 3]])
    np.testing.assert_allclose(
        scores(emb, "f", torch.tensor([2, 11]), chosen).detach(),
        [
            [oracle.dot(user["f"][u], item["f"][i]) for i in row]
            for u, row in zip((2, 11), chosen.tolist(), strict=True)
        ],
        atol=1e-5,
    )


def margins(model, seed=20):
    emb = model.propagate()
    users, pairs = torch.arange(U), torch.randint(I, (U, 2), generator=seeded(seed))
    s = {m: scores(emb, m, users, pairs) for m in "tvf"}
    return [s[m][:, 0] - s[m][:, 1] for m in "ftv"]


@pytest.mark.equation("BR-4")
def test_with_concat_synergy_is_bpr_on_the_weaker_modality():
    """s_f = s_t + s_v, so Delta_f - max = min: loss and gradients are those of BPR on the smaller
    margin. Control: mlp differs.
    """
    for fusion, equal in (("concat", True), ("mlp", False)):
        model, _, _ = toy(fusion=fusion)
        results = []
        weights = [model.user["t"], model.user["v"], model.W["t"], model.item["v"]]
        for loss_of in (synergy_loss, lambda f, t, v: bpr_loss(torch.minimum(t, v))):
            loss = loss_of(*margins(model)).sum()
            results.append([loss.detach(), *torch.autograd.grad(loss, weights)])
        pairs = zip(*results, strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs) == equal


@pytest.mark.equation("BR-4")
def test_detached_synergy_reaches_a_branch_only_through_the_fusion():
    """Per-branch margins that no fusion uses: the literal loss moves the branches' parameters, the
    detached one leaves them without any.
    """
    model, _, _ = toy()
    _, t, v = margins(model)
    fused = torch.zeros(U, dtype=torch.float64, requires_grad=True)
    branch = [
        p for name, p in model.named_parameters() if name.split(".")[0] in ("user", "item", "W")
    ]
    literal = torch.autograd.grad(synergy_loss(fused, t, v, 0.1).sum(), branch, retain_graph=True)
    assert all(g.abs().sum() > 0 for g in literal)
    detached = torch.autograd.grad(
        synergy_loss(fused, t, v, 0.1, detach=True).sum(), [fused, *branch], allow_unused=True
    )
    assert detached[0].abs().sum() > 0 and all(g is None for g in detached[1:])


def test_features_are_centred_and_of_length_1():
    """(0, 0), (2, 0), (4, 3): mean (2, 1); differences (-2, -1), (0, -1), (2, 2). A row at the mean
    stays 0.
    """
    x = unit_rows(torch.tensor([[0.0, 0], [2, 0], [4, 3]]))
    assert torch.allclose(
        x, torch.tensor([[-2 / 5**0.5, -1 / 5**0.5], [0, -1], [0.5**0.5, 0.5**0.5]])
    )
    assert torch.equal(unit_rows(torch.ones(2, 3)), torch.zeros(2, 3))


def test_the_regulariser_by_hand():
    """B = 2; all embeddings 1 of width 5: user 5 * 2 branches, item 5 * 2 branches * 2 items a
    triple: (10 + 20) * 2 / (2 * 2) = 15.
    """
    model, _, _ = toy()
    for table in (*model.user.values(), *model.item.values()):
        torch.nn.init.ones_(table)
    assert model.regulariser(torch.tensor([0, 3]), torch.tensor([[1, 2], [5, 5]])) == 15


def test_one_modality_alone():
    """Plain BPR on it: s_f = s_v. With CHNS or synergy on, an error that names the missing one and
    the remedy.
    """
    users, items = toy_pairs()
    v = {"v": normal(I, 3, seed=2, dtype=torch.float32)}
    plain = BrmrsConfig(dim=5, lambda_h=0.0, lambda_s=0.0)
    model = BRMRS(U, I, v, users, items, plain)
    emb = model.propagate()
    assert torch.equal(emb.user["f"], emb.user["v"])
    assert torch.equal(emb.item["f"], emb.item["v"])
    assert set(emb.user) == {"v", "f"}
    loss, log = step_loss(
        model, users, items, NegativeSampler(users, items, U, I), plain, seeded(1)
    )
    loss.backward()
    assert log["gap_f"] == log["gap_v"]
    assert "gap_t" not in log
    assert log["win"] == log["chns"] == log["syn"] == 0
    for config in (replace(plain, lambda_h=1.0), replace(plain, lambda_s=0.5)):
        with pytest.raises(InputError, match="no text features.*--lambda-h 0 --lambda-s 0"):
            BRMRS(U, I, v, users, items, config)
    with pytest.raises(InputError, match="no item features at all"):
        BRMRS(U, I, {}, users, items, plain)


def test_features_of_other_items_are_refused():
    users, items = toy_pairs()
    with pytest.raises(
        InputError,
        match=rf"image features of shape \({I - 1}, 3\), expected one row for each of {I} items",
    ):
        BRMRS(U, I, {"t": torch.ones(I, 4), "v": torch.ones(I - 1, 3)}, users, items, BrmrsConfig())


def test_only_parameters_are_saved():
    """Features and graphs come from the data again."""
    model, users, items = toy(item_graph=2)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    torch.manual_seed(1)
    other = BRMRS(
        U, I,
        {
            "t": normal(I, 4, seed=1, dtype=torch.float32),
            "v": normal(I, 3, seed=2, dtype=torch.float32),
        },
        users, items, model.config,
    ).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.propagate().item["f"], model.propagate().item["f"])


# ---- the objective of a batch ----


def step_by_hand(model, users, items, batch, drawn):
    """Loss and log of the oracle for the train pairs `batch` and the items drawn for each."""
    config = model.config
    user, item = embeddings_by_hand(model, users, items)

    def s(m, u, j):
        return oracle.dot(user[m][u], item[m][j])

    gaps, chns = {m: [] for m in "tvf"}, []
    norm = 0.0
    for row, place in enumerate(batch):
        u, i = int(users[place]), int(items[place])
        negative, *pool = drawn[row]
        if config.hard_fused:
            negative = max(pool, key=lambda j: s("f", u, j))
        for m in "tvf":
            gaps[m].append(s(m, u, i) - s(m, u, negative))
        (a,), (b,) = oracle.hard_negatives(
            [[s("v", u, j) for j in pool]], [[s("t", u, j) for j in pool]]
        )
        if config.routing == "same":
            a, b = b, a
        if config.routing == "random":
            a, b = 0, len(pool) - 1
        (of_triple,) = oracle.chns_loss(
            [s("t", u, i)], [s("t", u, pool[a])], [s("v", u, i)], [s("v", u, pool[b])]
        )
        chns.append(of_triple)
        rows = [table[u] for table in model.user.values()]
        for table in model.item.values():
            rows += [table[i], table[negative]]
        norm += sum(oracle.dot(row.tolist(), row.tolist()) for row in rows) / (2 * len(batch))
    bpr = oracle.bpr_loss(gaps["f"])
    syn = oracle.synergy_loss(gaps["f"], gaps["t"], gaps["v"], config.theta)
    loss = oracle.total_loss(
        bpr, chns, syn, norm, config.lambda_h, config.lambda_s, config.weight_decay,
        config.bpr_weight,
    )
    loss += config.unimodal_bpr * (
        oracle.average(oracle.bpr_loss(gaps["t"])) + oracle.average(oracle.bpr_loss(gaps["v"]))
    )
    win = oracle.average([
        float(f > max(t, v)) for f, t, v in zip(gaps["f"], gaps["t"], gaps["v"], strict=True)
    ])
    return loss, {
        "bpr": oracle.average(bpr), "chns": oracle.average(chns), "syn": oracle.average(syn),
        "norm": norm, "win": win, **{f"gap_{m}": oracle.average(gaps[m]) for m in gaps},
    }


@pytest.mark.equation("BR-1", "BR-2", "BR-3", "BR-4", "BR-5", "BR-6")
@pytest.mark.parametrize(
    "options",
    [{}, {"fusion": "concat", "layers": 0}, {"fusion": "sum"}, {"routing": "same"},
     {"routing": "random"}, {"pool": 1}, {"hard_fused": True}, {"detach": True},
     {"bpr_weight": 0.0}, {"unimodal_bpr": 0.5}, {"bpr_weight": 0.0, "unimodal_bpr": 2.0},
     {"lambda_h": 0.3, "lambda_s": 2.0, "theta": 1.0, "weight_decay": 0.1}],
)
def test_a_whole_step_matches_the_oracle(options):
    model, users, items = toy(**options)
    batch, sampler = torch.arange(0, 30, 2), NegativeSampler(users, items, U, I)
    loss, log = step_loss(model, users[batch], items[batch], sampler, model.config, seeded(4))
    drawn = sampler.draw(users[batch], 1 + model.config.pool, seeded(4)).tolist()
    expected, expected_log = step_by_hand(model, users, items, batch, drawn)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert log == pytest.approx(expected_log, abs=1e-5)
    assert all(type(value) is float for value in log.values())


@pytest.mark.equation("BR-6")
@pytest.mark.parametrize(
    "options", [{}, {"item_graph": 2, "user_graph": 2, "fusion": "sum", "user_embedding": "shared"}]
)
def test_the_gradient_of_a_whole_step(options):
    """Along a random direction of all parameters, against central differences."""
    model, users, items = toy(**options)
    sampler, parameters = NegativeSampler(users, items, U, I), list(model.parameters())
    direction = [normal(*p.shape, seed=k) for k, p in enumerate(parameters)]

    def loss_at(distance):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(distance * d)
        return step_loss(model, users, items, sampler, model.config, seeded(5))[0]

    slope = sum(
        (g * d).sum()
        for g, d in zip(torch.autograd.grad(loss_at(0), parameters), direction, strict=True)
    )
    h = 1e-5  # a rounding of 1e-13 in a loss is then 1e-8 of a slope
    ahead, behind = loss_at(h).item(), loss_at(-2 * h).item()
    assert (ahead - behind) / (2 * h) == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.equation("BR-4")
def test_detach_within_a_step():
    """Synergy alone: the step's gradient is that of the lead over two constants. Control:
    literally, it is not.
    """
    model, users, items = toy(lambda_h=0.0, bpr_weight=0.0, weight_decay=0.0)
    sampler, parameters = NegativeSampler(users, items, U, I), list(model.parameters())
    drawn = torch.cat([items[:, None], sampler.draw(users, 5, seeded(5))[:, :1]], 1)
    emb = model.propagate()
    f, t, v = (s[:, 0] - s[:, 1] for s in (scores(emb, m, users, drawn) for m in "ftv"))
    expected = torch.autograd.grad(synergy_loss(f, t.detach(), v.detach(), 0.1).mean(), parameters)
    for detach in (True, False):
        loss, _ = step_loss(
            model, users, items, sampler, replace(model.config, detach=detach), seeded(5)
        )
        found = torch.autograd.grad(loss, parameters)
        pairs = zip(found, expected, strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs) == detach


@pytest.mark.equation("BR-1")
def test_the_draws_do_not_depend_on_which_losses_are_on():
    """So that runs of an ablation compare: one seed, one i-, and the same state of the generator
    after. Control: another seed, other margins.
    """
    model, users, items = toy()
    sampler, states = NegativeSampler(users, items, U, I), []
    for change in ({}, {"lambda_h": 0.0, "lambda_s": 0.0}, {"routing": "random"}):
        generator = seeded(6)
        step_loss(model, users, items, sampler, replace(model.config, **change), generator)
        states.append(generator.get_state().tolist())
    assert states[0] == states[1] == states[2]
    logs = [
        step_loss(model, users, items, sampler, replace(model.config, **change), seeded(seed))[1]
        for seed, change in [
            (6, {}),
            (6, {"lambda_h": 0.0}),
            (6, {"lambda_s": 0.0, "routing": "same"}),
            (6, {"routing": "random"}),
            (7, {}),
        ]
    ]
    gaps = [log["gap_f"] for log in logs]
    assert gaps[0] == gaps[1] == gaps[2] == gaps[3] != gaps[4]
    assert logs[1]["chns"] == logs[2]["syn"] == 0 < logs[0]["chns"]


@pytest.mark.equation("BR-2")
def test_routing():
    """cross: text gets what the image rates highest, and the reverse; same: each its own; random:
    the first and the last drawn.
    """
    model, users, _ = toy(layers=0, fusion="concat")
    emb = model.propagate()
    pool = torch.arange(I).expand(200, I)
    u = users[:1].expand(200)
    t, v = (int(scores(emb, m, u, pool)[0].argmax()) for m in "tv")
    assert t != v
    for routing, expected in (("cross", (v, t)), ("same", (t, v))):
        for_t, for_v = rivals(emb, u, pool, routing)
        assert for_t.shape == for_v.shape == (200, 1)
        assert (for_t == expected[0]).all() and (for_v == expected[1]).all()
    assert [x.unique().tolist() for x in rivals(emb, u, pool, "random")] == [[0], [I - 1]]
    with pytest.raises(InputError, match="--routing crossed: expected cross, same or random"):
        rivals(emb, u, pool, "crossed")


def test_an_unknown_fusion_is_refused():
    model, _, _ = toy(fusion="product")
    with pytest.raises(InputError, match="--fusion product: expected mlp, concat or sum"):
        model.propagate()


@pytest.mark.equation("BR-3", "BR-4", "BR-5")
def test_the_plug_in_of_the_documentation_runs():
    failed, examples = doctest.testfile(
        str(Path(__file__).parent.parent / "docs" / "brmrs.md"), module_relative=False
    )
    assert failed == 0 and examples > 5
