"""Bad input through the commands: exit code 2, one message that names place, value, expectation and remedy, no traceback, no output."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import train_dpo
import train_sft
from hanorec.datasets import recbole
from hanorec.errors import run

SMALL = ["--epochs", "1", "--micro-batch", "2", "--accumulation", "2", "--users-to", "0.2", "--targets-per-user", "1"]


@pytest.fixture
def copy(data, tmp_path):
    """A copy of the small Posterland, to be spoilt."""
    return shutil.copytree(data, tmp_path / "data")


@pytest.fixture
def model(checkpoints, tmp_path):
    """A copy of the tiny Qwen2.5-VL, to be spoilt."""
    return shutil.copytree(checkpoints["qwen2_5_vl"], tmp_path / "model")


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(command, flags, *words): the command ends with code 2 and a message that holds all the words; OUT holds nothing."""
    def check(command, flags, *words):
        out = tmp_path / "out"
        with pytest.raises(SystemExit) as stop:
            run(partial(command, [*map(str, flags), *(["--out", str(out)] if command is not recbole.main else [str(out)])]))
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert "Traceback" not in message
        last = message[message.rindex("error: "):]
        for word in words:
            assert str(word) in last, last
        assert not out.exists() or not any(out.iterdir())
    return check


def sft(model, data, *more):
    return ["--model", model, "--data", data, *SMALL, *more]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_good_input_is_accepted(model, copy, tmp_path):
    train_sft.main([*map(str, sft(model, copy)), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_corrupt_image(refused, model, copy):
    for path in (copy / "images").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    refused(train_sft.main, sft(model, copy), "images", ".png", "not a whole JPEG, PNG or WebP", "replace")


def test_image_of_another_format(refused, model, copy):
    for path in list((copy / "images").iterdir()):
        Image.new("RGB", (8, 8)).save(path.with_suffix(".gif"))
        path.unlink()
        path.with_suffix(".gif").rename(path)
    refused(train_sft.main, sft(model, copy), ".png", "JPEG, PNG or WebP", "replace")


def test_images_that_the_data_set_claims_are_missing(refused, model, copy):
    shutil.rmtree(copy / "images")
    refused(train_sft.main, sft(model, copy), "dataset.json", "drawn", "images")


def test_unknown_item(refused, model, copy):
    with open(copy / "train.tsv", "a") as file:
        file.write("new\t1 99999\n")
    refused(train_sft.main, sft(model, copy), "train.tsv:25", "'99999'", "titles file")


def test_duplicate_item(refused, model, copy):
    with open(copy / "Posterland_titles.csv", "a") as file:
        file.write("7,Again\n")
    refused(train_sft.main, sft(model, copy), "Posterland_titles.csv:296", "'7'")


def test_duplicate_title_in_a_candidate_set(refused, model, copy, tmp_path):
    """The set was drawn with different titles; then two items were given one title, and the file's hash was made to fit."""
    evaluate.main(["--model", str(model), "--data", str(copy), "--sets", "random", "--out", str(tmp_path / "first")])
    path = copy / "candidates_test_random.json"
    first = json.loads(path.read_text())["rows"][0]["candidates"][:2]
    titles = (copy / "Posterland_titles.csv").read_text().splitlines()
    titles = [f"{line.split(',')[0]},Twin" if line.split(",")[0] in first else line for line in titles]
    (copy / "Posterland_titles.csv").write_text("\n".join(titles) + "\n")
    stored = json.loads(path.read_text())
    stored["facts"]["data_sha256"] = evaluate.data_hash(evaluate.load_catalog(copy))
    path.write_text(json.dumps(stored))
    refused(evaluate.main, ["--model", model, "--data", copy, "--sets", "random"], path, "row 1", first[0], first[1], "'Twin'", "delete")


def test_candidates_of_other_data(refused, model, copy, tmp_path):
    evaluate.main(["--model", str(model), "--data", str(copy), "--sets", "random", "--out", str(tmp_path / "first")])
    titles = (copy / "Posterland_titles.csv").read_text()
    (copy / "Posterland_titles.csv").write_text(titles + "9999,Late Arrival\n")
    refused(evaluate.main, ["--model", model, "--data", copy, "--sets", "random"], "candidates_test_random.json", "data_sha256", "delete")


def test_pair_with_one_title(refused, model, copy):
    """A catalogue of one title cannot even give candidates: no negative can be told from the positive."""
    lines = (copy / "Posterland_titles.csv").read_text().splitlines()
    (copy / "Posterland_titles.csv").write_text("\n".join([lines[0], *(f"{line.split(',')[0]},Same" for line in lines[1:])]) + "\n")
    refused(train_sft.main, sft(model, copy), "titles of their own", "9 negatives", "fewer negatives")


def test_empty_history(refused, model, copy):
    with open(copy / "train.tsv", "a") as file:
        file.write("lonely\t\n")
    refused(train_sft.main, sft(model, copy), "train.tsv:25", "'lonely'", "empty history")


def test_user_without_training_items(refused, model, copy):
    with open(copy / "test.tsv", "a") as file:
        file.write("stranger\t5\n")
    refused(evaluate.main, ["--model", model, "--data", copy], "test.tsv:25", "'stranger'", "empty history")


def test_user_with_too_few_items(refused, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n1\t1\t1\n1\t2\t2\n")
    (raw / "x.item").write_text("item_id:token\tmovie_title:token_seq\n1\tOne\n2\tTwo\n")
    refused(recbole.main, [raw, "--rating-field", "none"], "'1'", "2", "3", "--min-items")


def test_more_neighbours_than_items(refused, model, copy):
    refused(train_dpo.main, sft(model, copy, "--k", 294), "K = 294", "294 items", "1 .. 293")


def test_too_few_pairs(refused, model, copy):
    refused(train_dpo.main, sft(model, copy, "--users-to", 0.08), "2 training rows", "at least 3", "use more users")


def test_small_global_batch(refused, model, copy):
    refused(train_dpo.main, sft(model, copy, "--micro-batch", 1, "--accumulation", 2), "steps of 2", "at least 3", "--accumulation")


def test_features_that_are_not_finite(refused, model, copy):
    weights = load_file(model / "model.safetensors")
    name = next(key for key in weights if "embed_tokens" in key)
    weights[name][:] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(train_dpo.main, sft(model, copy), "item row 0", "nan", "not finite")


def test_loss_that_is_not_finite(refused, model, copy):
    weights = load_file(model / "model.safetensors")
    name = next(key for key in weights if "down_proj" in key and "visual" not in key)
    weights[name][:] = torch.inf
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError):  # run.json is there: the run had begun
        refused(train_sft.main, sft(model, copy), "step 0", "nan", "users of the batch", "nothing was updated")


def test_adapter_of_another_base(refused, model, copy, make, tmp_path):
    train_sft.main([*map(str, sft(model, copy)), "--out", str(tmp_path / "sft")])
    other = make("qwen2_5_vl", seed=5)
    refused(train_dpo.main, sft(other, copy, "--sft", tmp_path / "sft"), tmp_path / "sft", "another base", "load that base")


def test_adapter_of_another_rank(refused, model, copy, tmp_path):
    train_sft.main([*map(str, sft(model, copy)), "--out", str(tmp_path / "sft")])
    edit_json(tmp_path / "sft" / "adapter_config.json", r=4)
    refused(train_dpo.main, sft(model, copy, "--sft", tmp_path / "sft"), "adapter_model.safetensors", "(8, ", "(4, ", "rank")


def test_not_an_adapter(refused, model, copy):
    refused(train_dpo.main, sft(model, copy, "--sft", copy), copy / "adapter_config.json", "no such file")


def test_prompt_longer_than_the_context(refused, make, copy):
    short = make("qwen2_5_vl", context=100)
    refused(train_sft.main, sft(short, copy), "user ", "tokens", "context of 100", "--history")


def test_tokenizer_without_an_end_token(refused, model, copy):
    path = model / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}
    path.write_text(json.dumps(config))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    refused(train_sft.main, sft(model, copy), model, "no end token", "eos_token")


def test_tokenizer_of_another_model(refused, model, copy):
    edit_json(model / "config.json", image_token_id=100_000)
    refused(train_sft.main, sft(model, copy), model, "100000", "one checkpoint")


def test_not_a_checkpoint(refused, copy, tmp_path):
    refused(train_sft.main, sft(tmp_path, copy), tmp_path, "config.json", "save_pretrained")


def test_another_architecture(refused, model, copy):
    path = model / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    refused(train_sft.main, sft(model, copy), model, "qwen2_vl")


def test_output_folder_in_use(capsys, model, copy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(SystemExit) as stop:
        run(partial(train_sft.main, [*map(str, sft(model, copy)), "--out", str(tmp_path / "out")]))
    assert stop.value.code == 2 and "empty folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize(("flags", "words"), [
    (["--epochs", "0"], ["--epochs 0", "at least 1"]),
    (["--lora-dropout", "1"], ["--lora-dropout 1", "less than 1"]),
    (["--users-from", "0.5", "--users-to", "0.5"], ["0.5", "start < stop"]),
    (["--history", "0"], ["--history 0", "at least 1"]),
    (["--candidates", "401"], ["400 negatives", "fewer negatives"]),
    (["--max-pixels", "100"], ["100", "1024"]),
])
def test_settings_out_of_range(refused, model, copy, flags, words):
    refused(train_sft.main, sft(model, copy, *flags), *words)


def test_settings_file(refused, model, copy, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"model": "m", "learning_rte": 1}')
    refused(train_sft.main, [path], path, "learning_rte", "learning_rate")
    path.write_text("{")
    refused(train_sft.main, [path], path, "JSON")


def test_unknown_user_and_too_long_a_list(refused, model, copy):
    flags = ["--model", model, "--data", copy]
    refused(evaluate.main, [*flags, "--user", "nobody"], "'nobody'", "24 users")
    refused(evaluate.main, [*flags, "--user", "3", "--top-k", 11], "--top-k 11", "10 candidates")
    refused(evaluate.main, [*flags, "--adapter", "base", "base"], "twice")


def test_scores_that_are_not_numbers():
    with pytest.raises(ValueError, match="user row 1"):
        evaluate.rank_of_positive(np.array([[1.0, 0.0], [np.nan, 0.0]]), [0, 0])


def test_no_user_with_an_example(refused, model, copy):
    (copy / "train.tsv").write_text("".join(line.split(" ")[0] + "\n" for line in (copy / "train.tsv").read_text().splitlines()))
    refused(train_sft.main, sft(model, copy), copy, "two training items", "more data")


def test_malformed_adapter_files(refused, model, copy, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text("[]")
    refused(train_dpo.main, sft(model, copy, "--sft", tmp_path / "sft"), "adapter_config.json", "list", "object")


def test_similarity_needs_ten_images(refused, model, copy):
    for path in list((copy / "images").iterdir())[5:]:
        path.unlink()
    refused(evaluate.main, ["--model", model, "--data", copy, "--sets", "random", "--similarity", "--adapter", "base"], "10 images")
