"""All commands under one name.

    hanorec train-sft --model MODEL --data DATA --out OUT
    hanorec datasets movielens RAW OUT
    hanorec COMMAND --help

Each is a file that can also be started by itself, with the same flags: `python train_sft.py`,
`python -m hanorec.check`. Where hanorec is not installed, `python -m hanorec COMMAND`.
"""

import ast
import runpy
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten

from hanorec import MARK
from hanorec.base.command import run
from hanorec.base.errors import InputError, shown
from hanorec.studies.scripts import PACKAGE, SCRIPTS, path_of


def commands() -> dict[str, Path]:
    """Name -> file: the scripts, then all files of the package that can be started."""
    found = {name.replace("_", "-"): path_of(name) for name in SCRIPTS}
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.parts), path)):
        words = path.relative_to(PACKAGE).with_suffix("").parts
        name = " ".join(word for word in words if word != "__main__").replace("_", "-")
        if name and words[0] != "scripts" and MARK in path.read_text(encoding="utf-8"):
            found[name] = path
    return found


def listing() -> str:
    """What `hanorec --help` prints: every command with the first sentence about it."""
    lines = [str(__doc__)]
    for name, path in commands().items():
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = shorten(about.partition("\n\n")[0], 70, placeholder=" ...")
        lines.append(f"  {name:<28}{first}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        sys.exit()
    known = commands()
    for count in (2, 1):
        name = " ".join(words[:count]).replace("_", "-")
        if name in known:
            sys.argv = [f"hanorec {name}", *words[count:]]
            runpy.run_path(str(known[name]), run_name="__main__")
            return
    named = " ".join(words[:2] if words[0] in ("datasets", "studies", "baselines") else words[:1])
    near = get_close_matches(named, known, n=1, cutoff=0)
    raise InputError(
        f"no command {shown(named)}, is {near[0]!r} meant? `hanorec --help` lists them all"
    )


def hanorec() -> None:
    """What the installed `hanorec` calls."""
    run(main)


if __name__ == "__main__":
    hanorec()
