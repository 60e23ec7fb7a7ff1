"""One exception for bad input, and one place that turns it into a message instead of a traceback."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input. The message names the file, line or item, the value, what was expected and the remedy."""


def run(main: Callable[[], None]) -> None:
    """Run a command; an `InputError`, or a fault of the file system, becomes `error: ...` on stderr and exit code 2, without a traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission: the message names the file
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
