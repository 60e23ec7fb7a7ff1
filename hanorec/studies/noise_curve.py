"""What NoDO's noise does to a language model before anything is learnt (HN-9).

    python -m hanorec.studies.noise_curve MODEL [--targets all qv] [--alpha A ...] [--sigma S ...]
        [--draws N] [--rank R] [--text FILE]

A fresh adapter (B = 0, so without noise it is exactly the base) lies on all linears of the language
model, as in training; `--targets qv` keeps the noise on q_proj and v_proj alone. The noise moves a
weight by D = s (B' A' - B A), s = alpha / r, whose expected square is

    E ‖D‖^2 = s^2 [ sigma_A^2 in ‖B‖^2 + sigma_B^2 out ‖A‖^2 + sigma_A^2 sigma_B^2 r in out ]
    (Frobenius norms; sigma = strength of each side)

First table: mean and standard deviation of the loss on English text over the draws, in nats a
token. Second: ‖D‖ / ‖W‖, the median over the layers of a kind, of the first draw, and beside it
what the formula predicts. MODEL is any checkpoint that hanorec loads; benchmarks/smollm2_llava.py
makes one with real text weights.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.noise_curve")
    result.add_argument("model")
    result.add_argument("--text", type=Path, help="a text file instead of the built-in passage")
    result.add_argument("--sigma", type=float, nargs="+", default=[0, 0.005, 0.01, 0.02, 0.05, 0.1])
    result.add_argument("--targets", nargs="+", choices=["all", "qv"], default=["all"])
    result.add_argument(
        "--mode", nargs="+", choices=["absolute", "relative"], default=["absolute", "relative"])
    result.add_argument("--alpha", type=float, nargs="+", default=[32])
    result.add_argument("--rank", type=int, default=8)
    result.add_argument("--draws", type=int, default=5)
    result.add_argument(
        "--out", type=Path,
        help="also write OUT/noise.json, of which python -m hanorec.studies.plots OUT draws the "
        "figure")
    result.add_argument("--seed", type=int, default=2025)
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import torch
from torch import Tensor

from hanorec.base.files import write_json
from hanorec.lora.layer import LoRALinear, add_lora, lora_layers, lora_noise
from hanorec.losses import token_log_probs
from hanorec.mllm.backbone import Backbone, hidden_states, prompt_positions
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import text_ids
from hanorec.readings import NOISES

TARGETS = {"all": None, "qv": ("q_proj", "v_proj")}

PASSAGE = (
    "The lighthouse at the end of the harbour was built in the nineteenth century, when ships from "
    "all over the world came to the town to buy salt and dried fish. For many years a keeper lived "
    "in it with his family. Every evening he climbed the narrow stairs, cleaned the glass and lit "
    "the lamp, and every morning he wrote down the weather and the names of the ships that had "
    "passed. Today the lamp is electric and nobody lives there any more, but the building is still "
    "open to visitors in the summer. From the top you can see the old market, the railway station "
    "and, on a clear day, the islands on the other side of the bay. The museum on the ground floor "
    "shows photographs of the storms that damaged the harbour, and a collection of letters that "
    "the keeper's daughter sent to her brother."
)


@torch.no_grad()
def text_logits(backbone: Backbone, ids: list[int]) -> Tensor:
    """Logits (T, V) of a text without images, on the path of training and evaluation."""
    row = torch.tensor([ids], device=backbone.device)  # (1, T)
    positions = prompt_positions(backbone, ids, [])[:, None].to(backbone.device)  # (R, 1, T)
    no_picture = torch.zeros(0, backbone.width)
    return backbone.model.lm_head(hidden_states(backbone, row, positions, None, no_picture))[0]


def text_nll(backbone: Backbone, text: str) -> float:
    """Mean over a text's tokens, but the first, of -log p(token | those before), in nats."""
    ids = text_ids(backbone, text)
    logits = text_logits(backbone, ids[:-1])  # (T - 1, V)
    told = token_log_probs(logits, torch.tensor(ids[1:], device=backbone.device))  # (T - 1,)
    return -told.mean().item()


def expected_change(layer: LoRALinear, sigma_A: float, sigma_B: float) -> float:
    """Root of E ‖s (B' A' - B A)‖^2: the three terms of the product are uncorrelated."""
    r, wide, high = layer.r, layer.in_features, layer.out_features
    square = (
        sigma_A**2 * wide * layer.B.square().sum()
        + sigma_B**2 * high * layer.A.square().sum()
        + (sigma_A * sigma_B) ** 2 * r * wide * high
    )
    return layer.scale * square.sqrt().item()


def change(layer: LoRALinear) -> float:
    """‖s (B' A' - B A)‖ of the draw that the layer holds."""
    noise_A, noise_B = layer.noise
    difference = (layer.B + noise_B) @ (layer.A + noise_A) - layer.B @ layer.A  # (out, in)
    return layer.scale * difference.norm().item()


def ratios(
    layers: Mapping[str, LoRALinear], sigma: float, mode: str,
) -> dict[str, tuple[float, float]]:
    """Kind of layer -> median of ‖D‖ / ‖W‖ under the present draw, and of its prediction."""
    drawn, predicted = defaultdict(list), defaultdict(list)
    for path, layer in layers.items():
        scale_A, scale_B = NOISES[mode](layer)
        weight = layer.base.weight.norm().item()
        kind = leaf(path)
        drawn[kind].append(change(layer) / weight)
        predicted[kind].append(expected_change(layer, sigma * scale_A, sigma * scale_B) / weight)
    median = statistics.median
    return {kind: (median(drawn[kind]), median(predicted[kind])) for kind in drawn}


def leaf(path: str) -> str:
    """The kind of a layer: the last name of its path."""
    return path.rpartition(".")[2]


def losses_of_draws(
    backbone: Backbone, text: str, sigma: float, mode: str, targets: str, draws: int, seed: int,
) -> tuple[list[float], dict[str, tuple[float, float]]]:
    """The loss under each draw, and `ratios` of the first; the draws depend on the seed alone."""
    layers = lora_layers(backbone.model)
    noise = torch.Generator().manual_seed(seed)
    losses, sizes = [], {}
    for draw in range(draws):
        with lora_noise(backbone.model, sigma, noise, NOISES[mode]):
            if sigma > 0 and draw == 0:
                sizes = ratios(layers, sigma, mode)
            for path, layer in layers.items():
                if TARGETS[targets] is not None and leaf(path) not in TARGETS[targets]:
                    layer.noise = None
            losses.append(text_nll(backbone, text))
    return losses, sizes


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    text = PASSAGE if args.text is None else args.text.read_text(encoding="utf-8")
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model)
    bare = text_nll(backbone, text)
    layers = add_lora(backbone.model, args.rank, args.alpha[0], dropout=0.0)
    print(
        f"{len(layers)} linears, r = {args.rank}; loss without adapter {bare:.3f}, with a fresh "
        f"one {text_nll(backbone, text):.3f} nats a token\n")

    columns = list(itertools.product(args.mode, args.targets, args.alpha))
    curves = []
    for mode, targets, alpha in columns:
        name = f"{mode}, {targets}, α/r = {alpha / args.rank:g}"
        curves.append({"name": name, "sigma": [], "mean": [], "deviation": []})
    print("σ_n | " + " | ".join(curve["name"] for curve in curves))
    print("---|" * len(columns) + "---")
    sizes = {}  # (mode, alpha, sigma) -> `ratios`
    for sigma in args.sigma:
        cells = []
        for (mode, targets, alpha), curve in zip(columns, curves, strict=True):
            for layer in layers:
                layer.scale = alpha / args.rank
            losses, found = losses_of_draws(
                backbone, text, sigma, mode, targets, args.draws, args.seed)
            if found:
                sizes[mode, alpha, sigma] = found
            mean, deviation = statistics.mean(losses), statistics.pstdev(losses)
            cells.append(f"{mean:.3f} ± {deviation:.3f}")
            curve["sigma"].append(sigma)
            curve["mean"].append(mean)
            curve["deviation"].append(deviation)
        print(f"{sigma:g} | " + " | ".join(cells), flush=True)

    if args.out is not None:
        write_json(args.out / "noise.json", {"clean": bare, "curves": curves})
    if sizes:
        kinds = list(next(iter(sizes.values())))
        print("\nweight change, share of the weight: measured (predicted)\n")
        print("mode, α/r, σ_n | " + " | ".join(kinds))
        print("---|" * len(kinds) + "---")
    for (mode, alpha, sigma), found in sizes.items():
        cells = [f"{drawn:.3f} ({predicted:.3f})" for drawn, predicted in found.values()]
        print(f"{mode}, {alpha / args.rank:g}, {sigma:g} | " + " | ".join(cells))
