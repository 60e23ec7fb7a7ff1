"""How a command begins and ends: with the user's home in its paths, and in a message instead of a
traceback."""

import io
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

from hanorec.base.errors import InputError
from hanorec.base.exhausted import exhausted, is_exhausted
from hanorec.base.lock import unlock_all


def run(main: Callable[[], None]) -> None:
    """Run a command whose errors become messages.

    An `InputError`, a fault of the file system, or memory that is full becomes "error: ..." on
    stderr and exit code 2, without a traceback. Where torchrun started several processes, one of
    them says so for all. Whatever ends it, the folders that it has locked are let go.
    """
    sys.argv[1:] = with_home(sys.argv[1:])
    voice: AbstractContextManager = nullcontext()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Here, since it imports PyTorch, which converters do without.
        from hanorec.base.distributed import one_voice

        voice = one_voice()
    try:
        with voice:
            main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission
        place, what = error.filename or "the file system", error.strerror or error
        advice = "check the path, its permissions and the space left"
        print(f"error: {place}: {what}; {advice}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        print(f"error: {exhausted(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        unlock_all()


def start(file: str, read: Callable[..., Any], *arguments: Any) -> None:
    """`run` the main of a file that Python was started with, and which has come so far.

    It calls this above its other imports: PyTorch takes seconds to load, and `--help` or a wrong
    flag, at which `read(*arguments)` ends, should not have to wait for it.
    """
    def main() -> None:
        said = io.StringIO()
        try:
            with redirect_stdout(said):  # main reads the flags again, and says it then
                read(*arguments)
        except SystemExit:
            print(said.getvalue(), end="")
            raise
        spec = spec_from_file_location("hanorec.started", file)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()

    run(main)
    sys.exit()


def with_home(words: Iterable[str]) -> list[str]:
    """The words of a command with ~/... (also in --flag=~/...) as a path in the user's home.

    A shell does that for words of their own alone, and nobody for a file of settings.
    """
    found = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if value == "~" or (value.startswith("~") and "/" in value):
            value = os.path.expanduser(value)
        found.append(flag + equals + value)
    return found
