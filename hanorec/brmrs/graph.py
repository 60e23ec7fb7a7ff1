r"""The graphs of BR-MRS: who interacted with what, and, as options, which items (users) are alike.

Each is one symmetric matrix D^(-1/2) A D^(-1/2) in CSR form, built once from the train pairs. N =
nodes. Source: document 003 names no backbone; LightGCN and e_ij are of the method's later
manuscript.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.ranking.sampler import distinct_pairs
from hanorec.topk import topk_neighbors

# ---- using a graph ----


class _SymmetricProduct(torch.autograd.Function):
    """A x for a constant symmetric A: its gradient is A g.

    So backward need not transpose A at every step, which takes as long as the products themselves
    (measured).
    """

    @staticmethod
    def forward(ctx, A: Tensor, x: Tensor) -> Tensor:
        ctx.A = A
        return A @ x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.A @ gradient


def smooth(A: Tensor, x: Tensor) -> Tensor:
    r"""A x, the weighted sum over neighbours, with a gradient to x.

    A (N, N) of this file, x (N, d) -> (N, d).
    """
    return _SymmetricProduct.apply(A, x)


def lightgcn(A: Tensor, x: Tensor, layers: int) -> Tensor:
    r"""The mean of x, A x, ..., A^K x, K = layers: (N, d) -> (N, d). K = 0 leaves x as it is."""
    total = x
    for _ in range(layers):
        x = smooth(A, x)  # (N, d)
        total = total + x
    # LG-1: z = \frac{1}{K + 1}\,(x + A x + \dots + A^K x)
    return total / (layers + 1)


# ---- who interacted with what ----


def interaction_graph(users: Tensor, items: Tensor, n_users: int, n_items: int) -> Tensor:
    r"""The user-item graph of the train pairs (E,): (U + I, U + I).

    Nodes 0 .. U - 1 are users, U .. U + I - 1 items. An edge weighs 1 / sqrt(degree of u * degree
    of i); a pair that repeats is one edge.
    """
    users, items = distinct_pairs(users, items, n_users, n_items)
    weight = torch.ones(len(users), device=users.device)
    return _normalised(users, n_users + items, weight, n_users + n_items)


def incidence(rows: Tensor, columns: Tensor, n_rows: int, n_columns: int) -> Tensor:
    r"""1 at each of the distinct pairs (E,), else 0: sparse (n_rows, n_columns)."""
    ones = torch.ones(len(rows), device=rows.device)
    return _sparse(torch.stack([rows, columns]), ones, (n_rows, n_columns))


# ---- which are alike ----


@torch.no_grad()
def likeness_graph(
    rows: Tensor,
    columns: Tensor,
    n_rows: int,
    n_columns: int,
    features: Sequence[Tensor],
    k: int,
    alpha: float,
) -> Tensor:
    r"""The item-item graph (rows = items, columns = users), or the user-user graph (the reverse).

    e_ij = alpha |O_i and O_j| / |O_i or O_j| + (1 - alpha) mean_m cos(x_i^m, x_j^m): the Jaccard
    overlap of who interacted with both, and the cosine of the features, both modalities alike
    (beta_m = 1 / M). Each row keeps its k largest (equal ones: the smaller id first) if above 0;
    A = e + e^T.

    Whoever shares no column with i can only be among its top k by being among the top k by cosine.
    So the candidates are those of the Top-K kernel and those that share a column, and the result is
    exact. Memory: the features once more, and about 150 bytes a pair of rows that share a column:
    at most the sum over columns of degree^2.

    Args:
        rows, columns: (E,) train pairs.
        features: (N, d_m) a modality, N = n_rows; a row of zeros has cosine 0 to all.
        k: 1 .. N - 1.
        alpha: 0 (features alone) .. 1 (overlap alone).
    Returns:
        (N, N).
    Raises:
        InputError: k out of range, features that are not finite.
    """
    rows, columns = distinct_pairs(rows, columns, n_rows, n_columns)
    # (N, sum d_m), scaled so that <x_i, x_j> = mean_m cos
    x = torch.cat([F.normalize(f, dim=1) for f in features], 1) / len(features) ** 0.5
    R = incidence(rows, columns, n_rows, n_columns)
    i, j, both = _candidates(x, R, k)  # (C,) each
    degree = torch.bincount(rows, minlength=n_rows)  # (N,)
    either = degree[i] + degree[j] - both  # (C,)
    overlap = (both / either.clamp_min(1)).to(x.dtype)  # (C,); two rows without any column: 0

    # e at the candidates alone: alpha overlap + (1 - alpha) (x x^T), without ever making a row of x
    # for each candidate.
    jaccard = _csr(torch.stack([i, j]), overlap, n_rows)
    e = torch.sparse.sampled_addmm(jaccard, x, x.T, beta=alpha, alpha=1 - alpha).values()  # (C,)
    kept = _best_of_each_row(i, e, n_rows, k)
    kept = kept[e[kept] > 0]
    return _normalised(i[kept], j[kept], e[kept], n_rows)


def _candidates(x: Tensor, R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of rows i != j that share a column of R or are near in x, in order of i, then j.

    x (N, d), R sparse (N, columns) -> i, j, |O_i and O_j|, (C,) each.
    """
    n = len(x)
    near = topk_neighbors(x, k)[1].flatten()  # (N k,)
    own = torch.arange(n, device=x.device).repeat_interleave(k)  # (N k,)
    shared = torch.sparse.mm(R, R.T).coalesce()  # (N, N): |O_i and O_j|
    pairs = torch.cat([shared.indices(), torch.stack([own, near])], 1)
    counts = torch.cat([shared.values(), torch.zeros(len(near), device=x.device)])
    joined = _sparse(pairs, counts, (n, n)).coalesce()
    (i, j), both = joined.indices(), joined.values()
    others = i != j
    return i[others], j[others], both[others]


def _best_of_each_row(i: Tensor, e: Tensor, n: int, k: int) -> Tensor:
    """Places of the k largest e (C,) of each row; i (C,) ascending: the row of each."""
    order = e.argsort(descending=True, stable=True)
    order = order[i[order].argsort(stable=True)]  # by row, then falling e, then id
    first = torch.searchsorted(i, torch.arange(n, device=i.device))  # (N,) where a row begins
    place = torch.arange(len(i), device=i.device) - first[i]  # 0, 1, ... within each row
    return order[place < k]


# ---- sparse matrices ----


def _normalised(i: Tensor, j: Tensor, weight: Tensor, n: int) -> Tensor:
    """D^(-1/2) A D^(-1/2) of A = the weighted edges (i, j) and their reverses.

    A node without an edge has an empty row.
    """
    edges = torch.stack([torch.cat([i, j]), torch.cat([j, i])])  # (2, 2E)
    A = _sparse(edges, torch.cat([weight, weight]), (n, n)).coalesce()
    i, j = A.indices()
    scale = torch.sparse.sum(A, 1).to_dense().rsqrt()  # (N,)
    return _csr(A.indices(), scale[i] * A.values() * scale[j], n)


def _sparse(indices: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=True)


def _csr(indices: Tensor, values: Tensor, n: int) -> Tensor:
    """(n, n) in CSR form, whose products are up to twice as fast as COO's.

    Its values stay in order if the indices are sorted.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return _sparse(indices, values, (n, n)).coalesce().to_sparse_csr()
