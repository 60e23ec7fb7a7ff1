r"""HN-3 against the oracle: neighbours, their order, exact ties, the bounds of K, blocks, half
precision, work and memory.
"""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hanorec import topk
from hanorec.topk import topk_neighbors

# Sums of a few products of these are exact in float32, so equal scores are equal bit for bit in any
# order of summation.
GRID = [-1.0, -0.5, 0.0, 0.5, 1.0]


def unit_rows(n, d, seed, dtype=torch.float64):
    e = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (e / e.norm(dim=1, keepdim=True)).to(dtype)


def check_against_oracle(e, k, atol, block=None):
    scores, index = topk_neighbors(e, k, block)
    expected_scores, expected_index = oracle.topk_neighbors(e.double().numpy(), k)
    assert scores.shape == index.shape == (len(e), k)
    assert scores.dtype == (torch.float64 if e.dtype == torch.float64 else torch.float32)
    assert index.dtype == torch.int64
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
    """Rows from a coarse grid tie all the time: duplicates, zero rows, opposite rows. Indices must
    match exactly, in blocks of any size.
    """
    rows = data.draw(
        st.lists(st.lists(st.sampled_from(GRID), min_size=d, max_size=d), min_size=n, max_size=n)
    )
    k = data.draw(st.integers(1, n - 1))
    check_against_oracle(
        torch.tensor(rows, dtype=torch.float32), k, 0, data.draw(st.integers(1, n + 1))
    )


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("k", [1, 3, 5])
def test_all_items_equal(k):
    """Six copies of one vector: every score is 1, so row i has the K smallest indices other than i.
    """
    _, index = topk_neighbors(torch.tensor([[0.0, 1.0]]).repeat(6, 1), k)
    for i, row in enumerate(index.tolist()):
        others = [j for j in range(6) if j != i]
        assert row == others[:k]


@pytest.mark.equation("HN-3")
def test_a_wide_tie_at_the_last_place():
    """3000 rows, (1, 0) and (0, 1) in turn: row 0 ties with 1499 copies, of which 2, 4, 6, 8 come
    first; torch.topk promises no order.
    """
    e = torch.eye(2).repeat(1500, 1)
    scores, index = topk_neighbors(e, 4)
    assert index[0].tolist() == [2, 4, 6, 8]
    assert index[2999].tolist() == [1, 3, 5, 7]
    assert scores.eq(1).all()


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_item_is_never_its_own_neighbour(dtype):
    """Also among duplicates, where another row scores exactly as high as the row itself, and at
    both bounds of K.
    """
    e = unit_rows(20, 5, 2, dtype).repeat(2, 1)
    for k in (1, 7, 39):
        _, index = topk_neighbors(e, k)
        assert not (index == torch.arange(40)[:, None]).any()
        assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.equation("HN-3")
def test_duplicates_of_random_rows_are_each_others_first_neighbours():
    """30 random rows, each twice: row i and row i + 30 are at cosine 1, everything else is below
    it.
    """
    e = unit_rows(30, 9, 3).repeat(2, 1)
    scores, index = topk_neighbors(e, 3)
    assert index[:, 0].tolist() == list(range(30, 60)) + list(range(30))
    np.testing.assert_allclose(scores[:, 0].numpy(), 1, atol=1e-14)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("block", [1, 4, 11, 12])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_blocks_do_not_show(block, k):
    """11 items in blocks that divide 11, do not, equal it and exceed it; K below and above the
    block, up to N - 1.
    """
    check_against_oracle(unit_rows(11, 4, 4), k, 1e-14, block)
    check_against_oracle(torch.eye(3, dtype=torch.float64).repeat(4, 1)[:11], k, 0, block)


@pytest.mark.equation("HN-3")
def test_rows_along_an_arc():
    """A row's neighbours stand beside it: every block improves on the last for the last row, none
    after the first for the first row.
    """
    angle = torch.linspace(0, 1.2, 23, dtype=torch.float64) ** 2  # uneven steps: no ties
    check_against_oracle(torch.stack([angle.cos(), angle.sin()], 1), 4, 1e-14, 5)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("broken", ["rows alone", "later first"])
def test_the_check_can_fail(broken, monkeypatch):
    """Negative control: a kernel that forgets the transposed half, and one that lets a later equal
    score in, do not match the oracle.
    """
    keep_best = topk.keep_best

    def rows_alone(best, index, s, first):
        if s.is_contiguous():
            keep_best(best, index, s, first)

    def later_first(best, index, s, first):
        best -= 1e-9  # then an equal score beats it
        keep_best(best, index, s, first)

    monkeypatch.setattr(topk, "keep_best", rows_alone if broken == "rows alone" else later_first)
    with pytest.raises(AssertionError):
        check_against_oracle(torch.eye(3, dtype=torch.float64).repeat(5, 1), 3, 1e-7, 4)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_summed_in_float32(dtype):
    """The products of the rounded rows to float32's rounding, not to the half's, which is what a
    product in that precision gives.
    """
    e = unit_rows(40, 50, 9, dtype)
    check_against_oracle(e, 10, 1e-6, 16)
    _, expected = oracle.topk_neighbors(e.double().numpy(), 10)
    in_half = (e @ e.T).gather(1, torch.from_numpy(expected)).double()
    exact = torch.einsum("nkd,nd->nk", e.double()[torch.from_numpy(expected)], e.double())
    assert (in_half - exact).abs().max() > 1e-5


@pytest.mark.equation("HN-3")
def test_a_pair_has_one_score():
    """In float32, where rounding could differ: at K = N - 1 the scores form a matrix equal to its
    transpose, bit for bit.
    """
    scores, index = topk_neighbors(unit_rows(50, 33, 10, torch.float32), 49, 16)
    s = torch.zeros(50, 50).scatter(1, index, scores)
    assert torch.equal(s, s.T)


@pytest.mark.equation("HN-3")
def test_the_same_answer_each_time():
    """Bit for bit in the same blocks; in other blocks the same neighbours (no ties here) and scores
    up to rounding.
    """
    e = unit_rows(300, 64, 11, torch.float32)
    scores, index = topk_neighbors(e, 10, 64)
    again = topk_neighbors(e, 10, 64)
    assert torch.equal(scores, again[0]) and torch.equal(index, again[1])
    for block in (37, 299, 300):
        other = topk_neighbors(e, 10, block)
        assert torch.equal(index, other[1])
        np.testing.assert_allclose(other[0], scores, rtol=0, atol=1e-6)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize(
    ("block", "pairs"),
    [(100, 100 * 100), (25, 10 * 25 * 25), (30, 6 * 30 * 30 + 3 * 30 * 10 + 10 * 10)],
)
def test_each_block_is_computed_once(block, pairs):
    """100 rows: 4 blocks of 25 make 4 * 5 / 2 = 10 products; 3 of 30 and one of 10 make 6 square
    ones, 3 narrow, 1 small.
    """
    with FlopCounterMode(display=False) as counter:
        topk_neighbors(unit_rows(100, 8, 12), 5, block)
    assert counter.get_total_flops() == 2 * 8 * pairs


class Largest(TorchDispatchMode):
    """The largest number of bytes of any tensor made inside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("copies", [False, True])
def test_memory_is_some_blocks(copies):
    """1000 rows in blocks of 50, K = 2: no tensor is larger than the merged rows of a block, 50 x
    (2 + 50) of int64, as the ties of many copies need them. A row of blocks, 50 x 1000, would be
    ten times that; e and the results, 1000 x 2, are smaller.
    """
    e = unit_rows(1000, 4, 13, torch.float32)
    with Largest() as largest:
        topk_neighbors(e[:3].repeat(334, 1)[:1000] if copies else e, 2, 50)
    assert 50 * 50 * 4 <= largest.size <= 50 * (2 + 50) * 8


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
@pytest.mark.parametrize("block", [2, 5])
def test_a_row_that_is_not_finite_is_named(bad, block):
    e = unit_rows(5, 3, 8)
    e[3, 1] = bad
    with pytest.raises(ValueError, match="row 3"):
        topk_neighbors(e, 2, block)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("block", [0, -4])
def test_block_out_of_range(block):
    with pytest.raises(ValueError, match="block"):
        topk_neighbors(unit_rows(5, 3, 8), 2, block)
