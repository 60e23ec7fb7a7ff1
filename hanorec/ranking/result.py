"""What a recommender that ranks all items leaves in its finished OUT folder.

    model.safetensors, model.json         the best epoch's weights, and how they were trained
    embeddings.safetensors, names.json    all that `hanorec.ranking.retriever` needs
    metrics.json                          validation and test; written last: the run is finished
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from hanorec.base.files import write_bytes, write_json
from hanorec.ranking.early_stopping import BestEpoch

Evaluation = tuple[dict[str, float], np.ndarray, dict[str, np.ndarray]]  # of `evaluate`


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of safetensors, whole or absent."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(cpu))


def write_model(out: Path, best: BestEpoch, metric: str, config: Any) -> None:
    """The best epoch's weights.

    metric: what it is best in, on validation. config: a dataclass of the settings that they were
    trained with.
    """
    write_tensors(out / "model.safetensors", best.weights)
    facts = {"epoch": best.epoch, f"valid_{metric}": best.score, "config": asdict(config)}
    write_json(out / "model.json", facts)


def write_retriever(out: Path, tensors: Mapping[str, Tensor], **names: Any) -> None:
    """What `hanorec.ranking.retriever.load_retriever` reads.

    Args:
        tensors: "user" (U, d) and "item" (I, d), whose inner products are the scores; "train"
            (2, E), the pairs that are masked.
        names: users and items, in order of the rows, and what else names.json is to state.
    """
    write_tensors(out / "embeddings.safetensors", tensors)
    write_json(out / "names.json", names)


def write_metrics(
    out: Path,
    names: Sequence[str],
    epochs: int,
    best_epoch: int,
    valid: Evaluation,
    test: Evaluation,
) -> None:
    """metrics.json, with the test metrics of each user, by the names of all users."""
    report, users, rows = test
    write_json(out / "metrics.json", {
        "epochs": epochs,
        "best_epoch": best_epoch,
        "valid": valid[0],
        "test": report,
        "users": [names[user] for user in users],
        "rows": {name: values.tolist() for name, values in rows.items()},
    })
