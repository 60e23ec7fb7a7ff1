"""MSRBench: S1 is the base model's row; S3 shows the same candidates in another row's order."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy

import evaluate
from hanorec.base.config import DataConfig, EvalConfig, ModelConfig
from hanorec.base.errors import InputError
from hanorec.base.settings import parse
from hanorec.baselines.msrbench import (
    ORDERED,
    RerankBuilder,
    by_score,
    in_first_order,
    recommend,
    rerank,
    stored_scores,
)
from hanorec.datasets.interactions import Example
from hanorec.mllm import prompts
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_pictures
from hanorec.ranking.candidate_sets import frozen_sets, held_out
from hanorec.ranking.report import popularity, summarise


@pytest.fixture(scope="module")
def base(data, checkpoints, tmp_path_factory):
    """The evaluation of the bare model on 6 users, and what it was made with: its folder, a
    builder, the examples, and popularity's scores as those of another row."""
    root = tmp_path_factory.mktemp("msrbench")
    shutil.copytree(data, root / "data", ignore=shutil.ignore_patterns("candidates_*"))
    argv = ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(root / "data"), *toy.SHORT]
    argv += ["--sets", "random", "--users-to", "0.25", "--out", str(root / "base")]
    evaluate.main(argv)
    model, config, evaluation = parse([ModelConfig, DataConfig, EvalConfig], argv)
    backbone = load_backbone(model.model, "float32", "cpu", model.max_pixels)
    backbone.model.eval()
    held = held_out(config, evaluation)
    pictures = load_pictures(backbone, held.catalog, config)
    examples = frozen_sets(held, config, evaluation, None, "")["random"]
    return SimpleNamespace(
        folder=root / "base",
        report=json.loads((root / "base" / "metrics.json").read_text())["sets"]["random"],
        builder=PromptBuilder(backbone, held.catalog, pictures, config),
        examples=examples,
        others=popularity(held.interactions.train, examples),
    )


@pytest.mark.equation("MS-1")
def test_s1_is_the_row_of_the_base_model(base):
    """To the last bit."""
    scores = recommend(base.builder, base.examples, 4)
    assert scores["sum"].tolist() == base.report["scores"]["base"]
    means = summarise(scores["mean"], base.examples, 2025)
    assert json.loads(json.dumps(means)) == base.report["policies_mean_score"]["base"]


@pytest.mark.equation("MS-2")
def test_s3_by_hand(base):
    """Each user's prompt from its texts, the candidates sorted in plain Python; the title of each
    scored alone, and the score at the place that the candidate has in the example."""
    builder, backbone = base.builder, base.builder.backbone
    scores = rerank(builder, base.examples, base.others, 4)["sum"]
    catalog, moved = builder.catalog, 0
    for u in (0, 3, 5):
        example, r = base.examples[u], base.others[u]
        order = sorted(range(4), key=lambda c: (-r[c], c))
        moved += order != [0, 1, 2, 3]
        items = [example.candidates[c] for c in order]
        parts = [
            prompts.HISTORY, *prompts.listed(catalog, example.history),
            prompts.WHICH, *prompts.listed(catalog, items),
            ORDERED, prompts.TITLE_ALONE,
        ]
        answers = [prompts.answer_ids(backbone, catalog.titles[row]) for row in items]
        row = prompts.encode_row(backbone, example.user, parts, builder.pictures, answers)
        with torch.no_grad():
            alone = toy.log_probs_alone(backbone, row, builder.pictures)[0].tolist()
        for place, c in enumerate(order):
            assert scores[u, c] == pytest.approx(alone[place], abs=5e-5)
    assert moved
    assert np.abs(scores - np.array(base.report["scores"]["base"])).max() > 1e-2


def test_the_prompt_holds_the_same_candidates_best_first(base):
    ordered, place = by_score(base.examples, base.others)
    reranker = RerankBuilder(
        base.builder.backbone, base.builder.catalog, base.builder.pictures, base.builder.config
    )
    for example, other, r, own in zip(base.examples, ordered, base.others, place, strict=True):
        assert sorted(other.candidates) == sorted(example.candidates)
        assert example.candidates[int(r.argmax())] == other.candidates[0]
        assert r[own].tolist() == sorted(r, reverse=True)
        assert (other.user, other.history, other.target) == (
            example.user, example.history, example.target)
        # but for the sentence it is S1 of that order
        parts = reranker.ranking_parts(other)
        assert parts.count(ORDERED) == 1
        parts.remove(ORDERED)
        assert parts == base.builder.ranking_parts(other)


def test_scores_do_not_depend_on_the_packing(base):
    """A user a forward, and a forward an answer."""
    together = rerank(base.builder, base.examples, base.others, 4)["sum"]
    single = rerank(base.builder, base.examples, base.others, 1)["sum"]
    np.testing.assert_allclose(single, together, atol=5e-5)


def test_order_and_back():
    rng = np.random.default_rng(0)
    others = rng.integers(4, size=(50, 6)).astype(float)  # with ties
    examples = [Example(f"u{n}", (0,), 0, (0,), tuple(range(6))) for n in range(50)]
    _, place = by_score(examples, others)
    assert (np.sort(place, 1) == np.arange(6)).all()
    of_ordered = np.take_along_axis(others, place, 1)
    assert (np.diff(of_ordered) <= 0).all()
    assert (in_first_order(of_ordered, place) == others).all()
    first = np.array([np.flatnonzero(row == row.max())[0] for row in others])
    assert (place[:, 0] == first).all()  # of equal scores the first


def test_a_model_of_places_alone_repeats_the_other_row(base):
    """The first place best: the other row's AUC; in the reversed order one minus it. Ties of the
    other row are broken by place, so its scores are drawn without any."""
    others = np.random.default_rng(1).normal(size=base.others.shape)
    by_place = np.tile(-np.arange(4.0), (len(others), 1))
    found = []
    for order in (others, -others):
        _, place = by_score(base.examples, order)
        report = summarise(in_first_order(by_place, place), base.examples, 0)
        found.append(report["metrics"]["AUC"]["value"])
    expected = summarise(others, base.examples, 0)["metrics"]["AUC"]["value"]
    assert found == pytest.approx([expected, 1 - expected])
    assert expected != 0.5


def test_another_rows_scores_are_read_or_refused(base, tmp_path):
    ids = base.builder.catalog.ids
    found = stored_scores(base.folder, "random", base.examples, ids)
    assert found.tolist() == base.report["scores"]["base"]
    with pytest.raises(InputError, match="no scores of the hard candidates"):
        stored_scores(base.folder, "hard", base.examples, ids)
    with pytest.raises(InputError, match="6 users, expected 5; evaluate it on the same data"):
        stored_scores(base.folder, "random", base.examples[:5], ids)
    with pytest.raises(InputError, match="scores of {'user': .*, expected of {'user': "):
        stored_scores(base.folder, "random", base.examples[::-1], ids)
    with pytest.raises(InputError, match="metrics.json: no such file"):
        stored_scores(tmp_path, "random", base.examples, ids)
    (tmp_path / "metrics.json").write_text('{"sets": []}')
    with pytest.raises(InputError, match="no scores of the random candidates"):
        stored_scores(tmp_path, "random", base.examples, ids)


def test_the_binary_task_is_refused(data, checkpoints):
    _, builder, examples = toy.source_of(data, checkpoints, "binary")
    for scores in (
        lambda: recommend(builder, examples[:1], 1),
        lambda: rerank(builder, examples[:1], np.zeros((1, 4)), 1),
    ):
        with pytest.raises(InputError, match="--task binary: MSRBench ranks a list"):
            scores()
