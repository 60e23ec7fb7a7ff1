"""python -m hanorec.recommend, and the same from Python: who, which items, in what order, where to;
and what is refused.
"""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from processes import run_script, together
from toy_vectors import write_folder

import evaluate
import train_brmrs
from hanorec import recommend
from hanorec.base.config import DataConfig
from hanorec.base.errors import InputError
from hanorec.baselines import matrix_training, sequence_training
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import Example, load_interactions
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.evaluation import score, use_policy
from hanorec.mllm.items import encode_pictures
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import scoring_rows
from hanorec.ranking.retriever import load_retriever
from hanorec.ranking.sampler import Seen
from hanorec.recommend import Recommender
from hanorec.recommending import output
from hanorec.recommending.fold_in import RIDGE, fit_fold_in
from hanorec.recommending.people import Person
from hanorec.recommending.retrieval import best

ROOT = Path(__file__).parent.parent


def words(*argv):
    return [str(word) for word in argv]


@pytest.fixture(scope="module")
def brmrs(data, checkpoints, tmp_path_factory):
    """Folder of a BR-MRS trained on Posterland for two epochs."""
    out = tmp_path_factory.mktemp("brmrs") / "out"
    train_brmrs.main(words(
        "--data", data, "--model", checkpoints["qwen2_5_vl"], "--max-pixels", 1024, "--device",
        "cpu", "--out", out, "--epochs", 2, "--dim", 8, "--batch", 64,
    ))
    return out


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("ring") / "data")


@pytest.fixture(scope="module")
def trained(ring, tmp_path_factory):
    """trained(method) -> OUT of a recommender of the baselines, trained on the ring."""
    found = {}

    def train(method):
        if method not in found:
            out = tmp_path_factory.mktemp(method) / "out"
            argv = ["--data", ring, "--out", out, "--device", "cpu", "--dim", 8, "--epochs", 3]
            argv += ["--learning-rate", 0.02]
            if method == "lightgcn":
                matrix_training.main(words(*argv, "--layers", 2))
            else:
                sequence_training.main(words(*argv, "--method", method, "--length", 6))
            found[method] = out
        return found[method]

    return train


@pytest.fixture(scope="module")
def both(data, checkpoints, sft, brmrs):
    """The flags of a policy over a retriever."""
    return words(
        "--model", checkpoints["qwen2_5_vl"], "--adapter", sft, "--retriever", brmrs, "--data",
        data, "--device", "cpu", "--top-n", 5, "--top-k", 3,
    )


def had_by(made, user):
    """All rows that a user of the data has had."""
    data = made.interactions
    return data.train[user] + data.val[user] + data.test[user]


def rows_of(path):
    """The lines of a file of either form, by user."""
    text = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        every = [json.loads(line) for line in text]
    else:
        head, *lines = [line.split("\t") for line in text]
        every = [dict(zip(head, line, strict=True)) for line in lines]
    found = {}
    for row in every:
        found.setdefault(row["user"], []).append(row)
    return found


# ---- a policy over a retriever ----


@pytest.fixture(scope="module")
def everybody(both, tmp_path_factory):
    """The file of all users, written in one go."""
    out = tmp_path_factory.mktemp("lists") / "all.tsv"
    recommend.main([*both, "--users", "all", "--out", str(out)])
    return out


def test_lists_of_all_users(everybody, data, checkpoints, sft, brmrs):
    """Recomputed: five items by the retriever, all of what the user has had left out; their scores
    by the policy with prompts as it was trained on, in the order that the seed gives.
    """
    lists, catalog = rows_of(everybody), load_catalog(data)
    interactions, stored = load_interactions(data, catalog), load_retriever(brmrs)
    assert list(lists) == list(interactions.train) and len(lists) == 24
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu", max_pixels=1024)
    use_policy(backbone, str(sft))
    pictures = encode_pictures(backbone, catalog, range(len(catalog.ids)))
    builder = PromptBuilder(backbone, catalog, pictures, DataConfig(str(data), history=2))
    s = (stored.user @ stored.item.T).numpy()
    for user in list(lists)[:4]:
        had = interactions.train[user] + interactions.val[user] + interactions.test[user]
        order = np.argsort(-s[stored.users.index(user)], kind="stable")
        new = [int(row) for row in order if row not in had][:5]
        shuffle = np.random.default_rng([2025, *had[-2:], *new]).permutation(new).tolist()
        example = Example(user, had[-2:], new[0], (), tuple(shuffle))
        scores = score(builder, scoring_rows(builder, [example]), 1, 1)["sum"][0]
        wanted = np.argsort(-scores)[:3]
        found = lists[user]
        assert [row["item"] for row in found] == [catalog.ids[shuffle[i]] for i in wanted]
        assert [row["title"] for row in found] == [catalog.titles[shuffle[i]] for i in wanted]
        assert [float(row["score"]) for row in found] == pytest.approx(scores[wanted], abs=2e-4)
        places = [new.index(shuffle[i]) + 1 for i in wanted]
        assert [int(row["retriever_rank"]) for row in found] == places
        assert [row["rank"] for row in found] == ["1", "2", "3"]


def test_the_record_lies_beside_the_file(everybody):
    record = json.loads(everybody.with_name("all.tsv.run.json").read_text())
    assert record["states"].startswith("24 of 24 with their own vector")
    assert record["users"] == 24 and record["settings"]["top_k"] == 3
    assert {"data", "retriever", "base", "images"} < record["inputs"].keys()
    assert sorted(path.name for path in everybody.parent.iterdir()) == [
        "all.tsv", "all.tsv.run.json"
    ]


def test_a_stopped_run_goes_on_to_the_same_file(both, tmp_path, monkeypatch):
    """Blocks of five users, stopped within the third, in the middle of a line."""
    monkeypatch.setattr(output, "BLOCK", 5)
    argv = [*both, "--users", "all", "--out"]
    recommend.main([*argv, str(tmp_path / "whole.tsv")])
    out, append, calls = tmp_path / "stopped.tsv", output.Writer._append, []

    def dies(self, text):
        calls.append(text)
        append(self, text if len(calls) < 3 else text[: len(text) // 2])
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output.Writer, "_append", dies)
        recommend.main([*argv, str(out)])
    assert not out.exists()
    with pytest.raises(InputError, match="top_k = 3, this command has 2"):
        recommend.main([*argv, str(out), "--top-k", "2"])
    with monkeypatch.context() as patch:
        patch.setattr(output.Writer, "_append", lambda self, text: (
            calls.append(text), append(self, text)))
        recommend.main([*argv, str(out)])
    assert len(calls) == 3 + 3  # two of five blocks are not made again
    assert out.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    with pytest.raises(InputError, match="exists, expected a new file"):
        recommend.main([*argv, str(out)])


def smaller_blocks():
    output.BLOCK = 2


def test_two_processes_write_what_one_does(both, everybody, tmp_path):
    """Byte by byte: three blocks of two users, so that the last round has one block for two."""
    (tmp_path / "six").write_text("\n".join(list(rows_of(everybody))[:6]) + "\n")
    argv = [*both, "--users", str(tmp_path / "six"), "--out"]
    for n in (1, 2):
        out = str(tmp_path / f"{n}.tsv")
        assert together(n, run_script, "hanorec.recommend", [*argv, out], smaller_blocks) == [0] * n
    assert (tmp_path / "1.tsv").read_bytes() == (tmp_path / "2.tsv").read_bytes()


def test_the_plain_path_gives_the_same(both, everybody, tmp_path):
    users = tmp_path / "some"
    users.write_text("\n".join(list(rows_of(everybody))[3:6]) + "\n")
    out = tmp_path / "plain.jsonl"
    recommend.main([*both, "--users", str(users), "--plain", "true", "--out", str(out)])
    plain, packed = rows_of(out), rows_of(everybody)
    assert list(plain) == list(packed)[3:6]
    for user, own in plain.items():
        assert [row["item"] for row in own] == [row["item"] for row in packed[user]]
        scores = [float(row["score"]) for row in packed[user]]
        assert [row["score"] for row in own] == pytest.approx(scores, abs=2e-4)


# ---- from Python ----


def test_the_five_lines_of_the_readme(data, checkpoints, sft, brmrs, both, capsys):
    """They run, and say what the command says."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len(block.split("\n\n")) == 2 and len(block.splitlines()) == 5
    ids = load_catalog(data).ids
    named = {
        "hanorec/assets/posterland-base": checkpoints["qwen2_5_vl"], "data/posterland": data,
        "runs/hanorec": sft, "runs/brmrs": brmrs, "12": ids[3], "7": ids[8], "31": ids[20],
    }
    for name, own in named.items():
        assert block.count(f'"{name}"') == 1
        block = block.replace(f'"{name}"', f'"{own}"')
    exec(block, {})  # noqa: S102  the page's own text
    printed = capsys.readouterr().out.splitlines()[-5:]
    recommend.main([
        *both, "--history", f"{ids[3]} {ids[8]} {ids[20]}", "--top-n", "10", "--top-k", "5",
    ])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[-5:]]
    assert [row[0] for row in rows] == ["-"] * 5
    assert printed == [f"{rank} {title} {score}" for _, rank, _, title, score, _ in rows]


def test_a_user_of_the_data(both, everybody, data, checkpoints, sft, brmrs):
    made = Recommender(
        str(checkpoints["qwen2_5_vl"]), str(data), str(sft), str(brmrs), top_n=5, device="cpu")
    user, rows = list(rows_of(everybody).items())[7]
    assert [line.item for line in made.for_user(user, 3)] == [row["item"] for row in rows]
    with pytest.raises(InputError, match="user 'nobody' is not in train.tsv"):
        made.for_user("nobody")


# ---- candidates of a file, and items that nobody has had ----


@pytest.fixture(scope="module")
def cold(data):
    """Ids of three items that nobody has had."""
    catalog = load_catalog(data)
    had = set()
    interactions = load_interactions(data, catalog)
    for split in (interactions.train, interactions.val, interactions.test):
        for rows in split.values():
            had.update(rows)
    found = [item for row, item in enumerate(catalog.ids) if row not in had][:3]
    assert len(found) == 3
    return found


def test_cold_items_of_a_file_are_ranked(data, checkpoints, sft, brmrs, cold, tmp_path):
    new = tmp_path / "new.txt"
    new.write_text("\n".join(cold) + "\n")
    names = str(checkpoints["qwen2_5_vl"]), str(data), str(sft)
    made = Recommender(*names, candidates=str(new), device="cpu")
    lists = made.for_user("3", 3)
    assert {line.item for line in lists} == set(cold)
    assert [line.retriever_rank for line in lists] == [None] * 3
    scores = [line.score for line in lists]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    among = Recommender(None, str(data), None, str(brmrs), candidates=str(new)).for_user("3", 3)
    assert {line.item for line in among} == set(cold)
    assert [line.retriever_rank for line in among] == [1, 2, 3]


def test_content_retrieves_items_that_nobody_has_had(data, brmrs, cold):
    """BR-MRS scores them by title and image: among all new items of a user they are not the last
    ones in a row, as items without a vector would be."""
    made = Recommender(None, str(data), None, str(brmrs))
    new = len(made.catalog.ids) - len(set(had_by(made, "3")))
    order = [line.item for line in made.for_user("3", new)]
    assert set(cold) < set(order)
    assert min(map(order.index, cold)) < new - 3


# ---- states ----


@pytest.mark.parametrize("method", ["sasrec", "gru4rec", "bert4rec", "cl4srec", "caser"])
def test_a_sequence_model_retrieves_from_the_whole_history(ring, trained, method):
    """The state of the second test item, from all before it, is the one that the run wrote."""
    out = trained(method)
    made, stored = Recommender(None, str(ring), None, str(out)), load_retriever(out / "test")
    people, rows = [], []
    for row, (user, target) in enumerate(zip(stored.users, stored.targets, strict=True)):
        history = had_by(made, user)
        if made.catalog.ids[history[-1]] == target:
            people.append(Person(user, history[:-1], True))
            rows.append(row)
    assert len(people) == 18
    assert torch.allclose(made.source.states(people), stored.user[rows], atol=1e-5)
    later = [person._replace(history=had_by(made, person.name)) for person in people]
    assert not torch.allclose(made.source.states(later), stored.user[rows], atol=1e-3)


def test_matrix_models_fold_in_whom_they_do_not_know(ring, trained):
    out = trained("lightgcn")
    made = Recommender(None, str(ring), None, str(out / "test"))  # a folder of states does, too
    stored = load_retriever(out / "test")
    history = had_by(made, "u4")
    known, new = Person("u4", history, True), Person("u4", history, False)
    own, folded = made.source.states([known, new])
    assert torch.equal(own, stored.user[stored.users.index("u4")])
    mean = torch.cat([stored.item[list(history)].double().mean(0), torch.ones(1)])
    W = fit_fold_in(stored.user, stored.item, stored.seen)
    assert torch.allclose(folded.double(), mean @ W, atol=1e-5)
    assert made.source.about([known, new]).startswith("1 of 2 with their own vector of training, 1")


@pytest.mark.equation("RC-1")
def test_fold_in_matches_the_oracle():
    """The normal equations, by loops over users, their items and coordinates."""
    rng = np.random.default_rng(0)
    user, item = rng.normal(size=(9, 3)), rng.normal(size=(7, 3))
    had = [rng.permutation(7)[: 1 + n % 4].tolist() for n in range(9)]
    gram, cross = np.zeros((4, 4)), np.zeros((4, 3))
    for u in range(9):
        m = [sum(item[i][c] for i in had[u]) / len(had[u]) for c in range(3)] + [1.0]
        for a in range(4):
            for b in range(4):
                gram[a, b] += m[a] * m[b]
            for b in range(3):
                cross[a, b] += m[a] * user[u][b]
    penalty = RIDGE * sum(gram[a, a] for a in range(4)) / 4
    wanted = np.linalg.inv(gram + penalty * np.eye(4)) @ cross
    pairs = [(u, i) for u in range(9) for i in had[u]]
    seen = Seen(*torch.tensor(pairs).T, 9)
    W = fit_fold_in(torch.tensor(user), torch.tensor(item), seen)
    assert np.allclose(W.numpy(), wanted, atol=1e-12)
    # Users who are an affine map of their items' mean are found but for the ridge.
    true = rng.normal(size=(4, 3))
    means = [np.append(item[own].mean(0), 1) @ true for own in had]
    W = fit_fold_in(torch.tensor(np.array(means)), torch.tensor(item), seen)
    assert np.allclose(W.numpy(), true, atol=0.05) and not np.allclose(W.numpy(), wanted, atol=0.05)


def test_the_best_items_of_a_row():
    """Ties: the smaller row, also where they are more than are asked for; -inf is never taken."""
    scores = torch.tensor([1.0, 3, 2, 3, -torch.inf, 2, 2])
    assert best(scores, 4).tolist() == [1, 3, 2, 5]
    assert best(scores, 1).tolist() == [1]
    assert best(scores, 99).tolist() == [1, 3, 2, 5, 6, 0]
    assert best(scores - torch.inf, 2).tolist() == []


def test_seen_items_come_back_when_asked_for(ring, trained):
    out, titles = trained("sasrec"), {}
    for seen in ("leave-out", "keep"):
        made = Recommender(None, str(ring), None, str(out), seen=seen)
        titles[seen] = [line.item for line in made.for_history(["i1", "i2", "i3"], 37)]
    assert not {"i1", "i2", "i3"} & set(titles["leave-out"])
    assert {"i1", "i2", "i3"} & set(titles["keep"])


# ---- who ----


def test_a_file_may_hold_people_who_are_not_in_the_data(ring, trained, tmp_path, capsys):
    users, out = tmp_path / "users", tmp_path / "lists.jsonl"
    users.write_text("u3\nsomebody\ti5 i6\nu0\n")
    argv = ["--data", ring, "--retriever", trained("lightgcn"), "--users", users, "--out", out]
    recommend.main(words(*argv, "--top-k", 2))
    lists = rows_of(out)
    assert {user: len(rows) for user, rows in lists.items()} == {"u3": 2, "somebody": 2, "u0": 2}
    assert "2 of 3 with their own vector of training, 1 folded in" in capsys.readouterr().out
    assert not {"i5", "i6"} & {row["item"] for row in lists["somebody"]}


def put(text):
    """A file of that text, made where a case needs it."""
    return partial(_put, text)


def _put(text, tmp_path):
    path = tmp_path / "file"
    path.write_text(text)
    return path


BAD = {
    "nobody is named": ([], "expected one of the two"),
    "an unknown item": (["--history", "i1 i999"], "--history: unknown item 'i999', .*nearest: 'i"),
    "a title for an id": (["--history", "Title_7"], r"nearest: 'i7' \(Title 7\)"),
    "an empty history": (["--history", " "], "--history: an empty history"),
    "an empty history in a file": (["--users", put("new\t \n")], "file:1: an empty history"),
    "a user twice": (["--users", put("u1\nu2\nu1\n")], "user 'u1' is listed twice"),
    "an unknown user": (["--users", "u99"], "user 'u99' is not in train.tsv, .*nearest: 'u9'"),
    "an unknown user in a file": (["--users", put("u1\nv1\n")], "file:2: user 'v1' is not in"),
    "a history of a known user": (["--users", put("u1\ti3\n")], "a history of 'u1', expected"),
    "an empty file": (["--users", put("")], "nobody in it"),
    "a list longer than what is new": (["--users", "u1", "--top-k", 31], "has 30 candidates new"),
    "fewer candidates": (
        ["--users", "all", "--candidates", put("i1\ni2\n"), "--top-k", 3], "has 2 items"),
    "fewer new candidates": (
        ["--history", "i1", "--candidates", put("i1\ni2\n"), "--top-k", 2], "has 1 candidates new"),
    "a candidate twice": (["--users", "all", "--candidates", put("i1\ni1\n")], "on line 1 too"),
    "an unknown candidate": (["--users", "all", "--candidates", put("x\n")], "unknown item 'x'"),
    "another ending": (["--users", "all", "--out", "lists.csv"], "ends in .tsv or .jsonl"),
    "an adapter without a base": (["--users", "all", "--adapter", "a"], "without --model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(ring, trained, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    argv, message = BAD[case]
    argv = [word(tmp_path) if callable(word) else word for word in argv]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        recommend.main(words("--data", ring, "--retriever", trained("sasrec"), *argv))
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_to_rank_with(ring):
    with pytest.raises(InputError, match="neither --model nor --retriever"):
        recommend.main(words("--data", ring, "--users", "all"))
    with pytest.raises(InputError, match="cannot list the whole catalogue"):
        recommend.main(words("--data", ring, "--users", "all", "--model", "M"))


def test_a_list_longer_than_what_is_retrieved(both):
    with pytest.raises(InputError, match="--top-k 6: 5 candidates are retrieved"):
        recommend.main([*both, "--users", "all", "--top-k", "6"])


def test_a_retriever_of_other_data(data, ring, trained, tmp_path):
    out = trained("sasrec")
    with pytest.raises(InputError, match="ranks 40 items, .* or others"):
        Recommender(None, str(data), None, str(out))
    other = shutil.copytree(ring, tmp_path / "other")
    lines = (other / "train.tsv").read_text().splitlines()
    first, second = (line.partition("\t") for line in lines[:2])
    lines[:2] = [f"{first[0]}\t{second[2]}", f"{second[0]}\t{first[2]}"]
    (other / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="trained on item 'i.*' of user 'u0'"):
        Recommender(None, str(other), None, str(trained("lightgcn"))).for_user("u0")
    with pytest.raises(InputError, match="Caser knows users by their lines"):
        Recommender(None, str(other), None, str(trained("caser")))


def test_more_data_than_the_retriever_was_trained_on(ring, trained, tmp_path):
    """The day after: a user has had one more item since, which is left out."""
    later = shutil.copytree(ring, tmp_path / "later")
    text = (later / "test.tsv").read_text()
    (later / "test.tsv").write_text(re.sub(r"^(u0\t.*)$", r"\1 i33", text, flags=re.MULTILINE))
    for method in ("sasrec", "lightgcn"):
        before, after = (
            Recommender(None, str(folder), None, str(trained(method))).for_user("u0", 29)
            for folder in (ring, later)
        )
        assert "i33" in {line.item for line in before}
        assert "i33" not in {line.item for line in after}


def test_folders_that_are_no_retriever(ring, trained, sft, tmp_path):
    with pytest.raises(InputError, match="model.json: no such file"):
        Recommender(None, str(ring), None, str(sft))
    stopped = shutil.copytree(trained("sasrec"), tmp_path / "stopped")
    (stopped / "metrics.json").unlink()
    with pytest.raises(InputError, match="metrics.json: no such file, .* if it was stopped"):
        Recommender(None, str(ring), None, str(stopped))
    with pytest.raises(InputError, match="Caser has a vector for each user of training"):
        Recommender(None, str(ring), None, str(trained("caser"))).for_history(["i1"])


def test_an_adapter_of_another_base(data, checkpoints, make, sft, brmrs):
    other = make("qwen2_5_vl", seed=7)
    with pytest.raises(InputError, match="trained on another base"):
        Recommender(str(other), str(data), str(sft), str(brmrs), device="cpu").for_user("3")
    with pytest.raises(InputError, match="--adapter: .*no adapter|adapter_config"):
        Recommender(str(other), str(data), str(brmrs), str(brmrs))


def test_scores_that_are_no_numbers_are_not_shown(ring, trained):
    for method in ("sasrec", "lightgcn"):
        made = Recommender(None, str(ring), None, str(trained(method)))
        made.source.item = made.source.item.clone()
        made.source.item[39] = torch.nan
        with pytest.raises(InputError, match="user 'u0': scores that are not finite"):
            made.for_user("u0", 2)


# ---- evaluate.py --user ----


def test_evaluate_says_what_its_list_is(data, checkpoints, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "data")
    evaluate.main(words(
        "--model", checkpoints["qwen2_5_vl"], "--data", copy, *toy.SHORT, "--out", tmp_path / "out",
        "--user", "3", "--top-k", 2,
    ))
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 candidates" in printed and "held-out" in printed
    assert "python -m hanorec.recommend" in printed
