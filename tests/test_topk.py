r"""HN-3 against the oracle: neighbours, their order, exact ties, the bounds of K, blocks of rows."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanorec import topk
from hanorec.topk import topk_neighbors

# Sums of a few products of these are exact in float32, so equal scores are equal bit for bit in any order of summation.
GRID = [-1.0, -0.5, 0.0, 0.5, 1.0]


def unit_rows(n, d, seed, dtype=torch.float64):
    e = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (e / e.norm(dim=1, keepdim=True)).to(dtype)


def check_against_oracle(e, k, atol):
    scores, index = topk_neighbors(e, k)
    expected_scores, expected_index = oracle.topk_neighbors(e.double().numpy(), k)
    assert scores.shape == index.shape == (len(e), k)
    assert scores.dtype == e.dtype and index.dtype == torch.int64
    np.testing.assert_array_equal(index.numpy(), expected_index)
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=0, atol=atol)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("k", [1, 2, 10, 39])
def test_neighbours_match_the_oracle(k, dtype, atol):
    """40 items, K from 1 to N - 1. At K = N - 1 every other item is a neighbour."""
    check_against_oracle(unit_rows(40, 7, 1, dtype), k, atol)


@pytest.mark.equation("HN-3")
@given(n=st.integers(2, 12), d=st.integers(1, 3), data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_exact_ties_go_to_the_smaller_row(n, d, data):
    """Rows from a coarse grid tie all the time: duplicates, zero rows, opposite rows. Indices must match exactly."""
    rows = data.draw(st.lists(st.lists(st.sampled_from(GRID), min_size=d, max_size=d), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n - 1))
    check_against_oracle(torch.tensor(rows, dtype=torch.float32), k, 0)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("k", [1, 3, 5])
def test_all_items_equal(k):
    """Six copies of one vector: every score is 1, so row i has the K smallest indices other than i."""
    _, index = topk_neighbors(torch.tensor([[0.0, 1.0]]).repeat(6, 1), k)
    assert index.tolist() == [[j for j in range(6) if j != i][:k] for i in range(6)]


@pytest.mark.equation("HN-3")
def test_a_wide_tie_at_the_last_place():
    """3000 rows, (1, 0) and (0, 1) in turn: row 0 ties with 1499 copies, of which 2, 4, 6, 8 come first; torch.topk promises no order."""
    e = torch.eye(2).repeat(1500, 1)
    scores, index = topk_neighbors(e, 4)
    assert index[0].tolist() == [2, 4, 6, 8]
    assert index[2999].tolist() == [1, 3, 5, 7]
    assert scores.eq(1).all()


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_item_is_never_its_own_neighbour(dtype):
    """Also among duplicates, where another row scores exactly as high as the row itself, and at both bounds of K."""
    e = unit_rows(20, 5, 2, dtype).repeat(2, 1)
    for k in (1, 7, 39):
        _, index = topk_neighbors(e, k)
        assert not (index == torch.arange(40)[:, None]).any()
        assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.equation("HN-3")
def test_duplicates_of_random_rows_are_each_others_first_neighbours():
    """30 random rows, each twice: row i and row i + 30 are at cosine 1, everything else is below it."""
    e = unit_rows(30, 9, 3).repeat(2, 1)
    scores, index = topk_neighbors(e, 3)
    assert index[:, 0].tolist() == list(range(30, 60)) + list(range(30))
    np.testing.assert_allclose(scores[:, 0].numpy(), 1, atol=1e-14)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("block", [1, 4, 11, 12])
def test_blocks_of_rows_do_not_show(block, monkeypatch):
    """11 items in blocks that divide 11, do not, equal it and exceed it; the row's own column moves with the block."""
    monkeypatch.setattr(topk, "ROWS_PER_BLOCK", block)
    check_against_oracle(unit_rows(11, 4, 4), 5, 1e-14)
    check_against_oracle(torch.eye(3, dtype=torch.float64).repeat(4, 1)[:11], 5, 0)


@pytest.mark.equation("HN-3")
def test_scores_are_the_inner_products_at_the_indices():
    e = unit_rows(25, 6, 5)
    scores, index = topk_neighbors(e, 24)
    np.testing.assert_allclose(scores, (e[:, None] * e[index]).sum(2), atol=1e-14)
    assert (scores[:, 1:] <= scores[:, :-1]).all()


@pytest.mark.equation("HN-3")
def test_no_gradient():
    scores, _ = topk_neighbors(unit_rows(5, 3, 6).requires_grad_(), 2)
    assert not scores.requires_grad


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("k", [0, -1, 5, 6])
def test_k_out_of_range(k):
    """Five items have at most four neighbours; the message says so."""
    with pytest.raises(ValueError, match=r"1 \.\. 4"):
        topk_neighbors(unit_rows(5, 3, 7), k)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(bad):
    e = unit_rows(5, 3, 8)
    e[3, 1] = bad
    with pytest.raises(ValueError, match="row 3"):
        topk_neighbors(e, 2)
