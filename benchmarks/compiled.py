#!/usr/bin/env python3
"""Compiled layers (--compile) against plain ones: how far apart losses and gradients are, in every
state that a run can be in, and how many graphs it takes.

    python benchmarks/compiled.py [--family F] [--dtype float32|float64|bfloat16] [--few]
        [--backend eager|aot_eager] [--device cuda]

A tiny checkpoint with large random weights, an adapter on an adapter. The states run in turn, first
plain, then compiled with the same weights, noise and random numbers. The last rows are the control:
the same graphs without their guards, as if torch missed every change; they must be far apart.
--few: the states of a run of train_dpo.py alone, since a graph takes 10 s and more on a CPU.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hanorec.lora.layer import LoRALinear, adapters_off, add_lora, language_model, lora_noise
from hanorec.mllm.backbone import FAMILIES, Backbone, prompt_positions, use_checkpointing
from hanorec.mllm.collate import Batch, collate
from hanorec.mllm.compiled import INDUCTOR, compile_layers, graphs
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import Row
from hanorec.scoring import answer_logits
from hanorec.studies.tiny import make_checkpoint

SIGMA = 0.05


@dataclass(frozen=True)
class State:
    """What a forward may depend on. lengths: of the prompts, one a row."""

    name: str
    lengths: Sequence[int] = (21, 17, 26)
    answers: int = 2
    training: bool = True
    gradient: bool = True
    off: bool = False
    sigma: float = SIGMA
    dropout: float = 0.0
    checkpointing: bool = False


REFERENCE = State("reference: adapter off", training=False, gradient=False, off=True, sigma=0)
CLEAN = State("clean pass", training=False, gradient=False, sigma=0)
NOISY = State("noise, gradient")
DROPOUT = State("noise, dropout", dropout=0.3)
FEW = [
    REFERENCE, CLEAN, NOISY, State("other lengths", (30, 9, 12, 33)), CLEAN, DROPOUT,
    State("noise, dropout, checkpointing", dropout=0.3, checkpointing=True),
]
ALL = [
    *FEW, State("no noise", sigma=0), State("gradient in eval", training=False),
    State("exact KL's reference", gradient=False, off=True), State("lengths", (40, 38)),
    State("lengths, one row", (28,)), State("lengths, one row again", (19,)),
    State("one answer", answers=1), State("one answer, dropout", answers=1, sigma=0, dropout=0.3),
    State("checkpointing", checkpointing=True), REFERENCE, NOISY, CLEAN, DROPOUT,
]
CONTROL = [replace(state, gradient=False) for state in (REFERENCE, CLEAN, NOISY, DROPOUT)]


class Model:
    """A checkpoint with an adapter on an adapter, and what it computes in a state."""

    def __init__(self, family: str, dtype: str, device: str) -> None:
        self.backbone = tiny(family, dtype, device)
        policy = self.backbone.model
        busy(add_lora(policy, 4, 8.0))
        self.layers = busy(add_lora(policy, 4, 8.0))
        self.weights = [weight for layer in self.layers for weight in (layer.A, layer.B)]

    def batch(self, state: State) -> Batch:
        draw = torch.Generator().manual_seed(sum(state.lengths))
        rows = []
        for n in state.lengths:
            ids = torch.randint(5, 200, (n,), generator=draw).tolist()
            answers = [torch.randint(5, 200, (3 + a,), generator=draw).tolist() for a in range(2)]
            positions = prompt_positions(self.backbone, ids, [])
            rows.append(Row("user", ids, positions, [], answers[: state.answers]))
        return collate(self.backbone, rows, {})

    def result(self, state: State) -> tuple[Tensor, Tensor | None]:
        """The log-probability of each answer token (M,), and the gradient of their mean."""
        policy, batch = self.backbone.model, self.batch(state)
        policy.train(state.training)
        for layer in self.layers:
            layer.dropout = state.dropout
        torch.manual_seed(1)
        with ExitStack() as stack:
            if state.checkpointing:
                stack.enter_context(checkpointing(self.backbone))
            if state.off:
                stack.enter_context(adapters_off(policy))
            stack.enter_context(lora_noise(policy, state.sigma, torch.Generator().manual_seed(2)))
            stack.enter_context(torch.set_grad_enabled(state.gradient))
            logits = answer_logits(forward(self.backbone, batch), batch)  # (M, V)
            log_p = logits.log_softmax(-1).gather(1, batch.token[:, None])[:, 0]
            if not state.gradient:
                return log_p, None
            grads = torch.autograd.grad(log_p.mean(), self.weights, materialize_grads=True)
        return log_p.detach(), torch.cat([grad.flatten() for grad in grads])


def tiny(family: str, dtype: str, device: str) -> Backbone:
    """Two layers: the first one's input has no gradient, the second one's has."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        make_checkpoint(family, path, ["a film of the sea"], width=64, layers=2)
        file = path / "model.safetensors"
        weights = load_file(file)
        for weight in weights.values():
            if weight.ndim >= 2:
                weight *= 4  # as initialised attention is uniform: a wrong state would not show
        save_file(weights, file, {"format": "pt"})
        backbone = load_backbone(str(path), dtype, device)
    if dtype == "float64":
        for layer in language_model(backbone.model).layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, in_float64(getattr(layer, name)))
    return backbone


def in_float64(norm: nn.Module) -> nn.RMSNorm:
    """Transformers' norm rounds to float32, whatever the model is."""
    exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
    exact.weight = norm.weight
    return exact


def busy(layers: list[LoRALinear]) -> list[LoRALinear]:
    """With both A and B drawn, so that the adapter does something."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in [weight for layer in layers for weight in (layer.A, layer.B)]:
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
    return layers


@contextmanager
def checkpointing(backbone: Backbone) -> Iterator[None]:
    """On inside the block alone."""
    before = [dict(vars(layer)) for layer in language_model(backbone.model).layers]
    use_checkpointing(backbone)
    yield
    for layer, attributes in zip(language_model(backbone.model).layers, before, strict=True):
        vars(layer).clear()  # what was a class's own attribute before, too
        vars(layer).update(attributes)


def without_guards(backbone: Backbone) -> None:
    """Compiled as by mistake: the first graph of a layer is taken for every state."""
    for layer in language_model(backbone.model).layers:
        drop = {"guard_filter_fn": lambda guards: [False] * len(guards)}
        layer.forward = torch.compile(layer.forward, backend="eager", options=drop, dynamic=True)


def apart(a: Tensor | None, b: Tensor | None) -> float | None:
    """The largest difference, relative to the largest entry of b."""
    return None if b is None else ((a - b).abs().max() / b.abs().max()).item()


def compare(model: Model, plain: list, states: Sequence[State], family: str, dtype: str) -> None:
    for state, expected in zip(states, plain, strict=True):
        found = [apart(a, b) for a, b in zip(model.result(state), expected, strict=True)]
        shown = " | ".join("" if value is None else f"{value:.1e}" for value in found)
        print(f"| {family}, {dtype} | {state.name} | {shown} | {graphs()} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=FAMILIES)
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", choices=["inductor", "eager", "aot_eager"], default="inductor")
    parser.add_argument("--few", action="store_true")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    states = FEW if args.few else ALL
    how = INDUCTOR if args.backend == "inductor" else {}
    print("| | state | log-probabilities apart | gradients apart | graphs so far |")
    print("|---" * 5 + "|")
    for family in args.family:
        for dtype in args.dtype:
            model = Model(family, dtype, args.device)
            plain = [model.result(state) for state in states]
            with mock.patch("builtins.print"):
                compile_layers(model.backbone, backend=args.backend, **how)
            compare(model, plain, states, family, dtype)
            torch._dynamo.reset()
    # The control, on the first family and dtype.
    model = Model(args.family[0], args.dtype[0], args.device)
    plain = [model.result(state) for state in CONTROL]
    without_guards(model.backbone)
    compare(model, plain, CONTROL, "no guards", args.dtype[0])


if __name__ == "__main__":
    main()
