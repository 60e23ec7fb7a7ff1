"""docs/walkthrough.ipynb, made from the page and its exercises: python -m hanorec.studies.notebook

Text becomes cells of text; each statement of the walkthrough that shows something ends a cell of
code, with what the page says it shows as its output. The exercises' cells have none: predict first.
Works in a clone, whose docs it reads.
"""

import ast
import doctest
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import write_text
from hanorec.base.flags import Parser

FENCED = re.compile(r"^```python\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
ABOUT = """\
Made from walkthrough.md and exercises.md by `python -m hanorec.studies.notebook`. It needs the
package alone (`pip install -e .` in a clone), no data, no model, no GPU."""

Cell = dict[str, Any]


def notebook(pages: Sequence[str]) -> dict[str, Any]:
    """nbformat 4.5 of these pages, one after the other."""
    cells = [text_cell(ABOUT)]
    for page in pages:
        cells += cells_of(page)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def cells_of(page: str) -> list[Cell]:
    """A page's text and its blocks of Python, in order."""
    cells = []
    # split by a pattern of one group: text, code, text, ..., text
    for number, part in enumerate(FENCED.split(page)):
        if number % 2 == 0:
            cells += [text_cell(part.strip())] if part.strip() else []
        elif part.startswith(">>>"):
            cells += shown_cells(part)
        else:
            cells.append(code_cell(part.strip(), []))
    return cells


def shown_cells(block: str) -> list[Cell]:
    """A block in doctest's form; a notebook shows what a cell ends with, so each output ends one.
    """
    cells, source = [], ""
    for example in doctest.DocTestParser().get_examples(block):
        source += example.source
        if example.want:
            cells.append(code_cell(source.strip(), [output(example)]))
            source = ""
    return cells + ([code_cell(source.strip(), [])] if source else [])


def output(example: doctest.Example) -> Cell:
    """What a statement shows: printed text, or the value of an expression."""
    (statement,) = ast.parse(example.source).body
    if isinstance(statement, ast.Expr) and not ast.unparse(statement).startswith("print("):
        value = {"text/plain": lines(example.want.rstrip("\n"))}
        return {
            "output_type": "execute_result", "execution_count": None, "metadata": {}, "data": value}
    return {"output_type": "stream", "name": "stdout", "text": lines(example.want)}


def text_cell(text: str) -> Cell:
    return {"cell_type": "markdown", "metadata": {}, "source": lines(text)}


def code_cell(source: str, outputs: list[Cell]) -> Cell:
    return {
        "cell_type": "code", "execution_count": None, "metadata": {}, "outputs": outputs,
        "source": lines(source)}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def read_notebook(docs: Path) -> str:
    """The notebook of these docs, as text."""
    pages = [docs / "walkthrough.md", docs / "exercises.md"]
    if missing := [page for page in pages if not page.exists()]:
        raise InputError(f"{missing[0]}: not there; run this in a clone, whose docs it reads")
    made = notebook([page.read_text(encoding="utf-8") for page in pages])
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m hanorec.studies.notebook")
    parser.parse_args(argv)
    docs = Path(__file__).parents[2] / "docs"
    write_text(docs / "walkthrough.ipynb", read_notebook(docs))
    print(f"wrote {docs / 'walkthrough.ipynb'}")


if __name__ == "__main__":
    run(main)
