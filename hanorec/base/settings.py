"""How a command reads its settings: dataclasses filled from flags and JSON files.

Flags and JSON keys are the field names: `train_sft.py --model M --data D --out O`, or
`train_sft.py run.json`, or both, in which case the flags win. Both win over `--preset`. Nothing
here imports PyTorch, so that --help is quick.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from hanorec.base.command import with_home
from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_json
from hanorec.base.flags import Parser, hyphened
from hanorec.base.presets import BESIDE, PRESETS

TINY, HUGE = 1e-9, 1e12  # least value of what must be above 0; what no setting reaches
SEVERAL = "several processes"  # a group of flags in --help, whatever class they are of
WORDS = {
    True: ("true", "yes", "t", "y", "1"),
    False: ("false", "no", "f", "n", "0"),
}


def option(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """A dataclass field with its help text; without a default it is required.

    metadata: `group` of --help, if not that of its class; `action` of argparse.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(config: Any, **least: float) -> None:
    """InputError where a setting is below its least value, or absurdly large."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not bound <= value < HUGE:  # NaN too
            raise InputError(
                f"{_flag(name)} {value}: expected at least {bound}, and less than {HUGE:.0e}"
            )


def parse(
    types: Sequence[type],
    argv: Sequence[str] | None = None,
    about: str | None = None,
    command: str | None = None,
) -> tuple[Any, ...]:
    """The dataclasses filled from a JSON file (first argument, if it ends in .json) and flags.

    command: the script whose part of a preset `--preset` stands for; without it there is none. A
    value that begins with ~/ is in the user's home, see `with_home`. Unknown keys are
    InputErrors, unknown flags end the command as argparse does.
    """
    argv = hyphened(with_home(sys.argv[1:] if argv is None else argv))
    parser = _parser(types, about)
    if command is not None:
        _add_preset(parser)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        _add_preset(first)
        preset, argv = first.parse_known_args(argv)
    if argv and argv[0].endswith(".json"):
        argv = with_home(_flags_of_file(Path(argv[0]), types, _flags_among(argv))) + argv[1:]
    if command is not None and "preset" in preset:
        argv = _flags_of_preset(preset.preset, command, _flags_among(argv)) + argv
    values = vars(parser.parse_args(argv))
    configs = []
    for kind in types:
        own = {field.name: values[field.name] for field in dataclasses.fields(kind)}
        configs.append(kind(**own))
    return tuple(configs)


# ---- flags of fields ----


def _parser(types: Sequence[type], about: str | None) -> Parser:
    """A flag for every field, in a group for every class; the required ones in the usage line."""
    parser = Parser(about)
    fields = []  # (group, field)
    for kind in types:
        own = getattr(kind, "group", (kind.__doc__ or "").partition("\n")[0].rstrip("."))
        fields += [(field.metadata.get("group", own), field) for field in dataclasses.fields(kind)]
    groups, required = {}, []
    for title, field in sorted(fields, key=lambda pair: pair[0] == SEVERAL):  # that one is last
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options = _argument(field)
        groups[title].add_argument(_flag(field.name), **options)
        if field.default is True:
            no = _flag(f"no_{field.name}")
            groups[title].add_argument(no, action="store_false", dest=field.name)
        if "required" in options:
            required.append(f"{_flag(field.name)} {options['metavar']}")
    parser.usage = " ".join(["%(prog)s [SETTINGS.json]", *required, "[...]"])
    return parser


def _argument(field: dataclasses.Field) -> dict[str, Any]:
    """What argparse is told of a field of a class of settings."""
    kind = field.type
    if isinstance(kind, UnionType):  # int | None
        kind = get_args(kind)[0]
    options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%")}
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        options |= {"nargs": "+", "action": field.metadata.get("action", "store")}
    if get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    elif kind is bool:  # --flag alone is true
        options |= {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    else:
        name = field.name.upper().replace("_", "-")
        options |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, name)}
    if field.default_factory is not MISSING:
        options["default"] = field.default_factory()
    elif field.default is not MISSING:
        options["default"] = field.default
    else:
        options["required"] = True
    return options


def _truth(word: str) -> bool:
    """Of a flag that is true or false."""
    for value, words in WORDS.items():
        if word.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"{shown(word)}, expected true or false")


def _add_preset(parser: argparse.ArgumentParser) -> None:
    about = "many settings at once, which are printed; release repeats the authors' release"
    parser.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS, help=about)


def _flags_among(words: Sequence[str]) -> set[str]:
    """The flags of a command, as `_flag` has them."""
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def _flags_of_preset(name: str, command: str, given: set[str]) -> list[str]:
    """The settings of a preset as flags; what each of them is, and whether it is given, printed."""
    lines, flags = [f"preset {name}:"], []
    for key, (value, source) in PRESETS[name][command].items():
        own = "; not set, since it is given" if _flag(key) in given else ""
        lines.append(f"  {_flag(key)} {_text(value)}: {source}{own}")
        if _flag(key) not in given:
            flags += [_flag(key), _text(value)]
    if os.environ.get("RANK", "0") == "0":
        print("\n".join([*lines, f"  {BESIDE[name]}"]))
    return flags


def _flags_of_file(path: Path, types: Sequence[type], given: set[str]) -> list[str]:
    """The settings in a file as flags, but for those given on the command line.

    A list of the file would only be added to by its flag.
    """
    settings = read_json(path)
    if isinstance(settings, dict) and isinstance(settings.get("settings"), dict):
        settings = settings["settings"]  # the run.json of an earlier run: the same again
    known: set[str] = set()
    for kind in types:
        known.update(field.name for field in dataclasses.fields(kind))
    wanted = f"expected a JSON object with keys among {', '.join(sorted(known))}"
    if not isinstance(settings, dict):
        raise InputError(f"{path}: not an object; {wanted}")
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise InputError(f"{path}: unknown keys {', '.join(unknown)}; {wanted}")
    flags: list[str] = []
    for key, value in settings.items():
        if value is None or value == [] or _flag(key) in given:
            continue
        values = map(str, value) if isinstance(value, list) else [_text(value)]
        flags += [f"--{key}", *values]
    return flags


def _flag(name: str) -> str:
    """A field's flag."""
    return f"--{name.replace('_', '-')}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
