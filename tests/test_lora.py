"""LoRA, its noise (HN-9, HN-10), stacks, adapter files and export, on the tiny checkpoints."""

import json
import math
import shutil
from contextlib import contextmanager

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import CheckpointError
from transformers import AutoModelForImageTextToText, AutoTokenizer

from hanorec import export
from hanorec.base.errors import InputError
from hanorec.hars import pair_beta, responsiveness, reward_gap
from hanorec.lora.files import save_adapter, save_policy
from hanorec.lora.layer import (
    LoRALinear,
    adapters_off,
    add_lora,
    language_model,
    lora_layers,
    lora_noise,
)
from hanorec.lora.loading import attach_adapter, attach_policy, load_adapter
from hanorec.lora.merge import collapse_adapters, merge_adapters
from hanorec.lora.stack import base_fingerprint, remove_adapters
from hanorec.losses import dpo_loss, preference_logit
from hanorec.mllm.backbone import use_checkpointing
from hanorec.mllm.load import load_backbone
from hanorec.readings import HARDNESS, NOISES

LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def pair(qwen, catalog, gallery):
    """pair() -> (1, 2) log-probabilities of two answers on Qwen2.5-VL."""
    row = toy.ranking_row(qwen, catalog, gallery["qwen2_5_vl"], (0, 2), (4, 5), (4, 5))
    return lambda: toy.log_probs(qwen, [row], gallery["qwen2_5_vl"])


def clone(layers):
    return [weight.detach().clone() for weight in toy.weights(layers)]


def noise_of(layers):
    """The noise on A and B of each layer, in the order of `toy.weights`."""
    found = []
    for layer in layers:
        found += layer.noise
    return found


def put(layers, values):
    with torch.no_grad():
        for weight, value in zip(toy.weights(layers), values, strict=True):
            weight.copy_(value)


def objective(log_probs):
    """Chosen and rejected pull with different strength, so that their gradients do not merely
    cancel.
    """
    return (log_probs * torch.tensor([[1.0, -0.6]])).sum()


# ---- what add_lora touches ----


def test_only_linears_of_the_language_model(backbone):
    model = backbone.model
    before = dict(model.named_modules())
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    layers = add_lora(model, r=3, alpha=6, dropout=0.1)
    paths = lora_layers(model)
    assert list(paths.values()) == layers and len(layers) == 2 * len(LEAVES)  # two decoder layers
    assert {path.rpartition(".")[2] for path in paths} == LEAVES
    assert all(path.startswith("model.language_model.layers.") for path in paths)
    # everything else is the very same module: vision tower, projector, head, norms
    for name, module in model.named_modules():
        if name in paths:
            assert module.base is before[name] and module.scale == 2 and module.dropout == 0.1
        elif not any(name.startswith(f"{path}.") for path in paths):
            assert module is before[name]
    vision = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear) and "vis" in name
    ]
    assert vision == [] and not isinstance(model.lm_head, LoRALinear)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"{path}.A" for path in paths} | {f"{path}.B" for path in paths}
    for name, weight in model.named_parameters():
        if name not in trained:
            assert torch.equal(weight, weights[name.replace(".base.", ".")])


def test_the_vision_tower_of_qwen_2_5_has_the_same_leaf_names(qwen):
    """Negative control: a choice by leaf name alone would reach into the vision tower."""
    names = {
        name.rpartition(".")[2]
        for name, module in qwen.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "visual" in name
    }
    assert names & LEAVES


def test_fresh_adapter_by_hand(qwen, pair):
    """A: kaiming-uniform (within 1 / sqrt in), B: 0; so it changes nothing, not even a bit."""
    with torch.no_grad():
        plain = pair()
        layers = add_lora(qwen.model, r=8, alpha=32, dropout=0.0)
        assert torch.equal(pair(), plain)
    for layer in layers:
        assert layer.A.shape == (8, layer.in_features)
        assert layer.B.shape == (layer.out_features, 8)
        assert layer.scale == 4
        bound = layer.in_features**-0.5
        assert layer.A.abs().max() <= bound
        assert layer.A.abs().max() > 0.9 * bound
        assert (layer.B == 0).all()


def test_equals_a_dense_weight():
    """y = W x + b + s B A x, by a dense product in float64; a stack adds the second term."""
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 4).double()
    one = LoRALinear(base, 2, 6.0)
    two = LoRALinear(one, 3, 3.0)
    assert one.A.dtype == two.A.dtype == torch.float64
    torch.nn.init.normal_(one.B), torch.nn.init.normal_(two.B)
    x = torch.randn(7, 5, dtype=torch.float64)
    W = base.weight + 3.0 * one.B @ one.A + 1.0 * two.B @ two.A
    torch.testing.assert_close(two(x), x @ W.T + base.bias, atol=1e-12, rtol=0)
    assert LoRALinear(torch.nn.Linear(5, 4).bfloat16(), 2, 6.0).A.dtype == torch.float32


def test_bad_rank_and_no_linear(qwen):
    with pytest.raises(ValueError, match="rank 0"):
        add_lora(qwen.model, r=0)
    with pytest.raises(ValueError, match="no linear"):
        add_lora(torch.nn.Sequential(torch.nn.LayerNorm(3)))


# ---- the reference ----


@pytest.mark.equation("DPO-1", "HN-11")
@pytest.mark.parametrize("sft", [False, True])
def test_first_loss_is_ln_2(backbone, catalog, gallery, sft):
    """Policy = reference: h is exactly 0 with or without a (non-zero) SFT adapter below, in train
    mode without dropout and with sigma = 0. Plain: ln 2 whatever beta is. Normalised (HN-11): ln 2
    times beta0 / beta', by the equation.
    """
    pictures = gallery[backbone.family]
    rows = [
        toy.ranking_row(backbone, catalog, pictures, h, c, c)
        for h, c in [((0, 1), (2, 3)), ((4,), (5, 6)), ((7, 8), (9, 1))]
    ]
    with torch.no_grad():
        base = toy.log_probs(backbone, rows, pictures)
        if sft:
            toy.busy_lora(backbone.model, seed=5)
            # the SFT adapter is not zero
            assert (toy.log_probs(backbone, rows, pictures) - base).abs().min() > 1e-3
        add_lora(backbone.model, dropout=0.0)
        backbone.model.eval()
        with adapters_off(backbone.model):
            ref = toy.log_probs(backbone, rows, pictures)
        backbone.model.train()
    with lora_noise(backbone.model, 0.0):
        h = preference_logit(*toy.log_probs(backbone, rows, pictures).T, *ref.T)
    assert torch.equal(h, torch.zeros(3)) and h.requires_grad
    torch.testing.assert_close(dpo_loss(h, 0.1), torch.full((3,), math.log(2)))
    torch.testing.assert_close(dpo_loss(h, 0.1, normalised_by=0.1), torch.full((3,), math.log(2)))
    for reading in HARDNESS.values():
        lam = reading(torch.tensor([0.1, 0.4, 0.9]))
        eta = responsiveness(reward_gap(h, 0.1))
        assert eta == 1  # all rewards are 0
        beta = pair_beta(lam, eta, 0.1)
        torch.testing.assert_close(dpo_loss(h, beta), torch.full((3,), math.log(2)))
        torch.testing.assert_close(dpo_loss(h, beta, normalised_by=0.1), math.log(2) / lam)


def test_adapters_off_is_what_was_before(qwen, pair):
    model = qwen.model
    with torch.no_grad():
        base = pair()
        toy.busy_lora(model, seed=1)
        sft = pair()
        with adapters_off(model):
            assert torch.equal(pair(), base)
        assert torch.equal(pair(), sft)
        toy.busy_lora(model, seed=2)
        dpo = pair()
        with adapters_off(model):
            assert torch.equal(pair(), sft)  # the top adapter alone is off
            with pytest.raises(RuntimeError), adapters_off(model):
                raise RuntimeError
            assert torch.equal(pair(), sft)  # nested, and left by an exception
        assert torch.equal(pair(), dpo)
        assert min((a - b).abs().min() for a, b in [(base, sft), (sft, dpo), (dpo, base)]) > 1e-3
        remove_adapters(model)
        assert torch.equal(pair(), base) and not lora_layers(model)


def test_one_step_changes_the_top_adapter_alone(qwen, pair):
    toy.busy_lora(qwen.model, seed=1, dropout=0.2)
    layers = add_lora(qwen.model, dropout=0.2)
    top = {id(weight) for weight in toy.weights(layers)}
    before = {name: weight.detach().clone() for name, weight in qwen.model.named_parameters()}
    # an optimizer over everything that wants a gradient, not over a chosen list
    optimizer = torch.optim.AdamW(
        [w for w in qwen.model.parameters() if w.requires_grad], lr=1e-2, weight_decay=0.0
    )
    qwen.model.train()
    for _ in range(2):  # B is 0 at first, so A has no gradient before the second step
        with lora_noise(qwen.model, 0.05):
            objective(pair()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in qwen.model.named_parameters():
        assert torch.equal(weight, before[name]) == (id(weight) not in top), name
        assert weight.grad is None


def test_dropout_is_for_the_trained_adapter_in_training(qwen, pair):
    toy.busy_lora(qwen.model, seed=1, dropout=0.5)
    with torch.no_grad():
        qwen.model.eval()
        calm = pair()
        qwen.model.train()
        assert not torch.equal(pair(), calm)
        toy.busy_lora(qwen.model, seed=2, dropout=0.0)
        with adapters_off(qwen.model):
            # frozen below: part of the reference, so no dropout although in train mode
            assert torch.equal(pair(), calm)


# ---- noise ----


@pytest.mark.equation("HN-9", "HN-10")
@pytest.mark.parametrize("scale", NOISES.values())
def test_noise_equals_replaced_weights(qwen, pair, scale):
    """One draw for chosen and rejected, for two forwards, and for forward and backward: loss and
    gradients are those of a model whose A and B are A + n and B + n.
    """
    toy.busy_lora(qwen.model, seed=1)
    layers = toy.busy_lora(qwen.model, seed=2)
    clean = clone(layers)
    with lora_noise(qwen.model, 0.05, torch.Generator().manual_seed(3), scale):
        noise = [part.clone() for part in noise_of(layers)]
        first, second = pair(), pair()
        assert torch.equal(first, second)
        noisy, grad = first.detach(), toy.gradients(objective(first), layers)
    assert all(torch.equal(a, b) for a, b in zip(toy.weights(layers), clean, strict=True))
    put(layers, [a + n for a, n in zip(clean, noise, strict=True)])
    replaced = pair()
    torch.testing.assert_close(noisy, replaced.detach(), atol=1e-6, rtol=5e-7)
    assert toy.apart(grad, toy.gradients(objective(replaced), layers)) < 1e-6
    put(layers, clean)
    plain = pair()
    assert (noisy - plain.detach()).abs().max() > 1e-3
    assert toy.apart(grad, toy.gradients(objective(plain), layers)) > 1e-2


@pytest.mark.equation("HN-10")
def test_noise_is_on_the_top_adapter_only(qwen, pair):
    below = toy.busy_lora(qwen.model, seed=1)
    above = toy.busy_lora(qwen.model, seed=2)
    with torch.no_grad():
        with adapters_off(qwen.model):
            reference = pair()
        with lora_noise(qwen.model, 0.1):
            assert all(layer.noise is None for layer in below)
            assert all(layer.noise is not None for layer in above)
            with adapters_off(qwen.model):
                assert torch.equal(pair(), reference)  # the reference is clean inside the block too


@pytest.mark.equation("HN-9")
def test_size_of_the_noise(qwen):
    """absolute: standard deviation sigma on A and on B. relative: sigma times the RMS of A and of
    B, or of a fresh A, which is 1 / sqrt(3 in), while B is smaller than that.
    """
    layers = add_lora(qwen.model, r=8, dropout=0.0)
    with torch.no_grad():
        layers[0].B.fill_(2.0)  # RMS 2; the other B stay 0

    def drawn(name):
        with lora_noise(qwen.model, 0.1, torch.Generator().manual_seed(0), NOISES[name]):
            return [layer.noise for layer in layers]

    absolute, relative = drawn("absolute"), drawn("relative")
    every = torch.cat([torch.cat([a.flatten(), b.flatten()]) for a, b in absolute])
    # standard error of a deviation from n draws: sigma / sqrt(2 n); five of them
    assert abs(every.std() - 0.1) < 5 * 0.1 / (2 * len(every)) ** 0.5
    assert abs(every.mean()) < 5 * 0.1 / len(every) ** 0.5
    for i, (layer, a, b) in enumerate(zip(layers, absolute, relative, strict=True)):
        fresh = (3 * layer.in_features) ** -0.5
        torch.testing.assert_close(
            b[0], a[0] * layer.A.detach().square().mean().sqrt(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(b[1], a[1] * (2.0 if i == 0 else fresh), rtol=1e-5, atol=0)


def test_seeds_of_the_noise(qwen):
    layers = add_lora(qwen.model, r=2)

    def drawn(generator):
        with lora_noise(qwen.model, 0.1, generator):
            return torch.cat([part.flatten() for part in noise_of(layers)])

    generator = torch.Generator().manual_seed(7)
    one, two = drawn(generator), drawn(generator)
    assert torch.equal(one, drawn(torch.Generator().manual_seed(7)))
    assert not torch.equal(one, two)
    assert not torch.equal(one, drawn(torch.Generator().manual_seed(8)))
    torch.manual_seed(4)
    state = torch.get_rng_state()
    drawn(torch.Generator().manual_seed(7))
    # a generator of its own leaves torch's global one alone
    assert torch.equal(state, torch.get_rng_state())


def test_noise_leaves_no_trace(qwen, pair):
    layers = toy.busy_lora(qwen.model)
    before = clone(layers)
    with torch.no_grad():
        plain = pair()
        with lora_noise(qwen.model, 0.3):
            assert not torch.equal(pair(), plain)
        assert torch.equal(pair(), plain)
        with pytest.raises(KeyError), lora_noise(qwen.model, 0.3):
            raise KeyError
        assert torch.equal(pair(), plain)
        nested = pytest.raises(RuntimeError, match="lora_noise inside lora_noise")
        with lora_noise(qwen.model, 0.3), nested, lora_noise(qwen.model, 0.1):
            pass
        assert torch.equal(pair(), plain) and all(layer.noise is None for layer in layers)
        negative = pytest.raises(ValueError, match="strength -0.1: expected sigma >= 0")
        with negative, lora_noise(qwen.model, -0.1):
            pass
    assert all(torch.equal(a, b) for a, b in zip(toy.weights(layers), before, strict=True))


@contextmanager
def noisy_loss(qwen, pair):
    with lora_noise(qwen.model, 0.05, torch.Generator().manual_seed(3)):
        yield objective(pair())


def noisy_gradients(qwen, pair, layers):
    with noisy_loss(qwen, pair) as loss:
        return loss.item(), toy.gradients(loss, layers)


def recorded_layers(model):
    """Counts forwards of one LoRA layer: with checkpointing it runs again in backward."""
    calls = []
    next(iter(lora_layers(model).values())).register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.equation("HN-9")
@pytest.mark.parametrize("stack", [False, True])
def test_noise_is_exact_under_checkpointing(qwen, pair, stack):
    """Same loss and gradients with and without non-reentrant activation checkpointing, noise on."""
    if stack:
        toy.busy_lora(qwen.model, seed=1)
    layers = toy.busy_lora(qwen.model, seed=2)
    qwen.model.train()
    calls = recorded_layers(qwen.model)
    loss, grad = noisy_gradients(qwen, pair, layers)
    assert len(calls) == 1
    use_checkpointing(qwen)
    again, checkpointed = noisy_gradients(qwen, pair, layers)
    assert len(calls) == 3  # forward, and once more in backward: checkpointing is really on
    assert again == loss
    assert toy.apart(checkpointed, grad) < 1e-6
    # the frozen input stays out of the graph
    assert not qwen.model.get_input_embeddings()(torch.tensor([1])).requires_grad


@pytest.mark.equation("HN-9")
def test_backward_outside_the_block_is_wrong(qwen, pair):
    """Negative control: once the draw is gone, the recomputed forward is another one, and so are
    the gradients.
    """
    layers = toy.busy_lora(qwen.model, seed=2)
    qwen.model.train()
    _, grad = noisy_gradients(qwen, pair, layers)
    with noisy_loss(qwen, pair) as loss:
        pass
    # without checkpointing the graph has kept the noisy weights
    assert toy.apart(toy.gradients(loss, layers), grad) < 1e-6
    use_checkpointing(qwen)
    with noisy_loss(qwen, pair) as loss:
        pass
    try:
        outside = toy.gradients(loss, layers)
    except CheckpointError:
        return  # PyTorch noticed it
    assert toy.apart(outside, grad) > 1e-2


# ---- files ----


@pytest.fixture
def saved(qwen, tmp_path):
    """(model with one busy adapter, its folder)."""
    toy.busy_lora(qwen.model, seed=3, r=4, alpha=8.0, dropout=0.05)
    save_adapter(qwen.model, tmp_path / "adapter", "some/base", stage="sft")
    return qwen.model, tmp_path / "adapter"


def bare(checkpoints, family="qwen2_5_vl"):
    return load_backbone(str(checkpoints[family]), "float32", "cpu").model


def test_round_trip_is_bit_exact(backbone, checkpoints, tmp_path, catalog, gallery):
    """Two adapters, saved and loaded in order: every weight and every log-probability is the same
    to the bit.
    """
    pictures = gallery[backbone.family]
    row = toy.ranking_row(backbone, catalog, pictures)
    sft = toy.busy_lora(backbone.model, seed=3, r=4, alpha=10.0, dropout=0.1)
    save_adapter(backbone.model, tmp_path / "sft", "base")
    dpo = toy.busy_lora(backbone.model, seed=4, r=2, alpha=3.0)
    save_policy(backbone.model, tmp_path / "dpo", "base", below=tmp_path / "sft", stage="dpo")
    shutil.rmtree(tmp_path / "sft")  # the policy's folder is whole by itself
    other = load_backbone(str(checkpoints[backbone.family]), "float32", "cpu")
    attach_policy(other.model, tmp_path / "dpo")
    top = list(lora_layers(other.model).values())
    for ours, theirs in ((dpo, top), (sft, [layer.base for layer in top])):
        assert all(
            torch.equal(a, b) for a, b in zip(toy.weights(ours), toy.weights(theirs), strict=True)
        )
        assert all(
            (a.scale, a.dropout) == (b.scale, b.dropout) for a, b in zip(ours, theirs, strict=True)
        )
    with torch.no_grad():
        assert torch.equal(
            toy.log_probs(other, [row], pictures), toy.log_probs(backbone, [row], pictures)
        )
    assert json.loads((tmp_path / "dpo" / "hanorec.json").read_text())["stage"] == "dpo"


def test_files_say_what_peft_expects(saved):
    """Keys, shapes and configuration of PEFT's format, by the book."""
    model, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(LEAVES)
    key = "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_"
    assert tensors[f"{key}A.weight"].shape == (4, 192)
    assert tensors[f"{key}B.weight"].shape == (64, 4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    import re
    linears = {
        name
        for name, module in language_model(model).named_modules()
        if isinstance(module, LoRALinear)
    }
    chosen = {
        name for name, _ in model.named_modules() if re.fullmatch(config["target_modules"], name)
    }
    assert chosen == {f"model.language_model.{name}" for name in linears}


def test_load_adapter_adds_lora_if_need_be(saved, checkpoints):
    model, folder = saved
    other = bare(checkpoints)
    load_adapter(other, folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            toy.weights(lora_layers(other).values()), toy.weights(lora_layers(model).values()),
            strict=True,
        )
    )


def rewrite(change):
    """Change the tensors and drop hanorec.json, whose hash would complain first."""
    def apply(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "hanorec.json").unlink()
    return apply


def configure(**values):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return apply


def flip_a_byte(folder):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "file", "parts"),
    [(rewrite(lambda t: t.pop(KEY)), "adapter_model.safetensors",
      ["1 tensors are missing", KEY, "another base model"]),
     (rewrite(lambda t: t.update(extra=torch.ones(1))), "adapter_model.safetensors",
      ["1 tensors have no place", "extra"]),
     (rewrite(lambda t: t[KEY].__setitem__((0, 0), math.nan)), "adapter_model.safetensors",
      [KEY, "NaN", "use an earlier adapter"]),
     (rewrite(lambda t: t[KEY].__setitem__((0, 0), math.inf)), "adapter_model.safetensors",
      [KEY, "infinity", "use an earlier adapter"]),
     (rewrite(lambda t: t.update({KEY: t[KEY][:, :5].contiguous()})),
      "adapter_model.safetensors", [KEY, "(4, 5)", "(4, 64)", "another base"]),
     (rewrite(lambda t: t.update({KEY: t[KEY].int()})), "adapter_model.safetensors",
      [KEY, "int32", "expected floats"]),
     (configure(r=2, lora_alpha=4), "adapter_model.safetensors",
      ["(4, ", "expected", "(2, ...)", "rank"]),
     (configure(r=0), "adapter_config.json", ["r = 0", "expected numbers", "remake"]),
     (configure(lora_alpha="8"), "adapter_config.json", ["lora_alpha = '8'", "remake"]),
     (configure(use_dora=True), "adapter_config.json", ["use_dora = True", "only plain LoRA"]),
     (configure(use_rslora=True), "adapter_config.json",
      ["use_rslora = True", "only plain LoRA"]),
     (configure(rank_pattern={"q_proj": 2}), "adapter_config.json",
      ["rank_pattern", "only plain LoRA"]),
     (configure(bias="all"), "adapter_config.json", ["bias = 'all'", "only plain LoRA"]),
     (configure(peft_type="IA3"), "adapter_config.json",
      ["peft_type = 'IA3'", "only plain LoRA"]),
     (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json",
      ["JSON", "remake"]),
     (flip_a_byte, "adapter_model.safetensors", ["hash differs", "save it again"]),
     (truncate, "adapter_model.safetensors",
      ["not a whole safetensors file", "save the adapter again"]),
     (lambda folder: (folder / "adapter_model.safetensors").unlink(),
      "adapter_model.safetensors", ["no such file", "adapter folder"]),
     (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json",
      ["no such file", "check the path"])],
)
def test_loading_is_strict(saved, checkpoints, change, file, parts):
    _, folder = saved
    change(folder)
    model = bare(checkpoints)
    with pytest.raises(InputError) as caught:
        attach_adapter(model, folder)
    text = str(caught.value)
    assert all(part in text for part in [str(folder / file), *parts]), text
    assert all((layer.B == 0).all() for layer in lora_layers(model).values())  # nothing was loaded


def test_another_base_is_refused(saved, make, checkpoints):
    """Same shapes, other weights; and another family altogether."""
    _, folder = saved
    stranger = load_backbone(str(make("qwen2_5_vl", seed=1)), "float32", "cpu").model
    for model in (stranger, bare(checkpoints, "llava_next")):
        with pytest.raises(InputError) as caught:
            attach_adapter(model, folder)
        assert str(folder) in str(caught.value)
        assert "another base (some/base)" in str(caught.value)
        assert "load that base" in str(caught.value)


def test_the_dtype_of_the_base_does_not_matter(saved, checkpoints):
    _, folder = saved
    model = load_backbone(str(checkpoints["qwen2_5_vl"]), "bfloat16", "cpu").model
    attach_adapter(model, folder)
    assert next(iter(lora_layers(model).values())).A.dtype == torch.float32


def test_rank_of_the_model_must_fit(saved, checkpoints):
    _, folder = saved
    for options, scale in (
        ({"r": 2, "alpha": 4.0}, "rank 2"),
        ({"r": 4, "alpha": 4.0}, "scale 1.0"),
    ):
        model = bare(checkpoints)
        add_lora(model, **options)
        with pytest.raises(InputError) as caught:
            load_adapter(model, folder)
        assert str(folder) in str(caught.value)
        assert scale in str(caught.value)
        assert "rank 4, scale 2.0" in str(caught.value)
        assert "add LoRA with the adapter's own r and alpha" in str(caught.value)


def test_order_of_the_stack(saved, checkpoints, tmp_path):
    """SFT then DPO loads; DPO alone, DPO first, SFT twice, and DPO on another SFT are refused."""
    model, sft = saved
    toy.busy_lora(model, seed=9)
    save_adapter(model, tmp_path / "dpo", "some/base")
    other = bare(checkpoints)
    toy.busy_lora(other, seed=10)
    save_adapter(other, tmp_path / "other", "some/base")
    good = bare(checkpoints)
    for folder in (sft, tmp_path / "dpo"):
        attach_adapter(good, folder)
    for order in ([tmp_path / "dpo"], [sft, sft], [tmp_path / "other", tmp_path / "dpo"]):
        wrong = bare(checkpoints)
        for folder in order[:-1]:
            attach_adapter(wrong, folder)
        with pytest.raises(InputError) as caught:
            attach_adapter(wrong, order[-1])
        assert str(order[-1]) in str(caught.value)
        assert "in the order in which they were trained" in str(caught.value)


def test_save_without_an_adapter(qwen, tmp_path):
    with pytest.raises(ValueError, match="call add_lora first"):
        save_adapter(qwen.model, tmp_path, "base")
    assert list(tmp_path.iterdir()) == []


# ---- export ----


@pytest.fixture
def stack(backbone, tmp_path):
    """(backbone with two busy adapters, folder of the policy)."""
    toy.busy_lora(backbone.model, seed=3, r=4, alpha=10.0)
    save_adapter(backbone.model, tmp_path / "sft", backbone.path)
    toy.busy_lora(backbone.model, seed=4, r=2, alpha=3.0)
    save_policy(backbone.model, tmp_path / "dpo", backbone.path, below=tmp_path / "sft")
    backbone.model.eval()
    return backbone, tmp_path / "dpo"


def test_collapse_and_merge_equal_the_stack(stack, catalog, gallery):
    backbone, _ = stack
    pictures = gallery[backbone.family]
    row = toy.ranking_row(backbone, catalog, pictures)
    with torch.no_grad():
        stacked = toy.log_probs(backbone, [row], pictures)
        collapse_adapters(backbone.model)
        layer = next(iter(lora_layers(backbone.model).values()))
        assert layer.r == 6 and layer.scale == 1 and isinstance(layer.base, torch.nn.Linear)
        torch.testing.assert_close(
            toy.log_probs(backbone, [row], pictures), stacked, atol=1e-5, rtol=5e-7
        )
        merge_adapters(backbone.model)
        assert not lora_layers(backbone.model)
        torch.testing.assert_close(
            toy.log_probs(backbone, [row], pictures), stacked, atol=1e-5, rtol=5e-7
        )


def test_exported_folders_load_and_score_alike(stack, catalog, gallery, checkpoints, tmp_path):
    """python -m hanorec.export: one adapter, named by one folder or layer by layer, and a merged
    model that loads by itself.
    """
    backbone, policy = stack
    pictures = gallery[backbone.family]
    row = toy.ranking_row(backbone, catalog, pictures)
    common = ["--model", backbone.path]
    export.main([*common, "--adapter", str(policy), "--out", str(tmp_path / "one")])
    export.main([
        *common, "--adapter", str(tmp_path / "sft"), "--adapter", str(policy),
        "--out", str(tmp_path / "two"),
    ])
    export.main([
        *common, "--adapter", str(policy), "--out", str(tmp_path / "merged"), "--merge",
        "--dtype", "float32",
    ])
    with torch.no_grad():
        stacked = toy.log_probs(backbone, [row], pictures)
        for name in ("one", "two"):
            other = load_backbone(str(checkpoints[backbone.family]), "float32", "cpu")
            attach_policy(other.model, tmp_path / name)
            assert not any(
                isinstance(layer.base, LoRALinear) for layer in lora_layers(other.model).values()
            )
            torch.testing.assert_close(
                toy.log_probs(other, [row], pictures), stacked, atol=1e-5, rtol=5e-7
            )
        merged = load_backbone(str(tmp_path / "merged"), "float32", "cpu")
        assert merged.family == backbone.family and merged.template == backbone.template
        again = toy.ranking_row(merged, catalog, pictures)
        assert again.prompt == row.prompt and again.answers == row.answers
        torch.testing.assert_close(
            toy.log_probs(merged, [again], pictures), stacked, atol=1e-5, rtol=5e-7
        )
    with pytest.raises(InputError, match="not an empty folder"):
        export.main([*common, "--adapter", str(policy), "--out", str(tmp_path / "one")])


def test_transformers_generates_with_what_is_merged(stack, tmp_path):
    """Loaded as its card says, without any code of ours: the tokens that the stack writes. The
    bare base writes others.
    """
    backbone, policy = stack
    out = tmp_path / "merged"
    export.main([
        "--model", backbone.path, "--adapter", str(policy), "--out", str(out), "--merge",
        "--dtype", "float32",
    ])
    card = (out / "README.md").read_text()
    assert f"# `{backbone.path}` with an adapter of hanorec merged into it" in card
    assert 'AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")' in card

    words = AutoTokenizer.from_pretrained(out)("The user has seen", return_tensors="pt")

    def writes(model, **more):
        model.eval()
        how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        return model.generate(**words, **how, **more)[0].tolist()

    written = writes(AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32))
    bare = AutoModelForImageTextToText.from_pretrained(backbone.path, dtype=torch.float32)
    # Our attention reads whole rows.
    assert written == writes(backbone.model, use_cache=False) != writes(bare)


def test_fingerprint_tells_bases_and_stacks_apart(checkpoints, make):
    prints = set()
    for path in (checkpoints["qwen2_5_vl"], checkpoints["qwen2_vl"], make("qwen2_5_vl", seed=2)):
        model = load_backbone(str(path), "float32", "cpu").model
        add_lora(model)
        prints.add(base_fingerprint(model))
        toy.busy_lora(model, seed=1)
        prints.add(base_fingerprint(model))
        add_lora(model)
        prints.add(base_fingerprint(model))
    assert len(prints) == 9
