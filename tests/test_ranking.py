"""Full ranking against loops in float64, and its metrics by hand."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanorec.base.errors import InputError
from hanorec.metrics import auc
from hanorec.ranking import full_ranking as ranking
from hanorec.ranking.full_ranking import (
    Embeddings,
    branch_margins,
    branch_shares,
    evaluate,
    target_ranks,
    user_rows,
)
from hanorec.ranking.retriever import Retriever
from hanorec.ranking.sampler import Seen


def case(seed, n_users=9, n_items=13, n_pairs=40, width=3):
    """Embeddings of small whole numbers, so that scores are exact and often equal; train pairs;
    targets beside them.
    """
    rng = np.random.default_rng(seed)
    user, item = rng.integers(-2, 3, (n_users, width)), rng.integers(-2, 3, (n_items, width))
    keys = rng.permutation(n_users * n_items)[: 2 * n_pairs]
    pairs = np.stack([keys // n_items, keys % n_items])
    return user, item, pairs[:, :n_pairs], pairs[:, n_pairs:]


def ranks_by_loop(user, item, train, targets):
    """The place of each target among its user's free items; what scores as high stands before it.
    """
    held, found = set(zip(*train.tolist(), strict=True)), []
    for u, i in targets.T.tolist():
        free = [j for j in range(len(item)) if (u, j) not in held]
        scores = [
            sum(float(a) * float(b) for a, b in zip(user[u], item[j], strict=True)) for j in free
        ]
        found.append(oracle.rank_of_positive(scores, free.index(i)))
    return found


def ranks_of(user, item, train, targets, dtype=torch.float32):
    seen = Seen(*torch.from_numpy(train), len(user))
    return target_ranks(
        torch.from_numpy(user).to(dtype), torch.from_numpy(item).to(dtype),
        torch.from_numpy(targets), seen,
    )


@pytest.mark.parametrize("block", [1, 40, 2**23])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_ranks(block, seed):
    user, item, train, targets = case(seed)
    before, ranking.NUMBERS_PER_BLOCK = ranking.NUMBERS_PER_BLOCK, block
    try:
        assert ranks_of(user, item, train, targets).tolist() == ranks_by_loop(
            user, item, train, targets
        )
    finally:
        ranking.NUMBERS_PER_BLOCK = before


def test_ranks_by_hand():
    """One user, five items with scores 2, 3, 3, 1, 5; item 4 is a training pair. Items 1 and 2 tie,
    which counts against either: both are second. Then come 0 and 3.
    """
    item = np.array([[2], [3], [3], [1], [5]])
    found = ranks_of(
        np.array([[1]]), item, np.array([[0], [4]]), np.array([[0, 0, 0, 0], [0, 1, 2, 3]])
    )
    assert found.tolist() == [3, 2, 2, 4]


def test_the_mask_can_fail_and_ids_play_no_part():
    """Without the training pair all of them fall by one; with ids reversed nothing changes, while a
    list has to put one of the two first.
    """
    item = np.array([[2], [3], [3], [1], [5]])
    targets = np.array([[0, 0, 0, 0], [0, 1, 2, 3]])
    assert ranks_of(np.array([[1]]), item, np.zeros((2, 0), int), targets).tolist() == [4, 3, 3, 5]
    backwards = ranks_of(
        np.array([[1]]), item[::-1].copy(), np.array([[0], [0]]),
        np.array([[0, 0, 0, 0], [4, 3, 2, 1]]),
    )
    assert backwards.tolist() == [3, 2, 2, 4]
    seen = Seen(torch.tensor([0]), torch.tensor([4]), 1)
    one = Retriever(("u",), tuple("abcde"), torch.ones(1, 1), torch.tensor(item).float(), seen)
    assert one.top_n(torch.tensor([0]), 4).tolist() == [[1, 2, 0, 3]]
    assert one.places(torch.tensor([0]), torch.tensor([[1, 2, 0, 3]])).tolist() == [[2, 2, 3, 4]]


def test_a_model_that_scores_all_alike_gets_the_last_place():
    targets = np.array([[0, 0], [2, 12]])
    assert ranks_of(
        np.zeros((1, 3), int), np.ones((13, 3), int), np.array([[0, 0], [0, 1]]), targets
    ).tolist() == [11, 11]


@pytest.mark.parametrize("score", [1.0, 0.0])
def test_a_model_that_knows_nothing_recalls_nothing(score):
    """Twenty users with the targets 0 .. 19 of 40 items, all scores 1, or all 0: with the smaller
    id first, Recall@20 would be 1. Every branch alike; scores that know the target give 1 again.
    """
    users = torch.arange(20)
    seen = Seen(users, torch.full((20,), 39), 20)
    alike = Embeddings(
        dict.fromkeys("tvf", torch.ones(20, 1)), dict.fromkeys("tvf", torch.full((40, 1), score))
    )
    report, _, _ = evaluate(alike, torch.stack([users, users]), seen, users + 1)
    for name in ("Recall@5", "Recall@20", "Recall@20_t", "Recall@20_v", "NDCG@20", "synergy"):
        assert report[name] == 0, name
    assert auc(np.ones(20), np.ones((20, 19))) == 0.5  # half of the pairs, in AUC

    items = torch.zeros(40, 20)
    items[:20] = torch.eye(20)
    knowing = Embeddings(dict.fromkeys("tvf", torch.eye(20)), dict.fromkeys("tvf", items))
    report, _, _ = evaluate(knowing, torch.stack([users, users]), seen, users + 1)
    assert report["Recall@5"] == report["NDCG@20"] == 1


def test_a_masked_target_is_refused():
    user, item, train, _ = case(0)
    with pytest.raises(
        InputError,
        match=rf"item {train[1, 3]} of user {train[0, 3]} is held out and a training pair",
    ):
        ranks_of(user, item, train, train[:, 3:4])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite(value):
    """A NaN beats nothing, so it would stand first."""
    user, item, train, targets = case(0)
    with pytest.raises(InputError, match="not finite"):
        ranks_of(np.where(user == 1, value, user), item, train, targets)


def test_no_training_pairs_of_a_user_and_all_of_another():
    seen = Seen(torch.tensor([2, 2, 0]), torch.tensor([4, 1, 3]), 4)
    assert [part.tolist() for part in seen.of(torch.tensor([1, 2, 3, 0, 2]))] == [
        [1, 1, 3, 4, 4],
        [4, 1, 3, 4, 1],
    ]
    assert [part.tolist() for part in seen.of(torch.tensor([1, 3]))] == [[], []]


def test_recall_and_ndcg_by_hand():
    r"""User 7 has ranks 1, 4 and 30, user 2 has rank 3.

    K = 5: user 7 recalls 2 of 3; DCG = 1 / log2 2 + 1 / log2 5, ideal = 1 + 1 / log2 3 + 1 / 2.
    User 2: 1 of 1; (1 / log2 4) / 1. K = 2: user 7 recalls 1 of 3; DCG = 1, ideal of two places = 1
    + 1 / log2 3.
    """
    who, rows = user_rows(torch.tensor([30, 3, 1, 4]), torch.tensor([7, 2, 7, 7]), (2, 5))
    log3, log5 = math.log2(3), math.log2(5)
    assert who.tolist() == [2, 7]
    assert rows["Recall@5"].tolist() == pytest.approx([1, 2 / 3])
    assert rows["NDCG@5"].tolist() == pytest.approx([0.5, (1 + 1 / log5) / (1 + 1 / log3 + 0.5)])
    assert rows["Recall@2"].tolist() == pytest.approx([0, 1 / 3])
    assert rows["NDCG@2"].tolist() == pytest.approx([0, 1 / (1 + 1 / log3)])


@pytest.mark.parametrize("seed", range(5))
def test_recall_and_ndcg_against_lists(seed):
    """From the ranked list itself, as a user sees it: the first K items, hits counted one by one.
    No two scores are equal here.
    """
    user, item, train, targets = case(seed)
    rng = np.random.default_rng(seed)
    user, item = rng.normal(size=user.shape), rng.normal(size=item.shape)
    who, rows = user_rows(
        ranks_of(user, item, train, targets), torch.from_numpy(targets[0]), (5, 10, 20)
    )
    retriever = Retriever(
        (), tuple(map(str, range(len(item)))), torch.from_numpy(user).float(),
        torch.from_numpy(item).float(), Seen(*torch.from_numpy(train), len(user)),
    )
    assert who.tolist() == sorted(set(targets[0].tolist()))
    for place, u in enumerate(who.tolist()):
        own = set(targets[1, targets[0] == u].tolist())
        free = len(item) - int((train[0] == u).sum())
        ranked = retriever.top_n(torch.tensor([u]), free)[0].tolist()
        for k in (5, 10, 20):
            gains = [
                1 / math.log2(2 + position) for position, i in enumerate(ranked[:k]) if i in own
            ]
            ideal = [1 / math.log2(2 + position) for position in range(min(k, len(own)))]
            assert rows[f"Recall@{k}"][place] == pytest.approx(len(gains) / len(own))
            assert rows[f"NDCG@{k}"][place] == pytest.approx(sum(gains) / sum(ideal))


def test_perfect_and_hopeless():
    """All targets first: both metrics are 1 at every K, also where a user has more than K; all
    beyond K: 0.
    """
    _, rows = user_rows(torch.arange(1, 31), torch.zeros(30, dtype=torch.int64), (5, 50))
    assert rows["NDCG@5"].tolist() == rows["NDCG@50"].tolist() == rows["Recall@50"].tolist() == [1]
    assert rows["Recall@5"].tolist() == pytest.approx([5 / 30])
    _, rows = user_rows(torch.tensor([6, 7]), torch.tensor([0, 1]), (5,))
    assert rows["Recall@5"].tolist() == rows["NDCG@5"].tolist() == [0, 0]


def test_branch_shares_by_hand():
    """Eight targets, one for each set of branches that have it in the top 2."""
    ranks = {m: [] for m in "tvf"}
    for t, v, f in [(a, b, c) for a in (1, 9) for b in (2, 9) for c in (1, 3)]:
        for m, rank in zip("tvf", (t, v, f), strict=True):
            ranks[m].append(rank)
    shares = branch_shares({m: torch.tensor(of) for m, of in ranks.items()}, 2)
    # in t alone (f or not): 2; in v alone: 2; in f alone: 1; in t or v but not f: t v, t, v: 3
    assert shares == {"unique_t": 2 / 8, "unique_v": 2 / 8, "synergy": 1 / 8, "degradation": 3 / 8}


def test_branch_margins_by_hand():
    """Two targets. Margins of t: 1, 3; of v: 2, -1; of f: 2, 4. The fusion ties with v on the first
    and wins the second.
    """
    one = torch.ones(1, 1)
    emb = Embeddings(
        dict.fromkeys("tvf", one),
        {
            m: torch.tensor(of, dtype=torch.float32)[:, None]
            for m, of in {"t": [1, 3, 0], "v": [2, -1, 0], "f": [2, 4, 0]}.items()
        },
    )
    found = branch_margins(emb, torch.tensor([[0, 0], [0, 1]]), torch.tensor([2, 2]))
    assert found == {"gap_t": 2.0, "gap_v": 0.5, "gap_f": 3.0, "win": 0.5}


def test_the_report():
    """Every number of `evaluate` from the pieces above, each tested by itself."""
    parts = {m: case(seed)[:2] for seed, m in enumerate("tvf")}
    _, _, train, targets = case(0)
    seen = Seen(*torch.from_numpy(train), 9)
    emb = Embeddings(
        {m: torch.from_numpy(u).double() for m, (u, _) in parts.items()},
        {m: torch.from_numpy(i).double() for m, (_, i) in parts.items()},
    )
    negatives = torch.from_numpy(np.roll(targets[1], 1))
    report, who, rows = evaluate(emb, torch.from_numpy(targets), seen, negatives)
    ranks = {m: torch.tensor(ranks_by_loop(*parts[m], train, targets)) for m in "tvf"}
    users = torch.from_numpy(targets[0])
    for m, name in (("f", "Recall@20"), ("t", "Recall@20_t"), ("v", "Recall@20_v")):
        assert report[name] == pytest.approx(user_rows(ranks[m], users)[1]["Recall@20"].mean())
    assert report["NDCG@10"] == pytest.approx(rows["NDCG@10"].mean())
    assert len(who) == len(rows["NDCG@10"])
    expected = branch_shares(ranks) | branch_margins(emb, torch.from_numpy(targets), negatives)
    assert expected.items() <= report.items()


def test_retrieval():
    user, item, train, _ = case(3)
    retriever = Retriever(
        tuple("abcdefghi"), tuple(map(str, range(13))), torch.from_numpy(user).float(),
        torch.from_numpy(item).float(), Seen(*torch.from_numpy(train), 9),
    )
    free = 13 - np.bincount(train[0], minlength=9)
    n = int(free.min())
    for u, best in enumerate(retriever.top_n(torch.arange(9), n).tolist()):
        others = [i for i in range(13) if i not in train[1, train[0] == u]]
        assert best == sorted(others, key=lambda i, u=u: (-float(user[u] @ item[i]), i))[:n]
    with pytest.raises(
        InputError, match=rf"{n + 1} items to retrieve: one of these users has {n} items"
    ):
        retriever.top_n(torch.arange(9), n + 1)
    with pytest.raises(InputError, match="choose 1 .. that many with --top-n"):
        retriever.top_n(torch.arange(9), 0)
