"""The Top-K similarity kernel: HN-3, the clusters of HaRS."""

import torch
from torch import Tensor

from hanorec.errors import InputError

ROWS_PER_BLOCK = 1024  # one block of similarities is ROWS_PER_BLOCK x N numbers: 168 MB in float32 at N = 41,081


@torch.no_grad()
def topk_neighbors(e: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""N_K(i): the K items most similar to item i, itself excluded.

    Args:
        e: (N, d) unit rows, float; any device.
        k: K, 1 <= K <= N - 1.
    Returns:
        scores (N, K) in the dtype of e, descending; index (N, K) int64. Equal scores: the smaller index first.
        A matrix product may round equal rows differently, so "equal" means equal after rounding.
    Raises:
        InputError: K out of range, or a row that is not finite.
    Source: document 000, section 2.1, HaRS; paper eq. (4).
    """
    n = e.shape[0]
    if not 1 <= k <= n - 1:
        raise InputError(f"K = {k} neighbours of {n} items: K must lie in 1 .. {n - 1}; choose a smaller K")
    finite = e.isfinite().all(1)
    if not finite.all():
        raise InputError(f"row {int((~finite).nonzero()[0])} of the embeddings is not finite; mend the features")
    scores = e.new_empty(n, k)
    index = torch.empty(n, k, dtype=torch.int64, device=e.device)
    for start in range(0, n, ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, n))
        # HN-3: N_K(i) = \operatorname{top-}K_{j \ne i} s_{ij}, \quad s_{ij} = \langle e_i, e_j \rangle
        s = e[rows] @ e.T  # (b, N)
        s.diagonal(start).fill_(-torch.inf)
        scores[rows], index[rows] = _topk_smaller_index_first(s, k)
    return scores, index


def _topk_smaller_index_first(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-K of each row with ties to the smaller index, which torch.topk does not promise."""
    value, index = s.topk(k)  # (b, K)
    cut = (s >= value[:, -1:]).sum(1) > k  # rows where a tie straddles the K-th place: the set itself is in doubt
    if cut.any():
        index[cut] = s[cut].argsort(dim=1, descending=True, stable=True)[:, :k]
    index = index.sort(dim=1).values  # then order the set: by index first, by score second and stably
    value = s.gather(1, index)
    value, order = value.sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, order)
