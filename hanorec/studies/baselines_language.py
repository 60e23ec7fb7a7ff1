"""The rows of the comparison that a language model makes in more than one command."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hanorec import export
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.files import read_object
from hanorec.base.settings import check, option, parse
from hanorec.baselines import picking, sprec
from hanorec.run.record import check_settings, write_run
from hanorec.studies.baselines_scoring import Job, score_adapter
from hanorec.studies.runs import is_evaluated, settings, timed, train_once, train_script

# ---- SPRec ----


@dataclass(frozen=True)
class SprecConfig:
    """What SPRec has beside the settings of its stages."""

    rounds: int = option(5, "SPRec: T")

    def __post_init__(self) -> None:
        check(self, rounds=0)


PICKING = [ModelConfig, DataConfig, TrainConfig, picking.PickConfig]
SPREC = [ModelConfig, DataConfig, TrainConfig, SprecConfig]


def train_sprec(flags: list[str], out: Path, spent: Path) -> None:
    """All stages of all rounds, but for those that are finished; run.json says which policy is the
    last."""
    if not (out / "run.json").exists():
        configs = model, _, train, config = parse(SPREC, [*flags, "--out", str(out)])
        own = argparse.ArgumentParser(allow_abbrev=False)
        for flag in ("--model", "--sft", "--rounds"):
            own.add_argument(flag)
        _, training = own.parse_known_args(flags)
        stages, policy = sprec.plan(out, train.sft, model.model, training, config.rounds)
        pairs = 0
        for stage in stages:
            train_stage(stage, spent / f"{stage.out.name}.json")
            if stage.name == "train_dpo":
                pairs += read_object(stage.out / "run.json")["pairs"]
        write_run(out, configs, {}, policy=policy, pairs=pairs)
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
