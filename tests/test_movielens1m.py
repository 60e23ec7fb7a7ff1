"""benchmarks/movielens1m_base.py and its probes at toy size: Posterland for MovieLens-1M, and for
EfficientNet a stand-in whose grid is a random reading of the colours of each place.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations, count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from toy import apart

from hanorec.base.errors import InputError
from hanorec.base.files import read_object, write_json
from hanorec.datasets.catalog import data_hash, load_catalog
from hanorec.datasets.images import read_image
from hanorec.datasets.posterland import GENRES, STYLES, make_items, make_posterland
from hanorec.mllm.backbone import image_features
from hanorec.mllm.load import load_backbone
from hanorec.readings import rms
from hanorec.studies.runs import folder_name

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import movielens1m_base as base
import movielens1m_names as names
import movielens1m_posters as teaching
import movielens1m_probes as probes
import movielens1m_stages as stages
import movielens1m_titles as titles
from smollm2_llava import wrap

TOY = stages.Scale(
    image=28, patch=14, tower_width=64, tower_layers=1, crops=1, components=8,
    tower_epochs=3, tower_rate=3e-3,
    names_epochs=2, names_rate=3e-3, names_language_rate=3e-3,
    targets=1, ranking_rate=3e-3,
    width=64, layers=1, vocabulary=768,
)


def colours(pixels):
    """(B, 3, 224, 224) -> (B, 16, 7, 7)."""
    mix = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    return torch.einsum("cr,brhw->bchw", mix, F.adaptive_avg_pool2d(pixels, 7))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Posterland with 40 users, posters of every other film alone, one of them narrow and two of
    the same bytes, and a movies.dat.
    """
    folder = tmp_path_factory.mktemp("posterland")
    make_posterland(folder, users=40)
    lines, images = [], folder / "images"
    for item in make_items(2025):
        own = list(GENRES)[item["genre"]], list(STYLES)[item["style"]]
        lines.append(f"{item['id']}::{item['title']}::{'|'.join(own)}\n")
        if int(item["id"]) % 2:
            (images / f"{item['id']}.png").unlink()
    (folder / "movies.dat").write_text("".join(lines))
    with Image.open(images / "2.png") as image:
        image.resize((20, 60)).save(images / "2.png")
    shutil.copy(images / "4.png", images / "294.png")
    return folder


def make(data, out, clock=lambda: False):
    """The base of the toy, as the command makes it."""
    catalog = load_catalog(data)
    genres = names.read_genres(data, catalog)
    language = partial(names.begin_language, catalog, genres, TOY)
    made = partial(base.make_base, catalog, genres, out, lambda: colours, language, TOY)
    return made(clock, device="cpu")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    assert make(data, out)
    return out


# ---- the stages ----


def test_each_stage_teaches_its_parts_alone(made):
    weights = {}
    for name in ("start", "tower", "names", "base"):
        weights[name] = load_file(made / name / "model.safetensors")

    def changed(one, other):
        found = set()
        for key, weight in weights[one].items():
            if not torch.equal(weight, weights[other][key]):
                found |= set(re.findall("vision_tower|projector|newline|language", key))
        return found

    assert changed("start", "tower") == {"vision_tower", "projector"}  # of this its size
    assert changed("tower", "names") == {"projector", "newline", "language"}
    assert changed("names", "base") == {"language"}


def test_a_real_language_part_is_not_changed_by_naming(data, made, tmp_path):
    catalog = load_catalog(data)
    posters = teaching.load_posters(made / "posters.safetensors")
    scale = replace(TOY, names_epochs=1, names_language_rate=0)
    names.teach_names(
        made / "tower", tmp_path / "names", tmp_path / "work", posters, catalog,
        names.read_genres(data, catalog), scale, 0, "cpu", lambda: False,
    )
    before = load_file(made / "tower" / "model.safetensors")
    after = load_file(tmp_path / "names" / "model.safetensors")
    changed = {key for key, weight in before.items() if not torch.equal(weight, after[key])}
    assert changed and all(re.search("projector|newline", key) for key in changed)


def test_pieces_end_in_the_weights_of_one_go(data, made, tmp_path):
    calls = count(1)
    pieces = 1
    while not make(data, tmp_path, clock=lambda: next(calls) % 12 == 0):
        pieces += 1
    assert pieces > 2
    one, other = (load_file(folder / "base/model.safetensors") for folder in (made, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())


def test_the_card_says_what_was_taught(made):
    known = json.loads((made / "base/stages.json").read_text())
    card = (made / "base/README.md").read_text()
    assert known["base"]["users"] == 16  # 40% of 40
    assert known["tower"]["posters"] == known["names"]["films"] == 147 - known_held(made)
    assert "16 targets of 16 users (the first 40% by --users-to)" in card
    assert f"{known['tower']['held_out_error']:.3f} (1 = knows nothing)" in card
    assert "| language part | " in card and "random | title and genres with the projector" in card


def known_held(made):
    return int(teaching.load_posters(made / "posters.safetensors").held.sum())


# ---- the last stage with titles alone ----


@pytest.fixture
def command(data, made, tmp_path, monkeypatch):
    """benchmarks/movielens1m_titles.py on the toy base."""
    base_of = tmp_path / "base"
    shutil.copytree(made / "names", base_of / "names")
    known = {"data": data_hash(load_catalog(data)), "scale": vars(TOY), "candidate_images": "off"}
    write_json(base_of / "settings.json", known)
    argv = ["", str(data), str(tmp_path / "out"), "--base", str(base_of), "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu", "--test", "--sets random"])
    return base_of


def test_with_posters_the_last_stage_is_the_bases_own(data, made, tmp_path):
    stages.teach_ranking(
        made / "names", tmp_path / "base", tmp_path / "work", data, "off", TOY, 2025, "cpu",
        lambda: False,
    )
    one, other = (load_file(folder / "base/model.safetensors") for folder in (made, tmp_path))
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())


def test_what_posters_add(command, tmp_path, capsys):
    titles.main()
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ") for line in lines if line.startswith("titles")}
    assert {len(line) for line in cells.values()} == {8}
    gaps = []
    for seed in ("seed-1", "seed-2"):
        ndcg, weights = {}, {}
        for row in titles.ROWS:
            here = tmp_path / "out" / seed / folder_name(row)
            report = read_object(here / "test" / "metrics.json")
            assert report["settings"]["images"] == titles.ROWS[row]
            one = report["sets"]["random"]["policies"]["base"]
            ndcg[row] = one["metrics"]["NDCG@3"]["value"]
            weights[row] = load_file(here / "base" / "model.safetensors")
        for one, other in combinations(weights.values(), 2):
            changed = [key for key in one if not torch.equal(one[key], other[key])]
            assert changed and all("language" in key for key in changed)
        gaps.append(ndcg["titles and posters"] - ndcg["titles alone"])
    told = float(cells["titles and posters"][4])
    assert told == pytest.approx(100 * np.mean(gaps), abs=0.006)
    capsys.readouterr()
    titles.main()  # nothing is done again
    assert "seed 1" not in capsys.readouterr().out


def test_a_base_of_other_data(command):
    known = read_object(command / "settings.json")
    write_json(command / "settings.json", known | {"data": "0"})
    with pytest.raises(InputError, match="made of data of hash 0, .*give the data folder"):
        titles.main()
    write_json(command / "settings.json", known)
    (command / "names").rename(command / "later")
    with pytest.raises(InputError, match=r"no such file, expected the base's stage .* come so far"):
        titles.main()
    (command / "settings.json").unlink()
    with pytest.raises(InputError, match=r"settings.json: no such file; expected in --base"):
        titles.main()


# ---- posters ----


def test_targets_are_white_over_the_posters_that_teach(made):
    posters = teaching.load_posters(made / "posters.safetensors")
    assert posters.pixels.shape == (147, 2, 2, 3, 28, 28)
    x = posters.targets[~posters.held].flatten(0, 3).float()  # (n, 8)
    # the colours span 3 of the 8: the others have no variance to be whitened
    assert x[:, :3].mean(0).abs().max() < 0.02
    assert (x[:, :3].std(0) - 1).abs().max() < 0.02
    assert posters.variance[:3].sum() > 0.999 * posters.total


def test_the_tower_learns_what_carries_over(made):
    reached = json.loads((made / "tower/stages.json").read_text())["tower"]
    assert reached["held_out_error"] < 0.7 * reached["place_mean_error"]


def test_posters_of_the_same_bytes_are_on_one_side(made):
    posters = teaching.load_posters(made / "posters.safetensors")
    assert posters.group[1] == posters.group[-1] and posters.held[1] == posters.held[-1]
    assert len(posters.group.unique()) == 146
    assert len(posters.group[posters.held].unique()) == 15


def test_the_projector_learns_on_what_the_prompts_show(data, made):
    """Both ways to the features of a poster: kept pixels, and the file by the image processor."""
    catalog = load_catalog(data)
    backbone = load_backbone(str(made / "names"), "float32", "cpu")
    posters = teaching.load_posters(made / "posters.safetensors")
    naming = names.Naming(backbone, posters, catalog, {})
    rows = [catalog.row["2"], catalog.row["200"]]  # a narrow poster has fewer features
    mine = [picture.features for picture in naming.pictures(rows).values()]
    seen = image_features(backbone, [read_image(catalog.images[row]) for row in rows])
    first, second = (picture.features for picture in seen)
    assert len(first) < len(second)
    assert apart(mine[0], first) < 1e-3 and apart(mine[1], second) < 1e-3
    assert apart(mine[0][:4], second[:4]) > 1e-2


def test_features_are_as_large_as_words(data, made):
    """Of the tower that has learnt, the newlines left out; before, it was another size."""
    posters = teaching.load_posters(made / "posters.safetensors")
    backbone = load_backbone(str(made / "tower"), "float32", "cpu")
    naming = names.Naming(backbone, posters, load_catalog(data), {})
    of_words = rms(backbone.model.get_input_embeddings().weight)
    projector = backbone.model.model.multi_modal_projector
    assert rms(projector(naming.seen)) == pytest.approx(of_words, rel=0.02)
    before = load_backbone(str(made / "start"), "float32", "cpu").model.model.multi_modal_projector
    assert rms(before(naming.seen)) != pytest.approx(of_words, rel=0.1)


# ---- the probes ----


def test_macro_auc_by_hand():
    y = np.array([[1, 1], [0, 1], [1, 1], [0, 1]], dtype=bool)  # nobody lacks the second genre
    # Of four pairs the first film wins one and loses one, the third ties one and wins one.
    scores = np.array([[2.0, 0], [3, 0], [1, 0], [1, 0]])
    assert probes.macro_auc(y, scores) == pytest.approx((1 + 0 + 0 + 0.5) / 4)


def test_a_ridge_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 12))
    y = x @ rng.normal(size=(12, 3)) > 0
    fold = rng.permutation(300) % 5
    assert probes.macro_auc(y, probes.out_of_fold(x, y, fold)) > 0.95
    assert 0.4 < probes.macro_auc(y, probes.out_of_fold(np.roll(x, 1, 0), y, fold)) < 0.6


def test_a_ridge_without_a_clue_is_at_chance():
    """Of rare labels, too: a fold's own share must not show in the scores of the other folds."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 4)), rng.random((200, 30)) < 0.1
    assert 0.47 < probes.macro_auc(y, probes.out_of_fold(x, y, rng.permutation(200) % 5)) < 0.53


def test_jaccard_by_hand():
    y = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=bool)
    # {a, b} shares one of two genres with {a}, none of three with {c}
    assert probes.jaccard(y, np.array([[1, 2], [0, 2], [0, 1]])).tolist() == [25, 25, 0]


def test_a_tie_counts_against_the_title(data, made, monkeypatch):
    backbone = load_backbone(str(made / "names"), "float32", "cpu")
    posters = teaching.load_posters(made / "posters.safetensors")
    naming = names.Naming(backbone, posters, load_catalog(data), {})
    scores = torch.tensor([[2.0, 1, 0], [1, 1, 0], [0, 1, 2]])
    monkeypatch.setattr(probes, "score_rows", lambda *_, **__: (scores, scores))
    index = np.arange(3)
    ranks = probes.title_ranks(naming, index, index, 3 * [["a", "b", "c"]])
    assert ranks.tolist() == [1, 2, 3]


def test_the_table(data, made):
    table = probes.probe(data, made, "names", films=4, device="cpu").splitlines()
    assert len(table) == 2 + 4 + 4 + 4 + 8
    cells = [line.split(" | ") for line in table[2:]]
    assert {len(line) for line in cells} == {6}
    auc = {line[1]: float(line[3].split()[0]) for line in cells[:4]}
    shuffled = {line[1]: float(line[4].split()[0]) for line in cells[:4]}
    # Posterland's genre is the colour of the poster's ground
    assert auc["colours"] > 70 and auc["tower of names"] > 60 > shuffled["tower of names"]


# ---- what is refused ----


def test_genres_of_other_films(data, tmp_path):
    catalog = load_catalog(data)
    with pytest.raises(InputError, match=r"movies.dat: no such file.*copy it there"):
        names.read_genres(tmp_path, catalog)
    (tmp_path / "movies.dat").write_text("1::A film::space\n")
    with pytest.raises(InputError, match="no line for item '2', and 293 lack one in all"):
        names.read_genres(tmp_path, catalog)


def test_a_folder_without_the_teacher(tmp_path):
    with pytest.raises(InputError, match=r"--tower .*pip install --target"):
        teaching.load_teacher(tmp_path, "cpu")


def test_a_folder_of_another_command(tmp_path):
    base.open_folder(tmp_path, {"seed": 1})
    base.open_folder(tmp_path, {"seed": 1})
    with pytest.raises(InputError, match=r"made with seed = 1, this command has 2"):
        base.open_folder(tmp_path, {"seed": 2})


def test_a_language_model_that_llava_does_not_speak_with(tmp_path):
    model = torch.nn.Module()
    model.config = type("Config", (), {"model_type": "gemma3_text"})
    with pytest.raises(InputError, match="of type 'gemma3_text', expected llama"):
        wrap(model, None, tmp_path)
