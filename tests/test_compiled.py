"""--compile: compiled layers compute what plain ones do, whatever state they were compiled in.

Most of it with the backend "eager", which runs torch's graphs, behind torch's guards, by the plain
operators: what differs by a bit is another graph. benchmarks/compiled.py has the states, and shows
them all by the backend that users get.
"""

import sys
from pathlib import Path

import pytest
import torch
import toy

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compiled as states  # benchmarks/compiled.py

import train_dpo
from hanorec.base.config import TrainConfig
from hanorec.base.errors import InputError
from hanorec.mllm import compiled
from hanorec.mllm.compiled import compile_layers, graphs


@pytest.fixture(autouse=True)
def no_graph_is_left():
    yield
    torch._dynamo.reset()


def results(model, wanted):
    """Of each state what `Model.result` gives, and how many graphs there are after it."""
    found = []
    for state in wanted:
        found.append((*model.result(state), graphs()))
    return found


def check(family, wanted):
    """Every state as without, to the bit. Returns state -> how many graphs there were after it."""
    model, made = states.Model(family, "float32", "cpu"), {}
    plain = results(model, wanted)
    compile_layers(model.backbone, backend="eager")
    for state, expected, found in zip(wanted, plain, results(model, wanted), strict=True):
        for a, b in zip(found[:2], expected[:2], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), state.name
        made[state.name] = found[2]
    return made


def test_every_state_is_as_without():
    """Noise, adapters off, dropout, training, gradients, checkpointing, lengths, in turn. Graphs:
    one a state without gradients, two with (the first layer's input has none); none for other
    lengths, for checkpointing, or for a state that comes back.
    """
    made = check("qwen2_5_vl", states.ALL)
    assert made["noise, gradient"] == max(made.values())  # it came back last but two
    assert made["other lengths"] == 4
    assert made["noise, dropout, checkpointing"] == 6
    assert made["lengths, one row again"] == made["lengths, one row"]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_the_other_families(family):
    check(family, [states.REFERENCE, states.DROPOUT])


def test_a_stale_graph_would_show():
    """Negative control: graphs without guards, so that torch misses every change of state."""
    model = states.Model("qwen2_5_vl", "float32", "cpu")
    plain = results(model, states.CONTROL)
    states.without_guards(model.backbone)
    found = results(model, states.CONTROL)
    assert states.apart(found[0][0], plain[0][0]) == 0  # the state that the graphs are of
    for state, stale, expected in zip(states.CONTROL[1:], found[1:], plain[1:], strict=True):
        assert states.apart(stale[0], expected[0]) > 1e-3, state.name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_the_compiler_computes_the_same(dtype, tolerance):
    """By the backend of users, with noise and dropout: the same random numbers, too."""
    model = states.Model("qwen2_5_vl", dtype, "cpu")
    expected = model.result(states.DROPOUT)
    try:
        compile_layers(model.backbone)
    except InputError as error:
        pytest.skip(str(error))
    for a, b in zip(model.result(states.DROPOUT), expected, strict=True):
        assert states.apart(a, b) < tolerance


def test_a_run_is_as_without(launch, sft, full, monkeypatch, capsys):
    """train_dpo.py with its defaults, dropout too: log and adapter are the same to the bit."""
    monkeypatch.setattr(compiled, "INDUCTOR", {"backend": "eager"})
    out, log, _ = launch(train_dpo.main, *toy.STEPS, "--sft", sft, "--compile", "true")
    folder, expected, _ = full
    assert log == expected
    assert toy.furthest(out, folder) == 0
    said = capsys.readouterr().out
    assert "the first steps are slow" in said and "graphs were made" in said


def test_no_compiler(qwen):
    def missing(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    with pytest.raises(InputError, match="--compile true: .*No working C.*leave --compile out"):
        compile_layers(qwen, backend=missing)


def test_compiled_and_divided():
    with pytest.raises(InputError, match="--compile true with --shard true: expected one"):
        TrainConfig(out="", compile=True, shard=True)
