"""The Top-K similarity kernel (HN-3) where the rows are divided over processes.

    0 -> 1 -> 2 -> ... -> R - 1 -> 0    each rank keeps its slice of the rows; a second one
                                        travels around the ring

At every stop the visiting rows meet the rows at home: a block of products is computed once and
serves both, as in topk.py. The visitor takes its lists along. Halfway around each pair of slices
has met, and the lists go home, where they are merged.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from hanorec.base.distributed import all_gather, rank, share, world_size
from hanorec.topk import Keep, check, first_not_finite, products, topk_neighbors, way


@torch.no_grad()
def topk_neighbors_ring(
    part: Tensor, n: int, k: int, block: int | None = None, by_groups: bool | None = None
) -> tuple[Tensor, Tensor]:
    r"""`topk_neighbors` of N rows of which each rank holds its `share`.

    Args:
        part: (n_r, d) this rank's unit rows, possibly none. n: N, of all ranks.
        k, block, by_groups: as in `topk_neighbors`.
    Returns:
        scores (n_r, K) and index (n_r, K) of this rank's rows; index counts all N rows. Equal
        scores: the smaller index first.
        Promised: the K best of the similarities as the products round them; one number for s_ij
        and s_ji. So where the products are exact, or round alike, the answer is that of one process
        to the bit. Not promised: that a product rounds the same in a block of another shape, which
        another number of ranks makes.
        Memory: part, two more slices (one that visits, one that arrives), three lists, and the
        blocks of `topk_neighbors`.
    Raises:
        InputError: on all ranks, with the row's number among all N.
    """
    size, first = world_size(), share(n).start
    blocks = way(part, block, by_groups)
    check(n, k, _first_broken(part, first, n))

    best = _at_home(part, first, k, block, by_groups)
    visitor = _padded(part, n)  # all slices travel at one length
    luggage = _nothing(visitor, k)  # the visitor's own lists, (rows, K) each
    for step in range(1, size // 2 + 1):
        visitor, *luggage = _pass_on([visitor, *luggage], 1)
        origin = share(n, (rank() - step) % size)
        at_home, away = slice(0, len(part)), slice(0, origin.stop - origin.start)
        if 2 * step == size:
            # These two meet at both their homes: one half of the lower rank's rows at each.
            if rank() < size // 2:
                at_home = slice(0, len(part) // 2)
            else:
                away = slice(away.stop // 2, away.stop)
        for_home, for_visitor = _meeting(
            part[at_home],
            visitor[away],
            first + at_home.start,
            origin.start + away.start,
            k,
            blocks,
        )
        _take_in([x[at_home] for x in best], for_home)
        _take_in([x[away] for x in luggage], for_visitor)
    luggage = _pass_on(luggage, -(size // 2))
    return _merged(*best, *(x[: len(part)] for x in luggage))


def _first_broken(part: Tensor, first: int, n: int) -> int:
    """The number among all N of the first row, on any rank, that is not finite; N for none."""
    local = first_not_finite(part)
    mine = first + local if local < len(part) else n
    every = all_gather(torch.tensor([mine], device=part.device), world_size())  # (R,)
    return int(every.min())


def _nothing(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Lists (rows, K) that any score beats."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    best = rows.new_full((len(rows), k), -torch.inf, dtype=wide)
    return best, torch.zeros(len(rows), k, dtype=torch.int64, device=rows.device)


def _at_home(
    part: Tensor, first: int, k: int, block: int | None, by_groups: bool | None
) -> tuple[Tensor, Tensor]:
    """The neighbours among the slice's own rows; where there are fewer than K, the rest is
    `_nothing`."""
    best, index = _nothing(part, k)
    most = min(k, len(part) - 1)
    if most > 0:
        best[:, :most], index[:, :most] = topk_neighbors(part, most, block, by_groups)
    return best, index + first


def _meeting(
    a: Tensor, b: Tensor, first_a: int, first_b: int, k: int, blocks: tuple[int, int, Keep]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The K best of b for each row of a, and of a for each row of b: each block of products
    computed once."""
    rows, columns, keep = blocks
    for_a, for_b = _nothing(a, k), _nothing(b, k)
    for i in range(0, len(a), rows):
        for j in range(0, len(b), columns):
            I, J = slice(i, i + rows), slice(j, j + columns)
            # HN-3 of these two slices: s_{ij} = \langle e_i, e_j \rangle
            s = products(a[I], b[J], for_a[0].dtype)  # (b_I, b_J)
            keep(for_b[0][J], for_b[1][J], s.T, first_a + i)
            keep(for_a[0][I], for_a[1][I], s, first_b + j)
    return for_a, for_b


def _take_in(lists: list[Tensor], new: tuple[Tensor, Tensor]) -> None:
    """Merge new lists (scores and index) into the old ones, in place."""
    for old, merged in zip(lists, _merged(*lists, *new), strict=True):
        old.copy_(merged)


def _merged(
    score: Tensor, index: Tensor, other_score: Tensor, other_index: Tensor
) -> tuple[Tensor, Tensor]:
    """The K best of two lists (rows, K), equal scores by index: sorted by index first, then stably
    by score."""
    k = score.shape[1]
    index, order = torch.cat([index, other_index], 1).sort(dim=1)  # (rows, 2K)
    score = torch.cat([score, other_score], 1).gather(1, order)
    score, place = score.sort(dim=1, descending=True, stable=True)
    return score[:, :k], index.gather(1, place[:, :k])


def _padded(part: Tensor, n: int) -> Tensor:
    """The slice at the length of the longest."""
    missing = -(-n // world_size()) - len(part)
    return torch.cat([part, part.new_zeros(missing, part.shape[1])]) if missing else part


def _pass_on(tensors: list[Tensor], steps: int) -> list[Tensor]:
    """Each rank's tensors, contiguous and of one shape on all ranks, to the rank so many steps
    ahead; what arrives in return."""
    if steps % world_size() == 0:
        return tensors
    arriving = [torch.empty_like(x) for x in tensors]
    ahead, behind = (rank() + steps) % world_size(), (rank() - steps) % world_size()
    sends = [dist.P2POp(dist.isend, x, ahead) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, behind) for x in arriving]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
    return arriving
