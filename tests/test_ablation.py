"""The ablation table: its rows, its intervals on numbers made by hand, a run on a few users that
goes on, and its figures.
"""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import toy
from pages import MOST_COLUMNS
from PIL import Image

from hanorec.base.config import DataConfig, DpoConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.settings import parse
from hanorec.metrics import bootstrap_interval
from hanorec.studies import ablation, plots, runs, tables

ROWS = "DPO; λ standardised, reversed; SFT continued"


def report(ndcg, users=("a", "b", "c")):
    """What `run_row` returns of a policy with these NDCG@3 values."""
    known = {"metrics": {metric: {"value": 0.3} for metric in tables.METRICS}}
    one = {
        "metrics": {metric: {"value": float(np.mean(ndcg))} for metric in tables.METRICS},
        "rows": {"NDCG@3": list(ndcg)},
        "users": [{"user": user, "target": "1", "candidates": ["1", "2"]} for user in users],
        "popularity": known,
        "chance": known,
    }
    return {"sets": {"random": one}, "cpu_seconds": 1.0}


def test_every_row_is_a_command(checkpoints):
    for script, flags in ablation.ROWS.values():
        kinds = [ModelConfig, DataConfig, TrainConfig]
        if script == "train_dpo":
            kinds.append(DpoConfig)
        parse(kinds, ["--model", "M", "--data", "D", "--out", "O", *flags])
    folders = [runs.folder_name(row) for row in [*ablation.ROWS, "SFT", "base"]]
    assert len(set(folders)) == len(folders)


def test_each_row_about_one_part_differs_from_dpo_in_that_part():
    kinds = [ModelConfig, DataConfig, TrainConfig, DpoConfig]
    settings = {}
    for row, (script, flags) in ablation.ROWS.items():
        if script == "train_dpo":
            *_, settings[row] = parse(kinds, ["--model", "M", "--data", "D", "--out", "O", *flags])
    assert settings["DPO"].sigma_n == 0 and not settings["DPO"].hars
    for row, dpo in settings.items():
        if row.startswith("λ") and "noise" not in row:
            assert dpo.sigma_n == 0 and dpo.hars
        if row.startswith("noise"):
            assert dpo.sigma_n > 0 and not dpo.hars


def test_seeds_with_the_same_users_are_averaged_for_each_user_first():
    """Users' gaps of the two seeds: (1, 0, 0) and (0, 0, 0.5), on average (0.5, 0, 0.25): mean
    0.25; the seeds' means are 1/3 and 1/6.
    """
    seeds = [
        {"SFT": report([0, 0, 0]), "DPO": report([0, 0, 0]), "HaNoRec": report([1, 0, 0])},
        {"SFT": report([0, 0, 0]), "DPO": report([0.5, 0, 0]), "HaNoRec": report([0.5, 0, 0.5])},
    ]
    found = tables.summarise(seeds)["random"]
    test = found["rows"]["HaNoRec"]["against_control"]
    assert (found["users"], found["same_users"], found["seeds"]) == (3, True, 2)
    assert test["difference"] == pytest.approx(0.25)
    assert test["seeds"] == pytest.approx([1 / 3, 1 / 6])
    assert test["above"] == 2
    assert (test["low"], test["high"]) == pytest.approx(bootstrap_interval([0.5, 0, 0.25]))
    # Student's interval of 1/3 and 1/6: mean 1/4, deviation (1/6)/sqrt 2, half width 12.71 *
    # deviation / sqrt 2 = 12.71 / 12.
    assert test["over_seeds"] == pytest.approx([1 / 4 - 12.71 / 12, 1 / 4 + 12.71 / 12])


def test_seeds_with_users_of_their_own_are_one_sample():
    seeds = [
        {"SFT": report([0, 0]), "DPO": report([0, 0]), "HaNoRec": report([1, 0])},
        {
            "SFT": report([0] * 3, "xyz"), "DPO": report([0] * 3, "xyz"),
            "HaNoRec": report([1, 0, 1], "xyz"),
        },
    ]
    seeds[0]["SFT"]["sets"]["random"]["users"].pop()
    found = tables.summarise(seeds)["random"]
    assert found["same_users"] is False and found["users"] == 5
    assert found["rows"]["HaNoRec"]["against_control"]["difference"] == pytest.approx(3 / 5)


def test_t_is_students():
    """From two seeds on it falls toward 1.96, and with one degree of freedom it is the Cauchy
    quantile tan(0.475 pi).
    """
    assert tables.T_975[0] == pytest.approx(np.tan(0.475 * np.pi), abs=0.01)
    assert all(a > b > 1.96 for a, b in pairwise(tables.T_975))


@pytest.fixture(scope="module")
def small(checkpoints, data, tmp_path_factory):
    """(folder, its command) of two seeds with three rows."""
    folder = tmp_path_factory.mktemp("ablation")
    out, world = folder / "out", folder / data.name
    shutil.copytree(data, world)  # it is given candidate sets
    training = " ".join([*toy.SHORT, *toy.STEPS])
    argv = [
        "--out", str(out), "--model", str(checkpoints["qwen2_5_vl"]), "--data", str(world),
        "--seeds", "2", "--rows", ROWS, "--sft", training, "--dpo", training,
        "--continued", training, "--test", " ".join([*toy.SHORT, "--neighbors", "20"]),
    ]
    ablation.main(argv)
    return out, argv


def test_the_table_has_every_row_and_the_published_figure(small, data):
    out, _ = small
    found = json.loads((out / "results-test.json").read_text())[data.name]
    for one in found.values():
        assert list(one["rows"]) == [
            "base", "SFT", "DPO", "SFT continued", "λ standardised, reversed", "popularity",
            "chance",
        ]
        assert one["seeds"] == 2 and one["users"] == 24 and one["same_users"]
    text = (out / "table-test.md").read_text()
    assert text.count("\nDPO | ") == 2 and text.count("49.82") == 2
    assert text.count("\nSFT | ") == 4  # its values, and its difference to DPO
    assert max(line.count(" | ") for line in text.splitlines()) < MOST_COLUMNS


def test_it_goes_on_where_it_stopped(small, monkeypatch):
    """Nothing that is finished is done again; a row that is not, is; and the table is the same."""
    out, argv = small
    before, script = (out / "results-test.json").read_text(), runs.script
    monkeypatch.setattr(runs, "script", lambda name: pytest.fail(f"{name} ran again"))
    ablation.main(argv)
    assert (out / "results-test.json").read_text() == before
    (next(out.rglob("test/DPO")) / "run.json").unlink()  # killed while it evaluated
    ran = []
    monkeypatch.setattr(runs, "script", lambda name: ran.append(name) or script(name))
    ablation.main(argv)
    assert ran == ["evaluate"] and (out / "results-test.json").read_text() == before


def test_a_row_killed_before_its_time_was_written_is_whole(small):
    out, argv = small
    for path in out.rglob("cpu/DPO.json"):
        path.unlink()
    ablation.main(argv)
    found = json.loads((out / "results-test.json").read_text())
    for sets in found.values():
        for one in sets.values():
            assert one["rows"]["DPO"]["cpu_seconds"] == [None, None]


def test_a_wrong_flag_of_a_later_row_ends_it_before_the_first_trains(
    tmp_path, data, checkpoints, capsys
):
    argv = [
        "--out", str(tmp_path / "out"), "--model", str(checkpoints["qwen2_5_vl"]),
        "--data", str(data), "--dpo", "--beta-0 0.5",
    ]
    with pytest.raises(SystemExit):
        ablation.main(argv)
    assert "--beta-0 0.5" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_settings_data_or_rows_are_refused(small):
    """Also those of the evaluation alone: finished rows would be of one kind and new ones of
    another.
    """
    out, argv = small
    with pytest.raises(InputError, match="DPO: holds a run with epochs = 1, this command has 2"):
        ablation.main([*argv, "--dpo", " ".join([*toy.SHORT, *toy.STEPS, "--epochs", "2"])])
    with pytest.raises(
        InputError, match="base: holds a run with neighbors = 20, this command has 30"
    ):
        ablation.main([*argv, "--test", " ".join([*toy.SHORT, "--neighbors", "30"])])
    path = next(out.glob("*/seed-2026/test/SFT/run.json"))
    before = path.read_text()
    path.write_text(before.replace(json.loads(before)["inputs"]["candidates_hard"], "0" * 64))
    with pytest.raises(InputError, match="'SFT' was evaluated on candidates_hard of hash 0000"):
        ablation.main(argv)
    path.write_text(before)
    with pytest.raises(InputError, match="holds --split"):
        ablation.main([*argv, "--test", "--split val"])
    with pytest.raises(InputError, match="no row 'HaNoRek'"):
        ablation.main(["--out", "x", "--rows", "HaNoRek"])
    with pytest.raises(InputError, match="expected both"):
        ablation.main(["--out", "x", "--data", "y"])


def test_its_figures(small):
    out, _ = small
    drawn = plots.plot_run(out)
    names = {path.name.split("-")[0] for path in drawn}
    assert names == {"curves.png", "pairs.png", "metrics.png", "ablation"}
    for path in drawn:
        with Image.open(path) as image:
            assert min(image.size) > 100, path
            assert len(np.unique(np.asarray(image.convert("L")))) > 10, path
