"""Checkpoints and settings that say the same in another way: where a tie is stated, how an
image processor and its limits are called, and ~ for the user's home.
"""

import json
import os
import shutil
import sys

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file

import train_sft
from hanorec.base.command import run, with_home
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.settings import parse
from hanorec.mllm.load import load_backbone
from hanorec.mllm.spellings import pixel_limits


@pytest.fixture
def like(checkpoints, tmp_path):
    """like(family) -> a copy of its checkpoint, to be changed."""
    def copy(family):
        return shutil.copytree(checkpoints[family], tmp_path / family)

    return copy


def edit(path, change):
    stated = json.loads(path.read_text())
    change(stated)
    path.write_text(json.dumps(stated))


# ---- a head that is the embeddings ----


def state_tie(top, text):
    """Put the flag in both places of config.json; None leaves it out."""
    def change(config):
        for place, value in ((config, top), (config["text_config"], text)):
            place.pop("tie_word_embeddings", None)
            if value is not None:
                place["tie_word_embeddings"] = value
    return change


@pytest.mark.parametrize(("top", "text"), [
    (True, True), (True, None), (None, True), (True, False), (False, True),
])
def test_a_tie_may_be_stated_in_either_place(backbone, like, top, text):
    folder = like(backbone.family)
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    edit(folder / "config.json", state_tie(top, text))
    model = load_backbone(str(folder), "float32", "cpu").model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, backbone.model.lm_head.weight)


@pytest.mark.parametrize(("top", "text"), [(None, None), (False, False), (None, False)])
def test_a_head_that_is_missing_and_not_tied(backbone, like, top, text):
    """The reason is that, and not a checkpoint that was copied in part."""
    folder = like(backbone.family)
    edit(folder / "config.json", state_tie(top, text))
    message = r"lm_head.weight is missing, and config.json does not say .*\(tie_word_embeddings\)"
    with pytest.raises(InputError, match=message):
        load_backbone(str(folder), "float32", "cpu")


@pytest.mark.parametrize(("top", "text"), [(None, True), (True, None), (False, False)])
def test_a_head_of_its_own_is_kept(backbone, like, top, text):
    """Whatever the flag says: the file has it, and it is another."""
    folder = like(backbone.family)
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if "embed_tokens" in name]
    tensors["lm_head.weight"] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", state_tie(top, text))
    model = load_backbone(str(folder), "float32", "cpu").model
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight + 1)


# ---- the image processor's name ----


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_an_image_processor_by_its_name_of_early_2025(like, family):
    """Any other that Transformers does not know is refused, and not taken for the family's."""
    folder = like(family)
    path = folder / "preprocessor_config.json"
    now = load_backbone(str(folder), "float32", "cpu").image_processor
    edit(path, lambda c: c.update(image_processor_type="Qwen2_5_VLImageProcessor"))
    found = load_backbone(str(folder), "float32", "cpu").image_processor
    assert type(found) is type(now) and found.to_dict() == now.to_dict()
    edit(path, lambda c: c.update(image_processor_type="NoneSuchImageProcessor"))
    with pytest.raises(InputError, match="image processor cannot be loaded"):
        load_backbone(str(folder), "float32", "cpu")


# ---- limits on an image ----


SIZES = [
    {"size": {"shortest_edge": 2048, "longest_edge": 4096}},
    {"size": {"min_pixels": 2048, "max_pixels": 4096}},
    {"size": {"min_pixels": 2048, "longest_edge": 4096}},
    {"min_pixels": 2048, "max_pixels": 4096},
    {"size": {"min_pixels": 1, "max_pixels": 2}, "min_pixels": 2048, "max_pixels": 4096},
    {"size": {"shortest_edge": 1, "longest_edge": 4096}, "min_pixels": 2048},
]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("stated", SIZES, ids=json.dumps)
def test_limits_by_either_name(like, family, stated):
    """As Transformers reads those that it can read; and --max-pixels still lowers them."""
    folder = like(family)
    edit(folder / "preprocessor_config.json", lambda c: (c.pop("size"), c.update(stated)))
    assert pixel_limits(str(folder)) == {"shortest_edge": 2048, "longest_edge": 4096}
    for most, size in ((10**6, (2048, 4096)), (3000, (2048, 3000)), (1024, (1024, 1024))):
        processor = load_backbone(str(folder), "float32", "cpu", max_pixels=most).image_processor
        assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == size


def test_without_limits_the_default_holds(like):
    folder = like("qwen2_vl")
    edit(folder / "preprocessor_config.json", lambda c: c.pop("size"))
    assert pixel_limits(str(folder)) is None
    load_backbone(str(folder), "float32", "cpu")


@pytest.mark.parametrize("stated", [
    {"size": {"shortest_edge": 2048}}, {"size": {"height": 32, "width": 32}}, {"max_pixels": 4096},
    {"size": {"shortest_edge": None, "longest_edge": 4096}}, {"size": 448},
    {"size": {"min_pixels": "1024", "max_pixels": 4096}}, {"size": {"min_pixels": 0}},
], ids=json.dumps)
def test_half_of_the_limits_is_told(like, stated):
    """By their names, in place of the text of a TypeError."""
    folder = like("qwen2_vl")
    edit(folder / "preprocessor_config.json", lambda c: (c.pop("size"), c.update(stated)))
    name = next(iter(stated))
    message = f"preprocessor_config.json limits images by {name} = .*, expected two areas"
    with pytest.raises(InputError, match=message):
        load_backbone(str(folder), "float32", "cpu")


# ---- the user's home ----


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_words_of_a_command(home):
    words = ["--a", "~/x", "--b=~/y", "~", "a~/x", "--c=a=~/x", "~no.such.user/x", "--user", "~bob"]
    assert with_home(words) == [
        "--a", f"{home}/x", f"--b={home}/y", str(home), "a~/x", "--c=a=~/x", "~no.such.user/x",
        "--user", "~bob",
    ]


def test_every_path_of_a_settings_file(home, tmp_path):
    """Of a file of settings, which no shell has read, and of flags that a shell leaves alone."""
    kinds = [ModelConfig, DataConfig, TrainConfig]
    settings = {"model": "~/m", "data": "~/d", "features": "~/f", "sft": "~/s", "out": "~/o"}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    model, data, train = parse(kinds, ["~/run.json", "--data=~/other"])
    found = model.model, data.data, data.features, train.sft, train.out
    assert found == tuple(f"{home}/{name}" for name in ("m", "other", "f", "s", "o"))


def test_a_command_that_reads_its_flags_itself(home, monkeypatch):
    """`hanorec.demo`, converters, studies: their words pass through `run`."""
    monkeypatch.setattr("sys.argv", ["demo", "--out=~/x", "~/raw"])
    seen = []
    run(lambda: seen.extend(sys.argv[1:]))
    assert seen == [f"--out={home}/x", f"{home}/raw"]


def test_a_run_from_home(home, data, checkpoints, tmp_path):
    """The whole of it: what once ended in "Repo id must be"."""
    for name, folder in (("model", checkpoints["qwen2_5_vl"]), ("data", data)):
        os.symlink(folder, tmp_path / name)
    settings = {"model": "~/model", "data": "~/data", "out": "~/runs/out"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    train_sft.main([str(tmp_path / "settings.json"), *toy.SHORT, *toy.STEPS])
    assert (tmp_path / "runs" / "out" / "adapter_config.json").exists()
    assert not os.path.exists("~")
