"""One exception for bad input, and how a message shows a value."""

from collections.abc import Callable


class InputError(ValueError):
    """Bad input.

    The message names the file, line or item, the value, what was expected and the remedy; those of
    readers say the last two behind their last semicolon.
    """

    @property
    def parts(self) -> tuple[str, str]:
        """What was found, and what was expected with the remedy, of a reader's message."""
        found, _, remedy = str(self).rpartition("; ")
        return found, remedy


Fault = Callable[[InputError], None]  # what a reader does with a fault


def refuse(error: InputError) -> None:
    """The first fault ends the reading. A reader that is given another `Fault` goes on behind it,
    with what it can guess, so that all faults of a file are found at once."""
    raise error from None


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it.

    Escaped, so that it cannot act on a terminal, and cut, since a line may hold megabytes.
    """
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most + 2 else f"{text[:most]}..."


def brief(error: Exception) -> str:
    """Another library's error as a part of a message: its kind, and at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
