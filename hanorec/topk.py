"""The Top-K similarity kernel: HN-3, the clusters of HaRS.

    for each block (I, J), I <= J, of the symmetric matrix e e^T:
        compute it once
        its columns serve the rows J, its rows the rows I: each keeps the K best it has met

Half the products of a full matrix, and a few blocks of memory instead of one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hanorec.base.errors import InputError
from hanorec.topk_groups import keep_best_by_groups

# Rows of a block. 992 is a multiple of 32, as the matrix product likes it, and no power of two:
# with a stride of 1024 numbers the entries of a column share a few cache lines, and reading the
# block by columns takes five times as long. A GPU needs more work a launch: there a block is three
# times as wide as high, 0.8 GB in float32, and two exist while the next one is made.
BLOCK_CPU, BLOCK_GPU = 992, 8192
Keep = Callable[[Tensor, Tensor, Tensor, int], None]


@torch.no_grad()
def topk_neighbors(
    e: Tensor, k: int, block: int | None = None, by_groups: bool | None = None
) -> tuple[Tensor, Tensor]:
    r"""N_K(i): the K items most similar to item i, itself excluded.

    Args:
        e: (N, d) unit rows, floating point; any device.
        k: K, 1 <= K <= N - 1.
        block: rows of a block, 1 or more; default BLOCK_CPU or BLOCK_GPU. Tensors beside e and the
            results hold 3 block (block + K) numbers at once, about 8 where most rows tie at their
            K-th place; a CPU widens half-precision rows, two blocks at a time. By groups: below
            2 GB at the default, for K up to 100.
        by_groups: how a block enters the lists: topk_groups.py, the default on a GPU, or
            `keep_best` here, on a CPU. What is promised is the same.
    Returns:
        scores (N, K) descending, in float32 or wider (products of half-precision rows are summed in
        float32); index (N, K) int64. Equal scores: the smaller index first.
        Promised: exactly the K best of the similarities as the matrix product rounds them, whatever
        the block; one number for s_ij and s_ji; the same answer each time on the same machine and
        threads. Not promised: how the product rounds. It may round equal rows differently, and
        otherwise in another block, so scores apart by rounding alone stand in either order.
    Raises:
        InputError: K or block out of range, or a row that is not finite.
    Source: document 000, section 2.1, HaRS; paper eq. (4).
    """
    n, wide = len(e), torch.promote_types(e.dtype, torch.float32)
    rows, columns, keep = way(e, block, by_groups)
    check(n, k, first_not_finite(e))
    best = e.new_full((n, k), -torch.inf, dtype=wide)  # (N, K)
    index = torch.zeros(n, k, dtype=torch.int64, device=e.device)  # (N, K)
    for i in range(0, n, rows):
        for j in range(i, n, columns):
            I, J = slice(i, i + rows), slice(j, j + columns)
            # HN-3: N_K(i) = \operatorname{top-}K_{j \ne i} s_{ij},
            #       s_{ij} = \langle e_i, e_j \rangle
            s = products(e[I], e[J], wide)  # (b_I, b_J)
            if i == j:  # a pair once, an item with itself never
                met = torch.ones_like(s[:, :rows], dtype=torch.bool).tril_()  # (b_I, b_I)
                s[:, :rows].masked_fill_(met, -torch.inf)
            # In this order each row meets the others by rising index: first those above it, as
            # columns, then those below.
            keep(best[J], index[J], s.T, i)
            keep(best[I], index[I], s, j)
    return best, index


def way(e: Tensor, block: int | None, by_groups: bool | None) -> tuple[int, int, Keep]:
    """Rows and columns of a block and how it enters the lists; by default as suits the device."""
    if block is not None and block < 1:
        raise InputError(f"block = {block} rows: expected 1 or more; leave it out for the default")
    if by_groups is None:
        by_groups = e.device.type != "cpu"
    if by_groups:
        rows = block or (BLOCK_GPU // 2 if e.dtype == torch.float64 else BLOCK_GPU)
        return rows, 3 * rows, keep_best_by_groups
    return block or BLOCK_CPU, block or BLOCK_CPU, keep_best


def first_not_finite(e: Tensor) -> int:
    """The number of the first row that holds NaN or infinity; N where there is none."""
    broken = ~(e.amin(1).isfinite() & e.amax(1).isfinite())  # (N,); e.isfinite() would copy e
    return int(broken.nonzero()[0]) if broken.any() else len(e)


def check(n: int, k: int, broken: int) -> None:
    """InputError for a K out of range, or where the first row that is not finite is one of N."""
    if not 1 <= k <= n - 1:
        raise InputError(
            f"K = {k} neighbours of {n} items: K must lie in 1 .. {n - 1}; choose a smaller K"
        )
    if broken < n:
        raise InputError(f"row {broken} of the embeddings is not finite; mend the features")


def products(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a b^T in `wide`: half precision stays so on a GPU, whose products sum in float32.

    On a CPU it is widened first.
    """
    if a.is_cuda and a.dtype != wide:
        return torch.mm(a, b.T, out_dtype=wide)
    return a.to(wide) @ b.to(wide).T


def keep_best(best: Tensor, index: Tensor, s: Tensor, first: int) -> None:
    """Merge s (r, c), the scores of columns first .. first + c - 1, into best and index (r, K).

    These hold smaller columns alone.
    """
    k = best.shape[1]
    # A row whose K-th score is not beaten stays as it is: an equal score has the larger index. The
    # more rows, the fewer are left.
    rows = (s.amax(1) > best[:, -1]).nonzero()[:, 0]  # (h,)
    both = torch.cat([best[rows], s[rows]], 1)  # (h, K + c)
    best[rows], place = _topk_smaller_place_first(both, k)  # (h, K) each
    old = index[rows].gather(1, place.clamp_max(k - 1))  # (h, K)
    index[rows] = torch.where(place < k, old, place - k + first)


def _topk_smaller_place_first(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-K of each row of more than K, ties to the smaller place: torch.topk promises no such."""
    value, place = s.topk(k + 1)  # (h, K + 1)
    cut = value[:, k] == value[:, k - 1]  # a tie straddles the K-th place: the set is in doubt
    if cut.any():
        place[cut] = s[cut].argsort(dim=1, descending=True, stable=True)[:, : k + 1]
    place = place[:, :k].sort(dim=1).values  # then order the set: by place first, ...
    value, order = s.gather(1, place).sort(dim=1, descending=True, stable=True)  # ... then by score
    return value, place.gather(1, order)
