"""The scripts of the repository's root as modules, for studies that run them in this process."""

import importlib.util
from pathlib import Path
from types import ModuleType

from hanorec.base.errors import InputError

PACKAGE = Path(__file__).parent.parent
SCRIPTS = ["train_sft", "train_dpo", "train_brmrs", "evaluate"]


def script(name: str) -> ModuleType:
    """One of `SCRIPTS` as a module, read anew at every call.

    It is never put into sys.modules, where another package may be `evaluate`.
    """
    path = path_of(name)
    spec = importlib.util.spec_from_file_location(f"hanorec.scripts.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def path_of(name: str) -> Path:
    """Where a script lies: in a clone beside the package, in an installed wheel in hanorec/scripts.

    The build has copied it there. InputError where it lies in neither place.
    """
    clone, wheel = PACKAGE.parent, PACKAGE / "scripts"
    path = clone / f"{name}.py"
    if not (path.exists() and (clone / "setup.py").exists()):
        # no clone: what lies beside the package in site-packages is somebody else's
        path = wheel / f"{name}.py"
    if not path.exists():
        raise InputError(
            f"{name}.py: neither in {clone}, expected a clone with its setup.py, nor in {wheel}, "
            "where an installed package has it; install hanorec again, or use a clone with "
            "`pip install -e .`")
    return path
