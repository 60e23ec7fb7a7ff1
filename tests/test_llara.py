"""LLaRA: projector, curriculum, hybrid prompt, its training and its scores."""

import json
import shutil
from dataclasses import replace
from itertools import chain

import numpy as np
import oracle
import oracle_llara
import pytest
import torch
import toy
from float64 import in_float64
from processes import together
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import train_sft
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.files import sha256
from hanorec.base.lock import unlock_folder
from hanorec.baselines import llara_training
from hanorec.baselines.config_llara import LlaraConfig
from hanorec.baselines.llara import (
    Projector,
    hybrid_probability,
    hybrid_row,
    item_vectors,
)
from hanorec.baselines.llara_files import load_projector, load_table
from hanorec.baselines.llara_training import (
    CONTROL,
    LLARA,
    hybrid_rows,
    score_llara,
    train_llara,
)
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import Example, heldout_examples, load_interactions
from hanorec.losses import sft_loss
from hanorec.mllm import evaluation, prompts
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import scoring_rows
from hanorec.run.run import Run

D_TABLE = 6
TRAIN = {"targets_per_user": 1, "epochs": 1, "accumulation": 2, "learning_rate": 1e-3}
EXAMPLE = Example("u1", (0, 1, 2), 4, frozenset({0, 1, 2, 4}), (3, 4, 5))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts_of(data, **options):
    """Short prompts without images."""
    options = {"history": 2, "candidates": 4, "images": "none"} | options
    return DataConfig(str(data), **options)


def write_table(folder, ids, m=None):
    """The files of a trained row with vectors, with a random table or this one."""
    folder.mkdir(exist_ok=True)
    m = torch.randn(len(ids), D_TABLE, generator=generator(7)) if m is None else m
    train = torch.zeros(2, 1, dtype=torch.long)
    tensors = {"user": torch.zeros(1, D_TABLE), "item": m, "train": train}
    save_file(tensors, folder / "embeddings.safetensors")
    names = {"users": ["u"], "items": list(ids)}
    (folder / "names.json").write_text(json.dumps(names))
    return folder


# ---- LL-1, LL-2 ----


@pytest.mark.equation("LL-1")
def test_projector_matches_the_oracle():
    projector = Projector(D_TABLE, 5, generator()).double()
    m = torch.randn(4, D_TABLE, generator=generator(1), dtype=torch.float64)
    weights = [w.detach().numpy() for w in projector.parameters()]
    expected = oracle_llara.projector(m.numpy(), *weights)
    np.testing.assert_allclose(projector(m).detach().numpy(), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda m, *weights: torch.func.functional_call(
            projector, dict(zip(["W1", "b1", "W2", "b2"], weights, strict=True)), m
        ),
        (m.requires_grad_(), *projector.parameters()),
    )


def test_projector_starts_in_the_range_of_a_linear():
    projector = Projector(100, 400, generator())
    for weight, bound in zip(projector.parameters(), [0.1, 0.1, 0.05, 0.05], strict=True):
        assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.equation("LL-2")
def test_curriculum_matches_the_oracle():
    """p(0) = 0, p(T) = 1, and the mean over a run is 1/2 - 1/(2 T)."""
    for steps in (1, 7, 100):
        found = [hybrid_probability(step, steps) for step in range(steps + 1)]
        assert found == [oracle_llara.hybrid_probability(step, steps) for step in range(steps + 1)]
        assert found[0] == 0 and found[-1] == 1
        assert abs(np.mean(found[:-1]) - 0.5) <= 1 / steps


# ---- LL-3: the prompt, and the vectors in it ----


def titles_alone(backbone, catalog):
    """What `--images none` makes of a catalogue with images."""
    catalog = replace(catalog, images=(None,) * len(catalog.images))
    return PromptBuilder(backbone, catalog, {}, prompts_of(catalog.directory))


@pytest.fixture
def builder(backbone, catalog):
    """A builder of prompts without images."""
    return titles_alone(backbone, catalog)


def both_rows(builder, example=EXAMPLE, answers=None):
    """The example's row of titles alone, and its hybrid row; answered by the target."""
    text = builder.ranking_row(example, answers or [example.target])
    return text, hybrid_row(builder, example, text)


def test_hybrid_prompt_reads_as_the_task_says(builder):
    """The text prompt with one placeholder behind each title and nothing around it."""
    text, hybrid = both_rows(builder)
    backbone, titles = builder.backbone, builder.catalog.titles
    assert hybrid.images == [0, 1, 2, 3, 4, 5] and text.images == []
    assert hybrid.prompt.count(backbone.image_token) == 6
    assert not {token for part in backbone.around_image() for token in part} & {*hybrid.prompt}
    assert hybrid.positions.tolist() == [[*range(len(hybrid.prompt))]] * len(hybrid.positions)
    assert hybrid.answers == text.answers

    turn = backbone.turn
    for row, mark in [(text, ""), (hybrid, backbone.vector_text)]:
        had = [f"{number}. {titles[number - 1]}{mark}\n" for number in (1, 2, 3)]
        offered = [f"{number}. {titles[number + 2]}{mark}\n" for number in (1, 2, 3)]
        parts = [prompts.HISTORY, *had, prompts.WHICH, *offered, prompts.TITLE_ALONE]
        whole = turn.before + "".join(parts) + turn.after
        encode = backbone.tokenizer.encode
        assert row.prompt == encode(whole, add_special_tokens=turn.add_tokens)


def loss_of(backbone, rows, vectors):
    micro = collate(backbone, rows, vectors)
    return sft_loss(forward(backbone, micro), micro.labels)


@pytest.mark.equation("LL-3")
def test_each_vector_stands_at_its_place_and_the_loss_is_that_of_the_title(builder):
    """The prompt's embeddings put together here, and log softmax by the oracle."""
    backbone = builder.backbone
    _, row = both_rows(builder)
    projector = Projector(D_TABLE, backbone.width, generator())
    m = torch.randn(len(builder.catalog.ids), D_TABLE, generator=generator(1))
    with torch.no_grad():
        vectors = item_vectors(projector, m, row.images)
        found = loss_of(backbone, [row], vectors)

        ids = torch.tensor([*row.prompt, *row.answers[0]])
        x = backbone.model.get_input_embeddings()(ids)
        places = (ids == backbone.image_token).nonzero().flatten().tolist()
        for place, item in zip(places, (0, 1, 2, 3, 4, 5), strict=True):
            x[place] = projector(m[item])
        language = backbone.model.model.language_model
        positions = torch.arange(len(ids))[None]
        hidden = language(inputs_embeds=x[None], position_ids=positions, use_cache=False)
        logits = backbone.model.lm_head(hidden.last_hidden_state)[0]  # (T, V)
    start, answer = len(row.prompt), row.answers[0]
    log_prob = oracle.answer_log_prob(logits[start - 1 : -1].numpy(), answer)
    assert found.item() == pytest.approx(-log_prob / len(answer), rel=1e-5)

    # and a vector at a wrong place would be noticed
    wrong = vectors | {0: vectors[1], 1: vectors[0]}
    assert abs(loss_of(backbone, [row], wrong).item() - found.item()) > 1e-3


def test_without_a_second_layer_every_vector_is_zero(builder):
    backbone = builder.backbone
    _, row = both_rows(builder)
    projector = Projector(D_TABLE, backbone.width, generator())
    torch.nn.init.zeros_(projector.W2)
    torch.nn.init.zeros_(projector.b2)
    vectors = item_vectors(projector, torch.ones(6, D_TABLE), row.images)
    assert all(torch.equal(v.features, torch.zeros(1, backbone.width)) for v in vectors.values())
    micro = collate(backbone, [row], vectors)
    assert torch.equal(micro.pictures, torch.zeros(6, backbone.width))


@pytest.fixture
def float64():
    """What the test computes keeps all digits of float64."""
    with in_float64():
        yield


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_gradient_through_the_model_by_finite_differences(checkpoints, catalog, family, float64):
    """Along a random direction of the projector's weights. None on text rows, never any for the
    table.
    """
    backbone = load_backbone(str(checkpoints[family]), "float64", "cpu")
    toy.busy_lora(backbone.model)
    text, hybrid = both_rows(titles_alone(backbone, catalog))
    m = torch.randn(len(catalog.ids), D_TABLE, generator=generator(1))
    projector = Projector(D_TABLE, backbone.width, generator())
    weights = list(projector.parameters())

    def loss(row):
        return loss_of(backbone, [row], item_vectors(projector, m, row.images))

    loss(text).backward()
    assert all(w.grad is None for w in weights)
    loss(hybrid).backward()
    assert not m.requires_grad

    direction = [torch.randn(w.shape, generator=generator(2)) for w in weights]
    slope = sum((w.grad * step).sum() for w, step in zip(weights, direction, strict=True)).item()
    eps, around = 1e-5, []
    for move in (eps, -2 * eps):  # to one side, then to the other
        with torch.no_grad():
            for w, step in zip(weights, direction, strict=True):
                w.add_(move * step)
            around.append(loss(hybrid).item())
    assert abs(slope) > 1e-3
    assert (around[0] - around[1]) / (2 * eps) == pytest.approx(slope, rel=1e-6)


# ---- training ----


@pytest.fixture(scope="module")
def table(data, tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("sasrec") / "out", load_catalog(data).ids)


@pytest.fixture(scope="module")
def train(data, checkpoints, table, tmp_path_factory):
    """train(family, out=None, **settings) -> OUT of a run of three steps of 8 rows."""
    def start(family="qwen2_5_vl", out=None, table=table, **settings):
        out = out or tmp_path_factory.mktemp("llara") / "out"
        model = ModelConfig(str(checkpoints[family]), device="cpu")
        config = TrainConfig(str(out), **TRAIN | settings)
        train_llara(model, prompts_of(data), config, LlaraConfig(str(table)))
        return out

    return start


@pytest.fixture(scope="module")
def trained(train):
    """OUT of a run of two epochs."""
    return train(epochs=2)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_follows_the_curriculum_and_leaves_the_table_alone(trained, table, data):
    """Which steps are hybrid is the generator's choice behind the projector's start."""
    log, draws = log_of(trained), generator(2025)
    start = Projector(D_TABLE, 64, draws)
    assert [line["p"] for line in log] == [round(step / 6, 6) for step in range(6)]
    expected = [torch.rand((), generator=draws).item() < step / 6 for step in range(6)]
    assert [line["hybrid"] for line in log] == expected
    assert 0 < sum(expected) < 6

    m = load_table(table, load_catalog(data))
    assert torch.equal(m, torch.randn(m.shape, generator=generator(7)))
    projector = load_projector(trained, m)
    for learnt, drawn in zip(projector.parameters(), start.parameters(), strict=True):
        assert not torch.equal(learnt, drawn)
    record = json.loads((trained / "run.json").read_text())
    facts = json.loads((trained / "hanorec.json").read_text())
    assert record["inputs"]["table"] == facts["table_sha256"]
    assert record["trained_weights"] > sum(w.numel() for w in projector.parameters())


def test_without_hybrid_steps_it_is_text_only_training(train, data, checkpoints, monkeypatch):
    """p = 0 replays train_sft.py on titles alone, to the bit; and p = 1 does not."""
    monkeypatch.setattr(llara_training, "hybrid_probability", lambda step, steps: 0.0)
    out = train()
    flags = ["--model", checkpoints["qwen2_5_vl"], "--data", data, *toy.SHORT, *toy.STEPS]
    flags += ["--images", "none"]
    sft = out.parent / "sft"
    train_sft.main([str(word) for word in [*flags, "--out", sft]])
    name = "adapter_model.safetensors"
    assert sha256(out / name) == sha256(sft / name)
    losses = [[line["loss"] for line in log_of(folder)] for folder in (out, sft)]
    assert losses[0] == losses[1]
    kept = load_file(out / "projector.safetensors")
    start = Projector(D_TABLE, 64, generator(2025)).state_dict()
    assert all(torch.equal(kept[key], start[key]) for key in start)  # no decay either

    monkeypatch.setattr(llara_training, "hybrid_probability", lambda step, steps: 1.0)
    assert sha256(train() / name) != sha256(sft / name)


def test_the_projector_learns_at_the_rate_of_the_schedule(train, monkeypatch):
    """Both groups of weights, in each step."""
    rates = []
    update = Run.update

    def watched(run, *arguments):
        rates.append([group["lr"] for group in run.optimizer.param_groups])
        return update(run, *arguments)

    monkeypatch.setattr(Run, "update", watched)
    train()
    assert len(rates) == 3 and all(one == other for one, other in rates)
    assert rates[0][0] > rates[1][0] > rates[2][0]


def test_a_stopped_run_ends_as_one_that_never_was(train, trained, table, tmp_path, monkeypatch):
    """Stopped twice, each time a step behind a checkpoint: the same choices, adapter and projector.
    In between it is not gone on with on another table.
    """
    out, own, log = tmp_path / "out", shutil.copytree(table, tmp_path / "table"), Run.log

    def train_until(stop):
        def stopping(run, **record):
            if record["step"] == stop:
                raise InputError("stopped")
            log(run, **record)

        monkeypatch.setattr(Run, "log", stopping)
        train(out=out, table=own, epochs=2, save_every=2)

    for stop in (3, 5):
        with pytest.raises(InputError, match="stopped"):
            train_until(stop)
        unlock_folder(out)
        assert (out / f"checkpoint-{stop - 1:08d}").exists()

    change_item(own, lambda m: m + 1)
    with pytest.raises(InputError, match="run was started with table of hash .*put the old one"):
        train_until(None)
    unlock_folder(out)
    shutil.copytree(table, own, dirs_exist_ok=True)
    train_until(None)
    for name in ("adapter_model.safetensors", "projector.safetensors", "log.jsonl"):
        assert sha256(out / name) == sha256(trained / name), name


def train_in_float64(model, data, table, out):
    """In a child: two epochs without dropout."""
    config = TrainConfig(out, **TRAIN | {"epochs": 2, "lora_dropout": 0.0})
    with in_float64():
        train_llara(ModelConfig(model, device="cpu"), prompts_of(data), config, LlaraConfig(table))


@pytest.mark.long
def test_two_processes_learn_what_one_does(data, checkpoints, table, tmp_path):
    arguments = [str(place) for place in (checkpoints["qwen2_5_vl"], data, table)]
    outs = [tmp_path / "1", tmp_path / "2"]
    for n, out in enumerate(outs, 1):
        assert together(n, train_in_float64, *arguments, str(out)) == [0] * n
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        one, two = (load_file(out / name) for out in outs)
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-10
    assert 0 < sum(line["hybrid"] for line in log_of(outs[0])) < 6


# ---- scores ----


@pytest.fixture(scope="module")
def held(data):
    """Catalogue, and the held-out examples of 6 users with 4 candidates each."""
    catalog = load_catalog(data, images=False)
    every = heldout_examples(load_interactions(data, catalog), "test", 2)
    return catalog, draw_candidates(every[:6], catalog, 3, 2025)


def scoring_builder(checkpoints, held, family):
    backbone = load_backbone(str(checkpoints[family]), "float32", "cpu")
    return PromptBuilder(backbone, held[0], {}, prompts_of(held[0].directory))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_scores_are_ev_1_under_the_hybrid_prompt(
    train, trained, checkpoints, held, table, family
):
    """Of LLaRA each row alone, unpacked; and the control's are others."""
    out = trained if family == "qwen2_5_vl" else train(family)
    builder = scoring_builder(checkpoints, held, family)
    scores = score_llara(builder, {"random": held[1]}, out, table, 4, 2025)["random"]
    assert list(scores) == [LLARA, CONTROL]

    m = load_table(table, held[0])
    projector = load_projector(out, m)
    expected = []
    for example in held[1]:
        _, row = both_rows(builder, example, example.candidates)
        with torch.no_grad():
            vectors = item_vectors(projector, m, row.images)
            expected.append(toy.log_probs_alone(builder.backbone, row, vectors)[0].numpy())
    np.testing.assert_allclose(scores[LLARA]["sum"], expected, rtol=1e-4)
    assert scores[LLARA]["mean"].shape == (6, 4)
    assert np.abs(scores[CONTROL]["sum"] - scores[LLARA]["sum"]).max() > 1e-3


def test_permuted_vectors_cost_accuracy_where_vectors_tell(checkpoints, held):
    """A projector is trained by itself, so that all that is learnt comes through the vectors: with
    those of other items the targets are no longer found. With a projector that says nothing the
    control changes no score, so it does not always find a loss.
    """
    builder = scoring_builder(checkpoints, held, "qwen2_5_vl")
    backbone, examples = builder.backbone, [replace(e, history=e.history[-1:]) for e in held[1][:4]]
    m = torch.randn(len(held[0].ids), 32, generator=generator(3))
    rows = hybrid_rows(builder, examples, scoring_rows(builder, examples))
    target = torch.tensor([e.candidates.index(e.target) for e in examples])
    projector = Projector(32, backbone.width, generator())
    optimizer = torch.optim.Adam(projector.parameters(), lr=3e-2)

    def scores(images):
        with torch.no_grad():
            vectors = item_vectors(projector, m, range(len(m)))
        shown = evaluation.shown_pictures(vectors, images, 2025)
        found = evaluation.score(replace(builder, pictures=shown), rows, len(rows), 4)
        return torch.from_numpy(found["sum"])  # (U, C)

    items = list(chain.from_iterable(row.images for row in rows))
    for _ in range(30):
        log_probs = toy.log_probs(backbone, rows, item_vectors(projector, m, items))
        cross_entropy(log_probs, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    own, permuted = scores("own"), scores("shuffled")
    assert (own.argmax(1) == target).all() and not (permuted.argmax(1) == target).all()
    assert cross_entropy(own, target) < 0.5 and cross_entropy(permuted, target) > 1.5

    torch.nn.init.zeros_(projector.W2)
    assert torch.equal(scores("own"), scores("shuffled"))


# ---- what is refused ----


def change_names(folder, **names):
    path = folder / "names.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | names))


def change_item(folder, change):
    path = folder / "embeddings.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"item": change(tensors["item"]).contiguous()}, path)


def with_nan(m):
    m[3, 1] = torch.nan
    return m


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / "names.json").unlink(), "names.json: no such file.*of a SASRec row"),
    (lambda f: change_names(f, items=["1", "2"]), "lists 2 items, .* has 294 or others"),
    (lambda f: change_names(f, items=None), "lists no items"),
    (lambda f: (f / "embeddings.safetensors").unlink(), "cannot be read.*SASRec row"),
    (lambda f: (f / "embeddings.safetensors").write_bytes(b"x"), "cannot be read"),
    (lambda f: save_file({"user": torch.zeros(1)}, f / "embeddings.safetensors"), "cannot be read"),
    (lambda f: change_item(f, lambda m: m[:5]), r"item is torch.float32 \(5, 6\), expected floats"),
    (lambda f: change_item(f, torch.Tensor.long), "item is torch.int64"),
    (lambda f: change_item(f, with_nan), "NaN or infinity in the vectors of 1 items, first"),
])
def test_a_bad_table_is_refused(data, table, tmp_path, damage, words):
    folder = shutil.copytree(table, tmp_path / "table")
    catalog = load_catalog(data)
    assert load_table(folder, catalog).shape == (294, D_TABLE)
    damage(folder)
    with pytest.raises(InputError, match=words):
        load_table(folder, catalog)


def test_another_table_and_a_bad_projector_are_refused(trained, data, table, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "out")
    m = load_table(table, load_catalog(data))
    load_projector(folder, m)
    for other in (m[:, :5], m + 1):
        with pytest.raises(InputError, match="was trained with another item table than"):
            load_projector(folder, other)
    path = folder / "projector.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match="its hash differs from the one in hanorec.json"):
        load_projector(folder, m)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read .*of a finished LLaRA run"):
        load_projector(folder, m)


@pytest.mark.parametrize(("options", "words"), [
    ({"task": "binary"}, "--task binary with LLaRA: expected ranking"),
    ({"images": "own"}, "--images own with LLaRA: expected none"),
])
def test_other_prompts_are_refused(options, words, tmp_path):
    """Before anything is loaded or written."""
    data, out = prompts_of("", **options), tmp_path / "out"
    with pytest.raises(InputError, match=words):
        train_llara(ModelConfig(""), data, TrainConfig(str(out)), LlaraConfig(""))
    assert not out.exists()


def test_a_negative_decay_is_refused():
    with pytest.raises(InputError, match="--projector-decay -1"):
        LlaraConfig("", -1.0)
