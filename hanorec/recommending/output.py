"""Where lists go: a file that grows block by block, and that a stopped run goes on with.

    OUT.part/lines     what is written so far; OUT.part/run.json: settings, hashes, states
    OUT, OUT.run.json  both, once all lists are there

TSV has a header, user, rank, item, title, score, retriever_rank, the last one empty without a
retriever; JSON lines have the same names. A list is `--top-k` lines, so the lines say how far a
stopped run came. Memory is that of a block, however many people there are.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from hanorec.base.distributed import rank, run_on_all_ranks, world_size
from hanorec.base.errors import InputError
from hanorec.base.files import write_text
from hanorec.base.lock import unlock_folder
from hanorec.base.progress import Progress
from hanorec.datasets.catalog import Catalog
from hanorec.recommending.people import People, Person
from hanorec.recommending.recommender import Recommendation, Recommender
from hanorec.run.record import open_run

COLUMNS = ("user", "rank", "item", "title", "score", "retriever_rank")
BLOCK = 32  # people; in the same blocks everywhere, so that all round alike


def check_output(out: Path, catalog: Catalog) -> None:
    """InputError where there is such a file, or TSV could not hold the titles."""
    if out.exists():
        raise InputError(
            f"--out {out}: exists, expected a new file; choose another name, or remove it"
        )
    if out.suffix == ".tsv":
        for item, title in zip(catalog.ids, catalog.titles, strict=True):
            if "\t" in title:
                raise InputError(
                    f"--out {out}: the title of item {item!r} holds a tab, which TSV cannot hold; "
                    "expected another form: name a file .jsonl"
                )


def header(jsonl: bool) -> str:
    """The first line of a file, if it has one."""
    return "" if jsonl else "\t".join(COLUMNS) + "\n"


def lines(name: str, recommended: Sequence[Recommendation], jsonl: bool) -> str:
    """The list of one person."""
    found = []
    for own in recommended:
        values = (name, own.rank, own.item, own.title, own.score, own.retriever_rank)
        if jsonl:
            row = dict(zip(COLUMNS, values, strict=True))
            found.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
        else:
            found.append("\t".join("" if value is None else str(value) for value in values))
    return "".join(line + "\n" for line in found)


class Writer:
    """The file of a run, new or gone on with.

    Args:
        settings: of the whole command; a run that goes on must have the same.
    """

    def __init__(self, out: Path, settings: dict, k: int) -> None:
        self.out, self.k, self.jsonl = out, k, out.suffix == ".jsonl"
        self.part = open_run(out.with_name(out.name + ".part"), settings, "finished")
        self.file = self.part / "lines"

    def write(self, recommender: Recommender, people: People) -> None:
        """The lists that are not there yet. Several processes divide the blocks."""
        done = run_on_all_ranks(self._go_on)[0]  # as rank 0 sees it
        left = islice(people, done, None)
        bar = Progress("lists", len(people), done, "user")
        for round_ in in_parts(left, BLOCK * world_size()):
            own = round_[rank() * BLOCK : (rank() + 1) * BLOCK]
            texts = run_on_all_ranks(self._texts, recommender, own)
            run_on_all_ranks(self._append, "".join(texts))
            bar.step(len(round_))
        bar.close()
        run_on_all_ranks(self._finish)

    def _texts(self, recommender: Recommender, people: Sequence[Person]) -> str:
        """The lists of a block, which may be empty in a last round."""
        found = recommender.lists(people, self.k) if people else []
        named = zip(people, found, strict=True)
        return "".join(lines(person.name, own, self.jsonl) for person, own in named)

    def _go_on(self) -> int:
        """Cut the file behind its last whole block; how many people are done."""
        if rank() > 0:
            return 0
        if not self.file.exists():
            write_text(self.file, header(self.jsonl))
        first = len(header(self.jsonl))
        done, size, count = 0, first, first
        with open(self.file, "rb+") as file:
            file.seek(first)
            for number, line in enumerate(file, 1):
                count += len(line)
                if number % (BLOCK * self.k) == 0 and line.endswith(b"\n"):
                    done, size = number // self.k, count
            file.truncate(size)
        return done

    def _append(self, text: str) -> None:
        if rank() == 0:
            with open(self.file, "a", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def _finish(self) -> None:
        """The whole file under its name, and the record beside it."""
        if rank() > 0:
            return
        record = (self.part / "run.json").read_text(encoding="utf-8")
        write_text(self.out.with_name(self.out.name + ".run.json"), record)
        os.replace(self.file, self.out)
        unlock_folder(self.part)
        shutil.rmtree(self.part)


def in_parts(people: Iterable[Person], size: int) -> Iterator[list[Person]]:
    """Consecutive parts of at most `size`, of a stream."""
    stream = iter(people)
    while part := list(islice(stream, size)):
        yield part
