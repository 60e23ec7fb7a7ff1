"""SASRec, GRU4Rec, Caser, BERT4Rec and the losses of sequences: SAS-1 .. SAS-3, GR-1, CA-1, BE-1.

All in float64.
"""

import math

import numpy as np
import oracle_sequential as oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_sequences import KINDS, MASK, PAD, D, L, N, U, loss, make, numpy, padded, sampler

from hanorec.base.errors import InputError
from hanorec.baselines.attention import Block, Encoder, dropout
from hanorec.baselines.encoders import Caser
from hanorec.baselines.sequential import newest, scattered, step_bce, step_ce, steps
from hanorec.ranking.sampler import NegativeSampler

ROWS = [[3, 1, 4, 1, 5, 8], [2, 7], [6, 0, 2, 6]]
SEQUENCES = padded(*ROWS)
CAUSAL = ["SASRec", "CL4SRec", "GRU4Rec"]


def close(ours, theirs, rtol=1e-9):
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=rtol, atol=1e-12)


# ---- SAS-1 ----


@pytest.mark.equation("SAS-1")
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_sasrec_matches_the_oracle(norm):
    model = make("SASRec", norm=norm)
    states = model.encode(SEQUENCES)
    w = oracle.part(numpy(model), "encoder")
    for b, row in enumerate(ROWS):
        expected = oracle.encoder(w, row, 2, 2, causal=True, pre=norm == "pre")
        close(states[b, : len(row)], expected)


def torchs_layer(block, norm):
    """nn.TransformerEncoderLayer with the weights of a `Block`."""
    inner = len(block.up.weight)
    layer = nn.TransformerEncoderLayer(
        D, 2, inner, 0.0, F.relu if norm == "pre" else F.gelu, block.norms[0].eps,
        batch_first=True, norm_first=norm == "pre",
    ).double()
    weights, identity = {}, {"weight": torch.eye(D), "bias": torch.zeros(D)}
    for name in ("weight", "bias"):
        qkv = [getattr(part, name) for part in (block.q, block.k, block.v)]
        weights[f"self_attn.in_proj_{name}"] = torch.cat(qkv)
        out = identity[name] if norm == "pre" else getattr(block.out, name)
        weights[f"self_attn.out_proj.{name}"] = out
        weights[f"linear1.{name}"] = getattr(block.up, name)
        weights[f"linear2.{name}"] = getattr(block.down, name)
        for n in (0, 1):
            weights[f"norm{n + 1}.{name}"] = getattr(block.norms[n], name)
    layer.load_state_dict(weights)
    return layer


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_is_torchs_own_layer(norm):
    block = make("SASRec", norm=norm).encoder.blocks[0]
    x = torch.randn(3, 5, D, dtype=torch.float64)
    sees = torch.ones(5, 5, dtype=torch.bool).tril()
    theirs = torchs_layer(block, norm)(x, ~sees)
    close(block(x, sees, None), theirs.detach().numpy())
    everyone = block(x, sees | True, None)
    assert (everyone - theirs).abs().max() > 0.01  # the mask is part of what is compared


def test_without_blocks_a_state_is_the_norm_of_item_and_position():
    encoder = Encoder(N, L, D, 0, 2, 0.0, "pre", causal=True).double()
    nn.init.normal_(encoder.norm.weight)
    M, P = encoder.items.weight, encoder.positions
    expected = encoder.norm(D**0.5 * M[SEQUENCES] + P)
    close(encoder(SEQUENCES, None), expected.detach().numpy())


@pytest.mark.parametrize("kind", CAUSAL)
def test_what_comes_later_changes_nothing(kind):
    """Exactly: the later items have weight 0 there, not next to 0."""
    model, changed = make(kind), SEQUENCES.clone()
    changed[0, 3:] = torch.tensor([7, 7, 2])
    before, after = model.encode(SEQUENCES), model.encode(changed)
    assert torch.equal(before[0, :3], after[0, :3])
    assert (before[0, 3:] - after[0, 3:]).abs().min(1).values.min() > 0


def test_a_mask_that_leaks_would_be_noticed():
    model, changed = make("SASRec"), SEQUENCES.clone()
    model.encoder.causal = False
    changed[0, 5] = 7
    assert not torch.equal(model.encode(SEQUENCES)[0, :3], model.encode(changed)[0, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_changes_nothing(kind):
    model, wider = make(kind), padded(*ROWS, width=L + 5)
    users = torch.arange(3)
    close(model.state(users, wider), model.state(users, SEQUENCES).detach().numpy())
    if kind == "BERT4Rec":
        model.share = 1.0  # it draws a number for each place, padding too
    if kind != "CL4SRec":  # so does that
        close(loss(model, wider), loss(model, SEQUENCES).detach().numpy())


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_state_after_each_step_is_that_of_the_prefix(kind):
    model = make(kind)
    states = model.encode(SEQUENCES[:1])
    for cut in range(1, L + 1):
        prefix = model.state(torch.zeros(1), SEQUENCES[:1, :cut])
        close(states[:, cut - 1], prefix.detach().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_the_newest_items_are_kept(kind):
    """All but GRU4Rec, which has no length of its own, see so many items alone."""
    model, users = make(kind), torch.zeros(1, dtype=torch.int64)
    seen = {"Caser": 4, "GRU4Rec": 10}.get(kind, L)
    items = torch.arange(10)[None] % N
    state = model.state(users, items)
    changes = []
    for place in range(10):
        changed = items.clone()
        changed[0, place] = (changed[0, place] + 3) % N
        changes.append(not torch.equal(model.state(users, changed), state))
    assert changes == [place >= 10 - seen for place in range(10)]


def test_newest_and_steps_by_hand():
    rows = padded([0, 1, 2, 3, 4], [5, 6, 7], [8])
    assert newest(rows, 3, N).tolist() == [[2, 3, 4], [5, 6, 7], [8, PAD, PAD]]
    assert newest(rows, 5, N).tolist() == rows.tolist()
    assert newest(rows, 0, N).shape == (3, 0)
    inputs, targets = steps(rows[:2], N)
    assert inputs.tolist() == [[0, 1, 2, 3], [5, 6, PAD, PAD]]
    assert targets.tolist() == [[1, 2, 3, 4], [6, 7, PAD, PAD]]


# ---- SAS-2, SAS-3 ----


@pytest.mark.equation("SAS-2")
def test_bce_matches_the_oracle():
    model = make("SASRec", loss="bce")
    ours = loss(model, SEQUENCES, seed=3)
    generator = torch.Generator().manual_seed(3)
    drawn = sampler().draw(torch.arange(3), L - 1, generator)
    M = numpy(model)["encoder.items.weight"]
    w, positive, negative = oracle.part(numpy(model), "encoder"), [], []
    for b, row in enumerate(ROWS):
        states = oracle.encoder(w, row[:-1], 2, 2, causal=True, pre=True)
        for t, state in enumerate(states):
            positive.append(oracle.dot(state, M[row[t + 1]]))
            negative.append(oracle.dot(state, M[drawn[b, t]]))
    close(ours, oracle.step_bce(positive, negative))


@pytest.mark.equation("SAS-3")
def test_cross_entropy_matches_the_oracle():
    model = make("SASRec")
    M, w, states, targets = numpy(model), oracle.part(numpy(model), "encoder"), [], []
    for row in ROWS:
        states += oracle.encoder(w, row[:-1], 2, 2, causal=True, pre=True)
        targets += row[1:]
    M = M["encoder.items.weight"][:N]
    close(loss(model, SEQUENCES), oracle.step_ce(states, M, targets))


def test_a_table_of_zeros_knows_nothing():
    """BCE is 2 ln 2 a step, cross-entropy ln N: N classes, neither padding nor the mask among
    them.
    """
    for kind, options, expected in (
        ("SASRec", {"loss": "bce"}, 2 * math.log(2)), ("SASRec", {}, math.log(N)),
        ("GRU4Rec", {}, math.log(N)), ("Caser", {}, math.log(N)), ("BERT4Rec", {}, math.log(N)),
    ):
        model = make(kind, **options)
        with torch.no_grad():
            getattr(model, "encoder", model).items.weight.zero_()
            if kind == "BERT4Rec":
                model.bias.zero_()
        close(loss(model, SEQUENCES), expected)


def test_the_losses_have_the_gradients_that_differences_have():
    torch.manual_seed(1)
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: step_bce(s[0], s[1]), scores)
    states = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    M = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, m: step_ce(f, m, torch.arange(5)), (states, M))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_loss_has_the_gradient_that_differences_have(kind):
    """Along one direction through all weights at once; padding's row is held still."""
    model = make(kind)
    loss(model, SEQUENCES).backward()
    table = getattr(model, "encoder", model).items.weight
    assert torch.equal(table.grad[PAD], torch.zeros(D, dtype=torch.float64))
    torch.manual_seed(1)
    slope, ends = 0.0, []
    directions = [torch.randn_like(weight) for weight in model.parameters()]
    for weight, v in zip(model.parameters(), directions, strict=True):
        if weight is table:
            v[PAD] = 0
        slope += (weight.grad * v).sum().item()
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for weight, v in zip(model.parameters(), directions, strict=True):
                weight += step * v
        ends.append(loss(model, SEQUENCES).item())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_is_trained(kind):
    """But padding's row, a key's bias, which cancels in the softmax, and the mask token where there
    is none.
    """
    model = make(kind)
    for seed in range(5):
        loss(model, SEQUENCES, seed).backward()
    for name, weight in model.named_parameters():
        if not name.endswith("k.bias"):
            assert weight.grad.abs().max() > 1e-9, name
    table = getattr(model, "encoder", model).items.weight
    assert bool(table.grad[MASK].any()) == (kind in ("BERT4Rec", "CL4SRec"))


# ---- what is random ----


@pytest.mark.parametrize("kind", KINDS)
def test_all_draws_are_from_the_generator(kind):
    model = make(kind, dropout=0.3, **{"loss": "bce"} if "SASRec" in kind else {})
    state = torch.get_rng_state()
    first, again, other = (loss(model, SEQUENCES, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    users = torch.arange(3)
    assert torch.equal(model.state(users, SEQUENCES), model.state(users, SEQUENCES))


def test_dropout_keeps_the_mean():
    x = torch.full((200, 200), 3.0, dtype=torch.float64)
    kept = dropout(x, 0.25, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    # 40,000 draws: six standard errors are 6 * 4 * sqrt(0.1875 / 40000) = 0.052.
    assert kept.mean().item() == pytest.approx(3, abs=0.052)
    assert dropout(x, 0.25, None) is x


def test_dropout_reaches_each_of_its_places(monkeypatch):
    """SASRec: the sum of items and positions, then in each block attention and both parts."""
    places = []

    def record(x, p, generator):
        places.append(tuple(x.shape))
        return x

    monkeypatch.setattr("hanorec.baselines.attention.dropout", record)
    make("SASRec").encode(SEQUENCES)
    x = 3, L, D
    assert places == [x, *2 * [(3, 2, L, L), x, x]]


# ---- learning ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [("SASRec", {}), ("SASRec", {"loss": "bce"}), ("SASRec", {"norm": "post"}),
     ("CL4SRec", {"lam": 0.1}), ("GRU4Rec", {}), ("Caser", {}), ("BERT4Rec", {})],
)
def test_a_cycle_is_learnt(kind, options):
    """Item i is followed by i + 1 modulo 9: in the end every next item is ranked first."""
    model = make(kind, n_users=N, d=16, std=0.2, **options)
    sequences = (torch.arange(N)[:, None] + torch.arange(L + 1)) % N
    users, targets = torch.arange(N), sequences[:, -1]
    nothing = torch.empty(0, dtype=torch.int64)
    anything = NegativeSampler(nothing, nothing, N, N)
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(model.parameters(), 0.01)

    def hits():
        scores = model.state(users, sequences[:, :-1]) @ model.item_rows().T
        return (scores.argmax(1) == targets).double().mean().item()

    assert hits() < 0.5
    for step in range(500):
        if step % 10 == 0 and hits() == 1:
            break
        model.loss(users, sequences, anything, generator).backward()
        adam.step()
        adam.zero_grad()
    assert hits() == 1


# ---- GRU4Rec ----


@pytest.mark.equation("GR-1")
def test_gru4rec_matches_the_oracle():
    model = make("GRU4Rec")
    states, w = model.encode(SEQUENCES), numpy(model)
    for b, row in enumerate(ROWS):
        close(states[b, : len(row)], oracle.gru4rec(w, row))
    close(model.state(torch.zeros(3), SEQUENCES)[1], oracle.gru4rec(w, ROWS[1])[-1])


# ---- Caser ----


@pytest.mark.equation("CA-1")
def test_caser_matches_the_oracle():
    model = make("Caser")
    with torch.no_grad():
        model.items.weight[PAD] = 0.5  # what short windows end in is part of the state
    w, users = numpy(model), torch.tensor([2, 0, 3])
    states = model.state(users, SEQUENCES)
    windows = [ROWS[0][-4:], [*ROWS[1], PAD, PAD], ROWS[2]]
    for b, window in enumerate(windows):
        close(states[b], oracle.caser(w, users[b], window))


def test_casers_loss_is_over_all_windows():
    model, users = make("Caser"), torch.tensor([2, 0, 3])
    w, states, targets = numpy(model), [], []
    for user, row in zip(users, ROWS, strict=True):
        for cut in range(1, len(row)):
            window = row[max(0, cut - 4) : cut]
            states.append(oracle.caser(w, user, [*window, *[PAD] * (4 - len(window))]))
            targets.append(row[cut])
    expected = oracle.step_ce(states, w["items.weight"][:N], targets)
    close(loss(model, SEQUENCES, users=users), expected)


def test_a_window_of_one_item():
    """Then a filter across is a linear map with a relu, and one down a scaling."""
    torch.manual_seed(0)
    model = Caser(N, U, 1, D, 3, 2, 0.0).double()
    users, items = torch.tensor([1, 3]), torch.tensor([[4], [8]])
    M = model.items.weight[items[:, 0]]
    across = F.relu(M @ model.across[0].weight[:, :, 0].T + model.across[0].bias)
    down = M[:, None] * model.down.weight + model.down.bias[:, None]  # (2, n_v, d)
    z = F.relu(model.map_filters(torch.cat([down.flatten(1), across], 1)))
    expected = model.map_state(torch.cat([z, model.users.weight[users]], 1))
    close(model.state(users, items), expected.detach().numpy())


def test_padding_stays_zero():
    model = make("Caser", std=None)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    loss(model, SEQUENCES).backward()
    optimizer.step()
    assert not model.items.weight[PAD].any() and model.items.weight[3].any()


# ---- BERT4Rec ----


@pytest.mark.equation("BE-1")
def test_bert4rec_matches_the_oracle():
    model = make("BERT4Rec")
    states, w = model.encode(SEQUENCES), numpy(model)
    for b, row in enumerate(ROWS):
        close(states[b, : len(row), :-1], oracle.bert4rec(w, row, 2, 2))
    scores = states[0] @ model.item_rows().T
    close(scores, (states[0, :, :-1] @ model.encoder.items.weight[:N].T + model.bias).detach())


def test_bert4recs_state_is_that_of_the_mask_behind_the_items():
    model, users = make("BERT4Rec"), torch.zeros(3)
    states, w = model.state(users, SEQUENCES), numpy(model)
    for b, row in enumerate(ROWS):
        asked = [*row[-L:], MASK]
        close(states[b, :-1], oracle.bert4rec(w, asked, 2, 2)[-1])
    nothing = model.state(users[:1], padded([], width=2))
    close(nothing[0, :-1], oracle.bert4rec(w, [MASK], 2, 2)[0])


def test_bert4recs_loss_is_over_what_is_hidden():
    model = make("BERT4Rec")
    ours, w = loss(model, SEQUENCES, seed=5), numpy(model)
    # 0.4 of 6, 2 and 4 items, rounded, at least one
    counts = torch.tensor([2, 1, 2])
    hidden = scattered(SEQUENCES, counts, N, torch.Generator().manual_seed(5))
    states, targets = [], []
    for b, row in enumerate(ROWS):
        shown = [MASK if hidden[b, t] else item for t, item in enumerate(row)]
        for t, state in enumerate(oracle.bert4rec(w, shown, 2, 2)):
            if hidden[b, t]:
                states.append([*state, 1.0])
                targets.append(row[t])
    assert len(targets) == 5
    rows = np.column_stack([w["encoder.items.weight"][:N], w["bias"]])
    close(ours, oracle.step_ce(states, rows, targets))


def test_every_position_sees_every_other():
    model = make("BERT4Rec")
    before = model.encode(SEQUENCES)[..., :-1]
    for place in range(L):
        changed = SEQUENCES.clone()
        changed[0, place] = (changed[0, place] + 1) % N
        after = model.encode(changed)[..., :-1]
        assert (after[0] - before[0]).abs().max(1).values.min() > 1e-6
        assert torch.equal(after[1:], before[1:])


def test_what_is_hidden_is_uniform_and_distinct_and_never_padding():
    rows = SEQUENCES.repeat(4000, 1)
    counts = torch.tensor([2, 1, 4]).repeat(4000)
    hidden = scattered(rows, counts, N, torch.Generator().manual_seed(0))
    assert torch.equal(hidden.sum(1), counts)
    assert not hidden[rows == PAD].any()
    share = hidden.view(4000, 3, L).double().mean(0)  # (3, L)
    # Six standard errors of 4,000 draws: 6 sqrt(0.25 / 4000) = 0.047.
    close_to = torch.tensor([[1 / 3] * 6, [1 / 2] * 2 + [0] * 4, [1] * 4 + [0] * 2])
    assert (share - close_to).abs().max() < 0.047


# ---- what is refused ----


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_trained_or_asked_is_refused(kind):
    model, users = make(kind), torch.arange(2)
    with pytest.raises(InputError, match="sequence 1 of a batch: 1 items, expected at least 2"):
        loss(model, padded([1, 2, 3], [4]))
    if kind != "BERT4Rec":  # it has the mask token to ask
        with pytest.raises(InputError, match="sequence 1 of a batch: 0 items, expected at least 1"):
            model.state(users, padded([1, 2], []))


def test_a_user_without_a_vector_is_refused():
    for user in (-1, U):
        with pytest.raises(InputError, match=f"user {user}: expected 0 .. {U - 1}"):
            make("Caser").state(torch.tensor([0, user]), SEQUENCES[:2])


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="3 heads of a width of 4"):
        Encoder(N, L, 4, 1, 3, 0.0, "pre", causal=True)
    assert Block(6, 3, 0.0, "pre").heads == 3
