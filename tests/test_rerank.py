"""Retrieve and rerank: by hand, and from train_brmrs.py to evaluate.py --retriever on a small
Posterland.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy

import evaluate
import train_brmrs
from hanorec.base.config import EvalConfig
from hanorec.base.errors import InputError
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example, HeldOut, load_interactions
from hanorec.ranking.reranking import places_by_score, rerank, rerank_report, target_places
from hanorec.ranking.retriever import Retriever, load_retriever
from hanorec.ranking.retrieving import retrieve
from hanorec.ranking.sampler import Seen

SMALL = ["--epochs", 3, "--dim", 8, "--batch", 64]


@pytest.fixture(scope="module")
def retriever(data, checkpoints, tmp_path_factory):
    """Folder of a BR-MRS trained on the data set for three epochs."""
    out = tmp_path_factory.mktemp("brmrs") / "out"
    train_brmrs.main([
        *map(
            str,
            ["--data", data, "--model", checkpoints["qwen2_5_vl"], "--max-pixels", 1024,
             "--device", "cpu", "--out", out, *SMALL],
        )
    ])
    return out


def shop(tmp_path):
    """Five items, one user "a" with items 0 (training) and 1 (validation); the user likes item i as
    much as 10 - i.
    """
    catalog = Catalog(
        tmp_path, "shop", tuple("pqrst"), ("P", "Q", "R", "S", "T"), (None,) * 5, "none"
    )
    one = torch.ones(1, 1)
    return catalog, Retriever(
        ("a",), tuple("pqrst"), one, torch.tensor([[10.0], [9], [8], [7], [6]]),
        Seen(torch.tensor([0]), torch.tensor([0]), 1),
    )


def test_retrieve_by_hand(tmp_path):
    """Item 0 is masked as a training item, item 1 as one had since; what is left, best first: 2, 3,
    4.
    """
    catalog, found = shop(tmp_path)
    examples, places = retrieve(
        found, catalog, [Example("a", (0, 1), 3, frozenset({0, 1, 3}))], [(0, 1)], 2, seed=0
    )
    assert sorted(examples[0].candidates) == [2, 3]
    assert dict(zip(examples[0].candidates, places[0].tolist(), strict=True)) == {2: 1, 3: 2}
    assert target_places(places, examples).tolist() == [2]
    # not retrieved
    assert target_places(places, [replace(examples[0], target=4)]).tolist() == [math.inf]
    shuffled, example = set(), Example("a", (0,), 3, frozenset())
    for seed in range(9):
        examples, _ = retrieve(found, catalog, [example], [(0,)], 4, seed)
        shuffled.add(examples[0].candidates)
    assert len(shuffled) > 3  # the prompt does not tell the retriever's order


@pytest.mark.parametrize("target", [0, 1])
def test_a_target_that_the_user_had_before_is_missed(tmp_path, target):
    """Items 0 (training) and 1 (validation) are this user's best; they are not retrieved to please
    the one whose target is one of them once more.
    """
    catalog, found = shop(tmp_path)
    example = Example("a", (0, 1), target, frozenset({0, 1}))
    examples, places = retrieve(found, catalog, [example], [(0, 1)], 3, seed=0)
    assert sorted(examples[0].candidates) == [2, 3, 4]
    assert target_places(places, examples).tolist() == [math.inf]


def test_each_user_has_an_order_of_their_own(tmp_path):
    """The same four items for thirty examples: not in one order, which would give the retriever's
    best the same place in every prompt.
    """
    catalog, found = shop(tmp_path)
    many = [Example("a", (0,), 3, frozenset())] * 30
    examples, _ = retrieve(found, catalog, many, [(0,)] * 30, 4, seed=0)
    first = {example.candidates.index(1) for example in examples}
    assert len({example.candidates for example in examples}) > 10 and first == {0, 1, 2, 3}


def test_what_does_not_fit_is_refused(tmp_path):
    catalog, found = shop(tmp_path)
    example = Example("a", (0, 1), 3, frozenset())
    with pytest.raises(InputError, match="it ranks 5 items, .* has 5 or others"):
        retrieve(found, replace(catalog, ids=tuple("pqrsz")), [example], [(0,)], 2, 0)
    with pytest.raises(InputError, match="does not know user 'b'"):
        retrieve(found, catalog, [replace(example, user="b")], [(0,)], 2, 0)
    with pytest.raises(InputError, match="to retrieve"):
        retrieve(found, catalog, [example], [(0, 1)], 4, 0)


def test_a_tie_with_what_is_not_retrieved_is_no_hit(tmp_path):
    """A retriever that scores all five items alike retrieves by id: of the three new ones 2 and 3.
    The list stands; but no place is better than 3, so a target among them is missed before and
    after, even by a policy that puts it first. Where item 4 scores less, the same list is a hit.
    """
    catalog, found = shop(tmp_path)
    example = Example("a", (0, 1), 3, frozenset({0, 1, 3}))
    for scores, places, hit in (([1, 1, 1, 1, 1], [3, 3], 0), ([1, 1, 1, 1, 0], [2, 2], 1)):
        alike = replace(found, item=torch.tensor(scores)[:, None].float())
        examples, before = retrieve(alike, catalog, [example], [(0, 1)], 2, seed=0)
        assert sorted(examples[0].candidates) == [2, 3] and before.tolist() == [places]
        at = examples[0].candidates.index(3)
        report = rerank_report(examples, before, {"policy": np.eye(2)[[at]]}, seed=0)
        assert report["retrieved"] == hit
        ranks = {name: order["ranks"] for name, order in report["orders"].items()}
        assert ranks == {"retriever": [2] if hit else [None], "policy": [1] if hit else [None]}


def test_what_a_user_had_since_takes_no_place(tmp_path):
    """Another user's validation items must not make room scarce: b had nothing since, and 4 new
    items; a had item 1 since. Four items for b are too many for a, three are enough for both.
    """
    catalog, found = shop(tmp_path)
    both = replace(found, users=("a", "b"), user=torch.ones(2, 1),
                   seen=Seen(torch.tensor([0, 1]), torch.tensor([0, 0]), 2))
    examples = [Example("a", (0, 1), 3, frozenset()), Example("b", (0,), 4, frozenset())]
    found, places = retrieve(both, catalog, examples, [(0, 1), (0,)], 3, 0)
    assert [sorted(e.candidates) for e in found] == [[2, 3, 4], [1, 2, 3]]
    assert sorted(places[0].tolist()) == sorted(places[1].tolist()) == [1, 2, 3]
    with pytest.raises(InputError, match="one of these users has 3 items that are new"):
        retrieve(both, catalog, examples, [(0, 1), (0,)], 4, 0)


def test_equal_titles_are_told(tmp_path, capsys):
    """Only where a user's list holds a title twice."""
    catalog, found = shop(tmp_path)
    example = Example("a", (0, 1), 3, frozenset({0, 1, 3}))
    examples, before = retrieve(found, catalog, [example], [(0, 1)], 2, seed=0)
    scores, seconds = {"policy": {"sum": np.zeros((1, 2))}}, {"retrieval": 1.0, "policy": 1.0}
    for titles, said in (("PQRST", False), ("PQRRT", True)):
        held = HeldOut(replace(catalog, titles=tuple(titles)), None, examples, {"a"})
        rerank(held, examples, before, before, scores, seconds, EvalConfig("", seed=0))
        note = "1 of 1 users have retrieved items of one title"
        assert (note in capsys.readouterr().out) == said


def test_places_count_ties_against_all():
    assert places_by_score(np.array([[3.0, 1, 2], [1, 1, 0]])).tolist() == [[1, 3, 2], [2, 2, 3]]


def test_report_by_hand():
    """Two users, three items each. Retriever: targets at 3 and missing. Policy: 1 and missing.
    Recall@3 is 0.5 for both; NDCG@3 is (1 / log2 4 + 0) / 2 = 0.25 before and 0.5 after.
    """
    examples = [
        Example("a", (9,), 7, frozenset(), (7, 8, 6)),
        Example("b", (9,), 5, frozenset(), (7, 8, 6)),
    ]
    report = rerank_report(
        examples, np.array([[3, 1, 2], [1, 2, 3]]), {"policy": np.array([[2.0, 1, 0], [0, 1, 2]])},
        seed=0,
    )
    value = {
        name: {metric: m["value"] for metric, m in order["metrics"].items()}
        for name, order in report["orders"].items()
    }
    assert report["retrieved"] == 0.5 and report["top_n"] == 3
    assert value["retriever"] == {"Recall@1": 0, "NDCG@1": 0, "Recall@3": 0.5, "NDCG@3": 0.25}
    assert value["policy"] == {"Recall@1": 0.5, "NDCG@1": 0.5, "Recall@3": 0.5, "NDCG@3": 0.5}
    assert report["orders"]["policy"]["ranks"] == [1, None]
    assert [t["difference"] for t in report["paired"] if t["metric"] == "NDCG@3"] == [0.25]


def run(data, checkpoints, out, *flags):
    evaluate.main([
        *map(
            str,
            ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, "--out", out,
             *flags],
        )
    ])


def test_from_catalogue_to_list(data, checkpoints, sft, retriever, tmp_path, catalog):
    """Every user's eight items are the retriever's best unseen ones, recomputed here; recall at N
    is the same before and after.
    """
    run(
        data, checkpoints, tmp_path / "out", "--adapter", sft, "--adapter", "base",
        "--retriever", retriever, "--top-n", 8,
    )
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    stored = load_retriever(retriever)
    interactions = load_interactions(data, catalog)
    s = (stored.user @ stored.item.T).numpy()
    assert len(report["users"]) == 24
    for row in report["users"]:
        had = set(interactions.before(row["user"], "test"))
        order = np.argsort(-s[stored.users.index(row["user"])], kind="stable")
        new = [i for i in order if i not in had]
        assert row["retrieved"] == [catalog.ids[i] for i in new[:8]]
    hits = np.mean([row["target"] in row["retrieved"] for row in report["users"]])
    assert report["retrieved"] == pytest.approx(hits)
    assert set(report["orders"]) == {"retriever", str(sft), "base"}
    for order in report["orders"].values():
        assert order["metrics"]["Recall@5"]["value"] <= report["retrieved"]
        assert sum(rank is None for rank in order["ranks"]) == round(24 * (1 - hits))
    assert set(report["seconds_per_user"]) == {"retrieval", str(sft), "base"}
    assert min(report["seconds_per_user"].values()) > 0
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    shown = {"images", "image_processor", "turn", "base"}
    retrieved = {"retriever", "retriever_names"}
    assert set(facts["inputs"]) == {"data", str(sft), *retrieved, *shown}


def test_a_list_for_one_user(data, checkpoints, retriever, tmp_path):
    user = load_retriever(retriever).users[3]
    run(
        data, checkpoints, tmp_path / "out", "--retriever", retriever, "--top-n", 6, "--user", user,
        "--top-k", 6,
    )
    (found,) = json.loads((tmp_path / "out" / "recommendations.json").read_text())
    assert len(found["items"]) == 6 and len({item["id"] for item in found["items"]}) == 6
    scores = [item["score"] for item in found["items"]]
    assert scores == sorted(scores, reverse=True)


def test_a_folder_that_is_no_retriever(data, checkpoints, sft, tmp_path):
    with pytest.raises(InputError, match="names.json: no such file"):
        run(data, checkpoints, tmp_path / "out", "--retriever", sft)


def test_shuffled_images_change_the_order_and_not_what_is_retrieved(
    data, checkpoints, retriever, tmp_path
):
    reports = {}
    for images in ("own", "shuffled"):
        run(
            data, checkpoints, tmp_path / images, "--retriever", retriever, "--top-n", 30,
            "--images", images,
        )
        reports[images] = json.loads((tmp_path / images / "metrics.json").read_text())
    assert reports["own"]["users"] == reports["shuffled"]["users"]
    own, shuffled = (reports[images]["orders"]["base"] for images in ("own", "shuffled"))
    assert own["ranks"] != shuffled["ranks"]


def test_no_similarity_report_of_a_reranking(data, checkpoints, retriever, tmp_path):
    with pytest.raises(InputError, match="--similarity with --retriever"):
        run(data, checkpoints, tmp_path / "out", "--retriever", retriever, "--similarity", "true")
