"""What a training step takes: the estimate against tensors that are counted, on a CPU, and against
what one GPU has measured."""

import weakref
from dataclasses import replace

import pages
import pytest
import torch
import toy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_sft
from hanorec.base import exhausted
from hanorec.base.command import run
from hanorec.base.config import TrainConfig
from hanorec.lora.layer import language_model, lora_noise
from hanorec.mllm.backbone import use_checkpointing
from hanorec.mllm.collate import collate, one_answer_each
from hanorec.mllm.forward import forward
from hanorec.mllm.memory import (
    WORKSPACES,
    Shape,
    Work,
    adapter_bytes,
    frozen_bytes,
    kept_of_a_token,
    largest_work,
    layer_bytes,
    shape_of,
    step_memory,
)
from hanorec.scoring import answer_log_probs

TRAIN = TrainConfig(out="", micro_batch=3, lora_rank=4, lora_dropout=0.0)


def rows_of(backbone, catalog, pictures, answers=(3, 4)):
    """Three rows side by side, of one length but for what their answers are."""
    return [toy.ranking_row(backbone, catalog, pictures, answers=answers)] * 3


def shape_and_work(backbone, rows, train=TRAIN, noise=False, **changed):
    shape = shape_of(backbone.config.text_config, backbone.model.dtype)
    return shape, replace(largest_work(backbone, rows, train, False, noise), **changed)


class Kept:
    """Bytes of what autograd keeps, each storage once, beside the model's own."""

    def __init__(self, model):
        self.own = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.storages = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def kept_by(backbone, batch):
    kept = Kept(backbone.model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        forward(backbone, batch)
    return kept.bytes


@pytest.mark.parametrize(("dtype", "answers", "dropout"), [
    (torch.float32, (3, 4), 0.0),
    (torch.float32, (3,), 0.1),
    (torch.bfloat16, (3,), 0.0),
    (torch.bfloat16, (3, 4), 0.1),
])
def test_what_backward_needs_is_what_autograd_keeps(
    backbone, catalog, gallery, dtype, answers, dropout
):
    """All three families, to 2 in 1,000. The wrong count, that of the README until now (6 widths,
    4 of the MLP), is off by a tenth and more.
    """
    backbone.model.to(dtype)
    pictures = gallery[backbone.family]
    rows = rows_of(backbone, catalog, pictures, answers)
    layers = toy.busy_lora(backbone.model, dropout=dropout)
    shape, work = shape_and_work(backbone, rows, dropout=dropout > 0)
    backbone.model.train()
    found = kept_by(backbone, collate(backbone, rows, pictures))
    copies = 0
    if dtype != torch.float32:  # of A and B; what goes into the first q, k, v needs no A
        copies = 2 * sum(w.numel() for w in toy.weights(layers))
        copies -= 2 * 3 * work.rank * shape.width
    expected = work.rows * work.tokens * kept_of_a_token(shape, work) + copies
    assert found == pytest.approx(expected, rel=2e-3)
    old = shape.layers * shape.size * (6 * shape.width + 4 * shape.mlp)
    assert found > 1.1 * (work.rows * work.tokens * old + copies)


class Live(TorchDispatchMode):
    """The most bytes of tensors alive at once, beside those that were there before."""

    def __init__(self, model):
        super().__init__()
        self.seen = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage):
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(("dtype", "sigma", "checkpointing"), [
    (torch.float32, 0.1, False),
    (torch.bfloat16, 0.0, False),
    (torch.bfloat16, 0.1, True),
])
def test_the_peak_is_that_of_a_step(backbone, catalog, gallery, dtype, sigma, checkpointing):
    """Of forward, loss and backward, within 5% of the estimate."""
    backbone.model.to(dtype)
    pictures = gallery[backbone.family]
    rows = rows_of(backbone, catalog, pictures)
    layers = toy.busy_lora(backbone.model)
    if checkpointing:
        use_checkpointing(backbone)
    batch = collate(backbone, rows, pictures)
    backbone.model.train()
    with Live(backbone.model) as live, lora_noise(backbone.model, sigma):
        logits = forward(backbone, batch)
        answer_log_probs(logits, batch).sum().backward()
    shape, work = shape_and_work(backbone, rows, noise=sigma > 0, checkpointing=checkpointing)
    trained = sum(weight.numel() for weight in toy.weights(layers))
    # Neither the weights nor AdamW's moments come into being in a step; gradients do.
    there = 12 * trained
    expected = step_memory(shape, work, 0, trained).total - there
    assert live.peak == pytest.approx(expected, rel=0.05)


def test_a_compiled_layer_keeps_less(qwen, catalog, gallery):
    """By the partitioner that inductor has, without a C++ compiler."""
    pictures = gallery[qwen.family]
    rows = rows_of(qwen, catalog, pictures)
    toy.busy_lora(qwen.model)
    for layer in language_model(qwen.model).layers:
        layer.compile(backend="aot_eager_decomp_partition")
    shape, work = shape_and_work(qwen, rows, compiled=True)
    qwen.model.train()
    found = kept_by(qwen, collate(qwen, rows, pictures))
    tokens = work.rows * work.tokens
    assert found == pytest.approx(tokens * kept_of_a_token(shape, work), rel=0.01)
    assert tokens * kept_of_a_token(shape, replace(work, compiled=False)) > 1.1 * found


# Qwen2.5-VL-3B: the published shape, bytes of its weights, numbers of an adapter of rank 8.
SHAPE = Shape(36, 2048, 2048, 256, 16, 11008, 151_936, 2)
WEIGHTS, TRAINED = 7_509_245_952, 14_966_784
PACKED = Work(rows=4, tokens=1524, answers=24, packed=True)
MEASURED = {  # GB, on one H100 at 529e433
    "SFT": (27.0, Work(rows=4, tokens=1071, answers=4, packed=False)),
    "DPO": (27.8, Work(rows=4, tokens=1075, answers=8, packed=True, noise=True)),
    "plain DPO": (35.9, PACKED),
    "HaNoRec": (36.0, replace(PACKED, noise=True)),
    "compiled": (29.7, replace(PACKED, noise=True, compiled=True)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_estimate_is_near_what_a_gpu_measured(name):
    measured, work = MEASURED[name]
    assert step_memory(SHAPE, work, WEIGHTS, TRAINED).total / 1e9 == pytest.approx(
        measured, rel=0.02
    )


def test_what_stands_beside_the_activations():
    """By hand: 16 bytes a trained number and 2 for its copy, 4 more with noise; float32 and noise,
    4 + 4.
    """
    assert adapter_bytes(SHAPE, PACKED, 10) == 180
    assert adapter_bytes(SHAPE, replace(PACKED, noise=True), 10) == 220
    wide = replace(SHAPE, size=4)
    assert adapter_bytes(wide, PACKED, 10) == 160
    assert adapter_bytes(wide, replace(PACKED, noise=True), 10) == 240
    on_cpu = step_memory(SHAPE, replace(PACKED, device="cpu"), 0, 0)
    assert step_memory(SHAPE, PACKED, 0, 0).passing - on_cpu.passing == WORKSPACES


def test_tied_weights_count_once_and_none_of_another_device(qwen):
    device = qwen.device
    weights = sum(weight.nbytes for weight in qwen.model.parameters())
    buffers = sum(buffer.nbytes for buffer in qwen.model.buffers())
    assert frozen_bytes(qwen.model, device) == weights + buffers
    assert qwen.model.lm_head.weight is qwen.model.get_input_embeddings().weight
    toy.busy_lora(qwen.model)
    assert frozen_bytes(qwen.model, device) == weights + buffers
    assert frozen_bytes(qwen.model, torch.device("cuda:0")) == 0


def test_the_largest_micro_batch(qwen, catalog, gallery):
    """No more rows side by side than there are; all answers where they are packed, the longest on
    the plain path.
    """
    pictures = gallery[qwen.family]
    short = toy.ranking_row(qwen, catalog, pictures, history=(0,))
    row = toy.ranking_row(qwen, catalog, pictures)
    packed = largest_work(qwen, [short, row], TRAIN, False, False)
    assert (packed.rows, packed.packed) == (2, True)
    assert packed.tokens == len(row.prompt) + row.answer_tokens
    plain = largest_work(qwen, [short, row], TRAIN, True, False)
    longest = max(map(len, row.answers))
    assert (plain.rows, plain.packed, plain.answers) == (4, False, longest)
    assert plain.tokens == len(row.prompt) + longest
    batch = collate(qwen, one_answer_each([row]), pictures)
    assert batch.ids.shape == (2, plain.tokens)


# ---- memory that has run out ----

FULL = {
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "this machine": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
}


def ended(monkeypatch, capsys, command, main):
    """(exit code, stderr) of a command that runs out of memory."""
    monkeypatch.setattr("sys.argv", [command])
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("where", FULL)
def test_a_step_that_runs_out_of_memory_ends_in_a_message(
    launch, monkeypatch, capsys, where
):
    """Of the script itself: one line, exit code 2, with what helps."""
    def step(*_):
        raise FULL[where]

    monkeypatch.setattr(train_sft, "forward", step)
    code, errors = ended(
        monkeypatch, capsys, "train_sft.py", lambda: launch(train_sft.main, *toy.STEPS)
    )
    assert code == 2 and "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith(f"error: the memory of {where} is full ({type(FULL[where]).__name__}")
    assert line.endswith(exhausted.TRAINING)


def test_each_command_names_its_own_flags(monkeypatch, capsys):
    def main():
        raise MemoryError

    for command, remedy in exhausted.REMEDIES.items():
        code, errors = ended(monkeypatch, capsys, f"{command}.py", main)
        assert code == 2 and errors.strip().endswith(remedy)
        known = set(pages.FLAG.findall(pages.help_of("hanorec.recommend")))
        if command != "recommend":
            known = pages.flags_of_script(f"{command}.py")
        assert set(pages.FLAG.findall(remedy)) <= known
    assert ended(monkeypatch, capsys, "export.py", main)[1].strip().endswith(exhausted.OTHERWISE)
    by_name = ended(monkeypatch, capsys, "hanorec train-dpo", main)[1]
    assert by_name.strip().endswith(exhausted.TRAINING)


def test_another_error_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run(main)


def test_what_helps_most_is_named_first():
    """In the order of the estimate, at the default dropout: a quarter of the pixels, 5 images
    instead of 15, and a base divided over 8 GPUs.
    """
    work, size = replace(PACKED, noise=True, dropout=True), 64  # tokens of an image, 2 around it
    layers = SHAPE.layers * layer_bytes(SHAPE)
    helped = {
        "--checkpointing true": (replace(work, checkpointing=True), WEIGHTS),
        "--micro-batch 1": (replace(work, rows=1), WEIGHTS),
        "--max-pixels": (replace(work, tokens=work.tokens - 15 * size * 3 // 4), WEIGHTS),
        "--candidate-images off": (replace(work, tokens=work.tokens - 10 * (size + 2)), WEIGHTS),
        "--lora-dropout 0": (replace(work, dropout=False), WEIGHTS),
        "--shard true": (work, WEIGHTS - layers * 7 // 8 + 2 * layer_bytes(SHAPE)),
    }
    left = {}
    for flag, (changed, weights) in helped.items():
        left[flag] = step_memory(SHAPE, changed, weights, TRAINED).total
    order = sorted(left, key=left.get)
    assert order == sorted(order, key=exhausted.TRAINING.index)
    assert max(left.values()) < step_memory(SHAPE, work, WEIGHTS, TRAINED).total
