"""An exact sampler of negatives (BR-1): items that a user has not interacted with."""

import torch
from torch import Tensor

from hanorec.base.errors import InputError


class NegativeSampler:
    r"""Draws uniformly from what a user has not interacted with.

    It is exact, without rejection, at a fixed shape, on any device.

    The r-th free item (r = 0 .. free - 1) of a user lies at r plus the number of positives up to
    there. With the positives p_0 < p_1 < ... of the user, p_k - k free items lie below p_k, so p_k
    is passed exactly if p_k - k <= r: one search in a sorted list.

    Args:
        users, items: (E,) int64 train pairs, ids from 0; a pair that repeats counts once. A user
            without any may draw every item.
    Raises:
        InputError: as `distinct_pairs`; a user who has every item, named.
    """

    def __init__(self, users: Tensor, items: Tensor, n_users: int, n_items: int) -> None:
        seen = Seen(*distinct_pairs(users, items, n_users, n_items), n_users)
        full = (seen.degree == n_items).nonzero()
        if len(full):
            raise InputError(
                f"user {int(full[0])} has all {n_items} items among the train pairs, expected at "
                "least one left to draw as a negative; leave that user out of training, or add "
                "items"
            )
        self.n_items = n_items
        self.free = n_items - seen.degree  # (U,)
        self.start = seen.start  # (U,) where a user's positives begin
        places = torch.arange(len(seen.user), device=users.device)
        k = places - self.start[seen.user]  # (E',) rank of a positive within its user
        # Ascending: item - k <= I - degree, so users do not mix.
        self.key = seen.user * (n_items + 1) + (seen.item - k)  # (E',)

    def free_item(self, users: Tensor, r: Tensor) -> Tensor:
        r"""The r-th item, from 0 and in order of id, that each user has not interacted with.

        users (B,), r (B, n) -> (B, n) int64.
        """
        sought = users[:, None] * (self.n_items + 1) + r  # (B, n)
        passed = torch.searchsorted(self.key, sought, right=True) - self.start[users][:, None]
        return r + passed

    def draw(self, users: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        r"""n items a user, independent, with replacement: (B,) int64 -> (B, n) int64.

        62 random bits modulo the number of free items: no item is favoured by more than I / 2^62.
        """
        shape = len(users), n
        bits = torch.randint(2**62, shape, generator=generator, device=users.device)  # (B, n)
        # BR-1: N(u) = \{j_1, \dots, j_n\},
        # \quad j_k \sim \operatorname{Uniform}(I \setminus O_u) \text{ independently}
        return self.free_item(users, bits % self.free[users][:, None])

    def fixed(self, users: Tensor) -> Tensor:
        """One item for each of these users, (T,) -> (T,), the same at every call."""
        generator = torch.Generator(users.device).manual_seed(0)
        return self.draw(users, 1, generator)[:, 0]


class Seen:
    """The training pairs, sorted so that those of a user lie together.

    A sampler draws none of them, and a ranking leaves them out.

    Attributes:
        user, item: (E,) int64, in order of user; within a user in the order given.
        degree: (U,) int64, how many pairs each user has.
        start: (U,) int64, where those of each user begin.
    """

    def __init__(self, users: Tensor, items: Tensor, n_users: int) -> None:
        self.user, order = users.sort(stable=True)
        self.item = items[order]
        self.degree = torch.bincount(self.user, minlength=n_users)
        self.start = self.degree.cumsum(0) - self.degree

    def of(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """(b,) -> row 0 .. b - 1 and item of every training pair of these users."""
        degree = self.degree[users]  # (b,)
        row = torch.arange(len(users), device=users.device).repeat_interleave(degree)
        first = (degree.cumsum(0) - degree)[row]
        place = torch.arange(len(row), device=users.device) - first  # 0, 1, ... within each user
        return row, self.item[self.start[users][row] + place]


def distinct_pairs(
    users: Tensor, items: Tensor, n_users: int, n_items: int
) -> tuple[Tensor, Tensor]:
    r"""The train pairs in order of user, then item, each once: (E,), (E,) int64 -> (E',), (E',).

    Raises:
        InputError: not two int64 vectors of one length, or an id out of range, named by its place.
    """
    integers = users.dtype == items.dtype == torch.int64
    if users.ndim != 1 or users.shape != items.shape or not integers:
        raise InputError(
            f"train pairs: users {tuple(users.shape)} {users.dtype} and items "
            f"{tuple(items.shape)} {items.dtype}, expected two int64 vectors of one length"
        )
    for name, ids, size in (("user", users, n_users), ("item", items, n_items)):
        wrong = (ids < 0) | (ids >= size)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise InputError(
                f"train pair {place}: {name} {int(ids[place])}, expected 0 .. {size - 1}; mend the "
                f"interactions or the number of {name}s"
            )
    pairs = torch.unique(users * n_items + items)  # (E',), sorted
    return pairs // n_items, pairs % n_items
