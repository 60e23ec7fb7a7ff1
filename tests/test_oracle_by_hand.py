r"""The oracle against numbers worked out with pencil and calculator; nothing of the package is used
here.

The six items of most tests, as angles of their fused embedding in the plane (c = cos 45 degrees =
0.7071068):

    item    H         X        e                  angle
    0     (3, 0)    (0, 5)   ( c, c)     45   (1, 0) + (0, 1), normalised
    1     (0, 2)    none     ( 0, 1)     90
    2     (7, 0)    none     ( 1, 0)      0
    3     (-1, 0)   (0, 4)   (-c, c)    135   (-1, 0) + (0, 1), normalised
    4     (-2, 0)   none     (-1, 0)    180
    5     (0, -1)   none     ( 0, -1)   270
"""

import math

import numpy as np
import oracle
import pytest

C = math.sqrt(0.5)
H = [[3, 0], [0, 2], [7, 0], [-1, 0], [-2, 0], [0, -1]]
X = [[0, 5], [9, 9], [9, 9], [0, 4], [9, 9], [9, 9]]  # rows 1, 2, 4, 5 must be ignored
HAS_IMAGE = [True, False, False, True, False, False]


def six_items():
    e = oracle.fuse(H, X, HAS_IMAGE)
    scores, index = oracle.topk_neighbors(e, 2)
    return e, scores, index


@pytest.mark.equation("HN-1")
def test_item_embedding_is_the_mean_over_tokens():
    """Two tokens (1, 4) and (3, 0): mean (2, 2)."""
    np.testing.assert_array_equal(oracle.item_embedding([[1, 4], [3, 0]]), [2, 2])


@pytest.mark.equation("HN-2")
def test_fuse_gives_the_angles_of_the_table():
    """Lengths 3, 5, 7 drop out; the rows 9, 9 of items without an image do too."""
    expected = [[C, C], [0, 1], [1, 0], [-C, C], [-1, 0], [0, -1]]
    np.testing.assert_allclose(oracle.fuse(H, X, HAS_IMAGE), expected, atol=1e-15)


@pytest.mark.equation("HN-3")
def test_neighbours_of_the_six_items():
    """Cosine of the angle between; every tie goes to the smaller row.

    0 (45):  1 and 2 at 45 degrees tie.        1 (90):  0 and 3 at 45 degrees tie.
    2 (0):   0 at 45; 1 and 5 at 90 tie -> 1.  3 (135): 1 and 4 at 45 degrees tie.
    4 (180): 3 at 45; 1 and 5 at 90 tie -> 1.  5 (270): 2 and 4 at 90 degrees tie.
    """
    _, scores, index = six_items()
    np.testing.assert_array_equal(index, [[1, 2], [0, 3], [0, 1], [1, 4], [3, 1], [2, 4]])
    np.testing.assert_allclose(scores, [[C, C], [C, C], [C, 0], [C, C], [C, 0], [0, 0]], atol=1e-15)


@pytest.mark.equation("HN-4")
def test_union_gap_of_three_pairs():
    r"""U is a set: {2,4}+{0,1}+{3,1} = {0,1,2,3,4};  {0,1}+{1,2}+{0,3} = {0,1,2,3};
    {2,5}+{0,1}+{2,4} = {0,1,2,4,5}.

    (2, 4): to item 2 (c, 0, 1, -c, -1), to item 4 (-c, 0, -1, c, 1),
            one Z = 1 + 2 cosh c + 2 cosh 1 = 6.607345 for both;
            differences 2 sinh c / Z, 0, 2 sinh 1 / Z, and the same two negated:
            Delta = 2 sqrt2 sqrt(sinh^2 c + sinh^2 1) / Z
                  = 2.828427 * sqrt(0.589092 + 1.381098) / 6.607345 = 0.600858.
    (0, 1): to item 0 (1, c, c, 0), to item 1 (c, 1, 0, c), Z = e + 2 exp(c) + 1 = 7.774512;
            Delta = sqrt(2 (e - exp c)^2 + 2 (exp c - 1)^2) / Z
                  = sqrt(2 * 0.476333 + 2 * 1.057020) / 7.774512 = 0.225249.
    (2, 5): to item 2 (c, 0, 1, -1, 0), Z = 7.114276; to item 5 (-c, -1, 0, 0, 1), Z = 5.579230;
            p_w = .285077 .140562 .382088 .051710 .140562;
            p_l = .088376 .065937 .179236 .179236 .487214;
            differences .196701 .074625 .202852 -.127526 -.346652:
            Delta = sqrt(.221840) = 0.470999.
    """
    e, scores, index = six_items()
    Z = 1 + 2 * math.cosh(C) + 2 * math.cosh(1)
    root = 2 * math.sqrt(2) * math.sqrt(math.sinh(C) ** 2 + math.sinh(1) ** 2) / Z
    assert oracle.cluster_gap(e, scores, index, 2, 4) == pytest.approx(root, abs=1e-14)
    assert oracle.cluster_gap(e, scores, index, 2, 4) == pytest.approx(0.600858, abs=1e-6)
    assert oracle.cluster_gap(e, scores, index, 0, 1) == pytest.approx(0.225249, abs=1e-6)
    assert oracle.cluster_gap(e, scores, index, 2, 5) == pytest.approx(0.470999, abs=1e-6)


@pytest.mark.equation("HN-4")
def test_ranked_gap_does_not_see_opposite_items():
    """Items 2 and 4 are opposite, yet both have the scores (c, 0): ranked 0.

    Items 2 and 0 are 45 degrees apart, scores (c, 0) and (c, c):
    p = (sigma(c), sigma(-c)) and (1/2, 1/2), so
    Delta = sqrt2 (sigma(c) - 1/2) = sqrt2 * 0.169762 = 0.240079.
    """
    e, scores, index = six_items()
    assert oracle.cluster_gap(e, scores, index, 2, 4, "ranked") == pytest.approx(0, abs=1e-15)
    assert oracle.cluster_gap(e, scores, index, 2, 0, "ranked") == pytest.approx(0.240079, abs=1e-6)


@pytest.mark.equation("HN-4")
def test_cosine_gap():
    """Opposite items: 1 - (-1) = 2. 45 degrees: 1 - c = 0.292893. The item itself: 0."""
    e, scores, index = six_items()
    assert oracle.cluster_gap(e, scores, index, 2, 4, "cosine") == pytest.approx(2, abs=1e-15)
    assert oracle.cluster_gap(e, scores, index, 0, 1, "cosine") == pytest.approx(0.292893, abs=1e-6)
    assert oracle.cluster_gap(e, scores, index, 3, 3, "cosine") == 0


@pytest.mark.equation("HN-4")
def test_repeated_members_would_change_the_gap():
    """Negative control. (2, 4) with item 1 counted twice adds exp(0) to Z, the difference at item 1
    stays 0:
    2 sqrt2 sqrt(1.970190) / 7.607345 = 0.521875 in place of 0.600858.
    """
    e, _, index = six_items()
    assert oracle.cluster_gap_with_repeats(e, index, 2, 4) == pytest.approx(0.521875, abs=1e-6)


@pytest.mark.equation("HN-5")
def test_hardness_forms():
    """Delta = (0, ln 3): sigma = 1/2 and 3/4; mean Delta = ln 3 / 2,
    sigma = 1 / (1 + 1/sqrt3) = 0.633975, ratios 0.788675 and 1.183013;
    population std ln 3 / 2, so standardised -1 and 1:
    2 sigma(-1) = 0.537883, 2 sigma(1) = 1.462117.
    """
    delta = [0.0, math.log(3)]
    np.testing.assert_allclose(oracle.hardness(delta), [0.5, 0.75], atol=1e-15)
    np.testing.assert_allclose(oracle.hardness(delta, "ratio"), [0.788675, 1.183013], atol=1e-6)
    np.testing.assert_allclose(
        oracle.hardness(delta, "standardised"), [0.537883, 1.462117], atol=1e-6
    )


@pytest.mark.equation("HN-7")
def test_responsiveness_of_four_pairs():
    """R = (1, 2, 3, 10): mean 4, R~ = (1/4, 1/2, 3/4, 5/2); kept 1/2 and 3/4, mean 5/8;
    mean of all 1: eta = sigma(0.625) / sigma(1) = 0.651355 / 0.731059 = 0.890975.
    One sign or scale changes nothing.
    """
    R = np.array([1.0, 2.0, 3.0, 10.0])
    for factor in (1, -1, 100):
        assert oracle.responsiveness(factor * R) == pytest.approx(0.890975, abs=1e-6)


@pytest.mark.equation("HN-7")
def test_responsiveness_fallback_and_zero():
    """R = (-3, 1, 2, 0): mean 0, mean |R| = 3/2, R~ = (-2, 2/3, 4/3, 0); kept 0 and 2/3, mean 1/3;
    mean of all 0: eta = sigma(1/3) / sigma(0) = 2 sigma(1/3) = 1.165140.
    All zero: 1. Two pairs: an error.
    """
    assert oracle.responsiveness([-3, 1, 2, 0]) == pytest.approx(1.165140, abs=1e-6)
    assert oracle.responsiveness([0, 0, 0]) == 1
    with pytest.raises(ValueError, match="at least 3"):
        oracle.responsiveness([1, 2])


@pytest.mark.equation("HN-7")
def test_responsiveness_trim_and_ema():
    """trim: of ten pairs 0.25 drops floor(2.5) = 2 from each end, 0.05 still drops 1.
    ema: R = (1, 2, 6), running mean 1, std 2: R~ = (0, 1/2, 5/2), kept 1/2:
    eta = 2 sigma(1/2) = 1.244919.
    """
    assert oracle.kept_values(range(10), 0.25) == [2, 3, 4, 5, 6, 7]
    assert oracle.kept_values(range(10), 0.05) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert oracle.responsiveness_ema([1, 2, 6], 1, 2) == pytest.approx(1.244919, abs=1e-6)


@pytest.mark.equation("HN-8")
def test_from_items_to_the_loss():
    """The three pairs (2, 4), (0, 1), (2, 5) with h = (20, 40, 120), beta0 = 0.1.

    lambda = sigma(Delta) = 0.645853, 0.556075, 0.615620.
    R = (2, 4, 12), mean 6, R~ = (1/3, 2/3, 2), kept 2/3:
    eta = sigma(2/3) / sigma(1) = 0.660756 / 0.731059 = 0.903835.
    beta' = eta lambda 0.1 = 0.0583744, 0.0502600, 0.0556419: the most alike pair (0, 1) has the
    smallest.
    beta' h = 1.167489, 2.010401, 6.677028;
    loss = log(1 + exp(-beta' h)) = 0.270903, 0.125694, 0.001259.
    """
    e, scores, index = six_items()
    h = [20, 40, 120]
    delta = [oracle.cluster_gap(e, scores, index, w, l) for w, l in ((2, 4), (0, 1), (2, 5))]
    lam = oracle.hardness(delta)
    np.testing.assert_allclose(lam, [0.645853, 0.556075, 0.615620], atol=1e-6)
    eta = oracle.responsiveness(oracle.reward_gap(h, 0.1))
    assert eta == pytest.approx(0.903835, abs=1e-6)
    beta = oracle.pair_beta(lam, eta)
    np.testing.assert_allclose(beta, [0.0583744, 0.0502600, 0.0556419], atol=1e-7)
    np.testing.assert_allclose(oracle.dpo_loss(h, beta), [0.270903, 0.125694, 0.001259], atol=1e-6)


@pytest.mark.equation("HN-8")
def test_beta_floor():
    """eta lambda beta0 = 1e-4 * 0.5 * 0.1 = 5e-6 is kept; a hundredth of it is lifted to 1e-6."""
    np.testing.assert_allclose(oracle.pair_beta([0.5], 1e-4), [5e-6], rtol=1e-12)
    np.testing.assert_allclose(oracle.pair_beta([0.5], 1e-6), [1e-6], rtol=1e-12)


@pytest.mark.equation("SFT-1")
def test_sft_loss_compares_with_the_token_after():
    """Logits 0 and ln 3 give probabilities 1/4 and 3/4. Row 1, labels (-100, 1, 0): position 0
    predicts token 1 with 3/4, position 1 predicts token 0 with 3/4. Row 2, labels (-100, -100, 0):
    position 1 predicts it with 1/4. Mean over the three tokens, not over rows:
    (2 ln(4/3) + ln 4) / 3 = 0.653886. The last position predicts nothing.
    """
    a = math.log(3)
    logits = [[[0, a], [a, 0], [50, -50]], [[-50, 50], [0, a], [7, 7]]]
    labels = [[-100, 1, 0], [-100, -100, 0]]
    assert oracle.sft_loss(logits, labels) == pytest.approx(0.653886, abs=1e-6)
    assert oracle.answer_log_prob([[0, a], [a, 0]], [1, 0]) == pytest.approx(
        2 * math.log(0.75), abs=1e-15
    )


@pytest.mark.equation("DPO-1")
def test_preference_logit():
    """(-3 - -5) - (-9 - -8) = 2 + 1 = 3."""
    np.testing.assert_array_equal(oracle.preference_logit([-3], [-9], [-5], [-8]), [3])


@pytest.mark.equation("DPO-2")
def test_dpo_loss_limits():
    """h = 0: ln 2. beta h = -ln 3: sigma = 1/4, ln 4. Very large margins: 0 and -beta h."""
    expected = [math.log(2), math.log(4), 0, 1e3]
    np.testing.assert_allclose(
        oracle.dpo_loss([0, -10 * math.log(3), 1e4, -1e4], 0.1), expected, atol=1e-14
    )


@pytest.mark.equation("HN-11")
def test_weighted_loss_and_its_slopes():
    """beta' = 0.05 and 0.1 at h = 0: slopes -0.025 and -0.05, so the low beta' pulls LESS;
    normalised both -0.05. At h = 100: -0.05 sigma(-5) = -0.000335 against -0.1 sigma(-10) =
    -0.0000045: now the low beta' pulls more.
    """
    beta = [0.05, 0.1]
    np.testing.assert_allclose(oracle.dpo_slope([0, 0], beta), [-0.025, -0.05], atol=1e-15)
    np.testing.assert_allclose(oracle.dpo_slope([0, 0], beta, 0.1), [-0.05, -0.05], atol=1e-15)
    np.testing.assert_allclose(
        oracle.dpo_slope([100, 100], beta), [-3.3464e-4, -4.5398e-6], rtol=1e-4
    )
    np.testing.assert_allclose(
        oracle.dpo_loss([0, 0], beta, 0.1), [2 * math.log(2), math.log(2)], atol=1e-15
    )


@pytest.mark.equation("HN-9")
def test_relative_noise_scales():
    """A = (3, 4): RMS sqrt(25/2) = 3.535534, times 0.1. B = 0 with 12 inputs: 1 / sqrt(36) = 1/6; B
    = 2 exceeds that.
    """
    assert oracle.noise_scale_A(0.1, [[3, 4]]) == pytest.approx(0.3535534, abs=1e-7)
    assert oracle.noise_scale_B(0.1, [[0], [0]], 12) == pytest.approx(0.1 / 6, abs=1e-15)
    assert oracle.noise_scale_B(0.1, [[2], [-2]], 12) == pytest.approx(0.2, abs=1e-15)


@pytest.mark.equation("HN-10")
def test_lora_forward():
    """x = (1, 2), W = (1, 1; 0, 1), bias (10, 20): base 13, 22. A = (1, 1) gives 3, B = (1; 2),
    scale 4: 12, 24. With noise_A = (0, 1) the inner value is 5; with noise_B = (1; 0) B is (2; 2):
    4 * 2 * 5 = 40 twice.
    """
    x, W, bias, A, B = [[1, 2]], [[1, 1], [0, 1]], [10, 20], [[1, 1]], [[1], [2]]
    np.testing.assert_array_equal(oracle.lora_forward(x, W, bias, A, B, 4), [[25, 46]])
    np.testing.assert_array_equal(
        oracle.lora_forward(x, W, None, A, B, 4, [[0, 1]], [[1], [0]]), [[43, 42]]
    )


@pytest.mark.equation("HN-12")
def test_kl_divergence():
    """p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; the other way round
    1/2 ln(2/3) + 1/2 ln 2 = 0.143841. A second position with p = q halves the mean."""
    p, q = [math.log(3), 0], [5, 5]
    assert oracle.kl_divergence([p], [q]) == pytest.approx(0.130812, abs=1e-6)
    assert oracle.kl_divergence([q], [p]) == pytest.approx(0.143841, abs=1e-6)
    assert oracle.kl_divergence([p, q], [q, q]) == pytest.approx(0.065406, abs=1e-6)


@pytest.mark.equation("EV-1")
def test_ties_count_against_the_positive():
    """The positive scores -2; -1 is higher, -2 ties, -3 is lower: rank 3. All ten equal: rank 10.
    """
    assert oracle.rank_of_positive([-2, -1, -2, -3], 0) == 3
    assert oracle.rank_of_positive([0] * 10, 4) == 10


@pytest.mark.equation("EV-2")
def test_ndcg_and_hits_of_ranks_one_to_four():
    """1 / log2(2) = 1, 1 / log2(3) = 0.630930, 1 / log2(4) = 0.5, rank 4 is out: mean 2.130930 / 4
    = 0.532732; hits 3 / 4.
    """
    assert oracle.ndcg([1, 2, 3, 4], 3) == pytest.approx(0.532732, abs=1e-6)
    assert oracle.hit_rate([1, 2, 3, 4], 3) == 0.75


@pytest.mark.equation("EV-2")
def test_chance_values_of_ten_candidates():
    """Each of the ranks 1..10 once: HR@3 = 3/10; NDCG@3 = (1 + 0.630930 + 0.5) / 10 = 0.2131."""
    assert oracle.hit_rate(range(1, 11), 3) == pytest.approx(0.30, abs=1e-15)
    assert oracle.ndcg(range(1, 11), 3) == pytest.approx(0.2131, abs=5e-5)


@pytest.mark.equation("EV-3")
def test_auc_ties_count_half():
    """User 1: 2 over (1, 2, 3) gives 1 + 1/2 + 0 of 3 = 1/2; user 2: 1. Mean 3/4. Pooled pairs {2,
    5} x {1, 2, 3}: 4.5 / 6, and {2, 5} x {1, 2, 3, 6}: 4.5 / 8.
    """
    assert oracle.auc([2, 9], [[1, 2, 3], [1, 1, 1]]) == pytest.approx(0.75, abs=1e-15)
    assert oracle.binary_auc([2, 5], [1, 2, 3]) == pytest.approx(0.75, abs=1e-15)
    assert oracle.binary_auc([2, 5], [1, 2, 3, 6]) == pytest.approx(0.5625, abs=1e-15)


@pytest.mark.equation("EV-4")
def test_similarity_groups():
    """Five items in two groups: sizes 3 and 2, by `before`: (.1, .2, .3) and (.4, .5)."""
    before, after = oracle.similarity_groups([0.5, 0.1, 0.3, 0.2, 0.4], [1, 2, 3, 4, 5], groups=2)
    np.testing.assert_allclose(before, [0.2, 0.45], atol=1e-15)
    np.testing.assert_allclose(after, [3, 3], atol=1e-15)
