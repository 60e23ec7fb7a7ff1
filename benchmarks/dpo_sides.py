"""Both sides of benchmarks/dpo_step.py, from the same weights and pairs: train_dpo.py's step, and
that of TRL's DPOTrainer with PEFT.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import Tensor
from toys import (
    Example,
    ImageTextProcessor,
    Work,
    busy_lora,
    encode,
    image_processor,
    load,
    model,
    tokenizer,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils

from hanorec.hars import pair_beta, responsiveness, reward_gap
from hanorec.lora.layer import LoRALinear, adapters_off, lora_layers, lora_noise
from hanorec.losses import dpo_loss, preference_logit
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.scoring import answer_log_probs

BETA, RATE, CLIP, RANK = 0.1, 1e-5, 1.0, 8
LINEARS = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class Side:
    """step(): one whole step. losses: of each step. gradient(): of the LoRA weights, one flat
    vector, by the layers' names. adapter: the layers that a peer starts from.
    """

    step: Callable[[], None]
    losses: list[float]
    gradient: Callable[[], Tensor]
    adapter: dict[str, LoRALinear] | None = None


def ours(
    work: Work, made: list[Example], device: str, cached: bool = False, clean: bool = False,
    sigma: float = 0.0, tower: bool = False, prepared: bool = False,
) -> Side:
    """train_dpo.py's step. clean: HaRS's extra pass and its weights; sigma: NoDO's noise; tower:
    encode the images in each step, which train_dpo.py does once; prepared: collated beforehand.
    """
    backbone, rows, pictures = load(work, made, device)
    policy = backbone.model
    layers = busy_lora(policy, RANK)
    trained = []
    for layer in layers:
        trained += [layer.A, layer.B]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    noise = torch.Generator(device).manual_seed(0)
    lam = torch.linspace(0.5, 0.8, len(rows), device=device)
    batch = collate(backbone, rows, pictures) if prepared else None
    losses: list[float] = []

    def reference(micro: Any) -> Tensor:
        with torch.no_grad(), adapters_off(policy):
            return answer_log_probs(forward(backbone, micro), micro)

    known = reference(collate(backbone, rows, pictures)) if cached else None

    def step() -> None:
        optimizer.zero_grad()
        micro = batch or collate(backbone, rows, encode(backbone, made) if tower else pictures)
        policy.eval()
        ref = known if cached else reference(micro)  # (B, 2)
        beta: float | Tensor = BETA
        if clean:
            with torch.no_grad():
                h = preference_logit(*answer_log_probs(forward(backbone, micro), micro).T, *ref.T)
            beta = pair_beta(lam, responsiveness(reward_gap(h, BETA)), BETA)
        policy.train()
        with lora_noise(policy, sigma, noise):
            log_probs = answer_log_probs(forward(backbone, micro), micro)  # (B, 2)
            loss = dpo_loss(preference_logit(*log_probs.T, *ref.T), beta).sum() / len(rows)
            loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained, CLIP).item()
        optimizer.step()

    def gradient() -> Tensor:
        grads = []
        for _, layer in sorted(lora_layers(policy).items()):
            grads += [layer.A.grad.flatten().cpu(), layer.B.grad.flatten().cpu()]
        return torch.cat(grads)

    return Side(step, losses, gradient, lora_layers(policy))


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
        learning_rate=RATE, max_grad_norm=CLIP, optim="adamw_torch", weight_decay=0.0, bf16=False,
        use_cpu=device == "cpu", activation_checkpointing=False, max_length=None, report_to="none",
        precompute_ref_log_probs=cached,
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=rf"^(?!.*visual).*\.{LINEARS}$",
        task_type="CAUSAL_LM",
    )
    trainer = DPOTrainer(
        model(work), args=config, train_dataset=Dataset.from_list(pairs),
        processing_class=processing, peft_config=lora,
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
        step, losses,
        lambda: torch.cat([sides[name].grad.flatten().cpu() for name in sorted(sides)]),
    )
