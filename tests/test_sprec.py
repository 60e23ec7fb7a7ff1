"""SPRec: what the policy picks (SP-1), the plan of the rounds (SP-2), and the file between them."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import toy

import train_dpo
import train_sft
from hanorec import export
from hanorec.base.command import run
from hanorec.base.config import DataConfig, DpoConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.files import sha256
from hanorec.base.settings import parse
from hanorec.baselines import picking
from hanorec.baselines.sprec import pick_items, plan, self_play
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.frozen import save_candidates, save_rows
from hanorec.datasets.interactions import Example, load_interactions, training_examples
from hanorec.datasets.picks import load_picks, save_picks
from hanorec.lora.loading import attach_policy
from hanorec.lora.stack import remove_adapters
from hanorec.mllm.tasks import preferences

MAINS = {
    "picking": picking.main,
    "train_sft": train_sft.main,
    "train_dpo": train_dpo.main,
    "export": export.main,
}
TRAINING = [ModelConfig, DataConfig, TrainConfig]
KINDS = {
    "picking": [*TRAINING, picking.PickConfig],
    "train_sft": TRAINING,
    "train_dpo": [*TRAINING, DpoConfig],
}


# ---- SP-1 ----


@pytest.mark.equation("SP-1")
def test_the_pick_is_the_best_of_the_wrong_candidates():
    """By a loop over all wrong candidates; ties are frequent, and go to the first."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.integers(-4, 0, 6).astype(float)
        target = int(rng.integers(6))
        best = None
        for place in range(6):
            if place != target and (best is None or scores[place] > scores[best]):
                best = place
        assert self_play(scores, target) == best
    assert self_play(np.array([-1e30, 0.0]), 1) == 0  # the only other one, however bad


@pytest.mark.equation("SP-1")
def test_a_sampled_pick_is_drawn_from_the_softmax_of_the_wrong_candidates():
    """1,000 examples with the same scores: each share within four standard deviations."""
    scores, n = np.array([0.0, 3.0, 1.0, -1.0]), 1000
    examples = [Example("u", (i,), 1, (), (0, 1, 2, 3)) for i in range(n)]
    picks = pick_items(examples, np.tile(scores, (n, 1)), "sample", [0, 0])
    weights = [math.exp(x) for x in (0, 1, -1)]
    for item, weight in zip((0, 2, 3), weights, strict=True):
        p = weight / sum(weights)
        assert abs(picks.count(item) / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert 1 not in picks
    some = pick_items(examples[5:9], np.tile(scores, (4, 1)), "sample", [0, 0])
    assert some == picks[5:9]  # an example's draw is its own
    assert pick_items(examples, np.tile(scores, (n, 1)), "sample", [0, 1]) != picks


def test_a_broken_policy_picks_nothing():
    example = Example("u7", (0,), 1, (), (0, 1, 2))
    with pytest.raises(InputError, match="user 'u7': .*nan.*expected finite numbers"):
        pick_items([example], np.array([[0.0, math.nan, 1.0]]), "best", [0])


# ---- SP-2 ----


@pytest.mark.equation("SP-2")
def test_the_plan_chains_the_policies(tmp_path):
    stages, last = plan(tmp_path, "S", "M", ["--data", "D", "--users-to", "0.5"], 3, users_seed=7)
    configs, rounds = [], [stages[i : i + 4] for i in (0, 4, 8)]
    policy = "S"
    for t, (picks, tuned, played, joined) in enumerate(rounds, 1):
        names = [stage.name for stage in (picks, tuned, played, joined)]
        assert names == ["picking", "train_sft", "train_dpo", "export"]
        for stage in (picks, tuned, played):
            found = parse(KINDS[stage.name], [*stage.flags, "--out", str(stage.out)])
            configs.append(found)
            assert found[1].users_to == 0.5 and found[1].users_seed == 7 + t
            assert found[2].epochs == 1 and found[2].learning_rate == 2e-5
        picker, tuner, player = configs[-3:]
        assert picker[2].sft == tuner[2].sft == policy  # pi_{t-1} picks and is tuned
        assert player[2].sft == str(tuned.out)  # the reference is the policy after SFT
        assert player[3].negatives == str(picks.out / "picks.json")
        assert player[3].ablation == "dpo"
        assert joined.flags == ["--model", "M", "--adapter", str(played.out)]
        policy = str(joined.out)
    assert last == policy
    previous = [found[3].previous for found in configs[::3]]
    assert previous == [None] + [str(r[0].out / "picks.json") for r in rounds[:2]]
    assert all(a != b for a, b in pairwise(sorted(stage.out for stage in stages)))


@pytest.mark.equation("SP-2")
def test_no_round_is_the_sft_policy_and_the_control_differs_in_its_negatives_alone(tmp_path):
    assert plan(tmp_path, "S", "M", [], rounds=0) == ([], "S")
    played, _ = plan(tmp_path, "S", "M", [], 2)
    control, _ = plan(tmp_path, "S", "M", [], 2, pick="random")
    trained = [stage for stage in played if stage.name != "picking"]
    for one, other in zip(trained, control, strict=True):
        flags = [*one.flags]
        if one.name == "train_dpo":
            flags[flags.index("--negatives") + 1] = "random"
        assert one._replace(flags=flags) == other


@pytest.fixture(scope="module")
def rounds(data, checkpoints, sft, tmp_path_factory):
    """The stages of round 1 and the picking of round 2, all of them run. No dropout: policy =
    reference in DPO's first step."""
    flags = [
        "--data", str(data), *toy.SHORT, "--targets-per-user", "1", "--users-to", "0.75",
        "--learning-rate", "2e-2", "--lora-dropout", "0",
    ]
    here = tmp_path_factory.mktemp("rounds")
    stages, _ = plan(here, str(sft), str(checkpoints["qwen2_5_vl"]), flags, 2)
    for stage in stages[:5]:
        MAINS[stage.name]([*stage.flags, "--out", str(stage.out)])
        assert (stage.out / stage.last).exists()
    return stages[:5]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_picks_are_the_best_scored_and_go_into_the_pairs(rounds, data, checkpoints, sft):
    """The scores in the file are the policy's own; the pick is the best of the wrong ones; DPO is
    trained on just these pairs, and their order is the picking pass's.
    """
    picks, _, played, *_ = rounds
    rows = read(picks.out / "picks.json")["rows"]
    assert len(rows) == 18
    for row in rows:
        scores = dict(zip(row["candidates"], row["scores"], strict=True))
        assert scores.pop(row["target"]) is not None
        assert row["rejected"] == max(scores, key=scores.get)

    options = {"users_to": 0.75, "users_seed": 2026}
    backbone, source, examples = toy.source_of(data, checkpoints, **options)
    attach_policy(backbone.model, sft)
    backbone.model.eval()
    for row, example in list(zip(rows, examples, strict=True))[:3]:
        prompt = source.ranking_row(example, example.candidates)
        own = toy.log_probs_alone(backbone, prompt, source.pictures)[0].tolist()
        assert row["scores"] == pytest.approx(own, abs=1e-4)

    remove_adapters(backbone.model)
    pairs = preferences(source, examples, 2025, kind=str(picks.out / "picks.json"))
    names = [source.catalog.ids[pair.rejected[0]] for pair in pairs]
    assert names == [row["rejected"] for row in rows]
    others = [pair.rejected for pair in preferences(source, examples, 2025)]
    assert [pair.rejected for pair in pairs] != others  # random ones are others
    assert read(played.out / "run.json")["pairs"] == 18


def test_the_reference_is_the_policy_after_sft(rounds):
    """So the first step's loss is ln 2, without noise and dropout."""
    _, tuned, played, *_ = rounds
    first = json.loads((played.out / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-6)
    below = read(played.out / "run.json")["inputs"]["adapter"]
    assert below == sha256(tuned.out / "adapter_model.safetensors")


def test_another_policy_picks_others(rounds):
    """Round 2 looks at some of the same prompts; the log says how many, and how many picks stayed.
    """
    first, *_, second = rounds
    facts = read(second.out / "run.json")
    before, after = {}, {}
    for stage, found in ((first, before), (second, after)):
        for row in read(stage.out / "picks.json")["rows"]:
            found[row["user"], row["target"]] = row["rejected"]
    both = before.keys() & after.keys()
    assert facts["picked_before"] == len(both) >= 12  # 18 and 18 of 24 users
    equal = sum(before[key] == after[key] for key in both)
    assert facts["equal_picks"] == pytest.approx(equal / len(both)) and 0 < equal < len(both)
    none = read(first.out / "run.json")
    assert (none["picked_before"], none["equal_picks"]) == (0, None)


def test_one_seed_one_run(rounds, tmp_path):
    """Round 1 once more, elsewhere: the same picks and the same policy, to the bit."""
    for stage in rounds[:3]:
        flags = [word.replace(str(stage.out.parent), str(tmp_path)) for word in stage.flags]
        MAINS[stage.name]([*flags, "--out", str(tmp_path / stage.out.name)])
        for name in ("picks.json", "adapter_model.safetensors"):
            if (stage.out / name).exists():
                assert sha256(stage.out / name) == sha256(tmp_path / stage.out.name / name)


# ---- the file ----


@pytest.fixture(scope="module")
def picked(data):
    """(catalogue, examples with candidates, a pick for each, their scores)."""
    catalog = load_catalog(data)
    examples = training_examples(load_interactions(data, catalog), 1, 2)
    examples = draw_candidates(examples, catalog, 3)
    scores = np.random.default_rng(0).normal(size=(len(examples), 4))
    return catalog, examples, pick_items(examples, scores, "best", [0]), scores


def test_picks_come_back_as_they_were_kept(picked, tmp_path):
    catalog, examples, picks, scores = picked
    save_picks(tmp_path / "picks.json", examples, scores, picks, catalog)
    assert load_picks(tmp_path / "picks.json", examples, catalog) == picks
    rows = read(tmp_path / "picks.json")["rows"]
    assert [row["scores"] for row in rows] == scores.tolist()


def without_a_row(rows):
    rows.pop(3)


def twice(rows):
    rows[4] = rows[3]


def the_target(rows):
    rows[2]["rejected"] = rows[2]["target"]


def no_candidate(rows):
    rows[2]["rejected"] = next(row["target"] for row in rows if row["target"] not in
                               rows[2]["candidates"])


def other_candidates(rows):
    rows[2]["candidates"].reverse()


def no_object(rows):
    rows[2] = 5


@pytest.mark.parametrize(("spoil", "words"), [
    (without_a_row, "23 rows, expected 24, one an example"),
    (twice, "row 5: user is '.*', expected '.*'"),
    (the_target, "row 3: rejected is '.*', expected a candidate other than the target"),
    (no_candidate, "row 3: rejected is '.*', expected a candidate other than the target"),
    (other_candidates, "row 3: candidates is .*, expected"),
    (no_object, "row 3: user is None, expected"),
])
def test_picks_that_do_not_fit_are_refused(picked, tmp_path, spoil, words):
    catalog, examples, picks, scores = picked
    path = tmp_path / "picks.json"
    save_picks(path, examples, scores, picks, catalog)
    stored = read(path)
    spoil(stored["rows"])
    save_rows(path, stored["rows"], stored["facts"])
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: {words}.*pick again"):
        load_picks(path, examples, catalog)


def test_picks_of_other_data_or_another_kind_are_refused(picked, tmp_path):
    catalog, examples, picks, scores = picked
    path = tmp_path / "picks.json"
    save_picks(path, examples, scores, picks, catalog)
    stored = read(path)
    save_rows(path, stored["rows"], stored["facts"] | {"data_sha256": "0" * 64})
    with pytest.raises(InputError, match="data_sha256 is '0000.*pick again"):
        load_picks(path, examples, catalog)
    path.write_text(path.read_text().replace('"rejected":"', '"rejected":"1', 1))
    with pytest.raises(InputError, match="the file was edited; pick again"):
        load_picks(path, examples, catalog)
    save_candidates(path, examples, catalog, kind="random")
    with pytest.raises(InputError, match="kind is 'random' in the file, expected 'picks'"):
        load_picks(path, examples, catalog)
    path.write_text('{"rows": []}')
    with pytest.raises(InputError, match="not a picks file"):
        load_picks(path, examples, catalog)


def test_a_pick_with_the_title_of_the_target_is_refused(data, checkpoints, tmp_path):
    _, source, examples = toy.source_of(data, checkpoints, users_to=0.25)
    path, picks = tmp_path / "picks.json", []
    for example in examples:
        picks.append(next(c for c in example.candidates if c != example.target))
    save_picks(path, examples, np.zeros((len(examples), 4)), picks, source.catalog)
    titles = [*source.catalog.titles]
    titles[picks[0]] = titles[examples[0].target]
    alike = replace(source, catalog=replace(source.catalog, titles=tuple(titles)))
    with pytest.raises(InputError, match="have one title"):
        preferences(alike, examples, 2025, kind=str(path))


@pytest.mark.parametrize(("flags", "words"), [
    (["--negatives", "nearest"], "--negatives 'nearest': expected random, same, chns, or a file"),
    (["--negatives", "PICKS", "--rejected", "2"], "--rejected 2 with --negatives .*: expected 1"),
    (["--negatives", "none.json"], "none.json: no such file"),
    (["--negatives", "PICKS", "--seed", "7"], "picks.json: row .*: candidates is .*pick again"),
    (["--negatives", "PICKS", "--users-to", "0.5"], "picks.json: 18 rows, expected 12"),
])
def test_commands_refuse_picks_that_do_not_fit(rounds, tmp_path, capfd, flags, words):
    """One line, exit code 2, and no adapter; the stage's own flags come first, these win."""
    picks, _, played, *_ = rounds
    flags = [str(picks.out / "picks.json") if word == "PICKS" else word for word in flags]
    with pytest.raises(SystemExit) as caught:
        run(lambda: train_dpo.main([*played.flags, *flags, "--out", str(tmp_path / "out")]))
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and last.startswith("error: ") and re.search(words, last), last
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_picking_refuses_what_train_dpo_refuses(rounds, tmp_path, capfd):
    """No adapter, another file for the round before, and a folder that has its picks."""
    stage = rounds[0]
    missing, finished = str(tmp_path / "none"), str(stage.out)
    log = str(stage.out / "run.json")
    for flags, words in (
        (["--sft", missing, "--out", str(tmp_path / "a")], "--sft: .*no such file"),
        (["--previous", log, "--out", str(tmp_path / "b")], "run.json: not a picks file"),
        (["--out", finished], "holds a finished run"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(lambda flags=flags: picking.main([*stage.flags, *flags]))
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and re.search(words, last), last
