"""The README's commands and paths are true, and CI takes its test command from it."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess

import pytest
from docstring_names import ROOT

from hanorec.base.config import DataConfig, DpoConfig, EvalConfig, ModelConfig, TrainConfig
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.settings import parse

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
LINES = [re.sub(r"\s#.*", "", line) for line in "".join(BLOCKS).splitlines()]
COMMANDS = [part.strip() for part in " && ".join(LINES).split("&&") if part.strip()]
SETTINGS = {
    "train_sft.py": [ModelConfig, DataConfig, TrainConfig],
    "train_dpo.py": [ModelConfig, DataConfig, TrainConfig, DpoConfig],
    "evaluate.py": [ModelConfig, DataConfig, EvalConfig],
    "train_brmrs.py": [BrmrsFiles, BrmrsConfig],
}
REQUIRED = ["--model", "M", "--data", "D", "--out", "O"]
MARKED = {
    mark: re.search(rf"^<!-- ci: {mark} -->\n```\n(.+)\n```$", TEXT, re.MULTILINE)
    for mark in ("demo", "test")
}


def module_takes(words):
    """python -m MODULE FLAGS: the module exists, and its folder knows the flags."""
    spec = importlib.util.find_spec(words[2])
    if spec is None:
        return False
    own = ROOT / f"{words[2].replace('.', '/')}.py"
    beside = [own] if own.parent.name == "hanorec" else own.parent.glob("*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in beside)
    return all(f'"{word}"' in source for word in words[3:] if word.startswith("--"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_exists_and_takes_its_flags(command):
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        assert module_takes(words)
    elif words[0] == "python":
        assert (ROOT / words[1]).exists()
        if words[1] in SETTINGS:
            # A file of the reader's, or of an earlier run, has what the flags need not say again.
            flags = [*REQUIRED, *words[3:]] if words[2].endswith(".json") else words[2:]
            parse(SETTINGS[words[1]], flags)
    elif words[0] == "python3":
        assert command == "python3 -m venv .venv"
    elif words[0] == ".":
        assert command == ". .venv/bin/activate"
    else:
        assert words[0] in ("pip", "pytest")


def test_a_wrong_flag_would_be_noticed():
    with pytest.raises(SystemExit):
        parse(SETTINGS["train_sft.py"], [*REQUIRED, "--no-such-flag", "1"])
    assert module_takes(shlex.split("python -m hanorec.demo --out OUT"))
    assert not module_takes(shlex.split("python -m hanorec.demo --no-such-flag"))
    assert not module_takes(shlex.split("python -m hanorec.no_such_command"))


def test_the_paths_exist():
    paths = re.findall(r"`((?:docs|tests|benchmarks|hanorec)/[\w./]+)`", TEXT)
    paths += re.findall(r"\]\(([\w./]+)\)", TEXT)
    assert [path for path in paths if not (ROOT / path).exists()] == []


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
        "pytest -q",
        "ruff check .",
    ]


def test_ci_fails_where_the_command_fails_or_is_not_there(clone):
    code, calls, _ = clone(MARKED["test"][0].replace(".[test]", "broken"))
    assert code != 0 and calls[-1].startswith("pip ")
    for readme in ("", TEXT.replace("ci: test", "ci: tests"), TEXT.replace("&& pytest -q", "")):
        code, calls, complaint = clone(readme)
        assert code == 1 and calls == [] and "no test command" in complaint
