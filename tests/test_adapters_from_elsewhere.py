"""Adapters that others have saved: what is plain LoRA loads exactly, whatever its names; what only
looks like it is refused by name. And the card that tells others what ours stand on.

Where PEFT is installed, it says itself what is right.
"""

import json
import re
import shlex
import shutil
import warnings

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file

import evaluate
import train_dpo
import train_sft
from hanorec import export
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.settings import parse
from hanorec.datasets.catalog import data_hash, load_catalog
from hanorec.lora import folder as adapter_folder
from hanorec.lora.card import adapter_card, made
from hanorec.lora.files import save_adapter, save_policy
from hanorec.lora.layer import lora_layers
from hanorec.lora.loading import attach_adapter, attach_policy
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.run.record import all_settings
from hanorec.scoring import answer_logits

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOW = "base_model.model.model.language_model.layers."
OLD = {  # the names of 2024
    "llava_next": "base_model.model.language_model.model.layers.",
    "qwen2_vl": "base_model.model.model.layers.",
    "qwen2_5_vl": "base_model.model.model.layers.",
}

# What PEFT 0.21 writes of a plain adapter.
OF_PEFT = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
    "base_model_name_or_path": "some/base", "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False,
    "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": LEAVES, "target_parameters": None,
    "task_type": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}


@pytest.fixture
def logits(catalog, gallery):
    """logits(backbone) -> (M, V) at the answer positions of a prompt with images."""
    def compute(backbone):
        row = toy.ranking_row(backbone, catalog, gallery[backbone.family])
        batch = collate(backbone, [row], gallery[backbone.family])
        with torch.no_grad():
            return answer_logits(forward(backbone, batch), batch)
    return compute


def fresh(backbone):
    return load_backbone(backbone.path, "float32", "cpu")


def busy_adapter(backbone, folder):
    """An adapter that changes the policy, as PEFT would have saved it: without hanorec.json."""
    toy.busy_lora(backbone.model, seed=3, r=4, alpha=8.0)
    save_adapter(backbone.model, folder, "some/base")
    (folder / "hanorec.json").unlink()
    configure(folder, **OF_PEFT)
    return folder


def configure(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename(folder, change):
    """Give each tensor the name change(name); one without a name goes."""
    path = folder / "adapter_model.safetensors"
    named = {change(key): tensor for key, tensor in load_file(path).items()}
    named.pop(None, None)
    save_file(named, path, {"format": "pt"})


@pytest.fixture
def adapter(qwen, tmp_path):
    """(Qwen2.5-VL with the adapter, its folder)."""
    return qwen, busy_adapter(qwen, tmp_path / "adapter")


# ---- what only looks like plain LoRA ----


def test_what_peft_writes_of_a_plain_adapter_loads(adapter, logits):
    backbone, folder = adapter
    other = fresh(backbone)
    assert (logits(other) - logits(backbone)).abs().max() > 0.1
    attach_adapter(other.model, folder)
    assert torch.equal(logits(other), logits(backbone))


@pytest.mark.parametrize("start", [
    True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica",
])
def test_starts_that_leave_the_base_alone(adapter, start):
    _, folder = adapter
    configure(folder, init_lora_weights=start)
    assert adapter_folder.adapter_config(folder)["init_lora_weights"] == start


@pytest.mark.parametrize("start", [
    "pissa", "PiSSA", "pissa_niter_4", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq",
    "lora_ga", "of_tomorrow", "", 1, ["gaussian"],
])
def test_starts_that_change_the_base_are_refused(adapter, start):
    """Not only when a model is there: also by the look at the folder alone."""
    backbone, folder = adapter
    configure(folder, init_lora_weights=start)
    for load in (adapter_folder.check_adapter, lambda f: attach_adapter(fresh(backbone).model, f)):
        with pytest.raises(InputError) as caught:
            load(folder)
        text = str(caught.value)
        assert f"adapter_config.json: init_lora_weights = {start!r}, expected true, false" in text
        assert "path_initial_model_for_weight_conversion" in text


@pytest.mark.parametrize(("key", "value"), [
    ("alora_invocation_tokens", [7, 8]), ("trainable_token_indices", [1]),
    ("layer_replication", [[0, 2], [1, 2]]), ("target_parameters", ["a.b"]),
    ("megatron_config", {"a": 1}), ("use_qalora", True), ("use_bdlora", {"a": 1}),
    ("arrow_config", {"a": 1}), ("kasa_config", {"a": 1}), ("monteclora_config", {"a": 1}),
    ("velora_config", {"a": 1}), ("lora_bias", True), ("bias", "lora_only"), ("use_dora", True),
    ("use_rslora", True), ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}),
    ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("peft_type", "ADALORA"),
])
def test_each_key_that_changes_what_an_adapter_computes(adapter, key, value):
    _, folder = adapter
    configure(folder, **{key: value})
    with pytest.raises(InputError, match=rf"{key} = .*, expected .*only plain LoRA is supported"):
        adapter_folder.check_adapter(folder)


def test_the_table_above_is_the_whole_table():
    """A key that is new in `PLAIN` has to be tried, too."""
    (tried,) = test_each_key_that_changes_what_an_adapter_computes.pytestmark
    assert {key for key, _ in tried.args[1]} == adapter_folder.PLAIN.keys()
    assert OF_PEFT.keys() | {"runtime_config"} == adapter_folder.KNOWN


@pytest.mark.parametrize("key", sorted(
    adapter_folder.OF_NO_EFFECT | adapter_folder.TOLD_BY_THE_TENSORS
))
def test_keys_of_no_effect_may_say_anything(adapter, key):
    _, folder = adapter
    configure(folder, **{key: {"some": "thing"}})
    adapter_folder.check_adapter(folder)


def test_an_unknown_key_is_refused_by_name_unless_it_is_off(adapter):
    """A later PEFT adds keys; off they change nothing, as all of its keys so far."""
    _, folder = adapter
    for off in (None, False, [], {}):
        configure(folder, use_tomorrow=off)
        adapter_folder.check_adapter(folder)
    for on in (True, 1, 0.5, "none", [0], {"a": None}):
        configure(folder, use_tomorrow=on)
        message = "'use_tomorrow' = .*expected no such key.*delete the key"
        with pytest.raises(InputError, match=message):
            adapter_folder.check_adapter(folder)


def test_pickled_weights_are_named(adapter):
    _, folder = adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="only adapter_model.bin, which is pickled and never read"):
        adapter_folder.check_adapter(folder)


# ---- names ----


def test_the_names_of_2024(backbone, tmp_path, logits, capsys):
    """One for one, so exactly; and it is said."""
    folder = busy_adapter(backbone, tmp_path / "adapter")
    old = OLD[backbone.family]
    rename(folder, lambda key: key.replace(NOW, old))
    other = fresh(backbone)
    attach_adapter(other.model, folder)
    assert torch.equal(logits(other), logits(backbone))
    printed = capsys.readouterr().out
    assert f"note: {folder}: its tensors have older names, {old}..." in printed
    assert f"all of which are read as {NOW}..." in printed


def test_the_names_of_today_need_no_note(adapter, capsys):
    backbone, folder = adapter
    attach_adapter(fresh(backbone).model, folder)
    assert "older names" not in capsys.readouterr().out


def of_layers(keep):
    """Keep the tensors of linears whose path fits, by older names."""
    old = OLD["qwen2_5_vl"]
    return lambda key: key.replace(NOW, old) if re.search(keep, key) else None


@pytest.mark.parametrize(("change", "parts"), [
    (of_layers("[qv]_proj"), ["it adapts 4 of the 14 linears", "(q_proj, v_proj)", "expected all"]),
    (lambda key: key if "q_proj" in key else None, ["it adapts 2 of the 14 linears", "(q_proj)"]),
    (of_layers("layers.0"), ["it adapts 7 of the 14 linears", "target_modules"]),
    (lambda key: key.replace(NOW, "base_model.model.transformer.h."), ["another base model"]),
    (lambda key: key.replace(NOW, OLD["qwen2_5_vl"]) if "q_proj" in key else key,
     ["it adapts 12 of the 14"]),  # names of both kinds are no certain meaning
])
def test_the_true_reason_is_told(adapter, change, parts):
    backbone, folder = adapter
    rename(folder, change)
    with pytest.raises(InputError) as caught:
        attach_adapter(fresh(backbone).model, folder)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("module", [
    "model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv", "lm_head",
])
def test_more_than_the_language_model_is_told(adapter, module):
    """The vision tower too, by its name of today or of 2024, or the head."""
    backbone, folder = adapter
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{module}.lora_A.weight"
    save_file({**tensors, key: torch.ones(4, 2)}, path, {"format": "pt"})
    message = rf"no place in this model, e.g. {key}; {module} is no linear of the language model"
    with pytest.raises(InputError, match=message):
        attach_adapter(fresh(backbone).model, folder)


# ---- looked at before a model is loaded ----


def no_model(*_, **__):
    raise AssertionError("the model is loaded first")


@pytest.fixture
def unloaded(monkeypatch):
    """No command may come as far as loading a model."""
    for module in (evaluate, export):
        monkeypatch.setattr(module, "load_backbone", no_model)
    monkeypatch.setattr("hanorec.run.run.load_backbone", no_model)


def wrong_folders(sft, tmp_path):
    """Folders that are no adapter, and what is said of each."""
    kinds = {"nothing": "no such file", "stopped": "give its command again", "dora": "use_dora"}
    kinds |= {"empty": "is .* an adapter folder", "below": "rank_pattern", "torn": "not a whole"}
    for kind in kinds.keys() - {"nothing"}:
        shutil.copytree(sft, tmp_path / kind)
    (tmp_path / "stopped" / "adapter_config.json").unlink()
    configure(tmp_path / "dora", use_dora=True)
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    shutil.copytree(sft, tmp_path / "below" / "below")
    configure(tmp_path / "below" / "below", rank_pattern={"q_proj": 1})
    torn = tmp_path / "torn" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    return kinds


def test_a_wrong_adapter_is_found_first(unloaded, sft, data, checkpoints, tmp_path):
    """Before the model and 2,810 prompts; the flag is named, and no OUT is begun."""
    model = ["--model", str(checkpoints["qwen2_5_vl"])]
    common = [*model, "--data", str(data), *toy.SHORT]
    commands = [
        (train_sft.main, [*common, "--sft"]),
        (train_dpo.main, [*common, "--sft"]),
        (evaluate.main, [*common, "--adapter", "base", "--adapter"]),
        (export.main, [*model, "--adapter", str(sft), "--adapter"]),
    ]
    out = tmp_path / "out"
    for kind, words in wrong_folders(sft, tmp_path).items():
        for main, flags in commands:
            with pytest.raises(InputError, match=f"^{flags[-1]}: .*{kind}.*{words}"):
                main([*flags, str(tmp_path / kind), "--out", str(out)])
            assert not out.exists()
    for main, flags in commands:  # the check can pass: then the model is loaded
        with pytest.raises(AssertionError, match="the model is loaded first"):
            main([*flags, str(sft), "--out", str(tmp_path / main.__module__)])


def test_a_wrong_retriever_and_reference_are_found_first(
    unloaded, sft, data, checkpoints, tmp_path
):
    common = ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(data), *toy.SHORT]
    common += ["--out", str(tmp_path / "out")]
    (tmp_path / "names.json").write_text('{"users": ["1"], "items": ["2"]}')
    for folder, words in ((sft, "names.json: no such file"), (tmp_path, "embeddings.*cannot be")):
        with pytest.raises(InputError, match=f"^--retriever: .*{words}"):
            evaluate.main([*common, "--retriever", str(folder)])
    (tmp_path / "half").write_bytes(b"half")
    for name, words in (("none", "no such file"), ("half", "not a whole file of reference")):
        with pytest.raises(InputError, match=words):
            train_dpo.main([*common, "--reference", str(tmp_path / name)])
    assert not (tmp_path / "out").exists()


# ---- the card ----


def commands_of(card):
    return [line.strip() for line in card.splitlines() if line.startswith("    ")]


def test_the_card_of_a_whole_adapter(sft, checkpoints):
    """What SFT has written: it stands on the base alone, and PEFT may load it as it is."""
    card, base = (sft / "README.md").read_text(), str(checkpoints["qwen2_5_vl"])
    assert card.startswith(f'---\nbase_model: "{base}"\nlibrary_name: peft\n---\n')
    assert "rank 8, alpha 32\n\nStage: sft." in card
    assert "The base alone: this folder is the whole adapter." in card
    assert "Not with PEFT" not in card and "ONE_ADAPTER" not in card
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER")' in card
    assert "--max-lora-rank 8 --lora-modules NAME=THIS_FOLDER" in card
    config = json.loads((sft / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base


def test_the_card_says_how_it_was_made(sft, data, checkpoints):
    """Its flags, given again, are the settings of the run; so is the hash of its data."""
    card, record = (sft / "README.md").read_text(), json.loads((sft / "run.json").read_text())
    assert f"splits and titles of SHA-256 `{record['inputs']['data']}`" in card
    assert record["inputs"]["data"] == data_hash(load_catalog(data))
    last = json.loads((sft / "log.jsonl").read_text().splitlines()[-1])
    assert f"- Step {last['step'] + 1}, the last one, on its rows: loss {last['loss']}." in card

    block = card.partition("as flags:\n\n")[2].partition("\n\n")[0]
    kinds = [ModelConfig, DataConfig, TrainConfig]
    again = parse(kinds, [*shlex.split(block), "--out", record["settings"]["out"]])
    assert all_settings(again) == record["settings"]
    assert "--out" not in block and max(map(len, block.splitlines())) <= 100


def test_a_card_without_a_run_says_less(tmp_path):
    """An adapter whose run is not there, or not one of ours, has no such part."""
    assert made(tmp_path) == ""
    (tmp_path / "run.json").write_text('{"settings": 5}')
    assert made(tmp_path) == ""
    assert "How it was made" not in adapter_card("B", [8], 16, False, {}, tmp_path)


def test_the_card_has_the_flags_of_the_prompts():
    """The frame of the chat template, whose hash stands beside them, is none."""
    prompt = {"task": "binary", "history": 7, "max_title_tokens": 20, "max_pixels": 784}
    prompt["turn"] = "0" * 64
    card = adapter_card("B", [8], 16, False, {"prompt": prompt})
    flags = "--task binary --history 7 --max-title-tokens 20 --max-pixels 784"
    assert f"--adapter THIS_FOLDER --data DATA --out OUT {flags}\n" in card
    card = adapter_card("B", [8], 16, False, {"prompt": prompt | {"max_title_tokens": None}})
    assert "--max-title-tokens" not in card and "--history 7 --max-pixels" in card


def test_the_card_of_half_an_adapter(full, sft, data, checkpoints, tmp_path, logits, qwen):
    """What DPO has written says that the SFT adapter is missing to PEFT; the command that it gives
    makes one adapter that computes what the two do, and whose own card says that it is whole. Left
    alone, the top one computes something else.
    """
    out = full[0]
    card = (out / "README.md").read_text()
    assert "The base **and the adapter in `below/`**." in card and "Stage: dpo." in card
    assert "**Not with PEFT or vLLM as it is**" in card
    assert 'PeftModel.from_pretrained(base, "ONE_ADAPTER")' in card
    assert "--max-lora-rank 16 --lora-modules NAME=ONE_ADAPTER" in card
    assert (out / "below" / "README.md").read_text() == (sft / "README.md").read_text()

    evaluation, stacking = [line for line in commands_of(card) if line.startswith("python ")]
    places = {"THIS_FOLDER": str(out), "ONE_ADAPTER": str(tmp_path / "one")}
    words = [places.get(word, word) for word in stacking.split()]
    assert words[:3] == ["python", "-m", "hanorec.export"]
    export.main(words[3:])
    attach_policy(qwen.model, out)
    one, alone = fresh(qwen), fresh(qwen)
    attach_adapter(one.model, tmp_path / "one")
    torch.testing.assert_close(logits(one), logits(qwen), atol=1e-5, rtol=1e-6)
    (tmp_path / "top").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(out / name, tmp_path / "top" / name)
    attach_adapter(alone.model, tmp_path / "top")
    assert (logits(alone) - logits(qwen)).abs().max() > 1e-2
    assert "The base alone" in (tmp_path / "one" / "README.md").read_text()

    own = shutil.copytree(data, tmp_path / "data")  # candidates are drawn into it
    places |= {"DATA": str(own), "OUT": str(tmp_path / "out")}
    words = [places.get(word, word) for word in evaluation.split()[2:]]
    evaluate.main([*words, "--sets", "random", "--device", "cpu"])  # the settings of its prompts


def test_the_card_of_a_stack_whose_lower_part_lies_elsewhere(qwen, tmp_path):
    toy.busy_lora(qwen.model, seed=1, r=4)
    toy.busy_lora(qwen.model, seed=2, r=2)
    toy.busy_lora(qwen.model, seed=3, r=2)
    save_adapter(qwen.model, tmp_path / "top", "my models/b")
    card = (tmp_path / "top" / "README.md").read_text()
    assert "the 2 adapters that it was trained on, which this folder lacks" in card
    assert (
        "python -m hanorec.export --model 'my models/b' --adapter BELOW --adapter BELOW --adapter "
        "THIS_FOLDER --out ONE_ADAPTER"
    ) in card
    assert "--adapter THIS_FOLDER --data" not in card


# ---- with PEFT itself ----


def by_peft(backbone, folder, **options):
    """The backbone with an adapter that PEFT makes, moves a little, as by training, and saves."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    target = rf"model\.language_model\..*\.({'|'.join(LEAVES)})"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=target, **options)
    model = fresh(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model.model, config)
        with torch.no_grad():
            for name, weight in wrapped.named_parameters():
                if "lora_" in name:
                    weight += 0.02 * torch.randn(weight.shape)
        wrapped.save_pretrained(str(folder))
    wrapped.eval()
    return model


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_peft_starts_that_load_exactly(qwen, tmp_path, logits, start):
    theirs = by_peft(qwen, tmp_path, init_lora_weights=start)
    attach_adapter(qwen.model, tmp_path)
    torch.testing.assert_close(logits(qwen), logits(theirs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_peft_starts_that_are_refused(qwen, tmp_path, logits, start):
    """Read as plain LoRA they would be far off."""
    theirs = by_peft(qwen, tmp_path / "as_it_is", init_lora_weights=start)
    with pytest.raises(InputError, match="init_lora_weights"):
        attach_adapter(fresh(qwen).model, tmp_path / "as_it_is")
    wrong = fresh(qwen)
    configure(tmp_path / "as_it_is", init_lora_weights=True)
    attach_adapter(wrong.model, tmp_path / "as_it_is")
    assert (logits(wrong) - logits(theirs)).abs().max() > 0.5


def test_peft_converts_to_plain_lora(qwen, tmp_path, logits):
    """The remedy of the message, tried."""
    peft = pytest.importorskip("peft")
    target = rf"model\.language_model\..*\.({'|'.join(LEAVES)})"
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=target, init_lora_weights="pissa"
    )
    theirs = fresh(qwen)
    wrapped = peft.get_peft_model(theirs.model, config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "start"))
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight += 0.02 * torch.randn(weight.shape)
    wrapped.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    wrapped.eval()
    attach_adapter(qwen.model, tmp_path / "plain")
    torch.testing.assert_close(logits(qwen), logits(theirs), atol=1e-4, rtol=1e-4)


def test_peft_reads_the_same_from_the_names_of_2024(checkpoints, tmp_path, logits):
    peft = pytest.importorskip("peft")
    backbone = load_backbone(str(checkpoints["llava_next"]), "float32", "cpu")
    folder = busy_adapter(backbone, tmp_path / "adapter")
    rename(folder, lambda key: key.replace(NOW, OLD["llava_next"]))
    configure(folder, target_modules=rf".*language_model.*\.({'|'.join(LEAVES)})")
    theirs, ours = fresh(backbone), fresh(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that it misses
        peft.PeftModel.from_pretrained(theirs.model, str(folder))
    attach_adapter(ours.model, folder)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-5, rtol=1e-5)


def test_every_key_of_the_installed_peft_is_known():
    peft = pytest.importorskip("peft")
    assert peft.LoraConfig().to_dict().keys() <= adapter_folder.KNOWN


def test_below_lies_in_the_folder(qwen, tmp_path):
    """`save_policy` puts the lower adapter there before the card is written."""
    toy.busy_lora(qwen.model, seed=1)
    save_adapter(qwen.model, tmp_path / "sft", "b")
    toy.busy_lora(qwen.model, seed=2)
    save_policy(qwen.model, tmp_path / "dpo", "b", below=tmp_path / "sft")
    assert "in `below/`" in (tmp_path / "dpo" / "README.md").read_text()
    assert len(lora_layers(qwen.model)) == 14
