"""Stage 2, HaNoRec: direct preference optimisation with one beta' a pair (HaRS) under Gaussian noise on LoRA (NoDO).

    python train_dpo.py --model MODEL --sft SFT --data DATA --out OUT [--ablation full|no_hars|no_nodo|no_sam|dpo]

The policy is the SFT policy with a fresh adapter on top; the reference is the same network with that adapter off.
OUT receives the adapter, a copy of the SFT adapter that it stands on (OUT/below), log.jsonl and run.json.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from hanorec.backbone import load_backbone
from hanorec.config import DataConfig, DpoConfig, ModelConfig, TrainConfig, parse
from hanorec.errors import run
from hanorec.files import claim_folder
from hanorec.hars import RunningReward, cluster_gap, hardness, pair_beta, responsiveness, reward_gap
from hanorec.items import neighbors
from hanorec.lora import adapters_off, add_lora, attach_policy, lora_noise, save_policy
from hanorec.losses import dpo_loss, kl_divergence, preference_logit
from hanorec.prompts import collate
from hanorec.scoring import answer_log_probs, answer_logits, forward
from hanorec.tasks import load_examples, preference_pairs
from hanorec.training import (
    append_log,
    autocast,
    check_finite,
    chunks,
    compare_settings,
    cosine,
    global_batches,
    print_budget,
    prompt_settings,
    use_checkpointing,
    write_run,
)


def main(argv: Sequence[str] | None = None) -> None:
    model_config, data, train, dpo = parse([ModelConfig, DataConfig, TrainConfig, DpoConfig], argv, __doc__)
    out = claim_folder(train.out)
    torch.manual_seed(train.seed)
    backbone = load_backbone(model_config.model, model_config.dtype, model_config.device, model_config.max_pixels)
    policy, device = backbone.model, backbone.device
    source, examples = load_examples(backbone, data, train, whole_catalog=dpo.hars)
    pairs = preference_pairs(source, examples, train.seed)
    print_budget([pair.row for pair in pairs], train.micro_batch, backbone)

    # HaRS, the part that does not change during training: lambda of every pair, from the base model's view of the items.
    chosen = torch.tensor([pair.chosen for pair in pairs], device=device)
    rejected = torch.tensor([pair.rejected for pair in pairs], device=device)
    lam = torch.ones(len(pairs), device=device)  # (P,)
    if dpo.hars:
        e, scores, index = neighbors(backbone, source.catalog, source.pictures, dpo.k, dpo.embedding)
        form = "cosine" if dpo.ablation == "no_sam" else dpo.gap
        delta = torch.cat([cluster_gap(e, scores, index, w, l, form) for w, l in zip(chosen.split(1024), rejected.split(1024), strict=True)])
        lam = hardness(delta, dpo.hardness)

    if train.sft is not None:
        attach_policy(policy, train.sft)
        compare_settings(train.sft, prompt_settings(model_config, data))
    layers = add_lora(policy, train.lora_rank, train.lora_alpha, train.lora_dropout)
    if train.checkpointing:
        use_checkpointing(backbone)
    trained = [weight for layer in layers for weight in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=0.0)
    noise = torch.Generator(device).manual_seed(train.seed)
    running = RunningReward()
    size = train.micro_batch * train.accumulation
    plan = [(epoch, batch) for epoch in range(train.epochs) for batch in global_batches(len(pairs), size, train.seed, epoch, least=3)]
    write_run(out, [model_config, data, train, dpo], pairs=len(pairs), steps=len(plan), sigma_n=dpo.sigma_n,
              lambda_range=[lam.min().item(), lam.max().item()], trained_weights=sum(w.numel() for w in trained))

    for step, (epoch, batch) in enumerate(tqdm(plan, desc=dpo.ablation, disable=None)):
        rate = train.learning_rate * cosine(step, len(plan))
        optimizer.param_groups[0]["lr"] = rate
        parts = list(chunks(batch, train.micro_batch))
        micros = [collate(backbone, [pairs[i].row for i in part], source.pictures) for part in parts]

        # Reference, and clean policy for the reward gaps; no gradient, no noise, no dropout.
        policy.eval()
        with torch.no_grad(), autocast(backbone):
            with adapters_off(policy):
                ref = [answer_log_probs(forward(backbone, micro), micro) for micro in micros]  # each (B, 2): w, l
            if dpo.hars:
                clean = torch.cat([answer_log_probs(forward(backbone, micro), micro) for micro in micros])
                R = reward_gap(preference_logit(*clean.T, *torch.cat(ref).T), dpo.beta0)  # (P,)
                mean_std = running.update(R) if dpo.eta == "ema" else (None, None)
                eta = responsiveness(R, dpo.trim, *mean_std)
                beta = pair_beta(lam[batch], eta, dpo.beta0)  # (P,)
            else:
                eta, beta = torch.ones(()), torch.full((len(batch),), dpo.beta0, device=device)

        # One draw of noise for the whole step: forward and backward of every micro-batch see the same weights.
        policy.train()
        h, rewards, losses, kls = [], [], 0.0, []
        with lora_noise(policy, dpo.sigma_n, noise, dpo.noise):
            for micro, ref_part, beta_part in zip(micros, ref, beta.split(train.micro_batch), strict=True):
                with autocast(backbone):
                    logits = forward(backbone, micro)  # (B, keep, V)
                log_probs = answer_log_probs(logits, micro)  # (B, 2)
                h_part = preference_logit(*log_probs.T, *ref_part.T)  # (B,)
                loss = dpo_loss(h_part, beta_part, dpo.beta0 if dpo.normalised else None).sum() / len(batch)
                if dpo.kl_coef > 0 or dpo.log_kl:
                    with torch.no_grad(), adapters_off(policy), autocast(backbone):
                        ref_logits = forward(backbone, micro)
                    kl = kl_divergence(answer_logits(logits, micro), answer_logits(ref_logits, micro))
                    share = len(micro.token) / sum(len(m.token) for m in micros)  # a mean over the step's answer tokens, as in SFT
                    loss = loss + dpo.kl_coef * kl * share
                    kls.append(kl.item() * share)
                loss.backward()
                losses += loss.item()
                h.append(h_part.detach())
                rewards.append(dpo.beta0 * (log_probs.detach() - ref_part))
        norm = torch.nn.utils.clip_grad_norm_(trained, train.clip).item()
        check_finite(losses, norm, step, [pairs[i].row.name for i in batch])
        optimizer.step()
        optimizer.zero_grad()

        h, rewards = torch.cat(h), torch.cat(rewards)
        append_log(out / "log.jsonl", {
            "step": step, "epoch": epoch, "loss": losses, "accuracy": (h > 0).float().mean().item(),
            "chosen_reward": rewards[:, 0].mean().item(), "rejected_reward": rewards[:, 1].mean().item(),
            "margin": dpo.beta0 * h.mean().item(), "lambda": lam[batch].mean().item(), "lambda_min": lam[batch].min().item(),
            "lambda_max": lam[batch].max().item(), "eta": eta.item(), "beta": beta.mean().item(), "beta_min": beta.min().item(),
            "beta_max": beta.max().item(), "kl": sum(kls) if kls else None, "gradient_norm": norm, "learning_rate": rate})

    save_policy(policy, out, model_config.model, train.sft, stage="dpo", prompt=prompt_settings(model_config, data), ablation=dpo.ablation)
    print(f"wrote the adapter to {out}; last loss {losses:.4f}")


if __name__ == "__main__":
    run(main)
