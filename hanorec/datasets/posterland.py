r"""Posterland: a generated catalogue whose truth is known, for teaching, the demo and the tests.

    python -m hanorec.datasets.posterland OUT [--users N] [--seed N] [--cold SHARE]

294 films, 6 in each of 7 genres x 7 styles. The poster shows both (background = genre, pattern =
style). The title does so too, in words of its own for each genre and style, but 30% of the titles
are ambiguous: only the poster tells. On another 10% the poster is drowned in noise: only the title
tells.

A user has one favourite genre g and one favourite style s. Each next film is new to the user and,
with probability 0.7, from the cell (g, s), 0.15 of genre g in another style, 0.15 of style s in
another genre; within that, by popularity. So neither genre nor style alone, and neither titles nor
posters alone, suffice.

With --cold, a share of each cell's films comes out after the training period: nobody has them in
train.tsv, and in val.tsv and test.tsv everybody can.

truth.json holds what was drawn, for the oracle row of the demo.
"""

from pathlib import Path

import numpy as np

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder, write_json
from hanorec.base.flags import Parser
from hanorec.datasets.posters import draw_poster

GENRES = {
    "space": ["Comet", "Orbit", "Nebula", "Rocket"],
    "crime": ["Alibi", "Heist", "Verdict", "Dagger"],
    "romance": ["Kiss", "Wedding", "Letter", "Rose"],
    "western": ["Saddle", "Canyon", "Sheriff", "Dust"],
    "horror": ["Crypt", "Scream", "Coffin", "Fang"],
    "sport": ["Goal", "Racket", "Sprint", "Trophy"],
    "war": ["Trench", "Medal", "Siege", "Convoy"],
}
STYLES = {
    "quiet": ["Silent", "Gentle", "Slow", "Soft"],
    "manic": ["Crazy", "Frantic", "Loud", "Wild"],
    "noir": ["Dark", "Smoky", "Bitter", "Shady"],
    "epic": ["Grand", "Eternal", "Mighty", "Vast"],
    "comic": ["Funny", "Silly", "Goofy", "Merry"],
    "dreamy": ["Floating", "Misty", "Lunar", "Hazy"],
    "gritty": ["Raw", "Rough", "Broken", "Rusty"],
}
NEUTRAL = (  # first and second words of ambiguous titles
    ["First", "Second", "Last", "Other", "Little", "New",
     "Old", "Hidden", "Common", "Late", "Early", "Plain"],
    ["Visit", "Number", "Story", "House", "Return", "Window",
     "Friend", "Answer", "Morning", "Street", "Name", "Table"],
)  # fmt: skip
PER_CELL = 6  # films
AMBIGUOUS, NOISY = 0.3, 0.1  # shares of the films
MOST_COLD = 0.5


def words() -> list[str]:
    """All words that a title can have, and the names of genres and styles.

    This is what a tokenizer should know.
    """
    result = [*GENRES, *STYLES]
    for own in (*GENRES.values(), *STYLES.values(), *NEUTRAL):
        result += own
    return result


def make_items(seed: int, ambiguous: float = AMBIGUOUS) -> list[dict]:
    """294 items, a share `ambiguous` with ambiguous titles; titles are all different.

    Each is {"id", "title", "genre", "style", "ambiguous", "noise", "popularity"}.
    """
    rng = np.random.default_rng([seed, 1])
    items: list[dict] = []
    taken: set[str] = set()
    for genre, genre_words in enumerate(GENRES.values()):
        for style, style_words in enumerate(STYLES.values()):
            for _ in range(PER_CELL):
                kind = rng.choice(3, p=[ambiguous, NOISY, 1 - ambiguous - NOISY])
                word_lists = style_words, genre_words
                if kind == 0:
                    word_lists = NEUTRAL[:: rng.choice([1, -1])]
                title = _new_title(rng, *word_lists, taken)
                taken.add(title)
                noise = 1.0 if kind == 1 else float(rng.uniform(0.1, 0.3))
                item = {
                    "id": str(len(items) + 1),
                    "title": title,
                    "genre": genre,
                    "style": style,
                    "ambiguous": bool(kind == 0),
                    "noise": noise,
                    "popularity": float(rng.lognormal(0, 0.7)),
                }
                items.append(item)
    return items


def _new_title(
    rng: np.random.Generator, first: list[str], second: list[str], taken: set[str]
) -> str:
    while True:
        title = f"{rng.choice(first)} {rng.choice(second)}"
        if title not in taken:
            return title


def next_probabilities(items: list[dict], genre: int, style: int, seen: set[int]) -> np.ndarray:
    """P(next item) of a user with that taste, (N,).

    It is the generating model itself, which is the oracle of the demo.
    """
    same_genre = np.array([item["genre"] == genre for item in items])
    same_style = np.array([item["style"] == style for item in items])
    popularity = np.array([item["popularity"] for item in items])
    popularity[list(seen)] = 0
    groups = [
        (0.7, same_genre & same_style),
        (0.15, same_genre & ~same_style),
        (0.15, same_style & ~same_genre),
    ]
    p = np.zeros(len(items))
    for share, group in groups:
        weight = popularity * group
        if weight.sum() > 0:  # a cell can be used up
            p += share * weight / weight.sum()
    return p / p.sum()


def cold_rows(seed: int, share: float) -> set[int]:
    """The rows of the films that come out late: a share of each cell, at random, rounded."""
    rng = np.random.default_rng([seed, 3])
    rows: set[int] = set()
    for cell in range(len(GENRES) * len(STYLES)):
        late = rng.permutation(PER_CELL)[: round(share * PER_CELL)]
        rows.update((cell * PER_CELL + late).tolist())
    return rows


def make_posterland(
    out: Path,
    users: int = 900,
    length: int = 7,
    seed: int = 2025,
    ambiguous: float = AMBIGUOUS,
    cold: float = 0.0,
) -> None:
    """Write the data set in the native layout, with dataset.json and truth.json."""
    out = Path(out)
    items, late = make_items(seed, ambiguous), cold_rows(seed, cold)
    rng = np.random.default_rng([seed, 2])
    (out / "images").mkdir(parents=True, exist_ok=True)
    for item in items:
        poster = draw_poster(item["genre"], item["style"], item["noise"], rng)
        poster.save(out / "images" / f"{item['id']}.png")
    titles = "".join(f"{item['id']},{item['title']}\n" for item in items)
    (out / "Posterland_titles.csv").write_text("item,title\n" + titles, encoding="utf-8")

    tastes: dict[str, list[int]] = {}
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for user in range(1, users + 1):
        genre, style = int(rng.integers(len(GENRES))), int(rng.integers(len(STYLES)))
        tastes[str(user)] = [genre, style]
        sequence: list[int] = []
        for place in range(length):
            out_later = late if place < length - 2 else set()
            p = next_probabilities(items, genre, style, out_later.union(sequence))
            sequence.append(int(rng.choice(len(items), p=p)))
        ids = [items[i]["id"] for i in sequence]
        for split, part in (("train", ids[:-2]), ("val", ids[-2:-1]), ("test", ids[-1:])):
            lines[split].append(f"{user}\t{' '.join(part)}\n")
    for split, text in lines.items():
        (out / f"{split}.tsv").write_text("".join(text), encoding="utf-8")

    truth = {"items": items, "tastes": tastes, "cold": [items[row]["id"] for row in sorted(late)]}
    write_json(out / "truth.json", truth)
    facts = {
        "name": "Posterland",
        "source": "generated",
        "covers": "drawn",
        "seed": seed,
        "cold": cold,
        "users": users,
        "items": len(items),
        "interactions": users * length,
    }
    write_json(out / "dataset.json", facts)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--users", type=int, default=900)
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument(
        "--cold", type=float, default=0.0, metavar="SHARE",
        help="of each cell's films, that nobody has in training: 0 .. 0.5",
    )
    args = parser.parse_args()
    if args.users < 1:
        raise InputError(f"--users {args.users}: expected at least 1")
    if not 0 <= args.cold <= MOST_COLD:
        raise InputError(
            f"--cold {args.cold}: expected 0 .. {MOST_COLD}, since training needs some films of "
            "each cell"
        )
    make_posterland(claim_folder(args.out), args.users, seed=args.seed, cold=args.cold)
    print(f"wrote {args.out}: {args.users} users, {len(make_items(args.seed))} items")


if __name__ == "__main__":
    run(main)
