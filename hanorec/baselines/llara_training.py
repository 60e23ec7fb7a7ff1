"""LLaRA's training loop, that of train_sft.py with a projector beside the adapter; and its scores.

What differs from the authors' code (ljy0ustc/LLaRA):

- The curriculum counts the optimizer's steps over the whole run, and one choice holds for a step.
  There each worker of the data loader counts micro-batches, anew in each epoch, so that p stays
  below 1 / epochs, and each micro-batch has a choice of its own.
- In prompts without vectors a title stands alone; there an untrained token follows it.
- One wording instead of three; candidates are drawn once, outside all that the user had.
- A cosine without warm-up; weight decay apart from the gradient.
- All candidates' titles are scored, so no answer is invalid; there the answer is generated, and
  HR@1 counts for valid ones alone.
- The table has the width of its SASRec row, instead of 64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from hanorec.base.batches import micro_batches, total
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.distributed import rank
from hanorec.base.errors import InputError
from hanorec.baselines.config_llara import LlaraConfig
from hanorec.baselines.llara import Projector, hybrid_probability, hybrid_row, item_vectors
from hanorec.baselines.llara_files import load_projector, load_table, save_projector, table_sha256
from hanorec.datasets.interactions import Example
from hanorec.losses import sft_loss
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.collate import collate
from hanorec.mllm.evaluation import score, shown_pictures, use_policy
from hanorec.mllm.forward import forward
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import load_examples, scoring_rows, sft_rows
from hanorec.ranking.report import Scores
from hanorec.run.run import Run

LLARA, CONTROL = "LLaRA", "LLaRA, vectors permuted"


def train_llara(
    model: ModelConfig, data: DataConfig, train: TrainConfig, llara: LlaraConfig
) -> None:
    """Adapter and projector on prompts that are hybrid ever more often.

    OUT receives what that of train_sft.py does, and projector.safetensors. A run that was killed
    goes on when it is called again. InputError for data, settings or a table that do not fit.
    """
    check_prompts(data)
    run = Run([model, data, train, llara])
    backbone = run.load_backbone()
    policy = backbone.model
    builder, examples = load_examples(backbone, data, train)
    table = load_table(llara.table, builder.catalog)  # (N, d)
    text = sft_rows(builder, examples, train.seed)
    hybrid = hybrid_rows(builder, examples, text)
    plan = run.plan(hybrid, backbone)

    adapter = run.trainable_adapter(backbone)
    # A generator of its own, so that the adapter's start and its dropout are those of train_sft.py.
    generator = run.generator("cpu")
    projector = Projector(table.shape[1], backbone.width, generator).to(adapter[0])
    m = table.to(adapter[0])
    projection = list(projector.parameters())
    run.trained = [*adapter, *projection]
    optimizer = torch.optim.AdamW([
        {"params": adapter, "weight_decay": 0.0},
        {"params": projection, "weight_decay": llara.projector_decay},
    ], lr=train.learning_rate)
    run.describe(builder, rows=len(text))
    run.inputs = {"table": table_sha256(table), **run.inputs}

    policy.train()
    for step, epoch, batch in run.steps(plan, optimizer, curriculum=generator):
        p = hybrid_probability(step, len(plan))  # LL-2
        with_vectors = torch.rand((), generator=generator).item() < p
        rows = hybrid if with_vectors else text
        tokens = sum(rows[i].answer_tokens for i in batch)
        losses = []
        for part, weight in micro_batches(batch, train.micro_batch):
            chosen = [rows[i] for i in part]
            shown = chain.from_iterable(row.images for row in chosen)  # of text rows: none
            vectors = item_vectors(projector, m, shown)  # LL-1
            micro = collate(backbone, chosen, vectors, packed=not data.plain)
            logits = forward(backbone, micro)  # (b, L, V)
            # LL-3 is SFT-1 under the hybrid prompt.
            loss = sft_loss(logits, micro.labels) * weight * len(micro.token) / tokens
            loss.backward()
            losses.append(loss.detach())
        (loss_sum,) = run.update([rows[i].name for i in batch], total(losses))
        run.log(step=step, epoch=epoch, loss=loss_sum, p=p, hybrid=with_vectors)

    facts = {"table_sha256": table_sha256(table)}
    if rank() == 0:
        facts["projector_sha256"] = save_projector(run.out, projector)
    run.finish(policy, stage="llara", **facts)


def score_llara(
    builder: PromptBuilder,
    sets: Mapping[str, Sequence[Example]],
    folder: str | Path,
    table: str | Path,
    batch: int,
    seed: int,
    policies: Sequence[str] = (LLARA, CONTROL),
) -> dict[str, Scores]:
    """EV-1 under hybrid prompts, set -> `Scores`.

    The policies are LLaRA, and the control in which each item has another one's vector.

    Args:
        builder: of the held-out data.
        sets: as `hanorec.ranking.candidate_sets.frozen_sets` gives them.
        folder: of `train_llara`. table: the folder that it was trained with.
        batch: prompts in one forward. seed: of the control's exchange.
    """
    check_prompts(builder.config)
    m = load_table(table, builder.catalog)  # (N, d)
    use_policy(builder.backbone, str(folder))
    projector = load_projector(folder, m)
    with torch.no_grad():
        vectors = item_vectors(projector, m.to(projector.W1), range(len(m)))
    pictures = {LLARA: vectors, CONTROL: shown_pictures(vectors, "shuffled", seed)}

    scores = {}
    for kind, examples in sets.items():
        rows = hybrid_rows(builder, examples, scoring_rows(builder, examples))
        scores[kind] = {}
        for policy in policies:
            shown = replace(builder, pictures=pictures[policy])
            scores[kind][policy] = score(shown, rows, len(examples), batch)
    return scores


def check_prompts(data: DataConfig) -> None:
    """InputError where these are not LLaRA's: the ranking task, without images."""
    for name, wanted in [("task", "ranking"), ("images", "none")]:
        if getattr(data, name) != wanted:
            raise InputError(
                f"--{name} {getattr(data, name)} with LLaRA: expected {wanted}; its prompts list "
                "titles and vectors of the candidates"
            )


def hybrid_rows(
    builder: PromptBuilder, examples: Sequence[Example], text: Sequence[Row]
) -> list[Row]:
    """`hybrid_row` of each example."""
    pairs = zip(examples, text, strict=True)
    return [hybrid_row(builder, example, row) for example, row in pairs]
