"""The comparison: its rows, the choice of settings, a run on a few users that is killed and goes
on, its table, and what it refuses.
"""

import json
import math
import shutil
from itertools import chain
from pathlib import Path

import pytest
import toy
from toy_vectors import write_folder

from hanorec.base.errors import InputError
from hanorec.baselines import sprec
from hanorec.baselines.rows import CONTROL, ROWS, TRIALS, Trial
from hanorec.studies import baselines, baselines_runs, tables
from hanorec.studies.baselines_language import train_sprec
from hanorec.studies.baselines_makers import MAKERS
from hanorec.studies.baselines_scoring import load_asked, rank_popular
from hanorec.studies.runs import folder_name

QUICK = "--epochs 2 --dim 8 --device cpu"
NAMES = ["popularity", "BPR-MF", "GRU4Rec, L = 5"]


def command(data, out, *more, rows=NAMES):
    return [
        "--data", str(data), "--out", str(out), "--rows", "; ".join(rows), "--matrix", QUICK,
        "--sequence", QUICK, "--test", "--sets random", *more,
    ]


@pytest.fixture
def world(data, tmp_path):
    """A data folder that may be drawn into."""
    return shutil.copytree(data, tmp_path / data.name)


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
    """(folder, its command) of two seeds and two trials of `NAMES`."""
    folder = tmp_path_factory.mktemp("baselines")
    world = shutil.copytree(data, folder / data.name)
    argv = command(world, folder / "out", "--seeds", "2", "--trials", "2")
    baselines.main(argv)
    return folder / "out", argv


def results(out, split="test"):
    return json.loads((out / f"results-{split}.json").read_text())


# ---- rows ----


def test_every_trained_row_has_equally_many_trials_and_the_default_comes_first():
    for name, row in ROWS.items():
        assert len(row.grid) == (TRIALS if MAKERS[row.maker].train else 0), name
        assert row.grid[:1] in [(), (Trial(),)]
        assert len(set(row.grid)) == len(row.grid)


def test_every_trial_is_a_command(tmp_path):
    flags = dict.fromkeys(baselines.STAGES, ())
    study = baselines_runs.Comparison("D", "M", tmp_path, "test", ROWS, flags, TRIALS)
    study.check_flags(2025)
    rates = [flag for flag in study.training("BPR-MF", 1, 2025) if flag.startswith("0.00")]
    assert rates == ["0.003"]  # three times LightGCN's


def test_rows_stand_below_what_they_need_and_have_folders_of_their_own():
    names = list(ROWS)
    for name, row in ROWS.items():
        assert row.below is None or names.index(row.below) < names.index(name)
    assert len({folder_name(name) for name in names}) == len(names)


def test_published_figures_are_those_of_the_ablation():
    for name in ("DPO", CONTROL):
        assert ROWS[name].published[0] == tables.PUBLISHED[name]


# ---- runs ----


def test_the_table_has_every_row_and_what_it_took(small):
    out, _ = small
    found = results(out)
    assert list(found["sets"]) == ["random"] and found["seeds"] == [2025, 2026]
    assert list(found["sets"]["random"]["rows"]) == ["chance", *NAMES]
    for name in NAMES[1:]:
        row = found["rows"][name]
        values = [trial["NDCG@3"] for trial in row["trials"]]
        best = row["trials"][values.index(max(values))]
        assert len(values) == 2 and row["chosen"] == best["setting"]
        assert len(row["full_ranking"]["Recall@10"]) == 2
        assert row["history"] == (5 if "L = 5" in name else None)
        assert row["training_pairs"] > 0 and min(row["training_cpu_seconds"]) > 0
    assert found["rows"]["popularity"]["trials"] == []
    text = (out / "table-test.md").read_text()
    assert text.count("\nBPR-MF | ") == 4 and "not named by the document" in text
    assert max(row.count(" | ") for row in text.splitlines()) <= 7  # 8 columns
    assert "- GRU4Rec, L = 5: " in text


def splits(data):
    """Split -> user -> item ids, from the files."""
    found = {}
    for split in ("train", "val", "test"):
        lines = (data / f"{split}.tsv").read_text().splitlines()
        found[split] = {user: ids.split() for user, ids in (line.split("\t") for line in lines)}
    return found


def test_the_share_of_targets_without_a_training_pair(small):
    out, argv = small
    items = {}
    for split, users in splits(Path(argv[1])).items():
        items[split] = list(chain.from_iterable(users.values()))
    missing = [item not in items["train"] for item in items["test"]]
    assert results(out)["untrained_targets"] == pytest.approx(sum(missing) / len(missing))
    assert 0 < sum(missing) < len(missing)


def test_popularity_ranks_all_items_too(tmp_path):
    """By hand. Counts of items 0 .. 4: 2 1 0 1 0. Of a, 3 and 4 are left and 3 is first; of b, 2
    and 4, whose tie counts against 2.
    """
    users = {
        "a": {"train": [0, 1], "val": [2], "test": [3]},
        "b": {"train": [3, 0], "val": [1], "test": [2]},
    }
    data = write_folder(tmp_path / "data", users, items=5)
    flags = ["--data", str(data), "--model", "", "--sets", "random", "--candidates", "2"]
    found = rank_popular(load_asked(flags))
    assert found["Recall@10"] == 1
    assert found["NDCG@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_the_chosen_setting_is_trained_with_every_seed(small):
    """Of the second seed that trial alone; the first seed has all."""
    out, _ = small
    for name in NAMES[1:]:
        place = folder_name(name)
        number = [t["setting"] for t in results(out)["rows"][name]["trials"]].index(
            results(out)["rows"][name]["chosen"])
        assert {p.name for p in (out / "seed-2025" / place).iterdir()} == {"trial-0", "trial-1"}
        assert [p.name for p in (out / "seed-2026" / place).iterdir()] == [f"trial-{number}"]


def test_what_is_finished_is_not_done_again(small, monkeypatch):
    out, argv = small
    before = results(out)
    for name, maker in MAKERS.items():
        monkeypatch.setitem(MAKERS, name, maker._replace(score=lambda job: pytest.fail(job.name)))
    monkeypatch.setattr("hanorec.studies.runs.timed", lambda *_: pytest.fail("trained again"))
    baselines.main(argv)
    assert results(out) == before


def test_killed_between_rows_it_ends_as_if_it_had_not_been(small, world, tmp_path, monkeypatch):
    """First while it scores a trial, then while it trains the next row; held to the first seed."""
    out, _ = small
    argv = command(world, tmp_path / "out", "--seeds", "1", "--trials", "2")

    def killed(*_):
        raise KeyboardInterrupt

    for name, change in [("matrix", {"score": killed}), ("sequence", {"train": killed})]:
        with monkeypatch.context() as patch:
            patch.setitem(MAKERS, name, MAKERS[name]._replace(**change))
            with pytest.raises(KeyboardInterrupt):
                baselines.main(argv)
        assert not (tmp_path / "out" / "results-test.json").exists()
    half = tmp_path / "out" / "seed-2025" / "trials" / "GRU4Rec-L-5" / "trial-0" / "metrics.json"
    half.parent.mkdir(parents=True)
    half.write_text("{}")  # of a process that was killed before it wrote run.json
    baselines.main(argv)
    found, wanted = results(tmp_path / "out"), results(out)
    for name in NAMES:
        row, whole = (one["sets"]["random"]["rows"][name]["values"] for one in (found, wanted))
        assert row == {metric: values[:1] for metric, values in whole.items()}
        row, whole = found["rows"][name], wanted["rows"][name]
        assert (row["trials"], row["chosen"]) == (whole["trials"], whole["chosen"])
        for metric, values in row["full_ranking"].items():
            assert values == whole["full_ranking"][metric][:1]


def test_one_trial_is_the_default_and_nothing_is_chosen(world, tmp_path, capsys):
    """Flags that no chosen row takes are told; those that one takes are not."""
    out = tmp_path / "out"
    baselines.main(command(world, out, "--seeds", "1", "--trials", "1", rows=["chance", "BPR-MF"]))
    printed = capsys.readouterr().out
    assert "note: --sequence: no chosen row takes flags of" in printed
    assert "note: --matrix" not in printed
    assert list(results(out)["rows"]) == NAMES[:2]  # popularity is always there
    row = results(out)["rows"]["BPR-MF"]
    assert row["trials"] == [] and row["chosen"] == "default"
    assert not (out / "seed-2025" / "trials").exists()


def test_validation_has_a_table_of_its_own(small):
    out, argv = small
    baselines.main([*argv, "--split", "val"])
    assert results(out, "val")["split"] == "val"
    assert "flatter" in (out / "table-val.md").read_text()
    assert "flatter" not in (out / "table-test.md").read_text()


# ---- with a checkpoint ----


def with_model(argv, checkpoints):
    """The command with the tiny checkpoint, and flags that keep its rows short."""
    training = " ".join([*toy.SHORT, *toy.STEPS])
    return [
        *argv, "--model", str(checkpoints["qwen2_5_vl"]), "--sft", training, "--dpo", training,
        "--sprec", f"{training} --rounds 1", "--seeds", "1", "--trials", "1",
    ]


def test_a_checkpoint_brings_the_control_to_which_all_are_held(
    world, checkpoints, tmp_path, monkeypatch
):
    """The row that was finished without it is not made again."""
    out, test = tmp_path / "out", " ".join([*toy.SHORT, "--sets matched"])
    argv = command(world, out, "--test", test, rows=["BPR-MF"])
    baselines.main([*argv, "--seeds", "1", "--trials", "1"])
    assert "against_control" not in results(out)["sets"]["matched"]["rows"]["BPR-MF"]
    fail = MAKERS["matrix"]._replace(score=lambda job: pytest.fail(f"{job.name} again"))
    monkeypatch.setitem(MAKERS, "matrix", fail)
    baselines.main(with_model(argv, checkpoints))
    found = results(out)
    assert list(found["rows"]) == ["popularity", "BPR-MF", "SFT", CONTROL]
    rows = found["sets"]["matched"]["rows"]
    own, control = (rows[name]["values"]["NDCG@3"][0] for name in ("BPR-MF", CONTROL))
    assert rows["BPR-MF"]["against_control"]["difference"] == pytest.approx(own - control)
    assert "against_control" not in rows[CONTROL]
    text = (out / "table-test.md").read_text()
    assert text.count("56.73, 61.91, 54.03") == 1


@pytest.mark.long
def test_all_rows(world, checkpoints, tmp_path):
    out, test = tmp_path / "out", " ".join([*toy.SHORT, "--neighbors 20"])
    argv = command(world, out, "--test", test, rows=list(ROWS))
    baselines.main(with_model(argv, checkpoints))
    found = results(out)
    assert list(found["sets"]) == ["random", "hard", "matched"]
    for one in found["sets"].values():
        assert list(one["rows"]) == ["chance", *ROWS]
        for name, row in one["rows"].items():
            assert ("against_control" in row) == (name not in ("chance", CONTROL))
    for name, row in found["rows"].items():
        assert (row["training_pairs"] is None) == (not ROWS[name].grid), name
        ranks_all = MAKERS[ROWS[name].maker].ranks_all or name == NAMES[0]
        assert bool(row["full_ranking"]) == ranks_all, name
        if MAKERS[ROWS[name].maker].model:
            assert row["history"] == (10 if "MSRBench" in name else 2)
    before = (out / "table-test.md").read_text()
    baselines.main(with_model(argv, checkpoints))
    assert (out / "table-test.md").read_text() == before


def test_sprec_follows_its_flags(data, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(sprec, "plan", lambda *how: plans.append(how[2:]) or ([], "S"))
    flags = ["--data", str(data), "--users-seed", "7"]
    own = ["--model", "M", "--sft", "S", "--rounds", "2", "--pick", "random"]
    train_sprec([*flags, *own], tmp_path / "out", tmp_path / "cpu")
    assert plans == [("M", flags, 2, "random", 7)]


# ---- bad input ----


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows", "SASRek (CE)"], r"no row 'SASRek \(CE\)', is 'SASRec \(CE\)' meant\?"),
        (["--rows", "sasrec"], r"no row 'sasrec', is 'SASRec \(BCE\)' or 'SASRec \(CE\)' meant"),
        (["--rows", "popularity; HaNoRec"], "the row 'HaNoRec' needs a checkpoint and there is"),
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--trials", "0"], "--trials 0: expected 1 .. 6"),
        (["--trials", "7"], "--trials 7: expected 1 .. 6"),
        (["--test=--split=val"], "holds --split=val"),
        (["--rows", "BPR-MF", "--matrix", "--dim 0"], "--dim 0: expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(data, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        baselines.main(["--data", str(data), "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_without_a_checkpoint_hard_candidates_are_not_drawn(world, tmp_path):
    with pytest.raises(InputError, match="no frozen hard candidates of test.*--sets random"):
        baselines.main(
            ["--data", str(world), "--out", str(tmp_path / "out"), "--rows", "popularity"])


def test_candidates_of_other_data_are_refused(small, world, tmp_path):
    """The file of a folder whose training lines are others."""
    _, argv = small
    name = "candidates_test_random.json"
    path = world / "train.tsv"
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    for split in ("val", "test"):
        other = world / f"{split}.tsv"
        other.write_text("\n".join(other.read_text().splitlines()[1:]) + "\n")
    shutil.copy(f"{argv[1]}/{name}", world / name)
    with pytest.raises(InputError, match=f"{name}: data_sha256 is"):
        baselines.main(command(world, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_settings_or_other_candidates_than_those_of_finished_rows_are_refused(small):
    out, argv = small
    with pytest.raises(InputError, match="holds a run with epochs = 2, this command has 3"):
        baselines.main([*argv, "--matrix", "--epochs 3 --dim 8 --device cpu"])
    with pytest.raises(InputError, match="holds a run with batch = 4, this command has 3"):
        baselines.main([*argv, "--test", "--sets random --batch 3"])
    path = next((out / "seed-2026" / "BPR-MF").glob("*/run.json"))
    before = path.read_text()
    path.write_text(before.replace(json.loads(before)["inputs"]["data"], "0" * 64))
    with pytest.raises(InputError, match="expected 0000.* as for its training: the data folder"):
        baselines.main(argv)
    path.write_text(before)
    path = next((out / "seed-2026" / "test" / "BPR-MF").glob("*/run.json"))
    before = path.read_text()
    path.write_text(before.replace(json.loads(before)["inputs"]["candidates_random"], "0" * 64))
    with pytest.raises(InputError, match="'BPR-MF' was evaluated on candidates_random of hash 00"):
        baselines.main(argv)
    path.write_text(before)
