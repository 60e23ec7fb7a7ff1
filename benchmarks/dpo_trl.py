"""The peer of benchmarks/dpo_step.py: the step of TRL's DPOTrainer with PEFT."""

import sys
import tempfile
from functools import partial
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from dpo_sides import BETA, CLIP, RANK, RATE, Side
from measure import timed
from peft import LoraConfig
from toys import Example, ImageTextProcessor, Work, image_processor, model, tokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils

from hanorec.lora.layer import LoRALinear

LINEARS = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def theirs(
    work: Work, made: list[Example], device: str, adapter: dict[str, LoRALinear] | None = None,
    cached: bool = False, answers_only: bool = False, prepared: bool = False,
) -> Side:
    """TRL's own step: its collator, its training_step (loss, metrics, backward), clip and
    optimizer. adapter: LoRA weights to start from.

    answers_only: score the answers' positions alone, which TRL itself does only where it finds
    Triton.
    """
    disable_progress_bars()
    pairs: list[dict[str, Any]] = [
        {"prompt": e.prompt, "chosen": e.answers[0], "rejected": e.answers[1]} for e in made
    ]
    processing: Any = tokenizer(work.vocabulary)
    if work.vision:
        pairs = [pair | {"images": e.images} for pair, e in zip(pairs, made, strict=True)]
        processing = ImageTextProcessor(image_processor(), processing)
    config = DPOConfig(
        tempfile.gettempdir(), per_device_train_batch_size=len(pairs), beta=BETA,
        learning_rate=RATE, max_grad_norm=CLIP, optim="adamw_torch", weight_decay=0.0,
        bf16=work.dtype == "bfloat16",
        use_cpu=device == "cpu", activation_checkpointing=False, max_length=None, report_to="none",
        precompute_ref_log_probs=cached,
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=rf"^(?!.*visual).*\.{LINEARS}$",
        task_type="CAUSAL_LM",
    )
    trainer = DPOTrainer(
        model(work, "cpu" if work.dtype == "float32" else device), args=config,
        train_dataset=Dataset.from_list(pairs), processing_class=processing, peft_config=lora,
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what trainer.train() sets
    wrapped, optimizer = trainer.model, trainer.optimizer
    sides = {}  # ...q_proj.lora_A -> weight
    for name, weight in wrapped.named_parameters():
        if weight.requires_grad:
            sides[name.removeprefix("base_model.model.").replace(".default.weight", "")] = weight
    for name, layer in (adapter or {}).items():
        with torch.no_grad():
            sides[f"{name}.lora_A"].copy_(layer.A)
            sides[f"{name}.lora_B"].copy_(layer.B)
    if adapter and len(sides) != 2 * len(adapter):
        sys.exit(
            f"error: PEFT trains {len(sides)} weights, hanorec {2 * len(adapter)}, expected as many"
        )
    # TRL tokenises a text data set beforehand, and a vision one in its collator
    if not work.vision:
        names = ["prompt_ids", "chosen_ids", "rejected_ids"]
        if cached:
            names += ["ref_chosen_logps", "ref_rejected_logps"]
        pairs = []
        for row in trainer.train_dataset:
            pairs.append({name: row[name] for name in names})
    batch = trainer.data_collator([dict(pair) for pair in pairs]) if prepared else None
    installed, losses = utils._use_triton, []

    def step() -> None:
        wrapped.zero_grad()
        inputs = dict(batch) if prepared else trainer.data_collator([dict(pair) for pair in pairs])
        utils._use_triton = (lambda device: True) if answers_only else installed
        losses.append(trainer.training_step(wrapped, inputs).item())
        trainer.accelerator.clip_grad_norm_(wrapped.parameters(), CLIP).item()
        optimizer.step()

    return Side(
        partial(timed, step, device), losses,
        lambda: torch.cat([sides[name].grad.flatten().cpu() for name in sorted(sides)]),
    )
