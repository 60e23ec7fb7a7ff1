"""Text files read line by line, so that every complaint can name the file and the line."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from hanorec.base.errors import InputError

BOM = b"\xef\xbb\xbf"
MAX_LINE = 4 * 2**20  # bytes: a history of half a million items
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # all but the tab


def numbered_lines(
    path: Path,
    encoding: str = "utf-8",
    progress: bool = False,
) -> Iterator[tuple[int, str]]:
    r"""Yield (line number from 1, text without its \n or \r\n).

    A leading UTF-8 byte order mark is dropped. progress: show a bar over the bytes read (on a
    terminal only).

    InputError: the file cannot be opened, a line is longer than `MAX_LINE` (it is not read to its
    end), does not decode, or holds a control character: NUL, the codes that command a terminal,
    line breaks of other kinds, which would end an item's line in a prompt.
    """
    path = Path(path)
    hidden = None if progress else True  # tqdm: None hides the bar where stderr is not a terminal
    try:
        size = path.stat().st_size
        with (
            open(path, "rb") as file,
            tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=hidden) as bar,
        ):
            raw_lines = iter(partial(file.readline, MAX_LINE + 1), b"")
            for number, raw in enumerate(raw_lines, start=1):
                if len(raw) > MAX_LINE:
                    raise InputError(
                        f"{path}:{number}: more than {MAX_LINE} bytes without a line break; "
                        f"expected lines of text: is it the right file?"
                    )
                bar.update(len(raw))
                if number == 1:
                    raw = raw.removeprefix(BOM)
                yield number, _decode(path, number, raw, encoding)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _decode(path: Path, number: int, raw: bytes, encoding: str) -> str:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        value = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        raise InputError(
            f"{path}:{number}: {value} is not {encoding}; save the file as {encoding}"
        ) from None
    text = text.removesuffix("\n").removesuffix("\r")
    if found := CONTROL.search(text):
        known = {"\0": "NUL byte", "\r": "carriage return within the line"}
        kind = known.get(found[0], f"control character {found[0]!r}")
        raise InputError(
            f"{path}:{number}: {kind} at position {found.start() + 1}; "
            f"expected text, so remove it or save the file again as plain text"
        )
    return text


def only_file(directory: Path, *patterns: str) -> Path:
    """The one file in `directory` that matches one of the glob `patterns`.

    InputError for none or several.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: not a folder; check the path")
    found: set[Path] = set()
    for pattern in patterns:
        found.update(path for path in directory.glob(pattern) if path.is_file())
    wanted = " or ".join(patterns)
    if not found:
        raise InputError(
            f"{directory}: no file {wanted}; expected exactly one, so add it or check the path"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in sorted(found))
        raise InputError(
            f"{directory}: {len(found)} files {wanted} ({names}); "
            f"expected exactly one, so move the others"
        )
    return found.pop()
