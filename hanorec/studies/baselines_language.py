"""Rows of the comparison that a language model makes, and no script alone: SPRec, LLaRA, MSRBench
S3, MLLM-MSR.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hanorec import export
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.files import read_object
from hanorec.base.settings import check, option, parse
from hanorec.baselines import llara_training, mllm_msr, msrbench, picking, sprec
from hanorec.baselines.config_llara import LlaraConfig
from hanorec.baselines.msr_texts import generated
from hanorec.baselines.msr_words import extractive
from hanorec.datasets.catalog import data_hash, load_catalog
from hanorec.datasets.interactions import Example
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.evaluation import score, use_policy
from hanorec.mllm.tasks import load_examples, scoring_rows, sft_rows
from hanorec.run.record import check_settings, write_run
from hanorec.run.run import Run
from hanorec.studies.baselines_scoring import (
    Job,
    load_asked,
    load_builder,
    score_adapter,
    write_report,
)
from hanorec.studies.runs import is_evaluated, settings, timed, train_once, train_script
from hanorec.studies.scripts import script

# ---- SPRec ----


@dataclass(frozen=True)
class SprecConfig:
    """What SPRec has beside the settings of its stages."""

    rounds: int = option(5, "SPRec: T")
    pick: Literal["best", "sample", "random"] = option(
        "best", "SPRec; sample (ours): drawn by the scores; random: the control, not self-play")

    def __post_init__(self) -> None:
        check(self, rounds=0)


PICKING = [ModelConfig, DataConfig, TrainConfig, picking.PickConfig]
SPREC = [ModelConfig, DataConfig, TrainConfig, SprecConfig]


def train_sprec(flags: list[str], out: Path, spent: Path) -> None:
    """All stages of all rounds, but for those that are finished; run.json says which policy is the
    last."""
    if not (out / "run.json").exists():
        configs = model, data, train, config = parse(SPREC, [*flags, "--out", str(out)])
        own = argparse.ArgumentParser(allow_abbrev=False)
        for flag in ("--model", "--sft", "--rounds", "--pick"):
            own.add_argument(flag)
        _, training = own.parse_known_args(flags)
        how = config.rounds, config.pick, data.users_seed
        stages, policy = sprec.plan(out, train.sft, model.model, training, *how)
        pairs = 0
        for stage in stages:
            train_stage(stage, spent / f"{stage.out.name}.json")
            if stage.name == "train_dpo":
                pairs += read_object(stage.out / "run.json")["pairs"]
        inputs = {"data": data_hash(load_catalog(data.data))}
        write_run(out, configs, inputs, policy=policy, pairs=pairs)
    check_settings(out, settings(SPREC, flags))


def train_stage(stage: sprec.Stage, spent: Path) -> None:
    """One stage of a round, unless it is finished."""
    if stage.name == "export":  # it has no settings, and nothing of a killed one is of use
        if not is_evaluated(stage.out):
            timed(spent, lambda: export.main([*stage.flags, "--out", str(stage.out)]))
    elif stage.name == "picking":
        train_once(picking.main, PICKING, stage.flags, stage.out, stage.last, spent)
    else:
        train_script(stage.name, stage.flags, stage.out, spent)


def score_sprec(job: Job) -> None:
    """By evaluate.py, the last policy."""
    policy = read_object(job.trained / "run.json")["policy"]
    score_adapter(job._replace(trained=Path(policy)))


# ---- LLaRA ----

LLARA = [ModelConfig, DataConfig, TrainConfig, LlaraConfig]


def train_llara(flags: list[str], out: Path, spent: Path) -> None:
    """By `hanorec.baselines.llara_training`."""
    train_once(
        lambda argv: llara_training.train_llara(*parse(LLARA, argv)), LLARA, flags, out,
        "adapter_config.json", spent / "training.json")


def score_llara(job: Job, policy: str) -> None:
    """policy: LLaRA itself, or its control, which has no training of its own."""
    asked = load_asked(job.test)
    builder = load_builder(asked)
    folder = job.trained or job.below
    table = read_object(folder / "run.json")["settings"]["table"]
    how = asked.config.batch, asked.config.seed, [policy]
    found = llara_training.score_llara(builder, asked.sets, folder, table, *how)
    scores = {kind: of_set[policy]["sum"] for kind, of_set in found.items()}
    write_report(job, asked, scores, builder)


# ---- MSRBench ----


def score_reranked(job: Job) -> None:
    """S3: the bare model, the candidates in the order of the row below."""
    asked, scores = load_asked(job.test), {}
    builder = load_builder(asked)
    for kind, examples in asked.sets.items():
        order = msrbench.stored_scores(job.beside, kind, examples, asked.held.catalog.ids)
        scores[kind] = msrbench.rerank(builder, examples, order, asked.config.batch)["sum"]
    write_report(job, asked, scores, builder)


# ---- MLLM-MSR ----


@dataclass(frozen=True)
class MsrConfig:
    """What MLLM-MSR has beside the settings of train_sft.py."""

    form: Literal["generated", "extractive"] = option(
        "generated", "MLLM-MSR; extractive (ours): words of titles, for bases that cannot write")
    texts: str = option("texts", "folder in which what the base writes is kept, for all runs")


MSR = [ModelConfig, DataConfig, TrainConfig, MsrConfig]


def train_msr(flags: list[str], out: Path, spent: Path) -> None:
    """Stage 3 on the summaries of stage 2, by the loop of train_sft.py."""
    train_once(fit_msr, MSR, flags, out, "adapter_config.json", spent / "training.json")


def fit_msr(argv: list[str]) -> None:
    _, data, train, config = configs = parse(MSR, argv)
    run = Run(configs)
    builder, examples = load_examples(run.load_backbone(), data, train)
    builder = mllm_msr.profile_builder(builder, summaries(builder, examples, config))
    script("train_sft").fit(run, builder, sft_rows(builder, examples, train.seed))


def summaries(
    builder: PromptBuilder, examples: Sequence[Example], config: MsrConfig
) -> mllm_msr.Summaries:
    """What is known of each example's user, in the form that the settings name."""
    if config.form == "generated":
        return generated(builder, examples, Path(config.texts))
    return extractive(builder, examples)


def score_msr(job: Job, shown: str) -> None:
    """shown: the user's "own" summary, or of the controls "none", or that of "other" users."""
    asked = load_asked(job.test)
    folder = job.trained or job.below
    stored = read_object(folder / "run.json")["settings"]
    config = MsrConfig(stored["form"], stored["texts"])
    builder, scores = load_builder(asked), {}
    for kind, examples in asked.sets.items():
        known = summaries(builder, examples, config)
        if shown == "none":
            known = mllm_msr.no_summaries(known)
        if shown == "other":
            known = mllm_msr.other_summaries(known, asked.config.seed)
        own = mllm_msr.profile_builder(builder, known)
        use_policy(own.backbone, str(folder))
        rows = scoring_rows(own, examples)
        scores[kind] = score(own, rows, len(examples), asked.config.batch)["sum"]
    write_report(job, asked, scores, builder)
