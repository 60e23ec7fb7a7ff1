"""Training on what a retriever finds before the targets, and a policy's and its scores as one."""

import json
import math

import numpy as np
import pytest
import torch
import toy
from toy_vectors import ITEMS, walks, write_folder

import evaluate
import train_brmrs
import train_dpo
import train_sft
from hanorec.base.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.baselines import matrix_training, sequence_training
from hanorec.datasets import posterland
from hanorec.datasets.catalog import Catalog, data_hash, load_catalog
from hanorec.datasets.interactions import (
    Example,
    Interactions,
    load_interactions,
    training_examples,
    without_last,
)
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_examples, preferences
from hanorec.ranking.cut import check_cut, draw_retrieved, load_cut
from hanorec.ranking.fusion import fuse_scores
from hanorec.ranking.retriever import Retriever, load_retriever
from hanorec.ranking.retrieving import retriever_rows
from hanorec.ranking.sampler import Seen
from hanorec.recommend import Recommender
from hanorec.recommending.people import Person
from hanorec.run.inputs import check_evaluation, check_training
from hanorec.studies.reranking_places import shares, target_places

BPR = ["--layers", 0, "--dim", 8, "--batch", 32, "--learning-rate", 0.05, "--weight-decay", 0]
SASREC = ["--method", "sasrec", "--dim", 8, "--length", 6, "--epochs", 2]


def train(main, *argv):
    main([str(word) for word in argv])


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("ring") / "data")


@pytest.fixture(scope="module")
def cut(data, checkpoints, tmp_path_factory):
    """A BR-MRS of the small Posterland that has not learnt from each user's last two items."""
    out = tmp_path_factory.mktemp("cut") / "out"
    train(
        train_brmrs.main, "--data", data, "--model", checkpoints["qwen2_5_vl"], "--max-pixels",
        1024, "--device", "cpu", "--out", out, "--epochs", 2, "--dim", 8, "--batch", 64,
        "--hold-out", 2,
    )
    return out


@pytest.fixture(scope="module")
def sasrec(ring, tmp_path_factory):
    out = tmp_path_factory.mktemp("sasrec") / "out"
    train(sequence_training.main, "--data", ring, "--out", out, *SASREC, "--hold-out", 2)
    return out


# ---- RC-2 ----


def fused_by_hand(policy, retriever, w):
    """By loops over lists and candidates, each exponential as it is written."""
    rows = []
    for p, r in zip(policy, retriever, strict=True):
        of_p, of_r = sum(math.exp(x) for x in p), sum(math.exp(x) for x in r)
        row = []
        for a, b in zip(p, r, strict=True):
            row.append(math.log(math.exp(a) / of_p) + w * math.log(math.exp(b) / of_r))
        rows.append(row)
    return np.array(rows)


@pytest.mark.equation("RC-2")
@pytest.mark.parametrize("w", [0.0, 0.3, 5.0])
def test_fused_scores_match_the_oracle(w):
    rng = np.random.default_rng(0)
    policy, retriever = rng.normal(-9, 3, (7, 5)), rng.normal(2, 4, (7, 5))
    fused = fuse_scores(policy, retriever, w)
    assert fused.dtype == np.float64
    assert np.allclose(fused, fused_by_hand(policy, retriever, w), atol=1e-12)
    # negative control: the retriever's scores as they are would be another sum
    assert w == 0 or not np.allclose(fused, fused_by_hand(policy, 0.5 * retriever, w), atol=1e-3)


def test_the_ends_of_the_fusion():
    """w = 0: the policy's order; a large w: the retriever's, the policy among equals."""
    policy, retriever = [-1.0, -3, -2, -9], [0.0, 2, 2, 5]
    assert np.argsort(-fuse_scores(policy, retriever, 0)).tolist() == [0, 2, 1, 3]
    assert np.argsort(-fuse_scores(policy, retriever, 1e6)).tolist() == [3, 2, 1, 0]
    assert np.exp(fuse_scores(policy, retriever, 0)).sum() == pytest.approx(1)
    # where a score has its zero does not matter, and no exponential overflows
    moved = fuse_scores(np.array(policy) - 2000, np.array(retriever) + 2000, 0.5)
    assert np.allclose(moved, fuse_scores(policy, retriever, 0.5))


# ---- the cut ----


def test_what_is_held_out_are_the_training_targets():
    data = Interactions({"a": (1, 2, 3, 4), "b": (5,), "c": (6, 7)}, {"a": (8,)}, {"a": (9,)})
    cut = without_last(data, 2)
    assert cut.train == {"a": (1, 2), "b": (5,), "c": (6,)}
    assert cut.val == {"a": (3, 4), "c": (7,)} and cut.test == {}
    targets = [(e.user, e.target) for e in training_examples(data, 2)]
    assert targets == [("a", 3), ("a", 4), ("c", 7)]
    assert without_last(data, 0).train == data.train


def test_a_cut_sequence_model_reads_on_to_each_target(ring, sasrec):
    """A state for each target, made from what came before it; and the model has been trained on two
    items a user fewer, so its weights are not those of a whole line."""
    catalog = load_catalog(ring)
    data = load_interactions(ring, catalog)
    stored = load_cut(sasrec, 2)
    examples = training_examples(data, 2, 6)
    rows = retriever_rows(stored, catalog, examples)
    source = Recommender(None, str(ring), None, str(sasrec)).source
    people = [Person(e.user, e.history, True) for e in examples]
    assert torch.allclose(source.states(people), stored.user[rows], atol=1e-5)
    run = json.loads((sasrec / "run.json").read_text())
    assert run["pairs"] == sum(len(w["train"]) - 3 for w in walks().values())
    names = json.loads((sasrec / "test" / "names.json").read_text())
    assert names["hold_out"] == 2


def test_a_cut_brmrs_has_not_learnt_from_the_targets(data, cut):
    catalog = load_catalog(data)
    interactions, stored = load_interactions(data, catalog), load_cut(cut, 2)
    for row, user in enumerate(stored.users):
        _, learnt = stored.seen.of(torch.tensor([row]))
        assert learnt.tolist() == list(interactions.train[user][:-2])


def test_of_targets_alike_the_last_is_the_last(tmp_path):
    """User a has item 1 twice among the states; the example of the last position alone is given."""
    catalog = Catalog(tmp_path, "x", ("p", "q"), ("P", "Q"), (None, None), "none")
    for name in ("train.tsv", "val.tsv", "test.tsv"):
        (tmp_path / name).write_text("a\tq p q\n")
    states = torch.tensor([[1.0], [2.0], [3.0]])
    found = Retriever(
        ("a", "a", "a"), catalog.ids, states, torch.ones(2, 1),
        Seen(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), 3),
        ("q", "p", "q"), data_hash(catalog),
    )
    last = Example("a", (0,), 1, (1, 0, 1))
    assert retriever_rows(found, catalog, [last]).tolist() == [2]
    three = [last, Example("a", (1,), 0, (1, 0, 1)), last]
    assert retriever_rows(found, catalog, three).tolist() == [0, 1, 2]


# ---- the lists ----


def shop(tmp_path):
    """Eight items; user a likes item i as much as 20 - i. Items 2 and 3 have one title."""
    titles = ("A", "B", "C", "C", "E", "F", "G", "H")
    catalog = Catalog(tmp_path, "shop", tuple("abcdefgh"), titles, (None,) * 8, "none")
    likes = torch.tensor([[20.0 - i] for i in range(8)])
    none = torch.zeros(0, dtype=torch.long)
    return catalog, Retriever(("a",), catalog.ids, torch.ones(1, 1), likes, Seen(none, none, 1))


def test_the_best_others_and_the_target(tmp_path, capsys):
    """Items 0 and 6 the user has had, item 5 nobody has in training. The three best that are left
    are 1, 2, 3. To target 2 item 3, of its title, gives way to item 4; targets 4 and 7 are missed.
    """
    catalog, retriever = shop(tmp_path)
    examples = [Example("a", (0,), target, (0, target, 6)) for target in (1, 2, 4, 7)]
    trained = {0, 1, 2, 3, 4, 6, 7}
    drawn = draw_retrieved(examples, retriever, catalog, trained, 2, seed=0)
    assert [example.target for example in drawn] == [1, 2]
    assert [set(example.candidates) for example in drawn] == [{1, 2, 4}, {1, 2, 4}]
    assert "2 of 4 targets are among the retriever's 3 best; the others" in capsys.readouterr().out
    orders = set()
    for seed in range(9):
        first = draw_retrieved(examples, retriever, catalog, trained, 2, seed)[0]
        orders.add(first.candidates)
    assert len(orders) > 2  # the prompt does not tell the retriever's order
    with pytest.raises(InputError, match="none of the 1 targets is among its 3 best"):
        draw_retrieved(examples[3:], retriever, catalog, trained, 2, seed=0)


def test_too_few_items_are_refused(tmp_path):
    catalog, retriever = shop(tmp_path)
    example = Example("a", (0,), 7, (0, 7))
    with pytest.raises(InputError, match="user 'a': 2 unseen items .* 3 negatives wanted"):
        draw_retrieved([example], retriever, catalog, {0, 1, 2, 3, 7}, 3, seed=0)


def test_both_stages_train_on_the_lists(data, checkpoints, cut, tmp_path):
    """Every row's candidates are the target and the best others by the cut retriever; a rejected
    item is one of them; and both scripts train on them."""
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu", max_pixels=1024)
    lists = TrainConfig(out="", targets_per_user=1, draw="retrieved", retriever=str(cut))
    builder, examples = load_examples(
        backbone, DataConfig(data=str(data), history=2, candidates=40), lists
    )
    stored, catalog = load_retriever(cut, "train"), builder.catalog
    interactions = load_interactions(data, catalog)
    trained = set().union(*interactions.train.values())
    kept = []
    for example in training_examples(interactions, 1, 2):
        s = stored.item @ stored.user[stored.users.index(example.user)]
        new = [i for i in s.argsort(descending=True).tolist()
               if i in trained and (i == example.target or i not in example.seen)]
        if example.target in new[:40]:
            kept.append((example.user, set(new[:40])))
    assert dict(kept) == {example.user: set(example.candidates) for example in examples}
    assert 3 < len(kept) < 24
    for example, pair in zip(examples, preferences(builder, examples, 0), strict=True):
        assert pair.rejected[0] in set(example.candidates) - {pair.chosen}
    flags = [
        "--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *toy.STEPS,
        "--draw", "retrieved", "--retriever", cut, "--candidates", 40,
        "--candidate-images", "off",
    ]
    train(train_sft.main, *flags, "--out", tmp_path / "sft")
    train(train_dpo.main, *flags, "--sft", tmp_path / "sft", "--out", tmp_path / "dpo")
    for stage in ("sft", "dpo"):
        inputs = json.loads((tmp_path / stage / "run.json").read_text())["inputs"]
        assert len(inputs["retriever"]) == 64


# ---- what it must not know ----


def test_a_cut_retriever_places_training_targets_like_held_out_ones(tmp_path):
    """Users whose items follow from nothing: of 33 new items about a third of what is held out is
    among the first ten. BPR-MF learns its pairs by heart, so one that has learnt from the targets
    has them all there, while to the cut one they are like held-out items.
    """
    rng, users = np.random.default_rng(0), {}
    for user in range(40):
        own = rng.permutation(ITEMS)[:9].tolist()
        users[f"u{user}"] = {"train": own[:7], "val": own[7:8], "test": own[8:]}
    write_folder(tmp_path / "data", users)
    for name, n in (("cut", 1), ("full", 0)):
        out = tmp_path / name
        train(
            matrix_training.main, "--data", tmp_path / "data", "--out", out, *BPR, "--hold-out", n,
            "--epochs", 60, "--every", 60,
        )
    places = target_places(tmp_path, str(tmp_path / "data"), 1)
    found = {case: shares(own, [10])["first 10"] for case, own in places.items()}
    assert {case: len(own) for case, own in places.items()} == dict.fromkeys(found, 40)
    assert found["full, training"] > 0.9
    assert found["cut, training"] < 0.6 and found["full, validation"] < 0.6


def test_places_by_hand(data, cut, tmp_path):
    """A sequence-free check of one target: among the trained items new to its user, by loops."""
    (tmp_path / "cut").symlink_to(cut)
    (tmp_path / "full").symlink_to(cut)
    catalog = load_catalog(data)
    interactions, stored = load_interactions(data, catalog), load_retriever(cut, "train")
    trained = set().union(*interactions.train.values())
    found = target_places(tmp_path, str(data), 1)["cut, training"]
    for user, place in zip(stored.users, found, strict=True):
        s = (stored.item @ stored.user[stored.users.index(user)]).tolist()
        target = interactions.train[user][-1]
        above = [i for i in trained - set(interactions.train[user]) if s[i] >= s[target]]
        assert place == 1 + len(above)


def test_a_retriever_that_knows_the_targets_is_refused(ring, cut, sasrec, tmp_path):
    with pytest.raises(InputError, match="last 2 training items, expected at least 3.*hold-out 3"):
        check_cut(sasrec, 3)
    with pytest.raises(InputError, match="expected at least 3, which are the targets of --targets"):
        check_cut(cut, 3)
    check_cut(cut, 2)
    check_cut(sasrec, 1)
    whole = tmp_path / "whole"
    train(sequence_training.main, "--data", ring, "--out", whole, *SASREC)
    for folder in (whole, whole / "test", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="neither a finished .* with --hold-out 1, or check"):
            check_cut(folder, 1)


def test_settings_that_do_not_go_together(cut, tmp_path):
    with pytest.raises(InputError, match="--draw retrieved with --retriever None"):
        TrainConfig(out="", draw="retrieved")
    with pytest.raises(InputError, match="--draw random with --retriever x"):
        TrainConfig(out="", retriever="x")
    with pytest.raises(InputError, match="--targets-per-user 0 with --draw retrieved"):
        TrainConfig(out="", draw="retrieved", retriever="x", targets_per_user=0)
    lists = TrainConfig(out="", targets_per_user=2, draw="retrieved", retriever=str(cut))
    with pytest.raises(InputError, match="--draw retrieved with --targets 3"):
        check_training([ModelConfig(""), DataConfig("", targets=3), lists])
    with pytest.raises(InputError, match="--fuse 1.0: expected --retriever"):
        check_evaluation(DataConfig(""), EvalConfig("", fuse=1.0))
    with pytest.raises(InputError, match="--fuse -1"):
        EvalConfig("", fuse=-1.0)
    with pytest.raises(InputError, match="--fuse 1.0: expected --model and --retriever"):
        Recommender(None, "x", None, "y", fuse=1.0)
    with pytest.raises(InputError, match="--hold-out -1"):
        train(train_brmrs.main, "--data", tmp_path, "--out", tmp_path / "o", "--hold-out", -1)
    (tmp_path / "x.inter").write_text("userID\titemID\tx_label\n0\t0\t0\n")
    with pytest.raises(InputError, match="--hold-out 1: .* has no train.tsv"):
        train(train_brmrs.main, "--data", tmp_path, "--out", tmp_path / "o", "--hold-out", 1)


# ---- fused orders ----


def test_the_commands_add_the_scores(data, checkpoints, sft, cut, tmp_path):
    """evaluate.py and Recommender: w = 0 changes nothing; a large w gives the retriever's order."""
    reports = {}
    for name, flags in (("none", []), ("0", ["--fuse", 0]), ("much", ["--fuse", 1e9])):
        train(
            evaluate.main, "--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT,
            "--out", tmp_path / name, "--adapter", sft, "--retriever", cut, "--top-n", 30, *flags,
        )
        reports[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    ranks = {name: r["orders"][str(sft)]["ranks"] for name, r in reports.items()}
    assert ranks["none"] == ranks["0"]
    assert ranks["much"] == reports["none"]["orders"]["retriever"]["ranks"] != ranks["none"]
    scores = reports["much"]["scores"]
    assert scores == reports["none"]["scores"]  # as they are, whatever the order is by
    assert all(row == sorted(row, reverse=True) for row in scores["retriever"])

    folders = [str(checkpoints["qwen2_5_vl"]), str(data), str(sft), str(cut)]
    lists = {}
    for w in (None, 0.0, 1e9):
        made = Recommender(*folders, top_n=5, device="cpu", fuse=w)
        lists[w] = [(line.item, line.retriever_rank) for line in made.for_user("3", 5)]
    assert lists[None] == lists[0.0] != lists[1e9]
    assert [rank for _, rank in lists[1e9]] == [1, 2, 3, 4, 5]


# ---- films without users ----


def test_a_third_of_the_films_come_out_late(tmp_path):
    for name, cold in (("old", 0.0), ("new", 1 / 3)):
        posterland.make_posterland(tmp_path / name, users=60, seed=4, cold=cold)
    truth = json.loads((tmp_path / "new" / "truth.json").read_text())
    catalog = load_catalog(tmp_path / "new")
    data = load_interactions(tmp_path / "new", catalog)
    late = {catalog.row[item] for item in truth["cold"]}
    cells = [(truth["items"][row]["genre"], truth["items"][row]["style"]) for row in late]
    assert len(late) == 98 and len(set(cells)) == 49  # two of each cell's six
    assert not late & set().union(*data.train.values())
    held = [*data.val.values(), *data.test.values()]
    assert 0.4 < np.mean([rows[0] in late for rows in held]) < 0.9
    assert all(path is not None for path in catalog.images)
    old = json.loads((tmp_path / "old" / "truth.json").read_text())
    assert old["cold"] == [] and old["items"] == truth["items"]


def test_a_share_that_leaves_no_film_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["posterland", str(tmp_path / "x"), "--cold", "0.9"])
    with pytest.raises(InputError, match="--cold 0.9: expected 0 .. 0.5"):
        posterland.main()
