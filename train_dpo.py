"""Stage 2, HaNoRec: direct preference optimisation with one beta' a pair (HaRS) under Gaussian noise on LoRA (NoDO).

    python train_dpo.py --model MODEL --sft SFT --data DATA --out OUT [--ablation full|no_hars|no_nodo|no_sam|dpo]

The policy is the SFT policy with a fresh adapter on top; the reference is the same network with that adapter off.
OUT receives the adapter, a copy of the SFT adapter that it stands on (OUT/below), the reference's log-probabilities
(reference.safetensors), pairs.tsv (lambda of every pair), log.jsonl and run.json. A run that was killed goes on when the same command is given again.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hanorec.base.batches import gather_batch, global_batches, micro_batches
from hanorec.base.command import run
from hanorec.base.config import DataConfig, DpoConfig, ModelConfig, TrainConfig
from hanorec.base.distributed import (
    broadcast,
    join,
    own_seed,
    own_stream,
    rank,
    run_on_all_ranks,
    sum_gradients,
    usable_device,
)
from hanorec.base.errors import InputError
from hanorec.base.files import write_text
from hanorec.base.settings import parse
from hanorec.hars import RunningReward, cluster_gap, hardness, misassigned, pair_beta, responsiveness, reward_gap
from hanorec.lora.files import attach_policy, save_policy
from hanorec.lora.layer import adapters_off, add_lora, lora_noise
from hanorec.losses import dpo_loss, kl_divergence, preference_logit
from hanorec.mllm.backbone import use_checkpointing
from hanorec.mllm.forward import autocast, forward, score_rows
from hanorec.mllm.items import neighbors
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import collate
from hanorec.mllm.sharding import set_tower_aside
from hanorec.mllm.tasks import Preference, load_examples, preferences, print_budget
from hanorec.run.checkpoint import drop_checkpoints, generators, load_checkpoint, save_checkpoint
from hanorec.run.record import (
    all_settings,
    append_log,
    compare_settings,
    input_hashes,
    open_run,
    prompt_settings,
    write_run,
)
from hanorec.run.reference import load_reference, rows_hash, save_reference
from hanorec.run.run import check_finite, cosine
from hanorec.scoring import answer_log_probs, answer_logits


def pair_logits(log_probs: Tensor, reference: Tensor) -> Tensor:
    """h of every pair: (B, 1 + n) log-probabilities of the chosen and the rejected answers, twice -> (B, n)."""
    w, l, ref_w, ref_l = log_probs[:, :1], log_probs[:, 1:], reference[:, :1], reference[:, 1:]
    return preference_logit(w.expand_as(l), l, ref_w.expand_as(l), ref_l)


def write_pairs(path: Path, pairs: Sequence[Preference], ids: Sequence[str], cosine: Tensor, delta: Tensor, lam: Tensor) -> None:
    """What HaRS makes of each pair, a line a pair: how alike its items are, Delta, lambda; numbers (pairs,) in the order of the rows."""
    items = [(pair.row.name, ids[pair.chosen], ids[rejected]) for pair in pairs for rejected in pair.rejected]
    numbers = zip(cosine.tolist(), delta.tolist(), lam.flatten().tolist(), strict=True)
    lines = ["\t".join([*names, *(f"{x:.6f}" for x in values)]) for names, values in zip(items, numbers, strict=True)]
    write_text(path, "\n".join(["user\tchosen\trejected\tcosine\tdelta\tlambda", *lines]) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    configs = model_config, data, train, dpo = parse([ModelConfig, DataConfig, TrainConfig, DpoConfig], argv, __doc__)
    if data.plain and dpo.reference not in ("once", "live"):
        raise InputError(f"--reference {dpo.reference} with --plain true, which computes the reference at every step; expected one of the two: leave one out")
    join(usable_device(model_config.device))
    out = open_run(train.out, all_settings(configs), "adapter_config.json")
    torch.manual_seed(train.seed)
    backbone = load_backbone(model_config.model, model_config.dtype, model_config.device, model_config.max_pixels, train.shard)
    policy, device = backbone.model, backbone.device
    source, examples = load_examples(backbone, data, train)
    pairs = preferences(source, examples, train.seed, dpo.rejected, dpo.negatives)  # each: one prompt, n = dpo.rejected pairs
    rows = [pair.row for pair in pairs]
    print_budget(rows, train.micro_batch, backbone)

    # HaRS, the part that does not change during training: lambda of every pair, from the base model's view of the items.
    rejected = torch.tensor([pair.rejected for pair in pairs], device=device)  # (prompts, n)
    chosen = torch.tensor([pair.chosen for pair in pairs], device=device)[:, None].expand_as(rejected)
    lam = torch.ones(rejected.shape, device=device)  # (prompts, n): one a pair
    if dpo.hars:
        e, scores, index = neighbors(backbone, source.catalog, source.pictures, dpo.k, dpo.embedding)
        form = "cosine" if dpo.ablation == "no_sam" else dpo.gap
        split = list(zip(chosen.flatten().split(1024), rejected.flatten().split(1024), strict=True))
        delta = torch.cat([cluster_gap(e, scores, index, w, l, form) for w, l in split])  # (prompts n,)
        lam = misassigned(hardness(delta, dpo.hardness), dpo.control, torch.Generator().manual_seed(train.seed)).view(rejected.shape)
        cosine_wl = torch.cat([(e[w] * e[l]).sum(1) for w, l in split])  # (prompts n,)

    if train.shard:
        set_tower_aside(policy)
    if train.sft is not None:
        attach_policy(policy, train.sft)
        compare_settings(train.sft, prompt_settings(model_config, data))
    layers = add_lora(policy, train.lora_rank, train.lora_alpha, train.lora_dropout)
    if train.checkpointing:
        use_checkpointing(backbone)
    trained = [weight for layer in layers for weight in (layer.A, layer.B)]
    broadcast(trained)
    own_stream(train.seed)
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=0.0)
    noise = torch.Generator(device).manual_seed(train.seed if dpo.noise_ranks == "same" else own_seed(train.seed))
    size, least = train.micro_batch * train.accumulation, math.ceil(3 / dpo.rejected)  # HN-7 needs 3 pairs in a step
    plan = [(epoch, batch) for epoch in range(train.epochs) for batch in global_batches(len(rows), size, train.seed, epoch, least)]
    inputs = input_hashes(policy, source.catalog, train.sft)
    facts = {"pairs": rejected.numel(), "steps": len(plan), "sigma_n": dpo.sigma_n, "lambda_range": [lam.min().item(), lam.max().item()],
             "trained_weights": sum(w.numel() for w in trained)}

    # The frozen reference, once for all epochs: log pi_ref of every answer, (prompts, 1 + n).
    live = data.plain or dpo.reference == "live"
    if not live:
        path = out / "reference.safetensors" if dpo.reference == "once" else Path(dpo.reference)
        depends = {**inputs, "dtype": str(policy.dtype), "prompt": prompt_settings(model_config, data), "rows": rows_hash(rows, source.pictures)}
        known = dpo.reference != "once" or run_on_all_ranks(path.exists)[0]  # as rank 0 sees it
        reference = load_reference(path, depends).to(device) if known else None
        write_run(out, configs, inputs, **facts)
        if reference is None:
            with adapters_off(policy):
                reference = score_rows(backbone, rows, source.pictures, train.micro_batch, "reference")[0].to(device)
            save_reference(path, reference, depends)
    else:
        write_run(out, configs, inputs, **facts)

    if dpo.hars and rank() == 0:  # not before all input has proved good
        write_pairs(out / "pairs.tsv", pairs, source.catalog.ids, cosine_wl, delta, lam)

    random = generators(device, noise=noise)
    done, carried = load_checkpoint(out, trained, optimizer, random)
    running = RunningReward(**carried)

    for step, (epoch, batch) in tqdm(list(enumerate(plan))[done:], dpo.ablation, initial=done, total=len(plan), disable=None):
        rate = train.learning_rate * cosine(step, len(plan))
        optimizer.param_groups[0]["lr"] = rate
        parts = micro_batches(batch, train.micro_batch)
        micros = [collate(backbone, [rows[i] for i in part], source.pictures, packed=not data.plain) for part, _ in parts]

        # Reference, and clean policy for the reward gaps; no gradient, no noise, no dropout.
        policy.eval()
        with torch.no_grad(), autocast(backbone):
            if live:
                with adapters_off(policy):
                    ref = [answer_log_probs(forward(backbone, micro), micro) for micro in micros]
            else:
                ref = [reference[part] for part, _ in parts]  # each (b, 1 + n): w, l, l ...
            if dpo.hars:
                # In the first step the policy is the reference: a gap would be what two forwards round differently.
                clean = [answer_log_probs(forward(backbone, micro), micro) for micro in micros] if step else ref
                gaps = [reward_gap(pair_logits(policy_part, ref_part), dpo.beta0) for policy_part, ref_part in zip(clean, ref, strict=True)]
                R = gather_batch(gaps, len(batch)).flatten()  # (B n,): eta is one number for the global batch
                mean_std = running.update(R) if dpo.eta == "ema" else (None, None)
                eta = responsiveness(R, dpo.trim, *mean_std)
                beta = pair_beta(lam, eta, dpo.beta0)  # (prompts, n)
            else:
                eta, beta = torch.ones(()), torch.full_like(lam, dpo.beta0)

        # One draw of noise for the whole step: forward and backward of every micro-batch see the same weights.
        policy.train()
        h, rewards, losses, kls = [], [], 0.0, 0.0
        tokens = sum(len(answer) for i in batch for answer in rows[i].answers)
        with lora_noise(policy, dpo.sigma_n, noise, dpo.noise):
            for (part, weight), micro, ref_part in zip(parts, micros, ref, strict=True):
                with autocast(backbone):
                    logits = forward(backbone, micro)  # (B, L, V)
                log_probs = answer_log_probs(logits, micro)  # (B, 1 + n)
                h_part = pair_logits(log_probs, ref_part)  # (b, n)
                loss = dpo_loss(h_part, beta[part], dpo.beta0 if dpo.normalised else None).sum() * weight / beta[batch].numel()
                if dpo.kl_coef > 0 or dpo.log_kl:
                    with torch.no_grad(), adapters_off(policy), autocast(backbone):
                        ref_logits = forward(backbone, micro)
                    kl = kl_divergence(answer_logits(logits, micro), answer_logits(ref_logits, micro))
                    share = weight * len(micro.token) / tokens  # a mean over the step's answer tokens, as in SFT
                    loss = loss + dpo.kl_coef * kl * share
                    kls += kl.item() * share
                loss.backward()
                losses += loss.item()
                h.append(h_part.detach())
                rewards.append(dpo.beta0 * (log_probs.detach() - ref_part))
        losses, kls = sum_gradients(trained, losses, kls)
        norm = torch.nn.utils.clip_grad_norm_(trained, train.clip).item()
        check_finite(losses, norm, step, [rows[i].name for i in batch])
        optimizer.step()
        optimizer.zero_grad()

        h, rewards, beta = gather_batch(h, len(batch)), gather_batch(rewards, len(batch)), beta[batch]
        append_log(out / "log.jsonl", {
            "step": step, "epoch": epoch, "loss": losses, "accuracy": (h > 0).float().mean().item(),
            "chosen_reward": rewards[:, 0].mean().item(), "rejected_reward": rewards[:, 1:].mean().item(),
            "margin": dpo.beta0 * h.mean().item(), "lambda": lam[batch].mean().item(), "lambda_min": lam[batch].min().item(),
            "lambda_max": lam[batch].max().item(), "eta": eta.item(), "beta": beta.mean().item(), "beta_min": beta.min().item(),
            "beta_max": beta.max().item(), "kl": kls if dpo.kl_coef > 0 or dpo.log_kl else None, "gradient_norm": norm, "learning_rate": rate})
        if (step + 1) % train.save_every == 0:
            save_checkpoint(out, step + 1, trained, optimizer, random, mean=running.mean, variance=running.variance)

    save_policy(policy, out, model_config.model, train.sft, stage="dpo", prompt=prompt_settings(model_config, data), ablation=dpo.ablation)
    drop_checkpoints(out)
    print(f"wrote the adapter to {out}")


if __name__ == "__main__":
    run(main)
