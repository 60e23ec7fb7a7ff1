"""hanorec in a notebook: what `import hanorec` gives, quietly, and objects that fit a line."""

import subprocess
import sys

import pytest
import toy
from docstring_names import ROOT

import hanorec
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import HeldOut, load_interactions
from hanorec.mllm.collate import collate
from hanorec.mllm.tasks import sft_rows
from hanorec.recommend import Recommender

IMPORT = """
import sys
import hanorec
assert not {"torch", "numpy", "transformers"} & sys.modules.keys()
assert "dpo_loss" in dir(hanorec)
from hanorec import auc
assert "numpy" in sys.modules and "torch" not in sys.modules
"""


def test_the_import_is_quick_and_quiet():
    words = [sys.executable, "-W", "error", "-c", IMPORT]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize("name", hanorec.__all__)
def test_every_public_name_is_there(name):
    assert getattr(hanorec, name) is not None


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'nearest'"):
        _ = hanorec.nearest
    from hanorec import hars  # modules are found as ever

    assert hanorec.fuse is hars.fuse


def test_large_objects_fit_a_line(data, checkpoints, tmp_path):
    backbone, builder, examples = toy.source_of(data, checkpoints)
    rows = sft_rows(builder, examples, 1)
    catalog = load_catalog(data)
    users = load_interactions(data, catalog)
    listed = tmp_path / "items.txt"
    listed.write_text("\n".join(catalog.ids[:20]))
    found = {
        "Backbone": backbone,
        "PromptBuilder": builder,
        "Example": examples[0],
        "ImageFeatures": next(iter(builder.pictures.values())),
        "Row": rows[0],
        "Batch": collate(backbone, rows[:2], builder.pictures),
        "Catalog": catalog,
        "Interactions": users,
        "HeldOut": HeldOut(catalog, users, examples, set(users.train)),
        "Recommender": Recommender(backbone.path, str(data), candidates=str(listed)),
    }
    for name, one in found.items():
        assert repr(one).startswith(f"<{name}") and len(repr(one)) <= 100, repr(one)
    assert repr(catalog) == "<Catalog Posterland: 294 items, 294 with an image>"
    assert "24 in train" in repr(users) and "qwen2_5_vl" in repr(backbone)
