"""LLaRA's training loop, that of train_sft.py with a projector beside the adapter; and its scores.

    train_llara(model, data, train, llara)              OUT as of train_sft.py, and the projector
    score_llara(builder, sets, folder, table, config)   EV-1 on the frozen candidates

What differs from the authors' code: the curriculum's step is the optimizer's, counted over the
whole run, and one choice holds for all rows of it (there a micro-batch, counted anew in each epoch
by each data loader, so that p hardly leaves 0); a title stands alone in the prompts without vectors
(there an untrained placeholder follows it); one wording instead of three; candidates drawn once;
loss on the answer with its end of turn; cosine without warm-up, and weight decay apart from the
gradient (there Adam's); every candidate's title is scored (there the answer is generated, and often
invalid). The authors' own settings, where they are not the defaults here: --lora-dropout 0.1,
--learning-rate 8e-4, --accumulation 32 with --micro-batch 4, --history 10, --candidates 20.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from hanorec.base.batches import micro_batches
from hanorec.base.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from hanorec.base.distributed import rank
from hanorec.base.errors import InputError
from hanorec.base.settings import check, option
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
from hanorec.run.run import Run

LLARA, CONTROL = "LLaRA", "LLaRA, vectors permuted"


@dataclass(frozen=True)
class LlaraConfig:
    """What LLaRA has beside the settings of train_sft.py."""

    table: str = option(
        help="folder of a trained SASRec row: the item table of its embeddings.safetensors",
    )
    projector_decay: float = option(1e-5, "authors' code: weight decay of the projector")

    def __post_init__(self) -> None:
        check(self, projector_decay=0)


def train_llara(
    model: ModelConfig, data: DataConfig, train: TrainConfig, llara: LlaraConfig
) -> None:
    """Adapter and projector on prompts that are hybrid ever more often; the table is never changed.
    """
    run = Run([model, data, train, llara])
    backbone = run.load_backbone()
    policy = backbone.model
    builder, examples = load_examples(backbone, data, train)
    builder = text_alone(builder)
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
        loss_sum = 0.0
        for part, weight in micro_batches(batch, train.micro_batch):
            chosen = [rows[i] for i in part]
            shown = chain.from_iterable(row.images for row in chosen)  # of text rows: none
            vectors = item_vectors(projector, m, shown)  # LL-1
            micro = collate(backbone, chosen, vectors, packed=not data.plain)
            logits = forward(backbone, micro)  # (b, L, V)
            # LL-3 is SFT-1 under the hybrid prompt.
            loss = sft_loss(logits, micro.labels) * weight * len(micro.token) / tokens
            loss.backward()
            loss_sum += loss.item()
        (loss_sum,) = run.update([rows[i].name for i in batch], loss_sum)
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
    config: EvalConfig,
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """EV-1 under hybrid prompts: set -> policy -> {"sum": (U, C), "mean": (U, C)}.

    The policies are LLaRA, and the control that gives each item another one's vector.

    Args:
        builder: of the held-out data.
        sets: as `hanorec.ranking.candidate_sets.frozen_sets` gives them.
        folder: of `train_llara`. table: that it was trained with.
        config: whose `batch` and `seed` are used.
    """
    builder = text_alone(builder)
    table = load_table(table, builder.catalog)  # (N, d)
    use_policy(builder.backbone, str(folder))
    projector = load_projector(folder, table)
    with torch.no_grad():
        vectors = item_vectors(projector, table.to(projector.W1), range(len(table)))
    others = shown_pictures(vectors, replace(config, images="shuffled"))

    scores: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for kind, examples in sets.items():
        rows = hybrid_rows(builder, examples, scoring_rows(builder, examples))
        scores[kind] = {}
        for policy, pictures in {LLARA: vectors, CONTROL: others}.items():
            shown = replace(builder, pictures=pictures)
            scores[kind][policy] = score(shown, rows, len(examples), config.batch)
    return scores


def text_alone(builder: PromptBuilder) -> PromptBuilder:
    """The builder without images. InputError where its task is not the ranking one."""
    if builder.config.task != "ranking":
        raise InputError(
            f"--task {builder.config.task}: expected ranking, the one task that LLaRA has; leave "
            "it out"
        )
    catalog = replace(builder.catalog, images=(None,) * len(builder.catalog.images))
    return replace(builder, catalog=catalog, pictures={})


def hybrid_rows(
    builder: PromptBuilder, examples: Sequence[Example], text: Sequence[Row]
) -> list[Row]:
    """`hybrid_row` of each example."""
    pairs = zip(examples, text, strict=True)
    return [hybrid_row(builder, example, row) for example, row in pairs]
