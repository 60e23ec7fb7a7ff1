"""The report of any recommender's scores: the same numbers, layout and hashes as evaluate.py's."""

import json
import shutil

import numpy as np
import pytest
import toy

import evaluate
from hanorec.base.config import DataConfig, EvalConfig, ModelConfig
from hanorec.base.errors import InputError
from hanorec.base.settings import parse
from hanorec.ranking.candidate_sets import frozen_sets, held_out
from hanorec.ranking.report import popularity
from hanorec.run.scored import write_scores
from hanorec.studies.runs import run_row

FLAGS = [*toy.SHORT, "--users-to", "0.25", "--sets", "random"]


@pytest.fixture(scope="module")
def world(data, checkpoints, tmp_path_factory):
    """The words of an evaluation of the bare model, and what it wrote: (words, metrics, run)."""
    root = tmp_path_factory.mktemp("scored")
    computed = shutil.ignore_patterns("candidates_*")
    shutil.copytree(data, root / "data", ignore=computed)
    words = ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(root / "data"), *FLAGS]
    evaluate.main([*words, "--out", str(root / "base")])
    metrics, run = (root / "base" / f"{name}.json" for name in ("metrics", "run"))
    return words, json.loads(metrics.read_text()), json.loads(run.read_text())


def read(words, out):
    """DataConfig, EvalConfig and ModelConfig of these words, the held-out items, their sets."""
    argv = [*words, "--out", str(out)]
    model, data, config = parse([ModelConfig, DataConfig, EvalConfig], argv)
    held = held_out(data, config)
    return [data, config, model], held, frozen_sets(held, data, config, None, "")


def test_the_base_models_scores_make_the_base_models_report(world, tmp_path):
    words, metrics, run = world
    configs, held, sets = read(words, tmp_path / "out")
    scores = {"random": np.array(metrics["sets"]["random"]["scores"]["base"])}
    write_scores(tmp_path / "out", "base", scores, sets, held, configs, weights="abc")

    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["sets"]["random"]
    expected = metrics["sets"]["random"] | {"policies_mean_score": {}}
    assert found == expected
    inputs = json.loads((tmp_path / "out" / "run.json").read_text())["inputs"]
    for name in ("data", "candidates_random"):
        assert inputs.pop(name) == run["inputs"][name]
    assert inputs == {"weights": "abc"}


def test_a_row_is_read_as_the_rows_of_the_ablation(world, tmp_path):
    """Popularity as a row; run_row finds it finished and evaluates nothing."""
    words, metrics, _ = world
    out = tmp_path / "test" / "popularity"
    configs, held, sets = read(words, out)
    scores = {"random": popularity(held.interactions.train, sets["random"])}
    write_scores(out, "popularity", scores, sets, held, configs)

    found = run_row(tmp_path, "popularity", "", [], words)
    popular = found["sets"]["random"]
    assert popular["metrics"] == metrics["sets"]["random"]["popularity"]["metrics"]
    assert popular["users"] == metrics["sets"]["random"]["users"]
    assert set(found["evaluated_on"]) == {"data", "candidates_random"}
    with pytest.raises(InputError, match="holds a run with history = 2, this command has 3"):
        run_row(tmp_path, "popularity", "", [], [*words, "--history", "3"])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(world, tmp_path, broken):
    words, _, _ = world
    configs, held, sets = read(words, tmp_path / "out")
    scores = np.zeros((6, 4))
    scores[2, 1] = broken
    user = sets["random"][2].user
    with pytest.raises(InputError, match=f"GRU, random candidates: the scores of user '{user}'"):
        write_scores(tmp_path / "out", "GRU", {"random": scores}, sets, held, configs)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected \\(6, 4\\)"):
        write_scores(tmp_path / "out", "GRU", {"random": scores[:5]}, sets, held, configs)


def test_another_run_is_not_overwritten(world, tmp_path):
    words, _, _ = world
    configs, held, sets = read(words, tmp_path / "out")
    zeros = np.zeros((6, 4))
    write_scores(tmp_path / "out", "zeros", {"random": zeros}, sets, held, configs)
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    with pytest.raises(InputError, match="is not an empty folder"):
        write_scores(tmp_path / "out", "ones", {"random": zeros + 1}, sets, held, configs)
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before
