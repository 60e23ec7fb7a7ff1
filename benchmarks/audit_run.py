"""The parts of benchmarks/audit.py that read the Posterland run, the command that makes it, and what prints tables."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.base.config import DataConfig, TrainConfig
from hanorec.base.files import read_json
from hanorec.datasets.posterland import make_posterland
from hanorec.hars import cluster_gap, hardness, responsiveness, reward_gap
from hanorec.lora.files import attach_policy
from hanorec.lora.layer import LoRALinear, adapters_off, lora_layers, lora_noise
from hanorec.losses import preference_logit
from hanorec.metrics import auc_rows, pooled_auc
from hanorec.mllm.backbone import Backbone, use_checkpointing
from hanorec.mllm.forward import forward, score_rows
from hanorec.mllm.items import neighbors
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import collate
from hanorec.mllm.tasks import PromptBuilder, load_examples, preferences
from hanorec.scoring import answer_log_probs
from hanorec.studies import stages as demo

SEED, BETA0 = 2025, 0.1
DPO_USERS = {"users_from": 0.5, "users_to": 0.667}  # those of demo.DPO


def table(header: str, rows: Iterable[Sequence[object]]) -> None:
    print(f"\n{header}\n" + "|".join(["---"] * header.count("|") + ["---"]))
    for row in rows:
        print(" | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))


def quantiles(values: Sequence[float] | np.ndarray | Tensor, at: Sequence[float] = (0.01, 0.1, 0.5, 0.9, 0.99)) -> list[float]:
    return [float(x) for x in np.quantile(np.asarray(values, np.float64), at)]


def ranks(values: np.ndarray) -> np.ndarray:
    """Positions in ascending order, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Pearson and Spearman."""
    return float(np.corrcoef(a, b)[0, 1]), float(np.corrcoef(ranks(a), ranks(b))[0, 1])


# ---- the run that others read ----


def train(out: Path) -> None:
    """What is finished stays."""
    if not (out / "data" / "dataset.json").exists():
        make_posterland(out / "data", demo.USERS, seed=SEED)
    common = ["--model", str(demo.BASE), "--data", str(out / "data")]
    stages = {"SFT": ("train_sft", demo.SFT), "binary": ("train_sft", [*demo.SFT, "--task", "binary", "--users-to", "0.15"]),
              "HaNoRec": ("train_dpo", [*demo.DPO, "--epochs", "5", "--dataset", "movielens", "--sft", str(out / "SFT")]),
              "no_nodo": ("train_dpo", [*demo.DPO, "--epochs", "5", "--ablation", "no_nodo", "--sft", str(out / "SFT")])}
    for name, (script, flags) in stages.items():
        if not (out / name / "adapter_config.json").exists():
            demo.script(script).main([*common, "--seed", str(SEED), *flags, "--out", str(out / name)])
    for name, flags in {"test": ["--adapter", str(out / "no_nodo")],
                        "test-binary": ["--task", "binary", "--sets", "random", "--users-to", "0.704", "--adapter", str(out / "binary"), "--adapter", "base"]}.items():
        if not (out / name / "run.json").exists():
            demo.script("evaluate").main([*common, *demo.TEST, *flags, "--out", str(out / name)])


def dpo_pairs(out: Path, kind: str = "random") -> tuple[Backbone, PromptBuilder, list]:
    """The preference pairs of the run's DPO stages, from its base model."""
    backbone = load_backbone(str(demo.BASE))
    source, examples = load_examples(backbone, DataConfig(data=str(out / "data"), **DPO_USERS), TrainConfig(out="", targets_per_user=1))
    return backbone, source, preferences(source, examples, SEED, kind=kind)


def log(out: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


# ---- entry 1: lambda ----


def part_lambda(out: Path) -> None:
    rows, lams = [], {}
    for kind, name in (("random", "random"), ("same", "nearest of 9")):
        backbone, source, pairs = dpo_pairs(out, kind)
        w, l = torch.tensor([(pair.chosen, pair.rejected[0]) for pair in pairs]).T
        for embedding in ("input", "hidden"):
            e, scores, index = neighbors(backbone, source.catalog, source.pictures, 10, embedding)
            cosine = (e[w] * e[l]).sum(1).double().numpy()
            for form in ("union", "ranked", "cosine"):
                delta = cluster_gap(e.double(), scores.double(), index, w, l, form)
                for hard in ("sigmoid", "ratio", "standardised"):
                    lam = hardness(delta, hard).numpy()
                    lams[name, embedding, form, hard] = lam
                    rows.append([name, embedding, form, hard, f"{lam.min():.3f} .. {lam.max():.3f}", f"{lam.std() / lam.mean():.2%}", *correlation(lam, cosine)])
    table("negatives | embedding | HN-4 | HN-5 | λ | deviation / mean | Pearson with cos(w, l) | Spearman", rows)
    shares = []
    for stage in ("HaNoRec", "no_nodo"):
        eta = np.array([line["eta"] for line in log(out, stage)])
        for hard in ("sigmoid", "standardised"):
            of_lam, of_eta = np.log(lams["random", "input", "union", hard]).var(), np.log(eta).var()
            shares.append([stage, f"{eta.min():.3f} .. {eta.max():.3f}", float(np.median(np.abs(eta - 1))), float(of_eta**0.5), hard, float(of_lam**0.5),
                           float(of_lam / (of_lam + of_eta))])
    table("stage | η of its steps | median of its distance from 1 | sd of log η | λ (random, input, union) | sd of log λ | λ's share of Var log β'", shares)


# ---- entries 6 and 12: rewards that training reaches ----


@torch.no_grad()
def gaps(backbone: Backbone, rows: list, pictures: dict, reference: Tensor | None = None) -> Tensor:
    """h (P,) of the policy, under the noise that is open now, against `reference` (P, 2) or else the policy without its top adapter."""
    policy = score_rows(backbone, rows, pictures, 32, "pairs")[0]
    if reference is None:
        with adapters_off(backbone.model):
            reference = score_rows(backbone, rows, pictures, 32, "reference")[0]
    return preference_logit(*policy.T, *reference.T)


def load_policy(out: Path, stage: str) -> tuple[Backbone, PromptBuilder, list]:
    backbone, source, pairs = dpo_pairs(out)
    attach_policy(backbone.model, out / stage)
    backbone.model.eval()
    return backbone, source, [pair.row for pair in pairs]


def turning_point() -> float:
    """x with x σ(x) = 1, by bisection: there d/dβ' of β' σ(-β' h) changes its sign, x = β' h."""
    low, high = 1.0, 2.0
    for _ in range(60):
        mid = (low + high) / 2
        low, high = (mid, high) if mid / (1 + math.exp(-mid)) < 1 else (low, mid)
    return low


def part_crossover(out: Path) -> None:
    x = turning_point()
    print(f"\nx* = {x:.4f}: |dL/dh| = β' σ(-β' h) grows with β' while β' h < x*, falls beyond")
    table("β' | h at which more β' no longer means more pull", [[beta, x / beta] for beta in (0.05, 0.06, 0.08, 0.1)])

    def pull(beta: float, h: float) -> float:
        return beta / (1 + math.exp(beta * h))

    print(f"\npulls of β' = 0.05 and 0.1 are equal at h = ln(1 + √2) / 0.05 = {math.log(1 + 2**0.5) / 0.05:.2f}")
    table("h | pull at β' = 0.05 | at 0.1 | ratio | normalised, at 0.05 | at 0.1 | ratio",
          [[h, pull(0.05, h), pull(0.1, h), pull(0.05, h) / pull(0.1, h), 2 * pull(0.05, h), pull(0.1, h), 2 * pull(0.05, h) / pull(0.1, h)]
           for h in (-20, -5, 0, 5, 10, 17.63, 25, 40, 80)])
    rows = []
    for stage in ("HaNoRec", "no_nodo"):
        backbone, source, pairs = load_policy(out, stage)
        h = gaps(backbone, pairs, source.pictures)
        steps = log(out, stage)
        rows.append([stage, len(steps), max(line["margin"] for line in steps) / BETA0, *quantiles(h), h.max().item(),
                     f"{(h > x / 0.05).float().mean():.1%}", f"{(h > math.log(1 + 2**0.5) / 0.05).float().mean():.1%}"])
    table("stage | steps | largest mean h of a step (log) | h of its own pairs at the end: 1% | 10% | 50% | 90% | 99% | largest | past x*/0.05 | past 17.6", rows)


def part_rewards(out: Path) -> None:
    """Clean R against noisy R, on the trained policy; one draw a step."""
    backbone, source, rows = load_policy(out, "HaNoRec")
    rows = rows[:32]
    with adapters_off(backbone.model):
        reference = score_rows(backbone, rows, source.pictures, 32, "reference")[0]
    h = gaps(backbone, rows, source.pictures, reference)
    lines = []
    for sigma in (0.01, 0.05, 0.1):
        noise = torch.Generator().manual_seed(SEED)
        noisy = []
        for _ in range(8):
            with lora_noise(backbone.model, sigma, noise):
                noisy.append(gaps(backbone, rows, source.pictures, reference))
        change = torch.stack(noisy) - h  # (draws, P)
        etas = [responsiveness(reward_gap(one, BETA0)).item() for one in noisy]
        shared = (change.mean(1).var() / change.var(0).mean()).item()
        lines.append([sigma, h.std().item(), change.std().item(), float(np.mean([np.corrcoef(h, one)[0, 1] for one in noisy])),
                      responsiveness(reward_gap(h, BETA0)).item(), f"{min(etas):.3f} .. {max(etas):.3f}", shared])
    table("σ_n | sd of clean h over pairs | sd of what a draw adds | correlation, clean with noisy h | η of clean R | of noisy R | variance of the step's mean / of one pair's, over draws", lines)


# ---- entry 5: noise and weights ----


def part_nodo(out: Path) -> None:
    backbone, _, _ = load_policy(out, "HaNoRec")
    lines = []
    for sigma in (0.01, 0.05, 0.1):
        found = {"W": [], "BA": [], "fresh": [], "trained": [], "expected": []}
        with torch.no_grad(), lora_noise(backbone.model, sigma, torch.Generator().manual_seed(SEED)):
            for layer in lora_layers(backbone.model).values():
                W = layer.base
                while isinstance(W, LoRALinear):
                    W = W.base
                eps_A, eps_B = layer.noise
                A = torch.empty_like(layer.A)
                torch.nn.init.kaiming_uniform_(A, a=5**0.5, generator=torch.Generator().manual_seed(SEED))
                r, wide, high = layer.r, layer.in_features, layer.out_features
                found["W"].append(W.weight.norm().item())
                found["BA"].append(layer.scale * (layer.B @ layer.A).norm().item())
                found["fresh"].append(layer.scale * (eps_B @ (A + eps_A)).norm().item())
                found["trained"].append(layer.scale * ((layer.B + eps_B) @ (layer.A + eps_A) - layer.B @ layer.A).norm().item())
                found["expected"].append(layer.scale * (high * r * (sigma**2 / 3 + wide * sigma**4)) ** 0.5)
        shares = {name: statistics.median(a / b for a, b in zip(found[name], found["W"], strict=True)) for name in ("fresh", "expected", "trained", "BA")}
        lines.append([sigma, *shares.values()])
    layer = next(iter(lora_layers(backbone.model).values()))
    print(f"\nPosterland's base, r = {layer.r}, s = {layer.scale:g}; sizes as shares of ‖W‖, median over the layers")
    table("σ_n | B = 0: s ‖B' A'‖ | predicted | after training: s ‖B' A' - B A‖ | what training itself did: s ‖B A‖", lines)
    print("\nentry of the change at B = 0, s √r σ √(1 / (3 width) + σ²), r = 8, s = 4:")
    table("width | fresh A's RMS | σ_n = 0.01 | 0.05 | 0.1", [
        [wide, (3 * wide) ** -0.5, *(4 * 8**0.5 * s * (1 / (3 * wide) + s * s) ** 0.5 for s in (0.01, 0.05, 0.1))] for wide in (576, 1536, 2048, 3584, 4096)])


# ---- entry 7: checkpointing ----


def part_checkpointing(out: Path) -> None:
    """The adapter's gradient on one micro-batch, where backward is inside the noise and where it is not."""
    grads = {}
    for checkpointed in (False, True):
        backbone, source, rows = load_policy(out, "HaNoRec")
        if checkpointed:
            use_checkpointing(backbone)
        backbone.model.train()
        micro = collate(backbone, rows[:4], source.pictures)
        layers = lora_layers(backbone.model)
        trained = [w for layer in layers.values() for w in (layer.A, layer.B)]
        for weight in trained:
            weight.requires_grad_()
        for sigma in (0.01, 0.05, 0.1):
            for inside in (True, False):
                with lora_noise(backbone.model, sigma, torch.Generator().manual_seed(SEED)):
                    log_probs = answer_log_probs(forward(backbone, micro), micro)
                    loss = -F.logsigmoid(BETA0 * (log_probs[:, 0] - log_probs[:, 1])).mean()
                    if inside:
                        found = torch.autograd.grad(loss, trained)
                if not inside:
                    try:
                        found = torch.autograd.grad(loss, trained)
                    except RuntimeError as error:
                        print(f"σ_n {sigma}, recomputed without the noise: {type(error).__name__}")
                        continue
                grads[checkpointed, sigma, inside] = torch.cat([g.flatten() for g in found])
    rows = []
    for sigma in (0.01, 0.05, 0.1):
        right = grads[False, sigma, True]
        for name, key in (("no checkpointing, backward after the noise", (False, sigma, False)), ("checkpointing, backward inside", (True, sigma, True)),
                          ("checkpointing, backward after", (True, sigma, False))):
            if key in grads:
                rows.append([sigma, name, ((grads[key] - right).norm() / right.norm()).item(), F.cosine_similarity(grads[key], right, dim=0).item()])
    table("σ_n | | error of the gradient, relative | cosine with the right one", rows)


# ---- entry 8: labels instead of scores ----



def hard_auc(positive: np.ndarray, negative: np.ndarray, threshold: float | np.ndarray = 0.0) -> tuple[float, float, float]:
    """TPR, TNR and (TPR + TNR) / 2 of the labels score > threshold: the AUC of scores that are labels."""
    tpr, tnr = float((positive > threshold).mean()), float((negative <= np.asarray(threshold)).mean())
    return tpr, tnr, (tpr + tnr) / 2


def part_auc(out: Path) -> None:
    rows = []
    for task in ("test-binary", "test"):
        for kind, found in read_json(out / task / "metrics.json")["sets"].items():
            for policy, scores in found["scores"].items():
                scores = np.array(scores)
                where = np.array([user["candidates"].index(user["target"]) for user in found["users"]])
                own = np.take_along_axis(scores, where[:, None], 1)[:, 0]
                other = scores[np.arange(scores.shape[1]) != where[:, None]].reshape(len(scores), -1)
                cuts = [("Yes where log P(Yes) > log P(No)", 0.0)] if task == "test-binary" else [
                    (f"the {k} best are Yes", np.sort(scores, 1)[:, -k - 1][:, None]) for k in (1, 3)]
                for name, cut in cuts:
                    tpr, tnr, both = hard_auc(own[:, None], other, cut)
                    accuracy = (tpr + 9 * tnr) / 10
                    rows.append([f"{'binary' if task == 'test-binary' else 'ranking'}, {kind}", Path(policy).name, name, *(f"{100 * x:.1f}" for x in (
                        auc_rows(own, other).mean(), pooled_auc(own, other.ravel()), both, tpr, tnr, accuracy))])
    table("task, set | policy | label | AUC of scores | pooled | AUC of labels | TPR | TNR | accuracy at 1 : 9", rows)
