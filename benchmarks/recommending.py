#!/usr/bin/env python3
"""Lists for users: one forward a prompt, all candidates behind its shared beginning, against a
forward a candidate (--plain true); and against generating one title.

    python benchmarks/recommending.py [--users N] [--candidates N] [--rounds N]

Posterland's base and catalogue, prompts of five films and ten candidates with their posters, image
features computed beforehand on both sides.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from measure import agree, begin, interleaved

from hanorec.datasets.interactions import Example
from hanorec.datasets.posterland import make_posterland
from hanorec.mllm.generation import generate
from hanorec.mllm.tasks import scoring_rows
from hanorec.recommend import Recommender
from hanorec.recommending.people import user_of

BASE = Path(__file__).parent.parent / "hanorec" / "assets" / "posterland-base"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    begin("cpu")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    data = folder / "data"
    make_posterland(data, users=args.users)
    candidates = folder / "candidates"
    titles = (data / "Posterland_titles.csv").read_text().splitlines()[1:]
    ids = [line.partition(",")[0] for line in titles[:: len(titles) // args.candidates]]
    candidates.write_text("\n".join(ids[: args.candidates]) + "\n")

    made = {}
    for plain in (False, True):
        made[plain] = Recommender(
            str(BASE), str(data), candidates=str(candidates), seen="keep", plain=plain, device="cpu"
        )
    builder, data = made[False].builder, made[False].interactions
    people = [user_of(user, data, "") for user in data.train]
    examples = []
    for person in people:
        history = person.history[-builder.config.history :]
        examples.append(Example(person.name, history, 0, (), made[False].pool))

    def lists(plain: bool) -> list[float]:
        every = made[plain].lists(people, args.candidates)
        return [line.score for own in every for line in own]

    def write() -> list[str]:
        rows = scoring_rows(builder, examples)
        return generate(builder.backbone, rows, builder.pictures, limit=12)

    sides = {
        "packed": lambda: lists(False), "a forward a candidate": lambda: lists(True),
        "one title written": write,
    }
    agree("scores", torch.tensor(lists(False)), torch.tensor(lists(True)), 1e-4)
    seconds = interleaved(sides, args.rounds, "cpu")
    print("\n| lists | users a second | times packed's time |\n|---|---|---|")
    for name, time in seconds.items():
        print(f"| {name} | {args.users / time:.1f} | {time / seconds['packed']:.2f} |")


if __name__ == "__main__":
    main()
