"""The frozen reference of DPO on disk: log pi_ref of every answer, refused when stale."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hanorec.base.distributed import rank
from hanorec.base.errors import InputError
from hanorec.base.facts import check_facts
from hanorec.base.files import write_bytes
from hanorec.mllm.backbone import ImageFeatures
from hanorec.mllm.prompts import Row

AGAIN = "leave --reference out to compute it anew, or delete the file"
NEWER_FACTS = ("base", "adapter_stack")  # that a file of an earlier version may lack


def rows_hash(rows: Sequence[Row], pictures: Mapping[int, ImageFeatures]) -> str:
    """SHA-256 of what the rows ask and compare.

    That is the tokens of prompts and answers, which images they show, and those images' features.
    """
    digest = hashlib.sha256()
    shown: set[int] = set()
    for row in rows:
        shown.update(row.images)
        for part in (row.prompt, row.images, *row.answers):
            digest.update(np.array([len(part), *part], np.int64).tobytes())
    for item in sorted(shown):
        features = pictures[item].features.contiguous()
        digest.update(features.view(torch.uint8).numpy())
    return digest.hexdigest()


def save_reference(path: Path, log_probs: Tensor, facts: dict[str, Any]) -> None:
    """Write log pi_ref (P, A) with the facts that it depends on."""
    if rank() == 0:
        tensors = {"log_probs": log_probs.cpu().contiguous()}
        write_bytes(path, save(tensors, metadata={"facts": json.dumps(facts)}))


def load_reference(path: Path, facts: dict[str, Any]) -> Tensor:
    """log pi_ref (P, A) float32.

    InputError where the file is not whole, or any fact is another one: the reference would be
    another's.
    """
    stored, log_probs = read_reference(path)
    newer = [name for name in NEWER_FACTS if name in facts and name not in stored]
    if newer:
        print(
            f"note: {path} was written by an earlier version, which did not state its "
            f"{' and '.join(newer)}; delete it to have them checked"
        )
    facts = {name: value for name, value in facts.items() if name not in newer}
    check_facts(stored, facts, lambda name, found, wanted: (
        f"{path}: its {name} is {found!r}, expected {wanted!r}: it is stale, or of another run; "
        f"{AGAIN}"
    ))
    return log_probs


def read_reference(path: Path) -> tuple[dict[str, Any], Tensor]:
    """The facts in a file of the reference, and log pi_ref (P, A). InputError: it is not whole."""
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get("facts", "{}"))
            log_probs = file.get_tensor("log_probs")
    except FileNotFoundError:
        raise InputError(
            f"--reference {path}: no such file, expected once, or the reference.safetensors of "
            "another run"
        ) from None
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a whole file of reference log-probabilities ({error}); {AGAIN}"
        ) from None
    if not isinstance(stored, dict):
        raise InputError(
            f"{path}: its facts are {stored!r}, expected an object: the file was edited; {AGAIN}"
        )
    return stored, log_probs
