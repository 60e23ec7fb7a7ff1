"""What the figures of `hanorec.studies.plots` share: panels, bars, and saving in grey."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

# Lines are told apart by these, never by colour.
STYLES = ["-", "--", ":", "-."]
MARKERS = ["o", "s", "^", "D", "v", "x"]


def save(figure: Figure, path: Path) -> list[Path]:
    """Write the figure in 32 shades of grey, so a third of the bytes; returns what was written."""
    figure.savefig(path, dpi=100)
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("L").quantize(32)
    small.save(path, optimize=True)
    return [path]


def panels(
    count: int, width: float = 3.2, height: float = 2.8, **options: Any,
) -> tuple[Figure, Sequence[Any]]:
    """A figure of `count` axes side by side, each of this width and height in inches."""
    figure, axes = plt.subplots(
        1, count, figsize=(width * count, height), constrained_layout=True, squeeze=False,
        **options)
    return figure, axes[0]


def bars(
    axis: Any, names: Sequence[str], mean: np.ndarray, error: np.ndarray, known: Sequence[str],
) -> None:
    """Lying bars, the first on top.

    Args:
        mean: (n,).
        error: (2, n), how far each interval reaches down and up.
        known: rows that no policy made, drawn pale.
    """
    y = np.arange(len(names))[::-1]
    shades = ["0.9" if name in known else "0.6" for name in names]
    axis.barh(y, mean, color=shades, edgecolor="black")
    axis.errorbar(mean, y, xerr=error, fmt="none", color="black", capsize=3)
    axis.set_yticks(y, names)


def reach(mean: np.ndarray, found: Sequence[dict[str, Any]]) -> np.ndarray:
    """How far the intervals of these metrics reach from their means (n,): (2, n), 0 without one."""
    ends = [one["interval"] or [one["value"]] * 2 for one in found]
    return np.abs(np.array(ends).T - mean)
