"""What README.md and docs/*.md say of commands, paths and lengths is true, and CI takes its test
command from the README."""

import os
import re
import shlex
import shutil
import subprocess

import pages
import pytest
from docstring_names import ROOT

from hanorec.base.settings import parse

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
REQUIRED = ["--model", "M", "--data", "D", "--out", "O"]
MARKED = {
    mark: re.search(rf"^<!-- ci: {mark} -->\n```\n(.+)\n```$", TEXT, re.MULTILINE)
    for mark in ("demo", "test")
}


@pytest.mark.parametrize("page", pages.PAGES)
def test_commands_paths_and_names_are_true(page):
    path = pages.PAGES[page]
    text = path.read_text(encoding="utf-8")
    assert pages.wrong_commands(text) == []
    assert pages.wrong_paths(text) == []
    assert pages.wrong_names(text) == []


@pytest.mark.parametrize("page", pages.PAGES)
def test_links_lead_somewhere(page):
    path = pages.PAGES[page]
    assert pages.wrong_links(path.read_text(encoding="utf-8"), path) == []


def test_a_wrong_link_would_be_noticed():
    text = """\
[a](audit.md#what-is-open), [b](audit.md#what-is-shut), [c](audits.md), [d](#five-lines), [e](#six)
[f](audit.md#8-auc-of-labels-is-not-auc-and-a-title-is-not-an-item-ev-1-ev-3), [g](https://a.b#c)

## Five lines?
"""
    assert pages.headings(text) == ["five-lines"]
    # The headings of the page itself are those of its file.
    assert pages.wrong_links(text, ROOT / "docs" / "map.md") == [
        "audit.md#what-is-shut", "audits.md", "#five-lines", "#six",
    ]


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 150
    assert len(TEXT.split()) <= 1200
    assert len(pages.table_rows(TEXT)) <= 15


def test_rows_are_counted_with_their_head_and_without_the_rule():
    fenced = "```\n| c | d |\n---|---\n```\ntext | text\n"
    text = f"| a | b |\n|---|:-:|\n| 1 | - |\n\n{fenced}\na | b\n-|-\n"
    assert pages.table_rows(text) == ["| a | b |", "| 1 | - |", "a | b"]


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/[\w.]+)", TEXT))
    assert {page for page in pages.PAGES if page != "README.md"} <= linked


def test_its_results_stand_in_the_pages_that_it_names():
    assert pages.unfounded(TEXT) == []


def test_a_result_of_no_page_would_be_noticed():
    figures = "+3.1 [1.9, 4.3], +3.1 [1.8, 4.3], [0.3, 5.9]"
    table = f"| a | b |\n|---|---|\n| {figures} | [there](docs/reranking.md#results) |\n"
    assert pages.unfounded(table) == ["+3.1 [1.8, 4.3]"]
    assert len(pages.unfounded(table.replace("reranking", "brmrs"))) == 3
    assert len(pages.INTERVAL.findall("".join(pages.table_rows(TEXT)))) >= 5


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables_have_room(page):
    assert pages.wide_tables(pages.PAGES[page].read_text(encoding="utf-8")) == []


def test_a_wide_table_would_be_noticed():
    eight, nine = ("|".join("abcdefghi"[:n]) for n in (8, 9))
    for head, wide in ((eight, []), (nine, [nine]), (f"| {nine} |", [f"| {nine} |"])):
        assert pages.wide_tables(f"{head}\n---|---\n1|2\n") == wide


def test_a_wrong_command_would_be_noticed():
    text = """\
`python -m hanorec.plots OUT`, `python -m hanorec.datasets.{netflix,imdb} RAW OUT`, `python -m
hanorec.studies.tables`, `python -m hanorec.studies.audit iota RUN`, `python -m hanorec.demo --out
OUT --seed 1`, `python -m hanorec.scripts.train`, `python benchmarks/audit.py run RUN`

    python benchmarks/topk.py --columns 3   # --rows

```
torchrun --nproc-per-node 2 benchmarks/gpu.py run M OUT --shard true --slow true
python train_dpo.py --model M \\
  --ablate full && python -m hanorec.demo --out OUT && python train_sft.py --epochs 1
```
"""
    assert pages.wrong_commands(text) == [
        "benchmarks/topk.py --columns",
        "benchmarks/gpu.py --slow",
        "train_dpo.py --ablate",
        "no command hanorec.plots",
        "no command hanorec.datasets.imdb",
        "no command hanorec.studies.tables",
        "hanorec.studies.audit iota",
        "hanorec.demo --seed",
        "no file train.py",
        "no file benchmarks/audit.py",
    ]


def test_a_wrong_path_or_name_would_be_noticed():
    text = """\
`hars.py`, `hanorec/hars.py`, `tests/test_hars_*.py`,
`tests/test_h*.py`, `tests/test_hars.py::test_fuse`, `tests/test_hars.py::test_mean_pool`,
`hanorec.hars.fuse`, `hanorec.hars.melt`, `--rejected 3`, `--accepted`, `--dpo`

    python benchmarks/audit.py
"""
    assert pages.wrong_paths(text) == [
        "hars.py", "tests/test_hars_*.py", "tests/test_hars.py::test_fuse",
        "benchmarks/audit.py",
    ]
    assert pages.wrong_names(text) == ["hanorec.hars.melt", "--accepted"]


# The flags of these pages' scripts have values that go together.
SCRIPTS = []
for page in ("README.md", "docs/using.md", "docs/course.md"):
    lines = pages.in_blocks(pages.PAGES[page].read_text(encoding="utf-8"))
    SCRIPTS += [line for line in lines if line.split()[1] in pages.SETTINGS]


@pytest.mark.parametrize("command", SCRIPTS)
def test_the_scripts_take_their_flags(command):
    _, script, *flags = shlex.split(command)
    if flags[0].endswith(".json"):
        # A file of the reader's, or of an earlier run, has what the flags need not say again.
        flags = [*REQUIRED, *flags[1:]]
    parse(pages.SETTINGS[script], flags)


def test_a_wrong_value_would_be_noticed():
    assert len(SCRIPTS) > 15
    with pytest.raises(SystemExit):
        parse(pages.SETTINGS["train_sft.py"], [*REQUIRED, "--epochs", "many"])


def test_all_else_that_the_blocks_start_is_an_installer_or_a_test():
    others = [line for line in pages.in_blocks(TEXT) if not line.startswith("python ")]
    for command in others:
        known = command in ("python3 -m venv .venv", ". .venv/bin/activate")
        assert known or command.split()[0] in ("pip", "pytest")


def test_what_to_read_has_its_true_lengths():
    assert pages.wrong_reading(TEXT) == []


def test_a_wrong_length_or_order_would_be_noticed():
    losses, topk = re.findall(r"^\| `hanorec/(?:losses|topk)\.py` .*\n", TEXT, re.MULTILINE)
    longer = TEXT.replace(losses, losses.replace("| 1", "| 91"))
    assert [line.partition(":")[0] for line in pages.wrong_reading(longer)] == ["hanorec/losses.py"]
    assert "files" in pages.wrong_reading(TEXT.replace(losses + topk, topk + losses))[0]
    left_out = pages.wrong_reading(TEXT.replace(topk, ""))
    assert len(left_out) == 2 and "hanorec/topk.py: None" in left_out
    assert pages.wrong_reading(re.sub(r"\d+(?= lines in all)", "70", TEXT))[0].startswith("sum 70")


@pytest.mark.parametrize("mark", MARKED)
def test_the_marked_commands_need_nothing_but_python(mark):
    """Debian's and Ubuntu's own Python takes no packages outside a virtual environment."""
    own = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "
    assert MARKED[mark][1].startswith(own)


@pytest.fixture
def clone(tmp_path):
    """run(README) -> (exit code, what was called, stderr) of .ci/run where python3, pip and
    pytest only note that they were called; pip fails where the README names a package `broken`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    make = f"mkdir -p .venv/bin; touch .venv/bin/activate; cp {tools}/pip .venv/bin/ruff\n"
    for name in ("python3", "pip", "pytest"):
        note = f'#!/bin/sh\necho "$(basename $0) $*" >> {tmp_path}/calls\n'
        script = note + (make if name == "python3" else 'case "$*" in *broken*) exit 1; esac\n')
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")

    def run(readme):
        (tmp_path / "README.md").write_text(readme)
        (tmp_path / "calls").write_text("")
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
        done = subprocess.run(
            [tmp_path / ".ci" / "run"], check=False, env=environment, capture_output=True, text=True
        )
        return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stderr

    return run


def test_ci_runs_the_command_of_the_readme_and_ruff(clone):
    code, calls, complaint = clone(TEXT)
    assert (code, complaint) == (0, "")
    assert calls == [
        "python3 -m venv .venv",
        "pip install -c constraints.txt -e .[test]",
        "pytest -q -n 2 --dist loadfile",
        "ruff check .",
    ]


def test_ci_fails_where_the_command_fails_or_is_not_there(clone):
    code, calls, _ = clone(MARKED["test"][0].replace(".[test]", "broken"))
    assert code != 0 and calls[-1].startswith("pip ")
    without = TEXT.replace("&& pytest -q -n 2", "")
    for readme in ("", TEXT.replace("ci: test", "ci: tests"), without):
        code, calls, complaint = clone(readme)
        assert code == 1 and calls == [] and "no test command" in complaint
