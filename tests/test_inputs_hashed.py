"""What a run stands on is part of its record, all of it: the base to its last weight, the images,
the chat template. What was changed behind its name is refused, and named.
"""

import json
import os
import shutil

import pytest
import toy
from PIL import Image
from processes import in_a_child
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import train_dpo
import train_sft
from hanorec.base.errors import InputError
from hanorec.lora.files import save_adapter, save_policy
from hanorec.lora.layer import add_lora
from hanorec.lora.loading import attach_adapter, attach_policy
from hanorec.lora.stack import base_fingerprint, checkpoint_fingerprint
from hanorec.mllm.load import load_backbone
from hanorec.run import run as training_run
from hanorec.run.inputs import NEWER

# ---- the base's fingerprint ----


def test_every_weight_counts(backbone):
    """Each one in turn, changed at its last value alone: embeddings, norms, biases, vision tower.
    The hash of adapters' earlier versions saw few of them.
    """
    model = backbone.model
    add_lora(model)
    whole, first = checkpoint_fingerprint(model), base_fingerprint(model)
    seen = {whole}
    noticed = 0
    base = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    for weight in base.values():
        last = weight.view(-1)[-1:]
        before = last.clone()
        last += 1
        seen.add(checkpoint_fingerprint(model))
        noticed += base_fingerprint(model) != first
        last.copy_(before)
    assert len(seen) == len(base) + 1  # each change gives a hash of its own
    assert noticed < len(base) / 4
    assert checkpoint_fingerprint(model) == whole


def test_a_weight_is_sampled_all_over(qwen):
    """A block of any 1 % of a large weight is noticed, at its beginning, middle or end."""
    weight = qwen.model.get_input_embeddings().weight
    whole = checkpoint_fingerprint(qwen.model)
    n = weight.numel()
    assert n > 100 * 256
    for start in range(0, n - n // 100, n // 7):
        block = weight.view(-1)[start : start + n // 100]
        block += 1
        assert checkpoint_fingerprint(qwen.model) != whole
        block -= 1


def test_what_does_not_count(backbone, checkpoints):
    """Adapters, buffers, the dtype that it is loaded in, and by which of two names a tied weight is
    known."""
    model, whole = backbone.model, checkpoint_fingerprint(backbone.model)
    toy.busy_lora(model, seed=1)
    toy.busy_lora(model, seed=2)
    assert checkpoint_fingerprint(model) == whole
    for buffer in model.buffers():
        buffer.add_(1)
    assert checkpoint_fingerprint(model) == whole
    half = load_backbone(str(checkpoints[backbone.family]), "bfloat16", "cpu").model
    assert checkpoint_fingerprint(half) == whole
    assert half.lm_head.weight is half.get_input_embeddings().weight


# ---- an adapter on another base ----


def change(part, places=slice(-64, None)):
    """A base that differs in the last values of one kind of weight."""
    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        name = next(name for name in sorted(tensors) if part in name and tensors[name].ndim >= 1)
        tensors[name].view(-1)[places] += 1
        save_file(tensors, path, {"format": "pt"})
    return apply


PARTS = ["embed_tokens", "input_layernorm", "visual.blocks.0", "visual.merger", "q_proj.weight",
         "q_proj.bias"]


@pytest.fixture
def other_base(checkpoints, tmp_path):
    """other_base(change) -> a checkpoint like Qwen2.5-VL's, changed."""
    def make(apply):
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoints["qwen2_5_vl"], folder)
        apply(folder)
        return folder

    return make


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_on_another_base_is_refused(qwen, other_base, tmp_path, part):
    """Also where the linears' first values are the same."""
    toy.busy_lora(qwen.model)
    save_adapter(qwen.model, tmp_path / "adapter", "some/base")
    model = load_backbone(str(other_base(change(part))), "float32", "cpu").model
    message = r"trained on another base \(some/base\): weights of the vision tower, embeddings"
    with pytest.raises(InputError, match=message):
        attach_adapter(model, tmp_path / "adapter")


def test_an_adapter_of_an_earlier_version_still_loads(qwen, other_base, tmp_path):
    """Its hanorec.json has `stands_on` alone; so it is only as well guarded as it was."""
    toy.busy_lora(qwen.model)
    save_adapter(qwen.model, tmp_path / "adapter", "some/base")
    path = tmp_path / "adapter" / "hanorec.json"
    facts = json.loads(path.read_text())
    assert facts["stands_on"] == base_fingerprint(qwen.model)  # the old one, of the old meaning
    for name in ("base_sha256", "scales_below"):
        del facts[name]
    path.write_text(json.dumps(facts))
    attach_adapter(load_backbone(qwen.path, "float32", "cpu").model, tmp_path / "adapter")
    changed = load_backbone(str(other_base(change("embed_tokens"))), "float32", "cpu").model
    attach_adapter(changed, tmp_path / "adapter")
    linears = other_base(change("q_proj.weight", slice(0, 9)))
    with pytest.raises(InputError, match="or on another adapter below it"):
        attach_adapter(load_backbone(str(linears), "float32", "cpu").model, tmp_path / "adapter")


def test_the_scale_of_what_lies_below_counts(qwen, tmp_path):
    """lora_alpha of the SFT adapter makes another reference of it."""
    toy.busy_lora(qwen.model, seed=1, r=4, alpha=8.0)
    save_adapter(qwen.model, tmp_path / "sft", "b")
    toy.busy_lora(qwen.model, seed=2)
    save_policy(qwen.model, tmp_path / "dpo", "b", below=tmp_path / "sft")
    attach_policy(load_backbone(qwen.path, "float32", "cpu").model, tmp_path / "dpo")
    path = tmp_path / "dpo" / "below" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 4.0}))
    message = r"adapters of scale \[2.0\], those below it have \[1.0\]"
    with pytest.raises(InputError, match=message):
        attach_policy(load_backbone(qwen.path, "float32", "cpu").model, tmp_path / "dpo")


# ---- a run that goes on ----


def merge(name, **values):
    def apply(world):
        path = world / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return apply


def another_cover(world):
    """One image is replaced, as large as before, whatever its date."""
    path = min((world / "data" / "images").iterdir())
    stat = path.stat()
    with Image.open(path) as image:
        other = Image.new("RGB", image.size, "red")
        other.save(path, image.format)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def another_date(world):
    """A template that states the date, on the next day."""
    path = world / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("1 May 2025", "2 May 2025"))


def another_tokenizer(world):
    """A merge of two letters is gone, so words are cut elsewhere."""
    path = world / "model" / "tokenizer.json"
    stated = json.loads(path.read_text())
    stated["model"]["merges"] = stated["model"]["merges"][:-40]
    path.write_text(json.dumps(stated))


def another_title(world):
    path = world / "data" / "Posterland_titles.csv"
    path.write_text(path.read_text().replace(" Again", " Once More"))


def another_base(world):
    """Other embeddings; the adapter below is of an earlier version, else it would be refused."""
    change("embed_tokens")(world / "model")
    path = world / "sft" / "hanorec.json"
    facts = json.loads(path.read_text())
    facts.pop("base_sha256", None)
    path.write_text(json.dumps(facts))


CHANGES = {
    "images": another_cover,
    "image_processor": merge("model/preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
    "turn": another_date,
    "base": another_base,
    "adapter_stack": merge("sft/adapter_config.json", lora_alpha=16.0),
    "data": another_title,
    "prompts": another_tokenizer,
}
NINE_STEPS = ["--targets-per-user", "1", "--epochs", "3", "--micro-batch", "4"]
NINE_STEPS += ["--accumulation", "2", "--save-every", "1"]


def stopped_at_the_third_step(argv):
    append = training_run.append_log

    def then_stop(path, record):
        append(path, record)
        if record["step"] == 2:
            os._exit(3)

    training_run.append_log = then_stop
    train_sft.main(argv)


@pytest.fixture(scope="module")
def stopped(data, checkpoints, tmp_path_factory):
    """A world (model, data, sft) whose template states a date, with a run of SFT on top of another
    adapter that was stopped in it."""
    world = tmp_path_factory.mktemp("stopped") / "world"
    shutil.copytree(checkpoints["qwen2_5_vl"], world / "model")
    shutil.copytree(data, world / "data", ignore=shutil.ignore_patterns("features-*"))
    path = world / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("helpful assistant", "helper on 1 May 2025"))
    assert "1 May 2025" in path.read_text()
    usual = ["--model", "model", "--data", "data", *toy.SHORT]
    here = os.getcwd()
    os.chdir(world)
    train_sft.main([*usual, *toy.STEPS, "--out", "sft"])
    os.chdir(here)
    argv = [*usual, *NINE_STEPS, "--sft", "sft", "--out", "out"]
    assert in_a_child(in_world, world, stopped_at_the_third_step, argv) == 3
    return world, argv


def in_world(world, work, argv):
    os.chdir(world)
    work(argv)


@pytest.fixture
def world(stopped, tmp_path, monkeypatch):
    """(a copy of the stopped world, in which this process works; the command again)."""
    shutil.copytree(stopped[0], tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world", stopped[1]


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_named(world, name):
    """The one input that was changed; nothing is lost, and with the old one put back the run goes
    on to its end.
    """
    here, argv = world
    kept = shutil.copytree(here, here.parent / "kept")
    log = (here / "out" / "log.jsonl").read_bytes()
    CHANGES[name](here)
    message = f"run.json: this run was started with {name} of hash .*, expected no change"
    with pytest.raises(InputError, match=message):
        train_sft.main(argv)
    assert (here / "out" / "log.jsonl").read_bytes() == log
    for part in ("model", "data", "sft"):
        shutil.rmtree(here / part)
        shutil.copytree(kept / part, here / part)
    if name == "images":  # once: it takes a run
        train_sft.main(argv)
        assert (here / "out" / "adapter_config.json").exists()


def test_an_untouched_world_goes_on(world):
    """Negative control: the same bytes with other dates are no change."""
    here, argv = world
    for path in here.glob("*/*"):
        os.utime(path, (1, 1))
    train_sft.main(argv)
    assert (here / "out" / "adapter_config.json").exists()


def test_a_run_of_an_earlier_version_goes_on(world, capsys):
    """Its run.json states three inputs. That the others cannot be compared is said; the three are.
    It knew no --images, and showed each item's own.
    """
    here, argv = world
    path = here / "out" / "run.json"
    run = json.loads(path.read_text())
    assert set(NEWER) < run["inputs"].keys()
    run["inputs"] = {name: run["inputs"][name] for name in ("stands_on", "adapter", "data")}
    del run["settings"]["images"]
    path.write_text(json.dumps(run))
    with pytest.raises(InputError, match="with images = 'own', this command has 'none'"):
        train_sft.main([*argv, "--images", "none"])
    title = (here / "data" / "Posterland_titles.csv").read_text()
    another_title(here)
    with pytest.raises(InputError, match="started with data of hash"):
        train_sft.main(argv)
    (here / "data" / "Posterland_titles.csv").write_text(title)
    train_sft.main(argv)
    printed = capsys.readouterr().out
    assert "was written by an earlier version, which did not state adapter_stack, images" in printed
    assert set(NEWER) < json.loads(path.read_text())["inputs"].keys()


# ---- the reference ----


def test_a_reference_of_another_base_is_refused(full, data, checkpoints, sft, other_base, tmp_path):
    """Of one whose embeddings, used nowhere in these prompts, are others: all else is the same."""
    flags = [*toy.SHORT, *toy.STEPS, "--reference", str(full[0] / "reference.safetensors")]
    base = other_base(change("embed_tokens"))
    shutil.copytree(sft, tmp_path / "sft")
    path = tmp_path / "sft" / "hanorec.json"
    facts = json.loads(path.read_text())
    del facts["base_sha256"]  # as of an earlier version, else the adapter itself is refused
    path.write_text(json.dumps(facts))
    argv = ["--model", str(base), "--data", str(data), "--sft", str(tmp_path / "sft"), *flags]
    with pytest.raises(InputError, match="reference.safetensors: its base is .*stale"):
        train_dpo.main([*argv, "--out", str(tmp_path / "out")])


def test_a_reference_of_an_earlier_version_may_be_used(
    full, data, checkpoints, sft, tmp_path, capsys
):
    """It does not state base and adapter_stack; it is said, and the rest is compared."""
    source = full[0] / "reference.safetensors"
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    old = {name: facts[name] for name in facts if name not in ("base", "adapter_stack")}
    assert list(old) == ["stands_on", "adapter", "data", "dtype", "prompt", "rows"]
    save_file(tensors, tmp_path / "old.safetensors", {"facts": json.dumps(old)})
    argv = ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(data), "--sft", str(sft)]
    argv += [*toy.SHORT, *toy.STEPS, "--reference", str(tmp_path / "old.safetensors")]
    train_dpo.main([*argv, "--out", str(tmp_path / "out")])
    assert "did not state its base and adapter_stack" in capsys.readouterr().out
    assert toy.furthest(tmp_path / "out", full[0]) == 0
    with pytest.raises(InputError, match="its prompt is"):
        train_dpo.main([*argv, "--history", "1", "--out", str(tmp_path / "other")])


# ---- an evaluation ----


def test_an_evaluation_states_what_it_saw(world):
    """Each change of the world changes its own input, and no other but what follows from it."""
    here, _ = world
    argv = ["--model", "model", "--data", "data", *toy.SHORT, "--sets", "random", "--adapter"]

    def inputs(number):
        evaluate.main([*argv, "base", "--out", f"evaluation{number}"])
        return json.loads((here / f"evaluation{number}" / "run.json").read_text())["inputs"]

    before = inputs(0)
    for number, name in enumerate(["images", "image_processor", "turn", "base"], 1):
        CHANGES[name](here)
        after = inputs(number)
        assert {key for key in before if before[key] != after[key]} == {name}
        before = after


def test_an_adapter_in_another_frame_is_noted(world, capsys):
    """An evaluation may mean it; the note says which."""
    here, _ = world
    argv = ["--model", "model", "--data", "data", *toy.SHORT, "--sets", "random"]
    argv += ["--adapter", "sft"]
    evaluate.main([*argv, "--out", "one"])
    assert "another chat template" not in capsys.readouterr().out
    another_date(here)
    evaluate.main([*argv, "--out", "two"])
    assert "note: sft was trained in the frame of another chat template" in capsys.readouterr().out
