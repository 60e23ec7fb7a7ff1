"""Histories, splits and candidate sets. Expected values are worked out by hand on the toy data
below.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hanorec.base.errors import InputError
from hanorec.datasets.candidates import draw_candidates, draw_hard_candidates
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.frozen import load_candidates, save_candidates
from hanorec.datasets.interactions import (
    Example,
    Interactions,
    heldout_examples,
    load_interactions,
    select_users,
    training_examples,
)


def make_catalog(n, titles=None):
    titles = tuple(titles or (f"title {i}" for i in range(n)))
    return Catalog(Path("."), "toy", tuple(f"i{i}" for i in range(n)), titles, (None,) * n, "none")


def message(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def write(folder, train="u\ti0 i1 i2\n", val="u\ti3\n", test="u\ti4\n"):
    for name, data in (("train", train), ("val", val), ("test", test)):
        (folder / f"{name}.tsv").write_bytes(
            data.encode("utf-8") if isinstance(data, str) else data
        )
    return folder


DATA = Interactions(
    train={"a": (0, 1, 2, 3, 4, 5, 6), "b": (7, 8), "c": (9,)},
    val={"a": (10,), "b": (11, 12)},
    test={"a": (13,), "b": (14,), "c": (15,)},
)


def test_load(tmp_path):
    write(tmp_path, "\ufeffu\ti0 i1 i0\r\nv v\ti2\r\n", "u\ti3\n", "u\ti4 i5\nv v\ti6")
    data = load_interactions(tmp_path, make_catalog(8))
    assert data.train == {"u": (0, 1, 0), "v v": (2,)}  # a repeat is kept
    assert data.val == {"u": (3,)}  # val may lack users
    assert data.test == {"u": (4, 5), "v v": (6,)}
    assert data.before("u", "val") == (0, 1, 0)
    assert data.before("u", "test") == (0, 1, 0, 3)
    assert data.before("v v", "test") == (2,)
    assert "'train'" in message(data.before, "u", "train")


@pytest.mark.parametrize(
    ("part", "data", "parts"),
    [("train", "u\ti0\nv i1\n", ["train.tsv:2:", "0 tabs", "'v i1'", "u"]),
     ("train", "u\ti0\ti1\n", ["train.tsv:1:", "2 tabs", "expected one"]),
     ("train", "u\ti0\n\n", ["train.tsv:2:", "0 tabs"]),
     ("train", "u\ti0\n \ti1\n", ["train.tsv:2:", "empty user", "' '"]),
     ("train", "u\ti0\nv\ti1\nu\ti2\n", ["train.tsv:3:", "'u'", "join"]),
     ("train", "u\ti0\nv\t \n", ["train.tsv:2:", "'v'", "empty history", "remove the line"]),
     ("train", "u\ti0 i99 i1\n", ["train.tsv:1:", "'i99'", "titles file", "remove it here"]),
     ("val", "u\ti3\nw\ti1\n",
      ["val.tsv:2:", "'w'", "train.tsv", "empty history", "remove the user"]),
     ("test", "w\ti1\n", ["test.tsv:1:", "'w'", "train.tsv"]),
     ("test", "u\ti\0\n", ["test.tsv:1:", "NUL"]),
     ("test", b"u\ti1\nu\xff\ti1\n", ["test.tsv:2:", "0xff", "utf-8"]),
     ("train", "", ["train.tsv", "no users"])],
)
def test_bad_lines_name_file_line_value_and_remedy(tmp_path, part, data, parts):
    text = message(load_interactions, write(tmp_path, **{part: data}), make_catalog(8))
    for expected in parts:
        assert expected in text, text


def test_missing_file(tmp_path):
    write(tmp_path)
    (tmp_path / "val.tsv").unlink()
    assert "val.tsv" in message(load_interactions, tmp_path, make_catalog(8))


def test_training_examples():
    found = training_examples(DATA, targets_per_user=2, history=3)
    # "c" has no position with an earlier item; position 0 of "b" has none either
    assert [(e.user, e.history, e.target) for e in found] == [
        ("a", (2, 3, 4), 5),
        ("a", (3, 4, 5), 6),
        ("b", (7,), 8),
    ]
    assert set(found[0].seen) == set(range(7)) and set(found[2].seen) == {7, 8}
    everything = training_examples(DATA, targets_per_user=0, history=3)
    assert [e.target for e in everything] == [1, 2, 3, 4, 5, 6, 8]
    assert everything[0].history == (0,)
    assert [e.user for e in training_examples(DATA, users=["b"])] == ["b"]
    assert "'z'" in message(training_examples, DATA, users=["z"])
    assert "-1" in message(training_examples, DATA, targets_per_user=-1)
    assert "0" in message(training_examples, DATA, history=0)


def test_heldout_examples():
    val = heldout_examples(DATA, "val", history=3)
    assert [(e.user, e.history, e.target) for e in val] == [
        ("a", (4, 5, 6), 10),
        ("b", (7, 8), 11),
        ("b", (7, 8, 11), 12),
    ]
    assert set(val[1].seen) == set(val[2].seen) == {7, 8, 11, 12}
    test = heldout_examples(DATA, "test", history=3)
    assert [(e.user, e.history, e.target) for e in test] == [
        ("a", (5, 6, 10), 13),
        ("b", (8, 11, 12), 14),
        ("c", (9,), 15),
    ]
    assert set(test[0].seen) == {0, 1, 2, 3, 4, 5, 6, 10, 13}


def leaks(data, split, examples):
    """The rule, restated on whole sequences: users whose example shows the future or a seen
    negative.
    """
    found = []
    for e in examples:
        known = list(data.train[e.user])
        if split != "train":
            known = list(data.before(e.user, split)) + list(getattr(data, split)[e.user])
        cuts = [i for i, row in enumerate(known) if row == e.target and i > 0]
        past = any(tuple(known[:i][-len(e.history) :]) == e.history for i in cuts)
        negatives = set(e.candidates) - {e.target}
        if not past or negatives & set(known):
            found.append(e.user)
    return found


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_no_leak_and_the_check_can_fail(split):
    examples = training_examples(DATA) if split == "train" else heldout_examples(DATA, split)
    examples = draw_candidates(examples, make_catalog(40), seed=1)
    assert leaks(DATA, split, examples) == []
    # negative controls: a history that holds its own target, and a negative that the user has had
    first = examples[0]
    assert leaks(DATA, split, [replace(first, history=(*first.history, first.target))]) == [
        first.user
    ]
    bad = replace(first, candidates=(first.target, first.history[0]))
    assert leaks(DATA, split, [bad]) == [first.user]


def test_training_may_draw_what_only_val_and_test_hold():
    """In training val and test are unknown, so their items can be negatives: of 16 items, 9 are not
    in train.
    """
    example = training_examples(DATA, targets_per_user=1, users=["a"])[0]
    drawn = draw_candidates([example], make_catalog(16))[0]
    assert set(drawn.candidates) == {6, 7, 8, 9, 10, 11, 12, 13, 14, 15}


def test_select_users():
    users = [f"u{i}" for i in range(10)]
    parts = [select_users(users, a, b, seed=3) for a, b in ((0, 0.3), (0.3, 0.8), (0.8, 1))]
    assert [len(part) for part in parts] == [3, 5, 2]
    assert sorted(user for part in parts for user in part) == sorted(users)
    assert select_users(users[::-1], 0, 0.3, seed=3) == parts[0]  # file order does not matter
    assert any(select_users(users, 0, 0.3, seed=s) != parts[0] for s in range(5))
    assert "0.5" in message(select_users, users, 0.5, 0.5, 0)
    assert "nobody" in message(select_users, users, 0, 0.01, 0)


def test_candidates_are_distinct_unseen_and_reproducible():
    titles = ["A", "A", "B", "B", "C", "D", "E", "F"]
    items = make_catalog(8, titles)
    examples = [Example(f"u{i}", (4,), 0, frozenset({0, 4})) for i in range(200)]
    drawn = draw_candidates(examples, items, negatives=4)
    for e in drawn:
        # row 1 has the target's title, so one of rows 2, 3 and all of 5, 6, 7 are left
        assert len(e.candidates) == 5 and set(e.candidates) - {2, 3} == {0, 5, 6, 7}
        assert len({titles[row] for row in e.candidates}) == 5
    assert draw_candidates(examples, items, negatives=4) == drawn
    # a subset gets the same sets
    assert draw_candidates(examples[7:9][::-1], items, negatives=4) == drawn[7:9][::-1]
    assert draw_candidates(examples, items, negatives=4, seed=1) != drawn
    text = message(draw_candidates, examples, items, negatives=5)
    assert "'u0'" in text and "4 unseen" in text and "5 negatives" in text and "fewer" in text
    assert "0" in message(draw_candidates, examples, items, negatives=0)


def test_the_draw_depends_on_user_target_and_what_was_seen():
    """Of 10,000 items two independent sets of 9 agree with a probability of about 10,000 ** -9."""
    items = make_catalog(10_000)
    base = Example("u", (1,), 0, frozenset({0, 1}))
    others = [
        replace(base, user="v"), replace(base, target=1), replace(base, seen=frozenset({0, 1, 2}))
    ]
    sets = [frozenset(e.candidates) - {0, 1} for e in draw_candidates([base, *others], items)]
    assert len(set(sets)) == 4
    # how much history is shown changes no set, so settings can be compared
    longer = replace(base, history=(2, 1))
    assert frozenset(draw_candidates([longer], items)[0].candidates) - {0, 1} == sets[0]


@pytest.mark.parametrize("n", [12, 400])  # the explicit pool, and rejection
def test_candidates_are_uniform(n):
    """Each unseen row is a negative with probability p = 9 / (n - 2), and each of 10 places holds
    the target 1 in 10.

    The bound is 5 standard deviations of a binomial: with 410 such bounds a fair draw fails for one
    seed in some 4,000.
    """
    draws = 4000
    examples = [Example(f"u{i}", (0,), 1, frozenset({0, 1})) for i in range(draws)]
    drawn = draw_candidates(examples, make_catalog(n))
    p = 9 / (n - 2)
    counts = Counter(row for e in drawn for row in e.candidates)
    assert counts[1] == draws and counts[0] == 0
    for row in range(2, n):
        assert abs(counts[row] - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)), row
    places = Counter(e.candidates.index(1) for e in drawn)
    for place in range(10):
        assert abs(places[place] - draws * 0.1) <= 5 * np.sqrt(draws * 0.09), place


def test_hard_candidates():
    items = make_catalog(6, ["A", "B", "B", "C", "A", "D"])
    neighbors = np.tile(np.array([[1, 2, 4, 3, 5]]), (6, 1))
    example = Example("u", (3,), 0, frozenset({0, 3}))
    drawn = draw_hard_candidates([example], items, neighbors, negatives=2)[0]
    # 1 = B; 2 = B again; 4 has the target's title; 3 is seen; 5 = D
    assert set(drawn.candidates) == {0, 1, 5} and len(drawn.candidates) == 3
    text = message(draw_hard_candidates, [example], items, neighbors, negatives=3)
    assert "'i0'" in text
    assert "'u'" in text
    assert "2 of 5" in text
    assert "3 negatives" in text
    assert "raise --neighbors" in text and "--candidates" in text
    assert "(6, M)" in message(draw_hard_candidates, [example], items, neighbors[:5])
    assert "float64" in message(draw_hard_candidates, [example], items, neighbors.astype(float))
    assert "-1" in message(draw_hard_candidates, [example], items, neighbors - 2)
    many = [replace(example, user=f"u{i}") for i in range(200)]
    places = Counter(
        e.candidates.index(0) for e in draw_hard_candidates(many, items, neighbors, negatives=2)
    )
    assert set(places) == {0, 1, 2}  # the target's position tells nothing


@pytest.fixture
def frozen(tmp_path):
    items = make_catalog(40)
    examples = heldout_examples(DATA, "test")
    drawn = draw_candidates(examples, items)
    path = tmp_path / "candidates.json"
    digest = save_candidates(
        path, drawn, items, kind="random", split="test", seed=2025, negatives=9
    )
    return path, examples, items, drawn, digest


def test_save_and_load(frozen):
    path, examples, items, drawn, digest = frozen
    assert load_candidates(path, examples, items, kind="random", seed=2025) == drawn
    assert json.loads(path.read_text())["sha256"] == digest
    # by id: another order of the titles file gives the same ids under other rows
    order = list(range(39, -1, -1))
    turned = replace(
        items, ids=tuple(items.ids[i] for i in order), titles=tuple(items.titles[i] for i in order)
    )
    turn = [
        replace(e, target=39 - e.target, seen=frozenset(39 - r for r in e.seen)) for e in examples
    ]
    loaded = load_candidates(path, turn, turned)
    assert [[39 - r for r in e.candidates] for e in loaded] == [list(e.candidates) for e in drawn]
    assert "no candidates" in message(save_candidates, path, examples, items)


def test_load_refuses_other_facts_and_edits(frozen):
    path, examples, items, _, _ = frozen
    text = message(load_candidates, path, examples, items, seed=7)
    assert str(path) in text
    assert "seed is 2025" in text
    assert "expected 7" in text
    assert "delete the file" in text
    assert "encoder is None" in message(load_candidates, path, examples, items, encoder="x")
    assert "expected 2" in message(load_candidates, path, examples[:2], items)
    text = message(load_candidates, path, [examples[1], examples[0], examples[2]], items)
    assert "row 1" in text and "('a', 'i13')" in text and "('b', 'i14')" in text
    stored = json.loads(path.read_text())
    stored["rows"][0]["candidates"].reverse()
    path.write_text(json.dumps(stored))
    assert "edited" in message(load_candidates, path, examples, items)
    path.write_text("{}")
    assert "not a candidate file" in message(load_candidates, path, examples, items)


def test_load_refuses_sets_that_cannot_be_scored(frozen):
    path, examples, items, drawn, _ = frozen

    def saved(candidates, names=items):
        save_candidates(path, [replace(drawn[0], candidates=candidates)], names)
        return path

    one = examples[:1]  # user a, target row 13, seen 0..6, 10, 13
    text = message(load_candidates, saved((13, 20, 20)), one, items)
    assert "row 1" in text and "'i20' appears twice" in text
    assert "target 'i13' is not among" in message(load_candidates, saved((20, 21)), one, items)
    text = message(load_candidates, saved((13, 3)), one, items)
    assert "'i3'" in text and "'a'" in text and "unseen" in text
    same = replace(items, titles=items.titles[:20] + ("twin", "twin") + items.titles[22:])
    text = message(load_candidates, saved((13, 20, 21), same), one, same)
    assert "'i20' and 'i21'" in text and "'twin'" in text
    known = replace(items, ids=items.ids[:30], titles=items.titles[:30])
    assert "'i35' is unknown" in message(load_candidates, saved((13, 35)), one, known)
