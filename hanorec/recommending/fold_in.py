r"""A vector for a user who has none: what training would have given them, guessed from their items.

U = users of training, d = width of a vector. A user's vector and an item's need not lie in one
space, as with a fusion that maps the two apart, so their items' mean alone will not do.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.ranking.sampler import Seen

RIDGE = 1e-3  # of the mean of the diagonal
AT_ONCE = 4096  # users


def item_means(item: Tensor, seen: Seen, users: Tensor) -> Tensor:
    """The mean vector of each user's items, and a 1 behind it.

    item (I, d), users (b,) -> (b, d + 1) float64. A user without items has zeros and the 1.
    """
    row, items = seen.of(users)
    total = item.new_zeros(len(users), item.shape[1], dtype=torch.float64)
    total.index_add_(0, row, item[items].double())
    mean = total / seen.degree[users].clamp_min(1)[:, None]
    return F.pad(mean, (0, 1), value=1.0)


def fit_fold_in(user: Tensor, item: Tensor, seen: Seen) -> Tensor:
    """The linear map from a user's items to their vector, fitted on the users of training.

    Memory is that of a few thousand users, not of all.

    Args:
        user (U, d), item (I, d). seen: what each user had in training.
    Returns:
        W (d + 1, d) float64: a folded-in vector is W^T [mean of the items; 1].
    """
    d = item.shape[1]
    gram = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    cross = torch.zeros(d + 1, d, dtype=torch.float64)
    for users in torch.arange(len(user)).split(AT_ONCE):
        m = item_means(item, seen, users)  # (b, d + 1)
        gram += m.T @ m
        cross += m.T @ user[users].double()
    # RC-1: W = \arg\min_W \sum_u \lVert W^\top [\bar z_{O_u}; 1] - z_u\rVert^2
    # + \rho\lVert W\rVert^2
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(d + 1, dtype=torch.float64)
    return torch.linalg.solve(gram + penalty, cross)
