"""What is run on benchmarks/movielens1m_base.py's checkpoint, at toy size: features for BR-MRS, and
policies asked with other posters.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import apart

from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import load_interactions
from hanorec.datasets.mmrec import read_mmrec
from hanorec.datasets.posterland import GENRES, make_items, make_posterland
from hanorec.studies.scripts import script

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import movielens1m_brmrs as brmrs
import movielens1m_images as images
import movielens1m_names as names
import movielens1m_stages as stages


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Posterland with 40 users, no poster for the films 1 to 9, and a movies.dat."""
    folder = tmp_path_factory.mktemp("runs") / "posterland"
    make_posterland(folder, users=40)
    lines = []
    for item in make_items(2025):
        lines.append(f"{item['id']}::{item['title']}::{list(GENRES)[item['genre']]}\n")
        if int(item["id"]) < 10:
            (folder / "images" / f"{item['id']}.png").unlink()
    (folder / "movies.dat").write_text("".join(lines))
    return folder


def mean_colour(pixels):
    """(B, 3, 224, 224) -> (B, 3, 7, 7): a teacher that sees colours."""
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 7)


# ---- BR-MRS ----


def test_features_of_posters(films):
    catalog = load_catalog(films)
    features = brmrs.poster_features(catalog, mean_colour)
    assert features.shape == (294, 3)
    without = [row for row, path in enumerate(catalog.images) if path is None]
    shown = [row for row, path in enumerate(catalog.images) if path is not None]
    assert len(without) == 9
    assert apart(features[without], features[shown].mean(0).expand(9, 3)) < 1e-6
    assert len(features[shown].unique(dim=0)) > 200
    other = brmrs.exchanged(features, catalog)
    assert torch.equal(other[without], features[without])
    assert (other[shown] != features[shown]).any(1).float().mean() > 0.95
    assert torch.equal(other[shown].sort(0)[0], features[shown].sort(0)[0])


def test_features_of_a_title_are_those_it_has_alone(films):
    catalog = load_catalog(films)
    scale = stages.Scale(
        image=28, patch=14, tower_width=64, tower_layers=1, crops=1, components=8,
        tower_epochs=1, tower_rate=1e-3, names_epochs=1, names_rate=1e-3, names_language_rate=1e-3,
        targets=1, ranking_rate=1e-3, width=64, layers=1, vocabulary=768,
    )
    model, tokenizer = names.begin_language(catalog, names.read_genres(films, catalog), scale)
    tokenizer.bos_token = tokenizer.eos_token
    titles = (*catalog.titles[:19], "A title of far more words than any of the others has")
    features = brmrs.title_features(titles, model, tokenizer)
    for title, found in zip(titles, features, strict=True):
        ids = tokenizer.encode(title, add_special_tokens=False)
        with torch.no_grad():
            hidden = model.model(torch.tensor([[tokenizer.bos_token_id, *ids]])).last_hidden_state
        assert apart(found, hidden[0, 1:].mean(0)) < 1e-5


def test_each_user_is_split_in_time():
    pairs = brmrs.split_pairs([tuple(range(20)), (5, 3, 4)])
    assert pairs["train"].tolist() == [[0] * 16 + [1], [*range(16), 5]]
    assert pairs["valid"].tolist() == [[0, 0, 1], [16, 17, 3]]
    assert pairs["test"].tolist() == [[0, 0, 1], [18, 19, 4]]


def test_popularity_by_hand():
    """Film 0 has two training pairs, 1 and 2 have one each, 3 has none."""
    pairs = {
        "train": torch.tensor([[0, 1, 1, 2], [0, 0, 1, 2]]),
        "valid": torch.tensor([[0], [3]]),
        "test": torch.tensor([[0, 1, 2], [1, 3, 0]]),
    }
    data = brmrs.RankingData("toy", ("a", "b", "c"), tuple("wxyz"), **pairs, features={})
    # film 1 ties with 2 and comes second of three; 3 is the last of two; 0 leads
    ndcg = (2 / np.log2(3) + 1) / 3
    assert brmrs.popularity(data)["NDCG@10"] == pytest.approx(ndcg)
    assert brmrs.popularity(data)["Recall@20"] == 1


def test_the_folder_is_what_train_brmrs_takes(films, tmp_path, monkeypatch):
    catalog = load_catalog(films)
    monkeypatch.setattr(brmrs, "load_teacher", lambda *_: mean_colour)
    monkeypatch.setattr(brmrs, "load_language_model", lambda _: ())
    monkeypatch.setattr(brmrs, "title_features", lambda titles: torch.eye(len(titles)))
    argv = ["", str(films), str(tmp_path / "data"), "--tower", "T", "--language", "L"]
    monkeypatch.setattr(sys, "argv", [*argv, "--users-to", "0.5"])
    brmrs.main()
    found, others = (read_mmrec(tmp_path / "data" / name) for name in ("own", "others"))
    assert len(found.users) == 20 and found.items == catalog.ids
    assert found.features["t"].shape == (294, 294) and found.features["v"].shape == (294, 3)
    assert torch.equal(others.train, found.train)
    assert torch.equal(others.features["t"], found.features["t"])
    assert not torch.equal(others.features["v"], found.features["v"])
    every = torch.cat([found.train, found.valid, found.test], 1)
    interactions = load_interactions(films, catalog)
    had = sum(
        len(interactions.before(user, "test") + interactions.test[user]) for user in found.users
    )
    assert every.shape[1] == had
    script("train_brmrs").main(
        ["--data", str(tmp_path / "data" / "own"), "--out", str(tmp_path / "run"), "--epochs", "1"]
    )
    assert read_object(tmp_path / "run" / "metrics.json")["best_epoch"] == 1


# ---- what posters are worth ----


def test_a_drawn_cover_for_each_film(films, tmp_path):
    catalog = load_catalog(films)
    images.draw_covers(catalog, names.read_genres(films, catalog), tmp_path / "drawn")
    drawn = load_catalog(tmp_path / "drawn")
    assert drawn.ids == catalog.ids and drawn.titles == catalog.titles
    assert all(path is not None for path in drawn.images)
    assert load_interactions(tmp_path / "drawn", drawn) == load_interactions(films, catalog)


def test_films_without_a_poster_are_told_apart(films):
    catalog = load_catalog(films)
    interactions = load_interactions(films, catalog)
    users = []
    for user in list(interactions.test)[:30]:
        (target,) = interactions.test[user][:1]
        users.append({"user": user, "target": catalog.ids[target]})
    groups = images.user_groups(films, users, {"split": "test", "history": 5})
    assert np.sum(list(groups.values()), 0).tolist() == [1] * 30
    for i, user in enumerate(users):
        bare = {str(number) for number in range(1, 10)}
        had = interactions.before(user["user"], "test")[-5:]
        assert groups["the target has no poster"][i] == (user["target"] in bare)
        some = any(catalog.ids[row] in bare for row in had)
        assert groups["all have one"][i] == (user["target"] not in bare and not some)


def test_the_four_conditions(films, checkpoints, tmp_path, monkeypatch, capsys):
    """Two rows, two seeds; the drawn covers are asked about the same candidates."""
    model = str(checkpoints["llava_next"])
    prompts = ["--model", model, "--data", str(films)]
    for seed in ("seed-1", "seed-2"):
        for row in ("SFT", "DPO"):
            script("train_sft").main([
                *prompts, "--out", str(tmp_path / "runs" / seed / row), "--epochs", "1",
                "--users-to", "0.1", "--targets-per-user", "1", "--learning-rate", "1e-2",
                "--seed", seed[-1],
            ])
    argv = [
        "", str(films), str(tmp_path / "out"), "--model", model, "--rows", "SFT; DPO",
        "--test", "--users-from 0.8 --sets random", "--runs",
        *map(str, sorted((tmp_path / "runs").iterdir())),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    images.main()
    text = (tmp_path / "out" / "table.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("SFT", "DPO"))]
    assert [len(line) for line in lines] == [5, 5, 4, 4, 7, 7]
    own, drawn = (
        read_object(tmp_path / "out" / name / "seed-1" / "metrics.json")
        for name in ("own-posters", "drawn-covers")
    )
    first, second = (of["sets"]["random"] for of in (own, drawn))
    assert first["users"] == second["users"]
    assert first["scores"] != second["scores"]
    values = []
    for seed in ("seed-1", "seed-2"):
        report = read_object(tmp_path / "out" / "own-posters" / seed / "metrics.json")
        sft, _ = report["sets"]["random"]["policies"].values()
        values.append(sft["metrics"]["NDCG@3"]["value"])
    assert float(lines[0][1]) == pytest.approx(100 * np.mean(values), abs=0.006)
    capsys.readouterr()
    images.main()  # nothing is done again
    assert "users" not in capsys.readouterr().err


def test_a_row_that_was_not_trained(films, tmp_path, monkeypatch):
    argv = ["", str(films), str(tmp_path / "out"), "--model", "M", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(InputError, match="SFT: no adapter, expected the row 'SFT'"):
        images.main()
