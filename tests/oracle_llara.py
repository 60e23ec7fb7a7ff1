"""Independent oracle of LLaRA's equations, in plain float64 loops, see oracle.py."""

import math

import numpy as np


def gelu(x):
    """x times the normal distribution's share below x."""
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def affine(W, b, x):
    """W x + b, a row of W at a time."""
    found = []
    for row, shift in zip(W, b, strict=True):
        terms = [float(w) * float(value) for w, value in zip(row, x, strict=True)]
        found.append(math.fsum([*terms, float(shift)]))
    return found


def projector(m, W1, b1, W2, b2):
    """Oracle of LL-1, an item at a time: (n, d) -> (n, D)."""
    vectors = []
    for row in m:
        hidden = [gelu(value) for value in affine(W1, b1, row)]
        vectors.append(affine(W2, b2, hidden))
    return np.array(vectors, dtype=np.float64)


def hybrid_probability(step, steps):
    """Oracle of LL-2, by counting: what share of the run lies before this step."""
    done = 0
    for other in range(steps):
        if other < step:
            done += 1
    return done / steps
