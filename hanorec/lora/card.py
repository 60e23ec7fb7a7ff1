"""The README.md of an adapter's folder: what it stands on, and how others load it.

PEFT and vLLM read the adapter itself and nothing of what lies below it, so the folder says so.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

CARD = """\
---
base_model: {base_text}
library_name: peft
---

# LoRA adapter of rank {r}, alpha {alpha:g}

{stage}Base: `{base}`. More facts in `hanorec.json`.

## What it stands on

{stands_on}

## Loading it

With hanorec:

    python evaluate.py --model {base_word} --adapter {own} --data DATA --out OUT{flags}

{first}With PEFT:

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained({base_text})
    model = PeftModel.from_pretrained(base, "{folder}")

With vLLM:

    vllm serve {base_word} --enable-lora --max-lora-rank {vllm_rank} --lora-modules NAME={folder}
"""

ALONE = "The base alone: this folder is the whole adapter."

BELOW = """\
The base **and {below}**.
This adapter is a difference to these: on the bare base it is another policy."""

STACK_FIRST = """\
**Not with PEFT or vLLM as it is**: they load the top adapter alone, without a warning. First make
one adapter of all, which computes the same:

    python -m hanorec.export --model {base_word} {adapters} --out ONE_ADAPTER

(with `--merge` a whole model instead).

"""

# of hanorec.json's prompt
PROMPT_FLAGS = (
    "task", "history", "images", "candidate_images", "max_title_tokens", "max_pixels",
)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def adapter_card(
    base: str, ranks: Sequence[int], alpha: float, whole: bool, facts: Mapping[str, Any]
) -> str:
    """The text of README.md.

    Args:
        base: name or path of the base checkpoint.
        ranks: of the adapter, then of those that it stands on, from the top down.
        alpha: of the adapter.
        whole: what it stands on lies in the folder below/.
        facts: those of hanorec.json, among them its stage and its prompts' settings.
    """
    count, total = len(ranks) - 1, sum(ranks)
    words = {
        "base": base,
        "base_word": shlex.quote(base),
        "base_text": json.dumps(base, ensure_ascii=False),
        "r": ranks[0],
        "alpha": alpha,
        "stage": f"Stage: {facts['stage']}. " if "stage" in facts else "",
        "flags": "".join(_flags(facts.get("prompt", {}))),
        "stands_on": ALONE,
        "first": "",
        "own": "THIS_FOLDER" if whole or not count else "ONE_ADAPTER",
        "folder": "ONE_ADAPTER" if count else "THIS_FOLDER",
        "vllm_rank": next((rank for rank in VLLM_RANKS if rank >= total), total),
    }
    if count:
        what = "the adapter" if count == 1 else f"the {count} adapters"
        place = "in `below/`" if whole else "that it was trained on, which this folder lacks"
        adapters = ["--adapter BELOW"] * (0 if whole else count) + ["--adapter THIS_FOLDER"]
        words["stands_on"] = BELOW.format(below=f"{what} {place}")
        words["first"] = STACK_FIRST.format(**words, adapters=" ".join(adapters))
    return CARD.format(**words)


def _flags(prompt: Mapping[str, Any]) -> list[str]:
    """The settings of the prompts that the adapter was trained on, as flags."""
    known = [name for name in PROMPT_FLAGS if prompt.get(name) is not None]
    return [f" --{name.replace('_', '-')} {prompt[name]}" for name in known]
