r"""Independent oracle: every equation once more, in plain float64 loops.

Written from the documents alone, without sight of the package, so that a mistake has to be made
twice to go unnoticed. Nothing here is vectorised or fast; each function follows its equation term
by term. Arrays or nested lists go in, Python floats or float64 arrays come out. The package never
imports this file.
"""

import math

import numpy as np

# ----------------------------------------------------------------------------- elementary functions


def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow on either side."""
    x = float(x)
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def log_sigmoid(x):
    """log sigma(x) = min(x, 0) - log(1 + exp(-|x|)): finite for every finite x."""
    x = float(x)
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def log_softmax(row):
    """log softmax of one list of scores: the maximum is subtracted first."""
    row = [float(v) for v in row]
    top = max(row)
    log_total = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - log_total for v in row]


def softmax(row):
    """exp of log_softmax."""
    return [math.exp(v) for v in log_softmax(row)]


def dot(a, b):
    """Inner product of two vectors of one length."""
    if len(a) != len(b):
        raise ValueError(f"lengths differ: {len(a)} and {len(b)}")
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def norm(v):
    """v divided by its Euclidean length."""
    length = math.sqrt(dot(v, v))
    return [float(x) / length for x in v]


def average(values):
    """Arithmetic mean of a non-empty list."""
    values = [float(v) for v in values]
    return math.fsum(values) / len(values)


def rms(matrix):
    """Root of the mean square of all entries of a matrix."""
    squares = []
    for row in matrix:
        squares += [float(v) ** 2 for v in row]
    return math.sqrt(average(squares))


# ------------------------------------------------------------------------------ losses: SFT and DPO


def sft_loss(logits, labels):
    """Oracle of SFT-1. logits (B, T, V); labels (B, T), aligned with the input, -100 outside the
    answer.

    The output at position t - 1 predicts token t. Mean over the answer tokens of the whole batch,
    not over rows.
    """
    terms = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        for t in range(1, len(row_labels)):
            token = int(row_labels[t])
            if token != -100:
                terms.append(-log_softmax(row_logits[t - 1])[token])
    if not terms:
        raise ValueError("no answer token in the batch")
    return average(terms)


def answer_log_prob(logits, tokens):
    """Oracle of the log pi(y|x) in SFT-1, DPO-1 and EV-1. logits (n, V) that predict tokens (n,):
    sum of log softmax.
    """
    if len(logits) != len(tokens):
        raise ValueError(f"{len(logits)} rows of logits for {len(tokens)} tokens")
    return math.fsum(
        log_softmax(row)[int(token)] for row, token in zip(logits, tokens, strict=True)
    )


def preference_logit(policy_w, policy_l, ref_w, ref_l):
    """Oracle of DPO-1: four (P,) lists of answer log-probabilities -> h (P,)."""
    h = []
    for pw, pl, rw, rl in zip(policy_w, policy_l, ref_w, ref_l, strict=True):
        h.append((float(pw) - float(rw)) - (float(pl) - float(rl)))
    return np.array(h, dtype=np.float64)


def dpo_loss(h, beta, normalised_by=None):
    """Oracle of DPO-2 (scalar beta) and HN-11 (one beta a pair): (P,) losses, times normalised_by /
    beta if given.
    """
    h = [float(v) for v in h]
    betas = [float(beta)] * len(h) if np.ndim(beta) == 0 else [float(b) for b in beta]
    losses = []
    for gap, b in zip(h, betas, strict=True):
        loss = -log_sigmoid(b * gap)
        losses.append(loss if normalised_by is None else float(normalised_by) / b * loss)
    return np.array(losses, dtype=np.float64)


def dpo_slope(h, beta, normalised_by=None):
    """Derivative of dpo_loss with respect to h, pair by pair: -beta sigma(-beta h), or -beta0
    sigma(-beta h).
    """
    h = [float(v) for v in h]
    betas = [float(beta)] * len(h) if np.ndim(beta) == 0 else [float(b) for b in beta]
    front = betas if normalised_by is None else [float(normalised_by)] * len(h)
    return np.array(
        [-f * sigmoid(-b * gap) for f, b, gap in zip(front, betas, h, strict=True)],
        dtype=np.float64,
    )


def item_embedding(rows):
    """Oracle of HN-1, default: the mean of the rows (tokens, d) of one title, or of one image ->
    (d,).
    """
    columns = zip(*rows, strict=True)
    return np.array([average(column) for column in columns], dtype=np.float64)


# ----------------------------------------------------------------------- HaRS: embeddings, clusters


def fuse(H, X, has_image=None):
    """Oracle of HN-2: norm(norm(H_i) + norm(X_i)); norm(H_i) for an item without an image. (N, d),
    (N, d) -> (N, d).
    """
    fused = []
    for i in range(len(H)):
        text = norm(H[i])
        if has_image is None or bool(has_image[i]):
            image = norm(X[i])
            fused.append(norm([a + b for a, b in zip(text, image, strict=True)]))
        else:
            fused.append(text)
    return np.array(fused, dtype=np.float64)


def topk_neighbors(e, k):
    """Oracle of HN-3: for each row the k other rows with the largest inner product; ties to the
    smaller index.

    The score used for sorting is the plain float64 inner product, so that equal rows tie exactly.
    """
    n = len(e)
    if not 1 <= k <= n - 1:
        raise ValueError(f"k = {k} with {n} items: expected 1 .. {n - 1}")
    scores, index = [], []
    for i in range(n):
        others = [(-dot(e[i], e[j]), j) for j in range(n) if j != i]
        others.sort()  # by falling score, then by rising index
        scores.append([-negative for negative, _ in others[:k]])
        index.append([j for _, j in others[:k]])
    return np.array(scores, dtype=np.float64), np.array(index, dtype=np.int64)


def cluster_gap(e, scores, index, chosen, rejected, form="union"):
    """Oracle of HN-4 for one pair: chosen row w, rejected row r (l in the document) -> Delta >= 0.

    union:  softmax over the set {w, r} + N(w) + N(r) of the similarities to w and to r; Euclidean
            distance; s_jj = 1.
    ranked: softmax of each item's own K scores by rank, members not compared.
    cosine: 1 - <e_w, e_r>, the two items alone.
    signed: the mean of w's K scores less that of r's.
    centroid: distance of the means of {w} + N(w) and of {r} + N(r).
    """
    w, r = int(chosen), int(rejected)
    if form == "signed":
        return average(scores[w]) - average(scores[r])
    if form == "centroid":
        squares = []
        for column in range(len(e[0])):
            own = average([e[j][column] for j in [w, *index[w]]])
            other = average([e[j][column] for j in [r, *index[r]]])
            squares.append((own - other) ** 2)
        return math.sqrt(math.fsum(squares))
    if form == "cosine":
        return 1.0 - (1.0 if w == r else dot(e[w], e[r]))
    if form == "ranked":
        p_w, p_l = softmax(scores[w]), softmax(scores[r])
    elif form == "union":
        members = []
        for j in [w, r] + [int(j) for j in index[w]] + [int(j) for j in index[r]]:
            if j not in members:
                members.append(j)
        p_w = softmax([1.0 if j == w else dot(e[w], e[j]) for j in members])
        p_l = softmax([1.0 if j == r else dot(e[r], e[j]) for j in members])
    else:
        raise ValueError(f"form {form!r}")
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(p_w, p_l, strict=True)))


def cluster_gap_with_repeats(e, index, chosen, rejected):
    """A deliberate mistake for the negative controls: the union of HN-4 as a list, repeated members
    counted again.
    """
    w, r = int(chosen), int(rejected)
    members = [w, r] + [int(j) for j in index[w]] + [int(j) for j in index[r]]
    p_w = softmax([1.0 if j == w else dot(e[w], e[j]) for j in members])
    p_l = softmax([1.0 if j == r else dot(e[r], e[j]) for j in members])
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(p_w, p_l, strict=True)))


def hardness(delta, form="sigmoid"):
    """Oracle of HN-5: delta (P,) -> lambda (P,), smaller = harder. The deviation is the population
    one (divided by P).
    """
    delta = [float(d) for d in delta]
    m = average(delta)
    if form == "sigmoid":
        lam = [sigmoid(d) for d in delta]
    elif form == "ratio":
        lam = [sigmoid(d) / sigmoid(m) for d in delta]
    elif form == "standardised":
        s = math.sqrt(average([(d - m) ** 2 for d in delta]))
        lam = [2.0 * sigmoid((d - m) / s) for d in delta]
    else:
        raise ValueError(f"form {form!r}")
    return np.array(lam, dtype=np.float64)


# ------------------------------------------------------------------ HaRS: responsiveness and weight


def reward_gap(h, beta0):
    """Oracle of HN-6: R_i = beta0 h_i."""
    return np.array([float(beta0) * float(v) for v in h], dtype=np.float64)


def kept_values(values, trim=None):
    """The part of HN-7 that drops extremes: one from each end, or max(1, floor(trim n)) from each
    end.
    """
    n = len(values)
    if n < 3:
        raise ValueError(f"{n} pairs: at least 3 are needed")
    drop = 1 if trim is None else max(1, math.floor(trim * n))
    if n - 2 * drop < 1:
        raise ValueError(f"trim = {trim} leaves nothing of {n} pairs")
    return sorted(float(v) for v in values)[drop : n - drop]


def responsiveness(R, trim=None):
    """Oracle of HN-7: R (P,) -> eta > 0. R~ = R / mean(R), or R / mean|R| where |mean(R)| <= 1e-8;
    all zero gives 1.
    """
    R = [float(r) for r in R]
    if len(R) < 3:
        raise ValueError(f"{len(R)} pairs: at least 3 are needed")
    scale = average(R)
    if abs(scale) <= 1e-8:
        scale = average([abs(r) for r in R])
    if scale == 0.0:
        return 1.0
    normalised = [r / scale for r in R]
    return sigmoid(average(kept_values(normalised, trim))) / sigmoid(average(normalised))


def responsiveness_of_pairs(R, trim=None):
    """Oracle of HN-7, reading `pair`: sigma(R~_i) / sigma(mean R~), where an R~ outside of those
    that HN-7 keeps is replaced by the nearest of these; all zero gives 1.
    """
    R = [float(r) for r in R]
    scale = average(R)
    if abs(scale) <= 1e-8:
        scale = average([abs(r) for r in R])
    if scale == 0.0:
        return [1.0] * len(R)
    normalised = [r / scale for r in R]
    kept = kept_values(normalised, trim)
    etas = []
    for value in normalised:
        inside = min(max(value, kept[0]), kept[-1])
        etas.append(sigmoid(inside) / sigmoid(average(normalised)))
    return etas


def beta_dpo_factor(R, running_mean, slope=0.6):
    """Oracle of beta-DPO's 1 + a (mean margin - M0), at least 0."""
    return max(0.0, 1.0 + slope * (average(R) - float(running_mean)))


def responsiveness_ema(R, running_mean, running_std, trim=None):
    """Oracle of HN-7, option `ema`: R~ = (R - running mean) / running std; the running mean itself
    becomes 0.
    """
    normalised = [(float(r) - float(running_mean)) / float(running_std) for r in R]
    return sigmoid(average(kept_values(normalised, trim))) / sigmoid(0.0)


def running_statistics(R, before=None, decay=0.9):
    """Oracle of HN-7, option `ema`: (mean, variance) of the rewards so far. The first batch sets
    them; a later one counts for 1 - decay, what was before it for decay. Population variance.
    """
    R = [float(r) for r in R]
    mean = average(R)
    variance = average([(r - mean) ** 2 for r in R])
    if before is None:
        return mean, variance
    old_mean, old_variance = before
    return (
        decay * old_mean + (1.0 - decay) * mean,
        decay * old_variance + (1.0 - decay) * variance,
    )


def pair_beta(lam, eta, beta0=0.1, floor=1e-6):
    """Oracle of HN-8: beta'_i = max(eta lambda_i beta0, floor)."""
    return np.array(
        [max(float(eta) * float(v) * float(beta0), float(floor)) for v in lam], dtype=np.float64
    )


def alignment_kl(H, X):
    """Oracle of the image-text term: for each item i the softmax over j != i of cos(H_i, H_j), and
    the same of X; the mean over i of KL(first || second).
    """
    H, X = [norm(row) for row in H], [norm(row) for row in X]
    terms = []
    for i in range(len(H)):
        others = [j for j in range(len(H)) if j != i]
        p = softmax([dot(H[i], H[j]) for j in others])
        q = softmax([dot(X[i], X[j]) for j in others])
        terms.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return average(terms)


# --------------------------------------------------------------------------------------------- NoDO


def noise_scale_A(sigma, A):
    """Oracle of HN-9, `relative`: the noise on A (r, in) has the standard deviation sigma times the
    RMS of A.
    """
    return float(sigma) * rms(A)


def noise_scale_B(sigma, B, in_features):
    """Oracle of HN-9, `relative`: sigma times the RMS of B, but at least that of a fresh A = 1 /
    sqrt(3 in_features).

    A fresh A is uniform on +- 1 / sqrt(in_features); the RMS of a uniform variable on +-a is a /
    sqrt(3).
    """
    return float(sigma) * max(rms(B), 1.0 / math.sqrt(3.0 * in_features))


def lora_forward(x, W, bias, A, B, scale, noise_A=0, noise_B=0):
    """Oracle of HN-9 and HN-10: y = W x + bias + scale (B + noise_B) (A + noise_A) x for each row
    of x.

    x (n, in), W (out, in), bias (out,) or None, A (r, in), B (out, r), noise as A and B or a number
    -> y (n, out).
    """
    r, n_in, n_out = len(A), len(A[0]), len(B)

    def shifted(matrix, noise, i, j):
        return float(matrix[i][j]) + (float(noise) if np.ndim(noise) == 0 else float(noise[i][j]))

    rows = []
    for row in x:
        inner = [
            math.fsum(shifted(A, noise_A, k, j) * float(row[j]) for j in range(n_in))
            for k in range(r)
        ]
        out = []
        for o in range(n_out):
            base = dot(W[o], row) + (0.0 if bias is None else float(bias[o]))
            update = math.fsum(shifted(B, noise_B, o, k) * inner[k] for k in range(r))
            out.append(base + float(scale) * update)
        rows.append(out)
    return np.array(rows, dtype=np.float64)


def kl_divergence(policy_logits, ref_logits):
    """Oracle of HN-12: exact KL(policy || reference) over the vocabulary, mean over the n
    positions. Both (n, V).
    """
    terms = []
    for policy_row, ref_row in zip(policy_logits, ref_logits, strict=True):
        log_p, log_q = log_softmax(policy_row), log_softmax(ref_row)
        terms.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    return average(terms)


# ------------------------------------------------------------------------------------------ metrics


def rank_of_positive(scores, positive_index):
    """Oracle of EV-1: 1 + the number of other candidates that score at least as high (ties against
    the positive).
    """
    rank = 1
    for j, score in enumerate(scores):
        if j != positive_index and float(score) >= float(scores[positive_index]):
            rank += 1
    return rank


def hit_rate(ranks, k):
    """Oracle of EV-2: the share of users whose positive ranks within k."""
    return average([1.0 if int(rank) <= k else 0.0 for rank in ranks])


def ndcg(ranks, k):
    """Oracle of EV-2: with one positive the ideal DCG is 1, so NDCG@k = 1 / log2(1 + rank) if rank
    <= k, else 0.
    """
    return average([1.0 / math.log2(1.0 + int(rank)) if int(rank) <= k else 0.0 for rank in ranks])


def pairwise_credit(positive, negative):
    """1 if the positive scores higher, 1/2 on a tie, 0 otherwise."""
    if float(positive) > float(negative):
        return 1.0
    return 0.5 if float(positive) == float(negative) else 0.0


def auc(positive, negative):
    """Oracle of EV-3 on the ranking task: positive (U,), negative (U, n); mean over users of the
    pairwise share.
    """
    per_user = []
    for own, others in zip(positive, negative, strict=True):
        per_user.append(average([pairwise_credit(own, other) for other in others]))
    return average(per_user)


def binary_auc(scores_pos, scores_neg):
    """Oracle of EV-3 on the binary task: the pairwise share over all (positive, negative) pairs of
    rows.
    """
    credits = []
    for p in scores_pos:
        credits += [pairwise_credit(p, q) for q in scores_neg]
    return average(credits)


def similarity_groups(before, after, groups=10):
    """Oracle of EV-4: sort by `before`; equal groups (earlier ones larger by one); (mean before,
    mean after) a group.
    """
    n = len(before)
    order = sorted(range(n), key=lambda i: (float(before[i]), i))
    before_means, after_means, start = [], [], 0
    for g in range(groups):
        size = n // groups + (1 if g < n % groups else 0)
        members = order[start : start + size]
        start += size
        before_means.append(average([before[i] for i in members]))
        after_means.append(average([after[i] for i in members]))
    return np.array(before_means, dtype=np.float64), np.array(after_means, dtype=np.float64)


# ------------------------------------------------------------------------------------------- BR-MRS


def free_items(positives, n_items):
    """Oracle of BR-1, what may be drawn: the items that are not among the user's positives, in
    order of id.
    """
    taken = set(map(int, positives))
    return [j for j in range(n_items) if j not in taken]


def draw_by_rejection(positives, n_items, n, random):
    """Oracle of BR-1, the textbook way: draw any item until it is not a positive, n times. `random`
    = random.Random.
    """
    taken, drawn = {int(p) for p in positives}, []
    while len(drawn) < n:
        j = random.randrange(n_items)
        if j not in taken:
            drawn.append(j)
    return drawn


def hard_negatives(s_v, s_t):
    """Oracle of BR-2: (B, n), (B, n) scores of the pool -> lists j_v, j_t of the first place of the
    largest score of each row.
    """
    def places(scores):
        found = []
        for row in scores:
            best = 0
            for j in range(1, len(row)):
                if float(row[j]) > float(row[best]):
                    best = j
            found.append(best)
        return found

    return places(s_v), places(s_t)


def chns_loss(t_pos, t_at_jv, v_pos, v_at_jt):
    """Oracle of BR-3, a triple at a time."""
    losses = []
    for tp, tj, vp, vj in zip(t_pos, t_at_jv, v_pos, v_at_jt, strict=True):
        losses.append(-(log_sigmoid(float(tp) - float(tj)) + log_sigmoid(float(vp) - float(vj))))
    return np.array(losses, dtype=np.float64)


def synergy_loss(gap_f, gap_t, gap_v, theta=0.0):
    """Oracle of BR-4, a triple at a time."""
    losses = []
    for f, t, v in zip(gap_f, gap_t, gap_v, strict=True):
        losses.append(-log_sigmoid(float(f) - max(float(t), float(v)) - float(theta)))
    return np.array(losses, dtype=np.float64)


def bpr_loss(gap):
    """Oracle of BR-5, a triple at a time."""
    return np.array([-log_sigmoid(g) for g in gap], dtype=np.float64)


def total_loss(bpr, chns, syn, squared_norm, lambda_h, lambda_s, weight_decay, bpr_weight=1.0):
    """Oracle of BR-6: the sums of the document as means over the batch, each with its weight."""
    return (
        float(bpr_weight) * average(bpr)
        + lambda_h * average(chns)
        + lambda_s * average(syn)
        + weight_decay * float(squared_norm)
    )


def normalised_adjacency(edges, n):
    """A with A_ij = A_ji = the weight of edge (i, j, weight), summed if it repeats, then A_ij /
    sqrt(row sum i * row sum j).
    """
    A = np.zeros((n, n))
    for i, j, weight in edges:
        A[i][j] += weight
        A[j][i] += weight
    sums = [math.fsum(row) for row in A]
    normalised = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if A[i][j]:
                normalised[i][j] = A[i][j] / math.sqrt(sums[i] * sums[j])
    return normalised


def interaction_graph(pairs, n_users, n_items):
    """The user-item graph of LightGCN: one edge for each distinct pair (u, i), at u and n_users +
    i.
    """
    distinct = sorted({(int(u), int(i)) for u, i in pairs})
    edges = [(u, n_users + i, 1.0) for u, i in distinct]
    return normalised_adjacency(edges, n_users + n_items)


def lightgcn(A, x, layers):
    """Mean over l = 0 .. L of A^l x."""
    layer, total = np.array(x, dtype=np.float64), np.array(x, dtype=np.float64)
    for _ in range(layers):
        rows = []
        for row in A:
            rows.append([dot(row, column) for column in layer.T])
        layer = np.array(rows)
        total = total + layer
    return total / (layers + 1)


def likeness_graph(interacted, features, k, alpha):
    """e_ij = alpha |O_i & O_j| / |O_i or O_j| + (1 - alpha) mean_m cos(x_i^m, x_j^m).

    The k largest of each row, ties to the smaller id, only those above 0; symmetric and normalised.
    interacted: a set of columns a row. features: (N, d_m) a modality.
    """
    def cosine(a, b):
        lengths = math.sqrt(dot(a, a) * dot(b, b))
        return dot(a, b) / lengths if lengths else 0.0

    n, edges = len(interacted), []
    for i in range(n):
        row = []
        for j in range(n):
            if j != i:
                union = len(interacted[i] | interacted[j])
                overlap = len(interacted[i] & interacted[j]) / union if union else 0.0
                likeness = average([cosine(x[i], x[j]) for x in features])
                row.append((-(alpha * overlap + (1 - alpha) * likeness), j))
        edges += [(i, j, -negative) for negative, j in sorted(row)[:k] if -negative > 0]
    return normalised_adjacency(edges, n)
