r"""Posterland: a generated catalogue whose truth is known, for teaching, the demo and the tests.

    python -m hanorec.datasets.posterland OUT [--users N] [--seed N]

294 films, 6 in each of 7 genres x 7 styles. The poster shows both (background = genre, pattern = style). The title does so too,
in words of its own for each genre and style, but 30% of the titles are ambiguous: only the poster tells. On another 10% the
poster is drowned in noise: only the title tells.

A user has one favourite genre g and one favourite style s. Each next film is new to the user and, with probability 0.7, from the
cell (g, s), 0.15 of genre g in another style, 0.15 of style s in another genre; within that, by popularity. So neither genre nor
style alone, and neither titles nor posters alone, suffice. `truth.json` holds what was drawn, for the oracle row of the demo.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder, write_json

GENRES = {"space": ["Comet", "Orbit", "Nebula", "Rocket"], "crime": ["Alibi", "Heist", "Verdict", "Dagger"],
          "romance": ["Kiss", "Wedding", "Letter", "Rose"], "western": ["Saddle", "Canyon", "Sheriff", "Dust"],
          "horror": ["Crypt", "Scream", "Coffin", "Fang"], "sport": ["Goal", "Racket", "Sprint", "Trophy"],
          "war": ["Trench", "Medal", "Siege", "Convoy"]}
STYLES = {"quiet": ["Silent", "Gentle", "Slow", "Soft"], "manic": ["Crazy", "Frantic", "Loud", "Wild"],
          "noir": ["Dark", "Smoky", "Bitter", "Shady"], "epic": ["Grand", "Eternal", "Mighty", "Vast"],
          "comic": ["Funny", "Silly", "Goofy", "Merry"], "dreamy": ["Floating", "Misty", "Lunar", "Hazy"],
          "gritty": ["Raw", "Rough", "Broken", "Rusty"]}
NEUTRAL = (["First", "Second", "Last", "Other", "Little", "New", "Old", "Hidden", "Common", "Late", "Early", "Plain"],
           ["Visit", "Number", "Story", "House", "Return", "Window", "Friend", "Answer", "Morning", "Street", "Name", "Table"])
COLOURS = [(40, 60, 200), (120, 30, 140), (240, 130, 170), (225, 150, 40), (30, 110, 50), (60, 200, 210), (110, 110, 110)]
PER_CELL, AMBIGUOUS, NOISY = 6, 0.3, 0.1
SIDE = 128  # pixels of a poster


def words() -> list[str]:
    """All words that a title can have, and the names of genres and styles: what a tokenizer should know."""
    own = [word for group in (GENRES, STYLES) for words in group.values() for word in words]
    return [*GENRES, *STYLES, *own, *NEUTRAL[0], *NEUTRAL[1]]


def draw_poster(genre: int, style: int, noise: float, rng: np.random.Generator) -> Image.Image:
    """A poster: colour by genre, pattern by style, and noise in 0 .. 1 (1 = nothing is left of either)."""
    image = Image.new("RGB", (SIDE, SIDE), COLOURS[genre])
    draw, light, step = ImageDraw.Draw(image), (250, 245, 230), SIDE // 4
    for a in range(-SIDE, SIDE, step):
        if style == 0:
            draw.rectangle([0, a, SIDE, a + step // 3], fill=light)  # lying stripes
        elif style == 1:
            draw.rectangle([a, 0, a + step // 3, SIDE], fill=light)  # standing stripes
        elif style == 2:
            draw.line([a, 0, a + SIDE, SIDE], fill=light, width=step // 3)  # falling stripes
        elif style == 3:
            draw.line([a + SIDE, 0, a, SIDE], fill=light, width=step // 3)  # rising stripes
        elif style == 4:
            for b in range(0, SIDE, step):
                draw.ellipse([a + 6, b + 6, a + step - 6, b + step - 6], fill=light)  # dots
    if style == 5:
        for radius in (20, 44):
            draw.ellipse([64 - radius, 64 - radius, 64 + radius, 64 + radius], outline=light, width=10)  # rings
    elif style == 6:
        draw.rectangle([SIDE // 2, 0, SIDE, SIDE // 2], fill=light)  # quarters
        draw.rectangle([0, SIDE // 2, SIDE // 2, SIDE], fill=light)
    pixels = np.asarray(image, np.float64)
    grain = rng.uniform(0, 255, pixels.shape)
    return Image.fromarray((pixels * (1 - noise) + grain * noise).astype(np.uint8))


def make_items(seed: int, ambiguous: float = AMBIGUOUS) -> list[dict]:
    """294 items, a share `ambiguous` with ambiguous titles: {"id", "title", "genre", "style", "ambiguous", "noise", "popularity"}; titles are all different."""
    rng = np.random.default_rng([seed, 1])
    items, taken = [], set()
    for genre, genre_words in enumerate(GENRES.values()):
        for style, style_words in enumerate(STYLES.values()):
            for _ in range(PER_CELL):
                kind = rng.choice(3, p=[ambiguous, NOISY, 1 - ambiguous - NOISY])
                first, second = NEUTRAL[:: rng.choice([1, -1])] if kind == 0 else (style_words, genre_words)
                while (title := f"{rng.choice(first)} {rng.choice(second)}") in taken:
                    pass
                taken.add(title)
                items.append({"id": str(len(items) + 1), "title": title, "genre": genre, "style": style, "ambiguous": bool(kind == 0),
                              "noise": 1.0 if kind == 1 else float(rng.uniform(0.1, 0.3)), "popularity": float(rng.lognormal(0, 0.7))})
    return items


def next_probabilities(items: list[dict], genre: int, style: int, seen: set[int]) -> np.ndarray:
    """P(next item) of a user with that taste, (N,): the generating model itself, which is the oracle of the demo."""
    p = np.zeros(len(items))
    match = np.array([[i["genre"] == genre, i["style"] == style] for i in items])
    popularity = np.array([i["popularity"] for i in items])
    popularity[list(seen)] = 0
    for share, group in [(0.7, match.all(1)), (0.15, match[:, 0] & ~match[:, 1]), (0.15, match[:, 1] & ~match[:, 0])]:
        weight = popularity * group
        if weight.sum() > 0:  # a cell can be used up
            p += share * weight / weight.sum()
    return p / p.sum()


def make_posterland(out: Path, users: int = 900, length: int = 7, seed: int = 2025, ambiguous: float = AMBIGUOUS) -> None:
    """Write the data set in the native layout, with dataset.json and truth.json."""
    out, items = Path(out), make_items(seed, ambiguous)
    rng = np.random.default_rng([seed, 2])
    (out / "images").mkdir(parents=True, exist_ok=True)
    for item in items:
        draw_poster(item["genre"], item["style"], item["noise"], rng).save(out / "images" / f"{item['id']}.png")
    titles = "".join(f"{item['id']},{item['title']}\n" for item in items)
    (out / "Posterland_titles.csv").write_text("item,title\n" + titles, encoding="utf-8")
    tastes, lines = {}, {"train": [], "val": [], "test": []}
    for user in range(1, users + 1):
        genre, style = int(rng.integers(len(GENRES))), int(rng.integers(len(STYLES)))
        tastes[str(user)], sequence = [genre, style], []
        for _ in range(length):
            sequence.append(int(rng.choice(len(items), p=next_probabilities(items, genre, style, set(sequence)))))
        ids = [items[i]["id"] for i in sequence]
        for split, part in [("train", ids[:-2]), ("val", ids[-2:-1]), ("test", ids[-1:])]:
            lines[split].append(f"{user}\t{' '.join(part)}\n")
    for split, text in lines.items():
        (out / f"{split}.tsv").write_text("".join(text), encoding="utf-8")
    write_json(out / "truth.json", {"items": items, "tastes": tastes})
    write_json(out / "dataset.json", {"name": "Posterland", "source": "generated", "covers": "drawn", "seed": seed,
                                      "users": users, "items": len(items), "interactions": users * length})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--users", type=int, default=900)
    parser.add_argument("--seed", type=int, default=2025)
    args = parser.parse_args()
    if args.users < 1:
        raise InputError(f"--users {args.users}: expected at least 1")
    make_posterland(claim_folder(args.out), args.users, seed=args.seed)
    print(f"wrote {args.out}: {args.users} users, {len(make_items(args.seed))} items")


if __name__ == "__main__":
    run(main)
