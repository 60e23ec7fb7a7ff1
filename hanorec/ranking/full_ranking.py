r"""Full ranking: where each held-out item stands among all items that its user has no training pair
with, and what follows from it.

Only training pairs are masked, in validation and in test alike, as the MMRec toolbox does: in the
test ranking a user's validation items compete. T = targets, that is held-out pairs (u, i); U =
users, I = items; branches t (text), v (image), f (fused).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.base.distributed import all_reduce, dealt
from hanorec.base.errors import InputError
from hanorec.ranking.sampler import Seen

KS = (5, 10, 20, 50)

AT = 20  # the cut-off of early stopping and of the branch diagnostics

NUMBERS_PER_BLOCK = 2**23  # of one block of scores: 34 MB in float32


class Embeddings(NamedTuple):
    """Branch ("t", "v", "f") -> (U, d) and (I, d); f is wider."""

    user: dict[str, Tensor]
    item: dict[str, Tensor]


def scores(emb: Embeddings, m: str, users: Tensor, items: Tensor) -> Tensor:
    r"""s_m(u, i) of each user's own items: (B,), (B, n) -> (B, n)."""
    z_u = F.embedding(users, emb.user[m])  # (B, d)
    z_i = F.embedding(items, emb.item[m])  # (B, n, d)
    return torch.einsum("bd,bnd->bn", z_u, z_i)


@torch.no_grad()
def target_ranks(user: Tensor, item: Tensor, targets: Tensor, seen: Seen) -> Tensor:
    r"""The place, from 1 = best, of each target among the items without a training pair.

    rank(u, i) = 1 + |{j \ne i : s_uj >= s_ui}|: a tie counts against the target, so that a model
    which scores all alike gets the last place.

    It is exact for the scores as computed, in memory for one block of targets, not for U x I.
    Several processes divide the blocks.

    Args:
        user (U, d), item (I, d): a score is an inner product. targets: (2, T) int64.
    Returns:
        (T,) int64.
    Raises:
        InputError: embeddings that are not finite; a target that is masked.
    """
    if not (user.isfinite().all() and item.isfinite().all()):
        raise InputError(
            "embeddings that are not finite, expected numbers; lower --learning-rate"
        )
    ranks = torch.zeros_like(targets[0])  # (T,)
    for part in own_blocks(targets[0].argsort(stable=True), len(item)):
        ranks[part] = _block_ranks(user, item, targets[:, part], seen)
    all_reduce([ranks])  # each is zero in all processes but one
    return ranks


def _block_ranks(user: Tensor, item: Tensor, targets: Tensor, seen: Seen) -> Tensor:
    """`target_ranks` of a block: targets (2, T_b), those of a user together -> (T_b,) int64."""
    # A user's scores are computed once: (b,) users, and whose row each target reads, (T_b,).
    users, row = targets[0].unique_consecutive(return_inverse=True)
    s = user[users] @ item.T  # (b, I)
    s[seen.of(users)] = -torch.inf
    s = s[row]  # (T_b, I)
    i = targets[1][:, None]  # (T_b, 1)
    own = s.gather(1, i)  # (T_b, 1)
    masked = own.isinf()[:, 0]  # (T_b,)
    if masked.any():
        owner, target = targets[:, masked][:, 0].tolist()
        raise InputError(
            f"item {target} of user {owner} is held out and a training pair too, so it is masked; "
            "expected either; remove one"
        )
    # The target itself gives the 1. In int32, since int64 takes six times as long.
    return (s >= own).sum(1, dtype=torch.int32).long()  # (T_b,)


def own_blocks(rows: Tensor, items: int) -> Sequence[Tensor]:
    """Rows whose scores fill a block; those that are this process's."""
    return dealt(rows.split(max(1, NUMBERS_PER_BLOCK // items)))


def user_rows(
    ranks: Tensor, users: Tensor, ks: tuple[int, ...] = KS
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    r"""Recall@K and NDCG@K of each user who has targets; G_u = the ranks of user u's targets.

    Recall@K_u = \frac{|\{r \in G_u : r \le K\}|}{|G_u|}

    NDCG@K_u = \frac{\sum_{r \in G_u, r \le K} 1 / \log_2(1 + r)}
    {\sum_{r=1}^{\min(K, |G_u|)} 1 / \log_2(1 + r)}

    Args:
        ranks (T,), users (T,): of each target.
    Returns:
        The users (U',) in order, and name -> (U',) float64 in 0 .. 1.
    """
    r = ranks.cpu().numpy()  # (T,)
    # (U',) users, (T,) whose row each target is, (U',) |G_u|
    who, place, size = np.unique(users.cpu().numpy(), return_inverse=True, return_counts=True)
    # What 1, 2, ... targets ranked first would gain.
    ideal = np.cumsum(1 / np.log2(1 + np.arange(1, max(ks) + 1)))  # (K,)
    rows = {}
    for k in ks:
        hit = r <= k  # (T,)
        rows[f"Recall@{k}"] = np.bincount(place, hit) / size
        gain = np.bincount(place, hit / np.log2(1 + r))  # (U',)
        rows[f"NDCG@{k}"] = gain / ideal[np.minimum(k, size) - 1]
    return who, rows


def branch_shares(ranks: dict[str, Tensor], k: int = AT) -> dict[str, float]:
    r"""Which branch has the target in its top k, as shares of all targets.

    unique_t: text but not the image, whatever the fusion does; unique_v: the reverse; synergy: the
    fusion alone; degradation: text or the image, but not the fusion.
    """
    t, v, f = (ranks[m] <= k for m in ("t", "v", "f"))  # (T,) each
    cases = {
        "unique_t": t & ~v,
        "unique_v": v & ~t,
        "synergy": f & ~t & ~v,
        "degradation": (t | v) & ~f,
    }
    return {name: case.double().mean().item() for name, case in cases.items()}


def branch_margins(emb: Embeddings, targets: Tensor, negatives: Tensor) -> dict[str, float]:
    r"""gap_m = the mean of Delta_m = s_m(u, i+) - s_m(u, i-).

    And win = the share of Delta_f > every other Delta_m.

    targets (2, T); negatives (T,): one item each, that the user has no training pair with.
    """
    users, positives = targets
    both = torch.stack([positives, negatives], 1)  # (T, 2)
    gap = {}  # Delta_m: (T,) each
    for m in emb.user:
        s = scores(emb, m, users, both)  # (T, 2)
        gap[m] = s[:, 0] - s[:, 1]
    margins = {f"gap_{m}": gap[m].double().mean().item() for m in gap}
    return {**margins, "win": wins(gap).double().mean().item()}


def wins(gap: dict[str, Tensor]) -> Tensor:
    r"""Where the fused margin exceeds every unimodal one: branch -> Delta_m (T,), -> (T,) bool."""
    best = torch.stack([gap[m] for m in gap if m != "f"]).amax(0)  # (T,)
    return gap["f"] > best


@torch.no_grad()
def evaluate(
    emb: Embeddings, targets: Tensor, seen: Seen, negatives: Tensor
) -> tuple[dict[str, float], np.ndarray, dict[str, np.ndarray]]:
    """Recall and NDCG of the fused ranking, Recall@20 of each branch, and the diagnostics.

    Means are over the users who have targets; shares and margins are means over targets, and need
    two modalities.

    Args:
        targets: (2, T). negatives: (T,) as in `branch_margins`.
    Returns:
        The report, the users (U',), and their rows, as in `user_rows`.
    """
    ranks = {m: target_ranks(emb.user[m], emb.item[m], targets, seen) for m in emb.user}
    users, rows = user_rows(ranks["f"], targets[0])
    report = {name: float(values.mean()) for name, values in rows.items()}
    for m in ranks.keys() - {"f"}:
        _, of_branch = user_rows(ranks[m], targets[0], (AT,))
        report[f"Recall@{AT}_{m}"] = float(of_branch[f"Recall@{AT}"].mean())
    if len(ranks) == 3:
        report |= branch_shares(ranks) | branch_margins(emb, targets, negatives)
    return dict(sorted(report.items())), users, rows
