"""Presets of --preset: many settings at once, each with where it is taken from.

`release` repeats the authors' public code of HaNoRec as far as settings of ours can (GitHub
wangyu0627/HaNoRec at commit 587face; it was read, not run). What is not known of it keeps our
default. docs/audit.md says what each difference does.
"""

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, tuple[Any, str]]  # setting -> its value, and where that is from

PROMPT: Settings = {
    "max_pixels": (262_144, "its YAML files, image_max_pixels"),
    "candidate_images": ("off", "its prompts: images of the history alone, candidates by title"),
    "quotes": ("chosen", "its preference data: chosen answers keep outer quotes, rejected do not"),
}
LISTS: Settings = {
    "history": (3, "its YAML files, hit3"),
    "targets": (3, "its YAML files, hit3: one answer of three titles"),
    "candidates": (7, "its data loader: 3 targets and 4 negatives, 7 in its text-only pipeline"),
}
TRAINING: Settings = {
    **PROMPT,
    **LISTS,
    "lora_rank": (8, "its YAML files; on all linears, as here"),
    "lora_alpha": (32.0, "its YAML files"),
    "learning_rate": (1e-4, "its YAML files"),
    "epochs": (5, "its YAML files"),
    "accumulation": (8, "its YAML files"),
    "clip": (1.0, "its YAML files"),
}
PRESETS: dict[str, dict[str, Settings]] = {
    "release": {
        "train_sft": {
            **TRAINING,
            "micro_batch": (2, "its SFT stage"),
            "lora_dropout": (0.05, "its YAML files"),
        },
        "train_dpo": {
            **TRAINING,
            "micro_batch": (4, "its YAML files"),
            "drop_last": (True, "its YAML files, the data loader of DPO"),
            "lora_dropout": (0.0, "its DPO trainer, whatever the YAML file says"),
            "beta0": (0.1, "its YAML files"),
            "gap": ("ranked", "its HaRS: score profiles by rank"),
            "hardness": ("ratio", "its HaRS: over sigma of the mean gap"),
            "rewards": ("noisy", "its DPO trainer: those of the noisy policy"),
            "eta_over": ("micro", "its DPO trainer: gathered over devices a micro-batch"),
            "noise_draw": ("forward", "its NoDO hooks: drawn in every forward"),
            "noise_pass": ("forward", "its NoDO hooks, left before backward (inferred)"),
        },
        "evaluate": {
            **PROMPT,
            **LISTS,
            "answers": ("sampled", "its inference: temperature 0.95, top-p 0.7; in 4 bits, there"),
        },
    },
}
BESIDE = {
    "release": (
        "not set: --dataset (its noise, 0.05 or 0.1). Its Yes and No are models of their own "
        "(hit1): --task binary --targets 1 --history 5. It merges the SFT adapter into the base "
        "before DPO, which is the same function as --sft below the new adapter, and to the bit "
        "the folder of `python -m hanorec.export --merge` as --model without --sft"
    ),
}
