r"""BPR-MF and LightGCN: a vector a user and a vector an item, smoothed over who had what or not.

    x (U + N, d) -> z = LightGCN_K(x)          (LG-1; K = 0 leaves x as it is: BPR-MF)
    s(u, i) = <z_u, z_i>, trained on triples   (LG-2)

x is all that is learnt. U = users, N = items, d = width, K = layers, B = triples (u, i+, i-) of a
batch. Source: He et al. 2020, arXiv 2002.02126, and its authors' code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.brmrs.graph import lightgcn
from hanorec.brmrs.losses import bpr_loss

INITIAL_STD = 0.1  # the authors'


class MatrixModel(nn.Module):
    """LightGCN, or with no layers BPR-MF.

    Args:
        graph: (U + N, U + N) of `hanorec.brmrs.graph.interaction_graph`.
        layers: K. d: width. weight_decay: lambda of LG-2.
    """

    def __init__(
        self, n_users: int, n_items: int, graph: Tensor, layers: int, d: int, weight_decay: float
    ) -> None:
        super().__init__()
        self.sizes, self.layers, self.weight_decay = [n_users, n_items], layers, weight_decay
        self.x = nn.Parameter(INITIAL_STD * torch.randn(n_users + n_items, d))
        self.register_buffer("graph", graph, persistent=False)

    def propagate(self) -> tuple[Tensor, Tensor]:
        """z of all users (U, d) and of all items (N, d), with gradients; once a step."""
        return lightgcn(self.graph, self.x, self.layers).split(self.sizes)

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """LG-2 of a batch of triples: (B,) int64 each -> ()."""
        z_u, z_i = self.propagate()
        u = F.embedding(users, z_u)  # (B, d)
        i, j = F.embedding(positives, z_i), F.embedding(negatives, z_i)  # (B, d) each
        n_users, _ = self.sizes
        triple = torch.stack([users, n_users + positives, n_users + negatives], 1)  # (B, 3)
        return triple_loss((u * (i - j)).sum(1), F.embedding(triple, self.x), self.weight_decay)


def triple_loss(gap: Tensor, rows: Tensor, weight_decay: float) -> Tensor:
    r"""BPR, and the length of what the batch looked up.

    Args:
        gap: (B,) s(u, i+) - s(u, i-) by the propagated z.
        rows: (B, 3, d) x of u, i+ and i-, before any layer.
        weight_decay: lambda.
    Returns:
        (); ln 2 where gap and rows are 0.
    """
    norm = rows.square().sum() / (2 * len(gap))  # ()
    # LG-2: L = \frac{1}{B}\sum -\log\sigma(z_u \cdot (z_i - z_j))
    # + \frac{\lambda}{2B}\sum (\lVert x_u\rVert^2 + \lVert x_i\rVert^2 + \lVert x_j\rVert^2)
    return bpr_loss(gap).mean() + weight_decay * norm
