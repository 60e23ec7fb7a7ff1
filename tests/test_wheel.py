"""The wheel is enough: what `pip install .` installs has every command, without a clone."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from docstring_names import ROOT

from hanorec.studies.structure import module_name, read_files

FILES = read_files(ROOT)
SCRIPTS = ["train_sft.py", "train_dpo.py", "train_brmrs.py", "evaluate.py"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m (hanorec[.\w]*\w)(?:\.\{([\w,]+)\})?")

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"

# Runs in an empty folder, with the unpacked wheel on the path: --help of every command, as
# python -m does it, then stage 1 on a few users. One process, so that torch is imported once.
TRY = """
import contextlib, io, json, runpy, sys
from pathlib import Path

import hanorec

found = {"package": hanorec.__file__, "help": {}}
for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not end.code:
            found["help"][module] = printed.getvalue()
    except ImportError:
        pass

from hanorec.datasets.posterland import make_posterland
from hanorec.studies.scripts import script
from hanorec.studies.stages import BASE

make_posterland(Path("data"), users=4)
stage = script("train_sft")
flags = "--epochs 1 --targets-per-user 1 --micro-batch 4 --history 2 --candidates 3 --device cpu"
stage.main(["--model", str(BASE), "--data", "data", "--out", "sft", *flags.split()])
found["script"] = stage.__file__
Path("found.json").write_text(json.dumps(found))
"""


def commands():
    """Every module of `python -m`: those that the pages name, and all that can be run so."""
    found = {module_name(path) for path, text in FILES.items() if "__main__" in text}
    found = {module for module in found if module.startswith("hanorec.")}
    for page in PAGES:
        for module, several in COMMAND.findall(page.read_text(encoding="utf-8")):
            found |= {f"{module}.{name}" for name in several.split(",")} if several else {module}
    return sorted(found | {f"hanorec.scripts.{module_name(name)}" for name in SCRIPTS})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Folder of the unpacked wheel, built from a copy of the repository: nothing is written here,
    and nothing that an earlier build left here gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "hanorec", source / "hanorec", ignore=leave)
    for name in ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", *SCRIPTS]:
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=source, check=True, capture_output=True
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def tried(wheel, tmp_path_factory):
    """What the commands did in an empty folder: its path, and what `TRY` found."""
    empty = tmp_path_factory.mktemp("empty")
    words = [sys.executable, "-c", TRY, *commands(), "hanorec.no_such_command"]
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run(
        words, check=False, cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return empty, json.loads((empty / "found.json").read_text())


def test_the_wheel_has_the_package_the_scripts_and_the_assets(wheel):
    packed = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    scripts = {f"hanorec/scripts/{name}" for name in [*SCRIPTS, "__init__.py"]}
    modules = {path for path in FILES if "/" in path}
    assert {path for path in packed if path.endswith(".py")} == modules | scripts
    assets = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("hanorec/assets/*/*")}
    assert assets and assets <= packed


def test_nothing_but_hanorec_is_at_the_top(wheel):
    """A module `evaluate` there would hide another package of that name."""
    names = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"hanorec"}


def test_all_commands_have_one_name(wheel):
    (path,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "hanorec = hanorec.__main__:hanorec" in path.read_text().splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_the_ones_that_readers_see(wheel, name):
    assert (wheel / "hanorec" / "scripts" / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_clone_has_no_copies():
    assert not (ROOT / "hanorec" / "scripts").exists()


def test_every_command_shows_its_help_without_a_clone(wheel, tried):
    _, found = tried
    assert Path(found["package"]).is_relative_to(wheel)
    assert set(commands()) - found["help"].keys() == set()
    assert "hanorec.no_such_command" not in found["help"]
    assert all("--help" in text for text in found["help"].values())


def test_a_stage_runs_without_a_clone(wheel, tried):
    empty, found = tried
    assert Path(found["script"]) == wheel / "hanorec" / "scripts" / "train_sft.py"
    assert (empty / "sft" / "adapter_model.safetensors").exists()
    assert (empty / "sft" / "run.json").exists()
