"""What README.md and docs/*.md say of commands, flags, files and names, and what of it is wrong.

Each check is a function from a page's text to what is wrong with it, so that a test can also hand
it a page that is wrong.
"""

import importlib
import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import pytest
from docstring_names import ROOT, House

from hanorec.base.config import DataConfig, DpoConfig, EvalConfig, ModelConfig, TrainConfig
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.config_steps import StepConfig
from hanorec.studies import structure

PAGES = {"README.md": ROOT / "README.md"}
PAGES |= {f"docs/{path.name}": path for path in sorted(ROOT.glob("docs/*.md"))}
HOUSE = House(structure.read_files(ROOT))
SETTINGS = {
    "train_sft.py": [ModelConfig, DataConfig, TrainConfig],
    "train_dpo.py": [ModelConfig, DataConfig, TrainConfig, DpoConfig, StepConfig],
    "evaluate.py": [ModelConfig, DataConfig, EvalConfig],
    "train_brmrs.py": [BrmrsFiles, BrmrsConfig],
}
FENCED = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```\n(.*?)^```$|^    (\S[^\n]*\n)", re.MULTILINE | re.DOTALL)
PATH = re.compile(
    r"(?<![\w/.-])(?:(?:docs|tests|benchmarks|hanorec)/[\w./*-]+|\w+\.py\b)(?:::\w+)?"
)
OF_A_LANGUAGE = re.compile(r"^```\w+\n.*?^```$", re.MULTILINE | re.DOTALL)
INTERVAL = re.compile(r"(?:[+-]?[\d.]+ )?\[[+-]?[\d.]+, [+-]?[\d.]+\]")
NAME = re.compile(r"(?<![\w/.-])hanorec(?:\.\w+)+")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
MOST_TO_READ = 700
MOST_COLUMNS = 8


def spans(text):
    """What stands in backticks within a line or a paragraph, each as one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]


def in_blocks(text):
    """The commands of the code blocks of no language, comments left out, continued lines joined.

    The path of a reader, files with arrows between them, is none: see `wrong_reading`.
    """
    code = "".join(a or b for a, b in BLOCK.findall(OF_A_LANGUAGE.sub("", text)))
    code = re.sub(r"[ \t]#.*", "", code)
    code = re.sub(r"(?: \\)?\n[ \t]+| \\\n", " ", code)
    lines = " && ".join(code.splitlines()).split("&&")
    return [line.strip() for line in lines if line.strip() and " -> " not in line]


def commands(text):
    """All commands of a page that start Python."""
    found = [*in_blocks(text), *spans(text)]
    return [line for line in found if line.startswith(("python ", "torchrun "))]


def started(module):
    """What `python -m MODULE` runs: of a package its __main__, if it has one."""
    spec = find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    main = f"{module}.__main__"
    return main if is_package and find_spec(main) else module


@cache
def help_of(module):
    """What `python -m MODULE --help` prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        importlib.import_module(started(module)).main()
    return " ".join(printed.getvalue().split())


def flags_of_script(path):
    """The flags of a script or a benchmark, as `--name`."""
    if path in SETTINGS:
        names = set()
        for config in SETTINGS[path]:
            names |= {f"--{field.name.replace('_', '-')}" for field in fields(config)}
        return names
    source = (ROOT / path).read_text(encoding="utf-8")
    own = set(re.findall(r'"(--[a-z-]+)"', source))
    # benchmarks/gpu.py hands on what is not its own
    return own | flags_of_script("train_sft.py") if path == "benchmarks/gpu.py" else own


def unknown(words, known):
    """The flags among the words of a command that are not known."""
    return [word for word in words if FLAG.fullmatch(word) and word not in known]


def wrong_with_module(module, words):
    """What is wrong with `python -m MODULE WORDS`."""
    if module.startswith("hanorec.scripts."):  # in an installed package alone
        return wrong_with_script(f"{module.removeprefix('hanorec.scripts.')}.py", words)
    if find_spec(module) is None or not hasattr(importlib.import_module(started(module)), "main"):
        return [f"no command {module}"]
    about = help_of(module)
    # A part of a command, such as `audit eta`: the positional argument that has choices.
    parts = re.search(r"\] \{([\w,]+)\}", about)
    wrong = [f"{module} {words[0]}"] if parts and words[0] not in parts[1].split(",") else []
    return wrong + [f"{module} {flag}" for flag in unknown(words, set(FLAG.findall(about)))]


def wrong_with_script(path, words):
    """What is wrong with `python PATH WORDS`."""
    if not (ROOT / path).exists():
        return [f"no file {path}"]
    return [f"{path} {flag}" for flag in unknown(words, flags_of_script(path))]


def wrong_commands(text):
    """Commands of files or modules that are not there, or with flags that these do not take."""
    wrong = []
    for command in commands(text):
        words = shlex.split(command.replace("[", "").replace("]", ""))
        if words[1] != "-m":
            files = [word for word in words if word.endswith(".py")] or words[1:]
            wrong += wrong_with_script(files[0], words[words.index(files[0]) + 1 :])
        elif not words[2].endswith("..."):
            name, _, several = words[2].rstrip("}").partition("{")
            for ending in several.split(","):
                wrong += wrong_with_module(name + ending, words[3:])
    return wrong


def wrong_paths(text):
    """Files in backticks or in commands that are not there; tests that are not in their file."""
    wrong = []
    for code in [*spans(text), *in_blocks(text)]:
        for word in PATH.findall(code):
            path, _, name = word.partition("::")
            found = list(ROOT.glob(path.rstrip("/.")))
            if not found or (name and f"def {name}(" not in found[0].read_text(encoding="utf-8")):
                wrong.append(word)
    return wrong


def headings(text):
    """What GitHub calls the headings of a page: small letters and hyphens, no other signs."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE):
        found.append(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
    return found


def leads_somewhere(link, page):
    """Whether a link of a page, given by its path, leads to a file, and to a heading of it."""
    name, _, heading = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists():
        return False
    return not heading or heading in headings(target.read_text(encoding="utf-8"))


def wrong_links(text, page):
    """Links within the repository that lead nowhere; page: the path that the text is at."""
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text))
    return [link for link in links if "://" not in link and not leads_somewhere(link, page)]


def table_rows(text):
    """The lines of a page's tables, heads included, rules left out."""
    rows = []
    for paragraph in re.split(r"\n\s*\n", FENCED.sub("", text)):
        lines = [line for line in paragraph.splitlines() if not is_rule(line)]
        rows += lines if len(lines) < len(paragraph.splitlines()) else []
    return rows


def unfounded(text):
    """Intervals in a page's tables, each with the figure before it, that are not in the page of
    docs/ that the row links, in a sentence or in the cells of a table."""
    wrong = []
    for row in table_rows(text):
        links = re.findall(r"\]\((docs/\w+\.md)", row)
        stated = " ".join((ROOT / link).read_text(encoding="utf-8") for link in links)
        stated = " ".join(stated.replace("|", " ").split())
        wrong += [figure for figure in INTERVAL.findall(row) if figure not in stated]
    return wrong


def wrong_names(text):
    """Dotted names that lead from `hanorec` to nothing, and flags that nobody takes."""
    known = {f"--{flag}" for flag in HOUSE.flags} | {"--help", "--nproc-per-node"}
    makers = "hanorec.studies.ablation", "hanorec.studies.reranking", "hanorec.baselines"
    for command in makers:  # make some of their flags
        known |= set(FLAG.findall(help_of(command)))
    for path in ROOT.glob("benchmarks/*.py"):
        known |= flags_of_script(f"benchmarks/{path.name}")
    wrong = []
    for span in spans(text):
        names = [] if span.startswith("python ") else NAME.findall(span)
        wrong += [name for name in names if not HOUSE.leads_somewhere(name)]
        wrong += unknown(FLAG.findall(span), known)
    return wrong


def is_rule(line):
    """Whether it is the line under a table's head."""
    return "|" in line and re.fullmatch(r"[\s|:-]*-[\s|:-]*", line) is not None


def wide_tables(text):
    """The first lines of tables of more columns than a page has room for."""
    lines, wide = FENCED.sub("", text).splitlines(), []
    for head, rule in pairwise(lines):
        if is_rule(rule):
            columns = len(re.split(r"(?<!\\)\|", head.strip().strip("|")))
            wide += [head] if columns > MOST_COLUMNS else []
    return wide


def wrong_reading(text):
    """What is not true of the README's path of a reader: its files, their lines, the sum."""
    section = text.partition("## Read it\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", section, re.MULTILINE)
    stated = {path: int(lines) for path, lines in rows}
    true = {}
    for path in structure.READ:
        true[path] = structure.length((ROOT / path).read_text(encoding="utf-8"))
    wrong = [] if list(stated) == list(true) else [f"files {', '.join(stated)}"]
    wrong += [f"{path}: {stated.get(path)}" for path in true if stated.get(path) != true[path]]
    total = re.search(r"(\d+)\s+lines\s+in\s+all", section)
    if total is None or int(total[1]) != sum(true.values()) or int(total[1]) > MOST_TO_READ:
        wrong.append(f"sum {total and total[1]}, not {sum(true.values())} of {MOST_TO_READ}")
    return wrong
