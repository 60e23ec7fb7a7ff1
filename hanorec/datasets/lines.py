"""Text files read line by line, so that every complaint can name the file and the line."""

import re
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from hanorec.base.errors import Fault, InputError, refuse

BOM = b"\xef\xbb\xbf"
MAX_LINE = 4 * 2**20  # bytes: a history of half a million items
# C0 but the tab, C1, and the two separators of Unicode that break a line
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def numbered_lines(
    path: Path,
    encoding: str = "utf-8",
    progress: bool = False,
    fault: Fault = refuse,
) -> Iterator[tuple[int, str]]:
    r"""Yield (line number from 1, text without its \n or \r\n).

    A leading UTF-8 byte order mark is dropped. progress: show a bar over the bytes read (on a
    terminal only).

    InputError: the file cannot be opened, a line is longer than `MAX_LINE` (it is not read to its
    end), does not decode, or holds a control character: NUL, the codes that command a terminal,
    line breaks of other kinds, which would end an item's line in a prompt. To go on behind that
    see `hanorec.base.errors.refuse`; the text has stand-ins then.
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
                    fault(InputError(
                        f"{path}:{number}: more than {MAX_LINE} bytes without a line break; "
                        f"expected lines of text: is it the right file?"
                    ))
                    return
                bar.update(len(raw))
                if number == 1:
                    raw = raw.removeprefix(BOM)
                yield number, _decode(path, number, raw, encoding, fault)
    except OSError as error:
        fault(InputError(f"{path}: cannot be read ({error.strerror}); check the path"))


def _decode(path: Path, number: int, raw: bytes, encoding: str, fault: Fault) -> str:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        value = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        fault(InputError(
            f"{path}:{number}: {value} is not {encoding}; save the file as {encoding}"
        ))
        text = raw.decode(encoding, "replace")
    text = text.removesuffix("\n").removesuffix("\r")
    if found := CONTROL.search(text):
        known = {"\0": "NUL byte", "\r": "carriage return within the line"}
        kind = known.get(found[0], f"control character {found[0]!r}")
        fault(InputError(
            f"{path}:{number}: {kind} at position {found.start() + 1}; "
            f"expected text, so remove it or save the file again as plain text in UTF-8"
        ))
        text = CONTROL.sub(" ", text.replace("\0", ""))  # UTF-16 reads as text with NULs
    return text


def text_encoding(path: Path) -> str:
    """"utf-8", or "iso-8859-1" for a file with bytes that are no UTF-8; said if it matters.

    For sources that are ISO-8859-1 as they were published, and UTF-8 once somebody saved them
    again. It is one or the other for the whole file; one with a BOM is UTF-8.
    """
    path = Path(path)
    utf_8 = others = 0  # lines that hold more than ASCII
    marked = False
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(iter(partial(file.readline, MAX_LINE + 1), b"")):
                marked = marked or (number == 0 and raw.startswith(BOM))
                if raw.isascii():
                    continue
                try:
                    raw.decode("utf-8")
                    utf_8 += 1
                except UnicodeDecodeError:
                    others += 1
    except OSError:
        return "utf-8"  # whoever reads the lines says so
    encoding = "utf-8" if marked or not others else "iso-8859-1"
    if utf_8 or others:
        print(f"{path.name}: text beyond ASCII is read as {encoding.upper()}")
    if utf_8 and others and not marked:
        print(
            f"note: {utf_8} of the {utf_8 + others} lines beyond ASCII in {path.name} are valid "
            f"UTF-8, the others are not; save the file in one encoding if titles look wrong"
        )
    return encoding


def one_spelling(text: str) -> str:
    """The text in NFC.

    So a letter with its accent as one character, and with the accent behind it, are one text.
    """
    return unicodedata.normalize("NFC", text)


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
