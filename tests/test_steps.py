"""Readings that change the step: each beside the document's own step, an oracle, and by hand.

On the tiny Qwen2.5-VL in float64, 6 prompts with 2 rejected answers each, in micro-batches of 4
and 2.
"""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
import toy
from float64 import in_float64

import train_dpo
from hanorec.base.config import DataConfig, DpoConfig, TrainConfig
from hanorec.base.config_steps import StepConfig
from hanorec.lora.layer import adapters_off, language_model, lora_layers, lora_noise
from hanorec.losses import dpo_loss, prompt_logits
from hanorec.mllm.forward import forward, score_batches
from hanorec.mllm.items import hidden_embeddings, item_embeddings
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_examples, preferences
from hanorec.run import steps
from hanorec.run.steps import Stage, Weights, alignment, packs, step_for
from hanorec.scoring import answer_log_probs

BATCH = [5, 0, 3, 1, 4, 2]
PARTS = [[5, 0, 3, 1], [4, 2]]
N = 2  # rejected answers


@pytest.fixture(scope="module", autouse=True)
def float64():
    with in_float64():
        yield


@pytest.fixture(scope="module")
def parts(data, checkpoints):
    """(builder, prompts, reference, lam): of a policy that has learnt something."""
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float64", "cpu", max_pixels=1024)
    config = DataConfig(data=str(data), history=2, candidates=4, plain=True)
    builder, examples = load_examples(backbone, config, TrainConfig(out="", targets_per_user=1))
    prompts = preferences(builder, examples[:6], 2025, N)
    toy.busy_lora(backbone.model)
    with adapters_off(backbone.model):
        rows = [prompt.row for prompt in prompts]
        (reference,) = score_batches(backbone, [builder.collate(rows, range(6))])
    lam = torch.rand(6, N, generator=torch.Generator().manual_seed(3)) + 0.5
    yield builder, prompts, reference, lam


def stage_of(parts, micro_batch=4, **dpo):
    builder, prompts, reference, lam = parts
    dpo = DpoConfig(**{"rejected": N, "sigma": 0.05, "beta0": 0.4, **dpo})
    lam = lam if dpo.hars else torch.ones_like(lam)
    train = TrainConfig(out="", micro_batch=micro_batch)
    noise = torch.Generator().manual_seed(11)
    return Stage(builder, prompts, reference, lam, noise, train, dpo)


def layers_of(stage):
    return list(lora_layers(stage.builder.backbone.model).values())


def taken(stage, readings=None, step=1):
    """(what the step found, its gradient as one vector)."""
    backbone = stage.builder.backbone
    chosen = train_dpo.document_step
    if readings is not None:
        plan = [(0, BATCH)]
        chosen = step_for(readings, backbone, plan, stage.train, stage.dpo, chosen)
    for weight in toy.weights(layers_of(stage)):
        weight.grad = None
    found = chosen(stage, BATCH, step)
    gradient = torch.cat([weight.grad.flatten() for weight in toy.weights(layers_of(stage))])
    if readings is not None and readings.noise_pass == "forward":
        model = backbone.model  # the second name: before Transformers 5.23
        disable = getattr(model, "activation_checkpointing_disable", None)
        (disable or model.gradient_checkpointing_disable)()
    return found, gradient


def cosine(a, b):
    return torch.cosine_similarity(a, b, 0).item()


def micro_of(stage, part):
    return stage.builder.collate(stage.rows, part)


def noisy_log_probs(stage, batches, generator):
    """Under one draw: (b, A) of each."""
    policy = stage.builder.backbone.model
    with lora_noise(policy, stage.dpo.sigma_n, generator):
        return score_batches(stage.builder.backbone, batches)


def draws(seed=11):
    return torch.Generator().manual_seed(seed)


# ---- the document's step, and the limit in which another is the same ----


@pytest.mark.equation("HN-11")
@pytest.mark.parametrize("ablation", ["full", "no_hars", "no_nodo"])
def test_at_the_documents_settings_the_other_step_is_the_documents(parts, ablation):
    """To the bit, with the generator left where it leaves it: the loop through `other_step`, which
    `--log-kl` asks for by itself. Control: at a later draw neither is the same.
    """
    one, two = stage_of(parts, ablation=ablation), stage_of(parts, ablation=ablation, log_kl=True)
    (a, gradient), (b, other) = taken(one), taken(two, StepConfig())
    assert torch.equal(gradient, other) and a.loss == b.loss and b.kl > 0
    for name in ("log_probs", "beta"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.eta.mean() == b.eta
    assert torch.equal(one.noise.get_state(), two.noise.get_state())
    if one.dpo.sigma_n > 0:
        assert not torch.equal(taken(one)[1], gradient)


def test_the_documents_step_is_taken_where_no_reading_asks_for_another(parts):
    stage, documented = stage_of(parts), object()
    asked = stage.builder.backbone, [(0, BATCH)], stage.train
    assert step_for(StepConfig(continue_sft=True), *asked, DpoConfig(), documented) is documented
    for readings in (StepConfig(noise_draws=2), StepConfig(kept="inner")):
        assert step_for(readings, *asked, DpoConfig(), documented) is not documented
    for dpo in (DpoConfig(normalised=True), DpoConfig(kl_coef=0.1)):
        assert step_for(StepConfig(), *asked, dpo, documented) is not documented


@pytest.mark.equation("HN-9")
@pytest.mark.parametrize(
    "readings",
    [{"noise_pass": "forward"}, {"noise_draw": "forward"}, {"noise_draw": "answer"},
     {"noise_draws": 3}],
    ids=str,
)
def test_without_noise_every_reading_of_it_is_the_document(parts, readings):
    """Control: with noise each has another gradient than the document's."""
    found, gradient = taken(stage_of(parts, sigma=0.0), StepConfig(**readings))
    expected, own = taken(stage_of(parts, sigma=0.0))
    np.testing.assert_allclose(gradient, own, atol=1e-13)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-12)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    _, noisy = taken(stage_of(parts), StepConfig(**readings))
    assert cosine(noisy, taken(stage_of(parts))[1]) < 0.9999


# ---- noise in the forward only ----


def layer_by_layer(stage, part, sigma):
    """The gradient of half of the sum of the losses at beta0, by hand: the layers' noisy inputs,
    then each layer once more without noise, from the last to the first.
    """
    backbone = stage.builder.backbone
    language, micro = language_model(backbone.model), micro_of(stage, part)
    calls = []
    hooks = []
    for layer in language.layers:
        hooks.append(layer.register_forward_hook(
            lambda module, inputs, named, out: calls.append((inputs, named, out)), with_kwargs=True
        ))
    with torch.no_grad(), lora_noise(backbone.model, sigma, draws()):
        forward(backbone, micro)
    for hook in hooks:
        hook.remove()

    def tensor(out):
        return out if isinstance(out, torch.Tensor) else out[0]

    top = tensor(calls[-1][2]).detach().requires_grad_()
    columns = micro.columns[..., None].expand(-1, -1, top.shape[-1])
    logits = backbone.model.lm_head(language.norm(top).gather(1, columns))
    h = prompt_logits(answer_log_probs(logits, micro), stage.reference[part])
    loss = dpo_loss(h, stage.dpo.beta0).sum() / (len(BATCH) * N)
    (upstream,) = torch.autograd.grad(loss, top)

    gradients = {}
    for layer, (inputs, named, _) in reversed(list(zip(language.layers, calls, strict=True))):
        x = inputs[0].detach().requires_grad_()
        own = [module for module in layer.modules() if hasattr(module, "noise")]
        weights = toy.weights(own)
        found = torch.autograd.grad(
            tensor(layer(x, *inputs[1:], **named)), [x, *weights], upstream
        )
        upstream = found[0]
        gradients |= {id(w): g for w, g in zip(weights, found[1:], strict=True)}
    return torch.cat([gradients[id(w)].flatten() for w in toy.weights(layers_of(stage))])


@pytest.mark.equation("HN-9", "HN-11")
def test_the_gradient_of_noise_in_the_forward_only_layer_by_layer(parts):
    """Over both micro-batches. The loss is the noisy one; the gradient is neither the noisy
    loss's nor the clean one's.
    """
    setting = {"ablation": "no_hars", "sigma": 0.1}
    stage = stage_of(parts, **setting)
    stage.builder.backbone.model.eval()
    expected = sum(layer_by_layer(stage, part, 0.1) for part in PARTS)
    found, gradient = taken(stage_of(parts, **setting), StepConfig(noise_pass="forward"))
    np.testing.assert_allclose(gradient, expected, atol=1e-12 * float(expected.abs().max()))
    literal, both = taken(stage_of(parts, **setting))
    _, clean = taken(stage_of(parts, ablation="dpo"))
    assert found.loss == pytest.approx(literal.loss, rel=1e-12)
    assert cosine(gradient, both) < 0.999 and cosine(gradient, clean) < 0.999


# ---- how often noise is drawn ----


@pytest.mark.equation("HN-9")
@pytest.mark.parametrize("draw", ["step", "forward", "answer"])
def test_which_forwards_share_a_draw(parts, draw):
    """Log-probabilities under draws made by hand, in order: one for all, one a micro-batch, one an
    answer. Each is another number than those of the other two readings.
    """
    stage, generator = stage_of(parts), draws()
    stage.builder.backbone.model.eval()
    if draw == "step":
        expected = noisy_log_probs(stage, [micro_of(stage, part) for part in PARTS], generator)
    elif draw == "forward":
        expected = []
        for part in PARTS:
            expected += noisy_log_probs(stage, [micro_of(stage, part)], generator)
    else:
        expected = []
        for part in PARTS:
            apart = packs(stage, part, True)
            each = [noisy_log_probs(stage, [pack], generator)[0] for pack in apart]
            assert len(each) == 1 + N and each[0].shape == (len(part), 1)
            expected.append(torch.cat(each, 1))
    expected = torch.cat(expected)
    for other in ("step", "forward", "answer"):
        stage = stage_of(parts)
        stage.builder.backbone.model.eval()
        found, _ = taken(stage, StepConfig(noise_draw=other))
        apart = (found.log_probs - expected).abs().max().item()
        assert (apart < 1e-10) if other == draw else (apart > 1e-3), (other, apart)


@pytest.mark.equation("HN-11")
def test_several_draws_are_averaged(parts):
    """Gradient and loss of three draws are the means of three steps with one each, whose noise goes
    on where the last one ended. Control: three steps that all begin anew.
    """
    three, gradient = taken(stage_of(parts), StepConfig(noise_draws=3))
    stage, each = stage_of(parts), []
    for _ in range(3):
        each.append(taken(stage))
    mean = torch.stack([own for _, own in each]).mean(0)
    np.testing.assert_allclose(gradient, mean, atol=1e-13)
    assert three.loss == pytest.approx(np.mean([found.loss for found, _ in each]), rel=1e-12)
    log_probs = torch.stack([found.log_probs for found, _ in each]).mean(0)
    np.testing.assert_allclose(three.log_probs, log_probs, atol=1e-12)
    assert not torch.allclose(gradient, each[0][1])


# ---- which rewards, and eta of what ----


def betas(stage, log_probs, groups, trim=None):
    """beta' (B, N) of the oracle: eta of each group of prompts, in the order of `BATCH`."""
    ref = stage.reference[BATCH]
    found = np.zeros((len(BATCH), N))
    for group in groups:
        h = []
        for b in group:
            for l in range(N):
                w, ref_w = log_probs[b, 0].item(), ref[b, 0].item()
                h += list(oracle.preference_logit(
                    [w], [log_probs[b, 1 + l].item()], [ref_w], [ref[b, 1 + l].item()]
                ))
        eta = oracle.responsiveness(oracle.reward_gap(h, stage.dpo.beta0), trim)
        for b in group:
            lam = stage.lam[BATCH[b]].tolist()
            found[b] = oracle.pair_beta(lam, eta, stage.dpo.beta0)
    return found


@pytest.mark.equation("HN-6", "HN-7", "HN-8")
@pytest.mark.parametrize(
    ("rewards", "over"), [("clean", "step"), ("clean", "micro"), ("noisy", "micro")]
)
def test_eta_of_which_rewards_over_which_pairs(parts, rewards, over):
    """beta' and the loss by the oracle. The three readings differ; at the first step, where the
    policy is the reference, clean rewards are all 0 and eta is 1 over either.
    """
    readings = StepConfig(rewards=rewards, eta_over=over, noise_draw="forward")
    stage = stage_of(parts)
    stage.builder.backbone.model.eval()
    (clean,) = score_batches(stage.builder.backbone, [micro_of(stage, BATCH)])
    found, _ = taken(stage, readings)
    groups = [range(6)] if over == "step" else [range(4), range(4, 6)]
    source = clean if rewards == "clean" else found.log_probs
    expected = betas(stage, source, groups)
    np.testing.assert_allclose(found.beta, expected, rtol=1e-9)
    h = prompt_logits(found.log_probs, stage.reference[BATCH])
    loss = oracle.dpo_loss(h.flatten().tolist(), expected.flatten())
    assert found.loss == pytest.approx(np.mean(loss), rel=1e-9)

    others = [betas(stage, clean, [range(6)]), betas(stage, clean, [range(4), range(4, 6)])]
    others.append(betas(stage, found.log_probs, [range(4), range(4, 6)]))
    far = [np.abs(found.beta.numpy() - other).max() > 1e-5 for other in others]
    assert far.count(False) == 1
    if rewards == "clean":
        assert taken(stage_of(parts), readings, step=0)[0].eta == 1


@pytest.mark.equation("HN-7")
def test_the_micro_batches_of_all_ranks_share_an_eta(parts, monkeypatch):
    """As rank 1 of 3 sees it: the pairs of rank 0 stand before its own, those of rank 2 behind. A
    rank that has nothing left gets the same eta, and weighs nothing.
    """
    stage = stage_of(parts, eta="pair")
    before = [[0.3, 0.1], [0.5, 0.2]]
    own = torch.tensor([[0.9, 0.4], [0.7, 0.8]])
    behind = [[0.6, 0.0]]
    monkeypatch.setattr(steps, "run_on_all_ranks", lambda work: [before, work(), behind])
    monkeypatch.setattr(steps, "rank", lambda: 1)
    weights = Weights(StepConfig(), stage, 1)
    weights.weigh_micro([3, 1], own, 1)
    etas = oracle.responsiveness_of_pairs(np.array([*before, *own.tolist(), *behind]).flatten())
    lam = stage.lam[[3, 1]].flatten().tolist()
    expected = [oracle.pair_beta([x], eta, 0.4)[0] for x, eta in zip(lam, etas[4:8], strict=True)]
    np.testing.assert_allclose(weights.beta[[3, 1]].flatten(), expected, rtol=1e-12)

    idle = Weights(StepConfig(), stage, 1)
    idle.weigh_micro([3, 1], own, 0)
    assert (idle.beta == 0.4).all() and idle.etas[0].shape == (3, N)


@pytest.mark.equation("HN-11")
def test_extreme_pairs_left_out_of_the_loss(parts):
    """The loss is the mean over the 10 pairs whose clean reward is neither the smallest nor the
    largest; beta' is the document's. It also works without HaRS, where nothing else needs rewards.
    """
    for ablation in ("full", "no_hars"):
        stage = stage_of(parts, ablation=ablation)
        stage.builder.backbone.model.eval()
        (clean,) = score_batches(stage.builder.backbone, [micro_of(stage, BATCH)])
        found, _ = taken(stage, StepConfig(kept="inner"))
        order = prompt_logits(clean, stage.reference[BATCH]).flatten().argsort()[1:-1]
        h = prompt_logits(found.log_probs, stage.reference[BATCH]).flatten()[order]
        losses = oracle.dpo_loss(h.tolist(), found.beta.flatten()[order].tolist())
        assert len(losses) == 10 and found.loss == pytest.approx(np.mean(losses), rel=1e-10)
        document, _ = taken(stage_of(parts, ablation=ablation))
        assert torch.equal(document.beta, found.beta) and document.loss != found.loss


@pytest.mark.equation("HN-11")
def test_beta_dpo_as_a_step(parts):
    """One beta for the batch, beta0 at the first step, and 9 of 12 pairs in the loss: as many as
    lower it together. The draw is a function of seed and step.
    """
    setting = {"ablation": "no_nodo", "eta": "beta_dpo", "control": "one"}
    readings, first = StepConfig(kept="near"), stage_of(parts, **setting)
    one = replace(first, lam=torch.ones_like(first.lam))
    found, _ = taken(one, readings)
    assert found.beta.unique().tolist() == [0.4]
    weights = Weights(readings, one, 1)
    h = prompt_logits(found.log_probs, one.reference[BATCH])
    weights.weigh(BATCH, 0.4 * h)
    kept = weights.kept[BATCH]
    assert (kept > 0).sum() == 9 and kept.mean() == pytest.approx(1)
    losses = dpo_loss(h, 0.4)[kept > 0]
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-10)
    assert found.loss != pytest.approx(dpo_loss(h, 0.4).mean().item(), rel=1e-6)
    later = Weights(readings, one, 2)
    later.weigh(BATCH, 0.4 * h)
    assert not torch.equal(later.kept, weights.kept)


# ---- an explicit image-text term ----


@pytest.mark.equation("HN-12")
def test_the_alignment_of_a_step(parts):
    """The loss grows by the oracle's KL of the micro-batches' items, weighted by their prompts; the
    gradient by that of finite differences. An item without an image is left out.
    """
    plain, own = taken(stage_of(parts, ablation="dpo"))
    stage = stage_of(parts, ablation="dpo")
    found, gradient = taken(stage, StepConfig(alignment_coef=2.0))
    builder = stage.builder
    H, X, has_image = item_embeddings(builder.backbone, builder.catalog, builder.pictures, "hidden")
    assert has_image.all()

    def term(part):
        items = set()
        for i in part:
            items |= {stage.prompts[i].chosen, *stage.prompts[i].rejected}
        items = sorted(items)
        return oracle.alignment_kl(H[items].tolist(), X[items].tolist())

    expected = sum(term(part) * len(part) / 6 for part in PARTS)
    assert found.loss - plain.loss == pytest.approx(2 * expected, rel=1e-8)

    weight = toy.weights(layers_of(stage))[1]
    direction = torch.randn(weight.shape, generator=draws(5))

    def moved(by):
        with torch.no_grad():
            weight.add_(by * direction)
            total = sum(alignment(stage, part).item() * len(part) / 6 for part in PARTS)
            weight.sub_(by * direction)
        return total

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    at = layers_of(stage)[0].A.numel()
    change = (gradient - own)[at : at + weight.numel()] @ direction.flatten()
    assert change.item() == pytest.approx(2 * slope, rel=1e-5) and abs(slope) > 1e-8

    few = {row: builder.pictures[row] for row in list(builder.pictures)[:1]}
    assert alignment(replace(stage, builder=replace(builder, pictures=few)), PARTS[0]) == 0


@pytest.mark.equation("HN-1")
def test_embeddings_with_gradients_are_the_items_own(parts):
    """In any order, titles and images of several lengths together."""
    builder = parts[0]
    H, X, _ = item_embeddings(builder.backbone, builder.catalog, builder.pictures, "hidden")
    rows = [9, 2, 14, 3]
    own_H, own_X = hidden_embeddings(builder.backbone, builder.catalog, builder.pictures, rows)
    assert own_H.requires_grad and own_X.requires_grad
    np.testing.assert_allclose(own_H.detach(), H[rows], atol=1e-12)
    np.testing.assert_allclose(own_X.detach(), X[rows], atol=1e-12)
