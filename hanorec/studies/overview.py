"""One picture of the whole, on Posterland: python -m hanorec.studies.overview OUT.png

Posters and titles, pairs, clusters, beta', and the two losses, read from left to right. Needs
matplotlib (pip install -e .[plots]). In Python, `draw_overview()` returns the figure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.overview")
    result.add_argument("out", type=Path, help="a file, OUT.png")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no matplotlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from PIL import Image

from hanorec.base.errors import InputError
from hanorec.datasets.posterland import GENRES, PER_CELL, STYLES, make_items
from hanorec.datasets.posters import draw_poster

SEED = 2025
WIDTH, HEIGHT = 16.0, 7.6  # of the picture, in its own units
NARROW, WIDE = 8.5, 11.0  # font sizes

# Films by genre and style: chosen, rejected, what the user has seen, and what stands around.
CHOSEN, REJECTED = ("space", "quiet"), ("space", "noir")
SEEN = [("space", "comic"), ("sport", "quiet"), ("space", "quiet")]
AROUND_CHOSEN = [("space", "quiet"), ("war", "quiet"), ("sport", "quiet")]
BETWEEN = [("space", "epic"), ("space", "dreamy")]
AROUND_REJECTED = [("space", "noir"), ("crime", "noir"), ("horror", "noir")]

Film = tuple[str, Image.Image]  # title, poster


class Films:
    """Posterland's films, each given out once, those with clear titles and posters first."""

    def __init__(self, seed: int) -> None:
        items, rng = make_items(seed), np.random.default_rng([seed, 2])
        self.films: dict[tuple[str, str], list[Film]] = {}
        for item in items:
            poster = draw_poster(item["genre"], item["style"], item["noise"], rng)
            cell = list(GENRES)[item["genre"]], list(STYLES)[item["style"]]
            clear = not item["ambiguous"] and item["noise"] < 1
            found = self.films.setdefault(cell, [])
            found.insert(0 if clear else PER_CELL, (item["title"], poster))

    def take(self, cell: tuple[str, str]) -> Film:
        return self.films[cell].pop(0)


def draw_overview(seed: int = SEED) -> Figure:
    """The picture; each step names the equations of docs/equations.md that it is."""
    films = Films(seed)
    chosen, rejected = films.take(CHOSEN), films.take(REJECTED)
    seen = [films.take(cell) for cell in SEEN]
    figure = Figure(figsize=(12.8, 12.8 * HEIGHT / WIDTH))
    axis = figure.add_axes((0, 0, 1, 1))
    _draw_items(axis, [chosen, rejected, *seen, films.take(("western", "comic"))])
    _draw_pair(axis, chosen, rejected, seen)
    _draw_clusters(axis, films, chosen, rejected)
    _draw_beta(axis)
    _draw_losses(axis)
    axis.set_xlim(0, WIDTH)
    axis.set_ylim(0, HEIGHT)
    axis.set_aspect("equal")
    axis.axis("off")
    return figure


def _draw_items(axis: Any, films: Sequence[Film]) -> None:
    _column(axis, 0.2, 2.9, "1  posters and titles")
    for number, film in enumerate(films):
        x, y = 0.95 + 1.4 * (number % 2), 5.7 - 1.45 * (number // 2)
        _poster(axis, film, x, y, 0.95, titled=True)
    _say(axis, 1.65, 1.35, r"title: $H_i$,   poster: $X_i$")
    _say(axis, 1.65, 0.85, r"$e_i = \mathrm{norm}(\mathrm{norm}\,H_i + \mathrm{norm}\,X_i)$")
    _say(axis, 1.65, 0.35, "HN-1, HN-2", NARROW, "0.35")


def _draw_pair(axis: Any, chosen: Film, rejected: Film, seen: Sequence[Film]) -> None:
    _column(axis, 3.55, 2.7, "2  pairs")
    _say(axis, 4.9, 6.25, r"$x$: what the user has seen")
    for number, film in enumerate(seen):
        _poster(axis, film, 4.1 + 0.8 * number, 5.6, 0.65)
    _say(axis, 4.9, 4.6, "and ten candidates;\nwhich one is next?")
    _poster(axis, chosen, 4.25, 3.25, 1.0, titled=True)
    _poster(axis, rejected, 5.55, 3.25, 1.0, titled=True)
    _say(axis, 4.25, 2.05, r"$y_w$" + "\nchosen")
    _say(axis, 5.55, 2.05, r"$y_l$" + "\nrejected")
    _say(axis, 4.9, 1.1, "what the user took next,\nand what not")


def _draw_clusters(axis: Any, films: Films, chosen: Film, rejected: Film) -> None:
    _column(axis, 6.7, 2.9, "3  clusters")
    for x, line in ((7.75, "-"), (8.55, "--")):
        axis.add_patch(Circle((x, 4.75), 1.0, fill=False, linestyle=line, linewidth=1.5))
    _poster(axis, chosen, 7.43, 4.75, 0.5)
    _poster(axis, rejected, 8.87, 4.75, 0.5)
    left = [(7.15, 5.24), (7.15, 4.26), (7.65, 5.42)]
    right = [(9.15, 5.24), (9.15, 4.26), (8.65, 5.42)]
    middle = [(8.15, 5.0), (8.15, 4.5)]
    cells = [*AROUND_CHOSEN, *AROUND_REJECTED, *BETWEEN]
    for cell, (x, y) in zip(cells, [*left, *right, *middle], strict=True):
        _poster(axis, films.take(cell), x, y, 0.33)
    _say(axis, 7.4, 6.15, r"$N_K(w)$")
    _say(axis, 8.9, 6.15, r"$N_K(l)$")
    _say(axis, 8.15, 3.25, r"$U = \{w, l\} \cup N_K(w) \cup N_K(l)$")
    _say(axis, 8.15, 2.7, r"$p_i = \mathrm{softmax}_{j \in U}\, \langle e_i, e_j\rangle$")
    _say(axis, 8.15, 2.1, r"$\Delta = \Vert p_w - p_l \Vert_2$", WIDE + 1)
    _say(axis, 8.15, 1.1, "much alike: a small Δ,\na hard pair")
    _say(axis, 8.15, 0.35, "HN-3, HN-4", NARROW, "0.35")


def _draw_beta(axis: Any) -> None:
    _column(axis, 10.05, 2.3, "4  one β' a pair")
    _say(axis, 11.2, 6.15, "how hard is the pair?")
    _say(axis, 11.2, 5.6, r"$\lambda = \sigma(\Delta)$", WIDE + 2)
    _say(axis, 11.2, 4.6, "how does the policy\nrespond in this step?")
    _say(axis, 11.2, 3.85, r"$R_i = \beta_0 h_i \;\rightarrow\; \eta$", WIDE + 2)
    _box(axis, 10.3, 1.85, 1.8, 0.9)
    _say(axis, 11.2, 2.3, r"$\beta' = \eta\,\lambda\,\beta_0$", WIDE + 3)
    _say(axis, 11.2, 1.1, "a hard pair:\na low β'")
    _say(axis, 11.2, 0.35, "HN-5 .. HN-8", NARROW, "0.35")


def _draw_losses(axis: Any) -> None:
    _column(axis, 12.8, 3.0, "5  two losses")
    _box(axis, 12.92, 4.85, 2.76, 1.6)
    _say(axis, 14.3, 6.15, r"first: answer with $y_w$")
    _say(axis, 14.3, 5.6, r"$L_{SFT} = -\sum_t \log \pi(y_t \mid x, y_{<t})$", WIDE - 0.5)
    _say(axis, 14.3, 5.1, r"the result is $\pi_{ref}$")
    _arrow(axis, 14.3, 4.85, 14.3, 4.25)
    _box(axis, 12.92, 0.65, 2.76, 3.6)
    _say(axis, 14.3, 3.95, r"then: prefer $y_w$ to $y_l$")
    _say(axis, 14.3, 3.4, r"$L_{HaNo} = -\log\,\sigma(\beta'\,\tilde h)$", WIDE + 1)
    _say(axis, 14.3, 2.75, r"$h = \log\frac{\pi_\theta(y_w)}{\pi_{ref}(y_w)}"
         r" - \log\frac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}$", WIDE + 1)
    _say(axis, 14.3, 2.1, r"$\tilde h$: under noise on LoRA,")
    noise = r"$A' = A + \sigma_n\epsilon_A,\; B' = B + \sigma_n\epsilon_B$"
    _say(axis, 14.3, 1.65, noise, WIDE - 1.5)
    _say(axis, 14.3, 1.0, r"plain DPO: $L_{DPO} = -\log\,\sigma(\beta_0 h)$", WIDE - 1.5)
    _say(axis, 14.3, 0.35, "SFT-1, DPO-1, DPO-2, HN-9 .. HN-11", NARROW - 0.5, "0.35")


def _column(axis: Any, x: float, width: float, title: str) -> None:
    """A step's pale ground with its title, and the arrow to the next step."""
    axis.add_patch(FancyBboxPatch(
        (x, 0.1), width, HEIGHT - 0.3, boxstyle="round,pad=0,rounding_size=0.12",
        facecolor="0.96", edgecolor="0.8"))
    axis.text(x + width / 2, HEIGHT - 0.55, title, ha="center", va="center", fontsize=13,
              fontweight="bold")
    if x + width < WIDTH - 1:
        _arrow(axis, x + width + 0.01, 2.3, x + width + 0.44, 2.3)


def _poster(
    axis: Any, film: Film, x: float, y: float, side: float, titled: bool = False,
) -> None:
    """A film's poster around (x, y), its title below."""
    title, image = film
    half = side / 2
    pixels = np.asarray(image.resize((96, 96), Image.Resampling.LANCZOS))
    axis.imshow(pixels, extent=(x - half, x + half, y - half, y + half), zorder=2)
    if titled:
        _say(axis, x, y - half - 0.17, title, NARROW)


def _box(axis: Any, x: float, y: float, width: float, height: float) -> None:
    axis.add_patch(FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.1", facecolor="white",
        edgecolor="black"))


def _arrow(axis: Any, x: float, y: float, to_x: float, to_y: float) -> None:
    axis.add_patch(FancyArrowPatch(
        (x, y), (to_x, to_y), arrowstyle="-|>", mutation_scale=18, linewidth=2, color="black",
        shrinkA=0, shrinkB=0))


def _say(
    axis: Any, x: float, y: float, text: str, size: float = WIDE - 1, color: str = "black",
) -> None:
    axis.text(x, y, text, ha="center", va="center", fontsize=size, color=color)


def main(argv: Sequence[str] | None = None) -> None:
    out = parser().parse_args(argv).out
    if out.suffix != ".png":
        raise InputError(f"{out}: expected a file that ends in .png")
    draw_overview().savefig(out, dpi=110)
    with Image.open(out) as image:
        small = image.convert("RGB").quantize(96, dither=Image.Dither.NONE)
    small.save(out, optimize=True)
    print(f"wrote {out}")
