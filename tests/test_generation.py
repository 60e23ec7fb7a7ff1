"""Greedy texts: Transformers' own generate on the same tokens; and the file that keeps them."""

import json

import pytest
import torch
import toy

from hanorec.base.errors import InputError
from hanorec.datasets.images import read_image
from hanorec.lora.layer import language_model
from hanorec.lora.stack import checkpoint_fingerprint
from hanorec.mllm.attention import use_segment_attention
from hanorec.mllm.generation import BLOCKS, continued, generate, kept_texts
from hanorec.mllm.load import load_backbone

LIMIT = 6


def rows_of(backbone, catalog, pictures):
    """Three prompts of two lengths, with three shapes of images and an item without one."""
    histories = [(0, 1, 2), (6, 4), (7, 5)]
    rows = []
    for number, history in enumerate(histories):
        row = toy.ranking_row(backbone, catalog, pictures, history, (3,), (3,), f"u{number}")
        rows.append(row)
    assert len({len(row.prompt) for row in rows}) > 1
    return rows


def their_tokens(backbone, catalog, row, limit=LIMIT, stops=()):
    """What Transformers' generate writes behind the row's tokens, pixels in, by its own attention.
    """
    images = [read_image(catalog.images[i]) for i in row.images]
    inputs = backbone.image_processor(images=images, return_tensors="pt")
    ids = torch.tensor([row.prompt])
    if backbone.family != "llava_next":
        inputs["mm_token_type_ids"] = (ids == backbone.image_token).int()
    language_model(backbone.model).set_attn_implementation("sdpa")
    found = backbone.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, max_new_tokens=limit,
        do_sample=False, use_cache=False, eos_token_id=[*backbone.markers, *stops], pad_token_id=0,
    )[0, len(row.prompt) :].tolist()
    use_segment_attention(backbone.model)
    return found[:-1] if found[-1] in {*backbone.markers, *stops} else found


def test_it_is_transformers_own_greedy_text(backbone, catalog, gallery):
    """Under an adapter, side by side and alone. Control: another item's image, another text."""
    pictures = gallery[backbone.family]
    toy.busy_lora(backbone.model)
    backbone.model.eval()
    rows = rows_of(backbone, catalog, pictures)
    theirs = [their_tokens(backbone, catalog, row) for row in rows]
    assert len({tuple(tokens) for tokens in theirs}) > 1 and max(map(len, theirs)) == LIMIT
    assert continued(backbone, rows, pictures, LIMIT) == theirs
    texts = [backbone.tokenizer.decode(tokens).strip() for tokens in theirs]
    for batch in (1, 2, 4):
        assert generate(backbone, rows, pictures, LIMIT, batch) == texts
    assert continued(backbone, rows, pictures, 3) == [tokens[:3] for tokens in theirs]

    exchanged = {**pictures, 7: pictures[9], 5: pictures[8]}
    assert continued(backbone, rows[2:], exchanged, LIMIT) != theirs[2:]


def test_a_text_ends_where_its_turn_ends(backbone, catalog, gallery):
    """The token that it would write third is made the end of a turn: that row stops before it, the
    others go on as they did."""
    pictures = gallery[backbone.family]
    rows = rows_of(backbone, catalog, pictures)
    backbone.model.eval()
    before = continued(backbone, rows, pictures, LIMIT)
    end = before[0][2]
    backbone.turn = backbone.turn._replace(whole=(*backbone.turn.whole, end))
    after = continued(backbone, rows, pictures, LIMIT)
    for row, long, short in zip(rows, before, after, strict=True):
        assert short == (long[: long.index(end)] if end in long else long)
        assert short == their_tokens(backbone, catalog, row, stops=[end])
    assert len(after[0]) <= 2


def test_an_image_is_never_written(qwen, catalog, gallery):
    """A head that wants nothing but the placeholder: the text ends, as at every marker."""
    rows = rows_of(qwen, catalog, gallery["qwen2_5_vl"])
    head = torch.nn.Linear(qwen.width, len(qwen.tokenizer))
    head.bias.data[qwen.image_token] = 1e6
    qwen.model.lm_head = head
    assert generate(qwen, rows, gallery["qwen2_5_vl"], LIMIT) == ["", "", ""]


def test_what_does_not_fit_is_refused(qwen, catalog, gallery):
    rows = rows_of(qwen, catalog, gallery["qwen2_5_vl"])
    longest = max(len(row.prompt) for row in rows)
    qwen.model.config.text_config.max_position_embeddings = longest + 3
    assert len(generate(qwen, rows, gallery["qwen2_5_vl"], 3)) == 3
    with pytest.raises(InputError, match=f"u0: {longest} tokens of prompt and up to 4 to write.*"):
        generate(qwen, rows, gallery["qwen2_5_vl"], 4)
    with pytest.raises(InputError, match="0 tokens to write, expected at least 1"):
        generate(qwen, rows, gallery["qwen2_5_vl"], 0)


# ---- the file ----

KEYS = [f"item {n}" for n in range(3 * BLOCKS)]


class Writer:
    """Makes texts, remembers for what, and is interrupted at its `last` call."""

    def __init__(self, last=None):
        self.last, self.calls, self.asked = last, 0, []

    def __call__(self, keys):
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.asked += keys
        return [f"about {key}: “é”" for key in keys]


def test_an_interrupted_file_goes_on(tmp_path):
    """Blocks of three: the third is interrupted, so six texts are kept, and not made again."""
    path, facts = tmp_path / "texts.json", {"base": "a", "limit": 64}
    with pytest.raises(KeyboardInterrupt):
        kept_texts(path, facts, KEYS, Writer(last=3))
    second = Writer()
    found = kept_texts(path, facts, KEYS, second)
    assert second.asked == KEYS[6:]
    assert found == {key: f"about {key}: “é”" for key in KEYS}

    third = Writer()
    some = kept_texts(path, facts, ["new", "item 4", "new"], third)
    assert third.asked == ["new"] and list(some) == ["new", "item 4"]
    assert len(json.loads(path.read_text())["texts"]) == len(KEYS) + 1
    assert kept_texts(tmp_path / "none.json", facts, [], third) == {}


def test_texts_of_another_base_are_refused(tmp_path, checkpoints, qwen):
    """By name, and the file stays as it is."""
    path = tmp_path / "texts.json"
    facts = {"base": checkpoint_fingerprint(qwen.model), "limit": 64}
    kept_texts(path, facts, ["a"], Writer())
    before = path.read_bytes()
    other = load_backbone(str(checkpoints["qwen2_vl"]), "float32", "cpu")
    others = {"base": checkpoint_fingerprint(other.model), "limit": 64}
    with pytest.raises(InputError, match="texts.json: base is .* in the file, expected .* delete"):
        kept_texts(path, others, ["a"], Writer())
    with pytest.raises(InputError, match="limit is 64 in the file, expected 128"):
        kept_texts(path, {**facts, "limit": 128}, ["a"], Writer())
    with pytest.raises(InputError, match="prompt is None in the file"):
        kept_texts(path, {**facts, "prompt": "x"}, ["a"], Writer())
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", [
    lambda stored: stored["texts"].update(a="another"),
    lambda stored: stored.update(texts=["a"]),
    lambda stored: stored.pop("sha256"),
])
def test_an_edited_file_is_refused(tmp_path, change):
    path = tmp_path / "texts.json"
    kept_texts(path, {"base": "a"}, ["a"], Writer())
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="expected an unaltered file; delete it"):
        kept_texts(path, {"base": "a"}, ["a"], Writer())
