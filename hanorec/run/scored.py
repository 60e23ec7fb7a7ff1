"""The report of any recommender, from its scores alone, in the layout of evaluate.py's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.distributed import rank
from hanorec.base.errors import InputError, shown
from hanorec.base.files import claim_folder, write_json
from hanorec.datasets.interactions import Example, HeldOut
from hanorec.ranking.candidate_sets import input_hashes
from hanorec.ranking.report import compare_sets
from hanorec.run.record import all_settings, close_run


def write_scores(
    out: str | Path,
    name: str,
    scores: Mapping[str, np.ndarray],
    sets: Mapping[str, Sequence[Example]],
    held: HeldOut,
    configs: Sequence[Any],
    **inputs: str | None,
) -> dict[str, Any]:
    """Write OUT/metrics.json and, last, OUT/run.json of one row; returns the first.

    Args:
        out: a new or empty folder.
        name: of the row, which stands where evaluate.py has a policy.
        scores: candidate set -> (U, C), in the order of each example's candidates.
        sets: candidate set -> U examples, see `frozen_sets`.
        configs: DataConfig, EvalConfig, and what else the row was made with.
        inputs: hashes of what it stands on beside data and candidates.
    Raises:
        InputError: a score that is not finite; OUT holds files. Nothing is written then.
    """
    data, config, *_ = configs
    for kind, examples in sets.items():
        check_scores(name, kind, scores[kind], examples)
    if rank() == 0:
        claim_folder(out)
    of_row = {kind: {name: {"sum": scores[kind]}} for kind in sets}
    report = {
        "settings": all_settings(configs),
        "sets": compare_sets(sets, of_row, held, config.seed),
    }
    if rank() == 0:
        write_json(Path(out) / "metrics.json", report)
    close_run(Path(out), configs, input_hashes(held, data, config, []) | inputs)
    return report


def check_scores(
    name: str, kind: str, scores: np.ndarray, examples: Sequence[Example]
) -> None:
    """InputError for a row's first score on a candidate set that is not finite.

    ValueError where there is not one for each candidate.
    """
    wanted = len(examples), len(examples[0].candidates)
    if scores.shape != wanted:
        raise ValueError(f"{name}, {kind}: scores {scores.shape}, expected {wanted}")
    broken = ~np.isfinite(scores).all(1)  # (U,)
    if broken.any():
        number = int(broken.argmax())
        raise InputError(
            f"{name}, {kind} candidates: the scores of user {shown(examples[number].user)} are "
            f"{scores[number].tolist()}, expected finite numbers; lower the learning rate"
        )
