"""What a policy writes, held against titles as texts: the second column of evaluate.py (--answers).

The authors' release evaluates so: a hit is a title that is written exactly, of several targets the
last item alone counts, and AUC is of hard Yes and No. No score is looked at, so a text that names
no candidate is a failure, which is counted here and a miss. Figures are not comparable with those
of scores (docs/audit.md, 8 and 9). U = users, C = candidates, T = titles of an answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hanorec.base.config import EvalConfig
from hanorec.base.terminal import aligned
from hanorec.datasets.interactions import Example
from hanorec.metrics import bootstrap_interval, ndcg_rows
from hanorec.mllm import prompts
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.evaluation import use_policy
from hanorec.mllm.generation import generate, likeliest, nucleus
from hanorec.mllm.tasks import scoring_rows


def compare_written(
    builder: PromptBuilder,
    sets: Mapping[str, Sequence[Example]],
    policies: Sequence[str],
    config: EvalConfig,
) -> dict[str, Any]:
    """Candidate set -> "users", "chance", and of each policy "metrics", "failures" and "texts".

    Printed, too.
    """
    report: dict[str, Any] = {}
    for kind, examples in sets.items():
        results = {}
        for policy in policies:
            use_policy(builder.backbone, policy)
            texts = written_texts(builder, examples, config)
            judge = judge_verdicts if builder.config.task == "binary" else judge_lists
            rows, failures = judge(builder, examples, texts)
            metrics = {}
            for name, values in rows.items():
                interval = bootstrap_interval(values, seed=config.seed)
                metrics[name] = {"value": float(values.mean()), "interval": interval}
            results[policy] = {"metrics": metrics, "failures": failures, "texts": texts}
        users = []
        for example in examples:
            users.append({
                "user": example.user,
                "targets": [builder.catalog.ids[row] for row in example.targets],
                "candidates": [builder.catalog.ids[row] for row in example.candidates],
            })
        found = {"users": users, "chance": chance_of(builder, examples), "policies": results}
        report[kind] = found
        print_written(kind, found)
    return report


def written_texts(
    builder: PromptBuilder, examples: Sequence[Example], config: EvalConfig
) -> list[str]:
    """What the policy on the base writes to each prompt: of a user, or binary of each candidate.

    As many tokens as the longest answer that the candidates allow.
    """
    if builder.config.task == "binary":
        rows = scoring_rows(builder, examples)
    else:
        rows = [longest_answer(builder, example) for example in examples]
    limit = max(max(map(len, row.answers)) for row in rows)
    choose = likeliest if config.answers == "greedy" else nucleus(config.seed)
    return generate(builder.backbone, rows, builder.pictures, limit, config.batch, choose)


def longest_answer(builder: PromptBuilder, example: Example) -> prompts.Row:
    """An example's prompt, answered by those of its candidates whose titles take most tokens."""

    def takes(row: int) -> int:
        return len(prompts.text_ids(builder.backbone, builder.shown.titles[row]))

    longest = sorted(example.candidates, key=takes, reverse=True)
    return builder.list_row(example, [longest[: builder.config.targets]])


def judge_lists(
    builder: PromptBuilder, examples: Sequence[Example], texts: Sequence[str]
) -> tuple[dict[str, np.ndarray], int]:
    """HR@T and NDCG@T of the target, the last item, among the lines of each text, (U,) each.

    Failures: texts that are not T different candidates' titles, a line each.
    """
    titles, count = builder.shown.titles, builder.config.targets
    places, failures = [], 0
    for example, text in zip(examples, texts, strict=True):
        if builder.config.quotes == "chosen":
            text = text.strip().removeprefix('"').removesuffix('"')
        lines = [line.strip() for line in text.split("\n")]
        known = {titles[row].strip() for row in example.candidates}
        failures += len(lines) != count or len(known.intersection(lines)) != count
        target = titles[example.target].strip()
        shown = lines[:count]
        places.append(shown.index(target) + 1 if target in shown else np.inf)
    ranks = np.array(places)
    hits = np.isfinite(ranks).astype(float)
    return {f"HR@{count}": hits, f"NDCG@{count}": ndcg_rows(ranks, count)}, failures


def judge_verdicts(
    builder: PromptBuilder, examples: Sequence[Example], texts: Sequence[str]
) -> tuple[dict[str, np.ndarray], int]:
    """AUC of hard labels, which is balanced accuracy, (TPR + TNR) / 2: (U,).

    Failures: texts that are neither Yes nor No; they are wrong of any candidate.
    """
    values, said = [], iter(texts)
    for example in examples:
        right: dict[bool, list[bool]] = {True: [], False: []}
        for candidate in example.candidates:
            chosen = candidate == example.target
            right[chosen].append(next(said) == (prompts.YES if chosen else prompts.NO))
        values.append((np.mean(right[True]) + np.mean(right[False])) / 2)
    failures = sum(text not in (prompts.YES, prompts.NO) for text in texts)
    return {"AUC of labels": np.array(values)}, failures


def chance_of(builder: PromptBuilder, examples: Sequence[Example]) -> dict[str, float]:
    """What a random answer of different candidates reaches."""
    if builder.config.task == "binary":
        return {"AUC of labels": 0.5}
    count, candidates = builder.config.targets, len(examples[0].candidates)
    gains = ndcg_rows(np.arange(1, count + 1), count)
    return {f"HR@{count}": count / candidates, f"NDCG@{count}": float(gains.sum()) / candidates}


def print_written(kind: str, report: Mapping[str, Any]) -> None:
    """A line a policy: metrics in percent, and how many of its texts fail."""
    names = list(report["chance"])
    lines = [" | ".join([f"{kind} candidates, as written", *names, "failures"])]
    for policy, result in report["policies"].items():
        cells = [f"{100 * result['metrics'][name]['value']:.2f}" for name in names]
        failed = f"{result['failures']} of {len(result['texts'])}"
        lines.append(" | ".join([policy, *cells, failed]))
    chance = [f"{100 * report['chance'][name]:.2f}" for name in names]
    lines.append(" | ".join(["chance", *chance]))
    print("\n" + aligned("\n".join(lines)), end="")
