"""One exception for bad input, and how a message shows a value."""




class InputError(ValueError):
    """Bad input.

    The message names the file, line or item, the value, what was expected and the remedy.
    """


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it.

    Escaped, so that it cannot act on a terminal, and cut, since a line may hold megabytes.
    """
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most + 2 else f"{text[:most]}..."


def brief(error: Exception) -> str:
    """Another library's error as a part of a message: its kind, and at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
