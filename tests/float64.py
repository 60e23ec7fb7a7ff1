"""Runs in float64, where the order of a sum decides nothing that a test looks at.

In float32 sums in another order differ in the seventh digit, by how much depends on the machine's
kernels, and Adam's quotient m / sqrt v makes a whole step of it where a gradient is next to
nothing. In float64 runs that compute the same are 1e-15 apart on any machine.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from processes import run_script

import evaluate
from hanorec.run import ranking_run, run

cast = torch.Tensor.to


def never_to_float32(tensor, *arguments, **named):
    """`torch.Tensor.to`, but that whoever asks for float32 is given float64."""
    arguments = [torch.float64 if x is torch.float32 else x for x in arguments]
    named = {name: torch.float64 if x is torch.float32 else x for name, x in named.items()}
    return cast(tensor, *arguments, **named)


@contextmanager
def in_float64():
    """All scripts that are run inside compute in float64."""
    load_backbone, run_data = run.load_backbone, ranking_run.run_data

    def load_in_float64(path, dtype, *rest):
        return load_backbone(path, "float64", *rest)

    def data_in_float64(*arguments):
        data = run_data(*arguments)
        return replace(data, features={m: x.double() for m, x in data.features.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_backbone", load_in_float64)
        patch.setattr(evaluate, "load_backbone", load_in_float64)
        patch.setattr(ranking_run, "run_data", data_in_float64)
        # what asks for float32, as the norms of transformers do, loses no digit
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "to", never_to_float32)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def run_in_float64(name, argv, *changes):
    """In a child: `run_script`."""
    with in_float64():
        run_script(name, argv, *changes)
