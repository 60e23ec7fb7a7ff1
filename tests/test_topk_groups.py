"""HN-3 by groups of columns, the way of a GPU, here forced on a CPU: the oracle, ties whatever
torch.topk makes of them, shapes that nothing divides, no question to the device, memory.
"""

import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hanorec import topk, topk_groups
from hanorec.topk import topk_neighbors
from hanorec.topk_groups import keep_best_by_groups

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import topk as benchmark

pytestmark = pytest.mark.equation("HN-3")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EXACT = {"atol": 0, "rtol": 0}


def whole_numbers(n, d, seed, dtype=torch.float32, most=2):
    """Rows of small whole numbers: every product is exact in any type, and ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (n, d), generator=generator).to(dtype)


def unit_rows(n, d, seed, dtype=torch.float64):
    e = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (e / e.norm(dim=1, keepdim=True)).to(dtype)


def check_against_oracle(e, k, block=None, atol=0.0):
    scores, index = topk_neighbors(e, k, block, by_groups=True)
    expected_scores, expected_index = oracle.topk_neighbors(e.double().numpy(), k)
    assert scores.dtype == torch.promote_types(e.dtype, torch.float32)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(scores, expected_scores, atol=atol, rtol=0)


def check_against_plain(e, k, block=None):
    """Against the way of a CPU, which test_topk.py proves: to the bit, where products are exact."""
    found, expected = topk_neighbors(e, k, block, by_groups=True), topk_neighbors(e, k)
    torch.testing.assert_close(found, expected, **EXACT)


# ---- what is found ----


@pytest.mark.parametrize("block", [None, 7, 16])
@pytest.mark.parametrize("k", [1, 10, 46])
def test_neighbours_match_the_oracle(k, block):
    """47 rows at both bounds of K; a block above N, blocks that do not divide it."""
    check_against_oracle(unit_rows(47, 6, 1), k, block, atol=1e-14)
    check_against_oracle(whole_numbers(47, 2, 1), k, block)


@given(
    n=st.integers(2, 24), d=st.integers(1, 3), dtype=st.sampled_from(DTYPES), data=st.data(),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_any_shape_and_type(n, d, dtype, data):
    k, block = data.draw(st.integers(1, n - 1)), data.draw(st.integers(1, n + 1))
    check_against_oracle(whole_numbers(n, d, data.draw(st.integers(0, 99)), dtype), k, block)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_groups(dtype):
    """1,003 rows, K = 3: groups of 8 and 16 columns, or of 1 and 2 where the last block is narrow;
    rows with a score of their own, and ties at the K-th place of nearly every row.
    """
    check_against_plain(whole_numbers(1003, 2, 2, dtype), 3, 200)
    check_against_plain(whole_numbers(1003, 3, 2, dtype, most=4), 3, 111)


def test_all_rows_equal():
    e = torch.tensor([[0.0, 1.0]]).repeat(601, 1)
    for k in (1, 9, 600):
        _, index = topk_neighbors(e, k, 64, by_groups=True)
        others = torch.arange(k).expand(601, k)  # the K smallest but for the row itself
        assert torch.equal(index, others + (others >= torch.arange(601)[:, None]))


def test_half_precision_rows_are_summed_in_float32():
    for dtype in DTYPES[:2]:
        check_against_oracle(unit_rows(90, 40, 3, dtype), 5, 16, atol=1e-6)


def test_a_pair_has_one_score():
    scores, index = topk_neighbors(unit_rows(50, 33, 4, torch.float32), 49, 8, by_groups=True)
    s = torch.zeros(50, 50).scatter(1, index, scores)
    assert torch.equal(s, s.T)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_what_is_refused(bad):
    e = unit_rows(5, 3, 5)
    for k, block, words in [(0, None, r"1 \.\. 4"), (5, None, r"1 \.\. 4"), (2, 0, "block = 0")]:
        with pytest.raises(ValueError, match=words):
            topk_neighbors(e, k, block, by_groups=True)
    e[3, 1] = bad
    with pytest.raises(ValueError, match="row 3"):
        topk_neighbors(e, 2, 2, by_groups=True)


# ---- one block ----


@given(
    r=st.integers(1, 5), c=st.integers(1, 200), k=st.integers(1, 30), levels=st.integers(1, 9),
    seed=st.integers(0, 99), columns=st.booleans(),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_a_block_enters_the_lists_as_on_a_cpu(r, c, k, levels, seed, columns):
    """Blocks as rows and as columns, of a few different scores, some of them masked; lists that are
    empty, half full and full.
    """
    generator = torch.Generator().manual_seed(seed)
    s = torch.randint(levels, (c, r) if columns else (r, c), generator=generator).float()
    s[torch.rand(s.shape, generator=generator) < 0.1] = -torch.inf
    s = s.T if columns else s
    best = torch.randint(levels, (r, k), generator=generator).float()
    best = best.sort(dim=1, descending=True).values
    best[:, int(torch.randint(k + 1, (), generator=generator)) :] = -torch.inf
    index = torch.arange(k).repeat(r, 1).masked_fill(best.isinf(), 0)
    found, expected = [best, index], [best.clone(), index.clone()]
    keep_best_by_groups(*found, s, k)
    topk.keep_best(*expected, s, k)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.fixture
def any_topk(monkeypatch):
    """torch.topk that takes any of equal numbers, other ones each time."""
    own, generator = torch.Tensor.topk, torch.Generator().manual_seed(6)

    def shuffled(x, k, dim=-1, largest=True, sorted=True):
        at = torch.randperm(x.shape[-1], generator=generator)
        value, place = own(x[..., at], k, largest=largest)
        order = torch.arange(k) if sorted else torch.randperm(k, generator=generator)
        return torch.return_types.topk((value[..., order], at[place[..., order]]))

    monkeypatch.setattr(torch.Tensor, "topk", shuffled)


def test_ties_do_not_depend_on_torch_topk(any_topk):
    """Control: its own choice among the copies of a number does change."""
    for seed in range(5):
        check_against_oracle(whole_numbers(60, 2, seed), 1 + 2 * seed, 10 + 9 * seed)
    same = torch.ones(50)
    assert not torch.equal(same.topk(5).indices.sort().values, same.topk(5).indices.sort().values)


@pytest.mark.parametrize("broken", ["numbers of groups", "a group too few", "any of equal ones"])
def test_the_check_can_fail(broken, monkeypatch):
    """Negative controls: groups with equal maxima by their numbers, not by where these stand; K - 1
    groups; members of equal score in the order in which torch.topk finds them.
    """

    def by_number(members, k):
        maxima = members.amax(1)
        return topk_groups.places_of_best(maxima, torch.arange(maxima.shape[1]), k)

    first_groups, places = topk_groups.first_groups, topk_groups.places_of_best
    changes = {
        "numbers of groups": ("first_groups", by_number),
        "a group too few": ("first_groups", lambda m, k: first_groups(m, k - 1)),
        "any of equal ones": ("places_of_best", lambda x, order, k: places(x, -order % 97, k)),
    }
    e = whole_numbers(90, 2, 7)
    check_against_oracle(e, 4)
    monkeypatch.setattr(topk_groups, *changes[broken])
    with pytest.raises(AssertionError):
        check_against_oracle(e, 4)


# ---- what it costs ----


class Watched(TorchDispatchMode):
    """The operations inside, and the most bytes that tensors made there hold at once."""

    def __init__(self, given):
        super().__init__()
        self.given, self.held, self.now = given.untyped_storage()._cdata, {}, 0
        self.most = self.largest = 0
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.name().removeprefix("aten::").partition(".")[0]] += 1
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return made

    def hold(self, tensor):
        """Views share a storage, which lives as long as the last of them."""
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if key == self.given:
            return
        users, _ = self.held.get(key, (0, 0))
        self.held[key] = users + 1, size
        self.now += 0 if users else size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)
        weakref.finalize(tensor, self.drop, key)

    def drop(self, key):
        users, size = self.held.pop(key)
        if users > 1:
            self.held[key] = users - 1, size
        else:
            self.now -= size


ASKS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique"}


def test_a_block_asks_the_device_nothing():
    """So that the CPU can launch the next block while this one runs. And the launches are counted:
    they do not depend on what the block holds. Control: the way of a CPU does ask.
    """
    counts = []
    for seed, keep in [(8, keep_best_by_groups), (9, keep_best_by_groups), (8, topk.keep_best)]:
        e = whole_numbers(300, 2, seed)
        best, index = torch.full((300, 4), -torch.inf), torch.zeros(300, 4, dtype=torch.int64)
        with Watched(e) as watched:
            keep(best, index, e @ e.T, 0)
        counts.append(watched.operations)
    assert counts[0] == counts[1] and not ASKS & counts[0].keys()
    assert {"nonzero", "_local_scalar_dense"} <= counts[2].keys()


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 10), (torch.float32, 100),
                                          (torch.bfloat16, 10), (torch.float64, 100)])
def test_memory_at_full_size(dtype, k, monkeypatch):
    """60,000 x 1536 in the default blocks, on torch's device that has shapes and no numbers (and
    that fails where one is asked for): with the results below 2 GB, of which two blocks are most.
    What stands beside the results does not grow with N.
    """
    monkeypatch.setattr(topk, "first_not_finite", len)  # asked once, before the first block
    e = torch.empty(60_000, 1536, dtype=dtype, device="meta")
    with Watched(e) as watched:
        topk_neighbors(e, k)
    assert watched.operations["max"] and not ASKS & watched.operations.keys()  # by groups
    assert topk.BLOCK_GPU**2 * 4 < watched.most < 2e9


def test_memory_is_a_block_and_a_part_of_it():
    """2,000 rows in blocks of 100 x 300, K = 2: groups of 16 columns and of 8 rows. No tensor is
    larger than the block, of which two exist at times; e and the results are as small.
    """
    e = unit_rows(2000, 4, 10, torch.float32)
    with Watched(e) as watched:
        scores, index = topk_neighbors(e, 2, 100, by_groups=True)
    results = scores.untyped_storage().nbytes() + index.untyped_storage().nbytes()
    assert 2 * 100 * 300 * 4 < watched.most - results < 3 * 100 * 300 * 4
    assert watched.largest == 100 * 300 * 4


def test_the_table_of_the_benchmark(capsys, monkeypatch):
    """Its rows and its refusal: another answer than plain torch's gives no row."""
    monkeypatch.setattr(benchmark, "TOYS", [(90, 8, "float32"), (70, 8, "bfloat16")])
    rows = benchmark.table("cpu", toy=True, k=3, queries=40, rounds=1)
    assert [(row.rows, row.dtype) for row in rows] == [(90, "float32"), (70, "bfloat16")]
    assert len(capsys.readouterr().out.splitlines()) == 4
    wrong = torch.arange(50, 54).expand(40, 4)
    monkeypatch.setattr(benchmark, "plain", lambda e, queries, k: wrong)
    with pytest.raises(SystemExit, match="other neighbours"):
        benchmark.table("cpu", toy=True, k=3, queries=40, rounds=1)


def test_the_way_that_suits_the_device():
    rows, columns, keep = topk.way(torch.empty(2, 2), None, None)
    assert rows == columns == topk.BLOCK_CPU and keep is topk.keep_best
    rows, columns, keep = topk.way(torch.empty(2, 2, device="meta"), None, None)
    assert (rows, columns) == (8192, 24576) and keep is keep_best_by_groups
    assert topk.way(torch.empty(2, 2), 5, None)[:2] == (5, 5)
    assert topk.way(torch.empty(2, 2), 5, True)[:2] == (5, 15)
