"""HaNoRec and BR-MRS from scratch in PyTorch.

To understand HaNoRec, read these files after docs/walkthrough.md, in this order:

    losses         SFT-1, DPO-1, DPO-2, HN-11, HN-12
    topk           HN-3, the Top-K similarity kernel
    hars           HN-1, HN-2, HN-4 .. HN-8: lambda, eta and beta'
    lora/layer     HN-9, HN-10: LoRA and its noise
    ../train_dpo   the loop

scoring (EV-1), metrics (EV-2 .. EV-4), readings (what else the document may mean) and topk_groups
(HN-3 on a GPU) stand beside them. The other folders: base (settings, files, processes), datasets,
lora (adapter files), mllm (the three model families), ranking and brmrs (BR-1 .. BR-6), run (what
stands around the loops), studies. docs/architecture.md has the plan.

The names below can be taken from `hanorec` itself. Each module is imported when the first of its
names is asked for, so that to import the package takes no time.
"""

import sys
from importlib import import_module
from os.path import isfile
from typing import Any

PUBLIC = {
    "hanorec.topk": ["topk_neighbors"],
    "hanorec.hars": [
        "fuse", "cluster_gap", "hardness", "reward_gap", "responsiveness", "pair_beta",
    ],
    "hanorec.readings": ["GAPS", "HARDNESS", "ETAS", "KEPT", "NOISES", "CONTROLS"],
    "hanorec.losses": ["sft_loss", "preference_logit", "dpo_loss"],
    "hanorec.lora": [
        "LoRALinear", "add_lora", "lora_noise", "adapters_off", "save_adapter", "load_adapter",
    ],
    "hanorec.metrics": ["auc", "hit_rate", "ndcg"],
    "hanorec.brmrs": ["hard_negatives", "chns_loss", "synergy_loss", "bpr_loss"],
    "hanorec.datasets.catalog": ["load_catalog"],
    "hanorec.datasets.interactions": ["load_interactions"],
    "hanorec.mllm.load": ["load_backbone"],
    "hanorec.mllm.builder": ["PromptBuilder"],
    "hanorec.recommend": ["Recommender"],
    "hanorec.base.errors": ["InputError"],
}
MODULE = {}  # name -> its module
for _module, _names in PUBLIC.items():
    MODULE |= dict.fromkeys(_names, _module)
__all__ = list(MODULE)

MARK = '\nif __name__ == "__main__":\n'  # in every module that is a command


def _check_command(name: str) -> None:
    """End `python -m` of a module that is no command, and would do nothing without a word."""
    path = f"{__path__[0]}/../{name.replace('.', '/')}.py"
    if name.startswith("hanorec.") and isfile(path):
        with open(path, encoding="utf-8") as file:
            if MARK not in file.read():
                sys.exit(f"error: {name} is no command; `python -m hanorec` lists them all")


if sys.argv[:1] == ["-m"]:  # while Python looks for the module that it was given
    _check_command(sys.orig_argv[-len(sys.argv)])


def __getattr__(name: str) -> Any:
    if name not in MODULE:
        raise AttributeError(f"module 'hanorec' has no attribute {name!r}")
    return getattr(import_module(MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
