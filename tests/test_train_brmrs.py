"""train_brmrs.py and the ablation from end to end: they learn, repeat to the bit, go on after a
kill, and refuse what is not theirs.
"""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_ranking import ranks_by_loop
from toy_ranking import ITEMS, USERS, make_features, make_pairs, write_folder

import train_brmrs
from hanorec.base import lock
from hanorec.base.command import run
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.errors import InputError
from hanorec.ranking.retriever import load_retriever
from hanorec.run import epochs, ranking_run
from hanorec.studies import brmrs_ablation
from hanorec.studies.brmrs_ablation import ROWS, run_rows
from hanorec.studies.plots import plot_run

FLAGS = ["--dim", "8", "--batch", "64", "--learning-rate", "0.02", "--device", "cpu"]
WHOLE = [
    "embeddings.safetensors", "log.jsonl", "metrics.json", "model.json", "model.safetensors",
    "names.json", "run.json",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("toy") / "data")


def train(folder, out, *flags):
    train_brmrs.main(["--data", str(folder), "--out", str(out), *FLAGS, *map(str, flags)])
    return out


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Two finished runs agree in every byte but for the name of the folder."""
    for folder in (a, b):
        assert sorted(path.name for path in folder.iterdir()) == WHOLE
    return all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in WHOLE if name != "run.json"
    )


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    return train(folder, tmp_path_factory.mktemp("run") / "out", "--epochs", 12)


# ---- what it does ----


def test_it_learns(finished):
    """A user's 12 items of the other kind are never wanted, 6 of its own are training pairs. Chance
    puts the target among the first 5 of 18 in 28% of the cases; knowing the kinds alone in 5 of 6.
    """
    report = json.loads((finished / "metrics.json").read_text())
    assert report["test"]["Recall@5"] > 0.6
    log = read_log(finished)
    assert [record["epoch"] for record in log] == list(range(1, 13))
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["win"] > 0.5


def test_noise_teaches_nothing(tmp_path):
    """The control of the test above: with all held-out items exchanged at random the same command
    stays near chance.
    """
    rng, rows = np.random.default_rng(0), []
    for user in range(USERS):
        rows += [
            (user, int(item), label)
            for item, label in zip(
                rng.permutation(ITEMS)[:8], (0, 0, 0, 0, 0, 0, 1, 2), strict=True
            )
        ]
    out = train(write_folder(tmp_path / "data", rows), tmp_path / "out", "--epochs", 12)
    assert json.loads((out / "metrics.json").read_text())["test"]["Recall@5"] < 0.5


def test_the_reported_metrics_are_those_of_the_saved_embeddings(finished):
    """Ranks by a loop in float64 from what the run saved; each user has one test item, so Recall
    and NDCG follow from its rank.
    """
    saved = load_file(finished / "embeddings.safetensors")
    report = json.loads((finished / "metrics.json").read_text())
    rows = make_pairs()
    test = np.array([(user, item) for user, item, label in rows if label == 2]).T
    assert sorted(saved["train"].T.tolist()) == sorted(
        [user, item] for user, item, label in rows if label == 0
    )
    ranks = np.array(
        ranks_by_loop(
            saved["user"].double().numpy(), saved["item"].double().numpy(), saved["train"].numpy(),
            test,
        )
    )
    assert report["users"] == [str(user) for user in range(USERS)]
    for k in (5, 10, 20, 50):
        assert report["rows"][f"Recall@{k}"] == (ranks <= k).astype(float).tolist()
        assert report["test"][f"NDCG@{k}"] == pytest.approx(
            np.where(ranks <= k, 1 / np.log2(1 + ranks), 0).mean()
        )


def test_best_epoch_and_patience(folder, tmp_path):
    """The epoch with the highest validation Recall@20, the first of equals; then `patience` more
    and no further; its metrics are saved.
    """
    out = train(folder, tmp_path / "out", "--patience", 3)
    report, log = json.loads((out / "metrics.json").read_text()), read_log(out)
    recalls = [record["valid_Recall@20"] for record in log]
    assert report["best_epoch"] == 1 + recalls.index(max(recalls))
    assert report["epochs"] == len(log) == report["best_epoch"] + 3
    for name, value in report["valid"].items():
        assert log[report["best_epoch"] - 1][f"valid_{name}"] == pytest.approx(value, abs=1e-6)
    assert json.loads((out / "model.json").read_text())["epoch"] == report["best_epoch"]


def test_never_rounded_before_comparing(folder, tmp_path, monkeypatch):
    """Scores that agree in 9 digits are told apart."""
    scores = iter([0.5, 0.5 + 1e-9, 0.5 + 2e-9, 0.5 + 1e-9, 0.5 + 2e-9])
    evaluate = ranking_run.evaluate

    def scripted(*args):
        report, users, rows = evaluate(*args)
        return report | {"Recall@20": next(scores, report["Recall@20"])}, users, rows

    monkeypatch.setattr(ranking_run, "evaluate", scripted)
    out = train(folder, tmp_path / "out", "--patience", 2)
    assert json.loads((out / "metrics.json").read_text())["best_epoch"] == 3


def test_the_test_split_is_looked_at_once(folder, tmp_path, monkeypatch):
    """After the last epoch, and never before."""
    asked, evaluate = [], ranking_run.evaluate
    rows = make_pairs()
    splits = {label: [[u, i] for u, i, x in rows if x == label] for label in (1, 2)}

    def watched(emb, targets, *rest):
        asked.append(next(label for label in splits if targets.T.tolist() == splits[label]))
        return evaluate(emb, targets, *rest)

    monkeypatch.setattr(ranking_run, "evaluate", watched)
    train(folder, tmp_path / "out", "--epochs", 3)
    assert asked == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "flags",
    [["--layers", 0, "--fusion", "concat"],
     ["--fusion", "sum", "--item-graph", 3, "--user-graph", 3],
     ["--routing", "random", "--detach"],
     ["--hard-fused", "--lambda-h", 0, "--lambda-s", 0],
     ["--bpr-weight", 0, "--unimodal-bpr", 0.5, "--item-embedding", "none"],
     ["--user-embedding", "shared", "--no-normalise", "--routing", "same"]],
)
def test_every_option_runs(folder, tmp_path, flags):
    out = train(folder, tmp_path / "out", "--epochs", 2, *flags)
    assert all(np.isfinite(value) for record in read_log(out) for value in record.values())


def test_retriever(finished, folder):
    """By name, best first, nothing from training; the first item of every user is the one with rank
    1.
    """
    retriever = load_retriever(finished)
    saved = load_file(finished / "embeddings.safetensors")
    best = retriever.top_n(torch.arange(USERS), 18)
    assert retriever.items == tuple(map(str, range(ITEMS))) and len(retriever.users) == USERS
    train_items = {
        user: {i for u, i, label in make_pairs() if u == user and label == 0}
        for user in range(USERS)
    }
    for user in range(USERS):
        scores = (saved["item"] @ saved["user"][user]).tolist()
        assert set(best[user].tolist()) == set(range(ITEMS)) - train_items[user]
        found = [scores[i] for i in best[user].tolist()]
        falls = found == sorted(found, reverse=True)
        assert falls or np.allclose(np.diff(found).max(), 0, atol=1e-6)


def test_retriever_of_a_run_that_is_not_finished(tmp_path, folder):
    with pytest.raises(InputError, match=r"names.json: no such file"):
        load_retriever(folder)


# ---- the same run again ----


def test_two_runs_agree_to_the_bit_and_another_seed_does_not(finished, folder, tmp_path):
    assert same(train(folder, tmp_path / "again", "--epochs", 12), finished)
    assert not same(train(folder, tmp_path / "other", "--epochs", 12, "--seed", 1), finished)


class Killed(Exception):
    """As a signal would, at a chosen place."""


@pytest.mark.parametrize(
    "place",
    ["after checkpoint 1", "after checkpoint 7", "before checkpoint 7", "in epoch 5",
     "after the last epoch"],
)
def test_a_killed_run_goes_on_to_the_same_end(finished, folder, tmp_path, monkeypatch, place):
    """Stopped anywhere and started again, the run ends with the bytes of one that was never
    stopped.
    """
    calls = {"save": 0, "step": 0}
    save, step, write = epochs.save_checkpoint, train_brmrs.step_loss, ranking_run.write_model

    def saving(*args, **facts):
        calls["save"] += 1
        # the log has the epoch already, the checkpoint does not
        if place == f"before checkpoint {calls['save']}":
            raise Killed
        save(*args, **facts)
        if place == f"after checkpoint {calls['save']}":
            raise Killed

    def stepping(*args):
        calls["step"] += 1
        if place == "in epoch 5" and calls["step"] == 4 * 3 + 2:  # 180 pairs in steps of 64
            raise Killed
        return step(*args)

    def writing(*args):
        if place == "after the last epoch":
            raise Killed
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", saving)
        patch.setattr(train_brmrs, "step_loss", stepping)
        patch.setattr(ranking_run, "write_model", writing)
        with pytest.raises(Killed):
            train(folder, tmp_path / "out", "--epochs", 12)
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert same(train(folder, tmp_path / "out", "--epochs", 12), finished)


def test_a_lost_generator_would_be_noticed(finished, folder, tmp_path, monkeypatch):
    """The control of the test above: a resume that forgets the generator's state ends elsewhere."""
    save, load = epochs.save_checkpoint, epochs.load_checkpoint

    def saving(out, step, *args, **facts):
        save(out, step, *args, **facts)
        if step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", saving)
        with pytest.raises(Killed):
            train(folder, tmp_path / "out", "--epochs", 12)
    forgetting = lambda out, weights, optimizer, random: load(
        out, weights, optimizer, {"loop": torch.Generator()}
    )
    monkeypatch.setattr(epochs, "load_checkpoint", forgetting)
    assert not same(train(folder, tmp_path / "out", "--epochs", 12), finished)


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch):
    """OUT of a run stopped after its second epoch, on data of its own."""
    save, data = epochs.save_checkpoint, shutil.copytree(folder, tmp_path / "data")

    def saving(out, step, *args, **facts):
        save(out, step, *args, **facts)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_checkpoint", saving)
        with pytest.raises(Killed):
            train(data, tmp_path / "out", "--epochs", 4)
    return data, tmp_path / "out"


def contents(out):
    """Every file but the lock's, which a run that was stopped within this process still holds."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != lock.NAME]
    return {path: path.read_bytes() for path in files}


def refused(capsys, folder, out, *words, flags=()):
    before = contents(out)
    with pytest.raises(SystemExit) as stop:
        run(partial(train, folder, out, *flags))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    last = message[message.rindex("error: "):]
    for word in words:
        assert str(word) in last, last
    assert before == contents(out)


def test_other_settings_or_other_data_in_the_same_folder(capsys, stopped):
    data, out = stopped
    refused(
        capsys, data, out, out, "lambda_h = 1.0", "0.5", "another --out",
        flags=["--epochs", 4, "--lambda-h", 0.5],
    )
    refused(capsys, data, out, out, "epochs", flags=["--epochs", 5])
    features = make_features()
    features["image_feat.npy"][3, 2] += 1
    write_folder(data, features=features)
    refused(capsys, data, out, "run.json", "data", "another --out", flags=["--epochs", 4])
    write_folder(data)  # as it was
    train(data, out, "--epochs", 4)
    assert len(read_log(out)) == 4


def test_a_finished_run_and_a_foreign_folder_are_never_written_to(
    capsys, finished, folder, tmp_path
):
    refused(
        capsys, folder, finished, finished, "finished run", "another --out", flags=["--epochs", 12]
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("data")
    refused(capsys, folder, tmp_path / "mine", "empty folder", "--out")


def test_a_damaged_checkpoint(capsys, stopped):
    data, out = stopped
    path = next(out.glob("checkpoint-*")) / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(capsys, data, out, "state.safetensors", flags=["--epochs", 4])


def test_a_loss_that_is_not_finite(capsys, folder, tmp_path):
    with pytest.raises(SystemExit):
        run(partial(train, folder, tmp_path / "out", "--learning-rate", 1e11, "--epochs", 3))
    message = capsys.readouterr().err
    assert "epoch " in message and "lower --learning-rate" in message and "Traceback" not in message


# ---- the native layout ----


def test_native_from_checkpoint_to_titles(data, checkpoints, tmp_path, capsys):
    """Features are computed once: a stopped run goes on from its own copy, even without the
    checkpoint; retrieval speaks item ids.
    """
    from hanorec.datasets.catalog import load_catalog

    model = shutil.copytree(checkpoints["qwen2_5_vl"], tmp_path / "model")
    flags = ["--model", str(model), "--max-pixels", 1024, "--epochs", 2]
    out = train(data, tmp_path / "out", *flags)
    catalog, retriever = load_catalog(data), load_retriever(out)
    assert retriever.items == catalog.ids
    assert set(retriever.users) == {
        line.split("\t")[0] for line in (data / "train.tsv").read_text().splitlines()
    }
    shutil.rmtree(model)
    for name in ("metrics.json", "model.safetensors"):
        (out / name).unlink()
    assert retriever.top_n(torch.arange(3), 5).shape == (3, 5)
    before = (out / "embeddings.safetensors").read_bytes()
    train(data, out, *flags)
    assert (out / "embeddings.safetensors").read_bytes() == before
    assert (out / "metrics.json").exists()
    capsys.readouterr()


# ---- the ablation ----


@pytest.fixture(scope="module")
def ablation(folder, tmp_path_factory):
    """(OUT, results) of three rows and two seeds."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    return out, run_rows(
        out, BrmrsFiles(str(folder), "", device="cpu"), rows_of("BPR", "BPR + CHNS", "full"),
        [1, 2]
    )


def rows_of(*names, **changes):
    config = BrmrsConfig(dim=8, batch=64, learning_rate=0.02, epochs=3, **changes)
    return {name: brmrs_ablation.replace(config, **ROWS[name]) for name in names}


def test_ablation_rows_are_what_their_names_say():
    made = {name: BrmrsConfig(**changes) for name, changes in ROWS.items()}
    on = {
        name: (
            c.lambda_h > 0, c.lambda_s > 0, c.bpr_weight > 0, c.unimodal_bpr > 0, c.hard_fused,
            c.routing, c.detach,
        )
        for name, c in made.items()
    }
    no, yes = False, True
    assert on == {
        "BPR": (no, no, yes, no, no, "cross", no),
        "BPR, hard by s_f": (no, no, yes, no, yes, "cross", no),
        "BPR + unimodal BPR": (no, no, yes, yes, no, "cross", no),
        "BPR + same-modal hard": (yes, no, yes, no, no, "same", no),
        "BPR + random routing": (yes, no, yes, no, no, "random", no),
        "BPR + CHNS": (yes, no, yes, no, no, "cross", no),
        "BPR + Syn": (no, yes, yes, no, no, "cross", no),
        "BPR + Syn, detached": (no, yes, yes, no, no, "cross", yes),
        "full": (yes, yes, yes, no, no, "cross", no),
        "full, same-modal hard": (yes, yes, yes, no, no, "same", no),
        "full, random routing": (yes, yes, yes, no, no, "random", no),
        "full, without BPR": (yes, yes, no, no, no, "cross", no),
    }


def test_ablation_report(ablation):
    """Mean, deviation and differences from the runs' own files."""
    out, results = ablation
    assert json.loads((out / "results.json").read_text()) == results
    runs = {
        (name, seed): json.loads((out / folder / f"seed-{seed}" / "metrics.json").read_text())
        for name, folder in (("BPR", "BPR"), ("BPR + CHNS", "BPR-CHNS"), ("full", "full"))
        for seed in (1, 2)
    }
    for (name, seed), metrics in runs.items():
        assert results["rows"][name]["test"]["Recall@20"][seed - 1] == metrics["test"]["Recall@20"]
    a, b = (100 * runs["full", seed]["test"]["NDCG@10"] for seed in (1, 2))
    assert f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}" in (out / "table.md").read_text()
    rows = {key: np.array(run["rows"]["NDCG@20"]) for key, run in runs.items()}
    by_hand = np.mean([rows["full", s] - rows["BPR", s] for s in (1, 2)])
    test = next(
        t
        for t in results["paired"]
        if (t["row"], t["against"], t["metric"]) == ("full", "BPR", "NDCG@20")
    )
    assert test["difference"] == pytest.approx(by_hand) and test["low"] <= by_hand <= test["high"]
    assert test["seeds_above"] == sum(
        runs["full", s]["test"]["NDCG@20"] > runs["BPR", s]["test"]["NDCG@20"] for s in (1, 2)
    )
    assert {(t["row"], t["against"]) for t in results["paired"]} == {
        ("BPR + CHNS", "BPR"),
        ("full", "BPR"),
        ("full", "BPR + CHNS"),
    }


def test_ablation_goes_on_where_it_stopped(ablation, folder, tmp_path, monkeypatch):
    """Finished runs are read, not repeated; more seeds are added; other settings are refused."""
    first, results = ablation
    out, trained = shutil.copytree(first, tmp_path / "out"), []
    monkeypatch.setattr(brmrs_ablation, "script", lambda name: trained.append(name))
    files = BrmrsFiles(str(folder), "", device="cpu")
    assert run_rows(out, files, rows_of("BPR", "BPR + CHNS", "full"), [1, 2]) == results
    assert not trained
    with pytest.raises(InputError, match=r"theta = 0.1, this command has 0.2"):
        run_rows(out, files, rows_of("BPR", theta=0.2), [1])
    monkeypatch.undo()
    full = run_rows(out, files, rows_of("full"), [1, 2, 3])["rows"]["full"]
    assert len(full["test"]["Recall@20"]) == 3


def test_ablation_on_changed_data(ablation, folder, tmp_path):
    first, _ = ablation
    out, changed = shutil.copytree(first, tmp_path / "out"), make_features()
    changed["text_feat.npy"][0, 0] += 1
    shutil.rmtree(out / "full" / "seed-2")
    (tmp_path / "data").mkdir()
    other = write_folder(tmp_path / "data", features=changed)
    for path in out.rglob("run.json"):
        path.write_text(path.read_text().replace(str(folder), str(other)))
    with pytest.raises(InputError, match="2 different states"):
        run_rows(out, BrmrsFiles(str(other), "", device="cpu"), rows_of("full"), [1, 2])


def test_ablation_command(folder, tmp_path, capsys):
    flags = [
        "--data", str(folder), "--out", str(tmp_path / "out"), "--seeds", "1", "--epochs", "1",
        *FLAGS,
    ]
    brmrs_ablation.main(flags)
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"\n{name} | " in table for name in ROWS) and "132 tests" in table
    with pytest.raises(SystemExit):
        run(partial(brmrs_ablation.main, [*flags, "--seeds", "0"]))
    assert "--seeds 0" in capsys.readouterr().err


# ---- figures ----


def test_plots(finished, ablation, folder, tmp_path):
    """Of both modalities and of one alone. The ablation's results are a table, not a figure."""
    copied = shutil.copytree(finished, tmp_path / "run")
    assert plot_run(copied) == [copied / "curves.png"]
    (write_folder(tmp_path / "text") / "image_feat.npy").unlink()
    alone = train(
        tmp_path / "text", tmp_path / "alone", "--epochs", 2, "--lambda-h", 0, "--lambda-s", 0
    )
    assert plot_run(alone) == [alone / "curves.png"]
    (tmp_path / "ablation").mkdir()
    shutil.copy(ablation[0] / "results.json", tmp_path / "ablation")
    assert plot_run(tmp_path / "ablation") == []
