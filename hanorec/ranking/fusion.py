r"""RC-2: a policy's and a retriever's scores of one list, as one.

C = candidates of a list. Both are made distributions over the list first, so neither the length of
titles nor where a retriever has its zero counts; how far apart its scores are does. Source: ours.
"""

import numpy as np
from numpy.typing import ArrayLike


def log_softmax(scores: ArrayLike) -> np.ndarray:
    """(..., C) -> (..., C) float64: the logarithms of shares that add up to 1 over a list."""
    scores = np.asarray(scores, np.float64)
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def fuse_scores(policy: ArrayLike, retriever: ArrayLike, w: float) -> np.ndarray:
    r"""Scores of the candidates by both; larger is better.

    Args:
        policy: (..., C) EV-1 of each candidate. retriever: (..., C) its own scores of them.
        w: at least 0; at 0 the order is the policy's, and toward infinity the retriever's.
    Returns:
        (..., C) float64.
    """
    p, r = log_softmax(policy), log_softmax(retriever)
    # RC-2: s_c = \log\frac{\pi(y_c \mid x)}{\sum_{c'} \pi(y_{c'} \mid x)}
    # + w \log\frac{e^{r_c}}{\sum_{c'} e^{r_{c'}}}
    return p + w * r
