r"""The step of train_dpo.py read otherwise: other noise, other rewards, other terms of the loss.

The document's own step stands in train_dpo.py. At the document's settings `other_step` computes the
same to the bit. Readings of one quantity are no steps: readings.py.
P = prompts, n = rejected answers to each, B = prompts of a step, b = of a micro-batch.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hanorec.base.batches import gather_batch, micro_batches, smallest_part, total
from hanorec.base.config import DpoConfig, TrainConfig
from hanorec.base.config_steps import StepConfig
from hanorec.base.distributed import rank, run_on_all_ranks
from hanorec.base.errors import InputError
from hanorec.hars import pair_beta, reward_gap
from hanorec.lora.layer import lora_noise
from hanorec.losses import dpo_loss, prompt_logits
from hanorec.mllm.backbone import Backbone, use_checkpointing
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.collate import Batch, collate
from hanorec.mllm.forward import forward, reference_kl, score_batches
from hanorec.mllm.items import hidden_embeddings
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import Preference
from hanorec.readings import ETAS, KEPT, NOISES, alignment_kl
from hanorec.run.run import Plan
from hanorec.scoring import answer_log_probs


@dataclass(frozen=True)
class Stage:
    """What every step of a run of DPO works with."""

    builder: PromptBuilder
    prompts: Sequence[Preference]  # P
    reference: Tensor  # (P, 1 + n) log pi_ref of every answer
    lam: Tensor  # (P, n)
    noise: torch.Generator
    train: TrainConfig
    dpo: DpoConfig
    state: dict[str, float] = field(default_factory=dict)  # what an eta carries from step to step

    @cached_property
    def rows(self) -> list[Row]:
        """The prompts' own."""
        return [prompt.row for prompt in self.prompts]


class Taken(NamedTuple):
    """What a step has found; its gradients lie in the weights."""

    log_probs: Tensor  # (B, 1 + n) of the noisy policy
    eta: Tensor  # () or (B, n)
    beta: Tensor  # (B, n)
    loss: float  # this rank's part of it
    kl: float = 0.0  # this rank's part of it


Step = Callable[[Stage, Sequence[int], int], Taken]  # stage, prompts of the batch, its number


def step_for(
    readings: StepConfig,
    backbone: Backbone,
    plan: Plan,
    train: TrainConfig,
    dpo: DpoConfig,
    documented: Step,
) -> Step:
    """The step that these settings ask for: `documented`, or `other_step`.

    The reading without noise in backward turns checkpointing on: it is what computes again.
    InputError where eta is that of a micro-batch and one of the plan has fewer than 3 pairs.
    """
    if not (readings.changes_the_step or dpo.normalised or dpo.with_kl):
        return documented
    if readings.eta_over == "micro" and (dpo.hars or readings.kept != "all"):
        least = min(smallest_part(len(batch), train.micro_batch) for _, batch in plan)
        if least * dpo.rejected < 3:
            raise InputError(
                f"--eta-over micro: a micro-batch has {least * dpo.rejected} pairs, expected at "
                "least 3 in each; leave the rest of an epoch out with --drop-last true, or raise "
                "--micro-batch or --rejected"
            )
    if readings.noise_pass == "forward":
        use_checkpointing(backbone)
    return partial(other_step, readings)


class Weights:
    """beta' and the weight in the loss of every pair, (P, n) each, as rewards come in."""

    def __init__(self, readings: StepConfig, stage: Stage, step: int) -> None:
        self.kind, self.stage, self.etas = readings.kept, stage, []
        self.beta = torch.full_like(stage.lam, stage.dpo.beta0)  # DPO-2, unless HaRS sets them
        self.kept = torch.ones_like(stage.lam)
        # Alike on all ranks, and in a run that goes on: a function of seed and step.
        seed = np.random.SeedSequence([stage.train.seed, step]).generate_state(1)[0]
        self.generator = torch.Generator().manual_seed(int(seed))

    @property
    def wanted(self) -> bool:
        """Whether anything depends on rewards."""
        return self.stage.dpo.hars or self.kind != "all"

    @property
    def eta(self) -> Tensor:
        """The mean of all so far; 1 without HaRS."""
        etas = self.etas or [self.beta.new_ones(())]
        return torch.stack([eta.mean() for eta in etas]).mean()

    def weigh(self, rows: Sequence[int], R: Tensor, own: slice = slice(None)) -> None:
        """Weigh the prompts `rows` by the rewards R (b, n) of a batch, of which they are `own`."""
        dpo, state = self.stage.dpo, self.stage.state
        if dpo.hars:
            eta = ETAS[dpo.eta](R, state, dpo.trim)  # () or as R
            self.etas.append(eta)
            self.beta[rows] = pair_beta(self.stage.lam[rows], eta.expand_as(R)[own], dpo.beta0)
        self.kept[rows] = KEPT[self.kind](R, state, dpo.trim, self.generator)[own]

    def weigh_micro(self, rows: Sequence[int], R: Tensor, counts: int) -> None:
        """`weigh` where the batch is what all ranks have of a micro-batch.

        counts: 0 where this rank has nothing left, and computes a row of another's.
        """
        rows = rows if counts else []
        found = run_on_all_ranks(R[: len(rows)].tolist)
        first = sum(map(len, found[: rank()]))
        self.weigh(rows, R.new_tensor(list(chain(*found))), slice(first, first + len(rows)))


def other_step(readings: StepConfig, stage: Stage, batch: Sequence[int], step: int) -> Taken:
    """The forwards and backwards of one optimizer step, as `readings` has them."""
    train, dpo, lam, noise = stage.train, stage.dpo, stage.lam, stage.noise
    backbone = stage.builder.backbone
    policy = backbone.model
    parts = micro_batches(batch, train.micro_batch)
    micros = [packs(stage, part, readings.noise_draw == "answer") for part, _ in parts]
    weights = Weights(readings, stage, step)

    if weights.wanted and readings.rewards == "clean":
        policy.eval()
        clean = [stage.reference[part] for part, _ in parts]  # at first it is the policy
        if step > 0:
            clean = [torch.cat(score_batches(backbone, micro), 1) for micro in micros]
        weigh_clean(readings, stage, batch, clean, weights)

    policy.train()
    pairs = lam[batch].numel()
    tokens = sum(stage.rows[i].answer_tokens for i in batch)
    draws, losses, kl_sum = [], [], 0.0
    for _ in range(readings.noise_draws):
        found, start = [], noise.get_state()
        for (part, counts), micro in zip(parts, micros, strict=True):
            with ExitStack() as noisy:
                log_probs, kls = [], []
                for pack in micro:
                    noisy.close()
                    if readings.noise_draw == "step":
                        noise.set_state(start)  # the draw of the micro-batch before
                    noisy.enter_context(lora_noise(policy, dpo.sigma_n, noise, NOISES[dpo.noise]))
                    logits = forward(backbone, pack)  # (b, L, V)
                    log_probs.append(answer_log_probs(logits, pack))
                    if dpo.with_kl:
                        share = counts * len(pack.token) / tokens
                        kls.append((reference_kl(backbone, pack, logits), share))  # HN-12
                h = prompt_logits(torch.cat(log_probs, 1), stage.reference[part])  # (b, n)
                found.append(torch.cat(log_probs, 1).detach())
                if weights.wanted and readings.rewards == "noisy":
                    weights.weigh_micro(part, reward_gap(h, dpo.beta0), counts)

                loss = dpo_loss(h, weights.beta[part], dpo.normalised_by) * weights.kept[part]
                loss = loss.sum() * counts / pairs
                for kl, share in kls:
                    loss = loss + dpo.kl_coef * kl * share
                    kl_sum += kl.item() * share
                if readings.alignment_coef > 0:
                    share = counts * len(part) / len(batch)
                    loss = loss + readings.alignment_coef * alignment(stage, part) * share
                loss = loss / readings.noise_draws
                if readings.noise_pass == "forward":
                    noisy.close()
                loss.backward()
                losses.append(loss.detach())
        draws.append(gather_batch(found, len(batch)))

    beta = gather_batch([weights.beta[part] for part, _ in parts], len(batch))
    log_probs = torch.stack(draws).mean(0)
    return Taken(log_probs, weights.eta, beta, total(losses), kl_sum / readings.noise_draws)


def weigh_clean(
    readings: StepConfig,
    stage: Stage,
    batch: Sequence[int],
    clean: Sequence[Tensor],
    weights: Weights,
) -> None:
    """Weigh the pairs by the clean policy's log-probabilities of each micro-batch, (b, 1 + n)."""
    beta0 = stage.dpo.beta0
    if readings.eta_over == "step":
        h = prompt_logits(gather_batch(clean, len(batch)), stage.reference[batch])
        weights.weigh(batch, reward_gap(h, beta0))
        return
    parts = micro_batches(batch, stage.train.micro_batch)
    for (part, counts), log_probs in zip(parts, clean, strict=True):
        h = prompt_logits(log_probs, stage.reference[part])
        weights.weigh_micro(part, reward_gap(h, beta0), counts)


def packs(stage: Stage, part: Sequence[int], apart: bool) -> list[Batch]:
    """These prompts with all their answers in one forward; apart: a forward for each answer."""
    rows = [stage.rows[i] for i in part]
    if not apart:
        return [stage.builder.collate(rows, range(len(rows)))]
    single = []
    for a in range(len(rows[0].answers)):
        single.append([replace(row, answers=[row.answers[a]]) for row in rows])
    builder = stage.builder
    return [collate(builder.backbone, rows, builder.pictures) for rows in single]


def alignment(stage: Stage, part: Sequence[int]) -> Tensor:
    """`alignment_kl` of the items of these prompts' pairs that have an image; 0 of fewer than 3.

    Embeddings are the mean last hidden states (HN-1, `hidden`) of the policy as it is.
    """
    builder = stage.builder
    items: set[int] = set()
    for i in part:
        items.update(chain(*stage.prompts[i].items))
    shown = sorted(items & builder.pictures.keys())
    if len(shown) < 3:
        return torch.zeros((), device=builder.backbone.device)
    return alignment_kl(
        *hidden_embeddings(builder.backbone, builder.catalog, builder.pictures, shown)
    )
