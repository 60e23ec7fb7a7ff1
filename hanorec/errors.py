"""One exception for bad input, and one place that turns it into a message instead of a traceback."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext


class InputError(ValueError):
    """Bad input. The message names the file, line or item, the value, what was expected and the remedy."""


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it: escaped, so that it cannot act on a terminal, and cut, since a line may hold megabytes."""
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most + 2 else f"{text[:most]}..."


def run(main: Callable[[], None]) -> None:
    """Run a command; an `InputError`, or a fault of the file system, becomes `error: ...` on stderr and exit code 2, without a traceback.

    Where torchrun started several processes, one of them says so for all.
    """
    voice: AbstractContextManager = nullcontext()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from hanorec.distributed import one_voice  # here, since it imports PyTorch, which converters do without

        voice = one_voice()
    try:
        with voice:
            main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission
        place, what = error.filename or "the file system", error.strerror or error
        print(f"error: {place}: {what}; check the path, its permissions and the space left", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
