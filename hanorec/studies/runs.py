"""Rows of the ablation, trained and evaluated with one seed; what is finished is not done again."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hanorec.base.config import DataConfig, DpoConfig, EvalConfig, ModelConfig, TrainConfig
from hanorec.base.config_steps import StepConfig
from hanorec.base.errors import InputError
from hanorec.base.files import read_json, read_object, write_json
from hanorec.base.lock import lock_folder
from hanorec.base.settings import parse
from hanorec.run.record import all_settings, check_settings
from hanorec.studies.scripts import script
from hanorec.studies.tables import CONTROL

TRAINING = {
    "train_sft": [ModelConfig, DataConfig, TrainConfig],
    "train_dpo": [ModelConfig, DataConfig, TrainConfig, DpoConfig, StepConfig],
}

EVALUATION = [ModelConfig, DataConfig, EvalConfig]
SEEN = ("data", "images", "image_processor", "turn", "base")  # of an evaluation's inputs


def check_both(data: str | None, model: str | None) -> None:
    """InputError where --data is given without --model, or the other way round."""
    if (data is None) != (model is None):
        raise InputError(
            f"--data {data} with --model {model}: expected both, or neither for Posterland")


def folder_name(row: str) -> str:
    """A row's name as a folder: letters and digits of any script."""
    return re.sub(r"[^\w.]+", "-", row).strip("-")


def settings(kinds: Sequence[type], flags: Sequence[str]) -> dict[str, Any]:
    """What a script makes of these flags, but for the places, which differ from row to row."""
    found = all_settings(parse(kinds, [*flags, "--out", "."]))
    return {name: value for name, value in found.items() if name not in ("out", "adapter")}


def train_script(name: str, flags: Sequence[str], out: Path, spent: Path) -> None:
    """`train_once` by a script of the repository's root."""
    last = "adapter_config.json"
    train_once(lambda argv: script(name).main(argv), TRAINING[name], flags, out, last, spent)


def train_once(
    main: Callable[[list[str]], None], kinds: Sequence[type], flags: Sequence[str], out: Path,
    last: str, spent: Path,
) -> None:
    """Run a command of training, unless what it writes last is in `out`.

    Args:
        kinds: the settings that its flags fill. spent: receives its CPU seconds.
    Raises:
        InputError: what is finished was made with other settings.
    """
    if not (out / last).exists():
        timed(spent, lambda: main([*flags, "--out", str(out)]))
    check_settings(out, settings(kinds, flags))


def timed(spent: Path, start: Callable[[], None]) -> None:
    """Do something and keep its CPU seconds."""
    begin = time.process_time()
    start()
    write_json(spent, time.process_time() - begin)


def seconds(spent: Path) -> float | None:
    """What `timed` kept; None where the process was killed before it could."""
    return read_json(spent) if spent.exists() else None


def is_evaluated(report: Path) -> bool:
    """Whether the folder has a whole evaluation; what a killed one left is removed."""
    if (report / "run.json").exists():  # written last
        return True
    for half in report.glob("*"):
        half.unlink()
    return False


def read_report(report: Path) -> dict[str, Any]:
    """An evaluation of one policy, as it lies on disk.

    Returns:
        {"sets": {set: the policy's report, with users, popularity and chance},
        "evaluated_on": {input: hash}}
    """
    inputs = read_object(report / "run.json")["inputs"]
    sets = {}
    for kind, one in read_object(report / "metrics.json")["sets"].items():
        policy = next(iter(one["policies"].values()))
        known = {key: one[key] for key in ("users", "popularity", "chance")}
        sets[kind] = {**policy, **known}
    read = [key for key in inputs if key in SEEN or key.startswith("candidates_")]
    return {"sets": sets, "evaluated_on": {key: inputs[key] for key in read}}


def check_inputs(
    here: Path, row: str, inputs: Mapping[str, str], wanted: Mapping[str, str], of: str,
) -> None:
    """InputError where a row was evaluated on other data or candidates than those `of` another."""
    for key, value in wanted.items():
        if (other := inputs.get(key)) != value:
            raise InputError(
                f"{here}: the row {row!r} was evaluated on {key} of hash {other}, expected "
                f"{value} as for {of}: the data folder was changed; choose another --out")


def run_row(
    here: Path, row: str, name: str, flags: Sequence[str], test: Sequence[str],
) -> dict[str, Any]:
    """Train and evaluate what of one row is not finished yet, and read its evaluation.

    Args:
        name: of the script, or "" for the base model.
        flags, test: all that the script and evaluate.py need but `--out`.
    Returns:
        What `read_report` does, and "cpu_seconds" of training, or None.
    Raises:
        InputError: what is finished was made with other settings.
    """
    folder = folder_name(row)
    split = settings(EVALUATION, test)["split"]
    out, report, spent = here / folder, here / split / folder, here / "cpu" / f"{folder}.json"
    if name:
        train_script(name, flags, out, spent)

    if not is_evaluated(report):
        adapter = str(out) if name else "base"
        script("evaluate").main([*test, "--adapter", adapter, "--out", str(report)])
    check_settings(report, settings(EVALUATION, test))
    return {**read_report(report), "cpu_seconds": seconds(spent)}


def run_rows(
    here: Path,
    model: str,
    data: str,
    seed: int,
    flags: Mapping[str, Sequence[str]],
    rows: Mapping[str, tuple[str, list[str]]],
) -> dict[str, dict[str, Any]]:
    """Base, SFT and all rows with one seed on one data set: row -> `run_row`.

    Args:
        flags: of "sft", "dpo", "continued" and "test", each for all rows that need it.
        rows: row -> (script, its own flags).
    Raises:
        InputError: two rows were evaluated on different data or candidates.
    """
    common = ["--model", model, "--data", data]
    training, test = [*common, "--seed", str(seed)], [*common, *flags["test"]]
    plan: dict[str, tuple[str, list[str]]] = {
        "base": ("", []),
        "SFT": ("train_sft", [*training, *flags["sft"]]),
    }
    for row, (name, own) in rows.items():
        shared = flags["dpo"] if name == "train_dpo" else flags["continued"]
        stage = [*training, *shared, *own, "--sft", str(here / "SFT")]
        if name == "train_dpo" and row != CONTROL:
            # the same pairs, so the same reference; it is refused where they are not
            reference = here / folder_name(CONTROL) / "reference.safetensors"
            stage += ["--reference", str(reference)]
        plan[row] = name, stage

    for name, stage in plan.values():
        if name:  # a wrong flag of any row ends the command before the first one trains
            settings(TRAINING[name], stage)

    lock_folder(here)
    found: dict[str, dict[str, Any]] = {}
    for row, (name, stage) in plan.items():
        print(f"\n{here}: {row}")
        found[row] = run_row(here, row, name, stage, test)
        wanted = found["base"]["evaluated_on"]
        check_inputs(here, row, found[row]["evaluated_on"], wanted, "the base model")
    return found
