"""The rows of the comparison with their trials and seeds: what is finished is not done again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hanorec.base.config import ModelConfig
from hanorec.base.files import read_object
from hanorec.baselines.rows import Baseline, Trial
from hanorec.run.record import check_settings
from hanorec.studies.baselines_makers import MAKERS
from hanorec.studies.baselines_scoring import Job
from hanorec.studies.runs import (
    EVALUATION,
    check_inputs,
    folder_name,
    is_evaluated,
    read_report,
    seconds,
    settings,
    timed,
)

METRIC = "NDCG@3"  # on random candidates of validation: by it a setting is chosen


@dataclass
class Comparison:
    """What all rows share, and which setting each of them has.

    Attributes:
        rows: each below those that it stands on.
        flags: stage -> flags of the user.
        trials: how many, of each trained row.
        tried: row -> METRIC of each trial; the first of the highest is chosen.
        stated: input -> its hash, as the rows so far state it.
    """

    data: str
    model: str | None
    out: Path
    split: str
    rows: Mapping[str, Baseline]
    flags: Mapping[str, Sequence[str]]
    trials: int
    tried: dict[str, list[float]] = field(default_factory=dict)
    stated: dict[str, str] = field(default_factory=dict)

    # ---- flags ----

    def settings_of(self, name: str) -> list[Trial]:
        """Those that are tried of a row; of an untrained one there is one, which has no flags."""
        return list(self.rows[name].grid[: self.trials]) or [Trial()]

    def training(self, name: str, number: int, seed: int) -> list[str]:
        """The flags of a trial's training, but for `--out`."""
        row, trial = self.rows[name], self.settings_of(name)[number]
        maker = MAKERS[row.maker]
        flags = ["--data", self.data, "--seed", str(seed)]
        if maker.model:
            flags += ["--model", str(self.model)]
        flags += [*maker.first, *self.flags[maker.stage], *row.flags]
        if maker.below:
            flag, part = maker.below
            flags += [flag, str(self.folder(row.below, seed) / part)]
        if maker.keeps:
            flags += [maker.keeps, str(self.out / "texts")]
        rate = settings(maker.kinds, flags)["learning_rate"]
        return [*flags, *trial.flags, "--learning-rate", repr(rate * trial.rate)]

    def test(self, split: str, name: str = "") -> list[str]:
        """The flags of a row's scoring, or of all rows', but for `--adapter` and `--out`."""
        own = self.rows[name].test if name else ()
        common = ["--data", self.data, "--model", self.model or "", "--sets", "all"]
        return [*common, *self.flags["test"], *own, "--split", split]

    def history(self, name: str, seed: int) -> int | None:
        """How many of a user's last items a row reads; None where there is no last one."""
        maker = MAKERS[self.rows[name].maker]
        if maker.model:
            return settings(EVALUATION, self.test(self.split, name))["history"]
        if maker.stage == "sequence":
            own = settings(maker.kinds, self.training(name, self.number(name), seed))
            return own["history"] or own["length"]
        return None

    def check_flags(self, seed: int) -> None:
        """InputError where the flags of any row are wrong, before the first one is trained."""
        for name, row in self.rows.items():
            settings(EVALUATION, self.test(self.split, name))
            for number, _ in enumerate(row.grid[: self.trials]):
                settings(MAKERS[row.maker].kinds, self.training(name, number, seed))

    # ---- places ----

    def number(self, name: str) -> int:
        """Of the chosen setting; 0 as long as there is none."""
        tried = self.tried.get(name) or [0.0]
        return tried.index(max(tried))

    def folder(self, name: str, seed: int, number: int | None = None, *below: str) -> Path:
        """Of a trial, by default the chosen one, in the seed's folder or in one below it."""
        chosen = self.number(name) if number is None else number
        return self.out.joinpath(f"seed-{seed}", *below, folder_name(name), f"trial-{chosen}")

    # ---- doing ----

    def run_seed(self, seed: int) -> dict[str, dict[str, Any]]:
        """All rows with one seed, those not yet tuned tuned with it: row -> `run_row`."""
        found = {}
        for name in self.rows:
            print(f"\nseed {seed}: {name}")
            if name not in self.tried:
                self.tune(name, seed)
            found[name] = self.run_row(name, seed)
        return found

    def tune(self, name: str, seed: int) -> None:
        """Every trial of a row on validation; nothing to do where there is no choice."""
        test = [*self.test("val", name), "--sets", "random"]
        count, values = len(self.settings_of(name)), []
        for number in range(count if count > 1 else 0):
            report = self.score(name, seed, number, "trials", test)
            values.append(report["sets"]["random"]["metrics"][METRIC]["value"])
        self.tried[name] = values

    def run_row(self, name: str, seed: int) -> dict[str, Any]:
        """The row with its chosen setting.

        Returns: what `read_report` does, "training" and "scoring", CPU seconds or None, "pairs",
        how many were trained on, and "full_ranking", metric -> value where it has one.
        """
        test = self.test(self.split, name)
        found = self.score(name, seed, self.number(name), self.split, test)
        inputs = found["evaluated_on"]
        if settings(EVALUATION, test)["images"] == "none":  # it has not looked at them
            inputs = {key: value for key, value in inputs.items() if key != "images"}
        wanted = {}  # of what not all rows stand on, that which this one does
        for key, value in self.stated.items():
            if key in inputs or key == "data" or key.startswith("candidates_"):
                wanted[key] = value
        check_inputs(self.out, name, inputs, wanted, "the rows before")
        self.stated = inputs | self.stated
        return found

    def score(
        self, name: str, seed: int, number: int, where: str, test: list[str]
    ) -> dict[str, Any]:
        """Train and score what of a trial is not finished yet, and read it."""
        row = self.rows[name]
        maker, out = MAKERS[row.maker], self.folder(name, seed, number)
        training, scoring = (self.folder(name, seed, number, "cpu", of) for of in ("", where))
        facts: dict[str, Any] = {"inputs": {}}
        if row.grid:
            maker.train(self.training(name, number, seed), out, training)
            facts = read_object(out / "run.json")
        report = self.folder(name, seed, number, where)
        below = beside = None
        if row.below:
            below, beside = self.folder(row.below, seed), self.folder(row.below, seed, None, where)
        job = Job(name, out if row.grid else None, below, beside, test, report)
        if not is_evaluated(report):
            timed(scoring / "scoring.json", lambda: maker.score(job))
        known = settings(EVALUATION, test)
        if not maker.model:  # how a checkpoint is loaded is not part of it
            for setting in fields(ModelConfig):
                del known[setting.name]
        check_settings(report, known)
        found = read_report(report)
        trained_on = {key: value for key, value in facts["inputs"].items() if key == "data"}
        check_inputs(report, name, found["evaluated_on"], trained_on, "its training")
        return {
            **found,
            "training": cpu_seconds(training),
            "scoring": cpu_seconds(scoring),
            "pairs": facts.get("pairs", facts.get("rows")),
            "full_ranking": self.full_ranking(out) if maker.ranks_all else {},
        }

    def full_ranking(self, out: Path) -> dict[str, float]:
        """Recall and NDCG among all items, of the split, as the training run found them."""
        return read_object(out / "metrics.json")["valid" if self.split == "val" else "test"]


def cpu_seconds(folder: Path) -> float | None:
    """Of all that was timed there."""
    spent = [seconds(path) for path in folder.glob("*.json")]
    return sum(spent) if spent else None
