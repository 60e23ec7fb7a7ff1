"""The reference computed once, the plain path, several rejected answers to a prompt, and which negatives are rejected."""

import json

import pytest
import torch
import toy
from torch.nn import functional as F

import train_dpo
import train_sft
from hanorec.base.errors import InputError
from hanorec.base.files import sha256
from hanorec.lora.files import attach_policy, remove_adapters
from hanorec.losses import preference_logit
from hanorec.mllm.backbone import ImageFeatures
from hanorec.mllm.items import item_embeddings
from hanorec.mllm.tasks import negatives_of, preferences, views
from hanorec.run.reference import load_reference, rows_hash, save_reference

GENTLE = [*toy.STEPS, "--lora-dropout", 0, "--learning-rate", 1e-4]  # moves a weight by up to 2e-4 in three steps


@pytest.fixture(scope="module")
def once(launch, sft):
    return launch(train_dpo.main, *GENTLE, "--sft", sft)


@pytest.mark.parametrize("flags", [["--reference", "live"], ["--plain", "true"]], ids=["live", "plain"])
def test_the_fast_path_is_the_plain_one(launch, sft, once, flags):
    """Packed rows and a reference computed once, against a forward an answer and the reference at every step; noise is on."""
    out, log, _ = launch(train_dpo.main, *GENTLE, "--sft", sft, *flags)
    assert toy.furthest(out, once[0]) < 1e-6
    for a, b in zip(log, once[1], strict=True):
        a, b = ({k: v for k, v in record.items() if k not in ("kl", "accuracy")} for record in (a, b))  # h > 0 of h = 0 is rounding
        assert a == pytest.approx(b, abs=2e-5, rel=1e-4)
    assert (once[0] / "reference.safetensors").exists() and not (out / "reference.safetensors").exists()


def test_plain_sft_is_the_same(launch):
    one, two = launch(train_sft.main, *GENTLE), launch(train_sft.main, *GENTLE, "--plain", "true")
    assert toy.furthest(one[0], two[0]) < 1e-6


def test_the_file_holds_the_reference(data, checkpoints, sft, once):
    """Every number again: log-probabilities of the SFT policy, a row alone, an answer alone."""
    backbone, source, examples = toy.source_of(data, checkpoints)
    rows = [pair.row for pair in preferences(source, examples, 2025)]
    attach_policy(backbone.model, sft)
    backbone.model.eval()
    with torch.no_grad():
        alone = torch.cat([toy.log_probs_alone(backbone, row, source.pictures) for row in rows])
    stored = load_reference(once[0] / "reference.safetensors", {})
    torch.testing.assert_close(stored, alone, atol=2e-5, rtol=0)
    remove_adapters(backbone.model)
    attach_policy(backbone.model, once[0])  # negative control: of the trained policy they are others
    assert (toy.log_probs_alone(backbone, rows[0], source.pictures) - stored[0]).abs().max() > 1e-3


def test_another_run_may_use_it(launch, sft, once):
    """The same adapter to the bit, and no second file; an ablation of the same pairs may use it too."""
    again, log, _ = launch(train_dpo.main, *GENTLE, "--sft", sft, "--reference", once[0] / "reference.safetensors")
    assert sha256(again / "adapter_model.safetensors") == sha256(once[0] / "adapter_model.safetensors") and log == once[1]
    assert not (again / "reference.safetensors").exists()
    launch(train_dpo.main, *GENTLE, "--sft", sft, "--reference", once[0] / "reference.safetensors", "--ablation", "dpo")


@pytest.mark.parametrize(("flags", "fact"), [
    (["--seed", 7], "rows"), (["--history", 1], "prompt"), (["--task", "binary"], "prompt"), (["--negatives", "same"], "rows"),
    (["--sft", None], "stands_on"), (["--rejected", 2], "rows")], ids=lambda value: str(value))
def test_a_stale_reference_is_refused(launch, sft, once, flags, fact):
    flags = ["--sft", sft, *flags] if "--sft" not in flags else []
    with pytest.raises(InputError, match=f"reference.safetensors: its {fact} is .*, expected .*stale.*--reference"):
        launch(train_dpo.main, *GENTLE, *flags, "--reference", once[0] / "reference.safetensors")


def test_a_broken_reference_is_refused(launch, sft, once, tmp_path):
    path = tmp_path / "reference.safetensors"
    path.write_bytes((once[0] / "reference.safetensors").read_bytes()[:-7])
    with pytest.raises(InputError, match="not a whole file of reference log-probabilities"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--reference", path)
    with pytest.raises(InputError, match="no such file, expected once, live, or"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--reference", tmp_path / "none")


def test_edited_facts_are_refused(tmp_path):
    save_reference(tmp_path / "r", torch.zeros(1, 2), [1])
    with pytest.raises(InputError, match=r"its facts are \[1\], expected an object"):
        load_reference(tmp_path / "r", {"rows": "x"})


def test_plain_has_no_use_for_a_file(launch, sft, once):
    with pytest.raises(InputError, match="--reference .* with --plain true"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--plain", "true", "--reference", once[0] / "reference.safetensors")


def test_rows_hash_sees_every_part(data, checkpoints):
    _, source, examples = toy.source_of(data, checkpoints)
    rows = [pair.row for pair in preferences(source, examples, 2025)]
    row, rest = rows[0], rows[1:]
    changed = [[*rest, row], rest, [type(row)(row.name, [*row.prompt[:-1], row.prompt[-1] + 1], row.positions, row.images, row.answers), *rest],
               [type(row)(row.name, row.prompt, row.positions, row.images[::-1], row.answers), *rest],
               [type(row)(row.name, row.prompt, row.positions, row.images, row.answers[::-1]), *rest]]
    hashes = {rows_hash(part, source.pictures) for part in (rows, *changed)}
    shown = row.images[0]
    moved = source.pictures | {shown: ImageFeatures(source.pictures[shown].features + 1e-3, source.pictures[shown].grid)}
    assert len(hashes | {rows_hash(rows, moved)}) == 7
    unseen = next(item for item in source.pictures if all(item not in r.images for r in rows))
    other = source.pictures | {unseen: ImageFeatures(source.pictures[unseen].features + 1, None)}
    assert rows_hash(rows, other) == rows_hash(rows, source.pictures)


# ---- several rejected answers to a prompt ----


def test_three_rejected_answers(launch, data, checkpoints, sft):
    """24 prompts with 3 pairs each, in one packed row; the first loss under no noise is ln 2, and the margin grows."""
    _, log, facts = launch(train_dpo.main, *toy.STEPS, "--epochs", 6, "--sft", sft, "--rejected", 3, "--sigma", 0, "--lora-dropout", 0)
    assert facts["pairs"] == 72 and len(log) == 18
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and log[-1]["margin"] > log[0]["margin"] + 0.01
    plain, _, _ = launch(train_dpo.main, *GENTLE, "--sft", sft, "--rejected", 3, "--plain", "true")
    packed, _, _ = launch(train_dpo.main, *GENTLE, "--sft", sft, "--rejected", 3)
    assert toy.furthest(plain, packed) < 1e-6


def test_pair_logits_by_hand():
    """h of (w, l1), (w, l2): (5 - 1) - (3 - 2) = 3 and (5 - 1) - (4 - 0) = 0; second prompt: 1 - 0 = 1 and 1 - 2 = -1."""
    policy, reference = torch.tensor([[5.0, 3, 4], [1, 0, 2]]), torch.tensor([[1.0, 2, 0], [0, 0, 0]])
    assert train_dpo.pair_logits(policy, reference).tolist() == [[3, 0], [1, -1]]
    assert train_dpo.pair_logits(policy[:, :2], reference[:, :2])[:, 0].tolist() == preference_logit(
        policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]).tolist()


def test_rejected_bounds(launch, sft):
    with pytest.raises(InputError, match="3 negatives among the candidates, expected at least 4; raise --candidates"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--rejected", 4)
    with pytest.raises(InputError, match="--rejected 2 with --task binary: expected 1"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--rejected", 2, "--task", "binary")
    with pytest.raises(InputError, match="--rejected 0: expected at least 1"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--rejected", 0)


# ---- which negatives ----


def test_which_negative_is_rejected(data, checkpoints):
    """By hand from the embeddings: `same` takes the prompt's negative nearest to the target by both modalities, `chns` the nearest by
    title or by image, each about half of the time; random takes neither."""
    backbone, source, examples = toy.source_of(data, checkpoints, candidates=8)
    H, X, _ = item_embeddings(backbone, source.catalog, source.pictures)
    H, X = F.normalize(H, dim=1), F.normalize(X, dim=1)
    by = {"title": H @ H.T, "image": X @ X.T, "both": F.normalize(H + X, dim=1) @ F.normalize(H + X, dim=1).T}

    def nearest(name, example):
        return max((c for c in example.candidates if c != example.target), key=lambda c: by[name][example.target, c].item())

    picked = {kind: [pair.rejected[0] for pair in preferences(source, examples, 2025, kind=kind)] for kind in ("random", "same", "chns")}
    assert picked["same"] == [nearest("both", example) for example in examples]
    shares = {name: sum(p == nearest(name, example) for p, example in zip(picked["chns"], examples, strict=True)) for name in by}
    assert all(p in (nearest("title", example), nearest("image", example)) for p, example in zip(picked["chns"], examples, strict=True))
    assert shares["title"] >= 6 and shares["image"] >= 6 and len(examples) == 24
    assert sum(p == q for p, q in zip(picked["random"], picked["same"], strict=True)) < 12
    for rejected in picked.values():
        assert all(p in example.candidates and p != example.target for p, example in zip(rejected, examples, strict=True))


def test_a_target_without_an_image_is_compared_by_title(data, checkpoints):
    _, source, examples = toy.source_of(data, checkpoints)
    near = views(source, "chns")
    target = examples[0].target
    near[1][target] = 0
    negatives = [c for c in examples[0].candidates if c != target]
    assert negatives_of(examples[0], 3, 1, near) == [max(negatives, key=lambda c: (near[0][c] @ near[0][target]).item())]


def test_kinds_as_commands(launch, sft):
    found = {}
    for kind in ("random", "same", "chns"):
        out, _, facts = launch(train_dpo.main, *GENTLE, "--sft", sft, "--negatives", kind)
        found[kind] = facts["lambda_range"]
        assert json.loads((out / "run.json").read_text())["settings"]["negatives"] == kind
    assert found["same"][1] < found["random"][1]  # nearer pairs are harder: lambda is smaller
