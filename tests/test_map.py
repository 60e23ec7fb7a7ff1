"""The map of three experiments: its page, its wrong labels and posters, its verdicts by hand, and a
run on a few users that goes on.
"""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import toy
from PIL import Image

from hanorec.base.config import DpoConfig
from hanorec.base.errors import InputError
from hanorec.base.files import sha256
from hanorec.datasets.catalog import load_catalog
from hanorec.losses import dpo_loss, preference_logit
from hanorec.mllm.tasks import preferences
from hanorec.studies import map as study
from hanorec.studies import (
    map_claims,
    map_experiments,
    map_rows,
    map_tables,
    map_world,
    plots_map,
    runs,
)
from hanorec.studies.map_claims import Estimate, Order, Part, Prediction, estimate, judge, verdict
from hanorec.studies.map_labels import (
    exchange_posters,
    hardness_gaps,
    swapped,
    told_wrong,
    wrong_preferences,
)
from hanorec.studies.map_noise import cosines
from hanorec.studies.map_predictions import MIDDLE, exchanged_cell, tuned_cell
from hanorec.studies.map_rows import (
    BETA0,
    CONTROL,
    GRID,
    TUNED,
    WrongLabels,
    epoch_cell,
    epoch_run,
)
from hanorec.studies.map_world import World, measures

PAGE = Path(__file__).parent.parent / "docs" / "map.md"
READS = [1, 2, 3]
PLACES = ["--model", "M", "--data", "D"]


# ---- predictions and page ----


def all_predictions():
    found = []
    for experiment in map_rows.SEEDS:
        found += map_tables.predictions(experiment, map_rows.READS)
    return found


def test_the_page_has_every_prediction_in_its_words():
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    for prediction in all_predictions():
        assert f"- **{prediction.name}** {prediction.text}." in page
    assert page.count("- **E") == len(all_predictions())


def test_the_page_has_the_sizes():
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    for stage, said in (
        ("noise", "2 epochs, 28 steps of 32; 5 seeds"),
        ("labels", "1 epoch, 28 steps of 32, β0 = 0.1; 3 seeds"),
        ("over", "64 epochs at a constant rate, 128 steps of 16"),
    ):
        flags = study.STAGES[stage][0]
        own = map_rows.OWN[stage][0]
        found = runs.settings(runs.TRAINING["train_dpo"], [*PLACES, *flags, *own])
        size = found["micro_batch"] * found["accumulation"]
        assert said in page and f"of {size}" in said and f"{found['epochs']} epoch" in said


def test_every_row_is_a_command_of_its_own():
    for stage, rows in map_rows.OWN.items():
        kinds = [runs.TRAINING["train_dpo"], [*PLACES, *study.STAGES[stage][0]]]
        found = [runs.settings(kinds[0], [*kinds[1], *own]) for own in rows]
        assert all(one not in found[:i] for i, one in enumerate(found))
    for cells in (map_rows.noise_cells(), map_rows.epoch_runs()):
        assert len({runs.folder_name(cell) for cell in cells}) == len(cells)


# ---- wrong labels ----


def test_which_labels_are_wrong():
    """Ten pairs: the hardest three are numbers 4, 1 and 7, the easiest 2, 9 and 0."""
    delta = np.array([0.8, 0.1, 0.99, 0.5, 0.05, 0.6, 0.4, 0.2, 0.3, 0.9])
    for which, group in (("hardest", {4, 1, 7}), ("easiest", {2, 9, 0})):
        drawn = []
        for rho, count in ((0.0, 0), (0.4, 1), (0.7, 2), (1.0, 3)):
            found = told_wrong(delta, WrongLabels(which, rho), seed=1)
            assert len(found) == count and set(found) <= group and list(found) == sorted(found)
            drawn.append(set(found))
        assert drawn[1] < drawn[2] < drawn[3]
    one_each = {tuple(told_wrong(delta, WrongLabels("hardest", 0.4), seed)) for seed in range(20)}
    assert len(one_each) == 3


def test_wrong_preferences_are_pairs_the_other_way_round(data, checkpoints):
    """Half of the hardest 30% of 24 pairs, by the oracle's Delta: 4 of 7, and nothing else."""
    _, builder, examples = toy.source_of(data, checkpoints)
    right = preferences(builder, examples, 7)
    found = wrong_preferences(WrongLabels("hardest", 0.5))(builder, examples, 7, 1, "random")
    changed = [i for i in range(len(right)) if found[i].chosen != right[i].chosen]

    e, _, _ = builder.neighbors(10, "input")
    scores, index = oracle.topk_neighbors(e.double().numpy(), 10)
    delta = [
        oracle.cluster_gap(e.double().numpy(), scores, index, one.chosen, one.rejected[0])
        for one in right]
    np.testing.assert_allclose(
        hardness_gaps(builder, right, DpoConfig()).numpy(), delta, atol=1e-5)
    assert len(changed) == 4 and set(changed) <= set(np.argsort(delta)[:7].tolist())
    for i in changed:
        assert (found[i].chosen, found[i].rejected) == (right[i].rejected[0], [right[i].chosen])
        assert found[i].row.answers == right[i].row.answers[::-1]
        assert swapped(found[i]).row.answers == right[i].row.answers
    same = hardness_gaps(builder, [found[i] for i in changed], DpoConfig())
    torch.testing.assert_close(same, hardness_gaps(builder, right, DpoConfig())[changed])

    with pytest.raises(InputError, match="--rejected 2"):
        wrong_preferences(WrongLabels("hardest", 0.5))(builder, examples, 7, 2, "random")


def test_a_wrong_label_pulls_the_other_way():
    """h of the swapped pair is -h, so at h = 0 its pull is the opposite one."""
    logs = torch.tensor([-1.0, -1.0, -2.0, -2.0], dtype=torch.float64, requires_grad=True)
    right = preference_logit(logs[0], logs[1], logs[2], logs[3])
    wrong = preference_logit(logs[1], logs[0], logs[3], logs[2])
    pulls = [torch.autograd.grad(dpo_loss(h, 0.1), logs)[0] for h in (right, wrong)]
    torch.testing.assert_close(pulls[0], -pulls[1])
    assert pulls[0].abs().sum() > 0


# ---- exchanged posters ----


def test_half_of_the_posters_hang_elsewhere(data, tmp_path):
    out = tmp_path / "exchanged"
    exchange_posters(str(data), out, seed=3)
    before, after = load_catalog(data), load_catalog(out)
    assert before.ids == after.ids and before.titles == after.titles
    shown = [[sha256(path) for path in one.images] for one in (before, after)]
    moved = [a != b for a, b in zip(*shown, strict=True)]
    assert sum(moved) == len(moved) // 2 and sorted(shown[0]) == sorted(shown[1])
    again = tmp_path / "again"
    exchange_posters(str(data), again, seed=3)
    assert [sha256(path) for path in load_catalog(again).images] == shown[1]
    for name in ("train.tsv", "val.tsv", "test.tsv"):
        assert (data / name).read_bytes() == (out / name).read_bytes()
    assert not list(out.glob("features-*")) and not list(out.glob("candidates_*"))


def test_posters_of_several_formats_keep_theirs(data, tmp_path):
    world = tmp_path / "data"
    shutil.copytree(data, world)
    for path in sorted((world / "images").iterdir())[::3]:
        Image.open(path).convert("RGB").save(path.with_suffix(".jpg"))
        path.unlink()
    exchange_posters(str(world), tmp_path / "out", seed=0)
    for path in load_catalog(tmp_path / "out").images:
        with Image.open(path) as image:
            assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]


def test_too_few_posters_are_refused(data, tmp_path):
    world = tmp_path / "data"
    shutil.copytree(data, world)
    for path in sorted((world / "images").iterdir())[3:]:
        path.unlink()
    with pytest.raises(InputError, match="3 items have an image, expected at least 4"):
        exchange_posters(str(world), tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


# ---- measures and verdicts by hand ----


def test_measures_of_a_user():
    """log pi - log pi_ref is 1, 3, 1, 0 for the target and three others: h = -2, 0, 1."""
    users = [{"target": "a", "candidates": ["a", "b", "c", "d"]}]
    found = measures(users, [0.5], [[-2.0, -1.0, -5.0, -4.0]], [[-3.0, -4.0, -6.0, -4.0]])
    assert found["NDCG@3"] == [0.5]
    assert found["h"] == pytest.approx([-1 / 3]) and found["accuracy"] == pytest.approx([0.5])


def cells_of(**values):
    """Cell -> seeds of measures, from cell=(values of users of seed 1, of seed 2)."""
    return {cell: [{"h": list(users)} for users in seeds] for cell, seeds in values.items()}


def test_an_interval_covers_users_and_seeds():
    """Differences of the users: (2, 2) and (4, 4). Student's: 3 +- 12.71 * sqrt 2 / sqrt 2, wider
    than that over users, which lies within 2 .. 4; with one seed there is that over users alone.
    """
    cells = cells_of(a=([3, 4], [5, 6]), b=([1, 2], [1, 2]))
    part = Part("h", {"a": 1.0, "b": -1.0})
    assert estimate(cells, part, shared=False) == pytest.approx((3, 3 - 12.71, 3 + 12.71))
    alone = {cell: seeds[:1] for cell, seeds in cells.items()}
    assert estimate(alone, part, shared=False) == pytest.approx((2, 2, 2))
    half = Part("h", {"a": 1.0, "b": -0.5})
    assert estimate(alone, half, shared=False).mean == pytest.approx(3.5 - 0.75)
    even = cells_of(a=([0, 6], [0, 6]))
    over_users = estimate(even, Part("h", {"a": 1.0}), shared=False)
    assert over_users.low < 1 and over_users.high > 5  # the seeds do not differ, the users do


def test_points_are_percent():
    cells = {"a": [{"NDCG@3": [0.25, 0.25]}]}
    assert estimate(cells, Part("NDCG@3", {"a": 1.0}), shared=True) == pytest.approx((25, 25, 25))


def test_order_of_cells():
    """Spearman of (1, 2, 3) with (1, 2, 3) and with (1, 3, 2): 1 and 1/2."""
    rows = zip("abc", (1, 2, 3), (1, 3, 2), strict=True)
    cells = {
        name: [{"x": [x], "y": [x]}, {"x": [x], "y": [y]}] for name, x, y in rows}
    order = Order(("x", "y"), ["a", "b", "c"], 0.8)
    assert estimate(cells, order, shared=False).mean == pytest.approx(0.75)
    alone = {cell: seeds[:1] for cell, seeds in cells.items()}
    found = estimate(alone, order, shared=False)
    assert found.mean == pytest.approx(1) and verdict(found, order) == "undecided"


@pytest.mark.parametrize(("low", "high", "said"), [
    (0.1, 0.4, "held"), (-0.1, 0.4, "undecided"), (0.1, 0.6, "undecided"), (-1, 1, "undecided"),
    (-0.4, -0.1, "failed"), (0.6, 0.7, "failed"),
])
def test_verdicts(low, high, said):
    assert verdict(Estimate((low + high) / 2, low, high), Part("h", {}, 0.0, 0.5)) == said


def test_the_weakest_part_decides():
    cells = cells_of(a=([1, 1],), b=([0, 2],))
    held, failed = Part("h", {"a": 1.0}, low=0.5), Part("h", {"a": 1.0}, high=0.5)
    open_ = Part("h", {"b": 1.0}, low=0.5)
    for parts, said in (
        ([held, held], "held"), ([held, open_], "undecided"), ([open_, held, failed], "failed"),
    ):
        assert judge(cells, Prediction("", "", parts), shared=False)[0] == said


# ---- a whole page from figures made up ----


@pytest.fixture
def quick(monkeypatch):
    """Intervals from the smallest to the largest value, where their size is not what is tested."""
    monkeypatch.setattr(map_claims, "bootstrap_interval", lambda rows: (rows.min(), rows.max()))


def made_up(experiment):
    """Results of an experiment in the form of OUT/E*.json: two seeds of five users."""
    cells = []
    if experiment == "E1":
        cells = list(map_rows.noise_cells())
    elif experiment == "E2":
        for labels in map_rows.LABELS:
            cells += [map_rows.label_cell(row, labels) for row in map_rows.WEIGHTS]
    else:
        for run in map_rows.epoch_runs():
            cells += [epoch_cell(run, epoch) for epoch in READS]
        cells.append(f"{epoch_run(CONTROL, 'random', BETA0)}, {MIDDLE}")
        for negatives in GRID:
            for row in TUNED:
                cells += [tuned_cell(row, negatives), exchanged_cell(row, negatives)]
    rng = np.random.default_rng(0)
    names = ["NDCG@3", "accuracy", "h", "cosine, start", "cosine, end"]
    chosen = {tuned_cell(*key): ("a run", 2) for key in itertools.product(TUNED, GRID)}
    found = {}
    for cell in cells:
        values = rng.random((2, len(names), 5)).tolist()
        found[cell] = [dict(zip(names, of_seed, strict=True)) for of_seed in values]
    return {
        "reads": READS, "shared": False, "seeds": [1, 2], "cpu_seconds": 7200.0, "chosen": chosen,
        "run": {"pairs": 48, "steps": 192, "epochs": 64}, "cells": found,
    }


def test_the_page_judges_everything_that_is_finished(quick):
    text = map_tables.page({"E1": made_up("E1"), "E3": made_up("E3")})
    for prediction in all_predictions():
        assert text.count(f"{prediction.name} | ") == (0 if prediction.name[:2] == "E2" else 1)
    assert text.count("48 pairs, 192 steps, 64 epoch(s) a run; 2 seed(s), 10 users") == 2
    assert "2.0 CPU hours" in text and "\nliteral, σ 0.05 | " in text
    assert "β-DPO, none wrong" not in map_tables.page({"E2": made_up("E2")})


@pytest.mark.parametrize(("experiment", "begin"), [
    ("E1", "row | cosine, start"), ("E2", "labels | row"), ("E3", "NDCG@3, validation"),
])
def test_figures(experiment, begin, tmp_path, quick):
    """Drawn from the page that the study writes, and from the one in docs/."""
    page = tmp_path / "map.md"
    page.write_text(map_tables.page({experiment: made_up(experiment)}), encoding="utf-8")
    name, draw = plots_map.DRAWN[begin]
    text = PAGE.read_text(encoding="utf-8")
    for source in (page.read_text(encoding="utf-8"), text):
        figure = draw(plots_map.find_table(source, begin))
        assert f"map, {experiment}: " in figure.get_suptitle()
        assert all(axis.get_xlabel() for axis in figure.axes) and figure.axes[0].get_ylabel()
        lines = figure.axes[-1].get_legend_handles_labels()[1]
        assert len(lines) == len(set(lines)) >= 5
        looks = set()
        for container in figure.axes[-1].containers:
            line = container.lines[0]
            looks.add((line.get_linestyle(), line.get_marker(), line.get_color()))
        assert len(looks) == len(lines)
    plots_map.main([str(page), str(tmp_path)])
    with Image.open(tmp_path / name) as image:
        assert image.mode == "P"
    assert len(list(tmp_path.glob("*.png"))) == 1  # no table of the others


def test_a_figure_has_the_figures_of_its_table():
    text = "row | cosine, start | cosine, end | clean h | accuracy\n---|---|---|---|---\n"
    text += "DPO | 1.00 [1.00, 1.00] | 0 | 4.19 [3.72, 4.67] | 79\nnoise | 0.50 | 0 | -2.00 | 5\n"
    table = plots_map.find_table(f"{text}\nother | table\n", "row | cosine, start")
    assert [len(cells) for cells in table] == [5, 5, 5]
    (axis,) = plots_map.draw_noise(table).axes
    first, second = axis.containers
    assert first.lines[0].get_xydata().tolist() == [[1, 4.19]]
    low, high = first.lines[2][1].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((3.72, 4.67))
    assert second.lines[0].get_xydata().tolist() == [[0.5, -2]]


def test_nothing_to_draw(tmp_path):
    page = tmp_path / "map.md"
    page.write_text("DPO | 1.00\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"map\.md: no table of an experiment"):
        plots_map.main([str(page), str(tmp_path)])


# ---- runs ----

OWN = [
    *toy.SHORT, "--users-from", "0", "--users-to", "1", "--targets-per-user", "1",
    "--micro-batch", "4", "--accumulation", "2", "--learning-rate", "1e-3", "--lora-dropout", "0",
]


@pytest.fixture(scope="module")
def world(checkpoints, data, tmp_path_factory):
    """A seed on the tiny checkpoint, with its SFT."""
    folder = tmp_path_factory.mktemp("map")
    shutil.copytree(data, folder / "data")
    made = World(
        folder / "seed-5", str(checkpoints["qwen2_5_vl"]), str(folder / "data"), 5,
        [*OWN, "--epochs", "1"], [*toy.SHORT, "--neighbors", "20", "--batch", "12"])
    made.make()
    return made


def test_wrong_labels_reach_the_run_and_its_reference(world, monkeypatch):
    monkeypatch.setattr(map_experiments, "WEIGHTS", {
        row: map_rows.WEIGHTS[row] for row in (CONTROL, "standardised")})
    labels = "hardest, ρ 0.5"
    monkeypatch.setattr(map_experiments, "LABELS", {labels: map_rows.LABELS[labels]})
    flags = [*OWN, "--epochs", "1"]
    cells = map_experiments.run_labels([world], flags)
    assert len(cells) == 2 and all(len(one[0]["h"]) == 24 for one in cells.values())
    folder = world.folder("E2", map_rows.label_cell("standardised", labels))
    settings = json.loads((folder / "run.json").read_text())["settings"]
    control = runs.folder_name(map_rows.label_cell(CONTROL, labels))
    assert Path(settings["reference"]).parent.name == control

    lines = (Path(world.data) / "train.tsv").read_text().splitlines()
    chose = {user: items.split()[-1] for user, items in (line.split("\t") for line in lines)}
    wrong = []
    for line in (folder / "pairs.tsv").read_text().splitlines()[1:]:
        user, chosen, rejected, *_ = line.split("\t")
        assert chose[user] in (chosen, rejected)
        wrong.append(chosen != chose[user])
    assert (sum(wrong), len(wrong)) == (4, 24)

    monkeypatch.setattr(map_world, "script", lambda name: pytest.fail(f"{name} ran again"))
    assert map_experiments.run_labels([world], flags) == cells


def test_a_long_run_read_early_is_the_short_run(world, monkeypatch):
    """E3's: the adapter kept after epoch 1 of 3 is, to the bit, that of a run of one epoch, since
    the rate is constant; by the cosine it is not. And the best setting is chosen on validation.
    """
    monkeypatch.setattr(map_rows, "TUNED", {CONTROL: TUNED[CONTROL]})
    monkeypatch.setattr(map_rows, "GRID", {"random": (BETA0,)})
    for name in ("TUNED", "GRID"):
        monkeypatch.setattr(map_experiments, name, getattr(map_rows, name))
    constant = [*OWN, "--schedule", "constant"]
    cells, chosen = map_experiments.run_epochs([world], constant, READS)
    run = epoch_run(CONTROL, "random", BETA0)
    long = world.folder("E3", run)
    assert toy.furthest(long / "epoch-3", long) == 0 < toy.furthest(long / "epoch-2", long)

    short = [*map_rows.epoch_runs()[run][1], "--epochs", "1"]
    for schedule, flags in (("constant", constant), ("cosine", OWN)):
        alone = world.policy("short", schedule, [*flags, *short])
        assert (toy.furthest(alone, long / "epoch-1") == 0) == (schedule == "constant")

    on_validation = [np.mean(cells[epoch_cell(run, epoch)][0]["NDCG@3"]) for epoch in READS]
    assert chosen[tuned_cell(CONTROL, "random")] == (run, READS[int(np.argmax(on_validation))])
    assert cells[f"{run}, {MIDDLE}"] == cells[epoch_cell(run, 2)]
    assert cells[tuned_cell(CONTROL, "random")] != cells[exchanged_cell(CONTROL, "random")]


def test_a_killed_run_still_keeps_its_epochs(world, monkeypatch):
    """Killed within epoch 3, after it had kept 1 and 2; it goes on, and ends in the same."""
    flags = [
        *OWN, "--ablation", "dpo", "--schedule", "constant", "--epochs", "3",
        "--keep-epochs", "1", "3", "--save-every", "2"]
    whole = world.policy("killed", "whole", flags)
    script, calls = map_world.script, []

    def stopping(name):
        module = script(name)
        update = module.Run.update

        def update_or_die(self, *args):
            calls.append(1)
            if len(calls) == 8:
                raise KeyboardInterrupt
            return update(self, *args)

        monkeypatch.setattr(module.Run, "update", update_or_die)
        return module

    with monkeypatch.context() as patch:
        patch.setattr(map_world, "script", stopping)
        with pytest.raises(KeyboardInterrupt):
            world.policy("killed", "twice", flags)
    out = world.folder("killed", "twice")
    assert (out / "epoch-1" / "adapter_config.json").exists() and not (out / "epoch-3").exists()
    world.policy("killed", "twice", flags)
    for part in ("epoch-1", "epoch-3", "."):
        assert toy.furthest(out / part, whole / part) == 0


@pytest.mark.parametrize("epochs", [["0"], ["1", "4"]])
def test_epochs_that_do_not_come_are_refused(epochs):
    flags = [*PLACES, "--epochs", "3", "--keep-epochs", *epochs]
    with pytest.raises(InputError, match=rf"--keep-epochs {epochs[-1]}: expected epochs of 1 .. 3"):
        runs.settings(runs.TRAINING["train_sft"], flags)


def test_cosines(world):
    """Of clean DPO with itself 1; of noise that is next to nothing, near it; of much, less."""
    clean = world.dpo_flags([*OWN, "--ablation", "dpo"])
    assert cosines(clean, clean, None) == pytest.approx([1, 1, 1], abs=1e-5)
    found = []
    for sigma in ("1e-6", "0.3"):
        noisy = world.dpo_flags([*OWN, "--ablation", "no_hars", "--sigma", sigma])
        found.append(np.mean(cosines(noisy, clean, None)))
    assert found[0] == pytest.approx(1, abs=1e-3) and found[1] < 0.9
    release = world.dpo_flags([*OWN, *map_rows.NOISY["forward, noisy R, η a micro-batch"]])
    assert all(map(math.isfinite, cosines(release, clean, None)))


# ---- the command ----


@pytest.mark.parametrize(("flags", "words"), [
    (["--seeds", "0"], "expected 1 .. 10"),
    (["--reads", "1", "4"], "at least three epochs"),
    (["--reads", "4", "1", "16"], "ascending"),
    (["--data", "D"], "expected both"),
    (["--noise", "--sigma 0.2"], "holds --sigma"),
    (["--over", "--clip 1 --epochs=2"], "holds --epochs=2"),
    (["--test", "--split val"], "holds --split"),
])
def test_what_does_not_go_together(flags, words, tmp_path):
    with pytest.raises(InputError, match=words):
        study.main(["--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_wrong_flag_ends_the_command_before_it_trains(tmp_path, capfd):
    with pytest.raises(SystemExit):
        study.main(["--out", str(tmp_path / "out"), "--over", "--rate 1"])
    assert "--rate" in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.long
def test_the_whole_command_goes_on(world, tmp_path, monkeypatch):
    """All three experiments on 24 users; an evaluation is lost, and done again, and nothing else.
    """
    short = " ".join([*OWN, "--epochs", "1"])
    argv = [
        "--out", str(tmp_path), "--model", world.model, "--data", world.data, "--seeds", "1",
        "--reads", "1", "2", "3", "--sft", short, "--noise", short, "--labels", short,
        "--over", " ".join(OWN), "--test", " ".join([*toy.SHORT, "--neighbors", "20"]),
    ]
    study.main(argv)
    before = [(tmp_path / f"{name}.json").read_text() for name in map_rows.SEEDS]
    page = (tmp_path / "map.md").read_text()
    assert page.count("**E") == 3
    next(tmp_path.rglob("E2/test/ratio-none-wrong/run.json")).unlink()
    script, ran = map_world.script, []
    monkeypatch.setattr(map_world, "script", lambda name: ran.append(name) or script(name))
    study.main(argv)
    assert ran == ["evaluate"]
    again = [(tmp_path / f"{name}.json").read_text() for name in map_rows.SEEDS]
    for one, other in zip(before, again, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert one["cells"] == other["cells"] and one["chosen"] == other["chosen"]
