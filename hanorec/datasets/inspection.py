"""All that a run would refuse or remark in a data folder, found in one pass.

The readers and limits are those of the runs; only what becomes of a fault is another thing.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from hanorec.base.config import DataConfig
from hanorec.base.errors import InputError, shown
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.images import IMAGE_SUFFIXES, check_entry, read_image
from hanorec.datasets.interactions import (
    Example,
    Interactions,
    check_some,
    had_before,
    heldout_examples,
    load_interactions,
    training_examples,
    with_seen,
)
from hanorec.datasets.lists import check_lists, list_examples, whole_sequences

SPLITS = ("val", "test")
THREADS = 2  # that decode images


@dataclass
class Findings:
    """What was found, by kind, in order: what helps, or what a run does -> every example."""

    errors: dict[str, list[str]] = field(default_factory=dict)  # a run would refuse these
    notes: dict[str, list[str]] = field(default_factory=dict)  # a run goes on with these

    def error(self, error: InputError) -> None:
        """A `hanorec.base.errors.Fault` that goes on."""
        found, remedy = error.parts
        self.errors.setdefault(remedy, []).append(found)

    def note(self, kind: str, examples: Iterable[str]) -> None:
        """Examples of one kind; there may be none."""
        examples = list(examples)
        if examples:
            self.notes.setdefault(kind, []).extend(examples)


# ---- items ----


def inspect_items(directory: Path, findings: Findings, images: bool = True) -> Catalog | None:
    """The items, as far as they can be read; None where there is no file of titles to read.

    images: False = images/ is not looked at.
    """

    def ignored(folder: Path, names: Sequence[str], why: str) -> None:
        findings.note(f"files in images/ are ignored, {why}", map(shown, names))

    try:
        catalog = load_catalog(directory, findings.error, ignored, images)
    except InputError as error:
        findings.error(error)
        return None

    bare = [row for row, path in enumerate(catalog.images) if images and path is None]
    findings.note(
        "items without an image, whose titles stand alone in prompts; expected images/<id> with "
        f"one of {', '.join(IMAGE_SUFFIXES)}",
        (f"item {shown(catalog.ids[row])} {shown(catalog.titles[row])}" for row in bare),
    )
    findings.note(
        "titles of several items, which are never candidates together and cannot be told apart in "
        "a list; give each item its own",
        (f"{shown(title)}: items {ids}" for title, ids in _shared_titles(catalog)),
    )
    return catalog


def _shared_titles(catalog: Catalog) -> list[tuple[str, str]]:
    """Titles that several items have, each with the ids of these."""
    items: dict[str, list[str]] = {}
    for item, title in zip(catalog.ids, catalog.titles, strict=True):
        items.setdefault(title, []).append(shown(item))
    return [(title, ", ".join(ids)) for title, ids in items.items() if len(ids) > 1]


def inspect_images(catalog: Catalog, findings: Findings) -> dict[int, tuple[int, int]]:
    """Catalogue row -> width and height of its image, upright, for every image that can be read."""
    rows = [row for row, path in enumerate(catalog.images) if path is not None]
    home = (catalog.directory / "images").resolve()

    def look(row: int) -> tuple[int, int] | InputError | None:
        path = catalog.images[row]
        try:
            check_entry(path, home)
        except InputError:  # found when the folder was listed; it must not be opened
            return None
        try:
            return read_image(path).size
        except InputError as error:
            return error

    sizes = {}
    pool = ThreadPoolExecutor(THREADS)
    try:
        bar = tqdm(pool.map(look, rows), "images", len(rows), leave=False, disable=None)
        for row, found in zip(rows, bar, strict=True):
            if isinstance(found, InputError):
                findings.error(found)
            elif found is not None:
                sizes[row] = found
    finally:
        pool.shutdown(cancel_futures=True)  # whoever interrupts it need not wait
    return sizes


# ---- users ----


def inspect_users(catalog: Catalog, findings: Findings) -> Interactions:
    """The interactions, as far as they can be read."""
    data = load_interactions(catalog.directory, catalog, findings.error)
    findings.note(
        "users with a single item in train.tsv: they give no training example",
        (f"user {shown(user)}" for user, rows in data.train.items() if len(rows) == 1),
    )
    for split in SPLITS:
        held_out = getattr(data, split)
        findings.note(
            f"file without a user: `evaluate.py --split {split}` would have nobody",
            [] if held_out else [f"{split}.tsv"],
        )
        if not data.train:
            continue
        again = had_before(data, split, heldout_examples(data, split))
        findings.note(
            f"targets of {split}.tsv that their user had before: copying from the history finds "
            "them",
            (f"user {shown(e.user)}, item {shown(catalog.ids[e.target])}" for e in again),
        )
    return data


def inspect_examples(
    catalog: Catalog, data: Interactions, config: DataConfig, per_user: int, findings: Findings
) -> dict[str, list[Example]]:
    """"train", "val" and "test" -> what is to be predicted there, an item or a list (--targets).

    per_user: how many of the last items of a training sequence are targets, 0 = all.
    """
    if not data.train:
        return {}
    if config.targets > 1:
        examples = _lists(catalog, data, config, per_user, findings)
    else:
        examples = {"train": training_examples(data, per_user, config.history)}
        for split in SPLITS:
            examples[split] = heldout_examples(data, split, config.history)
    try:
        check_some(catalog.directory, examples["train"], data.train)
    except InputError as error:
        findings.error(error)
    return examples


def _lists(
    catalog: Catalog, data: Interactions, config: DataConfig, per_user: int, findings: Findings
) -> dict[str, list[Example]]:
    """`inspect_examples` where each is a list."""
    targets, examples = config.targets, {}
    for split in ("train", *SPLITS):
        sequences, last = data.train, per_user
        if split != "train":
            sequences, last = whole_sequences(data, split, data.train), targets
        examples[split] = list_examples(sequences, targets, config.history, last)
        having = {example.user for example in examples[split]}
        findings.note(
            f"users of {split}.tsv without {targets} different last items and an earlier one: they "
            "give no example; lower --targets",
            (f"user {shown(user)}" for user in sequences if user not in having),
        )
        if split != "train" and sequences:
            try:
                check_lists(catalog.directory, split, sequences, examples[split], targets)
            except InputError as error:
                findings.error(error)
    return examples


def inspect_candidates(
    catalog: Catalog, examples: Iterable[Example], negatives: int, seed: int, findings: Findings
) -> list[Example]:
    """The examples for which so many negatives can be drawn."""
    titles = len(set(catalog.titles))
    enough = []
    for example, seen in with_seen(examples):
        if titles - len(seen) < negatives:  # each seen item takes one title away at most
            try:
                draw_candidates([example], catalog, negatives, seed)
            except InputError as error:
                findings.error(error)
                continue
        enough.append(example)
    return enough
