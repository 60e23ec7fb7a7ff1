"""Stand-in covers, drawn from title and genres.

They do not replace real ones: dataset.json marks them "drawn".
"""

import colorsys
import hashlib
import unicodedata

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 112, 160, 8  # pixels

# the genres of MovieLens get evenly spaced hues; any other gets one from a hash of its name
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical",
    "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def draw_cover(title: str, genres: list[str]) -> Image.Image:
    """An RGB image, HEIGHT x WIDTH: ground by the first genre, pattern by both, then the title."""
    first = genres[0] if genres else "unknown"
    second = genres[1] if len(genres) > 1 else first
    image = Image.new("RGB", (WIDTH, HEIGHT), _colour(first, 0.45))
    draw = ImageDraw.Draw(image)
    _pattern(draw, _number(first) % 4, _colour(second, 0.70))

    # Pillow's font has ASCII only, so accents are dropped; other scripts show as boxes
    letters = unicodedata.normalize("NFKD", title)
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    font, lines = _fit(plain, WIDTH - 4 * MARGIN, HEIGHT // 2)
    text = "\n".join(lines)
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, align="center")
    x = (WIDTH - right - left) / 2
    y = (HEIGHT - bottom - top) / 2
    panel = (MARGIN, y + top - MARGIN, WIDTH - MARGIN, y + bottom + MARGIN)
    draw.rectangle(panel, fill="white")
    draw.multiline_text((x, y), text, font=font, fill="black", align="center")
    return image


def _number(genre: str) -> int:
    """A stable number for a genre (Python's own hash differs from run to run)."""
    if genre in GENRES:
        return GENRES.index(genre)
    return len(GENRES) + hashlib.sha256(genre.encode("utf-8")).digest()[0]


def _colour(genre: str, lightness: float) -> tuple[int, int, int]:
    hue = _number(genre) / len(GENRES) % 1
    return tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, lightness, 0.6))


def _pattern(draw: ImageDraw.ImageDraw, kind: int, colour: tuple[int, int, int]) -> None:
    """0 bars across, 1 bars down, 2 diagonals, 3 dots."""
    for step in range(0, WIDTH + HEIGHT, 16):
        if kind == 0:
            draw.rectangle((0, step, WIDTH, step + 5), fill=colour)
        elif kind == 1:
            draw.rectangle((step, 0, step + 5, HEIGHT), fill=colour)
        elif kind == 2:
            draw.line((step, 0, step - HEIGHT, HEIGHT), fill=colour, width=5)
        else:
            for x in range(8, WIDTH, 16):
                draw.ellipse((x - 4, step + 4, x + 4, step + 12), fill=colour)


def _fit(title: str, width: int, height: int) -> tuple[ImageFont.FreeTypeFont, list[str]]:
    """The largest font in which the wrapped title fits, and its lines.

    At the smallest, "..." stands for what does not fit.
    """
    for size in (16, 14, 12, 10, 8):
        font = ImageFont.load_default(size)
        lines = _wrap(title, font, width)
        room = int(height / (1.3 * size))
        if len(lines) <= room and all(font.getlength(line) <= width for line in lines):
            return font, lines
    if len(lines) > room:
        lines = [*lines[: room - 1], "..."]
    return font, lines


def _wrap(title: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is wider than that stands alone."""
    lines: list[str] = []
    for word in title.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
