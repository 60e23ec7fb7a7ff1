"""The feature file: equal to the pictures in memory, whole or refused, never loaded as a whole.
Items in batches equal one by one.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train_sft
from hanorec.base.config import DataConfig
from hanorec.base.errors import InputError
from hanorec.datasets.images import read_image
from hanorec.mllm import features, items
from hanorec.mllm.backbone import FAMILIES, hidden_states, image_features, prompt_positions
from hanorec.mllm.features import feature_facts, stored_pictures, write_index
from hanorec.mllm.items import encode_pictures, item_embeddings
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import text_ids
from hanorec.mllm.tasks import load_pictures


@pytest.fixture
def few(catalog):
    """The odd catalogue's first 40 items: row 1 has no image, 2 a wide one, 3 a tall one."""
    return replace(
        catalog, ids=catalog.ids[:40], titles=catalog.titles[:40], images=catalog.images[:40]
    )


@pytest.fixture
def no_tower(monkeypatch):
    """Call it, and from then on nobody may run the vision tower."""
    def forbid():
        monkeypatch.setattr(items, "image_features", lambda *_: pytest.fail("the vision tower ran"))
    return forbid


def same(one, two):
    """Equal to the bit: rows, numbers, types and grids."""
    assert list(one) == list(two)
    for row, (a, grid) in one.items():
        b, other = two[row]
        assert a.dtype == b.dtype and torch.equal(a, b)
        assert grid is other is None or (grid.dtype == other.dtype and torch.equal(grid, other))
    return True


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- equal to the plain path, and computed once ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_memory_and_computed_once(checkpoints, few, no_tower, tmp_path, family, dtype):
    backbone = load_backbone(str(checkpoints[family]), dtype, "cpu")
    plain = encode_pictures(backbone, few, range(40))
    assert 1 not in plain and len({len(picture.features) for picture in plain.values()}) > 1
    assert all(picture.features.dtype == getattr(torch, dtype) for picture in plain.values())
    # the folder is made
    assert same(stored_pictures(backbone, few, tmp_path / "new" / "folder"), plain)
    before = bytes_of(tmp_path / "new" / "folder")
    assert sorted(Path(name).suffix for name in before) == [".bin", ".json"]
    no_tower()
    assert same(
        stored_pictures(
            load_backbone(str(checkpoints[family]), dtype, "cpu"), few, tmp_path / "new" / "folder"
        ),
        plain,
    )
    assert bytes_of(tmp_path / "new" / "folder") == before


def test_without_any_image_there_is_no_file(qwen, few, tmp_path):
    assert stored_pictures(qwen, replace(few, images=(None,) * 40), tmp_path) == {}
    assert not any(tmp_path.iterdir())


def test_the_commands_share_one_file(checkpoints, data, no_tower, tmp_path, capsys):
    """train_sft writes it; evaluate reads it, with each item's own image and with another's;
    --features says where.
    """
    folder = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("features-*"))
    store = tmp_path / "store"
    common = [
        "--model", str(checkpoints["qwen2_5_vl"]), "--data", str(folder), "--features", str(store),
        "--history", "2", "--users-to", "0.25",
    ]
    train_sft.main([
        *common, "--epochs", "1", "--targets-per-user", "1", "--out", str(tmp_path / "sft")
    ])
    told = capsys.readouterr().out
    assert f"294 images of Posterland are encoded once, into {store}" in told
    no_tower()
    for images in ("own", "shuffled"):
        evaluate.main([
            *common, "--images", images, "--similarity", "true", "--out", str(tmp_path / images)
        ])
    own, shuffled = (
        json.loads((tmp_path / images / "metrics.json").read_text())
        for images in ("own", "shuffled")
    )
    assert own["similarity"] != shuffled["similarity"]
    assert own["sets"]["hard"]["scores"] != shuffled["sets"]["hard"]["scores"]
    assert not list(folder.glob("features-*")) and len(list(store.iterdir())) == 2


def test_plain_keeps_nothing(qwen, few, tmp_path):
    stored = load_pictures(qwen, few, DataConfig(data=str(tmp_path)))
    assert len(list(tmp_path.glob("features-*"))) == 2
    assert same(
        load_pictures(qwen, few, DataConfig(data=str(tmp_path / "none"), plain=True)), stored
    )
    assert not (tmp_path / "none").exists()


# ---- the key ----


def test_what_the_features_depend_on(make, few, tmp_path):
    """Each change alone gives other facts, so another file; and what does not matter gives the
    same.
    """
    folder = make("qwen2_5_vl")
    load = lambda path=folder, **options: load_backbone(
        str(path), **{"dtype": "float32", "device": "cpu"} | options
    )
    first = feature_facts(load(), few)

    def differ(backbone=None, catalog=few):
        other = feature_facts(backbone or load(), catalog)
        assert other.keys() == first.keys()
        return {name for name, value in first.items() if other[name] != value}

    assert differ() == set()
    copy = shutil.copytree(folder, tmp_path / "copy")
    renamed = replace(few, titles=few.titles[::-1], directory=tmp_path, name="Other")
    assert differ(load(copy), renamed) == set()  # neither where the base lies nor a title
    backbone = load()
    backbone.model.get_input_embeddings().weight += 1
    assert differ(backbone) == set()  # nor the language model
    for name in ("patch_embed.proj.weight", "blocks.1.mlp.up_proj.weight", "merger.mlp.2.bias"):
        backbone = load()
        backbone.model.model.visual.get_parameter(name).view(-1)[-1] += 1e-3  # one number, the last
        assert differ(backbone) == {"weights_sha256"}
    assert differ(load(dtype="bfloat16")) == {"dtype", "weights_sha256", "config"}
    assert differ(load(max_pixels=1024)) == {"image_processor"}
    backbone = load()
    backbone.config.vision_config.fullatt_block_indexes = [0]
    assert differ(backbone) == {"config"}
    poster = tmp_path / "poster.png"
    data = bytearray(few.images[5].read_bytes())
    data[-20] ^= 1
    poster.write_bytes(data)
    # as old and as long as the one it replaces
    os.utime(poster, ns=(few.images[5].stat().st_mtime_ns,) * 2)
    before, (a, b), after = few.images[:5], few.images[5:7], few.images[7:]
    for images in ([poster, b], [b, a], [None, b]):
        other = replace(few, images=(*before, *images, *after))
        assert differ(catalog=other) == {"images_sha256"}
    assert differ(catalog=replace(few, ids=("x", *few.ids[1:]))) == {"images_sha256"}


def test_llava_depends_on_its_newline_and_tilings(checkpoints, few):
    load = lambda **options: load_backbone(
        str(checkpoints["llava_next"]), "float32", "cpu", **options
    )
    first, backbone = feature_facts(load(), few), load()
    backbone.model.model.image_newline += 1
    assert feature_facts(backbone, few)["weights_sha256"] != first["weights_sha256"]
    low = feature_facts(load(max_pixels=28 * 28), few)
    assert low["image_processor"] != first["image_processor"] and low["config"] != first["config"]


def test_bases_and_images_lie_side_by_side(checkpoints, few, no_tower, tmp_path):
    pairs = [(load_backbone(str(checkpoints[family]), "float32", "cpu"), catalog)
             for family in FAMILIES for catalog in (few, replace(few, images=few.images[::-1]))]
    found = [stored_pictures(*pair, tmp_path) for pair in pairs]
    assert len(list(tmp_path.iterdir())) == 2 * 6
    no_tower()
    assert all(
        same(stored_pictures(*pair, tmp_path), pictures)
        for pair, pictures in zip(pairs, found, strict=True)
    )


# ---- whole or refused ----


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def facts_of(path, **changes):
    return json.loads(path.read_text())["facts"] | changes


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(lambda data, index: data.write_bytes(data.read_bytes()[:-4]),
      ["bin: ", " bytes, expected ", "cut off"]),
     (lambda data, index: data.write_bytes(data.read_bytes() + bytes(4)),
      ["bin: ", " bytes, expected "]),
     (lambda data, index: data.unlink(), ["bin: 0 bytes, expected "]),
     (lambda data, index: edit(index, tokens=[1, 7, *[4] * 37]), ["json: ", "sha256", "edited"]),
     (lambda data, index: edit(index, grids=None), ["json: ", "sha256", "edited"]),
     (lambda data, index: edit(index, facts=facts_of(index, more=1)),
      ["json: ", "sha256", "edited"]),
     (lambda data, index: edit(index, facts=facts_of(index, dtype="float16")),
      ["json: dtype is 'float16' in the file, expected 'float32'"]),
     (lambda data, index: edit(index, facts=facts_of(index, images_sha256="0")),
      ["json: images_sha256 is '0' in the file, expected '"]),
     (lambda data, index: edit(index, facts=None),
      ["json: dtype is None in the file, expected 'float32'"]),
     (lambda data, index: index.write_text("{"), ["json: not readable as UTF-8 JSON", "remake"]),
     (lambda data, index: index.write_text("[]"), ["json: holds a JSON list", "remake"])],
)
def test_damaged_files_are_refused(qwen, few, tmp_path, spoil, words):
    stored_pictures(qwen, few, tmp_path)
    (data,), (index,) = tmp_path.glob("*.bin"), tmp_path.glob("*.json")
    spoil(data, index)
    with pytest.raises(InputError) as caught:
        stored_pictures(qwen, few, tmp_path)
    assert all(word in str(caught.value) for word in [str(tmp_path), *words]), str(caught.value)
    if "remake" not in words:
        assert f"delete {data.name} and {index.name} to compute them again" in str(caught.value)
    data.unlink(missing_ok=True)
    index.unlink()
    # the remedy works
    assert same(stored_pictures(qwen, few, tmp_path), encode_pictures(qwen, few, range(40)))


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), InputError("bad image"), OSError(28, "No space left on device")]
)
def test_a_stopped_run_leaves_nothing_that_counts(qwen, few, monkeypatch, tmp_path, stop):
    """Stopped in the second batch: no file stays, so that a full disk does not stay full. The next
    run starts anew.
    """
    def stopping(*arguments):
        yield from list(encode(*arguments))[:32]
        raise stop

    encode = items.encode

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, InputError)) as caught:
        patch.setattr(items, "encode", stopping)
        stored_pictures(qwen, few, tmp_path)
    assert not list(tmp_path.iterdir())
    if isinstance(stop, OSError):
        assert ".bin: cannot be written (No space left on device)" in str(caught.value)
    assert same(stored_pictures(qwen, few, tmp_path), encode_pictures(qwen, few, range(40)))


def test_a_killed_run_leaves_nothing_that_counts(qwen, few, tmp_path):
    """A kill leaves some bytes and no index, however many they are."""
    stored_pictures(qwen, few, tmp_path)
    (data,), (index,) = tmp_path.glob("*.bin"), tmp_path.glob("*.json")
    whole = data.read_bytes()
    for rest in (b"", whole[:1000], os.urandom(len(whole)), os.urandom(len(whole) + 1000)):
        index.unlink()
        data.write_bytes(rest)
        stored_pictures(qwen, few, tmp_path)
        assert data.read_bytes() == whole and index.exists()


def test_one_process_writes_and_the_others_wait(qwen, few, no_tower, tmp_path):
    """The lock is held here, as by a process that encodes; the waiting call returns what that one
    has written.
    """
    expected = stored_pictures(qwen, few, tmp_path / "done")
    (done,) = (tmp_path / "done").glob("*.bin")
    (tmp_path / "shared").mkdir()
    data, found = tmp_path / "shared" / done.name, []
    no_tower()
    with open(data, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = threading.Thread(
            target=lambda: found.append(stored_pictures(qwen, few, tmp_path / "shared")),
            daemon=True,
        )
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive() and not found
        file.write(done.read_bytes())
        file.flush()
        shutil.copyfile(done.with_suffix(".json"), data.with_suffix(".json"))
    waiting.join(10)
    assert same(found[0], expected)


def test_who_waits_for_a_run_that_fails_writes_the_file(qwen, few, tmp_path):
    """The lock is held here, as by a process that encodes; it deletes the file before it lets go,
    so what waits must open another.
    """
    expected = stored_pictures(qwen, few, tmp_path / "done")
    (done,) = (tmp_path / "done").glob("*.bin")
    (tmp_path / "shared").mkdir()
    data, found = tmp_path / "shared" / done.name, []
    with open(data, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = threading.Thread(
            target=lambda: found.append(stored_pictures(qwen, few, tmp_path / "shared")),
            daemon=True,
        )
        waiting.start()
        time.sleep(0.3)
        file.write(b"half")
        data.unlink()
    waiting.join(30)
    assert same(found[0], expected) and data.read_bytes() == done.read_bytes()


def test_a_folder_that_cannot_be_written(qwen, few, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        InputError, match=r"file/features-\w+.bin: cannot be written \(.+\).*--features"
    ):
        stored_pictures(qwen, few, tmp_path / "file")


# ---- memory ----


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from hanorec.mllm.features import open_features

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))  # KB

stem = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, ((status("VmData") + 256 * 1024) * 1024,) * 2)
before = status("VmRSS")
pictures = open_features(stem, {"dtype": "bfloat16"}, 64)
means = [pictures[i].features.float().mean().item() for i in (0, 2500, 4999)]
print(means, status("VmRSS") - before)
try:
    np.fromfile(stem.with_suffix(".bin"), np.uint8)
except MemoryError:
    print("too large")
"""


def test_a_file_larger_than_memory(tmp_path):
    """5,000 items of 16 MB, 80 GB in all (a sparse file: zeros take no room on the disk), in a
    process that may take 256 MB: three items are read, and the process grows by little more than
    they are. Read as a whole, the file does not fit.
    """
    count, tokens, width = 5000, 2**17, 64
    stem = tmp_path / "features-large"
    facts, counts, grids = {"dtype": "bfloat16"}, [tokens] * count, [None] * count
    with open(stem.with_suffix(".bin"), "wb") as file:
        file.truncate(count * tokens * width * 2)
        for item, value in ((2500, 2.0), (4999, -3.0)):
            file.seek(item * tokens * width * 2)
            file.write(
                torch.full((tokens, width), value, dtype=torch.bfloat16).view(torch.uint8).numpy()
            )
    write_index(stem.with_suffix(".json"), facts, counts, grids)
    environment = os.environ | {
        "PYTHONPATH": str(Path(features.__file__).parent.parent.parent), "OMP_NUM_THREADS": "1"
    }
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(stem)], env=environment, capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, control = done.stdout.splitlines()
    assert found.startswith("[0.0, 2.0, -3.0] ") and control == "too large"
    # KB: three items of 16 MB, one of 32 MB as float32, and 5,000 views
    assert int(found.split()[-1]) < 160 * 1024


def test_writing_holds_one_batch(qwen, few, monkeypatch, tmp_path):
    """When a batch is encoded, the one before last is gone: the tower's output is never kept."""
    alive, counts = [], []

    def watched(backbone, images):
        counts.append(sum(ref() is not None for ref in alive))
        pictures = image_features(backbone, images)
        alive.extend(weakref.ref(picture.features) for picture in pictures)
        return pictures

    monkeypatch.setattr(items, "image_features", watched)
    monkeypatch.setattr(items, "BATCH", 5)
    stored_pictures(qwen, few, tmp_path)
    assert len(counts) == 8 and max(counts) <= 5
    counts.clear(), alive.clear()
    encode_pictures(qwen, few, range(40))
    assert max(counts) == 35  # the control: in memory they are all kept


# ---- items in batches ----


@pytest.mark.equation("HN-1")
@pytest.mark.parametrize("form", ["input", "hidden"])
def test_items_in_batches_equal_one_by_one(backbone, few, form):
    """Against a loop over the items, each alone, in float64 where it is a mean of the model's own
    numbers.
    """
    few = replace(
        few, titles=("<|im_end|> and <image>, no tokens of their own in a title", *few.titles[1:])
    )
    pictures = encode_pictures(backbone, few, range(40))
    H, X, has_image = item_embeddings(backbone, few, pictures, form)
    embed = backbone.model.get_input_embeddings()

    def alone(ids, picture):
        if form == "input":
            vectors = embed(torch.tensor(ids)) if picture is None else picture.features
            return vectors.double().mean(0)
        grids = [] if picture is None else [picture.grid]
        positions = prompt_positions(backbone, ids, grids)[:, None]
        shown = torch.zeros(0, backbone.width) if picture is None else picture.features
        states = hidden_states(backbone, torch.tensor([ids]), positions, None, shown)
        return states[0].double().mean(0)

    titles = [text_ids(backbone, title) for title in few.titles]
    assert 2 < len({len(ids) for ids in titles}) < 10  # several lengths, several to a length
    with torch.no_grad():
        texts = torch.stack([alone(ids, None) for ids in titles])
        images = torch.stack([
            alone([backbone.image_token] * len(p.features), p) for p in pictures.values()
        ])
    tolerance = {"atol": 1e-6 if form == "input" else 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(H.double(), texts, **tolerance)
    torch.testing.assert_close(X[has_image].double(), images, **tolerance)
    assert has_image.tolist() == [row != 1 for row in range(40)] and not X[1].any()
    # another item's would be noticed
    assert (H[0] - texts[4]).abs().max() > 1e-2 and (X[0] - images[4]).abs().max() > 1e-2


def test_embeddings_from_the_file_equal_those_from_memory(backbone, few, tmp_path):
    stored = stored_pictures(backbone, few, tmp_path)
    plain = encode_pictures(backbone, few, range(40))
    for form in ("input", "hidden"):
        for a, b in zip(
            item_embeddings(backbone, few, stored, form),
            item_embeddings(backbone, few, plain, form), strict=True,
        ):
            assert torch.equal(a, b)


def test_batches_of_images_equal_one_by_one(backbone, few):
    """40 images of three sizes through the tower in batches of 32, and one at a time."""
    together = encode_pictures(backbone, few, range(40))
    for row, (found, grid) in together.items():
        (alone,) = image_features(backbone, [read_image(few.images[row])])
        torch.testing.assert_close(found, alone.features, atol=1e-5, rtol=1e-5)
        assert grid is None or torch.equal(grid, alone.grid)
    assert np.ptp([len(picture.features) for picture in together.values()]) > 0
