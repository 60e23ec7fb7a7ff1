"""Figures that need no run: they are drawn from the files, in grey, and hold what the files say."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from docstring_names import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from hanorec.base.errors import InputError
from hanorec.datasets.posterland import make_posterland
from hanorec.metrics import paired_test
from hanorec.studies import (
    ablation,
    figures,
    overview,
    plots,
    plots_audit,
    plots_results,
    stages,
)


def grey(path):
    """The figure's pixels; every one of them is grey, so nothing is told by colour."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert np.ptp(pixels.astype(int), axis=2).max() <= 8, path
    return pixels[..., 0]


# ---- results ----

USERS = [{"user": name, "target": "1", "candidates": ["1", "2"]} for name in "abcd"]
NDCG = {"base": [0.5, 0, 1, 0.5], "runs/DPO": [0.5, 1, 1, 0.5], "runs/wo HaRS": [1, 1, 1, 0.5]}


def policy(values):
    value = float(np.mean(values))
    return {"metrics": {"NDCG@3": {"value": value}}, "rows": {"NDCG@3": values}}


def evaluation(policies):
    return {
        "users": USERS,
        "chance": {"metrics": {"NDCG@3": {"value": 0.21}}},
        "popularity": policy([0, 0, 0.5, 0.5]),
        "policies": {path: policy(values) for path, values in policies.items()},
    }


def labels(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def dots(axis):
    """Row -> where its dot stands."""
    rows = dict(zip(axis.get_yticks(), labels(axis), strict=True))
    points = [line for line in axis.lines if line.get_marker() == "o"]
    return {rows[line.get_ydata()[0]]: line.get_xdata()[0] for line in points}


def texts(figure):
    found = [figure.get_suptitle()]
    for axis in figure.axes:
        found += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
        found += [text.get_text() for text in axis.texts]
    return "\n".join(found)


def test_an_evaluation_and_its_similarity_study(tmp_path):
    before = np.linspace(-0.2, 0.4, 10)
    report = {
        "sets": {kind: evaluation(NDCG) for kind in ("random", "hard")},
        "similarity": {"runs/SFT": {"before": before.tolist(), "after": (before - 0.1).tolist()}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    assert [path.name for path in plots.plot_run(tmp_path)] == ["metrics.png", "similarity.png"]
    assert all((grey(tmp_path / name) < 100).any() for name in ("metrics.png", "similarity.png"))

    drawn = plots.figures(tmp_path / "metrics.json")["metrics.png"]
    axis, _ = drawn.axes
    assert labels(axis) == ["base", "DPO", "w/o HaRS"]  # as tables spell and order them
    test = paired_test(NDCG["runs/wo HaRS"], NDCG["runs/DPO"])
    assert dots(axis) == {"base": -25, "DPO": 0, "w/o HaRS": 100 * test["difference"]}
    (bar,) = [line for line in axis.lines if line.get_linewidth() == 5 and line.get_ydata()[0] == 0]
    assert list(bar.get_xdata()) == [100 * test["low"], 100 * test["high"]]
    said = texts(drawn)
    assert figures.run_name(tmp_path) in said and "chance 21.0, popularity 25.0" in said
    assert "4 users, 1 seed\n" in said and "75.0" in said  # DPO's own


def test_what_a_policy_is_held_to():
    """DPO, else SFT, the base, or popularity: never itself alone."""
    of = {"x/SFT": [1, 0, 0, 0], "base": [0, 0, 0, 0], "mine": [0, 1, 0, 0], "x/DPO": [1, 1, 1, 1]}
    for wanted, paths in {
        "DPO": list(of), "SFT": ["x/SFT", "mine"], "base": ["base", "mine"], "popularity": ["mine"],
    }.items():
        sets = {"random": evaluation({path: of[path] for path in paths})}
        control, compared = plots_results.compare_evaluation(sets)
        assert control == wanted
        rows = compared["random"]["rows"]
        assert "against_control" not in rows[control] and "against_control" in rows["mine"]


def test_two_runs_of_one_name_stay_two():
    assert figures.row_names(["a/SFT", "b/SFT", "b/w-o-SAM"]) == {
        "a/SFT": "a/SFT", "b/SFT": "b/SFT", "b/w-o-SAM": "w/o SAM"
    }


def test_the_demo_over_seeds(tmp_path):
    """Intervals over users and over seeds; what lies far off is named, not drawn."""
    seed = {"rows": {"chance": policy([0.21])["metrics"]}, "NDCG": {}, "users": USERS}
    for name, values in {"SFT": [0, 0, 0, 1], "DPO": [1, 0, 0, 1], "oracle": [1, 1, 1, 1]}.items():
        seed["rows"][name], seed["NDCG"][name] = policy(values)["metrics"], values
    (tmp_path / "results.json").write_text(json.dumps({"seeds": [{"random": seed}] * 2}))
    drawn = plots.figures(tmp_path / "results.json")["metrics.png"]
    assert dots(drawn.axes[0]) == {"SFT": -25, "DPO": 0}
    assert {line.get_linewidth() for line in drawn.axes[0].lines} >= {5, 1}
    assert "oracle 100.0" in texts(drawn) and "thin: over seeds" in texts(drawn)


def test_one_order_and_one_spelling_of_rows():
    known = {*stages.ROWS, *ablation.ROWS, "base", "SFT"}
    assert known == set(figures.ORDER)
    assert [row for row in figures.ORDER if row in stages.ROWS] == stages.ROWS
    assert figures.in_order(["mine", "DPO", "base"]) == ["base", "DPO", "mine"]
    for row in figures.ORDER:
        assert figures.row_name(figures.folder_name(row)) == row
        assert figures.row_name(Path(stages.folder(Path("x"), row)).name) == row


def test_the_ablation_of_the_page(tmp_path):
    """Its figures show its tables: every row, in the one order, each mean within its intervals."""
    tables = plots_audit.read_tables((ROOT / "docs" / "audit.md").read_text(encoding="utf-8"))
    assert list(tables) == ["Posterland", "MovieLens-100K"]
    rows = {"chance", "popularity", "base", "SFT", *ablation.ROWS}
    for sets in tables.values():
        assert list(sets) == ["random", "hard"]
        for one in sets.values():
            assert one["rows"].keys() == rows and one["seeds"] == 5
            for name in rows - {"chance", "popularity", "DPO"}:
                test = one["rows"][name]["against_control"]
                for low, high in ([test["low"], test["high"]], test["over_seeds"]):
                    assert low < test["difference"] < high < 0.1
    one = tables["Posterland"]["hard"]
    assert one["users"] == 1500
    assert one["rows"]["base"]["values"]["NDCG@3"] == pytest.approx([0.567])
    drawn = plots_results.draw_differences("Posterland", "DPO", tables["Posterland"])
    assert dots(drawn.axes[0])["base"] == pytest.approx(-6.94)
    plots_audit.main([str(ROOT / "docs" / "audit.md"), str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(InputError, match="no tables of the ablation"):
        plots_audit.main([str(ROOT / "docs" / "map.md"), str(tmp_path)])


def test_the_noise_of_the_page():
    noise = plots_audit.read_noise((ROOT / "docs" / "audit.md").read_text(encoding="utf-8"))
    assert noise["clean"] == 2.897 and len(noise["curves"]) == 6
    last = noise["curves"][-1]
    assert last["name"] == "q, v, α/r = 4" and last["sigma"] == [0.01, 0.02, 0.05, 0.1]
    assert (last["mean"][-1], last["deviation"][-1]) == (10.896, 0.943)


def test_every_figure_of_a_page_is_there_and_no_other():
    named = set()
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = page.read_text(encoding="utf-8")
        named |= set(re.findall(r"\((?:docs/)?figures/([\w.-]+)\)", text))
    assert named == {path.name for path in ROOT.glob("docs/figures/*")}


def test_the_noise_curve(tmp_path):
    curve = {"name": "absolute", "sigma": [0.01, 0.1], "mean": [3.0, 15.0], "deviation": [0.1, 2.0]}
    (tmp_path / "noise.json").write_text(json.dumps({"clean": 2.9, "curves": [curve]}))
    assert [path.name for path in plots.plot_run(tmp_path)] == ["noise.png"]
    assert (grey(tmp_path / "noise.png") < 100).any()


# ---- training ----


def record(step, **changed):
    one = {
        "step": step, "loss": 0.7 - step / 100, "chosen_reward": step, "rejected_reward": 0,
        "margin": step, "accuracy": 0.5 + step / 100, "lambda": 1, "lambda_min": 1,
        "lambda_max": 1, "eta": 1, "beta": 0.1, "beta_min": 0.1, "beta_max": 0.1, "kl": None,
        "gradient_norm": 1 + step,
    }
    return one | changed


def curves(folder, records, **facts):
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    settings = {"normalised": False, "beta0": 0.1}
    (folder / "run.json").write_text(json.dumps({"settings": settings, **facts}))
    return plots.figures(folder / "log.jsonl")["curves.png"]


def test_what_is_constant_is_left_out_and_what_is_noisy_says_so(tmp_path):
    dpo = curves(tmp_path, [record(0), record(1)], sigma_n=0)
    named = [axis.get_ylabel() for axis in dpo.axes]
    assert len(named) == 4 and not any("λ" in name or "β" in name or "KL" in name for name in named)
    assert "noisy" not in texts(dpo) and figures.run_name(tmp_path) in texts(dpo)

    moved = {"lambda_max": 1.1, "eta": 1.01, "beta_min": 0.09, "kl": 0.1}
    noisy = curves(tmp_path, [record(0), record(1, **moved), record(2)], sigma_n=0.05)
    named = [axis.get_ylabel() for axis in noisy.axes]
    assert len(named) == 7  # a kl that is not in every step is none
    assert sum("noisy policy" in name for name in named) == 3
    assert "σ_n = 0.05" in noisy.get_suptitle()
    columns = {axis.get_subplotspec().colspan.start for axis in noisy.axes}
    assert columns == {0, 1, 2, 3}  # two rows


def test_the_curves_have_what_to_hold_them_to(tmp_path):
    """ln 2, the loss of h = 0, and 1/2; none under the normalised loss, which is another."""
    drawn = curves(tmp_path, [record(0), record(1)])
    heights = [line.get_ydata()[0] for axis in drawn.axes for line in axis.lines]
    assert math.log(2) in heights and 0.5 in heights
    facts = {"settings": {"normalised": True, "beta0": 0.1}}
    drawn = curves(tmp_path, [record(0), record(1)], **facts)
    assert math.log(2) not in [line.get_ydata()[0] for axis in drawn.axes for line in axis.lines]


def test_the_branches_of_brmrs(tmp_path):
    """Four panels in two rows; of one modality alone, whose recall stays where it is, one."""
    both = {"Recall@20_t": 0.1, "win": 0.5, "gap_f": 1, "gap_t": 2, "unique_t": 0.2}
    for known, count in (({}, 1), (both, 4)):
        lines = []
        for epoch in range(2):
            one = {"epoch": epoch, "valid_Recall@20": 0.3}
            one |= {f"valid_{name}": value + epoch / 10 for name, value in known.items()}
            lines.append(json.dumps(one))
        (tmp_path / "log.jsonl").write_text("\n".join(lines))
        drawn = plots.figures(tmp_path / "log.jsonl")["curves.png"]
        assert len(drawn.axes) == count
    assert len(drawn.axes[0].get_legend().get_texts()) == 2
    assert {axis.get_subplotspec().rowspan.start for axis in drawn.axes} == {0, 1}


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
    assert (grey(tmp_path / "pairs.png") < 100).any()
    (axis,) = plots.figures(tmp_path / "pairs.tsv")["pairs.png"].axes
    points, line = axis.lines
    assert list(points.get_ydata()) == [0.05, 0.1] and line.get_ydata()[0] == 0.1


def test_the_posters_of_a_generated_catalogue_stand_beside_its_pairs(tmp_path):
    """And no others: they are not ours to show."""
    make_posterland(tmp_path / "data", users=3)
    settings = {"beta0": 0.1, "data": str(tmp_path / "data")}
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "pairs.tsv").write_text(
        "user\tchosen\trejected\tcosine\tdelta\tlambda\nu\t1\t2\t0.9\t0.1\t0.51\n"
        "v\t3\t4\t-0.9\t0.2\t0.55\n"
    )
    drawn = plots.figures(tmp_path / "pairs.tsv")["pairs.png"]
    shown = [image.get_array() for axis in drawn.axes for image in axis.images]
    assert len(shown) == 4
    with Image.open(tmp_path / "data" / "images" / "1.png") as image:
        assert (np.asarray(image.convert("L")) == shown[0]).all()
    assert "hardest\nλ = 0.510" in texts(drawn) and "easiest\nλ = 0.550" in texts(drawn)

    facts = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(facts | {"source": "MovieLens"}))
    assert len(plots.figures(tmp_path / "pairs.tsv")["pairs.png"].axes) == 1


def test_a_folder_without_anything_to_draw_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plots", str(tmp_path)])
    with pytest.raises(InputError, match="neither log.jsonl nor"):
        plots.main()
    with pytest.raises(InputError, match="no figure of such a file"):
        plots.figures(tmp_path / "table.md")


def test_no_backend_is_forced():
    for path in (ROOT / "hanorec" / "studies").glob("*.py"):
        assert not re.search(r"pyplot|matplotlib\.use", path.read_text().partition('"""\n\n')[2])


# ---- the picture of the whole ----


def boxes_of(figure):
    """Text -> where it stands, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts]


def faults_of(figure):
    """Texts that overlap another one or a column's border."""
    found, boxes = [], boxes_of(figure)
    (axis,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    columns = [patch.get_window_extent(renderer) for patch in axis.patches]
    columns = [column for column in columns if column.height > 0.9 * figure.bbox.height]
    assert len(columns) == 5
    for number, (text, box) in enumerate(boxes):
        if not any(c.x0 < box.x0 and box.x1 < c.x1 for c in columns):
            found.append(text)
        found += [text for _, other in boxes[:number] if box.overlaps(other)]
    return found


def test_no_text_of_the_overview_touches_another_or_leaves_its_column():
    figure = overview.draw_overview()
    assert faults_of(figure) == []
    figure.axes[0].text(1.65, 5.0, "in the way of a title")
    assert len(faults_of(figure)) > 0


def test_the_overview_is_a_command_and_small(tmp_path, monkeypatch):
    overview.main([str(tmp_path / "overview.png")])
    stored = ROOT / "docs" / "figures" / "overview.png"
    assert (tmp_path / "overview.png").stat().st_size < 200_000 > stored.stat().st_size
    with Image.open(tmp_path / "overview.png") as new, Image.open(stored) as old:
        assert new.size == old.size
    with pytest.raises(InputError, match=r"overview: expected a file that ends in \.png"):
        overview.main([str(tmp_path / "overview")])
