"""Who is recommended to: users of the data, lines of a file, or one history.

They are checked once, before a model is loaded, and then streamed: of a file no list is kept.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from hanorec.base.errors import InputError, shown
from hanorec.base.files import sha256
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Interactions, Rows
from hanorec.datasets.lines import numbered_lines
from hanorec.recommending.config import PeopleConfig

NOBODY = "-"  # the name of who has a history alone


class Person(NamedTuple):
    """Somebody with all the items that they have had."""

    name: str
    history: Rows  # oldest first, never empty
    in_data: bool  # a user of the data folder


class People:
    """Those whom `PeopleConfig` names, in its order; `len` says how many.

    Raises:
        InputError: an unknown user or item, an empty history, a user listed twice, a file that
            cannot be read.
    """

    def __init__(self, asked: PeopleConfig, data: Interactions, catalog: Catalog) -> None:
        self.asked, self.data, self.catalog = asked, data, catalog
        names: set[str] = set()
        self.count = 0
        for person in self:
            if person.name in names and self.file is not None:
                raise InputError(
                    f"--users: {self.file}: user {shown(person.name)} is listed twice, expected "
                    "each once; remove a line"
                )
            if self.file is not None:
                names.add(person.name)
            self.count += 1
        if not self.count:
            raise InputError(f"--users: {self.file}: nobody in it, expected a user a line; add one")

    def __len__(self) -> int:
        return self.count

    @property
    def file(self) -> Path | None:
        """The file of `--users`, where it is one."""
        users = self.asked.users
        if users is None or users == "all" or users in self.data.train:
            return None
        path = Path(users)
        return path if path.is_file() else None

    def inputs(self) -> dict[str, str]:
        """The hash of the file, where it is one, for the record."""
        return {} if self.file is None else {"users": sha256(self.file)}

    def __iter__(self) -> Iterator[Person]:
        users = self.asked.users
        if users is None:
            history = item_rows(self.asked.history.split(), self.catalog, "--history")
            yield Person(NOBODY, history, False)
        elif users == "all":
            for user in self.data.train:
                yield user_of(user, self.data, "--users all")
        elif self.file is not None:
            for line, text in numbered_lines(self.file):
                yield self._person(text, f"--users: {self.file}:{line}")
        else:
            yield user_of(users, self.data, "--users")

    def _person(self, text: str, where: str) -> Person:
        """A line of the file: a user of the data, or user<TAB>id id id."""
        user, tab, ids = text.partition("\t")
        if not tab:
            return user_of(user, self.data, where)
        if user in self.data.train or not user.strip():
            raise InputError(
                f"{where}: a history of {shown(user)}, expected the name of somebody who is not in "
                "the data, whose users have theirs; remove the history, or choose another name"
            )
        return Person(user, item_rows(ids.split(), self.catalog, where), False)


def user_of(user: str, data: Interactions, where: str) -> Person:
    """A user of the data with their full history: train, val and test. InputError: unknown."""
    if user not in data.train:
        near = get_close_matches(user, data.train)
        raise InputError(
            f"{where}: user {shown(user)} is not in train.tsv, expected one of its "
            f"{len(data.train)} users or a file; nearest: {', '.join(map(repr, near)) or 'none'}"
        )
    return Person(user, data.before(user, "test") + data.test.get(user, ()), True)


def item_rows(ids: Sequence[str], catalog: Catalog, where: str) -> Rows:
    """The catalogue rows of a history, or of candidates. InputError: none, or an unknown id."""
    if not ids:
        raise InputError(f"{where}: an empty history, expected at least one item id; add one")
    for item in ids:
        if item not in catalog.row:
            raise InputError(
                f"{where}: unknown item {shown(item)}, expected an id of the titles file of "
                f"{catalog.directory}; nearest: {', '.join(nearest(item, catalog)) or 'none'}"
            )
    return tuple(catalog.row[item] for item in ids)


def nearest(text: str, catalog: Catalog, most: int = 3) -> list[str]:
    """Items whose title or id is like a text, each as `'id' (title)`, titles first."""
    by_title = {title.lower(): row for row, title in enumerate(catalog.titles)}
    rows = [by_title[title] for title in get_close_matches(text.lower(), by_title, most)]
    rows += [catalog.row[item] for item in get_close_matches(text, catalog.row, most)]
    return [f"{catalog.ids[row]!r} ({catalog.titles[row]})" for row in dict.fromkeys(rows)][:most]


def read_candidates(path: str, catalog: Catalog) -> Rows:
    """The rows of `--candidates`, one id a line. InputError: unknown, or listed twice."""
    rows: dict[int, int] = {}  # row -> its line
    for line, text in numbered_lines(Path(path)):
        (row,) = item_rows([text.strip()], catalog, f"--candidates: {path}:{line}")
        if row in rows:
            raise InputError(
                f"--candidates: {path}:{line}: item {shown(text.strip())} stands on line "
                f"{rows[row]} too, expected each once; remove one"
            )
        rows[row] = line
    if not rows:
        raise InputError(f"--candidates: {path}: no item in it, expected one id a line; add some")
    return tuple(rows)
