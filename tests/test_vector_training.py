"""Matrix and sequence models from end to end: they learn, go on after a kill, hand their states to
the retriever, and refuse what they cannot do.
"""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import toy
from safetensors.torch import load_file
from toy_vectors import ITEMS, USERS, walk, walks, write_folder

import evaluate
from hanorec.base.command import run
from hanorec.base.config import DataConfig, EvalConfig
from hanorec.base.errors import InputError
from hanorec.baselines import matrix_training, sequence_training, vector_run
from hanorec.baselines.config import MatrixConfig, SequenceConfig
from hanorec.baselines.vectors import load_targets, padded
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import heldout_examples, load_interactions
from hanorec.ranking.candidate_sets import frozen_sets, held_out
from hanorec.ranking.retriever import load_retriever
from hanorec.ranking.retrieving import candidate_scores, retrieve
from hanorec.run import epochs

CPU = torch.device("cpu")
MATRIX = ["--dim", 8, "--batch", 32, "--learning-rate", 0.02, "--weight-decay", 0]
SEQUENCE = ["--dim", 8, "--length", 6, "--batch", 9, "--learning-rate", 0.01, "--dropout", 0.1]
METHODS = ["sasrec", "gru4rec", "caser", "bert4rec", "cl4srec"]


def train(data, out, method, *flags):
    """method: of `--method`, or "lightgcn" or "bpr"."""
    main, own = sequence_training.main, [*SEQUENCE, "--method", method]
    if method not in METHODS:
        main, own = matrix_training.main, [*MATRIX, "--layers", 2 if method == "lightgcn" else 0]
    argv = ["--data", data, "--out", out, "--device", "cpu", *own, *flags]
    main([str(word) for word in argv])
    return out


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def whole(out):
    """File -> bytes of a finished run, but for the record, which has the folder's name."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("ring") / "data")


@pytest.fixture(scope="module")
def finished(ring, tmp_path_factory):
    """Method -> OUT of a finished run of a few epochs, made when first asked for."""
    found = {}

    def run_of(method):
        if method not in found:
            out = tmp_path_factory.mktemp(method) / "out"
            found[method] = train(ring, out, method, "--epochs", 3)
        return found[method]

    return run_of


# ---- what they do ----


@pytest.mark.parametrize("method", ["sasrec", "gru4rec"])
def test_a_sequence_model_learns_the_ring(ring, tmp_path, method):
    """The item that follows is found at once. Control: trained on walks whose items were exchanged
    at random, the model knows nothing of it: among 31 items the mean NDCG@10 of chance is 0.15.
    """
    flags = ["--epochs", 60, "--every", 60, "--learning-rate", 0.03]
    out = train(ring, tmp_path / "out", method, *flags)
    assert metrics(out)["test"]["NDCG@10"] > 0.9
    rng, users = np.random.default_rng(0), walks()
    for splits in users.values():
        new = [item for item in range(ITEMS) if item not in splits["val"] + splits["test"]]
        splits["train"] = rng.permutation(new)[:7].tolist()
    lost = train(write_folder(tmp_path / "lost", users), tmp_path / "none", method, *flags)
    assert metrics(lost)["test"]["NDCG@10"] < 0.4


@pytest.mark.parametrize("method", ["bpr", "lightgcn"])
def test_a_matrix_model_learns_tastes(tmp_path, method):
    """Two kinds of users, each with seven of the ten items of its own kind: it is never tempted by
    the other kind's, so the target is among the first three. Chance: 3 of 13.
    """
    rng, users = np.random.default_rng(0), {}
    for user in range(24):
        items = (2 * rng.permutation(10)[:9] + user % 2).tolist()
        users[f"u{user}"] = {"train": items[:7], "val": items[7:8], "test": items[8:]}
    data = write_folder(tmp_path / "data", users, items=20)
    out = train(data, tmp_path / "out", method, "--epochs", 40, "--every", 40)
    first_three = 1 / math.log2(4)
    assert np.mean(np.array(metrics(out)["rows"]["NDCG@10"]) >= first_three - 1e-9) > 0.9
    one = train(data, tmp_path / "one", method, "--epochs", 1, "--learning-rate", 1e-6)
    assert np.mean(np.array(metrics(one)["rows"]["NDCG@10"]) >= first_three - 1e-9) < 0.6


@pytest.mark.parametrize("method", ["lightgcn", *METHODS])
def test_what_a_finished_run_holds(ring, finished, method):
    out = finished(method)
    states = [f"{split}/{name}" for split in ("test", "val") for name in
              ("embeddings.safetensors", "names.json")]
    assert sorted(whole(out)) == sorted(
        ["log.jsonl", "metrics.json", "model.json", "model.safetensors", *states]
    )
    log, report = log_of(out), metrics(out)
    assert [record["epoch"] for record in log] == [1, 2, 3]
    best = report["best_epoch"]
    found = [record["valid_NDCG@10"] for record in log]
    assert found[best - 1] == max(found) and report["valid"]["NDCG@10"] == pytest.approx(
        found[best - 1], abs=1e-6
    )
    facts = json.loads((out / "run.json").read_text())
    assert (facts["users"], facts["items"]) == (USERS, ITEMS)
    first = 0 if method == "lightgcn" else 1  # has no item before it
    assert facts["pairs"] == sum(len(splits["train"]) - first for splits in walks().values())
    assert facts["inputs"].keys() == {"data"}
    assert facts["untrained_targets"] == {"val": 0, "test": 0}


@pytest.mark.parametrize("method", ["lightgcn", "sasrec"])
def test_the_metrics_are_those_of_the_saved_states(finished, method):
    """Ranks by a loop in float64: what the user had before a target is left out, and nothing else.
    """
    out = finished(method)
    saved, report = load_file(out / "test" / "embeddings.safetensors"), metrics(out)
    number, found = 0, []
    for user in range(USERS):
        for place in (8, 9):
            new = [item for item in range(ITEMS) if item not in walk(user)[:place]]
            state = saved["user"][number].double()
            scores = [(state @ saved["item"][item].double()).item() for item in new]
            found.append(oracle.rank_of_positive(scores, new.index(walk(user)[place])))
            number += 1
    assert report["users"] == [f"u{n // 2}" for n in range(2 * USERS)]
    for k in (10, 20):
        assert report["rows"][f"Recall@{k}"] == [float(rank <= k) for rank in found]
        gains = [1 / math.log2(1 + rank) if rank <= k else 0 for rank in found]
        assert report["rows"][f"NDCG@{k}"] == pytest.approx(gains)
        assert report["test"][f"NDCG@{k}"] == pytest.approx(np.mean(gains))


@pytest.mark.parametrize("method", METHODS)
def test_a_state_is_that_of_the_items_before(ring, finished, method):
    """For test it has read train, val and the test items before the target; for val, train alone.
    Each is computed by itself here.
    """
    out = finished(method)
    config = json.loads((out / "model.json").read_text())["config"]
    model = sequence_training.new_model(SequenceConfig(**config), USERS, ITEMS)
    model.load_state_dict(load_file(out / "model.safetensors"))
    for split, places in (("val", [7]), ("test", [8, 9])):
        saved = load_file(out / split / "embeddings.safetensors")["user"]
        number = 0
        for user in range(USERS):
            for place in places:
                history = torch.tensor([walk(user)[:place][-config["length"] :]])
                with torch.no_grad():
                    expected = model.state(torch.tensor([user]), history)[0]
                assert torch.allclose(saved[number], expected, atol=1e-5)
                number += 1
        assert number == len(saved)
    assert not torch.allclose(saved[0], saved[1], atol=1e-3)


def test_fewer_items_may_make_a_state(ring, tmp_path):
    out = train(ring, tmp_path / "out", "sasrec", "--epochs", 1, "--history", 2)
    model = sequence_training.new_model(
        SequenceConfig(length=6, dim=8, dropout=0.1), USERS, ITEMS
    )
    model.load_state_dict(load_file(out / "model.safetensors"))
    saved = load_file(out / "test" / "embeddings.safetensors")["user"]
    with torch.no_grad():
        expected = model.state(torch.tensor([3]), torch.tensor([walk(3)[6:8]]))
    assert torch.allclose(saved[6], expected[0], atol=1e-5)


def test_best_epoch_patience_and_how_often(ring, tmp_path, monkeypatch):
    """Validated after every 2nd epoch and after the last. Scripted: the 2nd validation is the best,
    by 1e-9; two more bring nothing better.
    """
    script = iter([0.5, 0.5 + 1e-9, 0.5, 0.5 + 1e-9, 0.1, 0.1])
    compute = vector_run.evaluate

    def scripted(*args):
        report, numbers, rows = compute(*args)
        return report | {"NDCG@10": next(script)}, numbers, rows

    monkeypatch.setattr(vector_run, "evaluate", scripted)
    out = train(ring, tmp_path / "out", "bpr", "--every", 2, "--patience", 2, "--epochs", 99)
    assert (metrics(out)["best_epoch"], metrics(out)["epochs"]) == (4, 8)
    assert ["valid_NDCG@10" in record for record in log_of(out)] == 4 * [False, True]
    script = iter([0.1, 0.2, 0.1, 0.1])
    last = train(ring, tmp_path / "last", "bpr", "--every", 2, "--epochs", 3)
    assert metrics(last)["best_epoch"] == 3


def test_the_test_split_is_looked_at_once(ring, tmp_path, monkeypatch):
    asked, compute = [], vector_run.evaluate

    def watched(vectors, targets):
        asked.append(targets.split)
        return compute(vectors, targets)

    monkeypatch.setattr(vector_run, "evaluate", watched)
    train(ring, tmp_path / "out", "bpr", "--epochs", 3)
    assert asked == ["val", "val", "val", "val", "test"]


# ---- the same run again ----


class Killed(Exception):
    """As a signal would, at a chosen place."""


def killed(data, out, method, place, monkeypatch):
    """A run of 3 epochs that ends there: ("after", checkpoint), ("before", checkpoint), ("step",
    number) or ("result", 0).
    """
    calls = {"save": 0, "step": 0}
    save, step, write = epochs.save_checkpoint, epochs.Epochs.update, vector_run.write_model

    def saving(*args, **facts):
        calls["save"] += 1
        if place == ("before", calls["save"]):
            raise Killed
        save(*args, **facts)
        if place == ("after", calls["save"]):
            raise Killed

    def stepping(*args, **means):
        calls["step"] += 1
        if place == ("step", calls["step"]):
            raise Killed
        step(*args, **means)

    def writing(*args):
        if place == ("result", 0):
            raise Killed
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", saving)
        patch.setattr(epochs.Epochs, "update", stepping)
        patch.setattr(vector_run, "write_model", writing)
        with pytest.raises(Killed):
            train(data, out, method, "--epochs", 3)
    assert not (out / "metrics.json").exists()


@pytest.mark.parametrize(
    ("method", "place"),
    [("lightgcn", ("before", 2)), ("lightgcn", ("result", 0)), ("sasrec", ("after", 2)),
     ("sasrec", ("step", 4)), ("cl4srec", ("after", 1))],
)
def test_a_killed_run_goes_on_to_the_same_end(
    ring, finished, tmp_path, monkeypatch, method, place
):
    """Wherever it is stopped, dropout and all: every byte is that of the run that never was."""
    killed(ring, tmp_path / "out", method, place, monkeypatch)
    again = train(ring, tmp_path / "out", method, "--epochs", 3)
    assert whole(again) == whole(finished(method))


def test_a_lost_generator_would_be_noticed(ring, finished, tmp_path, monkeypatch):
    killed(ring, tmp_path / "out", "sasrec", ("after", 1), monkeypatch)
    load = epochs.load_checkpoint

    def forgetting(out, weights, optimizer, random):
        return load(out, weights, optimizer, {"loop": torch.Generator()})

    monkeypatch.setattr(epochs, "load_checkpoint", forgetting)
    train(ring, tmp_path / "out", "sasrec", "--epochs", 3)
    assert whole(tmp_path / "out") != whole(finished("sasrec"))


def test_other_data_or_settings_do_not_go_on(ring, tmp_path, monkeypatch):
    data = shutil.copytree(ring, tmp_path / "data")
    killed(data, tmp_path / "out", "bpr", ("after", 2), monkeypatch)
    with pytest.raises(InputError, match="with epochs = 3, this command has 4"):
        train(data, tmp_path / "out", "bpr", "--epochs", 4)
    path = data / "test.tsv"
    path.write_text(path.read_text().replace("i9", "i1", 1))
    with pytest.raises(InputError, match="this run was started with data of hash"):
        train(data, tmp_path / "out", "bpr", "--epochs", 3)
    with pytest.raises(InputError, match="holds a finished run"):
        again = train(ring, tmp_path / "again", "bpr", "--epochs", 1)
        train(ring, again, "bpr", "--epochs", 1)


# ---- what their states are for ----


def test_frozen_candidates(ring, finished, tmp_path):
    """Scores by hand, of all and of some users; a set of another split has no states."""
    data = shutil.copytree(ring, tmp_path / "data")
    flags = DataConfig(data=str(data), candidates=3, users_to=0.5, history=5)
    config = EvalConfig(out="", split="test", sets="random")
    held = held_out(flags, config)
    examples = frozen_sets(held, flags, config, None, "")["random"]
    assert 0 < len(examples) < 2 * USERS
    out = finished("sasrec")
    scores = candidate_scores(load_retriever(out / "test"), held.catalog, examples)
    saved = load_file(out / "test" / "embeddings.safetensors")
    for example, row in zip(examples, scores, strict=True):
        user = int(example.user[1:])
        number = 2 * user + (example.target == walk(user)[9])
        for item, score in zip(example.candidates, row, strict=True):
            expected = oracle.dot(saved["user"][number].tolist(), saved["item"][item].tolist())
            assert score == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match=r"holds states for the split 'val', expected 'test'"):
        load_retriever(out / "val")
    val = load_retriever(out / "val", "val")
    with pytest.raises(InputError, match="it does not know user 'u"):
        candidate_scores(val, held.catalog, examples)


def test_states_of_other_data_are_refused(ring, finished, tmp_path):
    """Same names and targets, another history."""
    data = shutil.copytree(ring, tmp_path / "data")
    (data / "train.tsv").write_text((ring / "train.tsv").read_text().replace("i0 i1", "i1 i0"))
    catalog = load_catalog(data)
    examples = heldout_examples(load_interactions(data, catalog), "test")
    retriever = load_retriever(finished("sasrec") / "test")
    with pytest.raises(InputError, match="states were made from data of hash"):
        retrieve(retriever, catalog, examples, [()] * len(examples), 2, 0)


def test_each_of_two_equal_targets_has_its_own_state(tmp_path, capsys):
    """A user who meets item 8 twice in test: the second time it was had before, so full ranking
    leaves it out, and says so. Both have their candidates scored by their own state.
    """
    users = walks()
    users["u0"]["test"] = [8, 9, 8]
    data = write_folder(tmp_path / "data", users)
    out = train(data, tmp_path / "out", "gru4rec", "--epochs", 1)
    said = capsys.readouterr().out
    assert "1 of 37 targets of the test split are left out of full ranking" in said
    assert metrics(out)["users"][:3] == ["u0", "u0", "u1"] and len(metrics(out)["users"]) == 36
    catalog = load_catalog(data)
    examples = heldout_examples(load_interactions(data, catalog), "test")
    examples = [replace(example, candidates=(8, 11)) for example in examples if
                example.user == "u0"]
    retriever = load_retriever(out / "test")
    scores = candidate_scores(retriever, catalog, examples)
    for number in range(3):
        expected = (retriever.user[number] @ retriever.item[[8, 11]].T).tolist()
        assert scores[number] == pytest.approx(expected, rel=1e-5)
    assert scores[0] != pytest.approx(scores[2], rel=1e-3)


def test_evaluate_reranks_what_a_baseline_retrieves(data, checkpoints, tmp_path):
    """On Posterland: the items retrieved for each user are the best new ones by its state."""
    out = train(data, tmp_path / "out", "sasrec", "--epochs", 2)
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, "--top-n", 4]
    argv = [str(word) for word in [*argv, "--retriever", out / "test"]]
    with pytest.raises(InputError, match=r"holds states for the split 'test', expected 'val'"):
        evaluate.main([*argv, "--split", "val", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
    evaluate.main([*argv, "--out", str(tmp_path / "report")])
    report = metrics(tmp_path / "report")
    catalog = load_catalog(data)
    interactions = load_interactions(data, catalog)
    saved = load_file(out / "test" / "embeddings.safetensors")
    scores = (saved["user"] @ saved["item"].T).numpy()
    assert len(report["users"]) == len(scores) == 24
    for number, row in enumerate(report["users"]):
        had = interactions.before(row["user"], "test")
        order = np.argsort(-scores[number], kind="stable").tolist()
        best = [catalog.ids[item] for item in order if item not in had][:4]
        assert row["retrieved"] == best
    with pytest.raises(InputError, match="names.json: no such file.*the folder val or test"):
        evaluate.main([*argv[:-1], str(out), "--out", str(tmp_path / "none")])


# ---- bad input ----


def test_users_with_a_single_training_item(tmp_path, capsys):
    """They are ranked for, and not trained on; where there are only such users, nothing is."""
    users = walks()
    for user in ("u0", "u1", "u2"):
        users[user]["train"] = users[user]["train"][:1]
    data = write_folder(tmp_path / "data", users)
    out = train(data, tmp_path / "out", "caser", "--epochs", 1)
    assert "3 of 18 users have a single training item" in capsys.readouterr().out
    assert "u0" in metrics(out)["users"]
    for splits in users.values():
        splits["train"] = splits["train"][:1]
    alone = write_folder(tmp_path / "alone", users)
    with pytest.raises(InputError, match="18 users with a single item each, expected some with"):
        train(alone, tmp_path / "none", "sasrec", "--epochs", 1)
    train(alone, tmp_path / "pairs", "bpr", "--epochs", 1)  # a pair is enough there


def test_a_user_without_training_items(tmp_path):
    users = walks()
    users["u4"]["train"] = []
    with pytest.raises(InputError, match=r"val.tsv:5: user 'u4' has no line in train.tsv"):
        train(write_folder(tmp_path / "data", users), tmp_path / "out", "bpr")


def test_a_user_with_every_item(tmp_path):
    users = walks()
    users["u4"]["train"] = list(range(ITEMS))
    users["u4"]["val"] = []
    users["u4"]["test"] = []
    with pytest.raises(InputError, match="user 'u4' has all 40 items, expected at least one"):
        train(write_folder(tmp_path / "data", users), tmp_path / "out", "sasrec")


def test_items_that_nobody_trained(tmp_path, capsys):
    """Item 40 is the target of one user of 18, and of no training pair."""
    users = walks()
    users["u7"]["val"] = [40]
    data = write_folder(tmp_path / "data", users, items=42)
    out = train(data, tmp_path / "out", "lightgcn", "--epochs", 1)
    assert "1 of 18 targets of the val split are items without a training pair" in (
        capsys.readouterr().out
    )
    facts = json.loads((out / "run.json").read_text())
    assert facts["untrained_targets"] == {"val": 1 / 18, "test": 0}


def test_pairs_that_repeat(tmp_path, capsys):
    users = walks()
    users["u3"]["train"] = [3, 4, 3, 4, 3]
    out = train(write_folder(tmp_path / "data", users), tmp_path / "out", "bpr", "--epochs", 1)
    assert "3 train pairs repeat" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["pairs"] == 17 * 7 + 2


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_a_new_item(tmp_path, split):
    users = walks()
    for splits in users.values():
        splits[split] = splits["train"][:1]
    with pytest.raises(InputError, match=f"{split}.tsv: 18 held-out items, none of them new"):
        train(write_folder(tmp_path / "data", users), tmp_path / "out", "bpr")


def test_sequences_shorter_than_a_filter(ring, tmp_path):
    """Caser's filters are up to 9 items high, the longest walk has 7 to train."""
    out = train(ring, tmp_path / "out", "caser", "--epochs", 1, "--length", 9)
    assert math.isfinite(log_of(out)[0]["loss"])


def test_a_loss_that_is_not_finite(ring, tmp_path, capsys):
    flags = ["--learning-rate", 1e11, "--epochs", 9]
    with pytest.raises(SystemExit) as stop:
        run(partial(train, ring, tmp_path / "out", "sasrec", *flags))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    assert "lower --learning-rate" in message


@pytest.mark.parametrize(("kind", "setting", "words"), [
    (MatrixConfig, {"layers": -1}, "--layers -1: expected at least 0"),
    (MatrixConfig, {"weight_decay": math.nan}, "--weight-decay nan"),
    (SequenceConfig, {"length": 0}, "--length 0: expected at least 1"),
    (SequenceConfig, {"dropout": 1.0}, "--dropout 1.0: expected at most 0.99"),
    (SequenceConfig, {"crop": 1.5}, "--crop 1.5: expected at most 1"),
    (SequenceConfig, {"every": 0}, "--every 0: expected at least 1"),
])
def test_settings_out_of_range(kind, setting, words):
    with pytest.raises(InputError, match=words):
        kind(**setting)


def test_several_processes_are_refused(ring, tmp_path, monkeypatch):
    monkeypatch.setattr(vector_run, "world_size", lambda: 2)
    with pytest.raises(InputError, match="2 processes, expected one.*without torchrun"):
        train(ring, tmp_path / "out", "bpr")
    assert not (tmp_path / "out").exists()


def test_padding_and_targets(ring):
    assert padded([(1, 2, 3), (4,)], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    data = load_interactions(ring, load_catalog(ring))
    targets = load_targets(data, ITEMS, "test", 4, CPU)
    assert targets.users.tolist() == [n // 2 for n in range(2 * USERS)]
    assert targets.sequences[:2].tolist() == [[4, 5, 6, 7], [5, 6, 7, 8]]
    assert targets.pairs[:, :3].tolist() == [[0, 1, 2], [8, 9, walk(1)[8]]]
    _, items = targets.seen.of(torch.tensor([0]))
    assert items.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
