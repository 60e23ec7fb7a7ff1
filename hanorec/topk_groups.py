"""HN-3 on a GPU: how a block of scores enters the lists there.

`keep_best` of topk.py asks which rows a block improves, and whether a tie stands at the K-th place;
a GPU would idle at each question until the CPU has read the answer. Here nothing is asked:

    c scores of a row = g interleaved groups: column j belongs to group j mod g
    their g maxima: one pass over the block, neighbouring threads read neighbouring columns
    the K groups that stand first hold the K best: so these come from K c / g scores, not from c
"""

import math

import torch
from torch import Tensor


def keep_best_by_groups(best: Tensor, index: Tensor, s: Tensor, first: int) -> None:
    """`keep_best` of topk.py with the same result, in a fixed number of launches.

    s (r, c): scores of columns first .. first + c - 1; best, index (r, K): of smaller columns.

    Why it is exact, ties included. Let a row's scores stand in line, the larger before the smaller
    and of equal ones the smaller column first: no two share a place. A group stands where its first
    member stands. Before a score outside of the K groups that stand first come these groups' first
    members, K scores; so it is not among the K best. Groups interleave, so that of two groups with
    equal maxima either may come first: the columns of their maxima decide, not their numbers.
    """
    k, c = best.shape[1], s.shape[1]
    size = 2 ** max(0, round(math.log2(c / k) / 2))  # near sqrt(c / K): K members a maximum
    g = c // size
    members = s[:, : size * g].unflatten(1, (size, g))  # (r, size, g): [t, u] is column t g + u
    chosen = first_groups(members, min(k, g))  # (r, k)

    # All that can be among the K best, equal scores by rising number: the lists, the members of the
    # chosen groups column by column, and the columns that no group has.
    chosen = chosen[:, None].expand(-1, size, -1)  # (r, size, k)
    own = torch.arange(first, first + c, device=s.device)  # (c,)
    numbers = own[: size * g : g, None] + chosen  # (r, size, k)
    rest = own[size * g :].expand(len(s), -1)  # (r, c - size g)
    numbers = torch.cat([index, numbers.flatten(1), rest], 1)  # (r, m)
    scores = [best, members.gather(2, chosen).flatten(1), s[:, size * g :]]
    scores = torch.cat(scores, 1)  # (r, m)

    place = torch.arange(scores.shape[1], device=s.device)  # (m,)
    place = places_of_best(scores, place, k)  # (r, K)
    value, order = scores.gather(1, place).sort(dim=1, descending=True, stable=True)
    best.copy_(value)
    index.copy_(numbers.gather(1, place.gather(1, order)))


def first_groups(members: Tensor, k: int) -> Tensor:
    """The K groups of members (r, size, g) that stand first: (r, K), by rising number."""
    g = members.shape[2]
    maxima, t = members.max(1)  # (r, g) each; of equal members the first
    column = t.mul_(g).add_(torch.arange(g, device=t.device))  # (r, g)
    return places_of_best(maxima, column, k)


def places_of_best(x: Tensor, order: Tensor, k: int) -> Tensor:
    """The places, rising, of the K largest of each row of x (r, m), of equal ones those first in
    `order`, (r, m) or (m,), below 2^31: (r, K).

    torch.topk does not promise which of equal numbers it takes; here it may take any. The K-th
    largest number is one number, whatever place it is found at. Larger ones, fewer than K, are all
    taken; for the places left, those equal to it are told apart by `order`.
    """
    last = x.topk(k, sorted=False).values.amin(1, keepdim=True)  # (r, 1)
    far = torch.iinfo(torch.int32).max
    rank = torch.where(x == last, order.int(), far).masked_fill_(x > last, -1)  # (r, m)
    return rank.topk(k, largest=False, sorted=False).indices.sort(dim=1).values
