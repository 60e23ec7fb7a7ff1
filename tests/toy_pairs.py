"""Helpers of the tests of HaRS: random items, their clusters, and the oracle's gaps of pairs."""

import oracle
import pytest
import torch

from hanorec.topk import topk_neighbors

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def normal(*shape, seed, dtype=torch.float64):
    """Standard normal draws, in float64 first, so that every dtype has the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def catalogue(n=24, d=6, k=4, seed=0, dtype=torch.float64):
    """e (n, d), and scores and index (n, k) of its clusters."""
    e = normal(n, d, seed=seed)
    e = (e / e.norm(dim=1, keepdim=True)).to(dtype)
    return e, *topk_neighbors(e, k)


def oracle_gaps(e, scores, index, chosen, rejected, form="union"):
    """The oracle's gap of each pair."""
    e, scores, index = e.double().numpy(), scores.double().numpy(), index.numpy()
    pairs = zip(chosen, rejected, strict=True)
    return [oracle.cluster_gap(e, scores, index, w, l, form) for w, l in pairs]
