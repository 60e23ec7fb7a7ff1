"""Who trains and who scores each kind of row of the comparison."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from hanorec.baselines import matrix_training, sequence_training, sprec
from hanorec.baselines.config import MatrixConfig, SequenceConfig, VectorFiles
from hanorec.baselines.llara_training import CONTROL, LLARA
from hanorec.studies import baselines_language as language
from hanorec.studies.baselines_scoring import Job, score_adapter, score_popularity, score_vectors
from hanorec.studies.runs import TRAINING, train_once, train_script


class Maker(NamedTuple):
    """How rows of a kind are made.

    Attributes:
        score: writes the report of a job.
        stage: of `hanorec.studies.baselines_flags.STAGES`, whose flags the training takes.
        kinds: the settings that its flags fill.
        train: (flags, out, folder of CPU seconds): trains unless that is finished; None where
            nothing is trained.
        model: whether a checkpoint is needed.
        first: flags that stand before those of the user.
        below: the flag of training that names the folder of the row below, or one in it.
        keeps: the flag of training that names a folder for what all runs share.
        ranks_all: whether training ends in a full ranking, in metrics.json.
    """

    score: Callable[[Job], None]
    stage: str = ""
    kinds: Sequence[type] = ()
    train: Callable[[list[str], Path, Path], None] | None = None
    model: bool = True
    first: Sequence[str] = ()
    below: tuple[str, str] | None = None
    keeps: str = ""
    ranks_all: bool = False


def by_script(name: str, stage: str, below: tuple[str, str] | None = None) -> Maker:
    """Of rows that a script of the repository's root trains."""

    def train(flags: list[str], out: Path, spent: Path) -> None:
        train_script(name, flags, out, spent / "training.json")

    return Maker(score_adapter, stage, TRAINING[name], train, below=below)


def by_vectors(module: ModuleType, stage: str, config: type) -> Maker:
    """Of rows whose scores are inner products. module: with the command that trains them."""
    kinds = [VectorFiles, config]

    def train(flags: list[str], out: Path, spent: Path) -> None:
        train_once(module.main, kinds, flags, out, "metrics.json", spent / "training.json")

    return Maker(score_vectors, stage, kinds, train, model=False, ranks_all=True)


MAKERS = {
    "popularity": Maker(score_popularity, model=False),
    "matrix": by_vectors(matrix_training, "matrix", MatrixConfig),
    "sequence": by_vectors(sequence_training, "sequence", SequenceConfig),
    "base": Maker(score_adapter),
    "sft": by_script("train_sft", "sft"),
    "dpo": by_script("train_dpo", "dpo", ("--sft", "")),
    "llara": Maker(
        partial(language.score_llara, policy=LLARA), "sft", language.LLARA, language.train_llara,
        below=("--table", "test")),
    "llara_permuted": Maker(partial(language.score_llara, policy=CONTROL)),
    "sprec": Maker(
        language.score_sprec, "sprec", language.SPREC, language.train_sprec, first=sprec.ROUND,
        below=("--sft", "")),
    "reranked": Maker(language.score_reranked),
    "msr": Maker(
        partial(language.score_msr, shown="own"), "sft", language.MSR, language.train_msr,
        keeps="--texts"),
    "msr_none": Maker(partial(language.score_msr, shown="none")),
    "msr_other": Maker(partial(language.score_msr, shown="other")),
}
