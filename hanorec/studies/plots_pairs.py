"""Figure of pairs.tsv, of `hanorec.studies.plots`: what HaRS makes of each pair of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from hanorec.base.files import read_object
from hanorec.datasets.catalog import Catalog, load_catalog


@dataclass(frozen=True)
class Pair:
    """A line of pairs.tsv. chosen, rejected: item ids."""

    chosen: str
    rejected: str
    cosine: float
    lam: float


def read_pairs(path: Path) -> list[Pair]:
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        _, chosen, rejected, cosine, _, lam = line.split("\t")
        pairs.append(Pair(chosen, rejected, float(cosine), float(lam)))
    return pairs


def generated_catalog(data: str) -> Catalog | None:
    """The catalogue of a run, if its posters are drawn by us: others' are not ours to show."""
    facts = Path(data) / "dataset.json"
    if not facts.exists() or read_object(facts).get("source") != "generated":
        return None
    return load_catalog(Path(data))


def draw_pairs(
    pairs: Sequence[Pair], name: str, beta0: float, eta: Sequence[float], catalog: Catalog | None,
) -> Figure:
    """beta' of every pair, at the mean eta of the run, against the cosine of its two items.

    What the method wants is seen at a glance: alike = hard = low beta'. With a catalogue, the
    posters of the pairs of the smallest and the largest lambda stand beside it.
    """
    figure = Figure(figsize=(7.6 if catalog else 4.6, 3.6), layout="constrained")
    figure.suptitle(name)
    if catalog is None:
        axis = figure.subplots()
    else:
        axes = figure.subplot_mosaic(
            [["plot", "hardest w", "hardest l"], ["plot", "easiest w", "easiest l"]],
            width_ratios=[3.2, 1, 1])
        axis = axes["plot"]
        _draw_posters(axes, "hardest", min(pairs, key=lambda pair: pair.lam), catalog)
        _draw_posters(axes, "easiest", max(pairs, key=lambda pair: pair.lam), catalog)

    cosine = [pair.cosine for pair in pairs]
    beta = np.mean(eta) * np.array([pair.lam for pair in pairs]) * beta0
    axis.plot(cosine, beta, ".", color="0.3", markersize=3, label=f"one of {len(pairs)} pairs")
    axis.axhline(beta0, linestyle="--", color="black", label="β0, plain DPO")
    axis.set_xlabel("cosine of chosen and rejected item")
    axis.set_ylabel("β' = η λ β0")
    axis.set_ylim(0, None)
    axis.set_title(f"mean η {np.mean(eta):.2f}, {min(eta):.2f} to {max(eta):.2f}", fontsize=9)
    axis.legend(fontsize=8)
    return figure


def _draw_posters(axes: Mapping[str, Any], kind: str, pair: Pair, catalog: Catalog) -> None:
    """The two items of a pair, chosen and rejected."""
    for side, item in (("w", pair.chosen), ("l", pair.rejected)):
        first, *more = item.split()  # of an answer of several items the first one is shown
        axis, row = axes[f"{kind} {side}"], catalog.row[first]
        path = catalog.images[row]
        if path is not None:
            with Image.open(path) as image:
                axis.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(catalog.titles[row] + ", ..." * bool(more), fontsize=7)
        axis.set_title("chosen" if side == "w" else "rejected", fontsize=8)
    axes[f"{kind} w"].set_ylabel(f"{kind}\nλ = {pair.lam:.3f}", fontsize=8)
