"""Data of BR-MRS: MMRec's folder and the native one read as they are, and every kind of bad input
named.
"""

import json
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from toy_ranking import ITEMS, USERS, make_features, make_pairs, write_folder

import train_brmrs
from hanorec.base.command import run
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.errors import InputError
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.columns import read_columns
from hanorec.datasets.interactions import load_interactions
from hanorec.datasets.mmrec import read_mmrec, write_mmrec
from hanorec.hars import mean_pool
from hanorec.mllm.items import encode_pictures
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import text_ids
from hanorec.ranking.pairs import load_ranking_data


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(folder, *words, flags=[]): train_brmrs.py ends with code 2 and a message that holds
    all the words; OUT holds nothing.
    """
    def check(folder, *words, flags=()):
        out = tmp_path / "out"
        with pytest.raises(SystemExit) as stop:
            run(
                partial(
                    train_brmrs.main,
                    ["--data", str(folder), "--out", str(out), "--epochs", "1", "--device", "cpu",
                     *map(str, flags)],
                )
            )
        message = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in message
        last = message[message.rindex("error: "):]
        for word in words:
            assert str(word) in last, last
        assert not out.exists() or not any(out.iterdir())
    return check


# ---- MMRec's folder ----


@pytest.mark.parametrize(("header", "order", "end"), [
    ("userID\titemID\tx_label", (0, 1, 2), "\n"),
    ("x_label\trating\titemID\tuserID", (2, None, 1, 0), "\n"),
    ("userID\titemID\tx_label", (0, 1, 2), "\r\n"),
    ("\ufeffuserID\titemID\tx_label", (0, 1, 2), "\n"),
])
def test_pairs_and_features(tmp_path, header, order, end):
    """Columns by name in any order, other columns unread, CRLF, a byte order mark; every pair where
    its label says.
    """
    rows = make_pairs()
    shuffled = [tuple("4.5" if at is None else row[at] for at in order) for row in rows]
    data = read_mmrec(write_folder(tmp_path / "data", shuffled, header=header, end=end))
    for label, split in enumerate(("train", "valid", "test")):
        pairs = getattr(data, split)
        assert pairs.dtype == torch.int64
        assert pairs.T.tolist() == [[user, item] for user, item, x in rows if x == label]
    assert (data.name, data.users, data.items) == (
        "toy", tuple(map(str, range(USERS))), tuple(map(str, range(ITEMS)))
    )
    for m, file in (("t", "text_feat.npy"), ("v", "image_feat.npy")):
        assert data.features[m].dtype == torch.float32
        assert np.array_equal(data.features[m].numpy(), make_features()[file].astype(np.float32))


def test_no_newline_at_the_end(folder):
    path = folder / "toy.inter"
    before = read_mmrec(folder)
    path.write_bytes(path.read_bytes().rstrip())
    assert torch.equal(read_mmrec(folder).test, before.test)


def test_numbers_of_any_length(tmp_path):
    path = tmp_path / "x.inter"
    path.write_text("a\tb\n7\tx\n" + "1234567890\t\n" + "9" * 18 + "\ty\n0007\t \n")
    assert read_columns(path, ["a"]).tolist() == [[7, 1234567890, 10**18 - 1, 7]]


def test_written_and_read_back(folder, tmp_path):
    data = read_mmrec(folder)
    # three items nobody has
    names = {
        "users": tuple(f"u{i}" for i in range(USERS)),
        "items": tuple(f"i{i}" for i in range(ITEMS + 3)),
    }
    named = type(data)(
        data.name, **names, train=data.train, valid=data.valid, test=data.test,
        features={m: torch.cat([x, torch.ones(3, x.shape[1])]) for m, x in data.features.items()},
    )
    write_mmrec(tmp_path / "again", named)
    again = read_mmrec(tmp_path / "again")
    assert again.sha256() == named.sha256() != data.sha256()
    assert again.items == names["items"] and again.users == names["users"]
    assert torch.equal(again.features["v"], named.features["v"])


def test_the_hash_sees_everything(folder):
    first, features = read_mmrec(folder).sha256(), make_features()
    seen = {first}
    for change in ("pair", "label", "text_feat.npy", "image_feat.npy"):
        rows, changed = make_pairs(), dict(features)
        if change == "pair":
            rows[0] = (
                rows[0][0],
                next(i for i in range(ITEMS) if (0, i) not in {row[:2] for row in rows}),
                rows[0][2],
            )
        elif change == "label":
            rows[0], rows[6] = (*rows[0][:2], 1), (*rows[6][:2], 0)
        else:
            changed[change] = features[change] + 1e-3
        seen.add(read_mmrec(write_folder(folder, rows, changed)).sha256())
    assert len(seen) == 5
    assert read_mmrec(write_folder(folder)).sha256() == first


def test_a_user_without_training_pairs_is_left_out_aloud(folder, capsys):
    rows = [
        (user, item, 2 if user == 4 and label == 0 else label) for user, item, label in make_pairs()
    ]
    data = load_ranking_data(BrmrsFiles(str(write_folder(folder, rows)), "out"))
    assert 4 not in data.test[0] and 4 not in data.valid[0] and len(data.users) == USERS
    printed = capsys.readouterr().out
    assert "1 of 30 pairs of the valid split are left out" in printed
    assert "7 of 36 pairs of the test split are left out" in printed


# ---- bad input, through the command ----


def with_row(line, *values):
    """The good rows, the one on this line of the file replaced."""
    rows = make_pairs()
    rows[line - 2] = values
    return rows


def test_good_input_is_accepted(folder, tmp_path):
    train_brmrs.main([
        "--data", str(folder), "--out", str(tmp_path / "out"), "--epochs", "1", "--device", "cpu"
    ])
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [((0, 1.5, 0), ["toy.inter:7", "itemID '1.5'", "whole number"]),
     (("A7", 1, 0), ["toy.inter:7", "userID 'A7'", "whole number"]),
     ((-1, 1, 0), ["toy.inter:7", "userID '-1'", "from 0"]),
     ((0, "", 0), ["toy.inter:7", "itemID ''", "whole number"]),
     ((0, 10**18, 0), ["toy.inter:7", "itemID '1000000000000000000'", "anew"]),
     ((0, "１", 0), ["toy.inter:7", "itemID '１'", "whole number"]),
     ((0, 1, 3), ["toy.inter:7", "x_label 3", "0 (train), 1 (valid) or 2 (test)"]),
     ((0, 1), ["toy.inter:7", "2 fields", "expected 3 (userID, itemID, x_label)"]),
     ((0, 1, 0, 5), ["toy.inter:7", "4 fields", "expected 3"]),
     ((), ["toy.inter:7", "1 fields", "remove"]),
     ((USERS + 1, 1, 0),
      ["toy.inter:7", f"userID {USERS + 1}", f"no line has userID {USERS}", "without a gap"]),
     ((0, 999_999_999_999, 0),
      ["toy.inter:7", "itemID 999999999999", f"no line has itemID {ITEMS}",
       "rows of the features"])],
)
def test_bad_line(refused, tmp_path, row, words):
    refused(write_folder(tmp_path / "data", with_row(7, *row)), *words)


def test_a_pair_in_two_splits(refused, tmp_path):
    user, item, _ = make_pairs()[0]
    refused(
        write_folder(tmp_path / "data", with_row(9, user, item, 2)), "toy.inter:9",
        f"itemID {item}", "line 2 has this pair with x_label 0", "remove one",
    )


@pytest.mark.parametrize("label", [0, 1, 2])
def test_an_empty_split(refused, tmp_path, label):
    rows = [(user, item, (label + 1) % 3 if x == label else x) for user, item, x in make_pairs()]
    refused(
        write_folder(tmp_path / "data", rows), "toy.inter", f"no line with x_label {label}",
        "split the interactions again",
    )


def test_a_missing_column(refused, tmp_path):
    refused(
        write_folder(tmp_path / "data", header="userID\titem_id\tx_label"), "toy.inter:1",
        "0 columns itemID", "item_id", "mend the header",
    )


def test_commas_for_tabs(refused, folder):
    path = folder / "toy.inter"
    path.write_text(path.read_text().replace("\t", ","))
    refused(folder, "toy.inter:1", "userID,itemID,x_label", "tabs between columns")


def test_no_interactions_or_two_files_of_them(refused, folder):
    shutil.copy(folder / "toy.inter", folder / "other.inter")
    refused(folder, folder, "2 files *.inter", "other.inter, toy.inter")
    (folder / "other.inter").unlink()
    (folder / "toy.inter").unlink()
    refused(folder, folder, "no file *.inter")
    refused(folder / "nowhere", folder / "nowhere", "not a folder")


def test_only_a_header(refused, tmp_path):
    refused(write_folder(tmp_path / "data", []), "toy.inter", "no line with x_label 0")


def test_a_user_with_every_item(refused, tmp_path):
    rows = [row for row in make_pairs() if row[0] != 3] + [(3, item, 0) for item in range(ITEMS)]
    refused(
        write_folder(tmp_path / "data", rows), "user '3'", f"all {ITEMS} items",
        "leave that user out",
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(lambda x: x[:-1], [f"({ITEMS - 1}, 5)", f"expected ({ITEMS}, d)", "same item list"]),
     (lambda x: np.vstack([x, x[:1]]), [f"({ITEMS + 1}, 5)", f"expected ({ITEMS}, d)"]),
     (lambda x: x.ravel(), [f"({ITEMS * 5},)", f"expected numbers of shape ({ITEMS}, d)"]),
     (lambda x: x[:, :0], [f"({ITEMS}, 0)", "expected"]),
     (lambda x: np.where(np.arange(ITEMS * 5).reshape(ITEMS, 5) == 13, np.nan, x),
      ["row 2, column 3", "nan", "finite"]),
     (lambda x: np.where(np.arange(ITEMS * 5).reshape(ITEMS, 5) == 13, 1e39, x),
      ["row 2, column 3", "1e+39", "float32"]),
     (lambda x: x.astype(str), ["<U", "expected numbers"]),
     (lambda x: x.astype(complex), ["complex", "expected numbers"]),
     (lambda x: x.astype(object), ["Python objects", "numpy.save"])],
)
@pytest.mark.filterwarnings("error")
def test_bad_features(refused, folder, spoil, words):
    np.save(folder / "image_feat.npy", spoil(make_features()["image_feat.npy"]))
    refused(folder, "image_feat.npy", *words)


class Bomb:
    """What a pickle may hold: a call on loading."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def test_no_pickle_is_ever_executed(refused, folder):
    for write in (
        lambda file: pickle.dump(Bomb(), file),
        lambda file: np.save(file, np.array([Bomb()], object), allow_pickle=True),
    ):
        with open(folder / "text_feat.npy", "wb") as file:
            write(file)
        refused(folder, "text_feat.npy", "not an array of numbers", "numpy.save")


def test_features_cut_off_or_of_another_kind(refused, folder):
    path = folder / "text_feat.npy"
    whole = path.read_bytes()
    for data in (whole[:-8], whole[:5], b""):
        path.write_bytes(data)
        refused(folder, "text_feat.npy", "not an array of numbers")
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))
    refused(folder, "text_feat.npy", "archive of several arrays")


def test_one_modality(refused, folder, tmp_path):
    """Missing images are an error while two modalities are compared, and not otherwise."""
    (folder / "image_feat.npy").unlink()
    refused(folder, "no image features", "--lambda-h 1.0", "--lambda-h 0 --lambda-s 0")
    refused(folder, "no image features", flags=["--lambda-h", 0])
    train_brmrs.main([
        "--data", str(folder), "--out", str(tmp_path / "text"), "--epochs", "1", "--lambda-h", "0",
        "--lambda-s", "0", "--device", "cpu",
    ])
    report = json.loads((tmp_path / "text" / "metrics.json").read_text())["test"]
    assert report["Recall@20_t"] == report["Recall@20"]
    assert "Recall@20_v" not in report
    assert "synergy" not in report
    (folder / "text_feat.npy").unlink()
    refused(
        folder, "no item features at all", "add a file", flags=["--lambda-h", 0, "--lambda-s", 0]
    )


def test_bad_names(refused, folder):
    for names, words in (
        ({"users": ["a"]}, ["names 1 users", "toy.inter:", f"userID {USERS - 1}"]),
        ({"items": "x"}, ["items is not a list"]),
        ({"users": [1] * USERS}, ["users is not a list of texts"]),
    ):
        good = {"users": ["x"] * USERS, "items": ["y"] * ITEMS}
        (folder / "names.json").write_text(json.dumps(good | names))
        refused(folder, *words)


@pytest.mark.parametrize(("flags", "words"), [
    (["--pool", 0], ["--pool 0", "at least 1"]),
    (["--theta", -1], ["--theta -1", "at least 0"]),
    (["--graph-alpha", 2], ["--graph-alpha 2", "at most 1"]),
    (["--bpr-weight", 0, "--lambda-h", 0, "--lambda-s", 0], ["nothing to learn", "--unimodal-bpr"]),
    (["--device", "nonsense"], ["--device nonsense", "cannot be used", "cpu"]),
    (["--model", "some/where"], ["--model some/where", "no train.tsv", "leave --model out"]),
    (["--item-graph", ITEMS], [f"K = {ITEMS}", "choose a smaller"]),
])
def test_bad_settings(refused, folder, flags, words):
    refused(folder, *words, flags=flags)


def test_every_setting_says_who_set_it():
    said = [field.metadata["help"] for field in BrmrsConfig.__dataclass_fields__.values()]
    sources = ("document 003", "later manuscript", "MMRec convention", "ours", "control")
    for text in said:
        assert any(who in text for who in sources), text


# ---- the native layout ----


@pytest.fixture
def native(data, tmp_path):
    """A copy of the small Posterland: two items lose their image, one user has an item again in
    test.
    """
    folder = shutil.copytree(data, tmp_path / "native")
    images = sorted((folder / "images").iterdir())
    for path in images[:2]:
        path.unlink()
    lines = (folder / "test.tsv").read_text().splitlines()
    first = (folder / "train.tsv").read_text().split("\t")[1].split()[0]
    (folder / "test.tsv").write_text("\n".join([f"{lines[0]} {first}", *lines[1:]]) + "\n")
    return folder, {path.stem for path in images[:2]}


def test_native(native, checkpoints, capsys):
    """Pairs are those of the three files; H is the mean of the title's input embeddings, X of the
    image's features, or the mean X.
    """
    folder, bare = native
    model = str(checkpoints["qwen2_5_vl"])
    data = load_ranking_data(BrmrsFiles(str(folder), "out", model, "float32", 1024, "cpu"))
    printed = capsys.readouterr().out
    assert "1 of 25 pairs of the test split are left out" in printed
    assert "2 of 294 items have no image" in printed
    catalog = load_catalog(folder)
    interactions = load_interactions(folder, catalog)
    assert data.users == tuple(interactions.train) and data.items == catalog.ids
    for split, of_user in (
        ("train", interactions.train),
        ("valid", interactions.val),
        ("test", interactions.test),
    ):
        found = {(data.users[user], item) for user, item in getattr(data, split).T.tolist()}
        assert found == {
            (user, item)
            for user, items in of_user.items()
            for item in items
            if split != "test" or item not in interactions.train[user]
        }
    backbone = load_backbone(model, "float32", "cpu", 1024)
    embed = backbone.model.get_input_embeddings()
    pictures = encode_pictures(backbone, catalog, range(5))
    with torch.no_grad():
        H = torch.stack([
            mean_pool(embed(torch.tensor(text_ids(backbone, title))))
            for title in catalog.titles[:5]
        ])
    assert torch.allclose(data.features["t"][:5], H, atol=1e-6)
    for row, picture in pictures.items():
        assert torch.allclose(data.features["v"][row], picture.features.mean(0), atol=1e-6)
    missing = torch.tensor([item in bare for item in catalog.ids])
    assert torch.allclose(
        data.features["v"][missing], data.features["v"][~missing].mean(0).expand(2, -1), atol=1e-6
    )


def test_native_bad_input(refused, native, checkpoints):
    folder, _ = native
    model = ["--model", checkpoints["qwen2_5_vl"], "--max-pixels", 1024]
    refused(folder, folder, "native layout", "no --model", "add one")
    refused(folder, "nowhere", "cannot be loaded", flags=["--model", "nowhere/at-all"])
    write_folder(folder)
    refused(folder, folder, "train.tsv and a file *.inter", "move the other", flags=model)
    (folder / "toy.inter").unlink()
    (folder / "val.tsv").write_text("")
    refused(folder, folder, "no pairs in the valid split", flags=model)
    with open(folder / "train.tsv", "a") as file:
        file.write("greedy\t" + " ".join(load_catalog(folder).ids) + "\n")
    refused(folder, "user 'greedy'", "all 294 items", flags=model)


def test_native_without_images(native, checkpoints, capsys):
    folder, _ = native
    shutil.rmtree(folder / "images")
    facts = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(facts | {"covers": "none"}))
    data = load_ranking_data(
        BrmrsFiles(str(folder), "out", str(checkpoints["qwen2_5_vl"]), "float32", 1024, "cpu")
    )
    assert set(data.features) == {"t"} and "no item has an image" in capsys.readouterr().out


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_columns(tmp_path / "none.inter", ["a"])
