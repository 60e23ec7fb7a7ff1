"""What a run is made from: looked at before anything is loaded, and hashed for its record."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hanorec.base.config import NEGATIVES, DataConfig, EvalConfig, TrainConfig
from hanorec.base.config_steps import StepConfig
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, sha256
from hanorec.datasets.catalog import data_hash
from hanorec.datasets.interactions import HeldOut
from hanorec.lora.folder import adapter_config, check_adapter
from hanorec.lora.stack import base_fingerprint, checkpoint_fingerprint
from hanorec.mllm.backbone import Backbone
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.features import images_sha256
from hanorec.mllm.prompts import Row
from hanorec.ranking.candidate_sets import input_hashes
from hanorec.ranking.cut import check_cut, cut_folder
from hanorec.ranking.retriever import check_retriever
from hanorec.run.reference import read_reference

# ---- before anything is loaded ----


def check_training(configs: Sequence[Any]) -> None:
    """InputError where --sft is no adapter, --reference no file of reference log-probabilities,
    --negatives no file that can be read, --retriever one that has learnt from the targets, or
    --images is for evaluation alone, or settings do not go together.

    configs: of a training script, of which some have these settings.
    """
    for config in configs:
        if getattr(config, "images", "own") == "shuffled":
            raise InputError(
                "--images shuffled: expected own or none in training, since each item's wrong "
                "image would become its name; give it to evaluate.py"
            )
        if getattr(config, "sft", None) is not None:
            check_named_adapter("--sft", config.sft)
        if getattr(config, "reference", "once") != "once":
            read_reference(Path(config.reference))
        if getattr(config, "draw", "random") == "retrieved":
            check_cut(config.retriever, config.targets_per_user)
            if configs[1].targets > 1:
                raise InputError(
                    f"--draw retrieved with --targets {configs[1].targets}: expected --targets 1, "
                    "since a retriever has a state before one target, not before a list; or draw "
                    "at random"
                )
        if getattr(config, "negatives", "random") not in NEGATIVES:
            read_object(Path(config.negatives))
            if configs[1].targets > 1:
                raise InputError(
                    f"--negatives {config.negatives} with --targets {configs[1].targets}: expected "
                    "random, same or chns, since the file has one item for each prompt, not a list"
                )
        if isinstance(config, StepConfig):
            config.check_with(*configs[1:4])


def check_evaluation(data: DataConfig, config: EvalConfig) -> None:
    """InputError where an --adapter is none, or --retriever no folder for this split, or --targets
    or --answers do not go with the rest."""
    other = config.retriever is not None or config.user is not None
    if data.targets > 1 and (config.answers == "scored" or config.sets != "both" or other):
        raise InputError(
            f"--targets {data.targets}: expected --answers greedy or sampled, since a list has no "
            "score for each candidate, and no --sets, --retriever or --user: its candidates are "
            "random; change these"
        )
    if config.answers != "scored" and other:
        raise InputError(
            f"--answers {config.answers} with --retriever or --user: expected scored, since both "
            "order items by their scores; run it apart"
        )
    for policy in config.adapter:
        if policy != "base":
            check_named_adapter("--adapter", policy)
    if config.retriever is not None:
        check_retriever(config.retriever, config.split)
    if config.fuse is not None and (config.retriever is None or config.user is not None):
        raise InputError(
            f"--fuse {config.fuse}: expected --retriever, whose scores it weighs, without --user; "
            "for lists: python -m hanorec.recommend --fuse"
        )


def check_named_adapter(flag: str, folder: str) -> None:
    """InputError that names the flag, where a folder holds no adapter, see `check_adapter`."""
    try:
        check_adapter(folder)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None


# ---- for the record ----

# Inputs that the runs of earlier versions did not state.
NEWER = ("adapter_stack", "images", "image_processor", "turn", "base", "prompts")


def comparable(stored: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's inputs that a run in its folder must have stated: all but newer ones."""
    known = stored if isinstance(stored, dict) else {}
    return {name: value for name, value in inputs.items() if name in known or name not in NEWER}


def training_inputs(
    builder: PromptBuilder, rows: Sequence[Row], train: TrainConfig
) -> dict[str, str | None]:
    """Hashes of all that a training run stands on, --retriever and the adapter of --sft included.

    The particular comes first: a run that goes on with other inputs is told the first of them that
    differs. stands_on and prompts would differ by themselves in most cases.
    """
    sft, drawn = train.sft, {}
    if train.retriever is not None:
        drawn["retriever"] = sha256(cut_folder(train.retriever) / "embeddings.safetensors")
    return {
        **drawn,
        "adapter": sft and sha256(Path(sft) / "adapter_model.safetensors"),
        "adapter_stack": sft and _stack_sha256(Path(sft)),
        "data": data_hash(builder.catalog),
        **seen_inputs(builder),
        "stands_on": base_fingerprint(builder.backbone.model),
        "prompts": _prompts_sha256(rows),
    }


def evaluation_inputs(
    builder: PromptBuilder, held: HeldOut, config: EvalConfig
) -> dict[str, str]:
    """Hashes of what was evaluated on what."""
    policies = config.adapter or ["base"]
    return input_hashes(held, builder.config, config, policies) | seen_inputs(builder)


def seen_inputs(builder: PromptBuilder) -> dict[str, str]:
    """Of the base and of what it is shown, beside titles and interactions."""
    backbone = builder.backbone
    processor = backbone.image_processor
    shape = processor.to_dict() | {"class": type(processor).__name__}
    return {
        "images": images_sha256(builder.catalog),
        "image_processor": _sha256_of(shape),
        "turn": turn_sha256(backbone),
        "base": checkpoint_fingerprint(backbone.model),
    }


def turn_sha256(backbone: Backbone) -> str:
    """Of the tokens of a question and its answer, as the chat template renders them today."""
    return _sha256_of([backbone.turn.prompt, backbone.turn.whole])


def _stack_sha256(folder: Path) -> str:
    """Of an adapter and all that lies below it in its folder: tensors, rank and alpha of each."""
    facts = []
    while True:
        config = adapter_config(folder)
        tensors = sha256(folder / "adapter_model.safetensors")
        facts.append([tensors, config["r"], config["lora_alpha"]])
        folder = folder / "below"
        if not folder.exists():
            return _sha256_of(facts)


def _prompts_sha256(rows: Sequence[Row]) -> str:
    """Of the tokens of all prompts and answers, so of the tokenizer and of what was drawn, too."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.images, row.answers]).encode())
    return digest.hexdigest()


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
