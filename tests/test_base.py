"""What the base does for many: facts held against what is expected, folders that are whole or
absent.
"""

import errno
import os

import pytest

from hanorec.base import files
from hanorec.base.errors import InputError
from hanorec.base.facts import check_facts
from hanorec.base.files import whole_folder, write_text


def complaint(name, found, wanted):
    return f"{name}: {found!r}, not {wanted!r}"


# ---- facts ----


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"a": 1, "b": "x"}, {"a": 1, "b": "x"}),
        ({"a": 1, "more": 2}, {"a": 1}),  # what nobody asks for does not matter
        ({"a": [1, [2]]}, {"a": (1, (2,))}),  # JSON has no tuples
        ({"a": {"1": None}}, {"a": {1: None}}),  # nor keys that are numbers
        ({"b": 1}, {"a": None, "b": 1}),  # lacking is None
        ({"a": 0.1 + 0.2}, {"a": 0.1 + 0.2}),
        (None, {}),
        ("a", {"a": None}),
    ],
    ids=str,
)
def test_facts_that_agree(stored, expected):
    check_facts(stored, expected, complaint)


@pytest.mark.parametrize(
    ("stored", "expected", "message"),
    [
        ({"a": 1}, {"a": 2}, "a: 1, not 2"),
        ({"a": "1"}, {"a": 1}, "a: '1', not 1"),
        ({}, {"a": 1}, "a: None, not 1"),
        ({"a": 1}, {"a": None}, "a: 1, not None"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": (2, 1)}}, "a: {'b': [1, 2]}, not {'b': [2, 1]}"),
        ([["a", 1]], {"a": 1}, "a: None, not 1"),  # no object states nothing
        ("a", {"a": 1}, "a: None, not 1"),
    ],
    ids=str,
)
def test_a_fact_that_differs_is_named(stored, expected, message):
    with pytest.raises(InputError) as caught:
        check_facts(stored, expected, complaint)
    assert str(caught.value) == message


def test_the_first_fact_that_differs_is_named_in_the_order_of_what_is_expected():
    for order in (["a", "b", "c"], ["c", "b", "a"]):
        expected = dict.fromkeys(order, 1) | {"b": 2}
        with pytest.raises(InputError, match=f"{order[0]}: 0, not 1"):
            check_facts({"a": 0, "b": 2, "c": 0}, expected, complaint)


# ---- folders ----


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path):
    """Nothing under its name before the block is over, and nothing beside it afterwards; its
    parents are made, and others may read it.
    """
    path = tmp_path / "new" / "folder"
    with whole_folder(path) as hidden:
        assert hidden.parent == path.parent and hidden.name.startswith(".folder.tmp-")
        write_text(hidden / "a.txt", "a")
        (hidden / "deep").mkdir()
        write_text(hidden / "deep" / "b.txt", "b")
        assert names(path.parent) == [hidden.name]
    assert names(path.parent) == ["folder"]
    assert names(path) == ["a.txt", "deep"]
    assert (path / "deep" / "b.txt").read_text() == "b"
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_nothing(tmp_path, error):
    """Not even what it had written; what lies beside it stays."""
    write_text(tmp_path / "mine.txt", "mine")
    with pytest.raises(error), whole_folder(tmp_path / "folder") as hidden:
        write_text(hidden / "a.txt", "a")
        raise error
    assert names(tmp_path) == ["mine.txt"]


def test_a_folder_with_something_in_it_is_never_written_over(tmp_path):
    """The old one stays as it is, and of the new one nothing is left. An empty one gives way."""
    write_text(tmp_path / "full" / "old.txt", "old")
    with pytest.raises(OSError) as caught, whole_folder(tmp_path / "full") as hidden:
        write_text(hidden / "new.txt", "new")
    assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    assert names(tmp_path) == ["full"] and names(tmp_path / "full") == ["old.txt"]

    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as hidden:
        write_text(hidden / "new.txt", "new")
    assert names(tmp_path) == ["empty", "full"] and names(tmp_path / "empty") == ["new.txt"]


def test_a_file_of_that_name_is_kept(tmp_path):
    write_text(tmp_path / "folder", "a file")
    with pytest.raises(OSError), whole_folder(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder").read_text() == "a file"


def test_names_are_on_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    """The folder is flushed, renamed, and then its parent is flushed. Where the disk fails at the
    first of these, nothing is left.
    """
    calls = []

    def watched(name):
        real = getattr(os, name)

        def call(*args):
            calls.append(name)
            return real(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, watched(name))
    with whole_folder(tmp_path / "folder"):
        pass
    assert calls == ["fsync", "replace", "fsync"]

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "other"):
        pass
    assert names(tmp_path) == ["folder"]
