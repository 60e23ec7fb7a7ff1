"""Recommendations for all users, for some, or for anybody with a history.

    python -m hanorec.recommend --model MODEL --adapter DPO --data DATA --retriever BRMRS
        --users all --out lists.tsv
        what the retriever finds in the whole catalogue, in the model's order
    python -m hanorec.recommend --data DATA --retriever SASREC --history "12 7 31"
        for somebody who is in no file, in the retriever's own order, printed
    python -m hanorec.recommend --model MODEL --adapter DPO --data DATA --candidates new.txt
        --users 42 --top-k 3
        the items of a file, as new ones that nobody has had yet

A user's history is all that the data has of them, train, val and test. The same command again goes
on with a run that was stopped, and the file is the one that it would have been; started by
torchrun, several processes divide the users. From Python:

    from hanorec.recommend import Recommender

    recommender = Recommender("MODEL", "DATA", "DPO", "BRMRS")
    for line in recommender.for_history(["12", "7", "31"], k=3):
        print(line.rank, line.title, line.score)
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hanorec.base import command
from hanorec.base.settings import parse
from hanorec.recommending.config import ListConfig, PeopleConfig

KINDS = [ListConfig, PeopleConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__)  # --help needs no torch

from hanorec.base.distributed import join, usable_device
from hanorec.recommending.output import BLOCK, Writer, check_output, header, in_parts, lines
from hanorec.recommending.people import People
from hanorec.recommending.recommender import Recommendation, Recommender
from hanorec.run.record import all_settings, write_run

__all__ = ["Recommendation", "Recommender", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    config, asked = parse(KINDS, argv, __doc__)
    join(usable_device(config.device))

    # Data and retriever first: what is wrong with the input shows before a model is loaded.
    recommender = Recommender(**asdict(config))
    people = People(asked, recommender.interactions, recommender.catalog)
    recommender.check_length(asked.top_k)
    states = recommender.states_of(people)
    if states is not None:
        print(f"retriever's states: {states}")

    if asked.out is None:
        print(header(jsonl=False), end="")
        for block in in_parts(people, BLOCK):
            for person, own in zip(block, recommender.lists(block, asked.top_k), strict=True):
                print(lines(person.name, own, jsonl=False), end="")
        return

    out = Path(asked.out)
    check_output(out, recommender.catalog)
    writer = Writer(out, all_settings([config, asked]), asked.top_k)
    inputs = recommender.inputs() | people.inputs()
    write_run(writer.part, [config, asked], inputs, states=states, users=len(people))
    writer.write(recommender, people)
    print(f"wrote {out}: {len(people)} lists of {asked.top_k}")
