"""The posters of Posterland: colour by genre, pattern by style, and noise."""

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128  # pixels of a poster
COLOURS = [  # RGB of each genre
    (40, 60, 200),
    (120, 30, 140),
    (240, 130, 170),
    (225, 150, 40),
    (30, 110, 50),
    (60, 200, 210),
    (110, 110, 110),
]
LIGHT = (250, 245, 230)  # of the patterns


def draw_poster(genre: int, style: int, noise: float, rng: np.random.Generator) -> Image.Image:
    """A poster: colour by genre, pattern by style, and noise in 0 .. 1.

    At noise 1 nothing is left of either.
    """
    image = Image.new("RGB", (SIDE, SIDE), COLOURS[genre])
    _pattern(ImageDraw.Draw(image), style)
    pixels = np.asarray(image, np.float64)
    grain = rng.uniform(0, 255, pixels.shape)
    return Image.fromarray((pixels * (1 - noise) + grain * noise).astype(np.uint8))


def _pattern(draw: ImageDraw.ImageDraw, style: int) -> None:
    """0 lying, 1 standing, 2 falling, 3 rising stripes, 4 dots, 5 rings, 6 quarters."""
    half, step = SIDE // 2, SIDE // 4
    if style == 5:
        for radius in (20, 44):
            box = [half - radius, half - radius, half + radius, half + radius]
            draw.ellipse(box, outline=LIGHT, width=10)
    elif style == 6:
        draw.rectangle([half, 0, SIDE, half], fill=LIGHT)
        draw.rectangle([0, half, half, SIDE], fill=LIGHT)
    else:
        for a in range(-SIDE, SIDE, step):
            _stripe(draw, style, a, step)


def _stripe(draw: ImageDraw.ImageDraw, style: int, a: int, step: int) -> None:
    """The part of patterns 0 .. 4 that begins at `a`."""
    if style == 0:
        draw.rectangle([0, a, SIDE, a + step // 3], fill=LIGHT)
    elif style == 1:
        draw.rectangle([a, 0, a + step // 3, SIDE], fill=LIGHT)
    elif style == 2:
        draw.line([a, 0, a + SIDE, SIDE], fill=LIGHT, width=step // 3)
    elif style == 3:
        draw.line([a + SIDE, 0, a, SIDE], fill=LIGHT, width=step // 3)
    elif style == 4:
        for b in range(0, SIDE, step):
            draw.ellipse([a + 6, b + 6, a + step - 6, b + step - 6], fill=LIGHT)
