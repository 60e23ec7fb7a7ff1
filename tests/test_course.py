"""docs/walkthrough.ipynb is what the command makes of the pages, its cells run and show what they
say, and every exercise has its answer."""

import ast
import contextlib
import doctest
import io
import json
import re

import pytest
from docstring_names import ROOT

from hanorec.base.errors import InputError
from hanorec.studies import notebook

DOCS = ROOT / "docs"
STORED = json.loads((DOCS / "walkthrough.ipynb").read_text(encoding="utf-8"))
EXERCISES, ANSWERS, WALKTHROUGH = (
    (DOCS / f"{name}.md").read_text(encoding="utf-8")
    for name in ("exercises", "answers", "walkthrough")
)


def shown(source, names):
    """What a notebook shows of a cell: what it prints, and the value of its last expression."""
    *statements, last = ast.parse(source).body
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval(compile(ast.Module(statements, []), "cell", "exec"), names)
        eval(compile(ast.Interactive([last]), "cell", "single"), names)
    return printed.getvalue()


def stored(cell):
    """The output that the notebook holds of a cell."""
    text = ""
    for output in cell["outputs"]:
        text += "".join(output.get("text", output.get("data", {}).get("text/plain", [])))
    return text


def sections(page):
    """Heading -> its text."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def code_of(section):
    """The one block of Python of a section, without prompts and outputs."""
    (block,) = notebook.FENCED.findall(section)
    if not block.startswith(">>>"):
        return block
    return "".join(example.source for example in doctest.DocTestParser().get_examples(block))


def failures(page):
    """How many statements of a page, after the walkthrough's, show something else than it says."""
    parser, names = doctest.DocTestParser(), {}
    runner = doctest.DocTestRunner(verbose=False)
    for text in (WALKTHROUGH, page):
        test = parser.get_doctest(text, names, "page", None, 0)
        runner.run(test, clear_globs=False, out=lambda line: None)
        names = test.globs
    return runner.failures


def test_the_notebook_is_what_the_command_writes():
    assert (DOCS / "walkthrough.ipynb").read_text(encoding="utf-8") == notebook.read_notebook(DOCS)


def test_its_cells_run_in_order_and_show_what_they_say():
    names, compared = {}, 0
    for cell in STORED["cells"]:
        if cell["cell_type"] == "code":
            found = shown("".join(cell["source"]), names)
            if cell["outputs"]:
                assert found.rstrip("\n") == stored(cell).rstrip("\n"), cell["source"]
                compared += 1
    assert compared > 15


def test_it_is_a_notebook():
    """nbformat 4.5, by hand: ids that differ, and what each kind of cell must have."""
    assert (STORED["nbformat"], STORED["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in STORED["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in STORED["cells"]:
        needed = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            needed |= {"execution_count", "outputs"}
        assert cell.keys() == needed and cell["source"]
        assert "".join(cell["source"]).strip().count(">>>") == 0


def test_there_are_eight_exercises_and_each_has_its_answer():
    asked, answered = sections(EXERCISES), sections(ANSWERS)
    assert list(asked) == list(answered) and len(asked) == 8
    for name, section in asked.items():
        assert code_of(section) == code_of(answered[name]), name


def test_the_answers_are_true():
    assert failures(ANSWERS) == 0
    assert failures(ANSWERS.replace("[1.0, 1.14]", "[1.0, 1.16]")) == 1


def test_a_cell_ends_where_something_is_shown():
    page = "Text.\n\n```python\n>>> a = 1\n>>> a\n1\n>>> print(a)\n1\n>>> b = a\n\n```\nMore.\n"
    cells = notebook.cells_of(page)
    assert ["".join(cell["source"]) for cell in cells] == [
        "Text.", "a = 1\na", "print(a)", "b = a", "More."
    ]
    kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in cells]
    assert kinds == [[], ["execute_result"], ["stream"], [], []]


def test_outside_of_a_clone_there_is_nothing_to_make(tmp_path):
    with pytest.raises(InputError, match=r"walkthrough\.md: not there; run this in a clone"):
        notebook.read_notebook(tmp_path)
