"""Everything but the training of the MLLM over several processes: what comes out is what one process computes."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from processes import together
from safetensors.torch import load_file
from toy_ranking import write_folder

import evaluate
import train_brmrs
from hanorec.base.distributed import all_gather, dealt, rank, run_on_all_ranks, share
from hanorec.base.errors import InputError
from hanorec.brmrs import model as brmrs_model
from hanorec.mllm import items
from hanorec.mllm.features import stored_pictures
from hanorec.mllm.items import item_embeddings, neighbors
from hanorec.mllm.topk_ring import topk_neighbors_ring
from hanorec.ranking.full_ranking import Seen, target_ranks
from hanorec.ranking.retriever import Retriever
from hanorec.topk import topk_neighbors

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import data_path

# ---- what is divided ----


def test_shares_and_errors():
    """Each of n things once, whatever n; an error of one rank is everybody's."""
    def work():
        for n in (0, 1, 2, 3, 7):
            assert all_gather(torch.arange(n)[share(n)], n).tolist() == list(range(n))
            assert sorted(x for part in run_on_all_ranks(lambda n=n: dealt(list(range(n)))) for x in part) == list(range(n))

        def fails():
            if rank() == 1:
                raise InputError("bad image")

        with pytest.raises(InputError, match="bad image"):
            run_on_all_ranks(fails)
        assert run_on_all_ranks(rank) == [0, 1, 2]

    assert together(3, work) == [0, 0, 0]


# ---- Top-K ----


def ring(e, k, block=None):
    """The whole result of the ring, from a process that holds its slice of e."""
    return [all_gather(x, len(e)) for x in topk_neighbors_ring(e[share(len(e))].clone(), len(e), k, block)]


@pytest.mark.equation("HN-3")
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_ring_finds_the_same_neighbours(n):
    """Small whole numbers: products are exact in every type, ties everywhere, so scores and indices are equal to the bit. Uneven slices,
    fewer rows than ranks, K from 1 to N - 1, blocks smaller than a slice. Random rows: equal but for the rounding of the product."""
    def work():
        generator = torch.Generator().manual_seed(0)
        for rows, width, k, block in [(2, 1, 1, None), (3, 2, 2, 1), (5, 2, 4, 2), (18, 2, 5, 3), (18, 2, 17, 4), (41, 3, 7, None)]:
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                e = torch.randint(-2, 3, (rows, width), generator=generator).to(dtype)
                for found, expected in zip(ring(e, k, block), topk_neighbors(e, k), strict=True):
                    assert found.dtype == expected.dtype and torch.equal(found, expected)
        e = torch.nn.functional.normalize(torch.randn(203, 33, generator=generator), dim=1)
        scores, index = ring(e, 10)
        expected, place = topk_neighbors(e, 10)
        assert (scores - expected).abs().max() < 1e-6 and (index != place).float().mean() < 0.01

    assert together(n, work) == [0] * n


def test_the_ring_refuses_what_one_process_refuses():
    """The row by its number among all, on all ranks, though one alone holds it; the check above can fail: a rank that holds another's slice."""
    def work():
        e = torch.eye(5)
        for k, block, words in [(0, None, r"1 \.\. 4"), (5, None, r"1 \.\. 4"), (2, 0, "block = 0")]:
            with pytest.raises(InputError, match=words):
                ring(e, k, block)
        e[4, 1] = float("nan")
        with pytest.raises(InputError, match="row 4 "):
            ring(e, 2)
        e = torch.randint(-2, 3, (10, 2), generator=torch.Generator().manual_seed(1)).float()
        wrong = e[5:] if rank() == 0 else e[:5]
        assert not torch.equal(all_gather(topk_neighbors_ring(wrong, 10, 3)[1], 10), topk_neighbors(e, 3)[1])

    assert together(2, work) == [0, 0]


# ---- the items ----


def test_the_catalogue_is_encoded_together(qwen, catalog, tmp_path, monkeypatch):
    """18 images in batches of 4, so that the last round is ragged: both files equal one process's to the bit; so do H, X and the
    neighbours. A rank that fails takes the file with it, and all ranks say why."""
    few = replace(catalog, ids=catalog.ids[:19], titles=catalog.titles[:19], images=catalog.images[:19])
    monkeypatch.setattr(items, "BATCH", 4)
    pictures = stored_pictures(qwen, few, tmp_path / "alone")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    embeddings = {form: item_embeddings(qwen, few, pictures, form) for form in ("input", "hidden")}
    near = neighbors(qwen, few, pictures, 5)

    def work():
        encode = items.encode

        def failing(*arguments):
            yield from list(encode(*arguments))[:4]
            raise InputError("bad image of rank 1")

        items.encode = failing if rank() == 1 else encode
        with pytest.raises(InputError, match="bad image of rank 1"):
            stored_pictures(qwen, few, tmp_path / "together")
        assert not list((tmp_path / "together").iterdir())
        items.encode = encode
        run_on_all_ranks(rank)
        found = stored_pictures(qwen, few, tmp_path / "together")
        assert {path.name: path.read_bytes() for path in (tmp_path / "together").iterdir()} == expected
        assert all(torch.equal(found[row].features, pictures[row].features) for row in pictures)
        for form, whole in embeddings.items():
            assert all(torch.equal(a, b) for a, b in zip(item_embeddings(qwen, few, found, form), whole, strict=True))
        e, scores, index = neighbors(qwen, few, found, 5)
        assert torch.equal(e, near[0]) and torch.allclose(scores, near[1], atol=1e-6) and torch.equal(index, near[2])

    assert together(3, work) == [0, 0, 0]


# ---- evaluation ----


def run_evaluate(out, *flags):
    evaluate.main(["--out", str(out), *toy.SHORT, *map(str, flags)])


def numbers(value):
    """The report as text without its scores, and the scores."""
    scores = []

    def walk(x):
        if isinstance(x, dict):
            return {k: walk(v) for k, v in x.items() if k not in ("out", "data", "seconds_per_user")}
        if isinstance(x, list):
            return [walk(v) for v in x]
        if isinstance(x, float):
            scores.append(x)
            return None
        return x

    return walk(value), np.array(scores)


def test_users_are_divided(data, checkpoints, sft, tmp_path):
    """7 users over 3 ranks, and 1; two policies, both sets, drawn by the ranks; similarity; others' images; reranking. Every entry of the
    report but the scores is equal; those are apart by what batches of other lengths round differently."""
    base = ["--model", checkpoints["qwen2_5_vl"], "--adapter", sft, "--adapter", "base", "--users-to", 0.3, "--batch", 2]
    for name in ("alone", "together"):
        shutil.copytree(data, tmp_path / name / "data", ignore=shutil.ignore_patterns("candidates*"))
    train_brmrs.main(["--data", str(data), "--model", str(checkpoints["qwen2_5_vl"]), "--max-pixels", "1024", "--device", "cpu", "--epochs", "1",
                      "--out", str(tmp_path / "brmrs")])
    retriever = ["--retriever", tmp_path / "brmrs", "--top-n", 5]
    runs = {"metrics": ["--similarity", "true"], "shuffled": ["--images", "shuffled", "--sets", "hard"], "rerank": retriever,
            "list": ["--user", "u3", "--adapter", sft]}

    def all_runs(name):
        for run, flags in runs.items():
            run_evaluate(tmp_path / name / run, *base[:2] if run == "list" else base, "--data", tmp_path / name / "data", *flags)

    user = next(iter((data / "test.tsv").read_text().splitlines())).split("\t")[0]
    runs["list"][1] = user
    all_runs("alone")
    assert together(3, lambda: all_runs("together")) == [0, 0, 0]
    for kind in ("random", "hard"):
        assert len({(tmp_path / name / "data" / f"candidates_test_{kind}.json").read_bytes() for name in ("alone", "together")}) == 1
    for run in runs:
        file = "recommendations.json" if run == "list" else "metrics.json"
        (one, scores), (other, found) = (numbers(json.loads((tmp_path / name / run / file).read_text())) for name in ("alone", "together"))
        assert one == other
        np.testing.assert_allclose(found, scores, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "together" / "metrics" / "run.json").read_text())["ranks"] == 3
    shuffled = numbers(json.loads((tmp_path / "alone" / "shuffled" / "metrics.json").read_text()))[1]
    own = json.loads((tmp_path / "alone" / "metrics" / "metrics.json").read_text())["sets"]["hard"]
    assert np.abs(np.array(own["scores"]["base"]).ravel() - shuffled[-own_size(own):]).max() > 1e-3  # the tolerance is not too wide


def own_size(found):
    return np.array(found["scores"]["base"]).size


# ---- BR-MRS ----

RATE = 0.0005
FLAGS = ["--dim", "8", "--batch", "50", "--learning-rate", str(RATE), "--device", "cpu", "--epochs", "3", "--item-graph", "3"]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def apart(a, b):
    """Largest difference of the weights of two runs, and of their logs."""
    one, two = (load_file(out / "model.safetensors") for out in (a, b))
    weights = max((one[name] - two[name]).abs().max().item() for name in one)
    return weights, max(abs(x[name] - y[name]) for x, y in zip(read_log(a), read_log(b), strict=True) for name in x)


def test_brmrs_over_processes(tmp_path):
    """180 pairs in batches of 50, 50, 50 and 30, which 4 does not divide. Losses, metrics and each user's test values of 2 and 4 ranks are those of
    one process. Where a gradient is next to nothing Adam makes a whole step of its rounding, so single weights may be one step apart, and at a
    larger rate that would move the losses, too. Control: ranks that draw negatives of their own end elsewhere."""
    data = write_folder(tmp_path / "data")

    def train(out):
        train_brmrs.main(["--data", str(data), "--out", str(out), *FLAGS])

    train(tmp_path / "1")
    for n in (2, 4):
        assert together(n, lambda n=n: train(tmp_path / str(n))) == [0] * n
        weights, log = apart(tmp_path / "1", tmp_path / str(n))
        assert weights < RATE and log < 1e-4, (weights, log)
        one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("1", str(n)))
        assert one["users"] == other["users"] and one["rows"] == other["rows"] and one["best_epoch"] == other["best_epoch"]

    def control():
        own = brmrs_model.NegativeSampler.draw
        brmrs_model.NegativeSampler.draw = lambda self, users, n, generator=None: own(self, users, n, generator).roll(rank(), 0)
        train(tmp_path / "control")

    assert together(2, control) == [0, 0]
    weights, log = apart(tmp_path / "1", tmp_path / "control")
    assert weights > 2 * RATE and log > 1e-3, (weights, log)


def test_brmrs_goes_on_over_processes(tmp_path):
    """Stopped in its third epoch, the run of two ranks ends as if it had not been; on another number of ranks it is refused."""
    data = write_folder(tmp_path / "data")

    def train(out, epochs="3"):
        train_brmrs.main(["--data", str(data), "--out", str(out), *FLAGS])

    def stopping():
        save = train_brmrs.save_checkpoint

        def then_stop(out, epoch, *arguments, **facts):
            save(out, epoch, *arguments, **facts)
            if epoch == 2:
                raise KeyboardInterrupt

        train_brmrs.save_checkpoint = then_stop
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "out")

    assert together(2, stopping) == [0, 0]
    assert list((tmp_path / "out").glob("checkpoint-*"))
    with pytest.raises(InputError, match="2 processes"):
        train(tmp_path / "out")
    assert together(2, lambda: train(tmp_path / "out")) == [0, 0]
    assert together(2, lambda: train(tmp_path / "whole")) == [0, 0]
    assert apart(tmp_path / "out", tmp_path / "whole") == (0, 0)


def test_ranking_blocks_are_divided(monkeypatch):
    """Ranks of targets and retrieved items are equal to the bit: the blocks are those of one process."""
    from hanorec.ranking import full_ranking as ranking

    monkeypatch.setattr(ranking, "NUMBERS_PER_BLOCK", 40)
    generator = torch.Generator().manual_seed(0)
    user, item = torch.randn(9, 4, generator=generator), torch.randn(12, 4, generator=generator)
    pairs = torch.stack([torch.arange(9), torch.arange(9)])
    seen, targets = Seen(*pairs, 9), torch.stack([torch.arange(9).repeat(2), torch.cat([torch.full((9,), 9), torch.full((9,), 10)])])
    retriever = Retriever(tuple("abcdefghi"), tuple("abcdefghijkl"), user, item, seen)
    expected = target_ranks(user, item, targets, seen), retriever.top_n(torch.arange(9), 5)

    def work():
        assert torch.equal(target_ranks(user, item, targets, seen), expected[0])
        assert torch.equal(retriever.top_n(torch.arange(9), 5), expected[1])

    assert together(2, work) == [0, 0]


# ---- the simulation of the data path ----


def test_each_example_comes_once(tmp_path, monkeypatch):
    """Three readers of five shards: every (user, position) once, in another order each epoch; histories precede their targets, negatives are
    distinct and unseen. Control: readers that believe in another number of readers lose some and repeat others, and the check says so."""
    monkeypatch.setattr(data_path, "USERS_PER_SHARD", 30)
    monkeypatch.setattr(data_path, "CHUNK", 100)
    assert data_path.generate(tmp_path, 1700, 200, 0) == sum(path.stat().st_size for path in tmp_path.glob("*.items")) // 4
    users = {}
    for shard, path in enumerate(sorted(tmp_path.glob("*.lengths"))):
        lengths, found = np.fromfile(path, np.uint8), np.fromfile(path.with_suffix(".items"), np.int32)
        users |= {shard * 30 + i: part.tolist() for i, part in enumerate(np.split(found, lengths.cumsum()[:-1]))}

    def read(readers, epoch=0):
        return [np.concatenate(list(data_path.stream(tmp_path, r, readers, 200, 0, 64, 0, epoch))) for r in range(3)]

    def tallies(parts):
        return [data_path.Tally(len(part), data_path.mixed(part["id"])) for part in parts]

    parts, wanted = read(3), data_path.expected(tmp_path, 0)
    data_path.compare(tallies(parts), wanted)
    ids = np.concatenate(parts)["id"].tolist()
    assert sorted(ids) == [u * 256 + p for u, row in users.items() for p in range(1, len(row))]
    assert np.concatenate(read(3))["id"].tolist() == ids != np.concatenate(read(3, epoch=1))["id"].tolist()
    for example in np.concatenate(parts):
        row, position = users[example["id"] // 256], int(example["id"] % 256)
        assert example["target"] == row[position]
        assert [i for i in example["history"].tolist() if i >= 0] == row[max(0, position - 5) : position]
        assert len(set(example["negatives"].tolist())) == 9 and not set(example["negatives"].tolist()) & set(row)
    with pytest.raises(SystemExit, match="not each came once"):
        data_path.compare(tallies(read(2)), wanted)
