"""Everything but the training of the MLLM over several processes: what comes out is what one
process computes.
"""

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from float64 import run_in_float64
from processes import run_script, together
from safetensors.torch import load_file
from toy_ranking import write_folder

import train_brmrs
from hanorec.base.distributed import all_gather, dealt, rank, run_on_all_ranks, share
from hanorec.base.errors import InputError
from hanorec.mllm import items
from hanorec.mllm.features import stored_pictures
from hanorec.mllm.items import item_embeddings, neighbors
from hanorec.mllm.load import load_backbone
from hanorec.mllm.topk_ring import topk_neighbors_ring
from hanorec.ranking import full_ranking
from hanorec.ranking.full_ranking import target_ranks
from hanorec.ranking.retriever import Retriever
from hanorec.ranking.sampler import NegativeSampler, Seen
from hanorec.run import epochs
from hanorec.topk import topk_neighbors

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import data_path

# ---- what is divided ----


def shares_and_errors():
    for n in (0, 1, 2, 3, 7):
        assert all_gather(torch.arange(n)[share(n)], n).tolist() == list(range(n))
        parts = run_on_all_ranks(lambda n=n: dealt(list(range(n))))
        assert sorted(itertools.chain(*parts)) == list(range(n))

    def fails():
        if rank() == 1:
            raise InputError("bad image")

    with pytest.raises(InputError, match="bad image"):
        run_on_all_ranks(fails)
    assert run_on_all_ranks(rank) == [0, 1, 2]


def test_shares_and_errors():
    """Each of n things once, whatever n; an error of one rank is everybody's."""
    assert together(3, shares_and_errors) == [0, 0, 0]


# ---- Top-K ----


def ring(e, k, block=None, by_groups=None):
    """The whole result of the ring, from a process that holds its slice of e."""
    own = e[share(len(e))].clone()
    return [all_gather(x, len(e)) for x in topk_neighbors_ring(own, len(e), k, block, by_groups)]


# rows, width, K, rows of a block
RINGS = [
    (2, 1, 1, None), (3, 2, 2, 1), (5, 2, 4, 2), (18, 2, 5, 3), (18, 2, 17, 4), (41, 3, 7, None),
]


def rings(by_groups):
    generator = torch.Generator().manual_seed(0)
    for rows, width, k, block in RINGS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            e = torch.randint(-2, 3, (rows, width), generator=generator).to(dtype)
            for found, expected in zip(
                ring(e, k, block, by_groups), topk_neighbors(e, k), strict=True
            ):
                assert found.dtype == expected.dtype and torch.equal(found, expected)
    e = torch.randn(203, 33, generator=generator, dtype=torch.float64)
    e = torch.nn.functional.normalize(e, dim=1)
    scores, index = ring(e, 10, by_groups=by_groups)
    expected, place = topk_neighbors(e, 10)
    assert (scores - expected).abs().max() < 1e-14 and torch.equal(index, place)


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize(("n", "by_groups"), [(2, False), (3, False), (4, False), (3, True)])
def test_the_ring_finds_the_same_neighbours(n, by_groups):
    """Small whole numbers: products are exact in every type, ties everywhere, so scores and indices
    are equal to the bit. Uneven slices, fewer rows than ranks, K from 1 to N - 1, blocks smaller
    than a slice. Random rows, in float64: equal but for the rounding of the product. By groups, as
    on GPUs, too.
    """
    assert together(n, rings, by_groups) == [0] * n


def bad_rings():
    e = torch.eye(5)
    for k, block, words in [(0, None, r"1 \.\. 4"), (5, None, r"1 \.\. 4"), (2, 0, "block = 0")]:
        with pytest.raises(InputError, match=words):
            ring(e, k, block)
    e[4, 1] = float("nan")
    with pytest.raises(InputError, match="row 4 "):
        ring(e, 2)
    e = torch.randint(-2, 3, (10, 2), generator=torch.Generator().manual_seed(1)).float()
    wrong = e[5:] if rank() == 0 else e[:5]
    _, index = topk_neighbors_ring(wrong, 10, 3)
    assert not torch.equal(all_gather(index, 10), topk_neighbors(e, 3)[1])


def test_the_ring_refuses_what_one_process_refuses():
    """The row by its number among all, on all ranks, though one alone holds it; the check above can
    fail: a rank that holds another's slice.
    """
    assert together(2, bad_rings) == [0, 0]


# ---- the items ----


def encoded(checkpoint, catalog, folder):
    """All that is made of a catalogue: image features, H and X in both forms, e, scores, index."""
    items.BATCH = 4
    qwen = load_backbone(str(checkpoint), "float32", "cpu")
    pictures = stored_pictures(qwen, catalog, folder)
    found = [pictures[row].features for row in sorted(pictures)]
    for form in ("input", "hidden"):
        found += item_embeddings(qwen, catalog, pictures, form)
    return [*found, *neighbors(qwen, catalog, pictures, 5)]


def encode_alone(checkpoint, catalog, folder, result):
    torch.save(encoded(checkpoint, catalog, folder), result)


def encode_together(checkpoint, catalog, folder, result):
    encode = items.encode

    def failing(*arguments):
        yield from list(encode(*arguments))[:4]
        raise InputError("bad image of rank 1")

    items.encode = failing if rank() == 1 else encode
    with pytest.raises(InputError, match="bad image of rank 1"):
        encoded(checkpoint, catalog, folder)
    assert not list(folder.iterdir())
    items.encode = encode
    run_on_all_ranks(rank)
    *found, scores, index = encoded(checkpoint, catalog, folder)
    *expected, near, place = torch.load(result)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(scores, near, atol=1e-6)
    assert torch.equal(index, place)


def test_the_catalogue_is_encoded_together(checkpoints, catalog, tmp_path):
    """18 images in batches of 4, so that the last round is ragged: both files equal one process's
    to the bit; so do H, X and the neighbours. A rank that fails takes the file with it, and all
    ranks say why.
    """
    few = replace(
        catalog, ids=catalog.ids[:19], titles=catalog.titles[:19], images=catalog.images[:19]
    )
    common = checkpoints["qwen2_5_vl"], few
    assert together(1, encode_alone, *common, tmp_path / "alone", tmp_path / "result") == [0]
    assert together(3, encode_together, *common, tmp_path / "all", tmp_path / "result") == [0] * 3
    files = []
    for name in ("alone", "all"):
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1] and len(files[0]) == 2


# ---- evaluation ----


def evaluate_all(commands):
    for argv in commands:
        run_in_float64("evaluate", argv)


def numbers(value):
    """The report as text without its scores, and the scores."""
    scores = []

    def walk(x):
        if isinstance(x, dict):
            names = [k for k in x if k not in ("out", "data", "seconds_per_user")]
            return {k: walk(x[k]) for k in names}
        if isinstance(x, list):
            return [walk(v) for v in x]
        if isinstance(x, float):
            scores.append(x)
            return None
        return x

    return walk(value), np.array(scores)


def test_users_are_divided(data, checkpoints, sft, tmp_path):
    """7 users over 3 ranks, and 1; two policies, both sets, drawn by the ranks; similarity; others'
    images; reranking. Every entry of the report but the scores is equal, and so are those, in
    float64.
    """
    model = ["--model", checkpoints["qwen2_5_vl"]]
    brmrs = ["--data", data, *model, "--max-pixels", 1024, "--device", "cpu", "--epochs", 1]
    train_brmrs.main([str(word) for word in [*brmrs, "--out", tmp_path / "brmrs"]])
    user, _, _ = (data / "test.tsv").read_text().partition("\t")
    several = ["--adapter", sft, "--adapter", "base", "--users-to", 0.3, "--batch", 2]
    runs = {
        "metrics": [*several, "--similarity", "true"],
        "shuffled": [*several, "--images", "shuffled", "--sets", "hard"],
        "rerank": [*several, "--retriever", tmp_path / "brmrs", "--top-n", 5],
        "list": ["--user", user, "--adapter", sft],
    }
    for n, name in [(1, "alone"), (3, "together")]:
        own, commands = tmp_path / name, []
        shutil.copytree(data, own / "data", ignore=shutil.ignore_patterns("candidates*"))
        for run, flags in runs.items():
            argv = [*model, *toy.SHORT, "--data", own / "data", "--out", own / run, *flags]
            commands.append([str(word) for word in argv])
        assert together(n, evaluate_all, commands) == [0] * n

    def both(file):
        return [(tmp_path / name / file).read_text() for name in ("alone", "together")]

    for kind in ("random", "hard"):
        one, other = both(f"data/candidates_test_{kind}.json")
        assert one == other
    for run in runs:
        file = "recommendations.json" if run == "list" else "metrics.json"
        reports = [numbers(json.loads(text)) for text in both(f"{run}/{file}")]
        (one, scores), (other, found) = reports
        assert one == other
        np.testing.assert_allclose(found, scores, rtol=0, atol=1e-9)
    assert json.loads(both("metrics/run.json")[1])["ranks"] == 3
    # the tolerance is not too wide
    sets = [json.loads(both(f"{run}/metrics.json")[0])["sets"] for run in ("metrics", "shuffled")]
    own, others = (np.array(found["hard"]["scores"]["base"]) for found in sets)
    assert np.abs(own - others).max() > 1e-3


# ---- BR-MRS ----

FLAGS = [
    "--dim", "8", "--batch", "50", "--learning-rate", "0.0005", "--device", "cpu", "--epochs", "3",
    "--item-graph", "3",
]


def brmrs_of(data, out):
    return ["--data", str(data), "--out", str(out), *FLAGS]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def apart(a, b):
    """Largest difference of the weights of two runs, and of their logs."""
    one, two = (load_file(out / "model.safetensors") for out in (a, b))
    weights = max((one[name] - two[name]).abs().max().item() for name in one)
    logged = 0.0
    for x, y in zip(read_log(a), read_log(b), strict=True):
        logged = max(logged, *(abs(x[name] - y[name]) for name in x))
    return weights, logged


def own_negatives():
    draw = NegativeSampler.draw

    def rolled(self, users, n, generator=None):
        return draw(self, users, n, generator).roll(rank(), 0)

    NegativeSampler.draw = rolled


def test_brmrs_over_processes(tmp_path):
    """180 pairs in batches of 50, 50, 50 and 30, which 4 does not divide. Losses, weights, metrics
    and each user's test values of 2 and 4 ranks are those of one process, in float64. Control:
    ranks that draw negatives of their own end elsewhere.
    """
    data = write_folder(tmp_path / "data")

    def train(n, name, *changes):
        argv = brmrs_of(data, tmp_path / name)
        assert together(n, run_in_float64, "train_brmrs", argv, *changes) == [0] * n
        return apart(tmp_path / "1", tmp_path / name)

    assert train(1, "1") == (0, 0)
    for n in (2, 4):
        weights, log = train(n, str(n))
        assert weights < 1e-10 and log < 1.5e-6, (weights, log)  # the log has 6 decimals
        results = [json.loads((tmp_path / x / "metrics.json").read_text()) for x in ("1", str(n))]
        for key in ("users", "rows", "best_epoch"):
            assert results[0][key] == results[1][key]

    weights, log = train(2, "control", own_negatives)
    assert weights > 1e-4 and log > 1e-3, (weights, log)


def interrupted_in_its_third_epoch(argv):
    save = epochs.save_checkpoint

    def then_stop(out, epoch, *arguments, **facts):
        save(out, epoch, *arguments, **facts)
        if epoch == 2:
            raise KeyboardInterrupt

    epochs.save_checkpoint = then_stop
    with pytest.raises(KeyboardInterrupt):
        train_brmrs.main(argv)


def test_brmrs_goes_on_over_processes(tmp_path):
    """Stopped in its third epoch, the run of two ranks ends as if it had not been; on another
    number of ranks it is refused.
    """
    data = write_folder(tmp_path / "data")
    stopped, whole = tmp_path / "out", tmp_path / "whole"
    assert together(2, interrupted_in_its_third_epoch, brmrs_of(data, stopped)) == [0, 0]
    assert list(stopped.glob("checkpoint-*"))
    with pytest.raises(InputError, match="2 processes"):
        train_brmrs.main(brmrs_of(data, stopped))
    assert together(2, run_script, "train_brmrs", brmrs_of(data, stopped)) == [0, 0]
    assert together(2, run_script, "train_brmrs", brmrs_of(data, whole)) == [0, 0]
    assert apart(stopped, whole) == (0, 0)


def rank_in_blocks(folder):
    """Write what this rank finds."""
    full_ranking.NUMBERS_PER_BLOCK = 40
    generator = torch.Generator().manual_seed(0)
    user, item = torch.randn(9, 4, generator=generator), torch.randn(12, 4, generator=generator)
    pairs = torch.stack([torch.arange(9), torch.arange(9)])
    seen = Seen(*pairs, 9)
    two_each = torch.cat([torch.full((9,), 9), torch.full((9,), 10)])
    targets = torch.stack([torch.arange(9).repeat(2), two_each])
    retriever = Retriever(tuple("abcdefghi"), tuple("abcdefghijkl"), user, item, seen)
    ranks = target_ranks(user, item, targets, seen)
    torch.save([ranks, retriever.top_n(torch.arange(9), 5)], f"{folder}/{rank()}")


def test_ranking_blocks_are_divided(tmp_path):
    """Ranks of targets and retrieved items are equal to the bit: the blocks are those of one
    process.
    """
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        assert together(n, rank_in_blocks, tmp_path / str(n)) == [0] * n
    expected = torch.load(tmp_path / "1" / "0")
    for r in ("0", "1"):
        for found, one in zip(torch.load(tmp_path / "2" / r), expected, strict=True):
            assert torch.equal(found, one)


# ---- the simulation of the data path ----


def test_each_example_comes_once(tmp_path, monkeypatch):
    """Three readers of five shards: every (user, position) once, in another order each epoch;
    histories precede their targets, negatives are distinct and unseen. Control: readers that
    believe in another number of readers lose some and repeat others, and the check says so.
    """
    monkeypatch.setattr(data_path, "USERS_PER_SHARD", 30)
    monkeypatch.setattr(data_path, "CHUNK", 100)
    made = data_path.generate(tmp_path, 1700, 200, 0)
    assert made == sum(path.stat().st_size for path in tmp_path.glob("*.items")) // 4
    users = {}
    for shard, path in enumerate(sorted(tmp_path.glob("*.lengths"))):
        lengths = np.fromfile(path, np.uint8)
        found = np.fromfile(path.with_suffix(".items"), np.int32)
        users |= {
            shard * 30 + i: part.tolist()
            for i, part in enumerate(np.split(found, lengths.cumsum()[:-1]))
        }

    def read(readers, epoch=0):
        return [
            np.concatenate(list(data_path.stream(tmp_path, r, readers, 200, 0, 64, 0, epoch)))
            for r in range(3)
        ]

    def tallies(parts):
        return [data_path.Tally(len(part), data_path.mixed(part["id"])) for part in parts]

    parts, wanted = read(3), data_path.expected(tmp_path, 0)
    data_path.compare(tallies(parts), wanted)
    ids = np.concatenate(parts)["id"].tolist()
    assert sorted(ids) == [u * 256 + p for u, row in users.items() for p in range(1, len(row))]
    assert np.concatenate(read(3))["id"].tolist() == ids
    assert np.concatenate(read(3, epoch=1))["id"].tolist() != ids
    for example in np.concatenate(parts):
        row, position = users[example["id"] // 256], int(example["id"] % 256)
        assert example["target"] == row[position]
        history = [i for i in example["history"].tolist() if i >= 0]
        assert history == row[max(0, position - 5) : position]
        assert len(set(example["negatives"].tolist())) == 9
        assert not set(example["negatives"].tolist()) & set(row)
    with pytest.raises(SystemExit, match="not each came once"):
        data_path.compare(tallies(read(2)), wanted)
