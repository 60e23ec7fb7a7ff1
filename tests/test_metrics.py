r"""EV-1 .. EV-4 against the oracle, chance values, ties, and negative controls; intervals and the
paired test by their limits.
"""

import math

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanorec.metrics import (
    auc,
    auc_rows,
    bootstrap_interval,
    hit_rate,
    ndcg,
    ndcg_rows,
    paired_test,
    pooled_auc,
    rank_of_positive,
    shown_test,
    similarity_groups,
)

QUICK = settings(max_examples=50, deadline=None, derandomize=True, database=None)
SCORES = st.integers(-2, 2)  # five values among ten candidates: ties all the time


def scored_users(users=200, candidates=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(users, candidates)), rng.integers(0, candidates, users)


# ---- EV-1 ----


@pytest.mark.equation("EV-1")
def test_ranks_match_the_oracle():
    scores, positive = scored_users()
    expected = [oracle.rank_of_positive(row, p) for row, p in zip(scores, positive, strict=True)]
    np.testing.assert_array_equal(rank_of_positive(scores, positive), expected)


@pytest.mark.equation("EV-1")
@given(
    st.lists(
        st.tuples(st.lists(SCORES, min_size=4, max_size=4), st.integers(0, 3)), min_size=1,
        max_size=5,
    )
)
@QUICK
def test_ranks_with_ties_match_the_oracle(users):
    scores, positive = [row for row, _ in users], [p for _, p in users]
    expected = [oracle.rank_of_positive(row, p) for row, p in users]
    np.testing.assert_array_equal(rank_of_positive(scores, positive), expected)


@pytest.mark.equation("EV-1")
def test_a_model_that_scores_all_alike_comes_last():
    """Control: counting only strictly higher scores would give it rank 1, a perfect NDCG for
    knowing nothing.
    """
    scores = np.zeros((3, 10))
    np.testing.assert_array_equal(rank_of_positive(scores, [0, 4, 9]), [10, 10, 10])
    assert ndcg(1 + (scores > scores[:, :1]).sum(1), 3) == 1


@pytest.mark.equation("EV-1")
def test_rank_does_not_depend_on_where_the_positive_stands():
    scores, positive = scored_users(50)
    order = np.random.default_rng(1).permutation(10)
    where = np.argsort(order)
    np.testing.assert_array_equal(
        rank_of_positive(scores[:, order], where[positive]), rank_of_positive(scores, positive)
    )


@pytest.mark.equation("EV-1")
def test_infinite_scores_rank_and_nan_is_refused():
    """-inf is a legitimate log-probability, the worst; NaN is a broken model and names the user."""
    np.testing.assert_array_equal(
        rank_of_positive([[-np.inf, -1.0], [-1.0, -np.inf]], [0, 0]), [2, 1]
    )
    with pytest.raises(ValueError, match="row 1"):
        rank_of_positive([[1.0, 2.0], [float("nan"), 0.0]], [0, 1])


# ---- EV-2 ----


@pytest.mark.equation("EV-2")
@given(st.lists(st.integers(1, 10), min_size=1, max_size=20), st.integers(1, 10))
@QUICK
def test_hits_and_ndcg_match_the_oracle(ranks, k):
    assert hit_rate(ranks, k) == pytest.approx(oracle.hit_rate(ranks, k), abs=1e-15)
    assert ndcg(ranks, k) == pytest.approx(oracle.ndcg(ranks, k), abs=1e-15)


@pytest.mark.equation("EV-2")
def test_ndcg_by_hand():
    """Ranks 1, 2, 3, 4 at k = 3: 1, 1 / log2(3), 1 / 2, 0. The denominators start at log2(2), not
    log2(1) and not ln.
    """
    np.testing.assert_allclose(
        ndcg_rows([1, 2, 3, 4], 3), [1, 1 / math.log2(3), 0.5, 0], rtol=1e-15
    )
    assert hit_rate([1, 2, 3, 4], 3) == 0.75


@pytest.mark.equation("EV-2")
def test_chance_of_ten_candidates():
    """Each rank equally often: HR@3 = 0.3, NDCG@3 = (1 + 1 / log2(3) + 1/2) / 10 = 0.2131. Random
    scores come near: 20,000 users, standard errors 0.0032 and 0.0025, so within 0.02.
    """
    assert hit_rate(np.arange(1, 11), 3) == pytest.approx(0.30)
    assert ndcg(np.arange(1, 11), 3) == pytest.approx(0.2131, abs=5e-5)
    ranks = rank_of_positive(*scored_users(20000, seed=2))
    assert hit_rate(ranks, 3) == pytest.approx(0.30, abs=0.02)
    assert ndcg(ranks, 3) == pytest.approx(0.2131, abs=0.02)


@pytest.mark.equation("EV-2")
def test_ndcg_lies_between_half_the_hits_and_the_hits():
    """Within k = 3 a hit is worth 1/2 to 1; at k = 1 the two are equal."""
    ranks = rank_of_positive(*scored_users(300, seed=3))
    assert hit_rate(ranks, 3) / 2 <= ndcg(ranks, 3) <= hit_rate(ranks, 3)
    assert ndcg(ranks, 1) == hit_rate(ranks, 1)


# ---- EV-3 ----


@pytest.mark.equation("EV-3")
@given(
    st.lists(st.tuples(SCORES, st.lists(SCORES, min_size=3, max_size=3)), min_size=1, max_size=6)
)
@QUICK
def test_auc_matches_the_oracle(users):
    positive, negative = [p for p, _ in users], [n for _, n in users]
    assert auc(positive, negative) == pytest.approx(oracle.auc(positive, negative), abs=1e-15)


@pytest.mark.equation("EV-3")
@given(st.lists(SCORES, min_size=1, max_size=9), st.lists(SCORES, min_size=1, max_size=9))
@QUICK
def test_pooled_auc_matches_the_oracle(positive, negative):
    assert pooled_auc(positive, negative) == pytest.approx(
        oracle.binary_auc(positive, negative), abs=1e-15
    )


@pytest.mark.equation("EV-3")
def test_auc_limits():
    """Perfect 1, reversed 0, all tied 1/2; one negative a user, and random reals."""
    assert auc([2.0, 2.0], [[1, 1], [0, 1]]) == pooled_auc([2.0, 2.0], [1, 0]) == 1
    assert auc([0.0, 0.0], [[1, 1], [2, 1]]) == pooled_auc([0.0, 0.0], [1, 2]) == 0
    assert auc([1.0], [[1, 1, 1]]) == pooled_auc([1.0], [1, 1, 1]) == 0.5
    rng = np.random.default_rng(4)
    positive, negative = rng.normal(size=40), rng.normal(size=(40, 1))
    assert auc(positive, negative) == pytest.approx(oracle.auc(positive, negative), abs=1e-15)
    assert pooled_auc(positive, negative[:, 0]) == pytest.approx(
        oracle.binary_auc(positive, negative[:, 0]), abs=1e-12
    )


@pytest.mark.equation("EV-3")
def test_auc_pairs_within_a_user_only():
    """Users on scales of their own: 1 over 0, 101 over 100. Within users 1. Control: pooled, the
    pair 1 against 100 is lost: 3/4. Swapped arguments give 1 - AUC.
    """
    assert auc([1, 101], [[0], [100]]) == 1
    assert pooled_auc([1, 101], [0, 100]) == 0.75
    assert auc([0, 100], [[1], [101]]) == 0


@pytest.mark.equation("EV-3")
def test_auc_follows_from_the_rank_where_nothing_ties():
    """Rank r among 10 means 10 - r of 9 negatives beaten."""
    scores, positive = scored_users(100, seed=5)
    own = scores[np.arange(100), positive]
    negative = np.array([np.delete(row, p) for row, p in zip(scores, positive, strict=True)])
    np.testing.assert_allclose(
        auc_rows(own, negative), (10 - rank_of_positive(scores, positive)) / 9, atol=1e-15
    )


# ---- EV-4 ----


@pytest.mark.equation("EV-4")
@pytest.mark.parametrize(("n", "groups"), [(10, 10), (25, 10), (103, 10), (7, 3), (5, 1)])
def test_similarity_groups_match_the_oracle(n, groups):
    rng = np.random.default_rng(n)
    before, after = rng.uniform(-1, 1, n), rng.uniform(-1, 1, n)
    for ours, expected in zip(
        similarity_groups(before, after, groups), oracle.similarity_groups(before, after, groups),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-14)


@pytest.mark.equation("EV-4")
def test_similarity_groups_with_ties_keep_the_order_of_the_items():
    before, after = [0.5] * 6 + [0.1] * 5, list(range(11))
    ours = similarity_groups(before, after, 4)
    np.testing.assert_allclose(ours, oracle.similarity_groups(before, after, 4), atol=1e-15)


@pytest.mark.equation("EV-4")
def test_groups_are_by_the_similarity_before():
    """The curve's first group is the weakest before training. Control: grouping by `after` would
    hide who got weaker: here every weak item loses 0.2 and every strong one gains 0.2, in a
    shuffled catalogue.
    """
    before = np.random.default_rng(6).permutation(np.linspace(0, 1, 40))
    after = before + np.where(before < 0.5, -0.2, 0.2)
    means_before, means_after = similarity_groups(before, after, 10)
    assert (np.diff(means_before) > 0).all()
    np.testing.assert_allclose(means_after - means_before, [-0.2] * 5 + [0.2] * 5, atol=1e-14)
    with pytest.raises(ValueError, match="9 items"):
        similarity_groups(before[:9], after[:9], 10)


# ---- how sure ----


@pytest.mark.equation("EV-2")
def test_bootstrap_interval():
    """Constant rows: no width. 400 rows of 0 and 1 in equal numbers: standard error 0.5 / 20 =
    0.025, so about 0.5 +- 0.049.
    """
    assert bootstrap_interval(np.full(30, 0.7), samples=50) == pytest.approx((0.7, 0.7), abs=1e-12)
    low, high = bootstrap_interval([0.0, 1.0] * 200, samples=2000)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)


@pytest.mark.equation("EV-2")
def test_paired_test():
    """Equal rows: difference 0, p 1. Better for every one of 30 users by 0.1: only all-plus or
    all-minus flips reach it, so p is the smallest possible, 1 / (1 + samples). Four users: 2 of 16
    sign patterns reach it, so p is near 1/8 and never small.
    """
    a = np.random.default_rng(7).uniform(size=30)
    same = paired_test(a, a, samples=200)
    assert same["difference"] == 0 and same["p"] == 1
    better = paired_test(a + 0.1, a, samples=200)
    assert better["difference"] == pytest.approx(0.1) and better["low"] == pytest.approx(0.1)
    assert better["p"] == pytest.approx(1 / 201)
    few = paired_test(a[:4] + 0.1, a[:4], samples=2000)
    assert few["p"] == pytest.approx(1 / 8, abs=0.03)
    assert paired_test(a, a + 0.1, samples=200)["difference"] == pytest.approx(-0.1)


def test_a_paired_test_is_shown_in_points():
    """0.012 of a metric that runs from 0 to 1 are 1.2 points; p keeps as many digits as asked."""
    test = {"difference": 0.012, "low": -0.00314, "high": 0.027, "p": 0.1139}
    assert shown_test(test) == "+1.20 [-0.31, +2.70], p = 0.114"
    assert shown_test(test, 4) == "+1.20 [-0.31, +2.70], p = 0.1139"
