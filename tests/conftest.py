"""What the model-level tests share: a small Posterland, three tiny random checkpoints, and a
catalogue with odd images.
"""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers: no test may look at the network
# Where there is a GPU a fork of this process can run no backward, so no test forks it, anywhere.
os.register_at_fork(after_in_child=lambda: os._exit(86))
# the scripts lie beside the package, they are not part of it
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import toy
from float64 import in_float64
from PIL import Image

from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.posterland import make_posterland
from hanorec.mllm.backbone import FAMILIES
from hanorec.mllm.items import encode_pictures
from hanorec.mllm.load import load_backbone
from hanorec.studies.tiny import make_checkpoint

# a poster is then 2 x 2 tokens, not 1
QWEN_PIXELS = {"shortest_edge": 32 * 32, "longest_edge": 80 * 80}


SHARED = []  # the folder of `data`, once it is made


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of a Posterland with 24 users, some titles made longer, so that answers differ in
    tokens. Training keeps its feature file in it; tests that change anything else in a data folder
    copy it.
    """
    folder = tmp_path_factory.mktemp("posterland")
    make_posterland(folder, users=24)
    path = folder / "Posterland_titles.csv"
    header, *lines = path.read_text().splitlines()
    endings = ("", " Again", " Returns Once More")
    longer = [line + endings[i % 3] for i, line in enumerate(lines)]
    path.write_text("\n".join([header, *longer]) + "\n")
    SHARED.append(folder)
    return folder


@pytest.fixture(autouse=True)
def nobody_draws_into_the_shared_data():
    """Candidate files are drawn once and then hold: one left in `data` would decide what later
    tests that evaluate are given, or refuse them.
    """
    yield
    left = [path for folder in SHARED for path in folder.glob("candidates_*")]
    for path in left:
        path.unlink()
    assert not left, "copy the data folder before evaluating on it"


@pytest.fixture(scope="session")
def catalog(data, tmp_path_factory):
    """Posterland's items, of which row 1 has no image, row 2 a wide one and row 3 a tall one: three
    grids in one prompt.
    """
    folder, whole = tmp_path_factory.mktemp("odd"), load_catalog(data)
    images = list(whole.images)
    images[1] = None
    for row, box in [(2, (0, 0, 128, 64)), (3, (32, 0, 96, 128))]:
        with Image.open(images[row]) as image:
            image.crop(box).save(folder / f"{row}.png")
        images[row] = folder / f"{row}.png"
    return replace(whole, images=tuple(images))


@pytest.fixture(scope="session")
def make(data, tmp_path_factory):
    """make(family, **options) -> folder of a new tiny checkpoint whose weights are large enough to
    tell right from wrong.
    """
    titles = load_catalog(data).titles

    def make_one(family, **options):
        folder = tmp_path_factory.mktemp(family) / "model"
        make_checkpoint(family, folder, titles, width=64, layers=2, **options)
        toy.sharpen(folder)
        if family != "llava_next":
            path = folder / "preprocessor_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"size": QWEN_PIXELS}))
        return folder

    return make_one


@pytest.fixture(scope="session")
def checkpoints(make):
    """Family -> checkpoint folder. Nobody writes into these."""
    return {family: make(family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def backbone(request, checkpoints):
    """Each family in turn, freshly loaded, as a user does it."""
    return load_backbone(str(checkpoints[request.param]), "float32", "cpu")


@pytest.fixture
def qwen(checkpoints):
    """Qwen2.5-VL alone, freshly loaded, for what does not depend on the family."""
    return load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu")


@pytest.fixture(scope="session")
def gallery(checkpoints, catalog):
    """Family -> image features of the first 30 rows."""
    return {
        family: encode_pictures(load_backbone(str(folder), "float32", "cpu"), catalog, range(30))
        for family, folder in checkpoints.items()
    }


@pytest.fixture(scope="session")
def launch(data, checkpoints, tmp_path_factory):
    """launch(main, *flags) -> (output folder, log, run.json) of a training script on the tiny
    Qwen2.5-VL and Posterland; float64=True computes in float64.
    """
    def start(main, *flags, float64=False):
        out = tmp_path_factory.mktemp("run") / "out"
        argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, "--out", out, *toy.SHORT]
        argv = [str(word) for word in [*argv, *flags]]
        with in_float64() if float64 else nullcontext():
            main(argv)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return out, log, json.loads((out / "run.json").read_text())

    return start


@pytest.fixture(scope="session")
def sft(launch):
    """Folder of an SFT adapter, trained for one epoch."""
    import train_sft

    return launch(train_sft.main, *toy.STEPS)[0]


@pytest.fixture(scope="session")
def full(launch, sft):
    """(folder, log, run.json) of train_dpo with its defaults."""
    import train_dpo

    return launch(train_dpo.main, *toy.STEPS, "--sft", sft)
