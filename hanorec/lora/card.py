"""The README.md of what was trained: how, what it stands on, and how others load it.

PEFT and vLLM read the adapter itself and nothing of what lies below it, so the folder says so.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from hanorec.base.files import read_object

CARD = """\
---
base_model: {base_text}
library_name: peft
---

# LoRA adapter of rank {r}, alpha {alpha:g}

{stage}Base: `{base}`. More facts in `hanorec.json`.

## What it stands on

{stands_on}

{made}## Loading it

With hanorec:

    python evaluate.py --model {base_word} --adapter {own} --data DATA --out OUT{flags}

{first}With PEFT:

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained({base_text})
    model = PeftModel.from_pretrained(base, "{folder}")

With transformers, where PEFT is installed:

    model = AutoModelForImageTextToText.from_pretrained({base_text})
    model.load_adapter("{folder}")

With vLLM:

    vllm serve {base_word} --enable-lora --max-lora-rank {vllm_rank} --lora-modules NAME={folder}
"""

MERGED = """\
---
base_model: {base_text}
library_name: transformers
pipeline_tag: image-text-to-text
---

# `{base}` with an adapter of hanorec merged into it

{stage}The adapter's difference is added to the base's own weights: W + scale B A.

{made}## Loading it

With hanorec as any checkpoint: `--model THIS_FOLDER{flags}`, without an adapter.

With transformers:

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
    processor = AutoProcessor.from_pretrained("THIS_FOLDER")

With vLLM:

    vllm serve THIS_FOLDER
"""

MADE = """\
## How it was made

{facts}

Its settings, as flags:

{flags}

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
METRICS = ("loss", "accuracy", "margin", "kl")  # of log.jsonl
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def adapter_card(
    base: str, ranks: Sequence[int], alpha: float, whole: bool, facts: Mapping[str, Any],
    run: Path | None = None,
) -> str:
    """The text of an adapter's README.md.

    Args:
        base: name or path of the base checkpoint.
        ranks: of the adapter, then of those that it stands on, from the top down.
        alpha: of the adapter.
        whole: what it stands on lies in the folder below/.
        facts: those of hanorec.json, among them its stage and its prompts' settings.
        run: folder of the run that trained it.
    """
    count, total = len(ranks) - 1, sum(ranks)
    words = {
        **_words(base, facts, run),
        "base_word": shlex.quote(base),
        "r": ranks[0],
        "alpha": alpha,
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


def merged_card(base: str, facts: Mapping[str, Any], run: Path | None) -> str:
    """The text of README.md beside a merged model; facts and run as in `adapter_card`."""
    return MERGED.format(**_words(base, facts, run))


def _words(base: str, facts: Mapping[str, Any], run: Path | None) -> dict[str, str]:
    """What both cards say."""
    prompt = facts.get("prompt", {})
    known = [name for name in PROMPT_FLAGS if prompt.get(name) is not None]
    return {
        "base": base,
        "base_text": json.dumps(base, ensure_ascii=False),
        "stage": f"Stage: {facts['stage']}. " if "stage" in facts else "",
        "flags": "".join(f" {_flag(name, prompt[name])}" for name in known),
        "made": "" if run is None else made(run),
    }


def made(run: Path) -> str:
    """What a run tells of itself: data, last step, settings; nothing where it has no run.json."""
    if not (run / "run.json").exists():
        return ""
    record = read_object(run / "run.json")
    inputs, settings = record.get("inputs"), record.get("settings")
    if not (isinstance(inputs, dict) and isinstance(settings, dict)):
        return ""
    facts = []
    if "data" in inputs:
        facts.append(f"- Data: splits and titles of SHA-256 `{inputs['data']}`.")
    if (run / "log.jsonl").exists():
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines() or ["{}"]
        last = json.loads(lines[-1])
        numbers = [f"{name} {last[name]}" for name in METRICS if last.get(name) is not None]
        facts.append(f"- Step {len(lines)}, the last one, on its rows: {', '.join(numbers)}.")
    facts.append("- What it is worth on other users `evaluate.py` tells.")

    flags = []
    for name, value in settings.items():
        if name != "out" and value not in (None, []):
            flags.append(_flag(name, value))
    lines = wrap(" ".join(flags), 92, break_on_hyphens=False, break_long_words=False)
    return MADE.format(facts="\n".join(facts), flags="\n".join(f"    {line}" for line in lines))


def _flag(name: str, value: Any) -> str:
    """A setting as it is given to a command."""
    values = value if isinstance(value, list) else [value]
    texts = [str(x).lower() if isinstance(x, bool) else shlex.quote(str(x)) for x in values]
    return " ".join([f"--{name.replace('_', '-')}", *texts])
