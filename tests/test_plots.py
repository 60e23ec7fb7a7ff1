"""Figures that need no run: they are drawn from the files, in grey, and hold what the files say."""

import json

import numpy as np
import pytest
from PIL import Image

from hanorec.base.errors import InputError
from hanorec.studies import plots


def grey(path):
    """The figure's pixels; every one of them is grey, so nothing is told by colour."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert np.ptp(pixels.astype(int), axis=2).max() <= 8, path
    return pixels[..., 0]


def policy(value):
    return {"metrics": {"NDCG@3": {"value": value, "interval": [value - 0.1, value + 0.1]}}}


def test_an_evaluation_and_its_similarity_study(tmp_path):
    before = np.linspace(-0.2, 0.4, 10)
    report = {
        "sets": {
            kind: {
                "chance": {"metrics": {"NDCG@3": {"value": 0.21, "interval": None}}},
                "popularity": policy(0.3),
                "policies": {"base": policy(0.5), "runs/SFT": policy(0.6)},
            }
            for kind in ("random", "hard")
        },
        "similarity": {"runs/SFT": {"before": before.tolist(), "after": (before - 0.1).tolist()}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    assert [path.name for path in plots.plot_run(tmp_path)] == ["metrics.png", "similarity.png"]
    assert all((grey(tmp_path / name) < 100).any() for name in ("metrics.png", "similarity.png"))


def test_the_noise_curve(tmp_path):
    curve = {"name": "absolute", "sigma": [0.01, 0.1], "mean": [3.0, 15.0], "deviation": [0.1, 2.0]}
    (tmp_path / "noise.json").write_text(json.dumps({"clean": 2.9, "curves": [curve]}))
    assert [path.name for path in plots.plot_run(tmp_path)] == ["noise.png"]
    assert (grey(tmp_path / "noise.png") < 100).any()


def test_pairs_are_drawn_at_their_beta(tmp_path):
    """Two pairs, lambda 0.5 and 1, eta 1 and beta0 0.1: a dot at half the height of beta0's line,
    and one on it.
    """
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"beta0": 0.1}}))
    (tmp_path / "pairs.tsv").write_text(
        "user\tchosen\trejected\tcosine\tdelta\tlambda\nu\t1\t2\t0.9\t0.1\t0.5\n"
        "v\t1\t3\t-0.9\t0.2\t1\n"
    )
    assert [path.name for path in plots.plot_run(tmp_path)] == ["pairs.png"]
    first = grey(tmp_path / "pairs.png")
    (tmp_path / "pairs.tsv").write_text(
        "user\tchosen\trejected\tcosine\tdelta\tlambda\nu\t1\t2\t0.9\t0.1\t0.9\n"
        "v\t1\t3\t-0.9\t0.2\t1\n"
    )
    plots.plot_run(tmp_path)
    assert (grey(tmp_path / "pairs.png") != first).any()  # the figure follows the file


def test_a_folder_without_anything_to_draw_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plots", str(tmp_path)])
    with pytest.raises(InputError, match="neither log.jsonl nor"):
        plots.main()
