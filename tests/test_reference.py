"""The reference computed once, the plain path, several rejected answers to a prompt, and which
negatives are rejected.
"""

import itertools
import json

import pytest
import torch
import toy
from torch.nn import functional as F

import hanorec.mllm.builder
import hanorec.mllm.forward
import train_dpo
import train_sft
from hanorec.base.errors import InputError
from hanorec.base.files import sha256
from hanorec.datasets.interactions import Example
from hanorec.lora.layer import adapters_off, lora_noise
from hanorec.lora.loading import attach_policy
from hanorec.lora.stack import remove_adapters
from hanorec.mllm.backbone import ImageFeatures
from hanorec.mllm.forward import score_batches
from hanorec.mllm.items import item_embeddings
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import negatives_of, preferences, views
from hanorec.run.reference import load_reference, rows_hash, save_reference

GENTLE = [*toy.STEPS, "--lora-dropout", 0]


def watched(launch, *flags):
    """A run of train_dpo, and for every batch of the reference and of the loop: was it packed?"""
    packed = {"reference": [], "loop": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in (("reference", hanorec.mllm.forward), ("loop", hanorec.mllm.builder)):

            def collated(*args, found=packed[name], real=module.collate, **kwargs):
                found.append(kwargs["packed"])
                return real(*args, **kwargs)

            patch.setattr(module, "collate", collated)
        return *launch(train_dpo.main, *GENTLE, *flags, float64=True), packed


@pytest.fixture(scope="module")
def once(launch, sft):
    """(folder, log, run.json, what was packed) of a run on the fast path."""
    return watched(launch, "--sft", sft)


@pytest.fixture(scope="module")
def plain(launch, sft):
    """The same on the plain path."""
    return watched(launch, "--sft", sft, "--plain", "true")


def assert_the_same(run, other):
    """Weights and logs of two runs, in float64; the log has 6 decimals."""
    assert toy.furthest(run[0], other[0]) < 1e-10
    for a, b in zip(run[1], other[1], strict=True):
        for record in (a, b):  # h > 0 of h = 0 is rounding
            assert record["kl"] is None and 0 <= record["accuracy"] <= 1
        assert a | {"kl": 0, "accuracy": 0} == pytest.approx(
            b | {"kl": 0, "accuracy": 0}, abs=2e-6, rel=0
        )


def reference_of(run):
    return load_reference(run[0] / "reference.safetensors", {})


def test_the_fast_path_is_the_plain_one(once, plain, launch, sft):
    """Packed rows against a forward an answer, in the reference, too; noise is on. Both compute the
    reference once, 24 rows in 6 batches, and 3 steps of 2 micro-batches. Control: with another
    noise the two would not be alike.
    """
    assert_the_same(plain, once)
    torch.testing.assert_close(reference_of(plain), reference_of(once), atol=1e-10, rtol=0)
    assert once[3] == {"reference": [True] * 6, "loop": [True] * 6}
    assert plain[3] == {"reference": [False] * 6, "loop": [False] * 6}
    other = launch(train_dpo.main, *GENTLE, "--sft", sft, "--sigma", 0.06, float64=True)
    with pytest.raises(AssertionError):
        assert_the_same(other, once)


def test_the_plain_path_may_use_a_file(launch, sft, once):
    """Then it computes no reference of its own, and keeps none."""
    path = once[0] / "reference.safetensors"
    run = watched(launch, "--sft", sft, "--plain", "true", "--reference", path)
    assert_the_same(run, once)
    assert run[3] == {"reference": [], "loop": [False] * 6}
    assert not (run[0] / "reference.safetensors").exists()


def test_plain_sft_is_the_same(launch):
    one, _, _ = launch(train_sft.main, *GENTLE, float64=True)
    two, _, _ = launch(train_sft.main, *GENTLE, "--plain", "true", float64=True)
    assert toy.furthest(one, two) < 1e-10


def test_the_file_holds_the_reference(data, checkpoints, sft, once):
    """Every number again: log-probabilities of the SFT policy, a row alone, an answer alone."""
    backbone, source, examples = toy.source_of(data, checkpoints)
    rows = [pair.row for pair in preferences(source, examples, 2025)]
    attach_policy(backbone.model, sft)
    backbone.model.eval()
    with torch.no_grad():
        alone = torch.cat([toy.log_probs_alone(backbone, row, source.pictures) for row in rows])
    stored = reference_of(once)
    torch.testing.assert_close(stored.float(), alone, atol=2e-5, rtol=0)
    remove_adapters(backbone.model)
    # negative control: of the trained policy they are others
    attach_policy(backbone.model, once[0])
    assert (toy.log_probs_alone(backbone, rows[0], source.pictures) - stored[0]).abs().max() > 1e-3


def test_computed_anew_for_a_batch_it_is_the_same(data, checkpoints, once):
    """Live = cached: at the end of the run, by the trained policy with its adapter off, for batches
    of any rows; in train mode and inside the noise, too, since the reference knows neither.
    Control: with the adapter on, or for the rows of another batch, the numbers are others.
    """
    backbone, source, examples = toy.source_of(data, checkpoints)
    rows = [pair.row for pair in preferences(source, examples, 2025)]
    attach_policy(backbone.model, once[0])
    stored = reference_of(once)
    parts = [[0, 5, 9, 23], [7], [11, 3, 2]]
    micros = [source.collate(rows, part) for part in parts]

    def apart(found):
        pairs = zip(found, parts, strict=True)
        return [(log_probs - stored[part]).abs().max() for log_probs, part in pairs]

    for mode in (backbone.model.eval, backbone.model.train):
        mode()
        with lora_noise(backbone.model, 0.1), adapters_off(backbone.model):
            anew = score_batches(backbone, micros)
        assert max(apart(anew)) < 2e-5
    backbone.model.eval()
    assert min(apart(score_batches(backbone, micros))) > 1e-3
    assert (anew[0] - stored[[5, 0, 9, 23]]).abs().max() > 1e-3


def test_another_run_may_use_it(launch, sft, once):
    """The same adapter to the bit, and no second file; an ablation of the same pairs may use it
    too.
    """
    flags = [*GENTLE, "--sft", sft, "--reference", once[0] / "reference.safetensors"]
    again, log, _ = launch(train_dpo.main, *flags, float64=True)
    assert sha256(again / "adapter_model.safetensors") == sha256(
        once[0] / "adapter_model.safetensors"
    )
    assert log == once[1]
    assert not (again / "reference.safetensors").exists()
    launch(train_dpo.main, *flags, "--ablation", "dpo", float64=True)


@pytest.mark.parametrize(
    ("flags", "fact"),
    [(["--seed", 7], "rows"),
     (["--history", 1], "prompt"),
     (["--task", "binary"], "prompt"),
     (["--negatives", "same"], "rows"),
     (["--sft", None], "stands_on"),
     (["--rejected", 2], "rows")],
    ids=lambda value: str(value),
)
def test_a_stale_reference_is_refused(launch, sft, once, flags, fact):
    flags = ["--sft", sft, *flags] if "--sft" not in flags else []
    path = once[0] / "reference.safetensors"
    with pytest.raises(
        InputError, match=f"reference.safetensors: its {fact} is .*, expected .*stale.*--reference"
    ):
        launch(train_dpo.main, *GENTLE, *flags, "--reference", path, float64=True)


def test_a_broken_reference_is_refused(launch, sft, once, tmp_path):
    path = tmp_path / "reference.safetensors"
    path.write_bytes((once[0] / "reference.safetensors").read_bytes()[:-7])
    with pytest.raises(InputError, match="not a whole file of reference log-probabilities"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--reference", path)
    for none in (tmp_path / "none", "live"):  # "live" was a choice once
        message = f"--reference {none}: no such file, expected once, or the"
        with pytest.raises(InputError, match=message):
            launch(train_dpo.main, *GENTLE, "--sft", sft, "--reference", none)


def test_edited_facts_are_refused(tmp_path):
    save_reference(tmp_path / "r", torch.zeros(1, 2), [1])
    with pytest.raises(InputError, match=r"its facts are \[1\], expected an object"):
        load_reference(tmp_path / "r", {"rows": "x"})


def test_rows_hash_sees_every_part(data, checkpoints):
    _, source, examples = toy.source_of(data, checkpoints)
    rows = [pair.row for pair in preferences(source, examples, 2025)]
    row, rest = rows[0], rows[1:]
    changed = [
        [*rest, row],
        rest,
        [type(row)(
            row.name, [*row.prompt[:-1], row.prompt[-1] + 1], row.positions, row.images,
            row.answers,
         ),
         *rest],
        [type(row)(row.name, row.prompt, row.positions, row.images[::-1], row.answers), *rest],
        [type(row)(row.name, row.prompt, row.positions, row.images, row.answers[::-1]), *rest],
    ]
    hashes = {rows_hash(part, source.pictures) for part in (rows, *changed)}
    shown = row.images[0]
    moved = source.pictures | {
        shown: ImageFeatures(source.pictures[shown].features + 1e-3, source.pictures[shown].grid)
    }
    assert len(hashes | {rows_hash(rows, moved)}) == 7
    seen = {*itertools.chain(*(r.images for r in rows))}
    unseen = next(item for item in source.pictures if item not in seen)
    other = source.pictures | {unseen: ImageFeatures(source.pictures[unseen].features + 1, None)}
    assert rows_hash(rows, other) == rows_hash(rows, source.pictures)


def test_rows_hash_tells_where_a_part_ends():
    """The same numbers in a row, cut elsewhere: between prompt, images and answers, or between
    rows.
    """

    def row(prompt, images, *answers):
        return Row("u", prompt, torch.zeros(1, len(prompt)), images, list(answers))

    pictures = {item: ImageFeatures(torch.zeros(1, 2), None) for item in range(10)}
    cut = [
        [row([1, 2], [3], [4, 5], [6])],
        [row([1], [2, 3], [4, 5], [6])],
        [row([1, 2], [3, 4], [5], [6])],
        [row([1, 2], [3], [4], [5, 6])],
        [row([1, 2], [3], [4, 5, 6])],
        [row([1, 2], [3], [4]), row([5], [6])],
    ]
    assert len({rows_hash(rows, pictures) for rows in cut}) == len(cut)


def test_rows_hash_sees_every_image_shown():
    """Two rows with two images each: whichever changes, the hash does."""
    rows = [Row("u", [1], torch.zeros(1, 1), images, [[2]]) for images in ([0, 1], [2, 3])]
    pictures = {item: ImageFeatures(torch.full((1, 2), float(item)), None) for item in range(4)}
    hashes = {rows_hash(rows, pictures)}
    for item in range(4):
        moved = ImageFeatures(torch.full((1, 2), -1.0), None)
        hashes.add(rows_hash(rows, pictures | {item: moved}))
    assert len(hashes) == 5


# ---- several rejected answers to a prompt ----


def test_three_rejected_answers(launch, data, checkpoints, sft):
    """24 prompts with 3 pairs each, in one packed row; the first loss under no noise is ln 2, and
    the margin grows.
    """
    _, log, facts = launch(
        train_dpo.main, *toy.STEPS, "--epochs", 6, "--sft", sft, "--rejected", 3, "--sigma", 0,
        "--lora-dropout", 0,
    )
    assert facts["pairs"] == 72 and len(log) == 18
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert log[-1]["margin"] > log[0]["margin"] + 0.01
    flags = [*GENTLE, "--sft", sft, "--rejected", 3]
    plain, _, _ = launch(train_dpo.main, *flags, "--plain", "true", float64=True)
    packed, _, _ = launch(train_dpo.main, *flags, float64=True)
    assert toy.furthest(plain, packed) < 1e-10


def test_rejected_bounds(launch, sft):
    with pytest.raises(
        InputError,
        match="3 negatives among the candidates, expected at least 4; raise --candidates",
    ):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--rejected", 4)
    with pytest.raises(InputError, match="--rejected 2 with --task binary: expected 1"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--rejected", 2, "--task", "binary")
    with pytest.raises(InputError, match="--rejected 0: expected at least 1"):
        launch(train_dpo.main, *GENTLE, "--sft", sft, "--rejected", 0)


# ---- which negatives ----


def test_which_negative_is_rejected(data, checkpoints):
    """By hand from the embeddings: `same` takes the prompt's negative nearest to the target by both
    modalities, `chns` the nearest by title or by image, each about half of the time; random takes
    neither.
    """
    backbone, source, examples = toy.source_of(data, checkpoints, candidates=8)
    H, X, _ = item_embeddings(backbone, source.catalog, source.pictures)
    H, X = F.normalize(H, dim=1), F.normalize(X, dim=1)
    by = {
        "title": H @ H.T, "image": X @ X.T,
        "both": F.normalize(H + X, dim=1) @ F.normalize(H + X, dim=1).T,
    }

    def nearest(name, example):
        return max(
            (c for c in example.candidates if c != example.target),
            key=lambda c: by[name][example.target, c].item(),
        )

    picked = {
        kind: [pair.rejected[0] for pair in preferences(source, examples, 2025, kind=kind)]
        for kind in ("random", "same", "chns")
    }
    assert picked["same"] == [nearest("both", example) for example in examples]
    shares = {
        name: sum(
            p == nearest(name, example) for p, example in zip(picked["chns"], examples, strict=True)
        )
        for name in by
    }
    assert all(
        p in (nearest("title", example), nearest("image", example))
        for p, example in zip(picked["chns"], examples, strict=True)
    )
    assert shares["title"] >= 6 and shares["image"] >= 6 and len(examples) == 24
    assert sum(p == q for p, q in zip(picked["random"], picked["same"], strict=True)) < 12
    for rejected in picked.values():
        assert all(
            p in example.candidates and p != example.target
            for p, example in zip(rejected, examples, strict=True)
        )


def test_a_random_negative_is_the_prompts_own():
    """The draw depends on seed, candidates and history: where one of the three is another, users
    differ; the same prompt always gets the same. Forty users, nine negatives each: that all agree
    by chance has probability 1e-38.
    """

    def drawn(seed=0, history=0, last=9):
        found = []
        for user in range(40):
            candidates = (*range(9), last)
            example = Example("u", (history, 50 + user), 0, frozenset(), candidates)
            found += negatives_of(example, seed)
        return [0 if item >= 9 else item for item in found]

    assert drawn() == drawn()
    assert len(set(drawn())) > 5  # the forty histories differ
    for change in ({"seed": 1}, {"history": 20}, {"last": 10}):
        assert drawn(**change) != drawn(), change


def test_a_target_without_an_image_is_compared_by_title(data, checkpoints):
    _, source, examples = toy.source_of(data, checkpoints)
    near = views(source, "chns")
    target = examples[0].target
    near[1][target] = 0
    negatives = [c for c in examples[0].candidates if c != target]
    assert negatives_of(examples[0], 3, 1, near) == [
        max(negatives, key=lambda c: (near[0][c] @ near[0][target]).item())
    ]


def test_kinds_as_commands(launch, sft):
    found = {}
    for kind in ("random", "same", "chns"):
        out, _, facts = launch(train_dpo.main, *GENTLE, "--sft", sft, "--negatives", kind)
        found[kind] = facts["lambda_range"]
        assert json.loads((out / "run.json").read_text())["settings"]["negatives"] == kind
    assert found["same"][1] < found["random"][1]  # nearer pairs are harder: lambda is smaller
