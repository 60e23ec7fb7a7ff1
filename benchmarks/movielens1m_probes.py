"""What a checkpoint of benchmarks/movielens1m_base.py knows of posters, before it recommends.

    python benchmarks/movielens1m_probes.py DATA OUT [--checkpoint names] [--films 300]

OUT is the folder of movielens1m_base.py; --checkpoint names the stage to look at. Three probes,
each beside chance and beside a control in which every film has another film's poster:

    genre       ridge regression from one vector a poster to the genres, five folds, posters of the
                same bytes in one: AUC, mean over the genres; and how often the likeliest genre is
                one of the film's, where chance is the most frequent genre
    title       the rank of the right title among 100 by its log-probability behind the poster, of
                films that were named in teaching and of films held out; a tie counts against it
    neighbours  the Jaccard index, in percent, of the genres of a film and of its 5 nearest

Vectors of the first: the tower's mean over its places, that of a tower at random, EfficientNet's
own, and a 4 x 4 grid's colours. Intervals: 95%, over films. Writes OUT/probes-STAGE.md.
"""

import argparse
from pathlib import Path

import numpy as np
from movielens1m_names import TITLE, Naming, read_genres
from movielens1m_posters import Posters, load_posters
from movielens1m_stages import seen_posters
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import write_text
from hanorec.datasets.catalog import load_catalog
from hanorec.hars import fuse
from hanorec.mllm.forward import score_rows
from hanorec.mllm.items import item_embeddings
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import answer_ids, encode_row
from hanorec.topk import topk_neighbors

FOLDS, NEAREST, TITLES, RESAMPLES = 5, 5, 100, 200
PENALTIES = np.array([1e1, 1e2, 1e3, 1e4])  # of the ridge, on standardised features
HEAD = "probe | of what | films | figure | other films' posters | chance\n---|---|---|---|---|---"


# ---- genre ----


def genre_labels(genres: list[list[str]]) -> np.ndarray:
    """(P, G) bool, a column for each genre that occurs."""
    names = sorted({name for of_film in genres for name in of_film})
    return np.array([[name in of_film for name in names] for of_film in genres])


def ridge(x: np.ndarray, y: np.ndarray, of: np.ndarray, penalties: np.ndarray) -> list[np.ndarray]:
    """Fitted to x (n, f), y (n, G): what it adds to the mean of y for `of` (m, f), a penalty."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / deviation
    values, vectors = np.linalg.eigh(z.T @ z)
    right = vectors.T @ (z.T @ (y - y.mean(0)))  # (f, G)
    told = (of - mean) / deviation @ vectors  # (m, f)
    return [told @ (right / (values[:, None] + penalty)) for penalty in penalties]


def out_of_fold(x: np.ndarray, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Scores (P, G) of each film by a ridge that has not seen its fold; the penalty is chosen on
    one of the others. The mean is that of all: of the other folds it is low where a fold is high.
    """
    scores = np.tile(y.mean(0), (len(y), 1))
    for k in range(FOLDS):
        test, choose = fold == k, fold == (k + 1) % FOLDS
        fit = ~test & ~choose
        tried = ridge(x[fit], y[fit], x[choose], PENALTIES)
        best = np.argmax([macro_auc(y[choose], told) for told in tried])
        scores[test] += ridge(x[~test], y[~test], x[test], PENALTIES[[best]])[0]
    return scores


def macro_auc(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the genres that some films have and some have not; ties count half."""
    found = []
    for positive, score in zip(y.T, scores.T, strict=True):
        p, n = positive.sum(), (~positive).sum()
        if not p or not n:
            continue
        _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
        rank = (counts.cumsum() - (counts - 1) / 2)[inverse]
        found.append((rank[positive].sum() - p * (p + 1) / 2) / (p * n))
    return float(np.mean(found))


def genre_lines(
    vectors: dict[str, Tensor], y: np.ndarray, group: np.ndarray, other: np.ndarray, rng: Generator
) -> list[str]:
    """The lines of the table about genres, two for each kind of vector."""
    fold = rng.permutation(group.max() + 1)[group] % FOLDS
    drawn = [rng.integers(len(y), size=len(y)) for _ in range(RESAMPLES)]
    frequent = y.mean(0).max()
    areas, likeliest = [], []
    for name, vector in vectors.items():
        area, right = [], []
        for x in (vector.double().numpy(), vector.double().numpy()[other]):
            scores = out_of_fold(x, y, fold)
            spread = [macro_auc(y[index], scores[index]) for index in drawn]
            low, high = np.quantile(spread, [0.025, 0.975])
            area.append(f"{100 * macro_auc(y, scores):.1f} [{100 * low:.1f}, {100 * high:.1f}]")
            right.append(mean_of(100 * y[np.arange(len(y)), scores.argmax(1)]))
        areas.append(line("genre, AUC", name, len(y), *area, "50.0"))
        likeliest.append(line("likeliest genre", name, len(y), *right, f"{100 * frequent:.1f}"))
    return areas + likeliest


# ---- title ----


def title_lines(
    naming: Naming, posters: Posters, other: np.ndarray, films: int, rng: Generator
) -> list[str]:
    """The lines about titles: films that were named in teaching, and those that were not."""
    lines = []
    for name, chosen in (("named in teaching", ~posters.held), ("held out", posters.held)):
        index = rng.permutation(chosen.nonzero()[:, 0].numpy())[:films]
        asked = [other_titles(naming.catalog.titles, naming.row[i], rng) for i in index]
        ranks = [title_ranks(naming, index, shown, asked) for shown in (index, other[index])]
        told = [mean_of(rank) for rank in ranks]
        first = [mean_of(100.0 * (rank == 1)) for rank in ranks]
        lines.append(line(f"title, rank of {TITLES}", name, len(index), *told, (TITLES + 1) / 2))
        lines.append(line("title, first", name, len(index), *first, 100 / TITLES))
    return lines


def other_titles(titles: tuple[str, ...], row: int, rng: Generator) -> list[str]:
    """The title of a row, and so many other ones."""
    others = sorted({*titles} - {titles[row]})
    return [titles[row], *rng.choice(others, TITLES - 1, replace=False).tolist()]


def title_ranks(
    naming: Naming, films: np.ndarray, shown: np.ndarray, asked: list[list[str]]
) -> np.ndarray:
    """(n,) ranks from 1 of the first of each film's titles, behind the poster of `shown`."""
    pictures = naming.shown([naming.row[i] for i in shown])
    rows = []
    for film, seen, titles in zip(films, shown, asked, strict=True):
        answers = [answer_ids(naming.backbone, title) for title in titles]
        name, parts = naming.catalog.ids[naming.row[film]], [naming.row[seen], TITLE]
        rows.append(encode_row(naming.backbone, name, parts, pictures, answers))
    scores, _ = score_rows(naming.backbone, rows, pictures, batch=4, about="titles")
    return 1 + (scores[:, 1:] >= scores[:, :1]).sum(1).numpy()


# ---- neighbours ----


def jaccard(y: np.ndarray, near: np.ndarray) -> np.ndarray:
    """(P,) mean over the neighbours (P, K) of the genres shared, in percent."""
    both = (y[:, None] & y[near]).sum(2)
    return 100 * (both / (y[:, None] | y[near]).sum(2)).mean(1)


def neighbour_lines(
    vectors: dict[str, tuple[Tensor, Tensor]], y: np.ndarray, held: np.ndarray, rng: Generator
) -> list[str]:
    """The lines about neighbours among all posters, of all films and of those held out.

    vectors: each as it is, and with other films' posters.
    """
    far = [rng.choice(np.delete(np.arange(len(y)), i), NEAREST, False) for i in range(len(y))]
    chance, lines = jaccard(y, np.array(far)), []
    for name, both in vectors.items():
        shared = [jaccard(y, nearest(x)) for x in both]
        for films, of in (("", held | True), (", held out", held)):
            told = [mean_of(values[of]) for values in shared]
            random = f"{chance[of].mean():.1f}"
            lines.append(line(f"{NEAREST} neighbours", name + films, of.sum(), *told, random))
    return lines


def nearest(x: Tensor) -> np.ndarray:
    """(P, K) by cosine."""
    return topk_neighbors(F.normalize(x.float(), dim=1), NEAREST)[1].numpy()


def mean_of(values: np.ndarray) -> str:
    """Mean of a number a film, with its interval."""
    mean, half = values.mean(), 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def line(*cells: object) -> str:
    return " | ".join(map(str, cells))


def probe(data: Path, out: Path, checkpoint: str, films: int, device: str = "auto") -> str:
    """The table."""
    catalog = load_catalog(data)
    genres, posters = read_genres(data, catalog), load_posters(out / "posters.safetensors")
    rng = np.random.default_rng(0)
    cycle = rng.permutation(len(posters.row))
    other = np.empty_like(cycle)
    other[cycle] = np.roll(cycle, 1)  # nobody has their own
    y = genre_labels([genres[catalog.ids[row]] for row in posters.row.tolist()])  # (P, G)
    untaught = load_backbone(str(out / "start"), "float32", device)
    backbone = load_backbone(str(out / checkpoint), "float32", device)
    naming = Naming(backbone, posters, catalog, genres)
    vectors = {
        f"tower of {checkpoint}": naming.seen.mean((1, 2)).cpu(),
        "tower at random": seen_posters(untaught, posters).mean((1, 2)).cpu(),
        "EfficientNet-lite0": posters.pooled,
        "colours": F.adaptive_avg_pool2d(posters.pixels[:, 0, 0].float(), 4).flatten(1),
    }
    lines = genre_lines(vectors, y, posters.group.numpy(), other, rng)
    lines += title_lines(naming, posters, other, films, rng)

    H, X, _ = item_embeddings(backbone, catalog, naming.shown(naming.row))
    H, X, own = H[posters.row], X[posters.row], posters.pooled
    lines += neighbour_lines({
        "projected poster (X)": (X, X[other]),
        "fused, as HaRS has it (e)": (fuse(H, X), fuse(H, X[other])),
        "title alone (H)": (H, H[other]),
        "EfficientNet-lite0": (own, own[other]),
    }, y, posters.held.numpy(), rng)
    return "\n".join([HEAD, *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", choices=("names", "base"), default="names")
    parser.add_argument("--films", type=int, default=300, help="most films of a line about titles")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    checkpoint = args.out / args.checkpoint
    if not (checkpoint / "config.json").exists():
        raise InputError(
            f"{checkpoint}: no checkpoint, expected that stage of "
            "benchmarks/movielens1m_base.py; give its command again until it is there"
        )
    if args.films < 2:
        raise InputError(f"--films {args.films}: expected at least 2")
    table = probe(args.data, args.out, args.checkpoint, args.films, args.device)
    write_text(args.out / f"probes-{args.checkpoint}.md", table)
    print(table)


if __name__ == "__main__":
    run(main)
