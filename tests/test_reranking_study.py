"""The study of fused rankings: its curve by hand, and the whole command on a small Posterland."""

import json
import math

import numpy as np
import pytest
import toy

from hanorec.base.errors import InputError
from hanorec.studies import reranking
from hanorec.studies.reranking_table import (
    CEILING,
    GRID,
    RETRIEVER,
    TRUTH,
    choose,
    order,
    orders,
    summarise,
    table,
)

SMALL = f"{' '.join(toy.STEPS)} --max-pixels 1024 --history 2 --device cpu --candidate-images off"
RETRIEVAL = "--epochs 2 --dim 8 --batch 64 --max-pixels 1024 --device cpu"


def second(place):
    """NDCG of a target at this place."""
    return 1 / math.log2(1 + place)


def report(places, retriever, policy):
    """Of evaluate.py: every user's target is b, of the list a, b, c."""
    users = [{"user": "u", "target": "b", "retrieved": ["a", "b", "c"]} for _ in places]
    return {
        "users": users,
        "orders": {"retriever": {"ranks": places}},
        "scores": {"retriever": retriever, "p": policy},
    }


def test_the_curve_by_hand():
    """First user: the retriever has b second, by 1; the policy first, by 3. Second user: it is
    missed, whatever anybody says of it. Third: both are undecided between b and c, a tie counts.
    """
    found = orders(
        report([2, None, 3], [[2, 1, 0], [2, 1, 0], [2, 1, 1]], [[0, 3, 0], [0, 9, 0], [2, 1, 1]]),
        {"P": "p"},
    )
    rows = {name: of["NDCG@3"].tolist() for name, of in found.items()}
    assert rows[RETRIEVER] == pytest.approx([second(2), 0, second(3)])
    assert rows[CEILING] == [1, 0, 1]
    assert rows[order("P", 0.0)] == pytest.approx([1, 0, second(3)])
    assert rows[order("P", 2.0)][0] == 1 and rows[order("P", 4.0)][0] == pytest.approx(second(2))
    assert len(rows) == 2 + len(GRID)


def seed_of(val, test, cold):
    """What `read_seed` finds where the fusions at w = 0 and the retriever have these values."""
    found = {"cold": {}, "targets": {}, "places": {"cut, training": [1, 4, 20]}}
    for split, (fused, retriever) in (("val", val), ("test", test)):
        rows = {RETRIEVER: retriever} | {order("P", w): fused for w in GRID}
        found[split] = {}
        for name, values in rows.items():
            found[split][name] = {metric: np.array(values) for metric in ("NDCG@3", "NDCG@10")}
        found["cold"][split] = np.array(cold)
        found["targets"][split] = [["u", "b"]] * len(cold)
    return found


def test_what_is_chosen_on_validation_is_held_to_the_retriever_on_test():
    """Seed one chooses w = 0, the first of equal ones; seed two the retriever, so its difference is
    0. Over both, the cold target (of two) gains 0.5 and 0, the warm one nothing.
    """
    one = seed_of(([1, 1], [0, 1]), ([1.0, 0.2], [0.5, 0.2]), [True, False])
    two = seed_of(([0, 0], [0, 1]), ([1.0, 1.0], [0.4, 0.2]), [True, False])
    assert choose(one["val"], "P") == order("P", 0.0) and choose(two["val"], "P") == RETRIEVER
    found = summarise([one, two])
    assert found["chosen"] == {"P": [order("P", 0.0), RETRIEVER]}
    gains = {kind: of["against"]["P"]["NDCG@3"] for kind, of in found["kinds"].items()}
    assert gains["cold"]["seeds"] == pytest.approx([0.5, 0])
    assert gains["warm"]["seeds"] == pytest.approx([0, 0])
    assert gains["all"]["difference"] == pytest.approx(0.125)
    assert found["places"]["cut, training"][0]["first 10"] == pytest.approx(2 / 3)
    text = table(found)
    assert "P: P, w = 0; retriever alone." in text and "P, NDCG@3, cold | +25.00" in text
    warm = summarise([seed_of(([1], [0]), ([1], [0]), [False])])
    assert list(warm["kinds"]) == ["all", "warm"]  # without a cold target there is no such column


def study(data, checkpoints, out, *flags):
    reranking.main([str(word) for word in [
        "--out", out, "--data", data, "--model", checkpoints["qwen2_5_vl"], "--seeds", 1,
        "--candidates", 40, "--retrieval", RETRIEVAL, "--sft", SMALL, "--dpo", SMALL, "--test",
        "--max-pixels 1024 --history 2 --device cpu --candidate-images off", *flags,
    ]])


def test_from_data_to_the_table(data, checkpoints, tmp_path):
    out = tmp_path / "out"
    study(data, checkpoints, out)
    results = json.loads((out / "results.json").read_text())
    found = results["kinds"]["all"]["orders"]
    assert {RETRIEVER, CEILING, TRUTH, "SFT, w = 0", "HaNoRec, chosen w"} <= found.keys()
    test = json.loads((out / "seed-2025" / "test" / "metrics.json").read_text())
    for name, own in ((RETRIEVER, "retriever"), ("SFT, w = 0", str(out / "seed-2025" / "SFT"))):
        wanted = test["orders"][own]["metrics"]["NDCG@10"]["value"]
        assert found[name]["NDCG@10"] == [pytest.approx(wanted)]
    assert found[CEILING]["NDCG@3"] == [pytest.approx(test["retrieved"])]
    assert set(results["places"]) == {"cut, training", "full, validation", "full, training"}
    inputs = json.loads((out / "seed-2025" / "HaNoRec" / "run.json").read_text())
    assert inputs["settings"]["retriever"] == str(out / "seed-2025" / "cut")
    assert "retriever alone" in (out / "table.md").read_text()

    # again: nothing is done again; and not with other settings
    before = {p: p.stat().st_mtime_ns for p in (out / "seed-2025").rglob("*") if p.is_file()}
    study(data, checkpoints, out)
    after = {p: p.stat().st_mtime_ns for p in (out / "seed-2025").rglob("*") if p.is_file()}
    assert before == after and json.loads((out / "results.json").read_text()) == results
    with pytest.raises(InputError, match="learning_rate = 0.001, this command has 0.5"):
        study(data, checkpoints, out, "--sft", f"{SMALL} --learning-rate 0.5")


@pytest.mark.parametrize(("flags", "message"), [
    (["--data", "d"], "--data d with --model None: expected both"),
    (["--seeds", "0"], "--seeds 0: expected at least 1"),
    (["--candidates", "1"], "--candidates 1: expected at least 2"),
])
def test_flags_that_do_not_fit(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        reranking.main(["--out", str(tmp_path / "out"), *flags])
