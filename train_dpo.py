"""Stage 2, HaNoRec: DPO with one beta' a pair (HaRS) under Gaussian noise on LoRA (NoDO).

    python train_dpo.py --model MODEL --sft SFT --data DATA --out OUT [--ablation no_hars] [...]

The policy is the SFT policy with a fresh adapter on top, the reference the same with it off. OUT
receives the adapter, the one below it, reference.safetensors (log pi_ref of every answer),
pairs.tsv (lambda of every pair), log.jsonl and run.json. A killed run goes on by the same command.
"""

from collections.abc import Sequence

from hanorec.base import command
from hanorec.base.config import DataConfig, DpoConfig, ModelConfig, TrainConfig
from hanorec.base.config_steps import StepConfig
from hanorec.base.settings import parse

KINDS = [ModelConfig, DataConfig, TrainConfig, DpoConfig, StepConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__, "train_dpo")  # --help needs no torch

import torch

from hanorec.base.batches import gather_batch, micro_batches, total
from hanorec.hars import pair_beta, reward_gap
from hanorec.lora import lora_noise
from hanorec.losses import dpo_loss, prompt_logits
from hanorec.mllm.forward import forward, score_batches
from hanorec.mllm.tasks import load_examples, preferences
from hanorec.readings import CONTROLS, ETAS, GAPS, HARDNESS, NOISES
from hanorec.run.log import span, spread, write_pairs
from hanorec.run.run import Run
from hanorec.run.steps import Stage, Taken, step_for
from hanorec.scoring import answer_log_probs


def main(argv: Sequence[str] | None = None) -> None:
    _, data, train, dpo, readings = configs = parse(KINDS, argv, __doc__, "train_dpo")
    run = Run(configs)
    backbone = run.load_backbone()
    builder, examples = load_examples(backbone, data, train)
    prompts = preferences(builder, examples, train.seed, dpo.rejected, dpo.negatives)
    rows = [prompt.row for prompt in prompts]  # P prompts, each with y_w and n times y_l
    plan = run.plan(rows, backbone, least=dpo.least_prompts)  # HN-7: 3 pairs a step
    take_step = step_for(readings, backbone, plan, train, dpo, document_step)

    # HaRS before training: lambda of every pair, from the base model's view of the items.
    items = torch.tensor([p.items for p in prompts], device=backbone.device)  # (P, 1 + n, targets)
    w, l = items[:, :1].expand_as(items[:, 1:]), items[:, 1:]  # (P, n, 1): one target, by default
    lam = torch.ones(l.shape[:2], device=l.device)  # (P, n)
    if dpo.hars:
        e, scores, index = builder.neighbors(dpo.k, dpo.embedding)  # HN-1, HN-2, HN-3
        delta = GAPS[dpo.gap_form](e, scores, index, w.flatten(), l.flatten())  # HN-4
        lam = HARDNESS[dpo.hardness](delta.view(-1, data.targets).mean(1))  # HN-5: (P n,)
        lam = CONTROLS[dpo.control](lam, run.generator("cpu")).view(l.shape[:2])

    trained = run.trainable_adapter(backbone, fresh=not readings.continue_sft)
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=0.0)
    noise = run.generator(l.device, dpo.noise_ranks)
    run.describe(builder, pairs=lam.numel(), sigma_n=dpo.sigma_n, lambda_range=span(lam))
    reference = run.reference(dpo.reference, builder, rows)  # (P, 1 + n): adapter off, once
    if dpo.hars:
        write_pairs(run.out / "pairs.tsv", builder.catalog.ids, prompts, e, delta, lam)

    stage = Stage(builder, prompts, reference, lam, noise, train, dpo)
    for step, epoch, batch in run.steps(plan, optimizer, stage.state, noise=noise):
        log_probs, eta, beta, loss, kl = take_step(stage, batch, step)
        loss, kl = run.update([rows[i].name for i in batch], loss, kl)

        rewards = dpo.beta0 * (log_probs - reference[batch])
        h = prompt_logits(log_probs, reference[batch])
        run.log(
            step=step, epoch=epoch, loss=loss, accuracy=(h > 0).float().mean(),
            chosen_reward=rewards[:, 0].mean(), rejected_reward=rewards[:, 1:].mean(),
            margin=dpo.beta0 * h.mean().item(), **spread("lambda", lam[batch]), eta=eta.mean(),
            **spread("beta", beta), kl=kl if dpo.with_kl else None,
        )
    run.finish(backbone.model, stage="dpo", ablation=dpo.ablation)


def document_step(stage: Stage, batch: Sequence[int], step: int) -> Taken:
    """One optimizer step on these B prompts, but for the update. Read otherwise: run/steps.py."""
    builder, dpo, reference, lam = stage.builder, stage.dpo, stage.reference, stage.lam
    policy = builder.backbone.model
    parts = micro_batches(batch, stage.train.micro_batch)
    micros = [builder.collate(stage.rows, part) for part, _ in parts]
    refs = [reference[part] for part, _ in parts]  # (b, 1 + n) each

    # The clean policy's reward gaps: no noise, no dropout. At first it is the reference.
    policy.eval()
    eta, beta = torch.ones(()), torch.full_like(lam, dpo.beta0)  # DPO-2, unless HaRS sets them
    if dpo.hars:
        clean = score_batches(builder.backbone, micros) if step > 0 else refs  # (b, 1 + n) each
        h = prompt_logits(gather_batch(clean, len(batch)), reference[batch])  # DPO-1: (B, n)
        R = reward_gap(h, dpo.beta0)  # HN-6: (B, n)
        eta = ETAS[dpo.eta](R, stage.state, dpo.trim)  # HN-7: one number for the global batch
        beta[batch] = pair_beta(lam[batch], eta, dpo.beta0)  # HN-8: (B, n)

    # One draw of noise for the whole step: every forward and backward sees the same weights.
    policy.train()
    noisy, losses = [], []
    with lora_noise(policy, dpo.sigma_n, stage.noise, NOISES[dpo.noise]):  # HN-9
        for (part, weight), micro, ref in zip(parts, micros, refs, strict=True):
            logits = forward(builder.backbone, micro)  # HN-10: (b, L, V)
            log_probs = answer_log_probs(logits, micro)  # (b, 1 + n)
            h = prompt_logits(log_probs, ref)  # DPO-1: (b, n)
            loss = dpo_loss(h, beta[part]).sum() * weight / lam[batch].numel()  # HN-11
            loss.backward()
            noisy.append(log_probs.detach())
            losses.append(loss.detach())
    return Taken(gather_batch(noisy, len(batch)), eta, beta[batch], total(losses))
