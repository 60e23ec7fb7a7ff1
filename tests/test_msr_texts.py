"""MLLM-MSR, generated: what the base is asked, in which order, and what is kept of its answers."""

from dataclasses import replace

import pytest
import toy

from hanorec.base.config import DataConfig
from hanorec.base.errors import InputError
from hanorec.baselines import msr_texts
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.interactions import Example
from hanorec.lora.layer import lora_layers
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.items import encode_pictures
from hanorec.mllm.load import load_backbone
from hanorec.studies.stages import BASE

HISTORY = (3, 1, 4, 0, 5)


@pytest.fixture
def builder(qwen, data):
    """Posterland's first items as the tiny Qwen2.5-VL sees them; item 1 has no image."""
    catalog = load_catalog(data)
    images = [*catalog.images]
    images[1] = None
    catalog = replace(catalog, images=tuple(images))
    return PromptBuilder(qwen, catalog, encode_pictures(qwen, catalog, range(9)), DataConfig(""))


@pytest.fixture
def asked(monkeypatch):
    """The prompts that the base was asked, as (name, images, text); its answers tell their number.
    """
    found = []

    def answer(backbone, rows, pictures, limit, batch=4):
        assert not lora_layers(backbone.model)  # the bare base
        texts = []
        for row in rows:
            name = row.name.removeprefix("of items ")
            found.append((name, row.images, backbone.tokenizer.decode(row.prompt)))
            texts.append(f"answer {len(found)} of {limit}.")
        return texts

    monkeypatch.setattr(msr_texts, "generate", answer)
    return found


def example(history=HISTORY, target=7, user="u"):
    return Example(user, history, target, (8,), (target, 6))


@pytest.mark.equation("MR-2")
def test_what_the_base_is_asked(builder, asked, tmp_path):
    """Each image of the history once; then two updates: three items without a summary before them,
    two with the first summary. The target is shown to nobody.
    """
    toy.busy_lora(builder.backbone.model)
    found = msr_texts.generated(builder, [example(), example(target=6)], tmp_path)
    ids, titles = builder.catalog.ids, builder.catalog.titles
    assert [images for _, images, _ in asked] == [[0], [3], [4], [5], [], []]
    told = {}
    for number, (name, images, text) in enumerate(asked[:4], 1):
        assert name == ids[images[0]] and msr_texts.DESCRIBE in text
        assert not any(title in text for title in titles)
        told[images[0]] = f": answer {number} of 64."
    for k, block in enumerate([HISTORY[:3], HISTORY[3:]]):
        name, _, text = asked[4 + k]
        assert name == " ".join(ids[row] for row in HISTORY[: 3 + 3 * k])
        lines = [f"{n}. {titles[row]}{told.get(row, '')}\n" for n, row in enumerate(block, 1)]
        assert msr_texts.THEN + "".join(lines) + msr_texts.SUMMARISE in text
        assert ("What a user likes: answer 5 of 128.\n" in text) == (k == 1)
        assert text.count("What a user likes") == k and titles[7] not in text
    assert found == {("u", HISTORY): "answer 6 of 128."}


def test_histories_that_begin_alike_share_their_updates(builder, asked, tmp_path):
    """And what comes later makes no difference: the summary of three items is the same text."""
    one, two = HISTORY[:3], (*HISTORY[:3], 8)
    found = msr_texts.generated(builder, [example(one), example(two), example(one, 2)], tmp_path)
    updates = [name for name, _, _ in asked if " " in name]
    assert [len(name.split()) for name in updates] == [3, 4]
    assert found["u", one] in asked[-1][2]


def test_texts_are_kept(builder, asked, tmp_path):
    """The same again asks nothing; another split asks for what is new alone."""
    first = msr_texts.generated(builder, [example()], tmp_path)
    asked.clear()
    assert msr_texts.generated(builder, [example()], tmp_path) == first and asked == []
    msr_texts.generated(builder, [example((*HISTORY, 8))], tmp_path)
    assert [images for _, images, _ in asked] == [[8], []]


def test_texts_of_another_base_or_setting_are_refused(builder, asked, make, tmp_path, monkeypatch):
    """By name, and they stay as they were."""
    msr_texts.generated(builder, [example()], tmp_path)
    kept = (tmp_path / "summaries.json").read_bytes()
    asked.clear()
    other = load_backbone(str(make("qwen2_5_vl", seed=3)), "float32", "cpu")
    with pytest.raises(InputError, match=r"descriptions.json: .*base"):
        msr_texts.generated(replace(builder, backbone=other), [example()], tmp_path)
    monkeypatch.setattr(msr_texts, "SUMMARISE", "Say more.")
    with pytest.raises(InputError, match=r"descriptions.json: .*prompts"):
        msr_texts.generated(builder, [example()], tmp_path)
    assert asked == [] and (tmp_path / "summaries.json").read_bytes() == kept


def test_the_base_writes(data, tmp_path, monkeypatch):
    """Posterland's own base with the real generation, a few tokens each: the same texts in a second
    folder and other batches."""
    monkeypatch.setattr(msr_texts, "DESCRIPTION", 4)
    monkeypatch.setattr(msr_texts, "SUMMARY", 6)
    base, catalog = load_backbone(str(BASE), "float32", "cpu"), load_catalog(data)
    builder = PromptBuilder(base, catalog, encode_pictures(base, catalog, range(7)), DataConfig(""))
    examples = [example(), example((2, 6), user="v")]
    found = msr_texts.generated(builder, examples, tmp_path / "a", batch=2)
    assert found.keys() == {("u", HISTORY), ("v", (2, 6))} and all(found.values())
    assert msr_texts.generated(builder, examples, tmp_path / "b", batch=3) == found
