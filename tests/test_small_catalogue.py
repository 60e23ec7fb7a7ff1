"""A catalogue of a dozen items: neighbours of hard negatives are cut to what there is, aloud; all
else that asks for too much is refused by the name of the flag.
"""

import json

import pytest
import toy

import evaluate
import train_dpo
import train_sft
from hanorec.base.errors import InputError
from hanorec.datasets.candidates import near_count
from hanorec.datasets.catalog import load_catalog

N = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Twelve items without images; eight users with four training items each."""
    folder = tmp_path_factory.mktemp("small")
    titles = "".join(f"i{n},Film {n}\n" for n in range(N))
    (folder / "Small_titles.csv").write_text("item,title\n" + titles)
    for split, of_user in (("train", range(4)), ("val", [4]), ("test", [5])):
        lines = [f"u{u}\t" + " ".join(f"i{(u + k) % N}" for k in of_user) + "\n" for u in range(8)]
        (folder / f"{split}.tsv").write_text("".join(lines))
    return folder


def run(main, small, checkpoints, out, *flags):
    main([
        "--model", str(checkpoints["qwen2_5_vl"]), "--data", str(small), *toy.SHORT,
        "--out", str(out), *flags,
    ])


NOTE = "note: --neighbors 50, but an item has only 11 others: all are taken\n"


def test_hard_sets_of_a_small_catalogue(small, checkpoints, tmp_path, capsys):
    """By default 50 neighbours are wanted: all 11 others are taken, and said; 11 asks for the same
    sets, 10 for others.
    """
    run(evaluate.main, small, checkpoints, tmp_path / "a", "--sets", "hard")
    assert capsys.readouterr().out.count(NOTE) == 1
    kept = json.loads((small / "candidates_test_hard.json").read_text())
    assert kept["facts"]["neighbors"] == N - 1 and len(kept["rows"]) == 8
    run(evaluate.main, small, checkpoints, tmp_path / "b", "--sets", "hard", "--neighbors", "11")
    assert "note: --neighbors" not in capsys.readouterr().out
    with pytest.raises(InputError, match="neighbors is 11 in the file, expected 10"):
        other = ["--sets", "hard", "--neighbors", "10"]
        run(evaluate.main, small, checkpoints, tmp_path / "c", *other)


def test_hard_draws_of_a_small_catalogue(small, checkpoints, tmp_path, capsys):
    flags = [*toy.STEPS, "--draw", "hard"]
    run(train_sft.main, small, checkpoints, tmp_path / "out", *flags)
    assert capsys.readouterr().out.count(NOTE) == 1
    assert (tmp_path / "out" / "adapter_config.json").exists()
    more = [*flags, "--candidates", "9"]  # of 11 others a user has had up to 3
    with pytest.raises(InputError, match=r"8 negatives wanted; raise --neighbors .*--candidates"):
        run(train_sft.main, small, checkpoints, tmp_path / "more", *more, "--neighbors", "6")


def test_flags_that_ask_for_too_much_are_named(small, checkpoints, tmp_path):
    with pytest.raises(InputError, match=r"--k 12: K = 12 .* of 12 items, expected 1 .. 11"):
        run(train_dpo.main, small, checkpoints, tmp_path / "k", *toy.STEPS, "--k", "12")
    run(train_dpo.main, small, checkpoints, tmp_path / "most", *toy.STEPS, "--k", "11")
    with pytest.raises(InputError, match=r"fewer negatives \(--candidates\) or add items"):
        run(train_sft.main, small, checkpoints, tmp_path / "c", *toy.STEPS, "--candidates", "13")
    with pytest.raises(InputError, match=r"nobody; widen --users-from, --users-to"):
        run(train_sft.main, small, checkpoints, tmp_path / "u", *toy.STEPS, "--users-to", "0.01")


def test_one_item_has_no_neighbours(tmp_path):
    (tmp_path / "One_titles.csv").write_text("item,title\n1,A\n")
    with pytest.raises(InputError, match="one item has no neighbours; add items"):
        near_count(50, load_catalog(tmp_path))
    (tmp_path / "One_titles.csv").write_text("item,title\n1,A\n2,B\n")
    assert near_count(50, load_catalog(tmp_path)) == 1
