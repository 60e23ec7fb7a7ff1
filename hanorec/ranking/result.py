"""What a recommender that ranks all items leaves in its finished OUT folder.

    model.safetensors, model.json         the best epoch's weights, and how they were trained
    embeddings.safetensors, names.json    all that `hanorec.ranking.retriever` needs
    metrics.json                          validation and test; written last: the run is finished
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from hanorec.base.files import write_bytes, write_json
from hanorec.datasets.mmrec import RankingData
from hanorec.ranking.early_stopping import BestEpoch
from hanorec.ranking.full_ranking import AT, Embeddings

Evaluation = tuple[dict[str, float], np.ndarray, dict[str, np.ndarray]]  # of `evaluate`


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of safetensors, whole or absent."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(cpu))


def write_model(out: Path, best: BestEpoch, config: Any) -> None:
    """The best epoch's weights; config: a dataclass of the settings that they were trained with."""
    write_tensors(out / "model.safetensors", best.weights)
    facts = {"epoch": best.epoch, f"valid_Recall@{AT}": best.score, "config": asdict(config)}
    write_json(out / "model.json", facts)


def write_retriever(out: Path, data: RankingData, emb: Embeddings) -> None:
    """What `hanorec.ranking.retriever.load_retriever` reads: names, fused embeddings, pairs."""
    tensors = {"user": emb.user["f"], "item": emb.item["f"], "train": data.train}
    write_tensors(out / "embeddings.safetensors", tensors)
    write_json(out / "names.json", {"users": data.users, "items": data.items})


def write_metrics(
    out: Path, data: RankingData, epochs: int, best_epoch: int, valid: Evaluation, test: Evaluation
) -> None:
    """metrics.json, with the test metrics of each user."""
    report, users, rows = test
    write_json(out / "metrics.json", {
        "epochs": epochs,
        "best_epoch": best_epoch,
        "valid": valid[0],
        "test": report,
        "users": [data.users[user] for user in users],
        "rows": {name: values.tolist() for name, values in rows.items()},
    })
