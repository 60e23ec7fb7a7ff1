"""The page docs/architecture.md, made from the files themselves: floors, arrows, lengths.

    python -m hanorec.studies.structure > docs/architecture.md

Works in a clone, whose files it reads.
"""

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.flags import Parser

# From the lowest floor up: name, its folders and single files, what they are about.
FLOORS = [
    ("base", ["hanorec/base"], "settings, files that are whole or absent, processes, errors"),
    (
        "method",
        ["hanorec", "hanorec/lora/layer.py", "hanorec/brmrs/losses.py",
         "hanorec/ranking/sampler.py"],
        "the equations of both methods, a file an idea",
    ),
    ("datasets", ["hanorec/datasets"], "items, histories, candidates; a converter for each source"),
    ("ranking", ["hanorec/ranking"], "ranking the whole catalogue, and reranking"),
    ("lora", ["hanorec/lora"], "adapters as files"),
    ("mllm", ["hanorec/mllm"], "the language models that see, their prompts, image features"),
    ("brmrs", ["hanorec/brmrs", "hanorec/ranking/pairs.py"], "the model of BR-MRS, its data"),
    ("run", ["hanorec/run"], "a training run: folder, log, checkpoints, reference"),
    ("baselines", ["hanorec/baselines"], "the systems that HaNoRec is compared with"),
    (
        "recommend",
        ["hanorec/recommending", "hanorec/recommend.py"],
        "lists of recommendations, as a command and from Python",
    ),
    (
        "studies",
        ["hanorec/studies", "hanorec/demo.py", "hanorec/export.py", "hanorec/check.py",
         "hanorec/__main__.py", "hanorec/baselines/__main__.py"],
        "commands that run the scripts, compare and draw",
    ),
    ("scripts", ["."], "the loops, to be read from top to bottom"),
]
NAMES = [name for name, _, _ in FLOORS]
FLOOR = {}  # folder or file -> name
for _name, _members, _ in FLOORS:
    FLOOR |= dict.fromkeys(_members, _name)

# What a reader of HaNoRec opens, in this order.
READ = [
    "hanorec/losses.py",
    "hanorec/topk.py",
    "hanorec/hars.py",
    "hanorec/lora/layer.py",
    "train_dpo.py",
]

HEAD = """\
# Architecture

Made by `python -m hanorec.studies.structure > docs/architecture.md`; a test compares.

The files of `hanorec/` itself hold the equations; its folders hold what loads, feeds, runs and
studies them; the loops stand in the scripts beside it. To understand HaNoRec read, after
[walkthrough.md](walkthrough.md), {total} lines:

    {order}

## Floors

A file imports from its own floor and from those below, never from above, and imports form no
circle. A file of the method imports torch or NumPy, the errors, and other equations alone. Nobody
imports the scripts: studies run them as files.

| floor | where | about | files | lines |
|---|---|---|---|---|
{floors}

Each arrow points at what is imported; the number counts pairs of files.

```mermaid
graph TD
{arrows}
```

## Files

| floor | file | lines | about |
|---|---|---|---|
{files}

## Before the redesign, and now

| | before | now |
|---|---|---|
{comparison}
"""


def read_files(root: Path) -> dict[str, str]:
    """Path -> text, of the package and the scripts beside it."""
    paths = [*root.glob("hanorec/**/*.py"), *root.glob("*.py")]
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    return {name: (root / name).read_text(encoding="utf-8") for name in names if name != "setup.py"}


def module_name(path: str) -> str:
    """hanorec/lora/__init__.py -> hanorec.lora, train_dpo.py -> train_dpo."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Path -> what the file imports, inside functions too: paths of `files`, else module names."""
    path_of = {module_name(path): path for path in files}
    found = {}
    for path, text in files.items():
        names = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                each = [f"{node.module}.{alias.name}" for alias in node.names]
                names.update(name if name in path_of else str(node.module) for name in each)
        found[path] = {path_of.get(name, name) for name in names}
    return found


def floor_of(path: str) -> str:
    """The name of a file's floor: its own place in `FLOORS`, or else its folder's."""
    floor = FLOOR.get(path, FLOOR.get(str(PurePosixPath(path).parent)))
    if floor is None:
        raise InputError(f"{path}: on no floor; name its folder in FLOORS")
    return floor


def arrows(files: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """(floor, another floor that it imports) -> how many pairs of files."""
    count: Counter[tuple[str, str]] = Counter()
    for path, targets in imports(files).items():
        for target in targets & files.keys():
            if floor_of(path) != floor_of(target):
                count[floor_of(path), floor_of(target)] += 1
    return count


def length(text: str) -> int:
    return len(text.splitlines())


def length_of_main(text: str) -> int:
    """The lines of a script's main, from its signature on."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return node.end_lineno - node.lineno + 1
    raise InputError("no function main, expected one in every script")


def about(text: str) -> str:
    """The first sentence of a file's docstring, for a cell of a table."""
    paragraph = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    # A full stop ends it, the two of BR-1 .. BR-6 do not.
    sentence = re.split(r"(?<!\.)\. ", " ".join(paragraph.split()))[0]
    return sentence.rstrip(".:").replace("|", r"\|")


def comparison(files: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """What, how much of it at commit 529e433, how much now."""
    own = [path for path in files if str(PurePosixPath(path).parent) == "hanorec"]
    path = [length(files[name]) for name in READ]
    script = files["train_dpo.py"]
    return [
        ("modules in `hanorec/` itself", "38", len(own) - 1),  # its __init__ is none
        ("lines before the Top-K (HN-3)", "1,950", sum(path[: READ.index("hanorec/topk.py")])),
        ("lines before `train_dpo.py`", "3,472", sum(path[: READ.index("train_dpo.py")])),
        ("lines of `train_dpo.py`", "201", length(script)),
        ("lines of its main", "133", length_of_main(script)),
        ("longest line", "208", max(map(len, "\n".join(files.values()).splitlines()))),
        ("lines in all", "7,129", sum(map(length, files.values()))),
    ]


def table(rows: Sequence[Sequence[object]]) -> str:
    """Lines of a Markdown table, without its head."""
    lines = []
    for row in rows:
        cells = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(files: Mapping[str, str]) -> str:
    """docs/architecture.md, of these files."""
    floors, rows = [], []
    for name, members, what in FLOORS:
        own = [path for path in files if floor_of(path) == name]
        lengths = [length(files[path]) for path in own]
        where = ", ".join("beside `hanorec`" if m == "." else f"`{m}`" for m in members)
        floors.append((name, where, what, len(own), sum(lengths)))
        for path in filter(files.get, own):  # an empty __init__ has nothing to say
            rows.append((name, f"`{path}`", length(files[path]), about(files[path])))
    order = [name.removeprefix("hanorec/") for name in READ]
    count = arrows(files)
    drawn = []
    for a, b in sorted(count, key=lambda pair: [-NAMES.index(name) for name in pair]):
        drawn.append(f"  {a} -->|{count[a, b]}| {b}")
    return HEAD.format(
        total=sum(length(files[name]) for name in READ),
        order=" -> ".join(order),
        floors=table(floors),
        arrows="\n".join(drawn),
        files=table(rows),
        comparison=table(comparison(files)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m hanorec.studies.structure")
    parser.parse_args(argv)
    root = Path(__file__).parents[2]
    if not (root / "train_dpo.py").exists():
        raise InputError(f"{root}: no train_dpo.py; run this in a clone, whose files it reads")
    print(page(read_files(root)), end="")


if __name__ == "__main__":
    run(main)
