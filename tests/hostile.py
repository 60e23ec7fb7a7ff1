"""How the tests break things: a whole world of good inputs in one folder, and small functions that
spoil a copy of it.

Each of them takes what to spoil and returns a function of the world's folder, so that a table of
cases reads as a list of damages.
"""

import hashlib
import json
import os
import shutil
import struct
import zlib

import torch
import toy
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate

TITLES = "data/Posterland_titles.csv"
TRAIN = "data/train.tsv"
TEST = "data/test.tsv"
FACTS = "data/dataset.json"
POSTER, CANDIDATES = "data/images/7.png", "data/candidates_test_random.json"
WEIGHTS = "model/model.safetensors"
CONFIG = "model/config.json"
TEMPLATE = "model/chat_template.jinja"
TOKENIZER = "model/tokenizer.json"
TOKENIZER_CONFIG = "model/tokenizer_config.json"
PROCESSOR = "model/preprocessor_config.json"
ADAPTER = "sft/adapter_model.safetensors"
ADAPTER_CONFIG = "sft/adapter_config.json"
FACTS_OF_ADAPTER = "sft/hanorec.json"
RAW = {
    "raw/1m/movies.dat": "1::Heat (1995)::Action\n2::Caf\xe9::Drama\n3::Up::War\n",
    "raw/1m/ratings.dat": "1::1::5::10\n1::2::4::20\n1::3::3::30\n",
    "raw/netflix/movie_titles.csv": "1,1995,Heat\n2,NULL,Caf\xe9\n3,2009,Up, and away\n",
    "raw/netflix/combined_data_1.txt": (
        "1:\n7,5,2005-09-01\n2:\n7,4,2005-09-02\n3:\n7,3,2005-09-03\n"
    ),
    "raw/microlens/ML_titles.csv": "1,Heat\n2,Cafe\n3,Up\n",
    "raw/microlens/ML_pairs.csv": "user,item,timestamp\n1,1,10\n1,2,20\n1,3,30\n",
    "raw/recbole/r.inter": (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t1\t5\t10\n1\t2\t5\t20\n"
        "1\t3\t5\t30\n"
    ),
    "raw/recbole/r.item": "item_id:token\ttitle:token_seq\n1\tHeat\n2\tCafe\n3\tUp\n",
}


def make_world(root, data, model, sft):
    """Everything that the commands read: data with its frozen candidates and image features,
    checkpoint, adapter, raw files, settings.
    """
    for name, source in (("data", data), ("model", model), ("sft", sft)):
        shutil.copytree(source, root / name)
    for name, text in RAW.items():
        put(name, text.encode("latin-1"))(root)
    settings = {"model": str(root / "model"), "data": str(root / "data"), "epochs": 1}
    put("settings.json", json.dumps(settings))(root)
    evaluate.main([
        "--model", str(root / "model"), "--data", str(root / "data"), "--out", str(root / "first"),
        "--sets", "random", *toy.SHORT,
    ])
    shutil.rmtree(root / "first")
    return root


def snapshot(root):
    """Relative path -> bytes of a file, or the target of a link; a folder or a pipe has None."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in root.rglob("*")
    }


def put(path, content):
    """Write a file."""
    def spoil(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return spoil


def add(path, content):
    """Append to a file."""
    more = content.encode() if isinstance(content, str) else content
    return lambda root: put(path, (root / path).read_bytes() + more)(root)


def swap(path, old, new):
    """Replace one text by another, wherever it stands."""
    return lambda root: put(path, (root / path).read_text().replace(old, new))(root)


def recode(path, encoding):
    """Save a text in another encoding."""
    return lambda root: put(path, (root / path).read_text().encode(encoding))(root)


def cut(path, size):
    """Leave the first bytes."""
    return lambda root: put(path, (root / path).read_bytes()[:size])(root)


def drop(path):
    """Delete a file or a folder."""
    def spoil(root):
        place = root / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    return spoil


def instead(path, make):
    """Delete, then make something else of that name: `Path.mkdir`, `os.mkfifo` ..."""
    def spoil(root):
        drop(path)(root)
        make(root / path)
    return spoil


def link(path, target):
    """A symbolic link in the place of a file; a relative target counts from the world's folder."""
    def make(place):
        inside = os.path.relpath(place.parents[2] / target, place.parent)
        place.symlink_to(target if target.startswith("/") else inside)
    return instead(path, make)


def merge(path, **changes):
    """Set keys of a JSON object; a value None removes the key."""
    def spoil(root):
        value = json.loads((root / path).read_text()) | changes
        put(path, json.dumps({key: v for key, v in value.items() if v is not None}))(root)
    return spoil


def first_row(change):
    """Change the first frozen set and make the file's hash fit, as a careful forger would."""
    def spoil(root):
        stored = json.loads((root / CANDIDATES).read_text())
        stored["rows"][0] = change(stored["rows"][0])
        text = json.dumps(
            stored["rows"], ensure_ascii=False, sort_keys=True, separators=(",", ":")
        ).encode("utf-8", "surrogatepass")
        put(CANDIDATES, json.dumps(stored | {"sha256": hashlib.sha256(text).hexdigest()}))(root)
    return spoil


def tensors(path, change):
    """Change a safetensors file's tensors; an adapter's hanorec.json goes, since its hash would
    complain first.
    """
    def spoil(root):
        found = load_file(root / path)
        change(found)
        save_file(found, root / path, {"format": "pt"})
        (root / path).with_name("hanorec.json").unlink(missing_ok=True)
    return spoil


def one(found, part):
    """The first tensor's name that holds `part`."""
    return next(name for name in sorted(found) if part in name)


def header(dtype="F32", shape=(1,), length=None):
    """A safetensors file of one tensor without any data; `length` is what it claims of its header.
    """
    text = json.dumps({
        "x": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 4]}
    }).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def huge_png(width, height):
    """A PNG whose header states a size, with no pixels behind it: opening it must not decode
    anything.
    """
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + data
        + struct.pack(">I", zlib.crc32(data))
        + b"\0\0\0\0IDAT"
    )


def picture(path, size=(32, 32), mode="RGB", **options):
    """Save a new image; frames=n makes an animation."""
    def spoil(root):
        frames = [
            Image.new(mode, size, colour)
            for colour in ("red", "blue", "green")[: options.get("frames", 1)]
        ]
        more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
        frames[0].save(root / path, options.get("format"), **more)
    return spoil


def both(*spoils):
    """Several damages at once."""
    return lambda root: [spoil(root) for spoil in spoils]


def quantise(found):
    name = one(found, "q_proj.weight")
    found[name] = (found[name] * 10).to(torch.int8)
