"""Lists of several targets (--targets), and what a policy writes, held against titles (--answers).
"""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy

import evaluate
import train_dpo
import train_sft
from hanorec.base.config import DataConfig
from hanorec.base.errors import InputError
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.interactions import load_interactions
from hanorec.datasets.lists import list_examples, whole_sequences
from hanorec.mllm import written
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.generation import generate, likeliest, nucleus
from hanorec.mllm.tasks import preferences, sft_rows
from hanorec.mllm.written import chance_of, judge_lists, judge_verdicts, longest_answer
from hanorec.readings import GAPS

LISTS = ["--targets", 3, "--candidates", 7]


@pytest.fixture(scope="module")
def lists(data, checkpoints):
    """(builder, examples) of training rows with three targets and four negatives."""
    _, builder, _ = toy.source_of(data, checkpoints)
    builder = replace(
        builder, config=DataConfig(data=str(data), history=3, targets=3, candidates=7)
    )
    train = load_interactions(data, builder.catalog).train
    examples = list_examples(train, 3, 3, 3)
    return builder, draw_candidates(examples, builder.catalog, 4, 2025)


# ---- which items ----


def test_the_last_items_newest_first():
    """By hand; two rows where six items are targets, all but the first where 0 is given."""
    rows = tuple(range(10, 18))
    (one,) = list_examples({"u": rows}, 3, 2, 3)
    assert (one.targets, one.history, one.seen) == ((17, 16, 15), (13, 14), rows)
    for per_user in (6, 0):
        first, last = list_examples({"u": rows}, 3, 2, per_user)
        assert last == one and (first.targets, first.history) == ((14, 13, 12), (10, 11))
    (single,) = list_examples({"u": rows}, 1, 2, 1)
    assert single.targets == (17,) and single.also == ()


def test_who_gives_no_list():
    """Three items have none before them; a list with an item twice is no list of three titles."""
    assert list_examples({"a": (1, 2, 3), "b": (1, 5, 4, 5)}, 3, 2, 3) == []
    assert len(list_examples({"a": (1, 2, 3, 4)}, 3, 2, 3)) == 1
    with pytest.raises(InputError, match="--targets-per-user 4 with --targets 3: expected a mult"):
        list_examples({"a": (1, 2, 3, 4)}, 3, 2, 4)


def test_lists_of_a_split_reach_back(data, catalog):
    """Held-out items last, what came before them first. Control: of val, test is not seen."""
    interactions = load_interactions(data, catalog)
    users = list(interactions.test)[:3]
    found = whole_sequences(interactions, "test", users)
    for user in users:
        train, val, test = (getattr(interactions, s)[user] for s in ("train", "val", "test"))
        assert found[user] == train + val + test
    (val_only,) = whole_sequences(interactions, "val", users[:1]).values()
    assert val_only == found[users[0]][: len(val_only)] != found[users[0]]


def test_candidates_of_a_list(lists):
    """All three targets and four others that the user has not had, every title once."""
    builder, examples = lists
    assert len(examples) > 10
    for example in examples:
        negatives = set(example.candidates) - set(example.targets)
        assert len(example.candidates) == 7 and len(negatives) == 4
        assert set(example.targets) <= set(example.candidates)
        assert not negatives & set(example.seen)
    titles = list(builder.catalog.titles)
    negative = next(row for row in examples[0].candidates if row not in examples[0].targets)
    titles[negative] = titles[examples[0].also[0]]
    twins = replace(builder.catalog, titles=tuple(titles))
    (again,) = draw_candidates(examples[:1], twins, 4, 2025)
    assert negative not in again.candidates


# ---- rows of training ----


def test_the_rows_of_lists(lists):
    """One answer of three titles, a line each, newest first; a rejected one of three negatives."""
    builder, examples = lists
    backbone, titles = builder.backbone, builder.catalog.titles

    def text(tokens):
        return backbone.tokenizer.decode(tokens[:-1])

    (row,) = sft_rows(builder, examples[:1], 2025)
    assert text(row.answers[0]) == "\n".join(titles[i] for i in examples[0].targets)
    assert "titles of the next 3 alone" in backbone.tokenizer.decode(row.prompt)
    (pair,) = preferences(builder, examples[:1], 2025)
    chosen, rejected = pair.items
    assert tuple(chosen) == examples[0].targets and len(set(rejected)) == 3
    assert set(rejected) <= set(examples[0].candidates) - set(examples[0].targets)
    assert [text(answer) for answer in pair.row.answers] == [
        "\n".join(titles[i] for i in items) for items in pair.items
    ]
    with pytest.raises(InputError, match="4 negatives among the candidates, expected at least 6"):
        preferences(builder, examples[:1], 2025, 2)


@pytest.mark.equation("HN-4")
def test_delta_of_a_list_is_the_mean_place_by_place(launch, lists, sft):
    """In pairs.tsv, against each place's own gap. Control: another pairing of the places."""
    few = [*toy.STEPS, "--targets-per-user", 3, "--history", 3, *LISTS]
    out, log, facts = launch(train_dpo.main, *few, "--sft", sft)
    lines = [line.split("\t") for line in (out / "pairs.tsv").read_text().splitlines()[1:]]
    builder, _ = lists
    e, scores, index = builder.neighbors(10)
    wrong = 0
    for _, chosen, rejected, _, delta, lam in lines:
        w, l = ([builder.catalog.row[i] for i in ids.split(" ")] for ids in (chosen, rejected))
        gaps = GAPS["union"](e, scores, index, torch.tensor(w), torch.tensor(l))
        assert len(w) == 3 and float(delta) == pytest.approx(gaps.mean().item(), abs=2e-6)
        assert float(lam) == pytest.approx(1 / (1 + np.exp(-float(delta))), abs=2e-6)
        other = GAPS["union"](e, scores, index, torch.tensor(w), torch.tensor(l[1:] + l[:1]))
        wrong += abs(float(delta) - other.mean().item()) > 1e-5
    assert facts["pairs"] == len(lines) > 10 and wrong > 5 and len(log) > 0


# ---- judging texts ----


def test_a_text_is_judged_by_its_lines(lists):
    """By hand: the last item first, second, third, fourth, or not there. Lines are stripped, no
    more: a title in other letters is none.
    """
    builder, examples = lists
    titles = builder.catalog.titles
    a, b, c = (titles[row] for row in examples[0].targets)
    d = next(titles[row] for row in examples[0].candidates if row not in examples[0].targets)
    texts = {
        f"{a}\n{b}\n{c}": (1, 0), f"{b}\n  {a} \n{c}": (2, 0), f"{b}\n{d}\n{a}": (3, 0),
        f"{b}\n{c}\n{d}\n{a}": (0, 1), f"{b}\n{c}\n{d}": (0, 0), f"{a}": (1, 1),
        f"{a.upper()}\n{b}\n{c}": (0, 1), f"{a}\n{b}\n{b}": (1, 1), "": (0, 1),
    }
    gain = {0: 0, 1: 1, 2: 1 / np.log2(3), 3: 0.5}
    for text, (place, failed) in texts.items():
        rows, failures = judge_lists(builder, examples[:1], [text])
        assert rows["HR@3"].tolist() == [float(place > 0)], text
        assert rows["NDCG@3"] == pytest.approx([gain[place]]) and failures == failed, text
    quoted = replace(builder, config=replace(builder.config, quotes="chosen"))
    for source, hit in ((quoted, 1), (builder, 0)):
        rows, _ = judge_lists(source, examples[:1], [f'"{a}\n{b}\n{c}"'])
        assert rows["HR@3"][0] == hit


def test_hard_labels_give_balanced_accuracy(lists):
    """Two users of one positive and two negatives: (1 + 1/2) / 2 and (0 + 1) / 2. A text that is
    neither Yes nor No is wrong of both kinds.
    """
    builder, examples = lists
    users = []
    for example in examples[:2]:
        others = [row for row in example.candidates if row not in example.targets][:2]
        users.append(replace(example, also=(), candidates=(others[0], example.target, others[1])))
    texts = ["Yes", "Yes", "No", "No", "no", "No"]
    rows, failures = judge_verdicts(builder, users, texts)
    assert rows["AUC of labels"].tolist() == [0.75, 0.5] and failures == 1
    rows, failures = judge_verdicts(builder, users, ["Yes"] * 6)
    assert rows["AUC of labels"].tolist() == [0.5, 0.5] and failures == 0


@pytest.mark.parametrize(("negatives", "hr", "ndcg"), [(4, 42.9, 30.4), (7, 30.0, 21.3)])
def test_chance_of_the_last_item(lists, negatives, hr, ndcg):
    """As the release's protocol has it, and as 20,000 random answers find it."""
    builder, examples = lists
    (example,) = draw_candidates([replace(examples[0], candidates=())], builder.catalog, negatives)
    found = chance_of(builder, [example])
    percent = [round(100 * value, 1) for value in found.values()]
    assert percent == [hr, ndcg] and list(found) == ["HR@3", "NDCG@3"]
    rng, texts = np.random.default_rng(0), []
    for _ in range(20_000):
        answer = rng.choice(example.candidates, 3, replace=False)
        texts.append("\n".join(builder.catalog.titles[row] for row in answer))
    rows, failures = judge_lists(builder, [example] * len(texts), texts)
    assert failures == 0
    for name, value in found.items():
        assert rows[name].mean() == pytest.approx(value, abs=0.015)


# ---- sampling ----


def test_the_nucleus_of_a_distribution():
    """Probabilities 0.5, 0.3, 0.15, 0.05 and top-p 0.7: the first two, in a ratio of 5 to 3, since
    the second takes the sum over 0.7. At temperature 2 the third joins. Greedy at a small top-p.
    """
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    n = 3000
    choose = nucleus(1, temperature=1.0)
    found = Counter(choose(0, logits) for _ in range(n))
    assert set(found) == {1, 3} and found[1] / n == pytest.approx(0.625, abs=0.04)
    warm = nucleus(1, temperature=2.0)
    assert {warm(0, logits) for _ in range(200)} == {0, 1, 3}
    cold = nucleus(1, top_p=0.1)
    assert {cold(0, logits) for _ in range(50)} == {likeliest(0, logits)} == {1}


def test_sampled_texts_depend_on_the_seed_and_not_on_the_batch(lists):
    builder, examples = lists
    rows = [longest_answer(builder, example) for example in examples[:5]]
    builder.backbone.model.eval()

    def texts(seed, batch):
        choose = nucleus(seed, temperature=3.0, top_p=0.99)
        return generate(builder.backbone, rows, builder.pictures, 4, batch, choose)

    assert texts(1, 1) == texts(1, 3) != texts(2, 3)


# ---- the command ----


def test_evaluation_of_lists(lists, data, checkpoints, launch, tmp_path, capsys, monkeypatch):
    """A policy that has seen lists writes three lines; one that writes the truth has 100, one that
    writes it the other way round half of NDCG@3; the bare model writes none.
    """
    shop = tmp_path / "data"
    shutil.copytree(data, shop)
    few = ["--model", checkpoints["qwen2_5_vl"], "--data", shop, *toy.SHORT, *LISTS]
    adapter, log, _ = launch(train_sft.main, *toy.STEPS, "--targets-per-user", 3, *LISTS)
    assert len(log) > 0

    def judge(name, *flags):
        evaluate.main([str(word) for word in [*few, "--out", tmp_path / name, *flags]])
        return json.loads((tmp_path / name / "metrics.json").read_text())

    policies = ["--adapter", adapter, "--adapter", "base"]
    report = judge("greedy", *policies, "--answers", "greedy")
    said = capsys.readouterr().out
    (found,) = report["written"].values()
    assert "last 3 candidates, as written" in said and "sets" not in report
    assert found["policies"]["base"]["failures"] == len(found["users"]) > 10
    assert len(found["users"][0]["targets"]) == 3 and len(found["users"][0]["candidates"]) == 7
    assert not list(shop.glob("candidates_*"))

    catalog, users = lists[0].catalog, found["users"]

    def perfect(order):
        texts = []
        for user in users:
            targets = [catalog.titles[catalog.row[item]] for item in user["targets"]]
            texts.append("\n".join(targets[::order]))
        return lambda *rest: texts

    for order, ndcg in ((1, 1.0), (-1, 0.5)):
        monkeypatch.setattr(written, "generate", perfect(order))
        (found,) = judge(f"truth{order}", "--answers", "sampled")["written"].values()
        base = found["policies"]["base"]
        assert base["failures"] == 0
        assert [m["value"] for m in base["metrics"].values()] == pytest.approx([1.0, ndcg])


def test_written_beside_scores(data, checkpoints, tmp_path, capsys):
    """One target, Yes and No: both columns; greedy Yes is where Yes has the larger score."""
    shop = tmp_path / "data"
    shutil.copytree(data, shop)
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", shop, *toy.SHORT, "--task", "binary"]
    argv += ["--sets", "random", "--users-to", 0.3, "--answers", "greedy", "--out", tmp_path / "o"]
    evaluate.main([str(word) for word in argv])
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    scored, found = report["sets"]["random"], report["written"]["random"]
    scores = np.array(scored["scores"]["base"]).flatten()
    texts = found["policies"]["base"]["texts"]
    assert len(texts) == len(scores)
    for text, score in zip(texts, scores, strict=True):
        assert text not in ("Yes", "No") or (text == "Yes") == (score > 0)
    assert "AUC of labels" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "said"), [
    (LISTS, "--targets 3: expected --answers greedy"),
    ([*LISTS, "--answers", "greedy", "--sets", "hard"], "no --sets, --retriever"),
    ([*LISTS, "--answers", "greedy", "--user", "1"], "--user"),
    (["--answers", "greedy", "--user", "1"], "--answers greedy with --retriever or --user"),
    (["--targets", 3, "--task", "binary", "--candidates", 7], "--targets 3 with --task binary"),
    (["--targets", 3, "--candidates", 3], "--candidates 3: expected at least 4"),
    (["--targets", 60, "--candidates", 70, "--answers", "greedy"], "nobody has 60 different"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_settings_that_do_not_go_together(data, checkpoints, tmp_path, flags, said):
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, "--out", tmp_path / "out"]
    with pytest.raises(InputError, match=said):
        evaluate.main([str(word) for word in [*argv, *toy.SHORT, *flags]])


def test_a_builder_of_single_targets_is_as_it_was(data, checkpoints):
    """Control of the prompt: with one target it asks for one title, and nothing else changed."""
    _, builder, examples = toy.source_of(data, checkpoints)
    assert isinstance(builder, PromptBuilder)
    row = builder.ranking_row(examples[0], [examples[0].target])
    text = builder.backbone.tokenizer.decode(row.prompt)
    assert "Answer with the title alone." in text and "titles of the next" not in text
