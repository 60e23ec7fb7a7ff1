"""An exact sampler of negatives (BR-1): items that a user has not interacted with."""

import torch
from torch import Tensor

from hanorec.base.errors import InputError


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
