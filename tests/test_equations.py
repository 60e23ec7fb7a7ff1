"""docs/equations.md and the code agree, in both directions."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

from hanorec.base import config

ROOT = Path(__file__).parent.parent
IDS = [
    "SFT-1", "DPO-1", "DPO-2", *(f"HN-{n}" for n in range(1, 13)),
    *(f"EV-{n}" for n in range(1, 5)), *(f"BR-{n}" for n in range(1, 7)),
]
TAG = re.compile(r"#\s*((?:SFT|DPO|HN|EV|BR)-\d+):")


def entries() -> dict[str, str]:
    """ID -> text of its entry."""
    page = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    parts = re.split(r"^### ", page, flags=re.MULTILINE)[1:]
    return {part.split("\n", 1)[0].strip(): part for part in parts}


def symbol_of(entry: str) -> object:
    """The function that an entry names."""
    name = re.search(r"^- Code: `([\w.]+)`$", entry, re.MULTILINE)[1]
    head, tail = re.match(r"(hanorec(?:\.[a-z_]+)+)\.(.+)", name).groups()
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
    return {field.name: field for kind in kinds for field in dataclasses.fields(kind)}


def test_the_entries_are_the_equations():
    assert list(entries()) == IDS


@pytest.mark.parametrize("equation", IDS)
def test_each_entry_names_a_function_that_carries_its_tag_once(equation):
    source = inspect.getsource(inspect.unwrap(symbol_of(entries()[equation])))
    assert TAG.findall(source).count(equation) == 1


def test_each_tag_stands_once_in_the_package_and_has_an_entry():
    tags = [
        tag
        for path in sorted((ROOT / "hanorec").rglob("*.py"))
        for tag in TAG.findall(path.read_text(encoding="utf-8"))
    ]
    assert sorted(tags) == sorted(IDS)


@pytest.mark.parametrize("equation", IDS)
def test_each_entry_has_a_formula_and_a_source(equation):
    entry = entries()[equation]
    assert re.search(r"^\$\$.+\$\$$", entry, re.MULTILINE)
    assert re.search(r"^- Document: .+", entry, re.MULTILINE)


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
    kinds.append(config.EvalConfig)
    known = settings(*([config.BrmrsConfig] if equation.startswith("BR") else kinds))
    for flag, values in options(entries()[equation]):
        assert flag in known, flag
        allowed = getattr(known[flag].type, "__args__", ())
        if values and allowed and all(isinstance(value, str) for value in allowed):
            assert set(re.split(r"[ |]+", values)) <= set(allowed), (flag, values)


def test_the_marks_are_equations():
    for path in (ROOT / "tests").glob("test_*.py"):
        assert set().union(*marks(path).values()) <= set(IDS), path


def test_the_checks_can_fail():
    assert TAG.findall("# HN-4: formula\n# HN-44: other\n# see HN-5 below") == ["HN-4", "HN-44"]
    with pytest.raises(AttributeError):
        symbol_of("- Code: `hanorec.hars.no_such_function`")
    text = "`--gap ranked`, `--kl-coef` and `--control reversed|permuted`; --not-in-code"
    expected = [("gap", "ranked"), ("kl_coef", ""), ("control", "reversed|permuted")]
    assert options(text) == expected
    assert "gap" in settings(config.DpoConfig) and "gaps" not in settings(config.DpoConfig)
