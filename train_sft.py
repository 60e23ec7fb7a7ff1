"""Stage 1, supervised fine-tuning: answer with the title of the item that the user chose next.

    python train_sft.py --model MODEL --data DATA --out OUT

OUT receives the LoRA adapter (PEFT's files), log.jsonl (a line an optimizer step) and run.json. A
run that was killed goes on when the same command is given again.
"""

from collections.abc import Sequence

from hanorec.base import command
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.settings import parse

KINDS = [ModelConfig, DataConfig, TrainConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__, "train_sft")  # --help needs no torch

import torch

from hanorec.base.batches import micro_batches, total
from hanorec.losses import sft_loss
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.forward import forward
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import load_examples, sft_rows
from hanorec.run.run import Run


def main(argv: Sequence[str] | None = None) -> None:
    _, data, train = configs = parse(KINDS, argv, __doc__, "train_sft")
    run = Run(configs)
    backbone = run.load_backbone()
    builder, examples = load_examples(backbone, data, train)
    fit(run, builder, sft_rows(builder, examples, train.seed))


def fit(run: Run, builder: PromptBuilder, rows: Sequence[Row]) -> None:
    """SFT-1 on these rows, each with one answer: from a fresh adapter to a finished one in OUT."""
    backbone, train = builder.backbone, run.train
    policy = backbone.model
    plan = run.plan(rows, backbone)

    trained = run.trainable_adapter(backbone)
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=0.0)
    run.describe(builder, rows=len(rows))

    policy.train()
    for step, epoch, batch in run.steps(plan, optimizer):
        tokens = sum(rows[i].answer_tokens for i in batch)
        losses = []
        for part, weight in micro_batches(batch, train.micro_batch):
            micro = builder.collate(rows, part)
            logits = forward(backbone, micro)  # (b, L, V)
            # SFT-1: the mean over the answer tokens of the whole step, however it is cut into
            # micro-batches and shares.
            loss = sft_loss(logits, micro.labels) * weight * len(micro.token) / tokens
            loss.backward()
            losses.append(loss.detach())
        (loss_sum,) = run.update([rows[i].name for i in batch], total(losses))
        run.log(step=step, epoch=epoch, loss=loss_sum)
    run.finish(policy, stage="sft")
