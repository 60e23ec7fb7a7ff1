"""`--images none`: titles alone, in every stage; no image is looked at, none is needed."""

import json
import shutil

import numpy as np
import pytest
import torch
import toy
from torch.nn import functional as F

import evaluate
import train_dpo
import train_sft
from hanorec import check
from hanorec.base.config import DataConfig, ModelConfig
from hanorec.base.errors import InputError
from hanorec.datasets.interactions import heldout_examples, load_interactions
from hanorec.lora.loading import attach_policy
from hanorec.mllm.tasks import preferences, scoring_rows, sft_rows
from hanorec.run.record import prompt_settings

NONE = ["--images", "none"]


@pytest.fixture(scope="module")
def blank(data, tmp_path_factory):
    """A copy of the data whose images nobody may look at: an item has two, and neither is one."""
    folder = tmp_path_factory.mktemp("blank") / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("images", "*-*", "candidates_*"))
    (folder / "images").mkdir()
    for name in ("1.png", "1.jpg"):
        (folder / "images" / name).write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def words(blank, checkpoints):
    """The flags that all commands share."""
    return ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(blank), *toy.SHORT]


@pytest.fixture(scope="module")
def stages(words, tmp_path_factory):
    """Folders of SFT, DPO and an evaluation of both, without an image."""
    root = tmp_path_factory.mktemp("stages")
    argv = [*words, *NONE]
    train_sft.main([*argv, *toy.STEPS, "--out", str(root / "sft")])
    sft = ["--sft", str(root / "sft")]
    train_dpo.main([*argv, *toy.STEPS, *sft, "--out", str(root / "dpo")])
    policies = ["--adapter", str(root / "sft"), "--adapter", str(root / "dpo")]
    users = ["--users-to", "0.25"]
    evaluate.main([*argv, *policies, *users, "--out", str(root / "test")])
    return root


@pytest.mark.parametrize("task", ["ranking", "binary"])
def test_no_row_of_any_stage_has_an_image(data, checkpoints, task):
    """Nor does its text differ from that of the row with images in anything else."""
    rows = {}
    for images in ("own", "none"):
        backbone, builder, examples = toy.source_of(data, checkpoints, task, images=images)
        some = examples[:4]
        rows[images] = [
            *sft_rows(builder, some, 2025),
            *(prompt.row for prompt in preferences(builder, some, 2025)),
            *scoring_rows(builder, some),
        ]
    decode, (start, end) = backbone.tokenizer.decode, backbone.around_image()
    of_images = {*start, backbone.image_token, *end}
    for own, none in zip(rows["own"], rows["none"], strict=True):
        assert own.images and not none.images
        assert backbone.image_token in own.prompt
        assert not of_images & set(none.prompt)
        left = [token for token in own.prompt if token not in of_images]
        assert decode(none.prompt) == decode(left)
        assert none.answers == own.answers
        # text alone has the positions of text
        assert none.positions.tolist() == [list(range(len(none.prompt)))] * 3


def test_all_stages_run_where_no_image_could_be_read(stages, blank, words, tmp_path):
    """No feature file is made; with images the same command is refused."""
    assert not list(blank.glob("features-*"))
    for stage in ("sft", "dpo"):
        facts = json.loads((stages / stage / "hanorec.json").read_text())
        assert facts["prompt"]["images"] == "none"
        assert "--images none" in (stages / stage / "README.md").read_text()
    metrics = json.loads((stages / "test" / "metrics.json").read_text())
    assert set(metrics["sets"]) == {"random", "hard"}
    stored = json.loads((blank / "candidates_test_hard.json").read_text())
    assert stored["facts"]["embedding"].startswith("input embeddings of titles, ")
    with pytest.raises(InputError, match="1.png"):
        train_sft.main([*words, *toy.STEPS, "--out", str(tmp_path / "out")])


def test_images_that_are_there_change_nothing(stages, data, checkpoints, tmp_path):
    """The same adapter, to the bit, from the folder whose items have their images."""
    argv = ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(data), *toy.SHORT, *NONE]
    train_sft.main([*argv, *toy.STEPS, "--out", str(tmp_path / "sft")])
    assert toy.furthest(tmp_path / "sft", stages / "sft") == 0
    log = (tmp_path / "sft" / "log.jsonl").read_bytes()
    assert log == (stages / "sft" / "log.jsonl").read_bytes()


def test_hars_works_on_titles_alone(data, checkpoints):
    """e is H's direction; with images it is another one."""
    found = {}
    for images in ("own", "none"):
        backbone, builder, _ = toy.source_of(data, checkpoints, images=images)
        found[images], _, _ = builder.neighbors(4)
    table, titles = backbone.model.get_input_embeddings(), builder.catalog.titles
    for row in (0, 7, 200):
        ids = backbone.tokenizer.encode(titles[row], add_special_tokens=False)
        with torch.no_grad():
            H = F.normalize(table(torch.tensor(ids)).mean(0), dim=0)
        torch.testing.assert_close(found["none"][row], H)
        assert (found["own"][row] - H).abs().max() > 1e-2


@pytest.mark.parametrize("stated", [True, False])
def test_another_setting_than_in_training_is_told(sft, stages, words, tmp_path, capsys, stated):
    """An adapter whose file is older than the setting knew each item's own image."""
    own = shutil.copytree(sft, tmp_path / "own")
    facts = json.loads((own / "hanorec.json").read_text())
    if not stated:
        del facts["prompt"]["images"]
        (own / "hanorec.json").write_text(json.dumps(facts))
    adapters = ["--adapter", str(own), "--adapter", str(stages / "sft")]
    few = ["--sets", "random", "--users-to", "0.1"]
    evaluate.main([*words, *NONE, *adapters, *few, "--out", str(tmp_path / "out")])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {own} was trained with images = own, this command uses none"]


def test_a_reference_of_an_earlier_version_fits_where_images_are_the_items_own():
    model = ModelConfig("model")
    known = {"task", "history", "candidate_images", "max_pixels"}
    assert prompt_settings(model, DataConfig("data")).keys() == known
    assert prompt_settings(model, DataConfig("data", images="none")).keys() == known | {"images"}


def test_what_makes_no_sense_is_refused(words, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    for main in (train_sft.main, train_dpo.main):
        with pytest.raises(InputError, match="--images shuffled: expected own or none in training"):
            main([*words, "--images", "shuffled", *out])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--similarity with --images none"):
        evaluate.main([*words, *NONE, "--similarity", "true", *out])


def test_the_check_looks_at_no_image_either(blank, checkpoints, capsys):
    argv = [str(blank), "--model", str(checkpoints["qwen2_5_vl"]), "--candidates", "4"]
    check.main([*argv, *NONE])
    printed = capsys.readouterr().out
    assert "their images not looked at" in printed and "1.png" not in printed
    with pytest.raises(SystemExit):
        check.main(argv)
    assert "1.png" in capsys.readouterr().out


def test_scores_of_text_alone_are_the_models_own(stages, blank, checkpoints):
    """For a user: EV-1 by the plain forward of the prompt without images."""
    backbone, builder, _ = toy.source_of(blank, checkpoints, images="none")
    metrics = json.loads((stages / "test" / "metrics.json").read_text())["sets"]["random"]
    examples = heldout_examples(load_interactions(blank, builder.catalog), "test", 2)
    user = metrics["users"][1]
    (example,) = [example for example in examples if example.user == user["user"]]
    candidates = [builder.catalog.row[item] for item in user["candidates"]]
    attach_policy(backbone.model, stages / "dpo")
    backbone.model.eval()
    row = toy.ranking_row(backbone, builder.catalog, {}, example.history, candidates, candidates)
    with torch.no_grad():
        alone = toy.log_probs_alone(backbone, row, {})[0].numpy()
    np.testing.assert_allclose(metrics["scores"][str(stages / "dpo")][1], alone, atol=5e-5)
