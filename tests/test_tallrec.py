"""TALLRec as flags: `--task binary --images none`; its score, and one AUC over all pairs."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from safetensors.torch import load_file
from transformers import AutoTokenizer

import evaluate
import train_sft
from hanorec.mllm import evaluation, prompts
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.tasks import scoring_rows
from hanorec.ranking.report import summarise

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import yes_no_base

TALLREC = ["--task", "binary", "--images", "none"]


@pytest.fixture(scope="module")
def world(data, checkpoints):
    """Backbone, builder and four examples of the task, on text alone."""
    backbone, builder, examples = toy.source_of(data, checkpoints, "binary", images="none")
    backbone.model.eval()
    return backbone, builder, examples[:4]


def log_softmax(logits):
    """In float64, of a vector."""
    logits = logits.double().numpy()
    top = logits.max()
    return logits - top - math.log(np.exp(logits - top).sum())


@pytest.mark.equation("TR-1")
def test_the_score_by_hand(world):
    """From the logits of one row and answer: both answers' tokens, the end included. Without what
    follows the first token it is TALLRec's log-odds."""
    backbone, builder, examples = world
    rows = scoring_rows(builder, examples)
    scores = evaluation.score(builder, rows, 4, 4)["sum"]
    assert scores.shape == (4, 4) and scores.std() > 0.1
    for number in (0, 7, 13):
        row, first, rest = rows[number], [], []
        for a, text in enumerate((prompts.YES, prompts.NO)):
            word, *end = row.answers[a]
            assert text.startswith(backbone.tokenizer.decode([word]).strip())
            batch = collate(backbone, [toy.single_answer(row, a)], builder.pictures)
            with torch.no_grad():
                logits = forward(backbone, batch)[0]  # (L, V)
            first.append(log_softmax(logits[0])[word])
            rest.append(sum(log_softmax(logits[1 + t])[token] for t, token in enumerate(end)))
        s = scores.flat[number]
        assert s == pytest.approx(first[0] + rest[0] - first[1] - rest[1], abs=5e-5)
        odds = 1 / (1 + math.exp(first[1] - first[0]))  # softmax over Yes and No alone
        assert 1 / (1 + math.exp(rest[0] - rest[1] - s)) == pytest.approx(odds, abs=5e-5)


def test_swapped_answers_negate_the_score(world):
    _, builder, examples = world
    rows, swapped = [], []
    for example in examples:
        for item in example.candidates:
            rows.append(builder.binary_row(example, item, [prompts.YES, prompts.NO]))
            swapped.append(builder.binary_row(example, item, [prompts.NO, prompts.YES]))
    one = evaluation.score(builder, rows, 4, 4)["sum"]
    other = evaluation.score(builder, swapped, 4, 4)["sum"]
    np.testing.assert_allclose(other, -one, atol=5e-5)


def test_a_model_that_does_not_look_at_the_item_has_an_auc_of_half(world):
    """A head of zeros: Yes and No differ by their numbers of tokens alone."""
    backbone, builder, examples = world
    weight = backbone.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    try:
        scores = evaluation.score(builder, scoring_rows(builder, examples), 4, 4)["sum"]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    report = summarise(scores, examples, 0)
    assert report["metrics"]["AUC"]["value"] == report["pooled_AUC"] == 0.5


def test_trained_and_evaluated_by_flags_alone(data, checkpoints, tmp_path):
    """pooled_AUC is that of all positives against all negatives, by plain loops, and by ranks (the
    Mann-Whitney form, which is scikit-learn's roc_auc_score)."""
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("images", "*_*.json"))
    shutil.rmtree(tmp_path / "data" / "images", ignore_errors=True)
    argv = ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(tmp_path / "data")]
    argv += [*toy.SHORT, *TALLREC]
    train_sft.main([*argv, *toy.STEPS, "--out", str(tmp_path / "sft")])
    few = ["--sets", "random", "--users-to", "0.5", "--adapter", str(tmp_path / "sft")]
    evaluate.main([*argv, *few, "--out", str(tmp_path / "test")])
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())["sets"]["random"]
    (scores,), (report,) = metrics["scores"].values(), metrics["policies"].values()

    labelled = []  # (score, whether it is the target's)
    for user, of_user in zip(metrics["users"], scores, strict=True):
        for item, score in zip(user["candidates"], of_user, strict=True):
            labelled.append((score, item == user["target"]))
    positive = [score for score, own in labelled if own]
    negative = [score for score, own in labelled if not own]
    assert (len(positive), len(negative)) == (12, 36)
    won = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert report["pooled_AUC"] == pytest.approx(won / (12 * 36))
    order = sorted(labelled)
    assert len(set(scores_of(order))) == 48  # no tie, so ranks are places
    ranks = sum(place for place, (_, own) in enumerate(order, 1) if own)
    assert report["pooled_AUC"] == pytest.approx((ranks - 12 * 13 / 2) / (12 * 36))


def scores_of(labelled):
    return [score for score, _ in labelled]


def test_a_base_that_can_say_yes_and_no(data, checkpoints, tmp_path, monkeypatch):
    """benchmarks/yes_no_base.py: the rows of the words' tokens are new; all other weights are the
    same to the bit."""
    base, out = Path(checkpoints["qwen2_5_vl"]), tmp_path / "base"
    monkeypatch.setattr(yes_no_base, "STEPS", 5)
    monkeypatch.setattr(sys, "argv", ["yes_no_base.py", str(base), str(data), str(out)])
    yes_no_base.main()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    words = {*tokenizer.encode(prompts.YES), *tokenizer.encode(prompts.NO)}
    assert before.keys() == after.keys()
    changed = {}
    for name, weight in after.items():
        if not torch.equal(weight, before[name].to(weight)):
            changed[name] = (weight != before[name].to(weight)).any(1).nonzero().flatten().tolist()
    assert list(changed.values()) == [sorted(words)]
