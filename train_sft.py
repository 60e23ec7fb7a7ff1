"""Stage 1, supervised fine-tuning: the policy learns to answer with the title of the item that the user chose next (SFT-1).

    python train_sft.py --model MODEL --data DATA --out OUT

OUT receives the LoRA adapter (PEFT's files), log.jsonl (a line an optimizer step) and run.json. A run that was killed goes on when
the same command is given again.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from hanorec.base.batches import global_batches, micro_batches
from hanorec.base.command import run
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.distributed import broadcast, join, own_stream, sum_gradients, usable_device
from hanorec.base.settings import parse
from hanorec.lora.files import attach_policy, save_policy
from hanorec.lora.layer import add_lora
from hanorec.losses import sft_loss
from hanorec.mllm.backbone import use_checkpointing
from hanorec.mllm.forward import autocast, forward
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import collate
from hanorec.mllm.sharding import set_tower_aside
from hanorec.mllm.tasks import load_examples, print_budget, sft_rows
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
from hanorec.run.run import check_finite, cosine


def main(argv: Sequence[str] | None = None) -> None:
    configs = model_config, data, config = parse([ModelConfig, DataConfig, TrainConfig], argv, __doc__)
    join(usable_device(model_config.device))
    out = open_run(config.out, all_settings(configs), "adapter_config.json")
    torch.manual_seed(config.seed)
    backbone = load_backbone(model_config.model, model_config.dtype, model_config.device, model_config.max_pixels, config.shard)
    source, examples = load_examples(backbone, data, config)
    rows = sft_rows(source, examples, config.seed)
    print_budget(rows, config.micro_batch, backbone)

    policy = backbone.model
    if config.shard:
        set_tower_aside(policy)
    if config.sft is not None:
        attach_policy(policy, config.sft)
        compare_settings(config.sft, prompt_settings(model_config, data))
    layers = add_lora(policy, config.lora_rank, config.lora_alpha, config.lora_dropout)
    if config.checkpointing:
        use_checkpointing(backbone)
    trained = [weight for layer in layers for weight in (layer.A, layer.B)]
    broadcast(trained)
    own_stream(config.seed)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    size = config.micro_batch * config.accumulation
    plan = [(epoch, batch) for epoch in range(config.epochs) for batch in global_batches(len(rows), size, config.seed, epoch)]
    write_run(out, configs, input_hashes(policy, source.catalog, config.sft), rows=len(rows), steps=len(plan), trained_weights=sum(w.numel() for w in trained))

    random = generators(backbone.device)
    done, _ = load_checkpoint(out, trained, optimizer, random)

    policy.train()
    for step, (epoch, batch) in tqdm(list(enumerate(plan))[done:], "SFT", initial=done, total=len(plan), disable=None):
        rate = config.learning_rate * cosine(step, len(plan))
        optimizer.param_groups[0]["lr"] = rate
        tokens, total = sum(len(rows[i].answers[0]) for i in batch), 0.0
        for part, weight in micro_batches(batch, config.micro_batch):
            micro = collate(backbone, [rows[i] for i in part], source.pictures)
            with autocast(backbone):
                logits = forward(backbone, micro)  # (B, L, V)
            # The mean over the answer tokens of the whole step, however it is cut into micro-batches and shares.
            loss = sft_loss(logits, micro.labels) * weight * len(micro.token) / tokens
            loss.backward()
            total += loss.item()
        (total,) = sum_gradients(trained, total)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip).item()
        check_finite(total, norm, step, [rows[i].name for i in batch])
        optimizer.step()
        optimizer.zero_grad()
        append_log(out / "log.jsonl", {"step": step, "epoch": epoch, "loss": total, "gradient_norm": norm, "learning_rate": rate})
        if (step + 1) % config.save_every == 0:
            save_checkpoint(out, step + 1, trained, optimizer, random)

    save_policy(policy, out, model_config.model, config.sft, stage="sft", prompt=prompt_settings(model_config, data))
    drop_checkpoints(out)
    print(f"wrote the adapter to {out}")


if __name__ == "__main__":
    run(main)
