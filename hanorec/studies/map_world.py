"""Where the runs of one seed of `hanorec.studies.map` lie, how they are made, and what is read.

    OUT/seed-S/data, exchanged    Posterland, and the same with half of its posters exchanged
    OUT/seed-S/SFT                the policy that all start from, and the reference of all
    OUT/seed-S/EXPERIMENT/CELL    a run of train_dpo.py; EXPERIMENT/SPLIT/CELL its evaluation
    OUT/seed-S/cpu                CPU seconds of each

What is finished is not done again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.datasets.posterland import make_posterland
from hanorec.run.record import check_settings
from hanorec.studies import stages
from hanorec.studies.map_labels import exchange_posters, wrong_preferences
from hanorec.studies.map_rows import WrongLabels
from hanorec.studies.runs import (
    EVALUATION,
    TRAINING,
    folder_name,
    is_evaluated,
    seconds,
    settings,
    timed,
    train_once,
    train_script,
)
from hanorec.studies.scripts import script

# Measure -> its value of each user: of NDCG@3; of the rest, on the pairs of the user's target with
# each other candidate, the share with h > 0 and the mean h, where h is DPO-1's against SFT.
Measures = dict[str, list[float]]


@dataclass(frozen=True)
class World:
    """One seed's data, and what all its runs share.

    Attributes:
        data: a folder in the native layout; None: Posterland, made anew for each seed.
        sft, test: flags of train_sft.py and evaluate.py.
    """

    here: Path
    model: str
    given: str | None
    seed: int
    sft: Sequence[str]
    test: Sequence[str]

    @property
    def data(self) -> str:
        return self.given or str(self.here / "data")

    @property
    def exchanged(self) -> str:
        """The data with half of the posters exchanged."""
        return str(self.here / "exchanged")

    @property
    def below(self) -> Path:
        return self.here / "SFT"

    def folder(self, experiment: str, cell: str) -> Path:
        """Of a run of train_dpo.py."""
        return self.here / experiment / folder_name(cell)

    def make(self) -> None:
        """Data and SFT, as far as they are not there."""
        if self.given is None and not (Path(self.data) / "dataset.json").exists():
            make_posterland(Path(self.data), stages.USERS, seed=self.seed)
        train_script("train_sft", self._training(self.sft), self.below, self.spent("SFT"))

    def policy(
        self, experiment: str, cell: str, flags: Sequence[str], control: str = "",
        wrong: WrongLabels | None = None,
    ) -> Path:
        """A run of train_dpo.py from SFT; its folder.

        Args:
            control: a cell with the same pairs, whose reference is taken; "": its own.
            wrong: labels that are told the wrong way round.
        """
        out = self.folder(experiment, cell)
        flags = self.dpo_flags(flags)
        if control:
            reference = self.folder(experiment, control) / "reference.safetensors"
            flags += ["--reference", str(reference)]

        def main(argv: list[str]) -> None:
            module = script("train_dpo")
            if wrong is not None:
                module.preferences = wrong_preferences(wrong)
            module.main(argv)

        train_once(
            main, TRAINING["train_dpo"], flags, out, "adapter_config.json",
            self.spent(experiment, cell))
        return out

    def facts(self, experiment: str, cell: str) -> dict[str, Any]:
        """How many pairs, steps and epochs a run had."""
        record = read_object(self.folder(experiment, cell) / "run.json")
        epochs = record["settings"]["epochs"]
        return {"pairs": record["pairs"], "steps": record["steps"], "epochs": epochs}

    def cpu_seconds(self, experiment: str) -> float:
        """Of all that this experiment has finished."""
        spent = self.here / "cpu" / experiment
        return sum(seconds(path) for path in spent.glob("*.json"))

    def dpo_flags(self, flags: Sequence[str]) -> list[str]:
        """All that train_dpo.py needs but `--out`."""
        return [*self._training(flags), "--sft", str(self.below)]

    def _training(self, flags: Sequence[str]) -> list[str]:
        return ["--model", self.model, "--data", self.data, "--seed", str(self.seed), *flags]

    def spent(self, *of: str) -> Path:
        """Where CPU seconds are kept."""
        *folders, name = map(folder_name, of)
        return self.here.joinpath("cpu", *folders, f"{name}.json")

    def read(
        self, experiment: str, cell: str, adapters: Sequence[Path], split: str = "test",
        exchanged: bool = False,
    ) -> list[Measures]:
        """What these policies make of the same frozen random candidates, in their order."""
        if exchanged and not Path(self.exchanged).exists():
            exchange_posters(self.data, Path(self.exchanged), self.seed)
        data = self.exchanged if exchanged else self.data
        where = f"{split}-exchanged" if exchanged else split
        flags = ["--model", self.model, "--data", data, *self.test]
        flags += ["--sets", "random", "--split", split]
        found = self._evaluation(experiment, where, cell, adapters, flags)
        base = self._evaluation("reference", where, "SFT", [self.below], flags)
        if found["users"] != base["users"]:
            raise InputError(
                f"{self.here}: {cell} was asked for other candidates than SFT, expected the same: "
                "the data folder was changed; choose another --out")
        return [
            measures(found["users"], ndcg, scores, base["scores"][0])
            for ndcg, scores in zip(found["NDCG@3"], found["scores"], strict=True)
        ]

    def _evaluation(
        self, experiment: str, where: str, cell: str, adapters: Sequence[Path], flags: list[str],
    ) -> dict[str, Any]:
        """The users asked, and NDCG@3 and scores of each policy."""
        report = self.here / experiment / where / folder_name(cell)
        if not is_evaluated(report):
            policies = []
            for adapter in adapters:
                policies += ["--adapter", str(adapter)]
            timed(
                self.spent(experiment, f"{cell} {where}"),
                lambda: script("evaluate").main([*flags, *policies, "--out", str(report)]))
        check_settings(report, settings(EVALUATION, flags))
        found = read_object(report / "metrics.json")["sets"]["random"]
        return {
            "users": found["users"],
            "NDCG@3": [one["rows"]["NDCG@3"] for one in found["policies"].values()],
            "scores": list(found["scores"].values()),
        }


def measures(
    users: Sequence[dict[str, Any]],
    ndcg: list[float],
    scores: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]],
) -> Measures:
    """A policy's measures by user, from its and the reference's scores (U, C) of the candidates."""
    found: Measures = {"NDCG@3": ndcg, "accuracy": [], "h": []}
    moved = np.array(scores) - np.array(reference)  # log pi - log pi_ref
    for user, of_user in zip(users, moved, strict=True):
        target = np.array(user["candidates"]) == user["target"]
        h = of_user[target] - of_user[~target]  # (C - 1,) of DPO-1
        found["accuracy"].append(float(((h > 0) + (h == 0) / 2).mean()))
        found["h"].append(float(h.mean()))
    return found
