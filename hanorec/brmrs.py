r"""BR-MRS, the plain functions: an exact sampler of negatives and the losses (BR-1 .. BR-6). They plug into any recommender.

    sampler -> i- and a pool N(u)      (items that u has not interacted with)
    pool scores -> j_v, j_t            (what confuses the one modality ...)
    -> L_chns                          (... the other must tell apart)
    margins -> L_syn, L_BPR            (the fused branch must beat the better modality by theta, and be right)

Branches t (text), v (image), f (fused); a score s is a real number, larger = preferred; a margin is Delta = s(u, i+) - s(u, i-),
larger = better ranked. U = users, I = items, E = train pairs, B = triples of a batch, n = items of a pool.
Every loss keeps dtype and device. Source of all: document 003, sections 4.1 to 4.3.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.errors import InputError


def distinct_pairs(users: Tensor, items: Tensor, n_users: int, n_items: int) -> tuple[Tensor, Tensor]:
    r"""The train pairs in order of user, then item, each once: (E,), (E,) int64 -> (E',), (E',).

    Raises:
        InputError: not two int64 vectors of one length, or an id out of range, named by its place.
    """
    if users.ndim != 1 or users.shape != items.shape or users.dtype != torch.int64 or items.dtype != torch.int64:
        raise InputError(f"train pairs: users {tuple(users.shape)} {users.dtype} and items {tuple(items.shape)} {items.dtype}, "
                         "expected two int64 vectors of one length")
    for name, ids, size in (("user", users, n_users), ("item", items, n_items)):
        wrong = (ids < 0) | (ids >= size)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise InputError(f"train pair {place}: {name} {int(ids[place])}, expected 0 .. {size - 1}; mend the interactions or the number of {name}s")
    pairs = torch.unique(users * n_items + items)  # (E',), sorted
    return pairs // n_items, pairs % n_items


class NegativeSampler:
    r"""Draws uniformly from what a user has not interacted with: exact, without rejection, at a fixed shape, on any device.

    The r-th free item (r = 0 .. free - 1) of a user lies at r plus the number of positives up to there. With the positives
    p_0 < p_1 < ... of the user, p_k - k free items lie below p_k, so p_k is passed exactly if p_k - k <= r: one search in a sorted list.

    Args:
        users, items: (E,) int64 train pairs, ids from 0; a pair that repeats counts once. A user without any may draw every item.
    Raises:
        InputError: as `distinct_pairs`; a user who has every item, named.
    """

    def __init__(self, users: Tensor, items: Tensor, n_users: int, n_items: int) -> None:
        user, item = distinct_pairs(users, items, n_users, n_items)  # (E',)
        degree = torch.bincount(user, minlength=n_users)  # (U,)
        full = (degree == n_items).nonzero()
        if len(full):
            raise InputError(f"user {int(full[0])} has all {n_items} items among the train pairs, expected at least one left to draw as a "
                             "negative; leave that user out of training, or add items")
        self.n_items = n_items
        self.free = n_items - degree  # (U,)
        self.start = degree.cumsum(0) - degree  # (U,) where a user's positives begin
        k = torch.arange(len(user), device=user.device) - self.start[user]  # (E',) rank of a positive within its user
        self.key = user * (n_items + 1) + (item - k)  # (E',) ascending: item - k <= I - degree, so users do not mix

    def free_item(self, users: Tensor, r: Tensor) -> Tensor:
        r"""The r-th item, from 0 and in order of id, that each user has not interacted with: (B,), (B, n) -> (B, n) int64."""
        sought = users[:, None] * (self.n_items + 1) + r  # (B, n)
        return r + torch.searchsorted(self.key, sought, right=True) - self.start[users][:, None]

    def draw(self, users: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        r"""n items a user, independent, with replacement: (B,) int64 -> (B, n) int64.

        62 random bits modulo the number of free items: no item is favoured by more than I / 2^62.
        """
        # BR-1: N(u) = \{j_1, \dots, j_n\}, \quad j_k \sim \operatorname{Uniform}(I \setminus O_u) \text{ independently}
        return self.free_item(users, torch.randint(2**62, (len(users), n), generator=generator, device=users.device) % self.free[users][:, None])


def _check_shapes(name: str, dimensions: int, *tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != dimensions or 0 in shapes[0]:
        raise ValueError(f"{name}: shapes {shapes}, expected equal ones of {dimensions} dimension{'s' * (dimensions > 1)}, none empty")


def hard_negatives(s_v: Tensor, s_t: Tensor) -> tuple[Tensor, Tensor]:
    r"""What confuses each modality most in a pool.

    Args:
        s_v, s_t: (B, n) scores of the pool's items under the two modalities.
    Returns:
        j_v, j_t: (B,) int64 positions in the pool; equal scores: the first. They carry no gradient.
    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes("hard_negatives", 2, s_v, s_t)
    # BR-2: j_v = \arg\max_{j \in N(u)} s_v(u, j), \quad j_t = \arg\max_{j \in N(u)} s_t(u, j)
    return s_v.argmax(1), s_t.argmax(1)


def chns_loss(t_pos: Tensor, t_at_jv: Tensor, v_pos: Tensor, v_at_jt: Tensor) -> Tensor:
    r"""Cross-modal hard negatives: text must tell apart what confuses the image, and the image what confuses text.

    Args:
        t_pos, v_pos: (B,) scores of i+ under text and under the image. t_at_jv: (B,) text's score of the image's hard
            negative. v_at_jt: (B,) the image's score of text's.
    Returns:
        (B,); 2 ln 2 = 1.386 where both are undecided.
    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes("chns_loss", 1, t_pos, t_at_jv, v_pos, v_at_jt)
    # BR-3: L_{chns} = -[\log\sigma(s_t(u, i^+) - s_t(u, j_v)) + \log\sigma(s_v(u, i^+) - s_v(u, j_t))]
    return -(F.logsigmoid(t_pos - t_at_jv) + F.logsigmoid(v_pos - v_at_jt))


def synergy_loss(gap_f: Tensor, gap_t: Tensor, gap_v: Tensor, theta: float = 0.0, detach: bool = False) -> Tensor:
    r"""The fused margin must exceed the better of the two unimodal margins by theta.

    Args:
        gap_f, gap_t, gap_v: (B,) margins of one triple (u, i+, i-). theta: in units of the scores.
        detach: option: no gradient to the unimodal margins. Without it (literal) the loss can also fall by worsening the better
            modality, at the same rate as by improving the fusion.
    Returns:
        (B,); ln 2 where the fused margin leads by exactly theta.
    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes("synergy_loss", 1, gap_f, gap_t, gap_v)
    best = torch.maximum(gap_t, gap_v)  # (B,)
    # BR-4: L_{syn} = -\log\sigma(\Delta_f - \max(\Delta_t, \Delta_v) - \theta)
    return -F.logsigmoid(gap_f - (best.detach() if detach else best) - theta)


def bpr_loss(gap: Tensor) -> Tensor:
    r"""Bayesian personalised ranking: (B,) margins -> (B,); ln 2 at 0, which is chance."""
    _check_shapes("bpr_loss", 1, gap)
    # BR-5: L_{BPR} = -\log\sigma(\Delta_f)
    return -F.logsigmoid(gap)


def total_loss(bpr: Tensor, chns: Tensor, syn: Tensor, squared_norm: Tensor, lambda_h: float, lambda_s: float, weight_decay: float,
               bpr_weight: float = 1.0) -> Tensor:
    r"""The objective of a batch.

    Args:
        bpr, chns, syn: (B,) of the functions above, or () means of them. squared_norm: () of the parameters, see `BRMRS.regulariser`.
        lambda_h, lambda_s, weight_decay: weights of CHNS, of synergy and of the norm.
        bpr_weight: 1, or 0 for the document's displayed formula, which leaves BPR out although its text counts it in.
    Returns:
        (): the mean over the batch.
    """
    # BR-6: L = L_{BPR} + \lambda_h L_{chns} + \lambda_s L_{syn} + \lambda \lVert\Theta\rVert_2^2
    return bpr_weight * bpr.mean() + lambda_h * chns.mean() + lambda_s * syn.mean() + weight_decay * squared_norm
