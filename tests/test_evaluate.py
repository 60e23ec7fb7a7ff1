"""evaluate.py from end to end: metrics, frozen candidate sets, lists for a user; and that scores
are the model's own.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import toy

import evaluate
import train_dpo
from hanorec import export
from hanorec.base.config import DataConfig
from hanorec.base.errors import InputError
from hanorec.base.files import sha256
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.images import read_image
from hanorec.datasets.interactions import heldout_examples, load_interactions
from hanorec.lora.files import save_adapter
from hanorec.lora.layer import add_lora
from hanorec.lora.loading import attach_policy
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.items import encode_pictures
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import scoring_rows

FILES = ("candidates_test_random.json", "candidates_test_hard.json")


@pytest.fixture(scope="session")
def shop(data, tmp_path_factory):
    """A copy of the data folder, which evaluate.py writes its candidate files into."""
    folder = tmp_path_factory.mktemp("shop") / "data"
    shutil.copytree(data, folder)
    return folder


@pytest.fixture(scope="session")
def judge(shop, checkpoints, tmp_path_factory):
    """judge(*flags, model=..., data=...) -> (output folder, metrics.json or None)."""
    def start(*flags, model=None, data=None):
        out = tmp_path_factory.mktemp("judged") / "out"
        evaluate.main([
            "--model", str(model or checkpoints["qwen2_5_vl"]), "--data", str(data or shop),
            "--out", str(out), *toy.SHORT, *map(str, flags),
        ])
        path = out / "metrics.json"
        return out, json.loads(path.read_text()) if path.exists() else None

    return start


@pytest.fixture(scope="session")
def report(judge, sft, full):
    """Two adapters and the bare model, ranking task, both candidate sets."""
    return judge("--adapter", sft, "--adapter", full[0], "--adapter", "base")[1]


def by_hand(scores, positive):
    """HR@3, NDCG@3 and AUC by plain loops; a tie counts against the positive in ranks, half in AUC.
    """
    hits, gains, areas = [], [], []
    for row, p in zip(scores, positive, strict=True):
        others = [s for c, s in enumerate(row) if c != p]
        rank = 1 + sum(s >= row[p] for s in others)
        hits.append(rank <= 3)
        gains.append(1 / np.log2(1 + rank) if rank <= 3 else 0)
        areas.append(np.mean([(row[p] > s) + 0.5 * (row[p] == s) for s in others]))
    return {"HR@3": np.mean(hits), "NDCG@3": np.mean(gains), "AUC": np.mean(areas)}


@pytest.mark.equation("EV-1", "EV-2", "EV-3")
def test_report(report, sft, full):
    """Every metric again from the scores in the report; 24 users, 1 + 3 candidates, three policies,
    both sets.
    """
    assert set(report["sets"]) == {"random", "hard"}
    for found in report["sets"].values():
        assert len(found["users"]) == 24
        assert all(len(user["candidates"]) == 4 for user in found["users"])
        positive = [user["candidates"].index(user["target"]) for user in found["users"]]
        assert set(found["policies"]) == set(found["scores"]) == {str(sft), str(full[0]), "base"}
        for name, scores in found["scores"].items():
            assert np.isfinite(scores).all() and (np.array(scores) < 0).all()
            result = found["policies"][name]
            for metric, value in by_hand(scores, positive).items():
                assert result["metrics"][metric]["value"] == pytest.approx(value)
                low, high = result["metrics"][metric]["interval"]
                assert low <= value <= high
                assert np.mean(result["rows"][metric]) == pytest.approx(value)
        assert all(
            found["scores"][a] != found["scores"][b]
            for a, b in itertools.combinations(found["scores"], 2)
        )
        # chance with 4 candidates: HR@3 = 3/4, NDCG@3 = (1 + 1/log2 3 + 1/2) / 4
        assert found["chance"]["metrics"]["HR@3"]["value"] == 0.75
        assert found["chance"]["metrics"]["NDCG@3"]["value"] == pytest.approx(
            (1.5 + 1 / np.log2(3)) / 4
        )
        assert {(test["better"], test["than"]) for test in found["paired"]} == {
            (str(sft), str(full[0])),
            (str(sft), "base"),
        }
        for test in found["paired"]:
            rows = [
                found["policies"][test[side]]["rows"][test["metric"]] for side in ("better", "than")
            ]
            assert test["difference"] == pytest.approx(np.mean(rows[0]) - np.mean(rows[1]))


@pytest.mark.equation("EV-1")
def test_scores_are_the_models_own(report, shop, checkpoints, full):
    """For a few users: the packed, batched, sorted score is the plain forward's, answer by answer;
    sum, and mean per token.
    """
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu", max_pixels=1024)
    attach_policy(backbone.model, full[0])
    backbone.model.eval()
    catalog = load_catalog(shop)
    found = report["sets"]["random"]
    examples = heldout_examples(load_interactions(shop, catalog), "test", 2)
    pictures = encode_pictures(backbone, catalog, range(len(catalog.ids)))
    for u in (0, 11, 23):
        example, user = examples[u], found["users"][u]
        candidates = [catalog.row[c] for c in user["candidates"]]
        row = toy.ranking_row(backbone, catalog, pictures, example.history, candidates, candidates)
        with torch.no_grad():
            alone = toy.log_probs_alone(backbone, row, pictures)[0].tolist()
        assert found["scores"][str(full[0])][u] == pytest.approx(alone, abs=5e-5)


def test_popularity_by_hand(report, shop):
    count = {}
    for line in (shop / "train.tsv").read_text().splitlines():
        for item in line.split("\t")[1].split():
            count[item] = count.get(item, 0) + 1
    found = report["sets"]["random"]
    scores = [[count.get(c, 0) for c in user["candidates"]] for user in found["users"]]
    positive = [user["candidates"].index(user["target"]) for user in found["users"]]
    for metric, value in by_hand(scores, positive).items():
        assert found["popularity"]["metrics"][metric]["value"] == pytest.approx(value)


def test_candidate_files_are_frozen(report, judge, shop, make, checkpoints):
    """Drawn once, the same for another model of the family and for another family; an edited file
    or another seed is refused.
    """
    before = {name: sha256(shop / name) for name in FILES}
    for model in (make("qwen2_5_vl", seed=5), checkpoints["llava_next"]):
        _, other = judge("--users-to", 0.25, model=model)
        assert {name: sha256(shop / name) for name in FILES} == before
        for kind, found in other["sets"].items():
            known = {user["user"]: user for user in report["sets"][kind]["users"]}
            assert len(found["users"]) == 6
            assert all(known[user["user"]] == user for user in found["users"])
    with pytest.raises(InputError, match="seed is 2025 in the file, expected 1; delete the file"):
        judge("--seed", 1)
    with pytest.raises(InputError, match="negatives is 3 in the file, expected 4"):
        judge("--candidates", 5)


def test_an_edited_candidate_file_is_refused(judge, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    judge("--sets", "random", data=folder)
    path = folder / FILES[0]
    stored = json.loads(path.read_text())
    stored["rows"][0]["candidates"].reverse()
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="the file was edited; delete the file"):
        judge("--sets", "random", data=folder)


def test_a_policy_equal_to_the_base_scores_like_it(judge, report, checkpoints, tmp_path):
    """An adapter that was never trained (B = 0): the same scores to the bit, and a difference of 0
    with p = 1.
    """
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu")
    add_lora(backbone.model)
    save_adapter(backbone.model, tmp_path / "zero", backbone.path)
    _, found = judge("--adapter", tmp_path / "zero", "--adapter", "base")
    for kind, result in found["sets"].items():
        assert result["scores"][str(tmp_path / "zero")] == result["scores"]["base"]
        assert result["scores"]["base"] == report["sets"][kind]["scores"]["base"]
        assert all(
            test["difference"] == test["low"] == test["high"] == 0 and test["p"] == 1
            for test in result["paired"]
        )


def test_order_and_batch_do_not_matter(judge, report, sft, full):
    """The policies in another order, one user a forward: adapters are really taken off before the
    next ones are put on.
    """
    _, found = judge("--adapter", "base", "--adapter", full[0], "--adapter", sft, "--batch", 1)
    for kind, result in found["sets"].items():
        for name, scores in result["scores"].items():
            np.testing.assert_allclose(scores, report["sets"][kind]["scores"][name], atol=5e-5)


def test_exported_policies_score_like_the_stack(judge, report, checkpoints, full, tmp_path):
    """One adapter for two, and the merged model as a base of its own."""
    common = ["--model", str(checkpoints["qwen2_5_vl"]), "--adapter", str(full[0]), "--out"]
    export.main([*common, str(tmp_path / "one")])
    export.main([*common, str(tmp_path / "merged"), "--merge", "--dtype", "float32"])
    one = judge("--adapter", tmp_path / "one")[1]["sets"]["random"]["scores"][str(tmp_path / "one")]
    merged = judge(model=tmp_path / "merged")[1]["sets"]["random"]["scores"]["base"]
    for scores in (one, merged):
        np.testing.assert_allclose(
            scores, report["sets"]["random"]["scores"][str(full[0])], atol=1e-4
        )


@pytest.mark.equation("EV-3")
def test_binary(judge, launch, sft, shop, checkpoints):
    """log P(Yes) - log P(No) of each candidate's own prompt, from the plain path."""
    policy = launch(train_dpo.main, *toy.STEPS, "--task", "binary", "--sft", sft)[0]
    _, found = judge(
        "--task", "binary", "--adapter", policy, "--adapter", "base", "--sets", "random"
    )
    result = found["sets"]["random"]
    positive = [user["candidates"].index(user["target"]) for user in result["users"]]
    for name, scores in result["scores"].items():
        for metric, value in by_hand(scores, positive).items():
            assert result["policies"][name]["metrics"][metric]["value"] == pytest.approx(value)
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu", max_pixels=1024)
    catalog = load_catalog(shop)
    example = heldout_examples(load_interactions(shop, catalog), "test", 2)[3]
    pictures = encode_pictures(backbone, catalog, range(len(catalog.ids)))
    source = PromptBuilder(
        backbone, catalog, pictures, DataConfig(data=str(shop), task="binary", history=2)
    )
    for c, item in enumerate(result["users"][3]["candidates"]):
        (row,) = scoring_rows(
            source,
            [
                type(example)(
                    example.user, example.history, example.target, example.seen,
                    (catalog.row[item],),
                )
            ],
        )
        with torch.no_grad():
            yes, no = toy.log_probs_alone(backbone, row, pictures)[0].tolist()
        assert result["scores"]["base"][3][c] == pytest.approx(yes - no, abs=5e-5)


def test_shuffled_images(judge, report, shop):
    """Other images, same candidates: scores move; and with the titles alone the images cannot
    matter.
    """
    _, found = judge("--images", "shuffled")
    for kind, result in found["sets"].items():
        assert result["users"] == report["sets"][kind]["users"]
        moved = np.abs(np.array(result["scores"]["base"]) - report["sets"][kind]["scores"]["base"])
        assert (moved > 1e-3).mean() > 0.9


def test_list_for_a_user(judge, report, shop, sft, capsys):
    """--user ID --top-k K: the best K of the user's random candidates, in the order of the report's
    scores; printed and written.
    """
    catalog, found = load_catalog(shop), report["sets"]["random"]
    for u in (0, 7):
        user = found["users"][u]
        capsys.readouterr()
        out, _ = judge("--user", user["user"], "--top-k", 3, "--adapter", sft, "--adapter", "base")
        written = {
            found["policy"]: found["items"]
            for found in json.loads((out / "recommendations.json").read_text())
        }
        lines = capsys.readouterr().out.splitlines()
        for policy in (str(sft), "base"):
            start = lines.index(f"{policy}:") + 1
            order = np.argsort(-np.array(found["scores"][policy][u]))[:3]
            assert [row["id"] for row in written[policy]] == [user["candidates"][c] for c in order]
            for place, c in enumerate(order, 1):
                item, line = user["candidates"][c], lines[start + place - 1]
                assert line.startswith(
                    f"  {place}. {catalog.titles[catalog.row[item]]} (id {item}, score "
                )
                assert float(line.split("score ")[1].split(")")[0]) == pytest.approx(
                    found["scores"][policy][u][c], abs=2e-3
                )
                assert line.endswith("<- chosen") == (item == user["target"])
    with pytest.raises(InputError, match="--user 'nobody': not in test.tsv"):
        judge("--user", "nobody")
    for k in (0, 5):
        with pytest.raises(InputError, match=f"top.k.*{k}"):
            judge("--user", "1", "--top-k", k)


@pytest.mark.equation("EV-4")
def test_similarity_curve(judge, sft, shop, checkpoints):
    """Ten groups by the similarity before: 294 items make groups of 29 or 30. The bare model is its
    own "before"; the values are cosines of mean last hidden states, here one title and one image at
    a time.
    """
    _, found = judge(
        "--similarity", "true", "--adapter", "base", "--adapter", sft, "--sets", "random",
        "--users-to", 0.25,
    )
    base, after = found["similarity"]["base"], found["similarity"][str(sft)]
    assert base["before"] == base["after"] == after["before"] == sorted(after["before"])
    assert len(base["before"]) == 10
    assert after["after"] != after["before"]
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu", max_pixels=1024)
    catalog, cosine = load_catalog(shop), []
    language, table = backbone.model.model.language_model, backbone.model.get_input_embeddings()
    pictures = encode_pictures(backbone, catalog, range(len(catalog.ids)))

    def pooled(x):
        return language(inputs_embeds=x[None], use_cache=False).last_hidden_state[0].mean(0)

    with torch.no_grad():
        # an image of one token stands at position 0, so plain positions are right
        for row, title in enumerate(catalog.titles):
            H = pooled(
                table(torch.tensor(backbone.tokenizer.encode(title, add_special_tokens=False)))
            )
            cosine.append(torch.cosine_similarity(H, pooled(pictures[row].features), 0).item())
    cosine.sort()
    assert base["before"] == pytest.approx(
        [np.mean(part) for part in np.array_split(cosine, 10)], abs=1e-5
    )


def test_settings_file_and_bad_policies(judge, sft, full, shop, checkpoints, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(
        json.dumps({
            "model": str(checkpoints["qwen2_5_vl"]), "data": str(shop),
            "adapter": [str(sft), "base"], "history": 2, "candidates": 4, "max_pixels": 1024,
            "users_to": 0.25, "sets": "random", "device": "cpu",
        })
    )
    evaluate.main([str(path), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(found["sets"]) == ["random"]
    assert set(found["sets"]["random"]["policies"]) == {str(sft), "base"}
    with pytest.raises(InputError, match="one policy twice"):
        judge("--adapter", sft, "--adapter", sft)
    with pytest.raises(InputError, match="adapter_config.json: no such file"):
        judge("--adapter", tmp_path)
    with pytest.raises(InputError, match="another base"):
        judge("--adapter", sft, model=checkpoints["qwen2_vl"])


def test_flags_win_over_the_file(sft, full, shop, checkpoints, tmp_path):
    """--adapter on the command line replaces the file's list, as every other flag does."""
    path = tmp_path / "settings.json"
    path.write_text(
        json.dumps({
            "model": str(checkpoints["qwen2_5_vl"]), "data": str(shop), "adapter": [str(sft)],
            "history": 2, "candidates": 4, "max_pixels": 1024, "users_to": 0.25, "sets": "random",
            "device": "cpu",
        })
    )
    evaluate.main([str(path), "--out", str(tmp_path / "out"), "--adapter", "base"])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(found["sets"]["random"]["policies"]) == {"base"}


def test_unreadable_image(data, judge, tmp_path):
    """A poster that is no image stops the run with its name, before any scoring."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    path = folder / "images" / "1.png"
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match="1.png: not a whole"):
        judge(data=folder)
    with pytest.raises(InputError):
        read_image(path)
