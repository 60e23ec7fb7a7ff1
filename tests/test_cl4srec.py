"""CL4SRec: the three operators, the contrast, and SASRec inside it (CL-1 .. CL-5)."""

import math
from collections import Counter

import oracle_sequential as oracle
import pytest
import torch
from toy_sequences import CONTRAST, MASK, PAD, L, N, loss, make, numpy, padded, sampler

from hanorec.base.errors import InputError
from hanorec.baselines.cl4srec import (
    CL4SRec,
    contrastive_loss,
    crop,
    floor_share,
    mask,
    offspring,
    reorder,
)
from hanorec.baselines.sequential import SASRec

ROWS = [[0, 1, 2, 3, 4], [5, 6, 7], [8]]
MANY = padded(*ROWS).repeat(2000, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def items(view):
    """Rows without their padding."""
    return [[item for item in row if item != PAD] for row in view.tolist()]


def shares(found):
    """Of 2,000 draws. Six standard errors are at most 6 sqrt(0.25 / 2000) = 0.067."""
    return {key: count / 2000 for key, count in found.items()}


def test_nothing_kept_back_is_the_identity():
    sequences = padded(*ROWS)
    for operator, share in ((crop, 1.0), (mask, 0.0), (reorder, 0.0)):
        assert torch.equal(operator(sequences, share, N, generator()), sequences)


@pytest.mark.equation("CL-1")
def test_a_crop_is_a_run_at_a_uniform_start():
    """floor(0.6 n) items: 3 of 5, 1 of 3, and 1 of 1, where it would be none."""
    found = Counter(tuple(row) for row in items(crop(MANY, 0.6, N, generator())))
    starts = [(0, 1, 2), (1, 2, 3), (2, 3, 4)]
    assert found.keys() == {*starts, (5,), (6,), (7,), (8,)}
    share = shares(found)
    assert share.pop((8,)) == 1
    assert all(abs(value - 1 / 3) < 0.067 for value in share.values())


@pytest.mark.equation("CL-2")
def test_a_mask_hides_so_many_items_uniformly():
    view = mask(MANY, 0.7, N, generator())
    hidden = view == MASK
    assert torch.equal(view[~hidden], MANY[~hidden])
    assert hidden.view(2000, 3, 5).sum(2).unique(dim=0).tolist() == [[3, 2, 0]]
    share = hidden.view(2000, 3, 5).double().mean(0)
    expected = torch.tensor([[0.6] * 5, [2 / 3] * 3 + [0] * 2, [0] * 5])
    assert (share - expected).abs().max() < 0.067


@pytest.mark.equation("CL-3")
def test_a_reordered_run_is_shuffled_uniformly_and_all_else_stays():
    """floor(0.6 n) items: a run of 3 of 5 in 3 places and 6 orders each, the identity among
    them; a run of 1 of 3, and of 0 of 1, which change nothing.
    """
    rows = items(reorder(MANY, 0.6, N, generator()))
    found = Counter(tuple(row) for row in rows)
    share = shares(found)
    assert share.pop((5, 6, 7)) == share.pop((8,)) == 1
    assert all(sorted(row) == ROWS[0] for row in share)
    # Runs 012, 123, 234: 4 of the 6 orders of each move its first or its last item, so they
    # belong to it alone or to it and another one.
    expected = Counter()
    for start in range(3):
        for order in torch.cartesian_prod(*3 * [torch.arange(3)]).tolist():
            if len(set(order)) == 3:
                row = [0, 1, 2, 3, 4]
                row[start : start + 3] = [start + place for place in order]
                expected[tuple(row)] += 1 / 18
    assert share.keys() == expected.keys()
    assert all(abs(share[row] - expected[row]) < 0.067 for row in expected)


def test_sources_and_padding_stay_as_they_are():
    before = MANY.clone()
    for operator in (crop, mask, reorder):
        view = operator(MANY, 0.5, N, generator())
        assert not ((view != PAD) & (MANY == PAD)).any()
        assert torch.equal(MANY, before)


def test_shares_are_taken_as_decimals():
    """0.29 x 100 = 28.999999999999996 in binary."""
    n = torch.tensor([100, 10, 5, 1])
    assert floor_share(n, 0.29).tolist() == [29, 2, 1, 0]
    assert floor_share(n, 0.7).tolist() == [70, 7, 3, 0]


@pytest.mark.equation("CL-4")
@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_the_contrast_matches_the_oracle(tau):
    torch.manual_seed(0)
    one, other = torch.randn(2, 7, 4, dtype=torch.float64)
    ours = contrastive_loss(one, other, tau).item()
    assert ours == pytest.approx(oracle.contrastive(one, other, tau), rel=1e-12)
    swapped = contrastive_loss(other, one, tau).item()
    assert ours == pytest.approx(swapped, rel=1e-12)
    partners_apart = contrastive_loss(one, other.roll(1, 0), tau).item()
    assert abs(ours - partners_apart) > 0.01


def test_the_contrast_of_equal_states_is_ln_of_the_others():
    """ln 13 = 2.564949 at 7 users; one user has no other to be told from."""
    z = torch.zeros(7, 4, dtype=torch.float64)
    assert contrastive_loss(z, z, 1.0).item() == pytest.approx(math.log(13), rel=1e-12)
    assert contrastive_loss(z[:1], z[:1], 1.0).item() == 0


def test_the_contrast_has_the_gradient_that_differences_have():
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: contrastive_loss(z[0], z[1], 0.5), z)


def test_the_two_views_are_by_different_operators():
    """A view of five items tells its operator: cropped to 3, masked, or neither."""
    model = make("CL4SRec")
    sequences = padded(ROWS[0]).repeat(600, 1)
    pairs = Counter()
    for one, other in zip(*model.views(sequences, generator()), strict=True):
        kinds = ["crop" if PAD in v else "mask" if MASK in v else "reorder" for v in (one, other)]
        pairs[tuple(kinds)] += 1
    assert len(pairs) == 6 and all(one != other for one, other in pairs)
    # 600 draws of 6 pairs: 100 each, standard error 9.1
    assert all(abs(count - 100) < 55 for count in pairs.values())


@pytest.mark.equation("CL-5")
def test_the_loss_matches_the_oracle():
    rows = [[3, 1, 4, 1, 5, 8], [2, 7], [6, 0, 2, 6]]
    model = make("CL4SRec", tau=0.5)
    ours = loss(model, padded(*rows), seed=4).item()
    w = oracle.part(numpy(model), "encoder")

    def encode(row):
        return oracle.encoder(w, row, 2, 2, causal=True, pre=True)

    states, targets = [], []
    for row in rows:
        states += encode(row[:-1])
        targets += row[1:]
    sas = oracle.step_ce(states, w["items.weight"][:N], targets)
    inputs = padded(*[row[:-1] for row in rows])
    # Nothing was drawn before, since there is no dropout.
    made = model.views(inputs, offspring(generator(4)))
    z = [[encode(row)[-1] for row in items(view)] for view in made]
    expected = sas + CONTRAST["lam"] * oracle.contrastive(*z, 0.5)
    assert ours == pytest.approx(expected, rel=1e-9)


def test_the_target_is_in_no_view():
    """Another last item changes SASRec's part alone, by the same whatever lambda is."""
    one, other = padded([0, 1, 2, 3], [4, 5, 6]), padded([0, 1, 2, 8], [4, 5, 7])
    gaps = []
    for lam in (0.0, 3.0):
        model = make("CL4SRec", lam=lam)
        gaps.append((loss(model, one) - loss(model, other)).item())
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-9) and abs(gaps[0]) > 0.01
    contrast = [loss(make("CL4SRec", lam=lam), one).item() for lam in (0.0, 3.0)]
    assert abs(contrast[0] - contrast[1]) > 0.01


def trained(kind, lam=None):
    """The weights after five steps with dropout, in float32, and the state of the generator."""
    torch.manual_seed(0)
    sequences = padded([3, 1, 4, 1, 5, 8], [2, 7], [6, 0, 2, 6])
    sizes = N, L, 4, 2, 2, 0.3, "pre", "bce"
    model = SASRec(*sizes) if lam is None else CL4SRec(*sizes, **CONTRAST | {"lam": lam})
    drawn, adam = generator(), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(5):
        model.loss(torch.arange(3), sequences, sampler(), drawn).backward()
        adam.step()
        adam.zero_grad()
    return torch.cat([w.flatten() for w in model.parameters()]), drawn.get_state()


def test_without_weight_for_the_contrast_it_is_sasrec_bit_for_bit():
    weights, state = trained("SASRec")
    for lam, equal in ((0.0, True), (0.5, False)):
        others, after = trained("CL4SRec", lam)
        assert torch.equal(others, weights) == equal
        assert torch.equal(after, state)


def test_the_augmentation_follows_from_the_generators_state():
    """So a run that goes on from a checkpoint draws what it would have drawn."""
    parent = generator(7)
    before = parent.get_state()
    draws = [torch.rand(3, generator=offspring(parent)) for _ in range(2)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(parent.get_state(), before)
    assert not torch.equal(torch.rand(3, generator=parent), draws[0])
    assert not torch.equal(torch.rand(3, generator=offspring(parent)), draws[0])


def test_a_row_without_an_item_has_no_view():
    with pytest.raises(InputError, match="sequence 1 of a batch: 0 items"):
        crop(padded([1], []), 0.6, N, generator())
