"""Several items as one thing to predict: the last of a sequence, newest first (--targets).

The authors' release trains and evaluates rankings so (its hit3): the three last items are one
answer of three titles, and candidates are these three and a few negatives.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hanorec.base.errors import InputError
from hanorec.datasets.interactions import Example, Interactions, Rows


def list_examples(
    sequences: Mapping[str, Rows], targets: int, history: int, per_user: int
) -> list[Example]:
    """Examples of `targets` items each, from the end of each user's sequence.

    Args:
        sequences: user -> rows, oldest first; all of them count as seen.
        per_user: how many items are targets in all, a multiple of `targets`; 0 = all but the first.
    Returns:
        Oldest first. A user gives none whose sequence is too short for one and an earlier item, or
        in which an item or more of a list stand twice.
    """
    if per_user % targets:
        raise InputError(
            f"--targets-per-user {per_user} with --targets {targets}: expected a multiple of it, "
            "since so many targets are one answer"
        )
    examples = []
    for user, rows in sequences.items():
        first = max(1, len(rows) - per_user) if per_user else 1
        own = []
        for end in range(len(rows), first + targets - 1, -targets):
            newest = rows[end - targets : end][::-1]
            earlier = rows[max(0, end - targets - history) : end - targets]
            if len(set(newest)) == targets:
                own.append(Example(user, earlier, newest[0], rows, also=newest[1:]))
        examples += reversed(own)
    return examples


def check_lists(
    directory: str | Path, split: str, sequences: Mapping[str, Rows], examples: Sequence[Example],
    targets: int,
) -> None:
    """InputError where nobody in a split has enough items for an example."""
    if not examples:
        raise InputError(
            f"{directory}: of {len(sequences)} users in {split}.tsv nobody has {targets} different "
            "targets and an earlier item, expected some; lower --targets"
        )


def whole_sequences(data: Interactions, split: str, users: Iterable[str]) -> dict[str, Rows]:
    """User -> all rows up to the end of a split, of those of these users whom it has."""
    found = {}
    for user in users:
        if user in getattr(data, split):
            found[user] = data.before(user, split) + getattr(data, split)[user]
    return found
