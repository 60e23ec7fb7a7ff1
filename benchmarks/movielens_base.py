"""A base checkpoint that knows MovieLens-100K's films, for the ablation on it: all weights of a
tiny Qwen2.5-VL, trained on real histories.

    python -m hanorec.datasets.recbole RAW DATA --draw-covers
    python benchmarks/movielens_base.py DATA OUT [--epochs 1]

A real MLLM knows films; random weights do not, and LoRA on them learns no film. So this trains all
weights but the vision tower's on the ranking prompt, with every item of the histories of the first
40% of the users as a target. Those are the users of SFT in the ablation; the users of the
preference stage and of the test are others.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hanorec.base.batches import global_batches
from hanorec.base.command import run
from hanorec.base.config import DataConfig, TrainConfig
from hanorec.base.files import claim_folder
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import Example
from hanorec.losses import sft_loss
from hanorec.mllm.backbone import Backbone
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_examples
from hanorec.run.run import cosine
from hanorec.studies.tiny import make_checkpoint

WIDTH, LAYERS, VOCABULARY, BATCH, RATE = 64, 3, 4096, 32, 3e-3


def ranking_loss(backbone: Backbone, source: PromptBuilder, examples: list[Example]) -> Tensor:
    """SFT-1 of the targets' titles behind the ranking prompts: ()."""
    rows = [source.ranking_row(example, [example.target]) for example in examples]
    batch = collate(backbone, rows, source.pictures)
    return sft_loss(forward(backbone, batch), batch.labels)


def warm_cosine(rate: float, step: int, steps: int) -> float:
    """The learning rate at a step: up to `rate` over 50 steps, and down by half a cosine."""
    return rate * min(1, (step + 1) / 50) * cosine(step, steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=2025)
    args = parser.parse_args()
    out = claim_folder(args.out)
    make_checkpoint(
        "qwen2_5_vl", out, load_catalog(args.data).titles, WIDTH, LAYERS, args.seed,
        vocabulary=VOCABULARY,
    )
    backbone = load_backbone(str(out), "float32", "cpu")
    data = DataConfig(data=str(args.data), candidate_images="off", users_to=0.4)
    source, examples = load_examples(
        backbone, data, TrainConfig(out="", targets_per_user=0, seed=args.seed)
    )
    trained = [
        weight for name, weight in backbone.model.named_parameters() if ".visual." not in name
    ]
    for weight in trained:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    plan = []
    for epoch in range(args.epochs):
        plan += global_batches(len(examples), BATCH, args.seed, epoch)
    bar = tqdm(plan, "base", disable=None)
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = warm_cosine(RATE, step, len(plan))
        loss = ranking_loss(backbone, source, [examples[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.write(f"step {step} of {len(plan)}: {loss.item():.3f} nats a token of the answer")
    backbone.model.requires_grad_(False)
    backbone.model.save_pretrained(out)
    print(f"wrote {out}: {len(examples)} targets, {len(plan)} steps")


if __name__ == "__main__":
    run(main)
