"""Parts of `hanorec.studies.audit` about scores: AUC of labels, length of titles, and BR-4."""

from pathlib import Path

import numpy as np
import torch

from hanorec.base.config import DataConfig
from hanorec.base.files import read_json
from hanorec.brmrs.losses import bpr_loss, synergy_loss
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import heldout_examples, load_interactions
from hanorec.lora.loading import attach_policy
from hanorec.metrics import auc_rows, hit_rate, ndcg, pooled_auc, rank_of_positive
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.forward import score_rows
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import answer_ids
from hanorec.mllm.tasks import load_pictures, scoring_rows
from hanorec.studies.audit_run import SEED, ranks, table

# ---- entry 8: labels instead of scores ----


def hard_auc(
    positive: np.ndarray, negative: np.ndarray, threshold: float | np.ndarray = 0.0,
) -> tuple[float, float, float]:
    """TPR, TNR and their mean, of the labels score > threshold: the AUC of scores that are labels.

    positive (U, 1) and negative (U, n) scores; threshold: one for all, or one a user, (U, 1).
    """
    tpr = float((positive > threshold).mean())
    tnr = float((negative <= np.asarray(threshold)).mean())
    return tpr, tnr, (tpr + tnr) / 2


def part_auc(out: Path) -> None:
    rows = []
    for folder, task in (("test-binary", "binary"), ("test", "ranking")):
        for kind, found in read_json(out / folder / "metrics.json")["sets"].items():
            targets = [user["candidates"].index(user["target"]) for user in found["users"]]
            where = np.array(targets)[:, None]  # (U, 1)
            for policy, scores in found["scores"].items():
                scores = np.array(scores)  # (U, C)
                own = np.take_along_axis(scores, where, 1)[:, 0]
                others = np.arange(scores.shape[1]) != where
                other = scores[others].reshape(len(scores), -1)
                areas = [auc_rows(own, other).mean(), pooled_auc(own, other.ravel())]
                for label, cut in _cuts(task, scores):
                    tpr, tnr, both = hard_auc(own[:, None], other, cut)
                    accuracy = (tpr + 9 * tnr) / 10
                    shares = [*areas, both, tpr, tnr, accuracy]
                    percent = [f"{100 * share:.1f}" for share in shares]
                    rows.append([f"{task}, {kind}", Path(policy).name, label, *percent])
    table(
        "task, set | policy | label | AUC of scores | pooled | AUC of labels | TPR | TNR | "
        "accuracy at 1 : 9",
        rows)


def _cuts(task: str, scores: np.ndarray) -> list[tuple[str, float | np.ndarray]]:
    """What makes a score (U, C) a Yes, and above which score it is one."""
    if task == "binary":
        return [("Yes where log P(Yes) > log P(No)", 0.0)]
    cuts = []
    for k in (1, 3):
        cuts.append((f"the {k} best are Yes", np.sort(scores, 1)[:, -k - 1][:, None]))
    return cuts


# ---- entry 10: BR-MRS ----


def part_synergy(_: Path) -> None:
    t, v = _normal(SEED), _normal(SEED + 1)
    rows = []
    for name, f in (
        ("s_f = s_t + s_v (concat)", t + v),
        ("s_f = s_t + s_v + s_t s_v (with a cross term)", t + v + t * v),
    ):
        synergy, weaker = synergy_loss(f, t, v), bpr_loss(torch.minimum(t, v))
        slopes = []
        for loss in (synergy, weaker):
            found = torch.autograd.grad(loss.sum(), [t, v], retain_graph=True)
            slopes.append(torch.cat(found))
        apart = (synergy - weaker).abs().max().item()
        rows.append([name, apart, (slopes[0] - slopes[1]).abs().max().item()])
    table(
        "fusion | largest difference of L_syn (θ = 0) from BPR on the weaker modality, 1000 "
        "triples | of the gradient",
        rows)


def _normal(seed: int) -> torch.Tensor:
    """1000 numbers that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1000, dtype=torch.float64, generator=generator).requires_grad_()


# ---- entry 11: length ----


def part_length(model: str, data: str, users: int, adapter: str | None) -> None:
    """The last `users` of the test split, their titles scored by sum and by mean over tokens."""
    backbone = load_backbone(model)
    if adapter:
        attach_policy(backbone.model, adapter)
    backbone.model.eval()
    catalog = load_catalog(data)
    config = DataConfig(data=data, candidate_images="on" if catalog.name == "Posterland" else "off")
    examples = heldout_examples(load_interactions(data, catalog), "test", 5)[-users:]
    examples = draw_candidates(examples, catalog, 9, SEED)
    pictures = load_pictures(backbone, catalog, config)
    builder = PromptBuilder(backbone, catalog, pictures, config)
    sums, means = score_rows(backbone, scoring_rows(builder, examples), pictures, 2, "users")

    length_of = np.array([len(answer_ids(backbone, title)) for title in catalog.titles], float)
    tokens = length_of[np.array([e.candidates for e in examples])]  # (U, C)
    positive = np.array([e.candidates.index(e.target) for e in examples])
    rows = []
    for name, found in (("sum", sums), ("mean", means)):
        scores = found.double().numpy()  # (U, C)
        within = []
        for of_user, lengths in zip(scores, tokens, strict=True):
            if len(set(lengths)) > 1:
                within.append(np.corrcoef(ranks(of_user), ranks(lengths))[0, 1])
        place = rank_of_positive(scores, positive)
        first = tokens[np.arange(len(tokens)), scores.argmax(1)]
        rows.append([
            name,
            float(np.mean(within)),
            first.mean(),
            tokens.mean(),
            f"{100 * hit_rate(place, 3):.1f}",
            f"{100 * ndcg(place, 3):.1f}",
        ])
    trained = Path(adapter).name if adapter else "no adapter"
    print(
        f"\n{catalog.name}, {len(examples)} users, {trained}; tokens of an answer, end of turn "
        f"included: {tokens.min():.0f} .. {tokens.max():.0f}")
    table(
        "score | Spearman with length within a user | tokens of the title ranked first | of all "
        "candidates | HR@3 | NDCG@3",
        rows)
