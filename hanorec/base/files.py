"""Files and folders that are whole or absent: written beside the target, then renamed over it."""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hanorec.base import lock
from hanorec.base.errors import InputError

MAX_JSON = 2**30  # bytes: the candidates of five million users


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: a reader sees the old file or the new one, all of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; a NaN or infinity is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def claim_folder(out: str | Path) -> Path:
    """The output folder, made if need be, and locked until this process ends.

    InputError where it holds files, since a run never overwrites another, or where another process
    is at work in it.
    """
    out = Path(out)

    def refuse_files() -> None:
        if out.exists() and (not out.is_dir() or any(p.name != lock.NAME for p in out.iterdir())):
            raise InputError(
                f"{out}: exists and is not an empty folder, expected a new one; choose another "
                "--out or remove it"
            )

    lock.lock_folder(out, refuse_files)
    return out


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    InputError where the file is missing, too large, or not the JSON of RFC 8259. Python's reader
    would also take NaN, infinity, a key that stands twice, and text that no file can hold; here
    they are errors.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise InputError(
                f"{path}: {size} bytes of JSON, expected at most {MAX_JSON}; is it the right file?"
            )
        return json.loads(
            path.read_text(encoding="utf-8-sig"),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}), expected a JSON file; check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        # bad UTF-8, bad JSON, an integer of 5000 digits, 1000 brackets within one another
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not readable as UTF-8 JSON ({error}); mend or remake the file"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=Counter(keys).get)!r} stands twice in one object")
    for key, text in pairs:
        if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
            raise ValueError(f"the text of {key!r} holds a NUL or half of a surrogate pair")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` of a file that must hold a JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: holds a JSON {type(value).__name__}, expected an object {{...}}; mend or "
            "remake the file"
        )
    return value


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that is whole or absent: the block fills a hidden one, which then becomes `path`.

    Its names are flushed to disk first. Where the block fails, nothing is left of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp-"))
    try:
        yield hidden
        hidden.chmod(0o755)  # mkdtemp makes it private
        _flush_folder(hidden)
        os.replace(hidden, path)
    except BaseException:  # a full disk, too: make room again
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(path: Path) -> None:
    """The names in a folder are on disk, too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
