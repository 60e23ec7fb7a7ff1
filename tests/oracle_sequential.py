"""Independent oracle of the sequence models: each equation once more, in plain float64 loops.

Written from the papers, as tests/oracle.py is from the documents: one sequence at a time, without
padding, a number at a time. Weights come as a mapping from a name to an array; `linear` and
`layer_norm` read NAME.weight (out, in) and NAME.bias. The package never imports this file.
"""

import math

import numpy as np
from oracle import average, dot, log_sigmoid, log_softmax, sigmoid, softmax

EPS = 1e-8


def part(weights, name):
    """What lies under a name: NAME.x -> x."""
    start = f"{name}."
    return {key[len(start) :]: w for key, w in weights.items() if key.startswith(start)}


def linear(weights, name, x):
    """W x + b of one vector."""
    W = weights[f"{name}.weight"]
    b = weights.get(f"{name}.bias", np.zeros(len(W)))
    return [dot(row, x) + float(bias) for row, bias in zip(W, b, strict=True)]


def layer_norm(weights, name, x):
    """The vector at mean 0 and variance 1, then scaled and shifted by coordinate."""
    mean = average(x)
    deviation = math.sqrt(average([(v - mean) ** 2 for v in x]) + EPS)
    w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return [(v - mean) / deviation * w[c] + b[c] for c, v in enumerate(x)]


def add(a, b):
    return [float(x) + float(y) for x, y in zip(a, b, strict=True)]


def relu(x):
    return [max(float(v), 0.0) for v in x]


def gelu(x):
    """x Phi(x), Phi = the normal distribution function."""
    return [v * 0.5 * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x]


# ------------------------------------------------------------------------ SASRec, BERT4Rec: SAS-1


def attention(weights, xs, heads, causal):
    """Each position's mean of the values it may see, head by head; no map behind the heads."""
    q, k, v = ([linear(weights, name, x) for x in xs] for name in "qkv")
    size = len(xs[0]) // heads
    out = []
    for t in range(len(xs)):
        seen = range(t + 1) if causal else range(len(xs))
        joined = []
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            p = softmax([dot(q[t][own], k[s][own]) / math.sqrt(size) for s in seen])
            for c in range(h * size, (h + 1) * size):
                joined.append(sum(p[n] * v[s][c] for n, s in enumerate(seen)))
        out.append(joined)
    return out


def block(weights, xs, heads, causal, pre):
    """Oracle of SAS-1, one block of a sequence xs (T, d)."""
    if pre:
        seen = attention(weights, [layer_norm(weights, "norms.0", x) for x in xs], heads, causal)
        xs = [add(x, a) for x, a in zip(xs, seen, strict=True)]
        out = []
        for x in xs:
            inner = relu(linear(weights, "up", layer_norm(weights, "norms.1", x)))
            out.append(add(x, linear(weights, "down", inner)))
        return out
    seen = attention(weights, xs, heads, causal)
    out = []
    for x, a in zip(xs, seen, strict=True):
        x = layer_norm(weights, "norms.0", add(x, linear(weights, "out", a)))
        inner = gelu(linear(weights, "up", x))
        out.append(layer_norm(weights, "norms.1", add(x, linear(weights, "down", inner))))
    return out


def encoder(weights, items, blocks, heads, causal, pre):
    """Items and positions through all blocks: T rows -> (T, d)."""
    xs = []
    for t, item in enumerate(items):
        M = [float(v) for v in weights["items.weight"][item]]
        if pre:
            M = [math.sqrt(len(M)) * v for v in M]
        x = add(M, weights["positions"][t])
        xs.append(x if pre else layer_norm(weights, "norm", x))
    for b in range(blocks):
        xs = block(part(weights, f"blocks.{b}"), xs, heads, causal, pre)
    return [layer_norm(weights, "norm", x) for x in xs] if pre else xs


def step_bce(positive, negative):
    """Oracle of SAS-2: the mean over steps of -log sigma(r+) - log(1 - sigma(r-))."""
    terms = []
    for p, n in zip(positive, negative, strict=True):
        terms.append(-log_sigmoid(p) - log_sigmoid(-float(n)))
    return average(terms)


def step_ce(states, item_rows, targets):
    """Oracle of SAS-3: the mean over steps of -log softmax over all items, at the target."""
    terms = []
    for state, target in zip(states, targets, strict=True):
        terms.append(-log_softmax([dot(state, row) for row in item_rows])[target])
    return average(terms)


def bert4rec(weights, items, blocks, heads):
    """Oracle of BE-1: (T, d), before the bias of the items."""
    out = []
    for x in encoder(part(weights, "encoder"), items, blocks, heads, causal=False, pre=False):
        out.append(layer_norm(weights, "norm", gelu(linear(weights, "map", x))))
    return out


# ---------------------------------------------------------------------------------- GRU4Rec, Caser


def gru4rec(weights, items):
    """Oracle of GR-1: (T, d). Rows of the gates' matrices: reset, update, new."""
    hidden = len(weights["gru.weight_hh_l0"]) // 3
    h, out = [0.0] * hidden, []
    for item in items:
        x = weights["items.weight"][item]
        from_x = [dot(row, x) for row in weights["gru.weight_ih_l0"]]
        from_h = [dot(row, h) for row in weights["gru.weight_hh_l0"]]
        new = []
        for c in range(hidden):
            r = sigmoid(from_x[c] + from_h[c])
            z = sigmoid(from_x[hidden + c] + from_h[hidden + c])
            n = math.tanh(from_x[2 * hidden + c] + r * from_h[2 * hidden + c])
            new.append((1.0 - z) * n + z * h[c])
        h = new
        out.append(linear(weights, "map", h))
    return out


def caser(weights, user, window):
    """Oracle of CA-1: the state after a window of L rows, padding included."""
    E = np.asarray(weights["items.weight"], dtype=np.float64)[window]  # (L, d)
    L, d = E.shape
    filters = []
    for v, bias in zip(weights["down.weight"], weights["down.bias"], strict=True):
        for c in range(d):
            filters.append(sum(v[t] * E[t, c] for t in range(L)) + bias)
    for h in range(1, L + 1):
        W, b = weights[f"across.{h - 1}.weight"], weights[f"across.{h - 1}.bias"]
        for C, bias in zip(W, b, strict=True):  # C (d, h)
            found = []
            for t in range(L - h + 1):
                total = float(bias)
                for step in range(h):
                    total += dot(C[:, step], E[t + step])
                found.append(max(total, 0.0))
            filters.append(max(found))
    z = relu(linear(weights, "map_filters", filters))
    return linear(weights, "map_state", [*z, *weights["users.weight"][user]])


# ---------------------------------------------------------------------------------------- CL4SRec


def contrastive(one, other, tau):
    """Oracle of CL-4: each of the 2B views against its partner, among all the others."""
    z = [*one, *other]
    terms = []
    for k in range(len(z)):
        partner = (k + len(one)) % len(z)
        rivals = [m for m in range(len(z)) if m != k]
        scores = [dot(z[k], z[m]) / tau for m in rivals]
        terms.append(-log_softmax(scores)[rivals.index(partner)])
    return average(terms)
