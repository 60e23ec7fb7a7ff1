r"""HN-9 and HN-10 against the oracle: the LoRA layer, its noise, one draw for forward and backward,
the clean reference.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from hanorec.lora.layer import LoRALinear, adapters_off, add_lora, lora_noise
from hanorec.lora.merge import collapse_adapters, merge_adapters
from hanorec.losses import dpo_loss, preference_logit, token_log_probs
from hanorec.readings import NOISES, rms

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def filled(layer, seed):
    """Give a layer an A and a B as after training: B is zero when fresh."""
    with torch.no_grad():
        layer.A.copy_(0.3 * normal(*layer.A.shape, seed=seed))
        layer.B.copy_(0.3 * normal(*layer.B.shape, seed=seed + 1))
    return layer


def network(dtype=torch.float64, dropout=0.0):
    """5 -> 6 -> 4 with a tanh between, both linears adapted (r = 2, alpha = 6, so scale 3), A and B
    nonzero.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False)).to(dtype)
    for seed, layer in enumerate(add_lora(model, r=2, alpha=6, dropout=dropout)):
        filled(layer, 10 * seed)
    return model


def oracle_layer(layer, x, noise=(0, 0), scale=None):
    bias = None if layer.base.bias is None else layer.base.bias.tolist()
    A, B = layer.A.tolist(), layer.B.tolist()
    return oracle.lora_forward(
        x, layer.base.weight.tolist(), bias, A, B, layer.scale if scale is None else scale, *noise
    )


def oracle_network(model, x, noisy=True, scale=None):
    """The two layers of `network` by the oracle, with the noise they hold now unless noisy is
    False.
    """
    noise = [layer.noise if noisy and layer.noise else (0, 0) for layer in (model[0], model[2])]
    return oracle_layer(
        model[2], np.tanh(oracle_layer(model[0], x.tolist(), noise[0], scale)), noise[1], scale
    )


# ---- the layer ----


@pytest.mark.equation("HN-10")
@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_layer_matches_the_oracle(bias, dtype):
    """A batch of shape (2, 3, 7), rank 3, scale alpha / r = 12 / 3 = 4; clean and with given noise.
    """
    layer = filled(LoRALinear(nn.Linear(7, 5, bias=bias).to(dtype), r=3, alpha=12), 1)
    assert layer.scale == 4
    x = normal(2, 3, 7, seed=2, dtype=dtype)
    flat = x.reshape(6, 7).tolist()
    np.testing.assert_allclose(
        layer(x).detach().reshape(6, 5), oracle_layer(layer, flat), atol=TOLERANCE[dtype]
    )
    layer.noise = (normal(3, 7, seed=3, dtype=dtype), normal(5, 3, seed=4, dtype=dtype))
    y = layer(x)
    assert y.shape == (2, 3, 5) and y.dtype == dtype
    np.testing.assert_allclose(
        y.detach().reshape(6, 5), oracle_layer(layer, flat, layer.noise),
        atol=10 * TOLERANCE[dtype]
    )


@pytest.mark.equation("HN-10")
def test_a_fresh_adapter_changes_nothing():
    """B = 0; A is uniform on +- 1 / sqrt(in), so its RMS is near 1 / sqrt(3 in) = 0.0361 for 256
    inputs (64 x 256 entries).
    """
    torch.manual_seed(1)
    base = nn.Linear(256, 8)
    layer = LoRALinear(base, r=64, alpha=32)
    x = normal(4, 256, seed=5, dtype=torch.float32)
    assert torch.equal(layer(x), base(x))
    assert layer.A.abs().max() <= 1 / 16
    assert rms(layer.A) == pytest.approx(1 / math.sqrt(3 * 256), rel=0.02)


@pytest.mark.equation("HN-10")
@pytest.mark.parametrize("noisy", [False, True])
def test_layer_gradcheck(noisy):
    """In x, A and B; the noise moves the point at which the derivative is taken and is no variable
    itself.
    """
    layer = LoRALinear(nn.Linear(4, 3).double().requires_grad_(False), r=2, alpha=6)
    if noisy:
        layer.noise = (normal(2, 4, seed=6), normal(3, 2, seed=7))
    values = [
        normal(*shape, seed=seed).requires_grad_()
        for seed, shape in enumerate([(5, 4), (2, 4), (3, 2)])
    ]

    def forward(x, A, B):
        return torch.func.functional_call(layer, {"A": A, "B": B}, (x,))

    assert gradcheck(forward, values)


@pytest.mark.equation("HN-10")
def test_gradients_are_those_of_the_noisy_weights():
    """y = W x + s B' A' x: dL/dB = s (dL/dy) (A' x)^T and dL/dA = s B'^T (dL/dy) x^T, both with the
    noise in. Control: the clean weights give other gradients.
    """
    layer = filled(LoRALinear(nn.Linear(4, 3).double().requires_grad_(False), r=2, alpha=6), 8)
    x, g = normal(4, seed=9), normal(3, seed=10)
    with lora_noise(nn.Sequential(layer), 0.3, generator(11)):
        (g * layer(x[None])[0]).sum().backward()
        A, B = (layer.A + layer.noise[0]).detach(), (layer.B + layer.noise[1]).detach()
    np.testing.assert_allclose(layer.B.grad, 3 * torch.outer(g, A @ x), atol=1e-13)
    np.testing.assert_allclose(layer.A.grad, 3 * torch.outer(B.T @ g, x), atol=1e-13)
    assert (layer.B.grad - 3 * torch.outer(g, layer.A.detach() @ x)).abs().max() > 1e-2


@pytest.mark.equation("HN-10")
def test_only_a_and_b_get_gradients():
    model = network()
    with lora_noise(model, 0.1, generator(12)):
        model(normal(3, 5, seed=13)).square().sum().backward()
    with_grad = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert with_grad == {"0.A", "0.B", "2.A", "2.B"}


@pytest.mark.equation("HN-10")
def test_bfloat16_base_keeps_float32_adapters():
    """The output is bfloat16 (8 bits, so within 2 percent); A and B stay float32, where an update
    of 1e-4 of 1 is not lost.
    """
    layer = filled(LoRALinear(nn.Linear(7, 5).to(torch.bfloat16), r=2, alpha=4), 14)
    x = normal(6, 7, seed=15, dtype=torch.bfloat16)
    y = layer(x)
    assert (y.dtype, layer.A.dtype, layer.B.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    expected = oracle_layer(layer, x.tolist())
    np.testing.assert_allclose(y.detach().float(), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.equation("HN-10")
def test_dropout_touches_only_a_trainable_adapter_in_training():
    """Evaluation and a frozen adapter (part of the reference) match the oracle; training does not,
    but keeps the mean: 4000 draws at p = 0.5, so the standard error is 1 / 63 of one draw's.
    """
    layer = filled(LoRALinear(nn.Linear(7, 5).double(), r=2, alpha=4, dropout=0.5), 16)
    x = normal(1, 7, seed=17)
    expected = oracle_layer(layer, x.tolist())
    np.testing.assert_allclose(layer.eval()(x).detach(), expected, atol=1e-12)
    torch.manual_seed(2)
    draws = layer.train()(x.expand(4000, 7)).detach()
    assert draws.std(0).min() > 0.01
    assert ((draws.mean(0) - torch.tensor(expected[0])).abs() < 5 * draws.std(0) / 4000**0.5).all()
    layer.requires_grad_(False)
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-12)


# ---- the noise ----


@pytest.mark.equation("HN-9")
@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("fresh", [True, False])
def test_scale_of_the_noise(name, fresh):
    """The same draw in all cases, so noise / eps is exactly the oracle's scale: sigma, or sigma
    times the RMS; B of a fresh adapter is zero and takes the RMS of a fresh A, 1 / sqrt(3 * 30).
    """
    layer = LoRALinear(nn.Linear(30, 20).double(), r=4, alpha=16)
    if not fresh:
        filled(layer, 18)
    draw = generator(19)
    eps_A, eps_B = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 30), (20, 4))
    )
    scale_A = scale_B = 0.05
    if name == "relative":
        scale_A = oracle.noise_scale_A(0.05, layer.A.tolist())
        scale_B = oracle.noise_scale_B(0.05, layer.B.tolist(), 30)
        assert (scale_B == pytest.approx(0.05 / math.sqrt(90))) == fresh
    with lora_noise(nn.Sequential(layer), 0.05, generator(19), NOISES[name]):
        np.testing.assert_allclose(layer.noise[0], scale_A * eps_A, rtol=1e-12)
        np.testing.assert_allclose(layer.noise[1], scale_B * eps_B, rtol=1e-12)


@pytest.mark.equation("HN-9")
@DTYPES
def test_the_noise_is_standard_normal_times_sigma(dtype):
    """64 x 256 entries: mean within 4 / 128 and std within 4 / 181 of a standard normal's, kurtosis
    3 within 4 * sqrt(24) / 128; the noises of two layers, and of A and B, are uncorrelated.
    """
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).to(dtype)
    first, second = add_lora(model, r=64)
    with lora_noise(model, 0.05, generator(20)):
        draws = [n.flatten() / 0.05 for n in (*first.noise, *second.noise)]
    for eps in draws:
        assert eps.dtype == dtype and len(eps) == 64 * 256
        assert abs(eps.mean()) < 4 / 128 and abs(eps.std() - 1) < 4 / 181
        assert abs((eps**4).mean() - 3) < 4 * math.sqrt(24) / 128 + 0.01
    correlation = np.corrcoef(torch.stack(draws))
    assert np.abs(correlation - np.eye(4)).max() < 4 / 128


@pytest.mark.equation("HN-9")
@DTYPES
def test_sigma_zero_is_exactly_lora(dtype):
    """And it draws nothing: the generator has not moved. Control: sigma 0.05 changes the output."""
    model, x, draw = network(dtype), normal(3, 5, seed=21, dtype=dtype), generator(22)
    clean, state = model(x), draw.get_state()
    with lora_noise(model, 0.0, draw):
        assert torch.equal(model(x), clean)
    assert torch.equal(draw.get_state(), state)
    with lora_noise(model, 0.05, draw):
        assert (model(x) - clean).abs().max() > 1e-3
    assert not torch.equal(draw.get_state(), state)


@pytest.mark.equation("HN-9")
def test_noise_leaves_no_trace():
    """After the block, also after one that fails, weights and outputs are bit for bit what they
    were.
    """
    model, x = network(), normal(3, 5, seed=23)
    clean, weights = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), lora_noise(model, 0.1, generator(24)):
        raise ZeroDivisionError
    with lora_noise(model, 0.1, generator(24)):
        model(x)
        # the noise is never saved with an adapter
        assert model.state_dict().keys() == weights.keys()
    assert torch.equal(model(x), clean)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.equation("HN-9")
def test_one_draw_a_block_and_a_new_one_in_the_next():
    """Both answers of a pair are computed with one draw; the next block, same generator, draws
    anew; same seed, same draw.
    """
    model, x, draw = network(), normal(3, 5, seed=25), generator(26)
    with lora_noise(model, 0.1, draw):
        first, again = model(x), model(x)
    with lora_noise(model, 0.1, draw):
        second = model(x)
    with lora_noise(model, 0.1, generator(26)):
        repeated = model(x)
    assert torch.equal(first, again) and torch.equal(first, repeated)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.equation("HN-9")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_sees_the_same_draw_in_backward(use_reentrant):
    """With backward inside the block the gradients equal those without checkpointing. Control: with
    backward after it, the recomputed forward is clean and the gradients are wrong, so this test
    would notice.
    """
    model = network()
    x = normal(3, 5, seed=27).requires_grad_()

    def gradients(checkpointed, inside):
        model.zero_grad()
        with lora_noise(model, 0.3, generator(28)):
            y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
            if inside:
                y.square().sum().backward()
        if not inside:
            y.square().sum().backward()
        return torch.cat([layer.A.grad.flatten() for layer in (model[0], model[2])])

    plain = gradients(False, True)
    assert torch.equal(gradients(True, True), plain)
    assert torch.equal(gradients(False, False), plain)
    assert (gradients(True, False) - plain).abs().max() > 1e-3


@pytest.mark.equation("HN-9")
def test_misuse_of_the_noise():
    """A draw inside a draw would lose the outer one; a negative strength is refused with its value;
    a scale that fails leaves no noise behind, not even on the layers that had theirs.
    """
    model = network()
    with lora_noise(model, 0.1, generator(29)):
        outer = model[0].noise
        with pytest.raises(RuntimeError, match="inside"), lora_noise(model, 0.1):
            pass
        assert model[0].noise is outer
    with pytest.raises(ValueError, match=r"strength -0\.1"), lora_noise(model, -0.1):
        pass

    def failing(layer):
        return {5: (1.0, 1.0)}[layer.in_features]  # the second layer has 6

    with pytest.raises(KeyError), lora_noise(model, 0.1, scale=failing):
        pass
    assert model[0].noise is None and model[2].noise is None


# ---- the policy, the reference, and the loss under noise ----


@pytest.mark.equation("HN-10")
@DTYPES
def test_noisy_policy_matches_the_oracle(dtype):
    """Two adapted layers and the nonlinearity between: logits under A', B', and the softmax of
    them.
    """
    model, x = network(dtype), normal(3, 5, seed=30, dtype=dtype)
    with lora_noise(model, 0.2, generator(31)), torch.no_grad():
        logits = model(x)
        expected = oracle_network(model, x)
        clean = oracle_network(model, x, noisy=False)
    np.testing.assert_allclose(logits, expected, atol=10 * TOLERANCE[dtype])
    probabilities = [oracle.softmax(row) for row in expected]
    np.testing.assert_allclose(logits.softmax(1), probabilities, atol=10 * TOLERANCE[dtype])
    assert np.abs(expected - clean).max() > 0.1


@pytest.mark.equation("HN-10")
def test_the_reference_is_clean_also_inside_the_noise():
    """adapters_off is the base alone: no adapter, no noise; afterwards the policy is back. Also
    after an error.
    """
    model, x = network(), normal(3, 5, seed=32)
    base = oracle_network(model, x, noisy=False, scale=0)
    with lora_noise(model, 0.3, generator(33)), torch.no_grad():
        noisy = model(x)
        with adapters_off(model):
            np.testing.assert_allclose(model(x), base, atol=1e-12)
        assert torch.equal(model(x), noisy)
        with adapters_off(model):
            with adapters_off(model):
                pass
            # the inner block does not switch the outer one's back on
            np.testing.assert_allclose(model(x), base, atol=1e-12)
        with pytest.raises(ZeroDivisionError), adapters_off(model):
            raise ZeroDivisionError
        assert torch.equal(model(x), noisy)


@pytest.mark.equation("HN-10")
def test_in_a_stack_only_the_top_adapter_is_noisy():
    """Base + frozen SFT adapter (r = 2, scale 3) + DPO adapter (r = 3, scale 2): y = SFT(x) + 2 B'
    A' x; the reference is SFT(x).
    """
    model = nn.Sequential(nn.Linear(5, 4).double())
    (sft,) = add_lora(model, r=2, alpha=6, dropout=0)
    (dpo,) = add_lora(model, r=3, alpha=6, dropout=0)
    filled(sft, 34), filled(dpo, 36)
    x = normal(6, 5, seed=38)
    reference = oracle_layer(sft, x.tolist())
    zeros = np.zeros((4, 5))
    with lora_noise(model, 0.3, generator(39)), torch.no_grad():
        assert sft.noise is None and dpo.noise is not None
        update = oracle.lora_forward(
            x.tolist(), zeros, None, dpo.A.tolist(), dpo.B.tolist(), 2, *dpo.noise
        )
        np.testing.assert_allclose(model(x), reference + update, atol=1e-12)
        with adapters_off(model):
            np.testing.assert_allclose(model(x), reference, atol=1e-12)
    assert not sft.A.requires_grad and dpo.A.requires_grad


@pytest.mark.equation("HN-10")
def test_collapsing_and_merging_keep_the_function():
    """The clean policy, which is what evaluation and an export use: a stack as one adapter, then as
    one weight.
    """
    model = nn.Sequential(nn.Linear(5, 4).double())
    for seed, r in ((40, 2), (42, 3)):
        filled(add_lora(model, r=r, alpha=6, dropout=0)[0], seed)
    x = normal(6, 5, seed=44)
    expected = model(x).detach()
    collapse_adapters(model)
    np.testing.assert_allclose(model(x).detach(), expected, atol=1e-13)
    np.testing.assert_allclose(oracle_layer(model[0], x.tolist()), expected, atol=1e-12)
    merge_adapters(model)
    assert type(model[0]) is nn.Linear
    np.testing.assert_allclose(model(x).detach(), expected, atol=1e-13)


@pytest.mark.equation("HN-11")
def test_policy_equal_to_reference_and_no_noise_gives_ln_2():
    """A fresh adapter: h is exactly 0. Control: noise on the same fresh adapter moves h off 0,
    because B' is no longer zero.
    """
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    add_lora(model)
    # two tokens each for w and for l
    x, tokens = normal(4, 5, seed=45, dtype=torch.float32), torch.tensor([[0, 1], [2, 3]])

    def preference(sigma):
        with lora_noise(model.eval(), sigma, generator(46)), torch.no_grad():
            policy = token_log_probs(model(x).view(2, 2, 4), tokens).sum(1)
            with adapters_off(model):
                reference = token_log_probs(model(x).view(2, 2, 4), tokens).sum(1)
        return preference_logit(policy[:1], policy[1:], reference[:1], reference[1:])

    assert preference(0.0).item() == 0
    assert dpo_loss(preference(0.0), torch.tensor([0.03])) == pytest.approx(math.log(2), rel=1e-6)
    assert abs(preference(0.1).item()) > 1e-4


@pytest.mark.equation("HN-11")
def test_noisy_loss_matches_the_oracle_from_weights_to_loss():
    """Three pairs of one-token answers: one draw for w and l, clean reference, beta' a pair; then
    the same chain by the oracle.
    """
    model, x = network(), normal(3, 5, seed=47)
    w, l, beta = [0, 1, 2], [3, 3, 0], [0.05, 0.1, 0.08]
    with lora_noise(model, 0.2, generator(48)), torch.no_grad():
        logits = model(x)
        with adapters_off(model):
            ref = model(x)
        four = (logits, w), (logits, l), (ref, w), (ref, l)
        h = preference_logit(*(token_log_probs(z, torch.tensor(t)) for z, t in four))
        policy_, ref_ = oracle_network(model, x), oracle_network(model, x, noisy=False, scale=0)
        clean_ = oracle_network(model, x, noisy=False)
    loss = dpo_loss(h, torch.tensor(beta, dtype=torch.float64))

    def chain(policy):
        picked = []
        for z, t in ((policy, w), (policy, l), (ref_, w), (ref_, l)):
            picked.append([oracle.answer_log_prob([z[i]], [t[i]]) for i in range(3)])
        return oracle.dpo_loss(oracle.preference_logit(*picked), beta)

    np.testing.assert_allclose(loss, chain(policy_), rtol=1e-11)
    assert np.abs(loss.numpy() - chain(clean_)).max() > 1e-3
