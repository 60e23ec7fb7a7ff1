"""The demo on a few users, its base checkpoint, Posterland's truth, and the plots."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hanorec import demo
from hanorec.base.errors import InputError
from hanorec.datasets import posterland
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import load_interactions
from hanorec.mllm.load import load_backbone
from hanorec.studies import lessons, plots, scripts, stages


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """The demo's own main, with 60 users instead of 2,700."""
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "USERS", 60)
        patch.setattr(
            stages, "SFT",
            [*stages.COMMON, "--learning-rate", "4e-3", "--users-to", "0.3"],
        )
        patch.setattr(
            stages, "DPO",
            [*stages.COMMON, "--learning-rate", "5e-4", "--users-from", "0.3", "--users-to", "0.5",
             "--targets-per-user", "1"],
        )
        patch.setattr(stages, "TEST", ["--users-from", "0.5", "--users-to", "0.9", "--batch", "8"])
        demo.main(["--out", str(out)])
    return out


def test_the_demo_reports_every_row_on_both_sets(small_demo):
    found = json.loads((small_demo / "results.json").read_text())["seeds"][0]
    assert set(found) == {"random", "hard"}
    for kind in found.values():
        assert set(kind["rows"]) == set(stages.ROWS)
        assert kind["rows"]["chance"]["NDCG@3"]["value"] == pytest.approx(
            (1 + 1 / np.log2(3) + 0.5) / 10
        )
        assert kind["rows"]["oracle"]["NDCG@3"]["value"] > 0.6  # it knows the truth; chance is 0.21
        assert len(kind["NDCG"]["SFT"]) == len(kind["users"]) == 24
    text = (small_demo / "table.md").read_text()
    assert all(f"\n{name} | " in text for name in stages.ROWS)


def test_the_demo_draws_plots(small_demo):
    for path in [small_demo / "metrics.png", small_demo / "seed-2025" / "HaNoRec" / "curves.png"]:
        with Image.open(path) as image:
            assert min(image.size) > 200 and len(np.unique(np.asarray(image.convert("L")))) > 10


class Started(Exception):
    """The demo has come to its first stage."""


@pytest.mark.parametrize(("gpu", "flags", "device", "says"), [
    (True, [], "cpu", True),
    (True, ["--device", "cuda"], "cuda", False),
    (False, [], "cpu", False),
])
def test_the_demo_takes_the_cpu_and_says_so(
    tmp_path, monkeypatch, capsys, gpu, flags, device, says
):
    """Where there is a GPU; --device overrides, and is handed to each stage."""
    def script(name):
        def main(argv):
            raise Started(argv[argv.index("--device") + 1])
        return type("Script", (), {"main": staticmethod(main)})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(stages, "USERS", 10)
    monkeypatch.setattr(stages, "script", script)
    with pytest.raises(Started, match=f"^{device}$"):
        demo.main(["--out", str(tmp_path / "out"), *flags])
    assert ("the demo runs on the CPU" in capsys.readouterr().out) == says


def test_every_stage_of_the_demo_is_on_its_device(small_demo):
    for folder in ("SFT", "DPO", "HaNoRec", "test"):
        settings = json.loads((small_demo / "seed-2025" / folder / "run.json").read_text())
        assert settings["settings"]["device"] == "cpu"


def test_users_of_sft_and_dpo_are_different(small_demo):
    seed = small_demo / "seed-2025"
    spans = {
        name: json.loads((seed / name / "run.json").read_text())["settings"]
        for name in ("SFT", "DPO", "HaNoRec", "SFT continued")
    }
    for name in ("DPO", "HaNoRec", "SFT continued"):
        assert spans[name]["users_from"] == spans["SFT"]["users_to"]
    test = json.loads((seed / "test" / "run.json").read_text())["settings"]
    assert test["users_from"] == spans["DPO"]["users_to"]
    assert len({spans[name]["users_to"] for name in ("DPO", "HaNoRec", "SFT continued")}) == 1


def test_scripts_are_found_in_a_clone_and_in_an_installed_package(tmp_path, monkeypatch):
    """Beside the package only where a setup.py says that it is a clone: in site-packages a file of
    that name is another package's.
    """
    package = tmp_path / "hanorec"
    (package / "scripts").mkdir(parents=True)
    monkeypatch.setattr(scripts, "PACKAGE", package)
    (tmp_path / "evaluate.py").write_text("HERE = 'beside'")
    with pytest.raises(InputError) as caught:
        scripts.script("evaluate")
    assert f"neither in {tmp_path}, " in str(caught.value)
    assert f"nor in {package / 'scripts'}, " in str(caught.value)

    (package / "scripts" / "evaluate.py").write_text("HERE = 'inside'")
    assert scripts.script("evaluate").HERE == "inside"
    (tmp_path / "setup.py").touch()
    before = set(sys.modules)
    assert scripts.script("evaluate").HERE == "beside"
    assert set(sys.modules) == before


def test_a_folder_without_runs_has_no_plots(tmp_path):
    assert plots.plot_run(tmp_path) == []


def test_the_base_checkpoint_is_small_and_reads_posters():
    """On a catalogue that it has never seen, where most titles are ambiguous: chance is one of ten.
    """
    assert sum(path.stat().st_size for path in stages.BASE.iterdir()) <= 4 * 2**20
    backbone = load_backbone(str(stages.BASE), "float32", "cpu")
    pool, right = lessons.Pool(backbone, 77, 0.85), {}
    for task in (lessons.find_row, lessons.like_row):
        # negative control: with other films' posters it must do worse
        for posters in ("own", "others"):
            if posters == "others":
                draw = torch.Generator().manual_seed(0)
                pool.pixels = pool.pixels[torch.randperm(len(pool.pixels), generator=draw)]
            rng = np.random.default_rng(0)
            with torch.no_grad():
                _, right[task, posters] = lessons.loss_and_accuracy(
                    backbone, pool, [task(backbone, pool, 10, rng) for _ in range(32)]
                )
        pool = lessons.Pool(backbone, 77, 0.85)
        # five standard errors
        assert right[task, "own"] > 0.6 and right[task, "others"] < right[task, "own"] - 0.1


def test_posterland_keeps_its_promises(tmp_path):
    posterland.make_posterland(tmp_path / "a", users=200, seed=4)
    posterland.make_posterland(tmp_path / "b", users=200, seed=4)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            other = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == other.read_bytes()
    catalog = load_catalog(tmp_path / "a")
    truth = json.loads((tmp_path / "a" / "truth.json").read_text())
    assert len(catalog.ids) == 294 == len(set(catalog.titles)) and catalog.covers == "drawn"
    assert 0.2 < np.mean([item["ambiguous"] for item in truth["items"]]) < 0.4
    # title or poster always tells
    assert not any(item["ambiguous"] and item["noise"] == 1 for item in truth["items"])
    data = load_interactions(tmp_path / "a", catalog)
    kinds = []
    for user, (genre, style) in truth["tastes"].items():
        rows = [*data.train[user], *data.val[user], *data.test[user]]
        assert len(rows) == len(set(rows)) == 7
        first = truth["items"][rows[0]]
        kinds.append((first["genre"] == genre, first["style"] == style))
    assert all(g or s for g, s in kinds)
    assert abs(np.mean([g and s for g, s in kinds]) - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 200)
    p = posterland.next_probabilities(truth["items"], 2, 3, {0})
    assert p.sum() == pytest.approx(1) and p[0] == 0
