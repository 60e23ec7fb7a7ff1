"""How a command reads its settings: dataclasses filled from flags and JSON files.

Flags and JSON keys are the field names: `train_sft.py --model M --data D --out O`, or
`train_sft.py run.json`, or both, in which case the flags win.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hanorec.base.errors import InputError
from hanorec.base.files import read_json


def option(default: Any = MISSING, help: str = "", **argparse_options: Any) -> Any:
    """A dataclass field with its help text; without a default it is required."""
    metadata = {"help": help, **argparse_options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


TINY, HUGE = 1e-9, 1e12  # least value of what must be above 0; what no setting reaches


def check(config: Any, **least: float) -> None:
    """InputError where a setting is below its least value, or absurdly large."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not bound <= value < HUGE:  # NaN too
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {bound}, and less than {HUGE:.0e}")


def parse(types: Sequence[type], argv: Sequence[str] | None = None, about: str | None = None) -> tuple[Any, ...]:
    """The dataclasses filled from a JSON file (first argument, if it ends in .json) and flags. Unknown keys are InputErrors."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(types, description=about, allow_abbrev=False)
    if argv and argv[0].endswith(".json"):
        path, settings = Path(argv[0]), read_json(Path(argv[0]))
        if isinstance(settings, dict) and isinstance(settings.get("settings"), dict):
            settings = settings["settings"]  # the run.json of an earlier run: the same again
        known = {field.name for kind in types for field in dataclasses.fields(kind)}
        if not isinstance(settings, dict) or (unknown := sorted(settings.keys() - known)):
            what = f"unknown keys {', '.join(unknown)}" if isinstance(settings, dict) else "not an object"
            raise InputError(f"{path}: {what}; expected a JSON object with keys among {', '.join(sorted(known))}")
        from_file, given = [], {flag.partition("=")[0].replace("_", "-") for flag in argv}
        for key, value in settings.items():
            if value is not None and value != [] and f"--{key}".replace("_", "-") not in given:  # --adapter would add to the file's list
                from_file += [f"--{key}", *(map(str, value) if isinstance(value, list) else [_flag(value)])]
        argv = from_file + argv[1:]
    *configs, unknown_flags = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown_flags:
        parser.error(f"unknown arguments: {' '.join(unknown_flags)}; --help lists the known ones")
    return tuple(configs)


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
