"""docs/equations.md and the code agree, in both directions: IDs, tags, tests, flags, readings."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest

from hanorec import readings
from hanorec.base import config
from hanorec.base.config_brmrs import BrmrsConfig
from hanorec.base.config_steps import StepConfig
from hanorec.baselines.config import MatrixConfig, SequenceConfig
from hanorec.baselines.config_llara import LlaraConfig
from hanorec.baselines.picking import PickConfig

ROOT = Path(__file__).parent.parent
IDS = [
    "SFT-1", "DPO-1", "DPO-2", *(f"HN-{n}" for n in range(1, 13)),
    *(f"EV-{n}" for n in range(1, 5)), *(f"BR-{n}" for n in range(1, 7)),
    "LG-1", "LG-2", "SAS-1", "SAS-2", "SAS-3", "GR-1", "CA-1", "BE-1",
    *(f"CL-{n}" for n in range(1, 6)), "TR-1", *(f"LL-{n}" for n in range(1, 4)),
    "SP-1", "SP-2", "MS-1", "MS-2", "MR-1", "MR-2", "RC-1", "RC-2",
]
# Of the equations of other methods than HaNoRec's.
OWN_SETTINGS = {"BR": BrmrsConfig, "LG": MatrixConfig}
OWN_SETTINGS |= dict.fromkeys(["SAS", "GR", "CA", "BE", "CL"], SequenceConfig)
# Of a formula over several lines the first one alone has the tag.
TAG = re.compile(r"#\s*([A-Z]+-\d+):")
READING = re.compile(
    r"^\| `(?P<table>[A-Z]+)\[\"(?P<name>\w+)\"\]` \| `--(?P<flag>\w+) (?P<value>\w+)` "
    r"\| `(?P<function>[\w.]+)` \| (?P<source>\w+) \| `(?P<test>[\w/.:]+)` \|$",
    re.MULTILINE,
)
STEP = re.compile(
    r"^\| `--(?P<flag>[\w-]+) (?P<value>\w+)` \| (?P<equation>HN-\d+) \| .+ "
    r"\| (?P<source>\w+) \| `(?P<test>[\w/.:]+)` \|$",
    re.MULTILINE,
)
# Dictionary of readings -> its equation, and the setting by which a run chooses from it.
CHOSEN_BY = {
    "GAPS": ("HN-4", "gap_form"),
    "HARDNESS": ("HN-5", "hardness"),
    "CONTROLS": ("HN-5", "control"),
    "ETAS": ("HN-7", "eta"),
    "KEPT": ("HN-11", "kept"),
    "NOISES": ("HN-9", "noise"),
}


def page() -> str:
    return (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")


def entries() -> dict[str, str]:
    """ID -> text of its entry, up to the next heading."""
    found = {}
    for part in re.split(r"^##+ ", page(), flags=re.MULTILINE)[1:]:
        heading = part.split("\n", 1)[0].strip()
        if re.fullmatch(r"[A-Z]+-\d+", heading):
            found[heading] = part
    return found


def table_of_readings() -> list[dict[str, str]]:
    """The rows of the page's table of readings."""
    return [row.groupdict() for row in READING.finditer(page())]


def table_of_steps() -> list[dict[str, str]]:
    """The rows of the page's table of steps."""
    return [row.groupdict() for row in STEP.finditer(page())]


def symbol_of(entry: str) -> object:
    """The function that an entry names."""
    return symbol(re.search(r"^- Code: `([\w.]+)`$", entry, re.MULTILINE)[1])


def symbol(name: str) -> object:
    """What a dotted name stands for."""
    head, tail = re.match(r"(hanorec(?:\.[a-z0-9_]+)+)\.(.+)", name).groups()
    found = importlib.import_module(head)
    for part in tail.split("."):
        found = getattr(found, part)
    return found


def marks(path: Path) -> dict[str, set[str]]:
    """Test function of a file -> IDs in its @pytest.mark.equation(...)."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = set()
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.equation":
                    found[node.name] |= {argument.value for argument in mark.args}
    return found


def options(entry: str) -> list[tuple[str, str]]:
    """What an entry calls a flag, with the value or the values in words behind it: "`--gap ranked`"
    -> ("gap", "ranked").
    """
    return [
        (flag.replace("-", "_"), value.strip())
        for flag, value in re.findall(r"`--([a-z][a-z0-9-]*)([^`]*)`", entry)
    ]


def settings(*kinds: type) -> dict[str, dataclasses.Field]:
    """The settings of some configurations by name."""
    fields = itertools.chain(*map(dataclasses.fields, kinds))
    return {field.name: field for field in fields}


def test_the_entries_are_the_equations():
    assert list(entries()) == IDS


@pytest.mark.parametrize("name", IDS)
def test_an_entry_says_each_thing_once(name):
    """Two defaults or two notes would be free to contradict each other."""
    kinds = re.findall(r"^- ([A-Z][a-z]+)\b", entries()[name], re.MULTILINE)
    assert len(kinds) == len(set(kinds)) > 2


@pytest.mark.parametrize("equation", IDS)
def test_each_entry_names_a_function_that_carries_its_tag_once(equation):
    source = inspect.getsource(inspect.unwrap(symbol_of(entries()[equation])))
    assert TAG.findall(source).count(equation) == 1


def test_each_tag_stands_once_in_the_package_and_has_an_entry():
    tags = []
    for path in sorted((ROOT / "hanorec").rglob("*.py")):
        tags += TAG.findall(path.read_text(encoding="utf-8"))
    assert sorted(tags) == sorted(IDS)


@pytest.mark.parametrize("equation", IDS)
def test_each_entry_has_a_formula_and_a_source(equation):
    entry = entries()[equation]
    assert re.search(r"^\$\$.+\$\$$", entry, re.MULTILINE)
    assert re.search(r"^- (Document|Source): .+", entry, re.MULTILINE)


@pytest.mark.parametrize("equation", IDS)
def test_each_entry_names_a_test_that_carries_its_mark(equation):
    ((path, name),) = re.findall(
        r"^- Test: `(tests/test_\w+\.py)::(test_\w+)`$", entries()[equation], re.MULTILINE
    )
    assert equation in marks(ROOT / path).get(name, set())


@pytest.mark.parametrize("equation", IDS)
def test_each_option_named_is_a_setting(equation):
    """The flag is a field of the configuration of its method, and a value behind it is one that the
    field takes.
    """
    kinds = [config.ModelConfig, config.DataConfig, config.TrainConfig, config.DpoConfig]
    kinds += [config.EvalConfig, StepConfig, PickConfig, LlaraConfig]
    own = OWN_SETTINGS.get(equation.partition("-")[0])
    known = settings(*([own] if own else kinds))
    for flag, values in options(entries()[equation]):
        assert flag in known, flag
        allowed = getattr(known[flag].type, "__args__", ())
        if values and allowed and all(isinstance(value, str) for value in allowed):
            assert set(re.split(r"[ |]+", values)) <= set(allowed), (flag, values)


def test_the_table_of_readings_is_that_of_the_dictionaries():
    """Every entry of every dictionary has a row, every row an entry, in the same order."""
    dictionaries = {k: v for k, v in vars(readings).items() if k.isupper() and isinstance(v, dict)}
    assert dictionaries.keys() == CHOSEN_BY.keys()
    entries_of_all = []
    for table, found in dictionaries.items():
        entries_of_all += [(table, name) for name in found]
    rows = [(row["table"], row["name"]) for row in table_of_readings()]
    assert rows == entries_of_all
    assert page().count('"]` |') == len(rows)  # no row escapes the pattern


@pytest.mark.parametrize("row", table_of_readings(), ids=lambda row: row["name"])
def test_each_row_of_the_readings_is_true(row):
    """The function is the one in the dictionary; the flag's value leads to it; the test exists and
    carries the mark of the equation that is read. The first reading of each is the document's.
    """
    table = getattr(readings, row["table"])
    equation, setting = CHOSEN_BY[row["table"]]
    assert table[row["name"]] is symbol(row["function"])
    kind = StepConfig if row["table"] == "KEPT" else config.DpoConfig
    flag = settings(kind)[row["flag"]]
    assert row["value"] in flag.type.__args__
    chosen = kind(**{row["flag"]: row["value"]})
    assert getattr(chosen, setting) == row["name"]
    assert row["source"] in ("document", "release", "ours", "other")
    assert row["source"] == "document" or row["name"] != next(iter(table))
    path, _, test = row["test"].partition("::")
    assert equation in marks(ROOT / path)[test]


def test_the_table_of_steps_is_that_of_the_settings():
    """Every value but the default of every setting of the step has a row: its flag, the equation
    that is read, who reads it so, and a test that carries the equation's mark.
    """
    wanted = []
    for field in dataclasses.fields(StepConfig):
        if field.name != "kept":  # a table of its own
            values = [v for v in getattr(field.type, "__args__", ["N"]) if v != field.default]
            wanted += [(field.name, "true" if field.type is bool else value) for value in values]
    assert [(row["flag"].replace("-", "_"), row["value"]) for row in table_of_steps()] == wanted
    for row in table_of_steps():
        path, _, test = row["test"].partition("::")
        assert row["equation"] in marks(ROOT / path)[test]
        assert row["source"] in ("document", "release", "ours")


def test_the_marks_are_equations():
    for path in (ROOT / "tests").glob("test_*.py"):
        assert set().union(*marks(path).values()) <= set(IDS), path


def test_the_checks_can_fail():
    text = """
        # HN-4: the first line of a formula,
        #       and the second, with HN-5
        x = 1  # HN-44: behind a line of code
        # see HN-6 below
    """
    assert TAG.findall(text) == ["HN-4", "HN-44"]
    with pytest.raises(AttributeError):
        symbol_of("- Code: `hanorec.hars.no_such_function`")
    row = '| `GAPS["a"]` | `--gap a` | `hanorec.hars.fuse` | ours | `tests/test_a.py::test_b` |'
    assert READING.search(row)["test"] == "tests/test_a.py::test_b"
    assert not READING.search(row.replace("--gap", "gap"))
    text = "`--gap ranked`, `--kl-coef` and `--control reversed|permuted`; --not-in-code"
    expected = [("gap", "ranked"), ("kl_coef", ""), ("control", "reversed|permuted")]
    assert options(text) == expected
    assert "gap" in settings(config.DpoConfig) and "gaps" not in settings(config.DpoConfig)


# ---- docs/glossary.md ----

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eta": "η",
    "theta": "θ", "lambda": "λ", "mu": "μ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ",
    "Delta": "Δ", "Theta": "Θ",
}


def glossary() -> list[tuple[str, str, str]]:
    """(symbols, ID, name in code) of every row."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| .*\| ([A-Z]+-\d+) \| `([\w.]+)` \|$", text, re.MULTILINE)
    heads = len(re.findall(r"^\|---", text, re.MULTILINE))
    assert len(rows) + 2 * heads == len(re.findall(r"^\|", text, re.MULTILINE))
    return rows


@pytest.mark.parametrize("row", glossary(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_each_symbol_has_an_equation_and_a_name_in_the_code(row):
    _, equation, name = row
    assert equation in IDS
    symbol(name)


def unexplained(formulas: dict[str, str], rows: list[tuple[str, str, str]]) -> list[str]:
    """Greek letters of a formula that no row explains: of both methods together, of a baseline its
    own, but for σ and π, which are the same everywhere.
    """
    missing = []
    for equation, formula in formulas.items():
        known = {"σ", "π"}
        for symbols, of, _ in rows:
            if of == equation or (of_method(of) and of_method(equation)):
                known |= set(symbols)
        letters = [GREEK.get(macro, "σ") for macro in re.findall(r"\\([A-Za-z]+)", formula)]
        missing += [f"{equation} {letter}" for letter in letters if letter not in known]
    return missing


def of_method(equation: str) -> bool:
    return equation.partition("-")[0] in ("SFT", "DPO", "HN", "EV", "BR")


def test_every_greek_letter_of_a_formula_is_in_the_glossary():
    formulas = {name: re.search(r"\$\$(.+)\$\$", entry)[1] for name, entry in entries().items()}
    assert unexplained(formulas, glossary()) == []
    without = [row for row in glossary() if row[1] not in ("CL-4", "HN-7")]
    assert unexplained(formulas, without) == ["HN-7 η", "HN-8 η", "CL-4 τ", "CL-4 τ"]
