"""The corpus of bad inputs: each breaks a good world in one place and runs a real command on it.

Every command must end with exit code 2 and one message that holds the words given (file, place,
value, expectation, remedy), without a traceback, without output, and without having touched an
input. docs/reliability.md counts the cases.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import hostile
import pytest
import torch
import toy
from hostile import (
    ADAPTER,
    ADAPTER_CONFIG,
    CANDIDATES,
    CONFIG,
    FACTS,
    FACTS_OF_ADAPTER,
    POSTER,
    PROCESSOR,
    TEMPLATE,
    TEST,
    TITLES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TRAIN,
    WEIGHTS,
    add,
    both,
    cut,
    drop,
    first_row,
    header,
    huge_png,
    instead,
    link,
    merge,
    one,
    picture,
    put,
    quantise,
    recode,
    swap,
    tensors,
)

import evaluate
import train_dpo
import train_sft
from hanorec import export
from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import read_json
from hanorec.datasets import microlens, movielens, netflix, recbole
from hanorec.datasets.catalog import data_hash, load_catalog
from hanorec.datasets.lines import MAX_LINE, numbered_lines

DEEP = "[" * 100_000

def one_title(root):
    lines = (root / TITLES).read_text().splitlines()
    put(TITLES, "\n".join([lines[0], *(f"{line.split(',')[0]},Same" for line in lines[1:])]))(root)


def few_images(root):
    for path in sorted((root / "data/images").iterdir())[5:]:
        path.unlink()


# name | how the world is broken | command | words of the message
CORPUS = [
    # ---- titles
    ("titles: another header", swap(TITLES, "item,title", "id,name"), "sft",
     ["titles.csv:1", "'id,name'", "expected 'item,title'", "mend"]),
    ("titles: a field too many", add(TITLES, "900,Good, the Bad\n"), "sft",
     ["titles.csv:296", "3 fields", "expected 2", "double quotes"]),
    ("titles: a quote left open", add(TITLES, '900,"Good\n901,Bad\n'), "sft",
     ["titles.csv:296", "not csv", "close the quotes"]),
    ("titles: a row over two lines", add(TITLES, '900,"Good\nBad"\n'), "sft",
     ["titles.csv:296", "line 297", "one row a line", "remove the break"]),
    ("titles: a hundred thousand characters and more", add(TITLES, "900," + 140_000 * "A" + "\n"),
     "sft", ["titles.csv:296", "131072", "shorten"]),
    ("titles: an id twice", add(TITLES, "7,Again\n"), "sft",
     ["titles.csv:296", "'7'", "line 8", "remove one"]),
    ("titles: an id with a space", add(TITLES, "9 00,A\n"), "sft",
     ["titles.csv:296", "'9 00'", "without spaces"]),
    ("titles: no title", add(TITLES, "900, \n"), "sft",
     ["titles.csv:296", "'900'", "empty title", "add one"]),
    ("titles: NUL", add(TITLES, "900,A\0B\n"), "sft",
     ["titles.csv:296", "NUL", "position 6", "remove"]),
    ("titles: a code for the terminal", add(TITLES, "900,A\x1b[2JB\n"), "sft",
     ["titles.csv:296", r"'\x1b'", "position 6", "remove"]),
    ("titles: a carriage return in a title", add(TITLES, '900,"A\rB"\n'), "sft",
     ["titles.csv:296", "carriage return", "remove"]),
    ("titles: UTF-16", recode(TITLES, "utf-16"), "sft", ["titles.csv:1", "0xff", "utf-8", "save"]),
    ("titles: UTF-16 without a mark", recode(TITLES, "utf-16-le"), "sft",
     ["titles.csv:1", "NUL", "plain text"]),
    ("titles: Latin-1", add(TITLES, b"900,Caf\xe9\n"), "sft",
     ["titles.csv:296", "0xe9", "position 8", "utf-8"]),
    ("titles: one line of five megabytes", add(TITLES, "900," + MAX_LINE * "A" + "\n"), "sft",
     ["titles.csv:296", str(MAX_LINE), "right file"]),
    ("titles: all alike", one_title, "sft",
     ["titles of their own", "3 negatives", "fewer negatives"]),
    ("titles: two files", put("data/Second_titles.csv", "item,title\n1,A\n"), "sft",
     ["2 files", "Second_titles.csv", "move"]),
    ("titles: a folder", instead(TITLES, Path.mkdir), "sft", ["no file *_titles.csv", "add it"]),
    # ---- interactions
    ("train: an unknown item", add(TRAIN, "new\t1 99999\n"), "sft",
     ["train.tsv:25", "'99999'", "titles file", "remove it"]),
    ("train: an id beyond 64 bits", add(TRAIN, f"new\t{2**70}\n"), "sft",
     ["train.tsv:25", str(2**70), "titles file"]),
    ("train: no items", add(TRAIN, "lonely\t\n"), "sft",
     ["train.tsv:25", "'lonely'", "empty history", "remove the line"]),
    ("train: no user", add(TRAIN, " \t1 2\n"), "sft",
     ["train.tsv:25", "empty user", "expected a name"]),
    ("train: a user twice", add(TRAIN, "3\t1 2\n"), "sft", ["train.tsv:25", "'3'", "join"]),
    ("train: commas for tabs", swap(TRAIN, "\t", ","), "sft",
     ["train.tsv:1", "0 tabs", "user<TAB>id id id"]),
    ("train: line ends of old", swap(TRAIN, "\n", "\r"), "sft",
     ["train.tsv:1", "carriage return", "plain text"]),
    ("train: compressed", put(TRAIN, b"\x1f\x8b\x08\0abc"), "sft",
     ["train.tsv:1", "0x8b", "utf-8"]),
    ("train: empty", put(TRAIN, ""), "sft", ["train.tsv", "no users", "user<TAB>id"]),
    ("train: absent", drop(TRAIN), "sft", ["train.tsv", "cannot be read", "check the path"]),
    ("train: a folder", instead(TRAIN, Path.mkdir), "sft",
     ["train.tsv", "cannot be read", "check the path"]),
    ("train: one item a user", lambda w: put(TRAIN, "".join(f"{u}\t1\n" for u in range(1, 25)))(w),
     "sft", ["two training items", "more data"]),
    ("test: a user without history", add(TEST, "stranger\t5\n"), "evaluate",
     ["test.tsv:25", "'stranger'", "train.tsv", "empty history"]),
    # ---- images
    ("image: cut off", cut(POSTER, 60), "sft",
     ["images/7.png", "not a whole JPEG, PNG or WebP", "replace"]),
    ("image: empty", put(POSTER, b""), "sft", ["images/7.png", "not a whole", "replace"]),
    ("image: a web page", put(POSTER, "<html>404</html>"), "sft",
     ["images/7.png", "not a whole", "replace"]),
    ("image: a GIF by another name", picture(POSTER, format="GIF"), "sft",
     ["images/7.png", "JPEG, PNG or WebP"]),
    ("image: SVG",
     put(POSTER, '<svg xmlns="http://www.w3.org/2000/svg">'
                 '<image href="file:///etc/passwd"/></svg>'),
     "sft", ["images/7.png", "not a whole"]),
    ("image: a billion pixels", put(POSTER, huge_png(40_000, 30_000)), "sft",
     ["images/7.png", "pixels"]),
    ("image: fifty million pixels", put(POSTER, huge_png(10_000, 5_000)), "sft",
     ["images/7.png", "10000 x 5000", "at most 40000000", "shrink"]),
    ("image: forty megabytes", lambda w: os.truncate(w / POSTER, 40 * 2**20), "sft",
     ["images/7.png", "41943040 bytes", "shrink"]),
    ("image: a thread", picture(POSTER, (1, 300)), "sft",
     ["images/7.png", "1 x 300", "200 times", "crop"]),
    ("image: an animated PNG", picture(POSTER, frames=3), "sft",
     ["images/7.png", "animation", "still image", "save the frame"]),
    ("image: an animated WebP", both(drop(POSTER), picture("data/images/7.webp", frames=2)), "sft",
     ["images/7.webp", "animation", "save the frame"]),
    ("image: a link out of the folder", link(POSTER, "raw/1m/movies.dat"), "sft",
     ["images/7.png", "raw/1m/movies.dat", "out of the image folder", "copy"]),
    ("image: a link to the password file", link(POSTER, "/etc/passwd"), "sft",
     ["images/7.png", "/etc/passwd", "out of the image folder", "copy"]),
    ("image: a link that leads nowhere", link(POSTER, "data/images/none.png"), "sft",
     ["images/7.png", "broken link", "remove the entry"]),
    ("image: a link to itself", link(POSTER, POSTER), "sft",
     ["images/7.png", "broken link", "remove the entry"]),
    ("image: a folder", instead(POSTER, Path.mkdir), "sft",
     ["images/7.png", "a folder", "expected an image file"]),
    ("image: a pipe", instead(POSTER, os.mkfifo), "sft",
     ["images/7.png", "a device", "expected an image file"]),
    ("image: two for an item", picture("data/images/7.jpg"), "sft",
     ["images/7.png", "7.jpg", "one an item", "remove one"]),
    ("images: a file", both(drop("data/images"), put("data/images", "x")), "sft",
     ["data/images", "expected a folder"]),
    ("images: five, where ten are needed", few_images, "evaluate --similarity",
     ["--similarity", "fewer than 10 images", "expected"]),
    ("images: gone", drop("data/images"), "sft",
     ["dataset.json", "'drawn'", "no image of these items", "mend"]),
    # ---- JSON of the data folder
    ("dataset.json: deep", put(FACTS, DEEP), "sft",
     ["dataset.json", "recursion", "mend or remake"]),
    ("dataset.json: NaN", put(FACTS, '{"covers": "drawn", "seed": NaN}'), "sft",
     ["dataset.json", "NaN", "no finite number", "mend"]),
    ("dataset.json: a number beyond floats", put(FACTS, '{"covers": "drawn", "seed": 1e999}'),
     "sft", ["dataset.json", "1e999", "mend"]),
    ("dataset.json: five thousand digits",
     put(FACTS, '{"covers": "drawn", "seed": ' + 5000 * "9" + "}"), "sft",
     ["dataset.json", "5000 digits"]),
    ("dataset.json: a key twice", put(FACTS, '{"covers": "none", "covers": "drawn"}'), "sft",
     ["dataset.json", "'covers' stands twice", "mend"]),
    ("dataset.json: half a surrogate", put(FACTS, '{"covers": "drawn", "name": "\\ud800"}'), "sft",
     ["dataset.json", "'name'", "surrogate", "mend"]),
    ("dataset.json: a name that commands", merge(FACTS, name="A\x1b[2J"), "sft",
     ["dataset.json", r"'A\x1b[2J'", "printable"]),
    ("dataset.json: unknown covers", merge(FACTS, covers=["real"]), "sft",
     ["dataset.json", "['real']", "real, drawn, none"]),
    ("dataset.json: a list", put(FACTS, "[]"), "sft",
     ["dataset.json", "list", "expected an object"]),
    ("dataset.json: UTF-16", recode(FACTS, "utf-16"), "sft", ["dataset.json", "UTF-8", "mend"]),
    ("dataset.json: a folder", instead(FACTS, Path.mkdir), "sft",
     ["dataset.json", "cannot be read", "check the path"]),
    # ---- frozen candidates
    ("candidates: edited", swap(CANDIDATES, '"candidates":["', '"candidates":["1'), "evaluate",
     ["random.json", "sha256", "edited", "delete the file"]),
    ("candidates: deep", put(CANDIDATES, DEEP), "evaluate", ["random.json", "recursion", "remake"]),
    ("candidates: a list", put(CANDIDATES, "[]"), "evaluate",
     ["random.json", "list", "expected an object"]),
    ("candidates: no rows", put(CANDIDATES, '{"facts": {}, "sha256": ""}'), "evaluate",
     ["random.json", "expected facts, sha256 and rows", "delete"]),
    ("candidates: of other data", add(TITLES, "9999,Late Arrival\n"), "evaluate",
     ["random.json", "data_sha256", "delete the file"]),
    ("candidates: of another seed", put("x", ""), "evaluate --seed 1",
     ["random.json", "seed is 2025", "expected 1", "delete"]),
    ("candidates: a row that is no object", first_row(lambda row: 5), "evaluate",
     ["random.json", "row 1", "is 5", "expected an object"]),
    ("candidates: a row without its user", first_row(lambda row: {"candidates": row["candidates"]}),
     "evaluate", ["row 1", "None", "expected ('1'"]),
    ("candidates: a number for the list", first_row(lambda row: row | {"candidates": 7}),
     "evaluate", ["row 1", "a list of candidate ids", "delete"]),
    ("candidates: a list for an id", first_row(lambda row: row | {"candidates": [[1]]}), "evaluate",
     ["row 1", "[[1]]", "a list of candidate ids"]),
    ("candidates: half a surrogate for an id",
     first_row(lambda row: row | {"candidates": ["\ud800", *row["candidates"][1:]]}), "evaluate",
     ["row 1", r"'\ud800'", "unknown", "delete"]),
    ("candidates: too few", first_row(lambda row: row | {"candidates": [row["target"]]}),
     "evaluate", ["row 1", "1 candidates", "3 negatives"]),
    ("candidates: one twice",
     first_row(lambda row: row | {"candidates": [row["candidates"][0]] * 4}), "evaluate",
     ["row 1", "appears twice"]),
    # ---- checkpoints
    ("model: nothing there", drop(CONFIG), "sft", ["model", "no config.json", "save_pretrained"]),
    ("model: another family", put(CONFIG, '{"model_type": "llama"}'), "sft",
     ["model", "qwen2_vl", "expected a local folder"]),
    ("model: config of nothing", put(CONFIG, "[]"), "sft",
     ["model", "cannot be loaded", "expected a local folder"]),
    ("model: config deep", put(CONFIG, DEEP), "sft",
     ["model", "RecursionError", "expected a local folder"]),
    ("model: config deep, on its way out", put(CONFIG, DEEP), "export --merge",
     ["model", "RecursionError", "expected a local folder"]),
    ("model: config with a number for a part", merge(CONFIG, text_config=5), "sft",
     ["model", "text_config", "expected a local folder"]),
    ("model: weights cut off", cut(WEIGHTS, 5000), "sft",
     ["model", "SafetensorError", "safetensors weights"]),
    ("model: a header of exabytes", put(WEIGHTS, header(length=2**62)), "sft",
     ["model", "deserializing header", "safetensors weights"]),
    ("model: pickled weights only",
     lambda w: (w / WEIGHTS).rename(w / "model" / "pytorch_model.bin"), "sft",
     ["model", "safetensors", "expected"]),
    ("model: a weight missing", tensors(WEIGHTS, lambda t: t.pop(one(t, "q_proj.weight"))), "sft",
     ["1 weights are missing", "q_proj", "copy it again"]),
    ("model: a weight too many",
     tensors(WEIGHTS, lambda t: t.update({"model.layers.9.x": t[one(t, "norm")].clone()})), "sft",
     ["1 weights have no place", "layers.9.x", "one checkpoint", "copy both"]),
    ("model: a weight of another shape",
     tensors(WEIGHTS, lambda t: t.update({(q := one(t, "q_proj.weight")): t[q][:5].clone()})),
     "sft", ["model", "cannot be loaded", "expected a local folder"]),
    ("model: quantised", tensors(WEIGHTS, quantise), "sft",
     ["model.safetensors", "q_proj.weight", "I8", "F64, F32, F16 or BF16", "not quantised"]),
    ("model: the image token of another", merge(CONFIG, image_token_id=300), "sft",
     ["model", "token 300", "a part of a word", "one checkpoint"]),
    ("model: an image token below 0", merge(CONFIG, image_token_id=-5), "sft",
     ["model", "token -5", "one checkpoint"]),
    ("model: a tokenizer too large", merge(CONFIG, image_token_id=100_000), "sft",
     ["model", "100000", "one checkpoint"]),
    ("model: a short context",
     swap(CONFIG, '"max_position_embeddings": 4096', '"max_position_embeddings": 50'), "sft",
     ["user ", "tokens", "context of 50", "--history"]),
    ("model: NaN among its embeddings",
     tensors(WEIGHTS, lambda t: t[one(t, "embed_tokens")].fill_(torch.nan)), "dpo",
     ["item row 0", "nan", "not finite"]),
    ("model: no tokenizer", drop(TOKENIZER), "sft",
     ["model", "the tokenizer has", "one checkpoint"]),
    ("model: tokenizer deep", put(TOKENIZER, DEEP), "sft",
     ["model", "RecursionError", "copy tokenizer"]),
    ("model: tokenizer settings of nothing", put(TOKENIZER_CONFIG, "[]"), "sft",
     ["model", "tokenizer", "cannot be loaded", "copy tokenizer"]),
    ("model: no end token",
     swap(TOKENIZER_CONFIG, '"eos_token": "<|im_end|>"', '"eos_token": null'),
     "sft", ["model", "no end token", "set eos_token"]),
    ("model: a tokenizer with a hundred tokens more",
     merge(TOKENIZER_CONFIG, extra_special_tokens=[f"<{n}>" for n in range(100)]), "sft",
     ["model", "the tokenizer has", "one checkpoint"]),
    ("template: drops the text", put(TEMPLATE, "always the same"), "sft",
     ["model", "chat template", "render the user's text once"]),
    ("template: has an image of its own", swap(TEMPLATE, "<|im_start|>", "<|image_pad|>"), "sft",
     ["model", "without an image of its own"]),
    ("template: broken", put(TEMPLATE, "{% if"), "sft",
     ["model", "chat template", "another model"]),
    ("template: divides by 0", put(TEMPLATE, "{{ 1 / 0 }}"), "sft",
     ["model", "ZeroDivisionError", "copy the template"]),
    ("template: calls itself", put(TEMPLATE, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
     "sft", ["model", "RecursionError", "copy the template"]),
    ("template: asks Python for more", put(TEMPLATE, "{{ messages.__class__.__mro__ }}"), "sft",
     ["model", "chat template", "another model"]),
    ("image processor: patches of another size",
     both(merge(PROCESSOR, patch_size=14), link(POSTER, "data/images/8.png")), "sft",
     ["model", "patch_size in preprocessor_config.json is 14", "16", "copy both files"]),
    ("image processor: divides by 0", both(merge(PROCESSOR, image_std=[0, 0, 0])), "sft",
     ["model", "NaN or infinity", "image_std"]),
    ("image processor: a list", put(PROCESSOR, "[]"), "sft",
     ["model", "image processor", "cannot be loaded", "copy tokenizer and preprocessor"]),
    # ---- adapters
    ("adapter: not one", drop(ADAPTER_CONFIG), "export",
     ["sft/adapter_config.json", "no such file", "check the path"]),
    ("adapter: a list", put(ADAPTER_CONFIG, "[]"), "export",
     ["adapter_config.json", "list", "expected an object"]),
    ("adapter: rank in the billions", merge(ADAPTER_CONFIG, r=10**9), "export",
     ["adapter_model.safetensors", "(8, ", "(1000000000, ...)", "copy"]),
    ("adapter: another rank", merge(ADAPTER_CONFIG, r=4), "dpo",
     ["adapter_model.safetensors", "(8, ", "(4, ...)", "rank", "copy"]),
    ("adapter: another base", tensors(WEIGHTS, lambda t: t[one(t, "q_proj.weight")].mul_(2)), "dpo",
     ["sft", "another base", "load that base"]),
    ("adapter: rank True", merge(ADAPTER_CONFIG, r=True), "export",
     ["adapter_config.json", "r = True", "expected numbers", "remake"]),
    ("adapter: alpha NaN", swap(ADAPTER_CONFIG, "32.0", "NaN"), "export",
     ["adapter_config.json", "NaN", "remake"]),
    ("adapter: alpha 1e300", merge(ADAPTER_CONFIG, lora_alpha=1e300), "export",
     ["adapter_config.json", "1e+300", "remake"]),
    ("adapter: dropout a text", merge(ADAPTER_CONFIG, lora_dropout="0.5"), "export",
     ["adapter_config.json", "'0.5'", "below 1", "remake"]),
    ("adapter: another kind", merge(ADAPTER_CONFIG, use_dora=True), "export",
     ["adapter_config.json", "use_dora = True", "only plain LoRA"]),
    ("adapter: a tensor missing", tensors(ADAPTER, lambda t: t.pop(one(t, "lora_B"))), "export",
     ["1 tensors are missing", "lora_B", "another base"]),
    ("adapter: a tensor too many",
     tensors(ADAPTER, lambda t: t.update(x=t[one(t, "lora_B")].clone())), "export",
     ["no place", "e.g. x", "another base"]),
    ("adapter: another shape",
     tensors(ADAPTER, lambda t: t.update({one(t, "lora_B"): t[one(t, "lora_B")][:3].clone()})),
     "export", ["adapter_model.safetensors", "lora_B", "(3, 8)", "another base or rank"]),
    ("adapter: integers",
     tensors(ADAPTER, lambda t: t.update({one(t, "lora_B"): t[one(t, "lora_B")].int()})), "export",
     ["int32", "expected floats"]),
    ("adapter: NaN", tensors(ADAPTER, lambda t: t[one(t, "lora_B")].fill_(float("nan"))), "export",
     ["lora_B", "NaN", "earlier adapter"]),
    ("adapter: one byte changed",
     lambda w: put(ADAPTER, (w / ADAPTER).read_bytes()[:-1] + b"\1")(w), "export",
     ["hash differs", "save it again"]),
    ("adapter: a header that lies", put(ADAPTER, header(shape=(10**12,))), "export",
     ["adapter_model.safetensors", "not a whole", "save the adapter"]),
    ("adapter: a folder for the tensors", instead(ADAPTER, Path.mkdir), "export",
     ["adapter_model.safetensors", "no such file", "adapter folder"]),
    ("adapter: facts of nothing", merge(FACTS_OF_ADAPTER, prompt=5), "export",
     ["hanorec.json", "prompt is 5", "expected an object"]),
    ("adapter: stands on itself", lambda w: (w / "sft" / "below").symlink_to("."), "export",
     ["sft/below", "in the order in which they were trained"]),
    ("adapter: in evaluation", put(ADAPTER_CONFIG, DEEP), "evaluate --adapter base {sft}",
     ["adapter_config.json", "recursion", "remake"]),
    ("adapter: below DPO", put(ADAPTER, header()), "dpo",
     ["sft/adapter_model.safetensors", "not a whole", "save the adapter again"]),
    # ---- settings
    ("settings: an unknown key", put("settings.json", '{"model": "m", "learning_rte": 1}'),
     "settings", ["settings.json", "learning_rte", "learning_rate"]),
    ("settings: a key twice", put("settings.json", '{"model": "m", "model": "n"}'), "settings",
     ["settings.json", "'model' stands twice"]),
    ("settings: NUL in a path", put("settings.json", '{"model": "m\\u0000"}'), "settings",
     ["settings.json", "'model'", "NUL"]),
    ("settings: cut off", put("settings.json", "{"), "settings",
     ["settings.json", "UTF-8 JSON", "mend or remake"]),
    ("settings: no epoch", put("x", ""), "sft --epochs 0", ["--epochs 0", "at least 1"]),
    ("settings: dropout of everything", put("x", ""), "sft --lora-dropout 1",
     ["--lora-dropout 1", "less than 1"]),
    ("settings: nobody", put("x", ""), "sft --users-from 0.5 --users-to 0.5",
     ["0.5", "start < stop"]),
    ("settings: more negatives than items", put("x", ""), "sft --candidates 401",
     ["400 negatives", "fewer negatives"]),
    ("settings: more neighbours than items", put("x", ""), "dpo --k 294",
     ["K = 294", "294 items", "1 .. 293"]),
    ("settings: two rows", put("x", ""), "dpo --users-to 0.08",
     ["2 training rows", "at least 3", "use more users"]),
    ("settings: a step of two", put("x", ""), "dpo --micro-batch 1 --accumulation 2",
     ["steps of 2", "at least 3", "--accumulation"]),
    ("settings: an output folder in use", put("out/precious", "data"), "export",
     ["out", "not an empty folder", "choose another --out"]),
    ("settings: less than a token", put("x", ""), "sft --max-pixels 100",
     ["100", "1024", "allow at least"]),
    ("settings: no such device", put("x", ""), "sft --device tpu9",
     ["--device tpu9", "cannot be used", "expected cpu"]),
    ("settings: an unknown user", put("x", ""), "evaluate --user nobody",
     ["'nobody'", "test.tsv", "24 users"]),
    ("settings: a list longer than the set", put("x", ""), "evaluate --user 3 --top-k 11",
     ["--top-k 11", "4 candidates"]),
    ("settings: one policy twice", put("x", ""), "evaluate --adapter base base",
     ["base base", "twice", "each once"]),
    # ---- converters
    ("movielens: a field missing", add("raw/1m/ratings.dat", "1::1::5\n"), "movielens",
     ["ratings.dat:4", "3 fields", "expected 4", "mend"]),
    ("movielens: a rating of words", add("raw/1m/ratings.dat", "1::1::good::9\n"), "movielens",
     ["ratings.dat:4", "'good'", "finite number"]),
    ("movielens: an endless time", add("raw/1m/ratings.dat", "1::1::5::1e999\n"), "movielens",
     ["ratings.dat:4", "'1e999'", "finite number"]),
    ("movielens: an item without a title", add("raw/1m/ratings.dat", "1::77::5::9\n"), "movielens",
     ["'77'", "no title", "add it"]),
    ("movielens: an item twice", add("raw/1m/movies.dat", "2::Heat::War\n"), "movielens",
     ["movies.dat:4", "'2'", "earlier line", "remove one"]),
    ("movielens: NUL", add("raw/1m/movies.dat", "9::A\0::War\n"), "movielens",
     ["movies.dat:4", "NUL", "remove"]),
    ("movielens: a line of five megabytes", add("raw/1m/ratings.dat", (MAX_LINE + 1) * b"1"),
     "movielens", ["ratings.dat:4", str(MAX_LINE), "right file"]),
    ("movielens: a user with too little", add("raw/1m/ratings.dat", "5::1::5::9\n"), "movielens",
     ["'5'", "1 interactions", "--min-items 3"]),
    ("movielens: no folder", drop("raw/1m"), "movielens",
     ["neither ratings.dat nor u.data", "expected one"]),
    ("movielens: covers that lead out",
     both(put("covers/2.txt", "secret"),
          lambda w: (w / "covers/2.jpg").symlink_to(w / "raw/1m/movies.dat")),
     "movielens --images {root}/covers", ["covers/2.jpg", "out of the image folder", "copy"]),
    ("netflix: a rating before any movie",
     put("raw/netflix/combined_data_1.txt", "7,5,2005-09-01\n"), "netflix",
     ["data_1.txt:1", "before any movie"]),
    ("netflix: the 31st of June", add("raw/netflix/combined_data_1.txt", "7,5,2005-06-31\n"),
     "netflix", ["data_1.txt:7", "'2005-06-31'", "YYYY-MM-DD"]),
    ("microlens: another header", swap("raw/microlens/ML_pairs.csv", "timestamp", "when"),
     "microlens", ["ML_pairs.csv:1", "user,item,when", "mend"]),
    ("microlens: a title without an id", add("raw/microlens/ML_titles.csv", "Heat\n"), "microlens",
     ["ML_titles.csv:4", "no comma", "'Heat'"]),
    ("recbole: untyped columns", swap("raw/recbole/r.inter", ":token", ""), "recbole",
     ["r.inter:1", "user_id", "typed columns"]),
    ("recbole: an unknown column", put("x", ""), "recbole --time-field when",
     ["r.inter:1", "'when'", "--time-field"]),
]


@pytest.fixture(scope="session")
def whole(data, checkpoints, sft, tmp_path_factory):
    """The unbroken world."""
    return hostile.make_world(
        tmp_path_factory.mktemp("world") / "world", data, checkpoints["qwen2_5_vl"], sft
    )


def command(root, words):
    """(main, its arguments) of a line of the table."""
    name, *flags = [word.format(root=root, sft=root / "sft") for word in shlex.split(words)]
    out, model = root / "out", ["--model", root / "model"]
    usual = [*model, "--data", root / "data", *toy.SHORT, "--out", out]
    main, arguments = {
        "sft": (train_sft.main, [*usual, *toy.STEPS]),
        "dpo": (train_dpo.main, [*usual, *toy.STEPS, "--sft", root / "sft"]),
        "evaluate": (evaluate.main, [*usual, "--sets", "random"]),
        "settings": (train_sft.main, [root / "settings.json", *toy.SHORT, "--out", out]),
        "export": (export.main, [*model, "--adapter", root / "sft", "--out", out]),
        "movielens": (movielens.main, [root / "raw/1m", out]),
        "netflix": (netflix.main, [root / "raw/netflix", out]),
        "microlens": (microlens.main, [root / "raw/microlens", out]),
        "recbole": (recbole.main, [root / "raw/recbole", out]),
    }[name]
    return main, [*map(str, arguments), *flags]


def untouched(root, before):
    """No input is another one; all that may be new is an empty OUT and, in the data folder, what is
    computed once and kept there.
    """
    after = hostile.snapshot(root)
    kept = {
        name
        for name in after.keys() - before.keys()
        if name.startswith(("data/features-", "data/candidates_"))
    }
    new = after.keys() - before.keys() - kept
    return (
        all(after.get(name) == content for name, content in before.items())
        and new <= {"out"}
        and after.get("out") is None
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:divide by zero")
@pytest.mark.parametrize(
    ("spoil", "words", "parts"), [case[1:] for case in CORPUS], ids=[case[0] for case in CORPUS]
)
def test_bad_input_is_refused(whole, tmp_path, capsys, spoil, words, parts):
    root = shutil.copytree(whole, tmp_path / "world", symlinks=True)
    spoil(root)
    before = hostile.snapshot(root)
    main, arguments = command(root, words)
    with pytest.raises(SystemExit) as stop:
        run(partial(main, arguments))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in printed
    message = printed[printed.rindex("error: "):]
    for part in parts:
        assert part in message, message
    # a flag: what was expected
    assert ";" in message or ", so " in message or message.startswith("error: --"), (
        f"no remedy in: {message}"
    )
    assert len(message) < 1500, "a value of megabytes has no place in a message"
    assert untouched(root, before)


def test_the_corpus_is_large_and_its_names_are_its_own():
    names = [case[0] for case in CORPUS]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize(
    "name",
    ["sft", "dpo", "evaluate", "settings", "export", "movielens", "netflix", "microlens",
     "recbole"],
)
def test_the_whole_world_is_accepted(whole, tmp_path, name):
    """Negative control: unbroken, every command of the table succeeds; and the check of the inputs
    would notice a change.
    """
    root = shutil.copytree(whole, tmp_path / "world", symlinks=True)
    put("settings.json", (root / "settings.json").read_text().replace(str(whole), str(root)))(root)
    before = hostile.snapshot(root)
    main, arguments = command(root, name)
    run(partial(main, arguments))
    assert any((root / "out").iterdir()) and not untouched(root, before)
    shutil.rmtree(root / "out")
    assert untouched(root, before)
    add(TITLES, "\n")(root)
    assert not untouched(root, before)


@pytest.mark.parametrize(
    ("spoil", "arguments", "word"),
    [(add(TITLES, "7,Again\n"),
      ["train_sft.py", "--model", "model", "--data", "data", "--out", "out"], "titles.csv:296"),
     (add("raw/microlens/ML_titles.csv", "Heat\n"),
      ["-m", "hanorec.datasets.microlens", "raw/microlens", "out"], "ML_titles.csv:4")],
)
def test_as_a_process(whole, tmp_path, spoil, arguments, word):
    """The same from outside: exit code 2, one line that begins with error, nothing on stdout but
    progress.
    """
    root = shutil.copytree(whole, tmp_path / "world", symlinks=True)
    spoil(root)
    home = Path(__file__).parent.parent
    arguments = [
        str(home / arguments[0]) if arguments[0].endswith(".py") else arguments[0], *arguments[1:]
    ]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(home)},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: ")
    assert word in last
    assert "Traceback" not in done.stderr


def test_a_line_of_a_gigabyte_is_not_read_whole(tmp_path):
    """A sparse file without a line break: refused within some megabytes and a second."""
    path = tmp_path / "train.tsv"
    with open(path, "wb") as file:
        file.write(b"u\t1 2 3\n")
        file.truncate(2**30)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(InputError, match=f"train.tsv:2: more than {MAX_LINE} bytes"):
        list(numbered_lines(path))
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_LINE and seconds < 5
    os.truncate(path, 2**30 + 1)
    with pytest.raises(InputError, match=f"train.tsv: {2**30 + 1} bytes of JSON, expected at most"):
        read_json(path)


def test_duplicate_title_in_a_candidate_set(whole, tmp_path, capsys):
    """The set was drawn with different titles; then two items were given one title, and the file's
    hash was made to fit.
    """
    root = shutil.copytree(whole, tmp_path / "world", symlinks=True)
    first = json.loads((root / CANDIDATES).read_text())["rows"][0]["candidates"][:2]
    lines = [
        f"{line.split(',')[0]},Twin" if line.split(",")[0] in first else line
        for line in (root / TITLES).read_text().splitlines()
    ]
    put(TITLES, "\n".join(lines) + "\n")(root)
    stored = json.loads((root / CANDIDATES).read_text())
    stored["facts"]["data_sha256"] = data_hash(load_catalog(root / "data"))
    put(CANDIDATES, json.dumps(stored))(root)
    main, arguments = command(root, "evaluate")
    with pytest.raises(SystemExit):
        run(partial(main, arguments))
    message = capsys.readouterr().err
    assert all(
        part in message
        for part in ("random.json: row 1", first[0], first[1], "'Twin'", "delete the file")
    )


def test_loss_that_is_not_finite(whole, tmp_path, capsys):
    """Found in the first step, when run.json is there already; no weight was touched."""
    root = shutil.copytree(whole, tmp_path / "world", symlinks=True)
    tensors(WEIGHTS, lambda t: t[one(t, "layers.1.mlp.down_proj")].fill_(torch.inf))(root)
    main, arguments = command(root, "sft")
    with pytest.raises(SystemExit) as stop:
        run(partial(main, arguments))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(
        part in message for part in ("step 0", "nan", "users of the batch", "nothing was updated")
    )
    assert not (root / "out" / "adapter_model.safetensors").exists()
