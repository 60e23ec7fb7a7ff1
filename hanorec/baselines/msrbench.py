r"""MSRBench (MS-1, MS-2): a vision-language model that is not trained, as recommender and as
reranker.

S1 is the bare model on the ranking prompt. S3 is the same with the candidates in the order of
another row's scores, and a sentence that says so. MSRBench has the model write a ranked list and
reads it back; here each title is scored, so no answer can fail. U = users, C = candidates of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.datasets.interactions import Example
from hanorec.mllm import evaluation
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.prompts import Part
from hanorec.mllm.tasks import scoring_rows
from hanorec.ranking.report import by_id

# No line of its own, so that no title can be taken for it.
ORDERED = "Another recommender has listed the candidates, the best first. "


@dataclass(frozen=True)
class RerankBuilder(PromptBuilder):
    """A builder whose ranking prompt says that the candidates stand in another row's order."""

    def ranking_parts(self, example: Example) -> list[Part]:
        """S1's parts, with `ORDERED` before the last."""
        *parts, question = super().ranking_parts(example)
        return [*parts, ORDERED, question]


# ---- the order of another row ----


def by_score(
    examples: Sequence[Example], others: np.ndarray
) -> tuple[list[Example], np.ndarray]:
    """The examples with their candidates from the highest of these scores (U, C) to the lowest, of
    equal ones the first; and each one's place before, (U, C) int."""
    place = np.argsort(-others, axis=1, kind="stable")  # (U, C)
    found = []
    for example, order in zip(examples, place.tolist(), strict=True):
        candidates = tuple(example.candidates[c] for c in order)
        found.append(replace(example, candidates=candidates))
    return found, place


def in_first_order(scores: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Scores (U, C) of `by_score`'s examples, in the order that the candidates had before."""
    found = np.empty_like(scores)
    np.put_along_axis(found, place, scores, 1)
    return found


def stored_scores(
    folder: str | Path, kind: str, examples: Sequence[Example], ids: Sequence[str]
) -> np.ndarray:
    """Another row's scores (U, C) of these examples, from the metrics.json in its folder.

    InputError: it has none, or was evaluated on other users or candidates.
    """
    path, again = Path(folder) / "metrics.json", "evaluate it on the same data, users and --sets"
    sets = read_object(path).get("sets")
    one = sets.get(kind) if isinstance(sets, dict) else None
    if not isinstance(one, dict) or not {"users", "scores"} <= one.keys():
        raise InputError(f"{path}: no scores of the {kind} candidates, expected some; {again}")
    wanted = by_id(examples, ids)
    if len(one["users"]) != len(wanted):
        raise InputError(
            f"{path}, {kind}: {len(one['users'])} users, expected {len(wanted)}; {again}"
        )
    for stored, user in zip(one["users"], wanted, strict=True):
        if stored != user:
            raise InputError(f"{path}, {kind}: scores of {stored}, expected of {user}; {again}")
    return np.array(next(iter(one["scores"].values())))


# ---- the two strategies ----


def recommend(
    builder: PromptBuilder, examples: Sequence[Example], batch: int
) -> dict[str, np.ndarray]:
    r"""S1, by the policy that is on the base: {"sum": (U, C), "mean": (U, C)}.

    InputError: the task is not ranking.
    """
    if builder.config.task != "ranking":
        raise InputError(
            f"--task {builder.config.task}: MSRBench ranks a list, expected ranking; leave it out"
        )
    # MS-1: s(c) = \log\pi(y_c \mid S_1(h, C)), \quad S_1 = \text{the ranking prompt}
    return evaluation.score(builder, scoring_rows(builder, examples), len(examples), batch)


def rerank(
    builder: PromptBuilder, examples: Sequence[Example], others: np.ndarray, batch: int
) -> dict[str, np.ndarray]:
    r"""S3: as `recommend`, each candidate's score where the example has it.

    others: (U, C), the other row's scores. InputError: the task is not ranking.
    """
    reranker = RerankBuilder(*(getattr(builder, field.name) for field in fields(builder)))
    ordered, place = by_score(examples, others)
    # MS-2: s(c) = \log\pi(y_c \mid S_3(h, (c_{(1)}, \dots, c_{(C)}))),
    # \quad r_{c_{(1)}} \ge \dots \ge r_{c_{(C)}}
    scores = recommend(reranker, ordered, batch)
    return {kind: in_first_order(values, place) for kind, values in scores.items()}
