r"""What every converter makes of a raw source: checked fields, the interaction log, the sequences.

Split: leave-last, per user in order of time. The last item is test, the one before it val, the rest
train. Equal times keep the order of the raw file (a stable sort). A repeated (user, item) pair is
kept as often as it occurs.
"""

import math
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hanorec.base.errors import InputError, shown
from hanorec.datasets.lines import one_spelling

MIN_ITEMS = 3  # train, val and test take at least one each


class Log:
    """Raw interactions as columns of 24 bytes a row: the 100 million of Netflix fit into memory."""

    def __init__(self) -> None:
        self.users: dict[str, int] = {}  # name -> code, in order of first appearance
        self.items: dict[str, int] = {}
        self.user = array("i")  # codes
        self.item = array("i")
        self.time = array("d")
        self.rating = array("d")  # NaN = the source has no ratings

    def add(
        self,
        path: Path,
        line: int,
        user: str,
        item: str,
        time: str | float,
        rating: str | float = math.nan,
    ) -> None:
        """Append one interaction.

        InputError names path:line where an id is empty or has spaces, or a number is bad.
        """
        for kind, name, codes in (("user", user, self.users), ("item", item, self.items)):
            if name not in codes:
                check_id(path, line, kind, name)
                codes[name] = len(codes)
        self.user.append(self.users[user])
        self.item.append(self.items[item])
        self.time.append(number(path, line, "time", time))
        if not isinstance(rating, float):
            rating = number(path, line, "rating", rating)
        self.rating.append(rating)


def check_id(path: Path, line: int, kind: str, name: str) -> None:
    """InputError where `name` is empty or has spaces."""
    if name.split() != [name]:
        raise InputError(
            f"{path}:{line}: {kind} id {shown(name)}; "
            f"expected a name without spaces, so mend the raw file"
        )


def number(path: Path, line: int, kind: str, text: str | float) -> float:
    """`text` as a finite float."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"{path}:{line}: {kind} {shown(text)}; "
            f"expected a finite number, so mend the raw file"
        )
    return value


def add_title(titles: dict[str, str], path: Path, line: int, item: str, title: str) -> None:
    """Set the title of a new item, in one spelling.

    InputError names path:line where the id or the title is empty, or the id is not new.
    """
    check_id(path, line, "item", item)
    if item in titles:
        raise InputError(
            f"{path}:{line}: item {shown(item)} has an earlier line; "
            f"expected each id once, so remove one"
        )
    if not title.strip():
        raise InputError(
            f"{path}:{line}: item {shown(item)} has an empty title; "
            f"expected text, so add one or remove the line"
        )
    titles[item] = one_spelling(title.strip())


def split(
    log: Log, titles: dict[str, str], min_rating: float | None, min_items: int | None
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """User -> item ids in order of time, after the filters, and the facts about them."""
    if min_items is not None and min_items < MIN_ITEMS:
        raise InputError(
            f"--min-items {min_items}; "
            f"expected at least {MIN_ITEMS}: train, val and test take one each"
        )
    users, items = list(log.users), list(log.items)
    user, item = np.asarray(log.user), np.asarray(log.item)  # int32 views, no copy

    kept = _rated(log, min_rating)  # places in the log
    few = _few(users, user[kept], min_items)  # (len(users),) bool
    kept = kept[~few[user[kept]]]
    for code in np.unique(item[kept]).tolist():
        if items[code] not in titles:
            raise InputError(
                f"item {shown(items[code])} occurs in interactions but has no title; "
                f"add it to the raw titles"
            )

    # by user, then time; stable, so ties keep the raw order
    kept = kept[np.lexsort((np.asarray(log.time)[kept], user[kept]))]
    user, item = user[kept], item[kept]
    starts = np.flatnonzero(np.diff(user, prepend=-1))  # where each user begins
    sequences = {}
    for code, part in zip(user[starts].tolist(), np.split(item, starts[1:]), strict=True):
        sequences[users[code]] = [items[i] for i in part.tolist()]

    distinct = len(np.unique(user.astype(np.int64) * len(items) + item))
    facts = {
        "users": len(sequences),
        "items": len(titles),
        "items_never_had": len(titles) - len(np.unique(item)),
        "interactions": len(item),
        "density": len(item) / (len(sequences) * len(titles)),
        "repeated_interactions": len(item) - distinct,
        "items_sharing_a_title": sum(n for n in Counter(titles.values()).values() if n > 1),
        "min_rating": min_rating,
        "min_items": min_items,
        "users_left_out": int(few.sum()),
        "split": "leave-last: the last item is test, the one before it val, the rest train",
        "order": "by time; equal times keep the order of the raw file",
    }
    return sequences, facts


def _rated(log: Log, min_rating: float | None) -> np.ndarray:
    """The places of the interactions rated `min_rating` or more; None = of all."""
    places = np.arange(len(log.user))
    if min_rating is None:
        return places
    rating = np.asarray(log.rating)
    if np.isnan(rating).any():
        raise InputError(
            f"--min-rating {min_rating}: this source has no ratings; leave the option out"
        )
    return places[rating >= min_rating]


def _few(users: list[str], user: np.ndarray, min_items: int | None) -> np.ndarray:
    """Who has fewer than `min_items` interactions: (len(users),) bool.

    user: the code of each interaction. InputError: without `min_items` there must be nobody with
    too few; with it, not everybody.
    """
    counts = np.bincount(user, minlength=len(users))
    few = counts < (min_items or MIN_ITEMS)
    if few.any() and min_items is None:
        code = int(np.argmax(few))
        raise InputError(
            f"user {shown(users[code])}: {counts[code]} interactions, "
            f"expected at least {MIN_ITEMS} (train, val and test take one each); "
            f"leave out the {few.sum()} such users with --min-items {MIN_ITEMS}"
        )
    if few.all():
        raise InputError(
            f"none of the {len(users)} users has {min_items or MIN_ITEMS} interactions; "
            f"lower --min-rating or --min-items"
        )
    return few
