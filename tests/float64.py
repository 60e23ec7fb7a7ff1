"""Runs in float64, where the order of a sum decides nothing that a test looks at.

In float32 sums in another order differ in the seventh digit, by how much depends on the machine's
kernels, and Adam's quotient m / sqrt v makes a whole step of it where a gradient is next to
nothing. In float64 runs that compute the same are 1e-15 apart on any machine.
"""

from dataclasses import replace

import torch

import evaluate
from hanorec.run import ranking_run, run


def in_float64():
    """In a child: from here on all scripts compute in float64."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # what asks for at least float32 loses no digit
    load_backbone, run_data = run.load_backbone, ranking_run.run_data

    def load_in_float64(path, dtype, *rest):
        return load_backbone(path, "float64", *rest)

    def data_in_float64(*arguments):
        data = run_data(*arguments)
        return replace(data, features={m: x.double() for m, x in data.features.items()})

    run.load_backbone = evaluate.load_backbone = load_in_float64
    ranking_run.run_data = data_in_float64
