#!/usr/bin/env python3
"""The figures of docs/audit.md: one part an entry, each prints a markdown table; deterministic, seed 2025.

    python benchmarks/audit.py run RUN            Posterland: SFT, HaNoRec and w/o NoDO (5 epochs), the binary task; about 12 CPU minutes
    python benchmarks/audit.py PART [RUN]         lambda, rewards, crossover, nodo, checkpointing, auc read RUN; eta, micro, chance, synergy do not
    python benchmarks/audit.py titles DATA ...    DATA: folders in the native layout
    python benchmarks/audit.py length MODEL DATA [ADAPTER] [--users N]

The noise curve is benchmarks/noise_curve.py. All else is the package's own code on the package's own generated data.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from audit_run import (
    SEED,
    part_auc,
    part_checkpointing,
    part_crossover,
    part_lambda,
    part_nodo,
    part_rewards,
    quantiles,
    ranks,
    table,
    train,
)

from hanorec.base.command import run
from hanorec.base.config import DataConfig
from hanorec.brmrs.losses import bpr_loss, synergy_loss
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import heldout_examples, load_interactions
from hanorec.hars import responsiveness
from hanorec.lora.files import attach_policy
from hanorec.metrics import hit_rate, ndcg, rank_of_positive
from hanorec.mllm.forward import score_rows
from hanorec.mllm.items import neighbors
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import answer_ids
from hanorec.mllm.tasks import PromptBuilder, load_pictures, scoring_rows
from hanorec.studies import stages as demo

# ---- entries 2 and 3: eta ----


def eta_of(R: np.ndarray, **running: float) -> float:
    return responsiveness(torch.as_tensor(R, dtype=torch.float64), **running).item()


def part_eta(_: Path) -> None:
    rng = np.random.default_rng(SEED)
    R = 0.3 + rng.standard_normal(32)
    table("R | η", [[name, eta_of(x)] for name, x in (("32 draws of N(0.3, 1)", R), ("-R", -R), ("100 R", 100 * R), ("R / 1000", R / 1000))])
    print("\nη = σ(1 + 2 (1 - m) / (P - 2)) / σ(1), m = (min R + max R) / (2 mean R)")
    shape = rng.standard_normal(32)
    shape = (shape - shape.mean()) / shape.std()
    ratios = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, -0.001, -0.01, -0.1)
    table("mean / std of R | m | η by the closed form | η, P = 32 draws of one shape | the same, extremes mirrored",
          [[c, m, 1 / (1 + math.exp(-1 - 2 * (1 - m) / 30)) * (1 + math.exp(-1)), eta_of(c + shape), eta_of(c - shape)]
           for c in ratios for m in [((c + shape).min() + (c + shape).max()) / 2 / c]])
    rows = []
    for P in (4, 8, 32, 128):
        for c in (0, 0.1, 0.3, 1, 3):
            draws = c + rng.standard_normal((4000, P))
            etas, ema = [eta_of(R) for R in draws], [eta_of(R, mean=c, std=1.0) for R in draws]
            rows.append([P, c, *quantiles(etas, (0.01, 0.1, 0.5, 0.9, 0.99)), f"{np.mean(np.array(etas) < 0.5):.1%}", *quantiles(ema, (0.01, 0.99))])
    table("P | mean / std | η at 1% | 10% | 50% | 90% | 99% | η < 0.5 | `ema` at 1% | 99%", rows)


def part_micro(_: Path) -> None:
    rng = np.random.default_rng(SEED)
    rows = []
    for c in (0.1, 0.3, 1, 3):
        R = c + rng.standard_normal((2000, 32))
        whole = np.array([eta_of(batch) for batch in R])
        parts = np.array([[eta_of(part) for part in batch.reshape(8, 4)] for batch in R])
        rows.append([c, f"{whole.mean():.3f} ± {whole.std():.3f}", f"{parts.mean():.3f} ± {parts.std():.3f}",
                     float(parts.std(1).mean()), f"{(parts < 0.5).mean():.1%}", f"{(whole < 0.5).mean():.1%}"])
    table("mean / std of R | η of 32 pairs | η of 4 pairs | deviation among the 8 micro-batches of a step | η < 0.5, of 4 | of 32", rows)


# ---- entries 8 and 9: candidates ----


def part_titles(folders: Sequence[str]) -> None:
    """Draws that do not look at titles, unlike ours: 9 others at random, or 9 of the 50 nearest by the demo's base model."""
    backbone, rows = load_backbone(str(demo.BASE)), []
    for folder in folders:
        catalog = load_catalog(folder)
        titles = [title.casefold() for title in catalog.titles]
        counts, distinct, n = Counter(titles), set(titles), len(titles)
        longer = sum(any(b != a and b.startswith(a) for a in distinct) for b in distinct)
        near = neighbors(backbone, catalog, load_pictures(backbone, catalog, DataConfig(data=folder)), 50)[2].numpy()
        examples = heldout_examples(load_interactions(folder, catalog), "test", 5)
        rng, shares = np.random.default_rng(SEED), []
        for pool in (np.array([np.delete(np.arange(n), i) for i in range(n)]), near):
            sets = [[titles[row] for row in (e.target, *rng.choice(pool[e.target], 9, replace=False))] for e in 10 * examples]
            shares.append(np.mean([len(set(one)) < len(one) for one in sets]))
            shares.append(np.mean([any(one[0] != other and (one[0].startswith(other) or other.startswith(one[0])) for other in one[1:]) for one in sets]))
        ours = [[titles[row] for row in e.candidates] for e in draw_candidates(examples, catalog, 9, SEED)]
        rows.append([catalog.name, n, sum(c for c in counts.values() if c > 1), longer, *(f"{share:.2%}" for share in shares), sum(len(set(one)) < len(one) for one in ours)])
    table("catalogue | items | items that share their title | titles that begin with another | random: a title twice | the target's begins another's, or the reverse | "
          "nearest: a title twice | the target's begins another's, or the reverse | ours: a title twice", rows)


def part_chance(_: Path) -> None:
    rng = np.random.default_rng(SEED)
    rows = []
    for positives, negatives in ((1, 9), (1, 4), (1, 7), (3, 4), (3, 7)):
        n = positives + negatives
        places = rng.permuted(np.tile(np.arange(n), (200_000, 1)), axis=1)[:, :positives]  # ranks from 0
        gains = [1 / math.log2(2 + k) for k in range(3)]
        ideal = sum(gains[:positives])
        gain = np.where(places < 3, 1 / np.log2(2 + places), 0).sum(1) / ideal
        hit = 1 - math.comb(negatives, 3) / math.comb(n, 3)
        expected = sum(gains) * positives / n / ideal
        rows.append([f"{positives} + {negatives}", f"{100 * hit:.1f} ({100 * (places < 3).any(1).mean():.1f})", f"{100 * 3 / n:.1f}",
                     f"{100 * expected:.1f} ({100 * gain.mean():.1f})", "50.0"])
    table("targets + negatives | HR@3, any target (simulated) | share of the targets in the first 3 | NDCG@3 (simulated) | AUC", rows)


# ---- entry 10: BR-MRS ----


def part_synergy(_: Path) -> None:
    t, v = (torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (SEED, SEED + 1))
    rows = []
    for name, f in (("s_f = s_t + s_v (concat)", t + v), ("s_f = s_t + s_v + s_t s_v (with a cross term)", t + v + t * v)):
        values = [synergy_loss(f, t, v), bpr_loss(torch.minimum(t, v))]
        slopes = [torch.cat(torch.autograd.grad(x.sum(), [t, v], retain_graph=True)) for x in values]
        rows.append([name, (values[0] - values[1]).abs().max().item(), (slopes[0] - slopes[1]).abs().max().item()])
    table("fusion | largest difference of L_syn (θ = 0) from BPR on the weaker modality, 1000 triples | of the gradient", rows)


# ---- entry 11: length ----


def part_length(model: str, data: str, users: int, adapter: str | None) -> None:
    backbone = load_backbone(model)
    if adapter:
        attach_policy(backbone.model, adapter)
    backbone.model.eval()
    catalog = load_catalog(data)
    config = DataConfig(data=data, candidate_images="on" if catalog.name == "Posterland" else "off")
    examples = draw_candidates(heldout_examples(load_interactions(data, catalog), "test", 5)[-users:], catalog, 9, SEED)
    source = PromptBuilder(backbone, catalog, load_pictures(backbone, catalog, config), config)
    sums, means = (x.double().numpy() for x in score_rows(backbone, scoring_rows(source, examples), source.pictures, 2, "users"))
    tokens = np.array([[len(answer_ids(backbone, catalog.titles[row])) for row in e.candidates] for e in examples], float)
    positive = np.array([e.candidates.index(e.target) for e in examples])
    rows = []
    for name, scores in (("sum", sums), ("mean", means)):
        within = [np.corrcoef(ranks(s), ranks(n))[0, 1] for s, n in zip(scores, tokens, strict=True) if len(set(n)) > 1]
        place = rank_of_positive(scores, positive)
        first = tokens[np.arange(len(tokens)), scores.argmax(1)]
        rows.append([name, float(np.mean(within)), first.mean(), tokens.mean(), f"{100 * hit_rate(place, 3):.1f}", f"{100 * ndcg(place, 3):.1f}"])
    print(f"\n{catalog.name}, {len(examples)} users, {Path(adapter).name if adapter else 'no adapter'}; tokens of an answer, end of turn included: "
          f"{tokens.min():.0f} .. {tokens.max():.0f}")
    table("score | Spearman with length within a user | tokens of the title ranked first | of all candidates | HR@3 | NDCG@3", rows)


PARTS: dict[str, Callable[[Path], None]] = {
    "run": train, "lambda": part_lambda, "eta": part_eta, "micro": part_micro, "rewards": part_rewards, "crossover": part_crossover, "nodo": part_nodo,
    "checkpointing": part_checkpointing, "auc": part_auc, "chance": part_chance, "synergy": part_synergy}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "titles", "length"])
    parser.add_argument("paths", nargs="*", help="RUN; DATA ...; or MODEL DATA [ADAPTER]")
    parser.add_argument("--users", type=int, default=100, help="of length: the last so many of the test split")
    args = parser.parse_args(argv)
    needed = {"eta": 0, "micro": 0, "chance": 0, "synergy": 0, "length": 2}.get(args.part, 1)
    if len(args.paths) < needed:
        parser.error(f"{args.part} {' '.join(args.paths)}: expected at least {needed} path(s); see --help")
    torch.manual_seed(SEED)
    if args.part == "titles":
        part_titles(args.paths)
    elif args.part == "length":
        part_length(*args.paths[:2], args.users, *(args.paths[2:] or [None]))
    else:
        PARTS[args.part](Path(args.paths[0] if args.paths else "."))


if __name__ == "__main__":
    run(main)
