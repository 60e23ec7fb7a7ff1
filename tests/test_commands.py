"""Commands: --help and wrong flags before PyTorch is loaded, the one name `hanorec`, what is said
while something runs, and tables that fit a terminal."""

import io
import json
import re
import subprocess
import sys

import pytest
from docstring_names import ROOT

import hanorec
from hanorec import __main__ as front
from hanorec.base import command
from hanorec.base.config import DataConfig, DpoConfig, ModelConfig, TrainConfig
from hanorec.base.config_steps import StepConfig
from hanorec.base.errors import InputError
from hanorec.base.flags import Parser
from hanorec.base.progress import Progress, progress
from hanorec.base.settings import parse
from hanorec.base.terminal import aligned
from hanorec.studies.clock import Clock
from hanorec.studies.scripts import PACKAGE

DPO = [ModelConfig, DataConfig, TrainConfig, DpoConfig, StepConfig]
PLACES = ["--model", "M", "--data", "D", "--out", "O"]

# What each command does with --help, and with a flag that does not exist, in one process.
ASK = """
import contextlib, io, json, runpy, sys
from hanorec.__main__ import commands

found = {}
for name, path in commands().items():
    for flag in ("--help", "--no-such-flag"):
        sys.argv = [name, flag]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            found[f"{name} {flag}"] = [end.code or 0, said.getvalue(), "torch" in sys.modules]
import hanorec
hanorec.dpo_loss  # a control: now it is there
print(json.dumps([found, "torch" in sys.modules]))
"""


# ---- before PyTorch ----


def test_help_and_wrong_flags_need_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found, control = json.loads(done.stdout)
    assert control and len(found) == 2 * len(front.commands()) > 50
    for name, (code, said, torch) in found.items():
        assert not torch, name
        assert code == (0 if name.endswith("--help") else 2), name
        assert "--help" in said and "usage: " in said, name


def test_the_front_of_a_command(tmp_path, capsys):
    """Flags are read first; what that prints is heard once, from main."""
    path = tmp_path / "some.py"
    path.write_text("def main():\n    print('main')\n    raise ValueError\n")
    with pytest.raises(ValueError):
        command.start(str(path), print, "note")
    assert capsys.readouterr().out == "main\n"

    def helps():
        print("help")
        sys.exit(0)

    with pytest.raises(SystemExit) as end:
        command.start(str(tmp_path / "none.py"), helps)
    assert end.value.code == 0 and capsys.readouterr().out == "help\n"

    def refuses():
        raise InputError("wrong")

    with pytest.raises(SystemExit) as end:
        command.start(str(tmp_path / "none.py"), refuses)
    assert end.value.code == 2 and capsys.readouterr().err == "error: wrong\n"


# ---- flags ----


def help_of_dpo(capsys):
    with pytest.raises(SystemExit):
        parse(DPO, ["--help"], "About.\n\n    python x.py --a\n        b\n", "train_dpo")
    return capsys.readouterr().out


def test_help_is_in_groups(capsys):
    text = help_of_dpo(capsys)
    groups = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert groups == [
        "options", "model", "data", "training", "method", "method, read otherwise",
        "several processes",
    ]
    of = dict(zip(groups, re.split(r"^\w.*:$", text, flags=re.MULTILINE)[1:], strict=True))
    assert "--shard" in of["several processes"] and "--noise-ranks" in of["several processes"]
    assert "--beta0" in of["method"] and "--kept" in of["method, read otherwise"]


def test_help_marks_what_is_required_and_keeps_examples(capsys):
    text = help_of_dpo(capsys)
    assert text.startswith("usage: ") and "--model MODEL --data DATA --out OUT [...]\n" in text
    assert "About.\n\n    python x.py --a\n        b\n" in text
    assert re.findall(r"--(\S+) \S+ +required; ", text) == ["model", "data", "out"]
    assert re.search(r"--rejected N .*?\(default:\s+1\)", text, re.DOTALL)


def test_flags_are_shown_with_hyphens_and_taken_with_either(capsys):
    assert not re.search(r"--\w*_", help_of_dpo(capsys))
    for flags in (["--lora-rank", "3", "--max-pixels=9"], ["--lora_rank", "3", "--max_pixels=9"]):
        model, _, train, *_ = parse(DPO, [*PLACES, *flags])
        assert (train.lora_rank, model.max_pixels) == (3, 9)
    _, data, *_ = parse(DPO, [*PLACES[:2], "--data", "my_data", "--out", "a_b"])
    assert data.data == "my_data"


@pytest.mark.parametrize(
    ("words", "value"),
    [([], False), (["--plain"], True), (["--plain", "yes"], True), (["--plain=FALSE"], False)],
    ids=str,
)
def test_what_is_true_or_false(words, value):
    assert parse(DPO, [*PLACES, *words])[1].plain is value


def test_a_mistyped_flag_names_the_nearest(capsys):
    """Also where a required one is missing, and where several are wrong."""
    with pytest.raises(SystemExit) as end:
        parse(DPO, ["--model", "M", "--ouput", "O", "--learning_rat=3", "--qqq", "1"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "unknown arguments: --ouput O --learning-rat=3 --qqq 1; " in said
    assert "is --out --learning-rate meant?" in said and "required" not in said


def test_flags_within_a_value_are_its_own():
    """Of --sft, as hanorec.baselines takes it: several flags in one word."""
    parser = Parser("About")
    parser.add_argument("--sft")
    for value in ("--epochs=3 --lora_rank=2", "--lora_rank 2", "a_b --c_d=1"):
        assert parser.parse_args(["--sft", value]).sft == value


def test_no_flag_is_abbreviated(capsys):
    """--seed for --seeds would be another thing."""
    parser = Parser("About")
    parser.add_argument("--seeds", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", "3"])
    assert "is --seeds meant?" in capsys.readouterr().err
    assert parser.parse_args(["--seeds", "3"]).seeds == 3


# ---- one name ----


def test_every_file_that_can_be_started_is_a_command_and_says_so():
    for name, path in front.commands().items():
        relative = path.relative_to(ROOT).as_posix()
        module = relative.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
        usage = f"python -m {module}" if "/" in relative else f"python {relative}"
        assert usage in path.read_text(encoding="utf-8").partition("import ")[0], name
    assert "hars" not in front.commands()


@pytest.mark.parametrize("words", [[], ["--help"]], ids=str)
def test_a_module_that_is_no_command_refuses_to_be_started(words, monkeypatch):
    """Every module, as Python has it when it looks for what stands behind -m."""
    paths = sorted(path for path in PACKAGE.rglob("*.py") if "__" not in path.stem)
    refused = set()
    for path in paths:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        monkeypatch.setattr(sys, "argv", ["-m", *words])
        monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-X", "utf8", "-m", name, *words])
        try:
            hanorec._check_command(sys.orig_argv[-len(sys.argv)])
        except SystemExit as end:
            assert end.code == f"error: {name} is no command; `python -m hanorec` lists them all"
            refused.add(path)
    assert refused == set(paths) - set(front.commands().values()) and len(refused) > 100


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-m", "hanorec.lora.layer", "--rank", "3"], 1, "hanorec.lora.layer is no command"),
        (["-m", "hanorec.nothing"], 1, "No module named hanorec.nothing"),
        (["-m", "hanorec.export", "--help"], 0, "usage: python -m hanorec.export"),
        (["-m", "hanorec", "export", "--help"], 0, "usage: python -m hanorec.export"),
        (["-m", "pdb", "-c", "c", "-m", "hanorec.export", "--help"], 0, "usage: "),
        (["-m", "timeit", "-n1", "-r1", "import hanorec.metrics"], 0, "1 loop"),
        (["-c", "import hanorec.metrics, sys; print(sys.argv)", "-m"], 0, "['-c', '-m']"),
    ],
    ids=str,
)
def test_what_python_itself_starts(words, code, said):
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, check=False, stdin=subprocess.DEVNULL,
        capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr


def test_the_list_of_commands(capsys):
    with pytest.raises(SystemExit) as end:
        front.main([])
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line.startswith("  train-dpo  ")]


def test_a_command_by_its_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hanorec"])
    for words in (["train-sft", "--help"], ["train_sft", "--help"], ["studies", "map", "--hlep"]):
        with pytest.raises(SystemExit):
            front.main(words)
    said = capsys.readouterr()
    assert said.out.count("Stage 1, supervised fine-tuning") == 2
    assert "is --help meant?" in said.err


@pytest.mark.parametrize(
    ("words", "near"),
    [(["traindpo"], "train-dpo"), (["datasets", "movielen"], "datasets movielens"),
     (["losses"], "'")],
    ids=str,
)
def test_a_command_that_does_not_exist(words, near):
    with pytest.raises(InputError, match=f"no command .*{near}.* meant"):
        front.main(words)


# ---- while something runs ----


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal(capsys):
    bar = Progress("run", 200, done=20)
    for _ in range(180):
        bar.step(loss=0.5, eta=1.0)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"run: step {step} of 200" for step in range(40, 200, 20)
    ]
    assert all(", loss 0.5, eta 1, " in line and line.endswith(" left") for line in lines)


def test_short_work_says_nothing_and_other_processes_neither(capsys, monkeypatch):
    assert list(progress(range(9), "short")) == list(range(9))
    monkeypatch.setenv("RANK", "1")
    assert list(progress(range(200), "long")) == list(range(200))
    assert capsys.readouterr().err == ""


def test_a_bar_where_there_is_a_terminal(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    bar = Progress("run", 200)
    for _ in range(200):
        bar.step(loss=0.125, margin=2.0)
    bar.close()
    assert "200/200" in shown.getvalue() and "loss=0.125, margin=2" in shown.getvalue()
    assert "step 20 of" not in shown.getvalue()


def test_stages_are_announced(capsys, monkeypatch):
    """A third of the work is done after 60 seconds: 120 are left."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock({"a": 1, "b": 2}, rounds=1)
    clock.begin("a")
    now[0] = 60.0
    clock.begin("b")
    assert capsys.readouterr().out == (
        "\nstage 1 of 2: a\n\nstage 2 of 2: b (about 0:02:00 left for all)\n"
    )


# ---- tables ----


def test_tables_are_aligned():
    text = "**Some** text\n\nrow | HR@3\n---|---\nchance | 30.0\nSFT | 7.1\n"
    assert aligned(text) == (
        "Some text\n\nrow     HR@3\n------  ----\nchance  30.0\nSFT     7.1\n"
    )
    assert aligned("| a | b |\n|---|---|\n| 1 | |\n") == "a  b\n-  -\n1\n"


def test_wide_tables_come_in_parts():
    """Nothing is lost, and every part has the first column."""
    rows = [[f"row {r}", *(f"cell {r}-{c}" * 3 for c in range(8))] for r in range(3)]
    rows[2][3] = "long " * 60
    head = [f"column {c}" for c in range(9)]
    lines = aligned("\n".join(" | ".join(row) for row in [head, ["---"] * 9, *rows])).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("column 0") for line in lines) > 1
    for word in [*rows[0], *rows[1]]:
        assert any(word in line for line in lines), word
    assert sum(line.count("long") for line in lines) == 60
