"""The README's commands, paths and line counts are true."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from hanorec.base.config import DataConfig, DpoConfig, EvalConfig, ModelConfig, TrainConfig
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.settings import parse

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [part.strip() for block in BLOCKS for line in block.splitlines() for part in re.sub(r"\s#.*", "", line).split("&&") if part.strip()]
SETTINGS = {"train_sft.py": [ModelConfig, DataConfig, TrainConfig], "train_dpo.py": [ModelConfig, DataConfig, TrainConfig, DpoConfig],
            "evaluate.py": [ModelConfig, DataConfig, EvalConfig], "train_brmrs.py": [BrmrsFiles, BrmrsConfig]}
ROWS = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_exists_and_takes_its_flags(command):
    words = shlex.split(command)
    if words[0] == "python" and words[1] == "-m":
        for module in re.sub(r"\{(.+)\}", r"\1", words[2]).split(","):
            name = module if module.startswith("hanorec") else f"hanorec.datasets.{module}"
            assert importlib.util.find_spec(name) is not None
        source = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        shared = (ROOT / "hanorec/datasets/native.py").read_text(encoding="utf-8")
        for flag in [word for word in words[3:] if word.startswith("--")]:
            assert f'"{flag}"' in source + (shared if "datasets" in name else "")
    elif words[0] == "python":
        assert (ROOT / words[1]).exists()
        if words[1] in SETTINGS:
            settings = words[2].endswith(".json")  # a file of the reader's, or of an earlier run: it has what the flags need not say again
            parse(SETTINGS[words[1]], ["--model", "M", "--data", "D", "--out", "O", *words[3:]] if settings else words[2:])
    else:
        assert words[0] in ("pip", "pytest")


def test_a_wrong_flag_would_be_noticed():
    with pytest.raises(SystemExit):
        parse(SETTINGS["train_sft.py"], ["--model", "M", "--data", "D", "--out", "O", "--no-such-flag", "1"])


def test_the_reading_order_has_the_true_line_counts():
    assert ROWS, "no reading table"
    for path, lines in ROWS:
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == int(lines), path
    total = sum(int(lines) for _, lines in ROWS)
    assert int(re.search(r"flows; ([\d,]+) lines in all", TEXT)[1].replace(",", "")) == total


def test_the_reading_order_leaves_nothing_out():
    apart = {"hanorec/__init__.py", "hanorec/datasets/__init__.py"}
    files = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("hanorec/**/*.py"), *ROOT.glob("*.py")]} - apart - {"setup.py"}
    assert {path for path, _ in ROWS} == files


def test_the_paths_exist():
    for path in re.findall(r"`((?:docs|tests|benchmarks|hanorec)/[\w./]+)`", TEXT) + re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / path).exists(), path
