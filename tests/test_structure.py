"""The house keeps its shape: floors, circles, what an equation may import, lengths, names.

Each check is a function from files (path -> text) to what is wrong with them, so that a test can
also hand it a house that is wrong.
"""

import ast
import importlib
import re
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pytest
from docstring_names import House

from hanorec.studies import structure

ROOT = Path(__file__).parent.parent
FILES = structure.read_files(ROOT)
SCRIPTS = ["train_sft.py", "train_dpo.py", "train_brmrs.py", "evaluate.py"]

# Equation files, and all that each may import beside the standard library.
ERRORS = "hanorec/base/errors.py"
EQUATIONS = {
    "hanorec/losses.py": {"torch"},
    "hanorec/topk.py": {"torch", ERRORS, "hanorec/topk_groups.py"},
    "hanorec/topk_groups.py": {"torch"},
    "hanorec/hars.py": {"torch", ERRORS},
    "hanorec/scoring.py": {"torch", "hanorec/losses.py"},
    "hanorec/metrics.py": {"numpy", ERRORS},
    "hanorec/etas.py": {"torch", ERRORS, "hanorec/hars.py"},
    "hanorec/readings.py": {
        "torch",
        ERRORS,
        "hanorec/etas.py",
        "hanorec/hars.py",
        "hanorec/losses.py",
        "hanorec/lora/layer.py",
    },
    "hanorec/lora/layer.py": {"torch", ERRORS},
    "hanorec/brmrs/losses.py": {"torch", ERRORS},
    "hanorec/ranking/sampler.py": {"torch", ERRORS},
}
SAMPLER, ATTENTION = "hanorec/ranking/sampler.py", "hanorec/baselines/attention.py"
SEQUENTIAL = "hanorec/baselines/sequential.py"
# Those of the baselines, which stand on their own floor.
OF_BASELINES = {
    "hanorec/baselines/matrix.py": {
        "torch", "hanorec/brmrs/graph.py", "hanorec/brmrs/losses.py"
    },
    ATTENTION: {"torch", ERRORS},
    SEQUENTIAL: {"torch", ERRORS, SAMPLER, ATTENTION},
    "hanorec/baselines/encoders.py": {"torch", ERRORS, SAMPLER, ATTENTION, SEQUENTIAL},
    "hanorec/baselines/cl4srec.py": {"torch", SAMPLER, SEQUENTIAL},
}
ALL_EQUATIONS = EQUATIONS | OF_BASELINES

# Files outside of hanorec/studies that are commands of it.
COMMANDS = ["hanorec/demo.py", "hanorec/__main__.py", "hanorec/baselines/__main__.py"]

# From the lowest floor up. A file stands where its own path is named, or else its folder.
FLOORS = [
    ["hanorec/base"],
    ["hanorec", *EQUATIONS],
    ["hanorec/datasets"],
    ["hanorec/ranking"],
    ["hanorec/lora"],
    ["hanorec/mllm"],
    ["hanorec/brmrs", "hanorec/ranking/pairs.py"],
    ["hanorec/run"],
    ["hanorec/baselines"],
    ["hanorec/recommending", "hanorec/recommend.py"],
    ["hanorec/studies", *COMMANDS, "hanorec/export.py", "hanorec/check.py"],
    ["."],
]

# What a reader of HaNoRec opens, in this order, and how long it may be.
READ = ["losses", "topk", "hars", "lora/layer", "train_dpo"]
MOST_TO_READ = 700
MOST = {"train_dpo.py": 110, "train_sft.py": 75, "train_brmrs.py": 110, "evaluate.py": 160}
MOST_IN_MAIN = 80

# Names that stay where they are, for readers and for checks from outside.
PUBLIC = {
    "hanorec.topk": "topk_neighbors",
    "hanorec.hars": "fuse cluster_gap hardness reward_gap responsiveness pair_beta",
    "hanorec.readings": "GAPS HARDNESS ETAS KEPT NOISES CONTROLS",
    "hanorec.losses": "sft_loss preference_logit dpo_loss",
    "hanorec.lora": "LoRALinear add_lora lora_noise adapters_off save_adapter load_adapter",
    "hanorec.metrics": "auc hit_rate ndcg",
    "hanorec.brmrs": "hard_negatives chns_loss synergy_loss bpr_loss",
}
READINGS = {
    "GAPS": {"ranked", "signed", "centroid", "cosine"},
    "HARDNESS": {"ratio", "standardised"},
    "ETAS": {"pair", "ema", "beta_dpo"},
    "KEPT": {"inner", "near"},
    "NOISES": {"relative"},
    "CONTROLS": {"reversed", "permuted", "mean", "one"},
}


def arrows(files):
    """(file, what it imports: a file or another package), in order."""
    found = []
    for path, targets in structure.imports(files).items():
        found += [(path, target) for target in sorted(targets)]
    return found


def packages_of(path):
    """The __init__ files that run before a file is imported."""
    return {f"{folder}/__init__.py" for folder in PurePosixPath(path).parents}


def circle(files):
    """Files that import one another in a ring, or []. Whoever imports from a folder imports its
    __init__, too, unless it is in that folder."""
    graph = {path: set() for path in files}
    for path, target in arrows(files):
        needed = {target} | (packages_of(target) - packages_of(path))
        graph[path] |= needed & files.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def floor(path):
    """The number of a file's floor."""
    for place in (path, str(PurePosixPath(path).parent)):
        for number, members in enumerate(FLOORS):
            if place in members:
                return number
    raise ValueError(f"{path}: on no floor; name its folder in FLOORS")


def upward(files):
    """Imports of a higher floor."""
    own = [(path, target) for path, target in arrows(files) if target in files]
    return [f"{path} imports {target}" for path, target in own if floor(target) > floor(path)]


def imports_of_the_top(files):
    """Imports of the scripts, and of the studies from elsewhere."""
    scripts = {*SCRIPTS, *map(structure.module_name, SCRIPTS), "hanorec.scripts"}
    wrong = []
    for path, target in arrows(files):
        studies = target.startswith("hanorec/studies/")
        may = path.startswith("hanorec/studies/") or path in COMMANDS
        if target in scripts or target.startswith("hanorec.scripts.") or (studies and not may):
            wrong.append(f"{path} imports {target}")
    return wrong


def foreign(files):
    """What an equation file imports beside the standard library and what its row allows."""
    wrong = []
    for path, target in arrows(files):
        package = target.partition(".")[0]
        allowed = ALL_EQUATIONS.get(path, {target}) | sys.stdlib_module_names
        if not allowed & {target, target if target in files else package}:
            wrong.append(f"{path} imports {target}")
    return wrong


def relative(files):
    """Relative imports, which `structure.imports` does not resolve."""
    found = []
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.append(f"{path}:{node.lineno}")
    return found


def too_long(files):
    """Scripts, a main, and the reader's path, over their limit."""
    lengths = {path: structure.length(files[path]) for path in MOST}
    wrong = [f"{path}: {lengths[path]} lines" for path in MOST if lengths[path] > MOST[path]]
    main = structure.length_of_main(files["train_dpo.py"])
    if main > MOST_IN_MAIN:
        wrong.append(f"train_dpo.py: a main of {main} lines")
    total = sum(structure.length(files[path]) for path in structure.READ)
    return wrong + ([f"{total} lines to read"] if total > MOST_TO_READ else [])


def states_the_order(text):
    """Whether somewhere the next mentions of these files are those of `READ`, each at most a line
    and a half behind the one before; as a path or a bare name, with its ending or without."""
    name = r"(?<![\w/])(?:hanorec/|\.\./)?(losses|topk|hars|lora/\w+|train_dpo)(?:\.py)?(?![\w/])"
    found = [(match[1], match.start()) for match in re.finditer(name, text)]
    for first in range(len(found) - len(READ) + 1):
        names, places = zip(*found[first : first + len(READ)], strict=True)
        gaps = [b - a for a, b in pairwise(places)]
        if list(names) == READ and max(gaps) <= 150:
            return True
    return False


def crowded(files):
    """Statements that another one, or the head of their block, stands before in the line."""
    wrong = []
    for path, text in files.items():
        lines = text.encode().splitlines()  # as bytes, which is what ast counts columns in
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.stmt) and lines[node.lineno - 1][: node.col_offset].strip():
                wrong.append(f"{path}:{node.lineno}")
    return wrong


def nested(files):
    """Comprehensions with two `for`, or with another comprehension in them."""
    kinds = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    wrong = []
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kinds):
                inner = [part for part in ast.walk(node) if isinstance(part, kinds)]
                if len(node.generators) > 1 or len(inner) > 1:
                    wrong.append(f"{path}:{node.lineno}")
    return wrong


def test_no_circle_of_imports():
    assert circle(FILES) == []


def test_a_circle_would_be_noticed():
    a, b = "hanorec/base/a.py", "hanorec/base/b.py"
    late = "def f():\n    from hanorec.base import a\n"
    assert {a, b} <= set(circle({a: "import hanorec.base.b\n", b: late}))
    assert circle({a: "import hanorec.base.b\n", b: ""}) == []
    init = "hanorec/lora/__init__.py"
    by_init = {
        init: "import hanorec.lora.files\n",
        "hanorec/lora/files.py": "import hanorec.base.a\n",
        a: "from hanorec.lora.layer import f\n",
        "hanorec/lora/layer.py": "",
    }
    assert init in circle(by_init)


def test_no_import_goes_up():
    assert upward(FILES) == []
    assert imports_of_the_top(FILES) == []
    assert relative(FILES) == []


def test_an_import_that_goes_up_would_be_noticed():
    up = {"hanorec/base/a.py": "def f():\n    from hanorec import hars\n", "hanorec/hars.py": ""}
    assert upward(up) == ["hanorec/base/a.py imports hanorec/hars.py"]
    above = {
        "hanorec/run/a.py": "import hanorec.studies.b\nimport evaluate\n",
        "hanorec/studies/b.py": "from hanorec.scripts import train_sft\n",
        "evaluate.py": "from . import train_sft\n",
    }
    assert imports_of_the_top(above) == [
        "hanorec/run/a.py imports evaluate.py",
        "hanorec/run/a.py imports hanorec/studies/b.py",
        "hanorec/studies/b.py imports hanorec.scripts",
    ]
    assert relative(above) == ["evaluate.py:1"]
    with pytest.raises(ValueError, match="on no floor"):
        floor("hanorec/new/a.py")


def test_equations_import_what_they_may():
    assert ALL_EQUATIONS.keys() <= FILES.keys()
    assert foreign(FILES) == []


def test_a_foreign_import_would_be_noticed():
    files = {
        "hanorec/metrics.py": "import math\nimport torch.nn\nfrom hanorec.base import files\n",
        "hanorec/base/files.py": "import numpy\n",
        "hanorec/topk.py": "from torch.nn import functional\nimport hanorec.metrics\n",
    }
    assert foreign(files) == [
        "hanorec/metrics.py imports hanorec/base/files.py",
        "hanorec/metrics.py imports torch.nn",
        "hanorec/topk.py imports hanorec/metrics.py",
    ]


def test_files_are_as_short_as_promised():
    assert too_long(FILES) == []


def test_a_long_file_would_be_noticed():
    script = "def main():\n" + "    x = 1\n" * 80 + "y = 1\n" * 30
    short = dict.fromkeys([*MOST, *structure.READ], "\n") | {"train_dpo.py": script}
    assert too_long(short) == [
        "train_dpo.py: 111 lines",
        "train_dpo.py: a main of 81 lines",
    ]
    path = short | {"hanorec/hars.py": "\n" * 587}
    assert too_long(path)[-1] == "701 lines to read"


@pytest.mark.parametrize("path", ["README.md", "hanorec/__init__.py", "docs/architecture.md"])
def test_the_reading_order_is_stated(path):
    assert states_the_order((ROOT / path).read_text(encoding="utf-8"))


def test_another_reading_order_would_be_noticed():
    path = [name.removeprefix("hanorec/").removesuffix(".py") for name in structure.READ]
    assert path == READ
    assert states_the_order("read `losses`, `topk`,\n`hars`, `lora/layer`, `train_dpo.py`.")
    assert states_the_order(" -> ".join(structure.READ))
    assert not states_the_order("losses, hars, topk, lora/layer, train_dpo")
    assert not states_the_order("losses, topk, hars, lora/files, lora/layer, train_dpo")
    assert not states_the_order("losses, topk, hars, lora/layer" + 150 * "." + " train_dpo")


def test_one_statement_a_line():
    assert crowded({path: FILES[path] for path in [*SCRIPTS, *ALL_EQUATIONS]}) == []


def test_a_crowded_line_would_be_noticed():
    two = {"a.py": "a = 1; b = 2\n", "b.py": "if a: b = 1\nelse: b = 2\n"}
    assert crowded(two) == ["a.py:1", "b.py:1", "b.py:2"]
    assert crowded({"a.py": "if a:\n    b = (\n        1)\nelif b:\n    c = lambda: 1\n"}) == []


def test_comprehensions_have_one_for():
    assert nested(FILES) == []


def test_a_nested_comprehension_would_be_noticed():
    files = {
        "a.py": "[x for row in rows for x in row]\n",
        "b.py": "{k: [x for x in row] for k, row in rows}\n",
        "c.py": "any(x for x in [y for y in z])\n",
        "d.py": "[f(x) for x in g(y)]\n",
    }
    assert nested(files) == ["a.py:1", "b.py:1", "c.py:1"]


def test_names_in_docstrings_exist():
    assert House(FILES).strangers() == []


def test_a_name_that_rotted_would_be_noticed():
    """Of `forward`, defined in two other files, one cannot say which is meant."""
    good = """\
'''`C.rows`, `hanorec.b.C`, `b`, `once`, `--gap wide`, `f(x)`.'''
from hanorec.b import C
def f(x):
    '''`x`, `here`, `wide`, `a.tsv`.'''
    here = "wide", "a.tsv", "--gap"
"""
    bad = """\
'''`forward`, `here`, `hanorec.b.D`, `hanorec.b.C.columns`, `--gop`, `--gap narrow`,
`python -m hanorec.e`, `no.py`.

    python -m hanorec.f
'''
"""
    files = {
        "hanorec/a.py": good,
        "hanorec/b.py": "class C:\n    rows: int\n    def forward(self): ...\ndef once(): ...\n",
        "hanorec/c.py": "def forward(): ...\n",
        "hanorec/d.py": bad,
    }
    found = [line.partition(": ")[2] for line in House(files).strangers()]
    assert found == [
        "`forward`",
        "`here`",  # of a function of another file
        "`hanorec.b.D`",
        "`hanorec.b.C.columns`",
        "`--gop`",
        "`--gap narrow`",
        "`python -m hanorec.e`",
        "`no.py`",
        "`python -m hanorec.e`",
        "`python -m hanorec.f`",
    ]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay_where_they_are(module):
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("table", READINGS)
def test_readings_are_found_by_name(table):
    found = getattr(importlib.import_module("hanorec.readings"), table)
    assert READINGS[table] <= found.keys()
    assert all(map(callable, found.values()))


def test_a_public_name_that_left_would_be_noticed():
    assert not hasattr(importlib.import_module("hanorec.topk"), "nearest")


def test_the_page_of_the_architecture_is_what_the_command_makes():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == structure.page(FILES), (
        "make it again: python -m hanorec.studies.structure > docs/architecture.md"
    )


def test_a_page_out_of_date_would_be_noticed():
    longer = FILES | {"hanorec/hars.py": FILES["hanorec/hars.py"] + "\n"}
    assert structure.page(longer) != structure.page(FILES)
    one = "hanorec/base/command.py"
    up = FILES | {one: "from hanorec import hars\n" + FILES[one]}
    assert structure.arrows(up)["base", "method"] == structure.arrows(FILES)["base", "method"] + 1
