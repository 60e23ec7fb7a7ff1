"""What a policy makes of candidates, and of the catalogue's images: EV-1, EV-4, lists of titles.

A policy is an adapter folder with what it stands on, or "base", the bare model. U = users, C =
candidates of each.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hanorec.base.config import EvalConfig
from hanorec.base.errors import InputError
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example
from hanorec.lora.loading import attach_policy
from hanorec.lora.stack import remove_adapters
from hanorec.metrics import similarity_groups
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.forward import score_rows
from hanorec.mllm.items import item_embeddings
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import scoring_rows

GROUPS = 10  # of items, in EV-4


def use_policy(backbone: Backbone, policy: str) -> None:
    """Put exactly this policy's adapters on the base."""
    remove_adapters(backbone.model)
    if policy != "base":
        attach_policy(backbone.model, policy)
    backbone.model.eval()


def score(
    builder: PromptBuilder, rows: Sequence[Row], users: int, batch: int
) -> dict[str, np.ndarray]:
    """EV-1 for every candidate of every user, by the policy that is on the base.

    rows: of `scoring_rows`. Returns {"sum": (U, C), "mean": (U, C)}, log P of the title in all and
    per token; binary: log P(Yes) - log P(No).
    """
    plain = builder.config.plain
    sums, means = score_rows(builder.backbone, rows, builder.pictures, batch, "users", plain)
    found = {}
    for kind, log_probs in {"sum": sums, "mean": means}.items():  # (rows, A) each
        if builder.config.task == "binary":
            # TR-1: s = \log\pi(\text{Yes} \mid x) - \log\pi(\text{No} \mid x)
            log_probs = log_probs[:, 0] - log_probs[:, 1]  # (U C,): A = Yes, No
        found[kind] = log_probs.double().numpy().reshape(users, -1)
    return found


def shown_pictures(
    pictures: dict[int, ImageFeatures], images: str, seed: int
) -> dict[int, ImageFeatures]:
    """Each item's own picture, or with `--images shuffled` another item's.

    Those are exchanged by a cycle through all owners, so that nobody keeps its own.
    """
    if images != "shuffled":
        return pictures
    owners = np.random.default_rng(seed).permutation(list(pictures)).tolist()
    others = np.roll(owners, 1).tolist()
    return {row: pictures[other] for row, other in zip(owners, others, strict=True)}


# ---- a list for one user ----


def recommend(
    builder: PromptBuilder, examples: Iterable[Example], policies: Sequence[str], config: EvalConfig
) -> list[dict[str, Any]]:
    """The Top-K titles of one user for each policy, of the candidates of its examples.

    They are printed and returned.
    """
    lists = []
    for example in examples:
        if config.top_k > len(example.candidates):
            raise InputError(
                f"--top-k {config.top_k}: user {config.user!r} has {len(example.candidates)} "
                "candidates; choose 1 .. that many"
            )
        history = [builder.catalog.titles[row] for row in example.history]
        print(f"user {config.user}, history: " + " | ".join(history))
        rows = scoring_rows(builder, [example])
        for policy in policies:
            use_policy(builder.backbone, policy)
            scores = score(builder, rows, 1, config.batch)["sum"][0]  # (C,)
            items = top_items(builder.catalog, example, scores, config.top_k)
            lists.append({"user": config.user, "policy": policy, "items": items})
            print_list(policy, items)
    return lists


def top_items(
    catalog: Catalog, example: Example, scores: np.ndarray, k: int
) -> list[dict[str, Any]]:
    """The k candidates with the highest scores (C,), best first; of equal ones the first."""
    items = []
    for c in np.argsort(-scores, kind="stable")[:k]:
        row = example.candidates[c]
        items.append({
            "id": catalog.ids[row],
            "title": catalog.titles[row],
            "score": float(scores[c]),
            "chosen": row == example.target,
        })
    return items


def print_list(policy: str, items: Sequence[Mapping[str, Any]]) -> None:
    """`top_items`, a line each."""
    print(f"{policy}:")
    for place, item in enumerate(items, 1):
        mark = "  <- chosen" if item["chosen"] else ""
        print(f"  {place}. {item['title']} (id {item['id']}, score {item['score']:.3f}){mark}")


# ---- image-text similarity ----


def check_images(builder: PromptBuilder) -> None:
    """InputError where `similarity` cannot make its ten groups."""
    if builder.config.images == "none":
        raise InputError(
            "--similarity with --images none: expected images to be alike with titles; leave one "
            "of the two out"
        )
    if sum(path is not None for path in builder.catalog.images) < GROUPS:
        raise InputError(
            f"--similarity: {builder.config.data} has fewer than 10 images, expected at least one "
            "for each of the ten groups"
        )


def similarity(
    builder: PromptBuilder, policies: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """EV-4 for each policy against the bare model, from last hidden states; printed and returned.

    It is the mean cosine of ten groups of items, weakest first: "before" and "after".
    """
    cosine = {}
    for policy in ["base", *policies]:
        use_policy(builder.backbone, policy)
        H, X, has_image = item_embeddings(
            builder.backbone, builder.catalog, builder.pictures, "hidden"
        )
        cosine[policy] = torch.cosine_similarity(H, X)[has_image].numpy()  # (items with an image,)
    found = {}
    for policy in policies:
        before, after = similarity_groups(cosine["base"], cosine[policy], GROUPS)
        print(
            f"\nimage-text similarity, ten groups, {policy}\n"
            f"  before {np.round(before, 3)}\n"
            f"  after  {np.round(after, 3)}"
        )
        found[policy] = {"before": before.tolist(), "after": after.tolist()}
    return found
