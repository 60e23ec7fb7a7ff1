"""The converters, on small raw files written here: tricky spellings, ties in time, and every
refusal.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hanorec.base.errors import InputError
from hanorec.datasets import microlens, movielens, netflix, recbole
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.covers import draw_cover
from hanorec.datasets.images import read_image
from hanorec.datasets.interactions import load_interactions


def write(folder, **files):
    """Files by name, with `__` for the dot; text is written as UTF-8."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(
            data.encode("utf-8") if isinstance(data, str) else data
        )
    return folder


def convert(module, raw, *options):
    out = raw.parent / "out"
    module.main([str(raw), str(out), *options])
    return out


def message(module, raw, *options):
    with pytest.raises(InputError) as caught:
        convert(module, raw, *options)
    left = [path.name for path in raw.parent.iterdir() if path.name.startswith(".out")]
    assert not left, "a refused conversion leaves nothing half written"
    return str(caught.value)


def sequences(out):
    """User -> (train, val, test) as texts, read without the package."""
    result = {}
    for part in ("train", "val", "test"):
        for text in (out / f"{part}.tsv").read_text(encoding="utf-8").splitlines():
            user, items = text.split("\t")
            result.setdefault(user, []).append(items)
    return {user: tuple(parts) for user, parts in result.items()}


def read_titles(out):
    with open(next(out.glob("*_titles.csv")), encoding="utf-8", newline="") as file:
        return dict(list(csv.reader(file))[1:])


def facts(out):
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))


MOVIES = """1::Misérables, Les (1995)::Drama|Musical
2::Jumanji (1995)::Adventure
30::Heat::Action
4::Heat::Crime
5::Nobody::War
"""
# user 9: times out of order, and a tie of 4 and 2 at time 50, which keeps the order of the file: 1,
# 4, 2, 30
RATINGS = (
    "9::4::5::50\n9::30::4::70\n8::1::3::5\n9::2::1::50\n9::1::5::10\n8::2::5::6\n8::4::4::7\n"
)


@pytest.fixture
def raw_1m(tmp_path):
    return write(tmp_path / "raw", movies__dat=MOVIES.encode("latin-1"), ratings__dat=RATINGS)


def test_movielens_1m(raw_1m, capsys):
    out = convert(movielens, raw_1m)
    assert sequences(out) == {"9": ("1 4", "2", "30"), "8": ("1", "2", "4")}
    titles = read_titles(out)
    assert titles["1"] == "Misérables, Les (1995)" and list(titles) == ["1", "2", "30", "4", "5"]
    found = facts(out)
    expected = {
        "name": "MovieLens-1M",
        "covers": "none",
        "users": 2,
        "items": 5,
        "items_never_had": 1,
        "interactions": 7,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["density"] == pytest.approx(7 / 10)
    assert found["items_sharing_a_title"] == 2  # Heat, twice
    assert "ties" in found["order"] or "equal times" in found["order"]
    printed = capsys.readouterr().out
    assert "2 users, 5 items (1 never had), 7 interactions, density 70.0000%" in printed
    items = load_catalog(out)
    data = load_interactions(out, items)
    assert [items.ids[row] for row in data.before("9", "test")] == ["1", "4", "2"]


def late(raw_times, parts):
    """Users with a train or val item that is later than their val or test item: the leak that must
    not be.
    """
    found = []
    for user, sets in parts.items():
        times = [[raw_times[user, item] for item in items.split()] for items in sets]
        if max(times[0]) > min(times[1]) or max(times[1]) > min(times[2]):
            found.append(user)
    return found


def test_split_does_not_leak_and_the_check_can_fail(raw_1m):
    times = {}
    for text in RATINGS.splitlines():
        user, item, _, time = text.split("::")
        times[user, item] = int(time)
    parts = sequences(convert(movielens, raw_1m))
    assert late(times, parts) == []
    leaky = {user: (train, test, val) for user, (train, val, test) in parts.items()}
    assert late(times, leaky) == ["9", "8"]
    assert late(times, {"9": ("1 30", "4", "2")}) == ["9"]


def test_movielens_100k_bom_and_crlf(tmp_path):
    flags = ["0"] * 19
    flags[5] = flags[8] = "1"
    row = "|".join(["5", "Café, Le (1990)", "01-Jan-1990", "", "http://x", *flags])
    data = "\ufeff1\t5\t3\t9\r\n1\t5\t3\t9\r\n1\t5\t3\t8\r\n".encode()
    raw = write(tmp_path / "raw", u__item=(row + "\r\n").encode("latin-1"), u__data=data)
    out = convert(movielens, raw)
    assert sequences(out) == {"1": ("5", "5", "5")}
    assert read_titles(out) == {"5": "Café, Le (1990)"}
    assert facts(out)["repeated_interactions"] == 2
    assert movielens.read_movies_100k(raw / "u.item")[1] == {"5": ["Comedy", "Drama"]}


FLAGS_OF = "|".join(["0"] * 19)
SAVED = {  # file -> its text
    "movies.dat": MOVIES,
    "u.item": f"5|Misérables, Les (1995)|01-Jan-1990||http://x|{FLAGS_OF}\n",
    "movie_titles.csv": "5,1995,Misérables, Les (1995)\n2,NULL,Über uns\n",
}


def titles_of(name, path):
    """By the converter's own reader."""
    if name == "movie_titles.csv":
        return netflix.read_titles(path)[0]
    reader = movielens.read_movies_1m if name == "movies.dat" else movielens.read_movies_100k
    return reader(path)[0]


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize(
    ("encoding", "said"),
    [("iso-8859-1", "ISO-8859-1"), ("utf-8", "UTF-8"), ("utf-8-sig", "UTF-8")],
)
def test_published_or_saved_again(tmp_path, capsys, name, encoding, said):
    """ISO-8859-1 as it was published, UTF-8 with and without a BOM: the same titles, and said."""
    path = tmp_path / name
    path.write_bytes(SAVED[name].encode(encoding))
    assert "Misérables, Les (1995)" in titles_of(name, path).values()
    assert capsys.readouterr().out == f"{name}: text beyond ASCII is read as {said}\n"
    # control: one encoding for all of them is wrong for one of them
    wrong = SAVED[name].encode("utf-8").decode("iso-8859-1")
    assert "MisÃ©rables" in wrong and wrong not in SAVED[name]


def test_an_encoding_is_that_of_the_whole_file(tmp_path, capsys):
    """ASCII says nothing; a file with bytes of both is ISO-8859-1 and told; what has a BOM is
    UTF-8, so another byte in it is an error.
    """
    path = tmp_path / "movies.dat"
    path.write_bytes(b"1::Heat::War\n")
    assert titles_of("movies.dat", path) == {"1": "Heat"} and capsys.readouterr().out == ""
    both = "1::Café::War\n".encode() + "2::Über::War\n".encode("latin-1")
    path.write_bytes(both)
    assert titles_of("movies.dat", path) == {"1": "CafÃ©", "2": "Über"}
    said = capsys.readouterr().out
    assert "read as ISO-8859-1" in said and "1 of the 2 lines beyond ASCII" in said
    path.write_bytes(b"\xef\xbb\xbf" + both)
    with pytest.raises(InputError, match="movies.dat:2: byte 0xdc .* is not utf-8; save the file"):
        titles_of("movies.dat", path)


def test_bytes_that_are_control_codes_are_refused(tmp_path):
    """Windows-1252 puts quotes where ISO-8859-1 has C1 codes, which are no text."""
    path = tmp_path / "movies.dat"
    path.write_bytes("1::The Devil’s Own::War\n2::Café::War\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"movies.dat:1: control character '\\x92' at position 13"):
        titles_of("movies.dat", path)


@pytest.mark.parametrize("sign", ["tags.dat", "half stars", "a large id"])
def test_movielens_10m_by_what_is_in_the_folder(raw_1m, sign):
    """It has the file names of 1M. Without any of the signs the folder is 1M."""
    assert facts(convert(movielens, raw_1m))["name"] == "MovieLens-1M"
    (raw_1m.parent / "out").rename(raw_1m.parent / "kept")
    if sign == "tags.dat":
        write(raw_1m, tags__dat="9::4::good::50\n")
    elif sign == "half stars":
        write(raw_1m, ratings__dat=RATINGS.replace("9::4::5::", "9::4::4.5::"))
    else:
        write(raw_1m, movies__dat=(MOVIES + "65133::Blackadder::Comedy\n").encode())
    found = facts(convert(movielens, raw_1m))
    assert found["name"] == found["source"]["format"] == "MovieLens-10M"
    assert (raw_1m.parent / "out" / "MovieLens-10M_titles.csv").exists()


def test_movielens_needs_one_of_the_two(raw_1m, tmp_path):
    assert "neither ratings.dat nor u.data" in message(movielens, write(tmp_path / "empty"))
    write(raw_1m, u__data="")
    assert "both" in message(movielens, raw_1m)


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [("ratings.dat", "1::2::3\n", ["ratings.dat:1:", "3 fields", "'1::2::3'", "expected 4"]),
     ("ratings.dat", RATINGS + "8::1::x::9\n",
      ["ratings.dat:8:", "rating 'x'", "expected a finite number"]),
     ("ratings.dat", RATINGS + "8::1::3::nan\n", ["ratings.dat:8:", "time 'nan'"]),
     ("ratings.dat", RATINGS + "::1::3::9\n", ["ratings.dat:8:", "user id ''"]),
     ("ratings.dat", RATINGS + "8::1 2::3::9\n",
      ["ratings.dat:8:", "item id '1 2'", "without spaces"]),
     ("ratings.dat", RATINGS + "8::77::3::9\n", ["'77'", "no title", "add it"]),
     ("ratings.dat", RATINGS + "7::1::3::9\n",
      ["'7'", "1 interactions", "at least 3", "--min-items 3"]),
     ("ratings.dat", "", ["none of the 0 users"]),
     ("movies.dat", MOVIES + "6::X\n", ["movies.dat:6:", "2 fields", "expected 3"]),
     ("movies.dat", MOVIES + "2::X::Y\n", ["movies.dat:6:", "'2'", "earlier line"]),
     ("movies.dat", MOVIES + "6:: ::Y\n", ["movies.dat:6:", "'6'", "empty title"])],
)
def test_bad_raw_lines(raw_1m, name, data, parts):
    (raw_1m / name).write_bytes(data.encode("latin-1"))
    text = message(movielens, raw_1m)
    for part in parts:
        assert part in text, text


def test_filters(raw_1m, capsys):
    # leaves 9 with 4, 30, 1 and 8 with 2, 4 only
    text = message(movielens, raw_1m, "--min-rating", "4")
    assert "'8'" in text and "2 interactions" in text and "--min-items" in text
    out = convert(movielens, raw_1m, "--min-rating", "4", "--min-items", "3", "--name", "Toy")
    assert sequences(out) == {"9": ("1", "4", "30")}
    found = facts(out)
    assert (found["users_left_out"], found["min_rating"], found["min_items"], found["name"]) == (
        1, 4.0, 3, "Toy"
    )
    assert "left out: 1 users with fewer than 3" in capsys.readouterr().out
    assert (out / "Toy_titles.csv").exists()
    text = message(movielens, raw_1m)
    assert "out" in text and "not an empty folder" in text and "choose another OUT" in text
    (raw_1m.parent / "out").rename(raw_1m.parent / "kept")
    assert "--min-items 2" in message(movielens, raw_1m, "--min-items", "2")
    assert "'../x'" in message(movielens, raw_1m, "--name", "../x")
    assert "none of the 2 users has 5" in message(movielens, raw_1m, "--min-items", "5")
    (raw_1m.parent / "out").mkdir()  # an empty folder is fine
    convert(movielens, raw_1m, "--min-items", "4")


def test_images_are_copied_by_stem(raw_1m, tmp_path):
    (tmp_path / "covers").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "covers" / "30.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "covers" / "999.png")
    out = convert(movielens, raw_1m, "--images", str(tmp_path / "covers"))
    items = load_catalog(out)
    assert [path and path.name for path in items.images] == [None, None, "30.png", None, None]
    found = facts(out)
    assert (items.covers, found["images"], found["items_without_image"]) == ("real", 1, 4)
    (tmp_path / "out").rename(tmp_path / "kept")
    assert "not a folder" in message(movielens, raw_1m, "--images", str(tmp_path / "absent"))
    (tmp_path / "covers" / "30.png").unlink()
    assert "1.jpg" in message(movielens, raw_1m, "--images", str(tmp_path / "covers"))


def test_drawn_covers(raw_1m):
    out = convert(movielens, raw_1m, "--draw-covers")
    items = load_catalog(out)
    assert items.covers == "drawn" and None not in items.images
    assert read_image(items.images[0]).size == (112, 160)
    cover = {
        genre: np.asarray(draw_cover("T", [genre])).astype(int)
        for genre in ("Drama", "War", "no such genre")
    }
    assert (np.asarray(draw_cover("T", ["Drama"])) == cover["Drama"]).all()  # deterministic
    assert np.abs(cover["Drama"] - cover["War"]).max() > 50  # the genre shows
    # the title shows
    assert np.abs(cover["Drama"] - np.asarray(draw_cover("U", ["Drama"]))).max() > 50
    assert (np.asarray(draw_cover("Café", [])) == np.asarray(draw_cover("Cafe", []))).all()
    for title in ("x" * 300, "many words " * 60, "流浪地球"):
        assert draw_cover(title, []).size == (112, 160)


INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ta\t3\t30\nu\tb\t3\t1e1\n"
    "u\tc\t3\t20\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\tclass:token_seq\na\tToy, Story\tAnimation Comedy\n"
    "b\tHeat\t\nc\tÉté\tDrama\n"
)


def test_recbole(tmp_path):
    raw = write(tmp_path / "raw", ml__inter="\ufeff" + INTER.replace("\n", "\r\n"), ml__item=ITEM)
    out = convert(recbole, raw, "--draw-covers")
    assert sequences(out) == {"u": ("b", "c", "a")}
    assert read_titles(out) == {"a": "Toy, Story", "b": "Heat", "c": "Été"}
    assert facts(out)["name"] == "ml"
    (tmp_path / "out").rename(tmp_path / "kept")
    out = convert(recbole, raw, "--time-field", "none", "--rating-field", "none")
    assert sequences(out) == {"u": ("a", "b", "c")}
    (tmp_path / "out").rename(tmp_path / "kept2")
    text = message(recbole, raw, "--rating-field", "none", "--min-rating", "2")
    assert "--min-rating" in text and "no ratings" in text
    text = message(recbole, raw, "--time-field", "when")
    assert "ml.inter:1:" in text
    assert "'when'" in text
    assert "timestamp" in text
    assert "--time-field" in text
    assert "--title-field" in message(recbole, raw, "--title-field", "x")
    assert "--genre-field" in message(recbole, raw, "--genre-field", "x", "--draw-covers")


def test_recbole_quoted(tmp_path, capsys):
    """As pandas writes a tab-separated file: fields that hold a quote are quoted. Ids that are
    quoted in both files are one.
    """
    item = 'item_id:token\ttitle:token_seq\n"a"\t"He said ""no"""\n"b"\t"Heat"\n"c"\t"nan"\n'
    inter = INTER.replace("\ta\t", '\t"a"\t').replace("u\tb", '"u"\tb')
    raw = write(tmp_path / "raw", ml__inter=inter, ml__item=item)
    out = convert(recbole, raw)
    assert read_titles(out) == {"a": 'He said "no"', "b": "Heat", "c": "nan"}
    assert sequences(out) == {"u": ("b", "c", "a")}
    said = capsys.readouterr().out
    assert "read ml.item (quoted as csv)" in said and "read ml.inter (quoted as csv)" in said
    (tmp_path / "out").rename(tmp_path / "kept")
    write(raw, ml__item=ITEM, ml__inter=INTER)
    convert(recbole, raw)
    assert "read ml.item (not quoted)" in capsys.readouterr().out


def test_recbole_refusals(tmp_path):
    raw = write(tmp_path / "raw", ml__inter=INTER + "u\ta\n", ml__item=ITEM)
    text = message(recbole, raw)
    assert "ml.inter:5:" in text
    assert "2 fields" in text
    assert "expected 4" in text
    assert "timestamp" in text
    write(raw, ml__inter="user_id\titem_id\n")
    assert "ml.inter:1:" in message(recbole, raw) and "user_id:token" in message(recbole, raw)
    write(raw, second__inter=INTER)
    assert "2 files *.inter" in message(recbole, raw)


PAIRS = "user,item,timestamp\n1,10,1600000000300\n1,20,1600000000100\n1,30,1600000000200\n"


def test_microlens_csv_with_and_without_header(tmp_path):
    raw = write(tmp_path / "raw", **{"ML-50k_pairs__csv": PAIRS})
    write(raw, **{"ML-50k_titles__csv": 'item,title\n10,One, two "three"\n20,B\n30,#x\n'})
    out = convert(microlens, raw)
    assert sequences(out) == {"1": ("20", "30", "10")}
    assert read_titles(out)["10"] == 'One, two "three"'
    # through the csv that the converter wrote
    assert load_catalog(out).titles[0] == 'One, two "three"'
    assert facts(out)["source"]["titles_header"] is True and facts(out)["name"] == "ML-50k"
    (tmp_path / "out").rename(tmp_path / "kept")
    (raw / "ML-50k_titles.csv").unlink()
    write(raw, **{"ML-50k_title_en__csv": "\ufeff10,One\r\n20,B\r\n30,C\r\n"})
    out = convert(microlens, raw)
    assert read_titles(out) == {"10": "One", "20": "B", "30": "C"}
    assert facts(out)["source"]["titles_header"] is False


def test_microlens_quoted(tmp_path, capsys):
    """As MicroLens-50k is: titles with commas are quoted, quotes in them doubled."""
    table = (
        'item,title\r\n10,"A dish, with chili"\r\n20,"""Two"" days\r\nlater"\r\n30,nan\r\n'
    )
    raw = write(tmp_path / "raw", **{"ML-50k_pairs__csv": PAIRS, "ML-50k_titles__csv": table})
    out = convert(microlens, raw)
    expected = {"10": "A dish, with chili", "20": '"Two" days later', "30": "nan"}
    assert read_titles(out) == expected
    assert load_catalog(out).titles == tuple(expected.values())
    assert facts(out)["source"]["titles_quoted"] is True
    assert "(with a header, quoted as csv)" in capsys.readouterr().out
    (tmp_path / "out").rename(tmp_path / "kept")
    pairs = PAIRS.replace("1,10,1600000000300", '"1","10","1600000000300"')
    write(raw, **{"ML-50k_titles__csv": "10,A, B\n20,C\n30,D\n", "ML-50k_pairs__csv": pairs})
    out = convert(microlens, raw)
    assert sequences(out) == {"1": ("20", "30", "10")}
    assert read_titles(out) == {"10": "A, B", "20": "C", "30": "D"}
    assert "titles_quoted" not in facts(out)["source"]
    assert "(without a header, not quoted)" in capsys.readouterr().out
    (tmp_path / "out").rename(tmp_path / "kept2")
    write(raw, **{"ML-50k_titles__csv": '10,"A, B"\n20,C, D\n30,E\n'})
    text = message(microlens, raw)
    assert "ML-50k_titles.csv:1:" in text and "line 2" in text and "mend either line" in text


def test_microlens_tsv_and_refusals(tmp_path):
    raw = write(
        tmp_path / "raw", m_pairs__tsv="1\t30 10 20 10\n2\t10 20 30\n",
        m_titles__csv="10,A\n20,B\n30,C\n",
    )
    assert sequences(convert(microlens, raw)) == {
        "1": ("30 10", "20", "10"), "2": ("10", "20", "30")
    }
    (tmp_path / "out").rename(tmp_path / "kept")
    write(raw, m_pairs__tsv="1\t30 10 20\n2 10\n")
    text = message(microlens, raw)
    assert "m_pairs.tsv:2:" in text and "'2 10'" in text and "user<TAB>id" in text
    # joined in which order? Nobody knows
    write(raw, m_pairs__tsv="1\t30 10 20\n2\t10 20 30\n1\t20 30 10\n")
    text = message(microlens, raw)
    assert "m_pairs.tsv:3:" in text and "'1'" in text and "one line a user" in text
    write(raw, m_pairs__tsv="1\t30 10 20\n2 10\n")
    write(raw, m_titles__csv="10,A\n20\n")
    text = message(microlens, raw)
    assert "m_titles.csv:2:" in text and "'20'" in text and "item,title" in text
    write(raw, m_titles__csv="10,A\n20,B\n30,C\n", m_pairs__csv="u,i,t\n")
    text = message(microlens, raw)
    assert "m_pairs.csv:1:" in text and "'u,i,t'" in text and "user,item,timestamp" in text
    write(raw, m_pairs__csv=PAIRS + "1,10,soon\n")
    assert "m_pairs.csv:5:" in message(microlens, raw) and "time 'soon'" in message(microlens, raw)
    write(raw, m_title_en__csv="10,A\n")
    assert "2 files" in message(microlens, raw)


@pytest.fixture
def raw_netflix(tmp_path):
    titles = (
        "1,2003,Dinosaur Planet\n2,NULL,Good, the Bad, and Amélie, The\n3,1997,Character\n".encode(
            "latin-1"
        )
    )
    one = "1:\n7,3,2005-09-06\n8,5,2004-01-02\n2:\n7,4,2004-01-01\n8,1,2004-01-02\n"
    two = "3:\n8,2,2004-01-02\n7,3,2005-09-06\n"
    return write(
        tmp_path / "raw", movie_titles__csv=titles, combined_data_1__txt=one,
        combined_data_2__txt=two,
    )


def test_netflix(raw_netflix):
    out = convert(netflix, raw_netflix)
    # 7: movie 2 in 2004, then 1 and 3 on one day, in file order; 8: all on one day
    assert sequences(out) == {"7": ("2", "1", "3"), "8": ("1", "2", "3")}
    assert read_titles(out)["2"] == "Good, the Bad, and Amélie, The"


def test_netflix_saved_again(raw_netflix, capsys):
    """Quoted as csv, in UTF-8: what csv.writer makes of the titles as published."""
    path, was = raw_netflix / "movie_titles.csv", convert(netflix, raw_netflix)
    assert "not quoted" in capsys.readouterr().out
    rows = [line.split(",", 2) for line in path.read_text("latin-1").splitlines()]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    expected = read_titles(was)
    was.rename(raw_netflix.parent / "was")
    assert '2,NULL,"Good, the Bad, and Amélie, The"' in path.read_text("utf-8")
    assert read_titles(convert(netflix, raw_netflix)) == expected
    assert "quoted as csv" in capsys.readouterr().out


def test_a_title_has_one_spelling(raw_1m, capsys):
    """NFC, wherever titles are read; so two items whose titles only look different share one."""
    decomposed, kelvin = "Cafe\u0301", "\u212a2"
    write(raw_1m, movies__dat=f"1::{decomposed}::A\n2::Café::A\n30::{kelvin}::A\n4::nan::A\n")
    out = convert(movielens, raw_1m)
    assert read_titles(out) == {"1": "Café", "2": "Café", "30": "K2", "4": "nan"}
    assert "items that share a title with another: 2" in capsys.readouterr().out
    assert decomposed != "Café" and len(decomposed) == 5  # control: they differ in the file


def test_netflix_sample(raw_netflix):
    users = [
        set(netflix.sample_users(sorted(raw_netflix.glob("c*.txt")), 1, seed)) for seed in range(8)
    ]
    assert {7, 8} == {int(user) for found in users for user in found}  # the seed matters
    out = convert(netflix, raw_netflix, "--max-users", "1", "--seed", "3")
    assert set(sequences(out)) == users[3]
    source = facts(out)["source"]
    assert (source["user_sample"], source["user_sample_seed"]) == (1, 3)
    (raw_netflix.parent / "out").rename(raw_netflix.parent / "kept")
    assert "--max-users 0" in message(netflix, raw_netflix, "--max-users", "0")


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [("combined_data_1.txt", "7,3,2005-09-06\n",
      ["combined_data_1.txt:1:", "'7,3,2005-09-06'", "before any movie"]),
     ("combined_data_1.txt", "1:\n7,3\n", ["combined_data_1.txt:2:", "2 fields", "expected 3"]),
     ("combined_data_1.txt", "1:\n7,3,2005-13-06\n",
      ["combined_data_1.txt:2:", "'2005-13-06'", "YYYY-MM-DD"]),
     ("combined_data_1.txt", "1:\n7,good,2005-12-06\n", ["combined_data_1.txt:2:", "'good'"]),
     ("movie_titles.csv", "1,2003\n", ["movie_titles.csv:1:", "2 fields", "id,year,title"])],
)
def test_netflix_refusals(raw_netflix, name, data, parts):
    (raw_netflix / name).write_text(data)
    text = message(netflix, raw_netflix)
    for part in parts:
        assert part in text, text


def test_netflix_needs_its_files(tmp_path):
    assert "combined_data_*.txt" in message(netflix, write(tmp_path / "raw"))


def test_command_prints_one_line_and_exits_with_2(raw_1m):
    """Through `python -m`: an error is a message on stderr without a traceback; a good run exits
    with 0.
    """
    command = [
        sys.executable, "-m", "hanorec.datasets.movielens", str(raw_1m), str(raw_1m.parent / "out")
    ]
    root = Path(__file__).parents[1]
    bad = subprocess.run(
        [*command, "--min-items", "1"], cwd=root, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: --min-items 1;") and "Traceback" not in bad.stderr
    good = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    said, summary = good.stdout.split("\n", 1)
    assert said == "movies.dat: text beyond ASCII is read as ISO-8859-1"
    assert good.returncode == 0 and summary.startswith("MovieLens-1M: 2 users")
