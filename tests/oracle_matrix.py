r"""Independent oracle of LG-1 and LG-2, in plain float64 loops over neighbours.

Written from LightGCN's paper, without sight of the package, which never imports this file.
"""

import math

from oracle import average, dot, log_sigmoid


def lightgcn(pairs, n_users, n_items, x, layers):
    """Oracle of LG-1. pairs (u, i), each once; x: n_users + n_items lists. A layer: each node
    becomes the sum over its neighbours, each divided by the root of the product of both degrees.
    The mean over x and all layers."""
    neighbours = [[] for _ in range(n_users + n_items)]
    for u, i in pairs:
        neighbours[u].append(n_users + i)
        neighbours[n_users + i].append(u)
    x = [[float(value) for value in row] for row in x]
    layer, total = x, [list(row) for row in x]
    for _ in range(layers):
        after = []
        for node, near in enumerate(neighbours):
            row = [0.0] * len(x[node])
            for other in near:
                weight = 1 / math.sqrt(len(near) * len(neighbours[other]))
                for k in range(len(row)):
                    row[k] += weight * layer[other][k]
            after.append(row)
        layer = after
        for node, row in enumerate(layer):
            for k, value in enumerate(row):
                total[node][k] += value
    return [[value / (layers + 1) for value in row] for row in total]


def triple_loss(triples, n_users, x, z, weight_decay):
    """Oracle of LG-2. triples (u, i, j); x before any layer, z after all."""
    losses, squares = [], 0.0
    for u, i, j in triples:
        gap = dot(z[u], z[n_users + i]) - dot(z[u], z[n_users + j])
        losses.append(-log_sigmoid(gap))
        for row in (x[u], x[n_users + i], x[n_users + j]):
            squares += dot(row, row)
    return average(losses) + weight_decay * squares / (2 * len(triples))
