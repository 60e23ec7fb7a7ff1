"""benchmarks/gpu.py, the one command for a GPU, with every part at a toy size on a CPU."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from docstring_names import ROOT

from hanorec.base.errors import InputError

sys.path.insert(0, str(Path(ROOT) / "benchmarks"))
import gpu_all


def test_every_part_runs(capfd):
    gpu_all.run_all(toy=True)
    printed = capfd.readouterr().out
    first, _, rest = printed.partition("\n")
    assert first.startswith("a CPU, toy sizes; torch ") and ", commit " in first
    for line in [
        "| hanorec | 600 | ",  # kernel
        "| HaNoRec: clean pass, noise | 4 | ",
        "| batches of 8 | ",
        "| train_dpo, step 0 | ",  # parity
        "train_sft | 1 | ",
        "train_dpo | 1 | ",
        "processes speak by gloo",
        "test_sft_on_a_gpu_is_that_on_the_cpu",
    ]:
        assert f"\n{line}" in rest or f"::{line}" in rest
    if not find_spec("trl"):
        assert "\nTRL, PEFT: not installed, skipped" in rest
    assert "destroy_process_group" not in rest


def test_a_part_that_fails_is_named(tmp_path, monkeypatch, capfd):
    """Once the others have run. Without a GPU there is nothing to measure."""
    ran = tmp_path / "ran"
    commands = {
        "kernel": [["-c", "raise SystemExit(1)"], ["-c", f"open({str(ran)!r}, 'w')"]],
        "tests": [["-c", "print('the last one')"]],
    }
    monkeypatch.setattr(gpu_all, "parts", lambda *_: commands)
    with pytest.raises(InputError, match="^all: kernel failed"):
        gpu_all.run_all(toy=True)
    assert "the last one" in capfd.readouterr().out and not ran.exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU on this machine"):
        gpu_all.run_all(toy=False)
