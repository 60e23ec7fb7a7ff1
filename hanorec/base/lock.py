"""One process at a time in a folder: a lock that ends with its process, in whatever way it ends.

    FOLDER/.running.json     locked (flock) while a process is at work, and says which one

A process that is killed leaves the file behind, but not the lock on it.
"""

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TextIO

from hanorec.base.errors import InputError

NAME = ".running.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of such a file system

_held: dict[Path, TextIO] = {}  # folder -> its file, of this process


def lock_folder(folder: Path, look: Callable[[], None] = lambda: None) -> None:
    """Make the folder if need be, and keep every other process out of it.

    The lock is held until `unlock_folder`, or until this process ends. The same process may ask
    again.

    Args:
        look: what else must hold of the folder, called before anything is written into it, and
            again under the lock. Where it raises, the folder is left as it was.
    Raises:
        InputError: another process is at work in it.
    """
    known = folder.resolve()
    holds = known in _held and lies_at(known / NAME, _held[known])
    if holds or not (known / NAME).exists():
        look()
    if holds:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(folder, known / NAME)
    try:
        look()
        _sign(file)
    except BaseException:
        with file:  # closed, and so let go
            if not os.fstat(file.fileno()).st_size:  # made here
                (known / NAME).unlink(missing_ok=True)
        raise
    _held[known] = file


def unlock_folder(folder: Path) -> None:
    """Let the folder go; nothing where this process does not hold it."""
    known = folder.resolve()
    file = _held.pop(known, None)
    if file is not None:
        with file:  # closed when the name is gone, so that nobody locks a file without one
            (known / NAME).unlink(missing_ok=True)


def unlock_all() -> None:
    """Let go every folder that this process holds."""
    for folder in list(_held):
        unlock_folder(folder)


def _locked(folder: Path, path: Path) -> TextIO:
    """The folder's file, opened and locked.

    While this process opens it, the one that has it may end and delete it: then a lock on it is
    worth nothing, and the file is opened anew.
    """
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  closed by whoever asks for it
        try:
            flock(file, folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise InputError(_taken(folder, file)) from None
        except OSError:
            file.close()
            raise
        if lies_at(path, file):
            return file
        file.close()


def flock(file: IO, folder: Path, how: int) -> None:
    """Lock an open file in a folder; a note where its file system has no locks."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"note: {folder}: its file system has no locks ({error.strerror}), so nothing keeps a "
            "second process out of it"
        )


def lies_at(path: Path, file: IO) -> bool:
    """Whether the open file is what now has this name."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(file.fileno())
    return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)


def _sign(file: TextIO) -> None:
    """Say in the file who has it. It keeps its place on disk, since the lock is on that."""
    command = Path(sys.argv[0]).name
    facts = {"process": os.getpid(), "host": socket.gethostname(), "command": command}
    file.seek(0)
    file.truncate()
    file.write(json.dumps(facts) + "\n")
    file.flush()


def _taken(folder: Path, file: TextIO) -> str:
    """What is said to a process that comes second."""
    file.seek(0)
    try:
        facts = json.loads(file.read())
        who = f"process {facts['process']} on {facts['host']} ({facts['command']})"
    except (ValueError, TypeError, KeyError):  # it has not signed yet
        who = "another process"
    return (
        f"{folder}: {who} is at work in it, expected nobody; wait until it has ended, end it, "
        "or choose another --out"
    )
