"""The three families: our forward against Hugging Face's own, packing and padding against the plain
path, and negative controls.
"""

import json
from dataclasses import replace

import pytest
import torch
import toy
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hanorec.base.errors import InputError
from hanorec.datasets.images import read_image
from hanorec.lora.layer import language_model
from hanorec.mllm.attention import ATTENTION, use_segment_attention
from hanorec.mllm.backbone import FAMILIES, ImageFeatures, image_features, prompt_positions
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import text_ids
from hanorec.scoring import answer_log_probs, answer_logits

# a negative control moves a log-probability by more than this; honest paths differ by less than
# 1e-5
SHIFT = 1e-3
# (and 5e-7 of their size: a sum over an answer is about -60, where neighbouring float32 numbers are
# 4e-6 apart)


def own_forward(backbone, rows, images):
    """Logits (B, T, V) of the family's own forward and attention, pixels in: nothing of ours but
    the token ids.
    """
    texts = [row.prompt + row.answers[0] for row in rows]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    inputs = backbone.image_processor(images=images, return_tensors="pt")
    if backbone.family != "llava_next":
        inputs["mm_token_type_ids"] = (ids == backbone.image_token).int()
    language_model(backbone.model).set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = backbone.model(input_ids=ids, attention_mask=mask, **inputs).logits
    use_segment_attention(backbone.model)
    return logits


def rows_of(backbone, catalog, pictures):
    """Two rows of different lengths, with one answer each; between them they hold three image
    shapes and an item without image.
    """
    long = toy.ranking_row(backbone, catalog, pictures, (0, 1, 2), (3, 4, 5), (4,), "long")
    short = toy.ranking_row(backbone, catalog, pictures, (6,), (3, 7), (7,), "short")
    assert len(long.prompt) > len(short.prompt) + 10
    return [long, short]


def test_forward_equals_hugging_face(backbone, catalog, gallery):
    pictures = gallery[backbone.family]
    rows = rows_of(backbone, catalog, pictures)
    if backbone.family != "llava_next":
        assert len({tuple(pictures[i].grid.tolist()) for i in (0, 2, 3)}) == 3
    assert len({len(pictures[i].features) for i in (0, 2, 3)}) > 1
    # alone, and side by side (theirs padded on the left, ours on the right)
    for part in ([rows[0]], [rows[1]], rows):
        batch = collate(backbone, part, pictures)
        images = [read_image(catalog.images[i]) for row in part for i in row.images]
        logits = own_forward(backbone, part, images)
        # (M, V)
        theirs = torch.cat([logits[b, -len(row.answers[0]) - 1 : -1] for b, row in enumerate(part)])
        with torch.no_grad():
            ours = answer_logits(forward(backbone, batch), batch)
        assert ours.std() > 0.3  # not a flat model, for which everything agrees
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_llava_placeholders_equal_its_own_processor(checkpoints, catalog, gallery):
    """LLaVA-NeXT's processor works without torchvision, so the whole prompt can be compared, image
    tokens included.
    """
    from transformers import AutoProcessor

    backbone = load_backbone(str(checkpoints["llava_next"]), "float32", "cpu")
    row = toy.ranking_row(backbone, catalog, gallery["llava_next"])
    text, place = "", iter([read_image(catalog.images[i]) for i in row.images])
    runs = []  # consecutive placeholders become one <image> again
    for token in row.prompt:
        if token != backbone.image_token or not runs or runs[-1] != token:
            runs.append(token)
    text = backbone.tokenizer.decode(runs, clean_up_tokenization_spaces=False)
    # Neighbouring images would merge in `runs`, but a title stands between any two.
    theirs = AutoProcessor.from_pretrained(backbone.path)(
        text=text, images=list(place), add_special_tokens=False
    )
    placeholders = sum(token == backbone.image_token for token in theirs["input_ids"][0])
    assert placeholders == row.prompt.count(backbone.image_token)


def test_qwen_placeholders_follow_the_grid(checkpoints, catalog, gallery):
    """n = t h w / merge^2 tokens an image, by the pixels that the image processor really makes."""
    for family in ("qwen2_vl", "qwen2_5_vl"):
        backbone = load_backbone(str(checkpoints[family]), "float32", "cpu")
        for i in (0, 2, 3):
            images = [read_image(catalog.images[i])]
            made = backbone.image_processor(images=images, return_tensors="pt")
            grid = made["image_grid_thw"][0]
            tokens = int(grid.prod()) // backbone.image_processor.merge_size**2
            assert len(gallery[family][i].features) == tokens
        row = toy.ranking_row(backbone, catalog, gallery[family])
        assert row.prompt.count(backbone.image_token) == sum(
            len(gallery[family][i].features) for i in row.images
        )
        assert row.images == [0, 2, 3, 4, 5]  # row 1 has none


@pytest.mark.equation("EV-1", "DPO-1")
def test_packed_equals_separate(backbone, catalog, gallery):
    """[prompt | a | b | c] in one row against three forwards: log-probabilities, and gradients of
    every LoRA weight.
    """
    pictures = gallery[backbone.family]
    row = toy.ranking_row(backbone, catalog, pictures, answers=(3, 4, 5))
    layers = toy.busy_lora(backbone.model)
    packed = toy.log_probs(backbone, [row], pictures)
    alone = toy.log_probs_alone(backbone, row, pictures)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=5e-7)
    # different for each answer, so that a mix-up of answers shows
    pull = torch.tensor([[1.0, -1.0, 0.5]])
    ours = toy.gradients((packed * pull).sum(), layers)
    theirs = toy.gradients((alone * pull).sum(), layers)
    assert toy.apart(ours, theirs) < 1e-5
    mixed = (toy.log_probs(backbone, [row], pictures) * pull.flip(1)).sum()
    assert toy.apart(toy.gradients(mixed, layers), theirs) > 0.1


def test_padding_changes_nothing(backbone, catalog, gallery):
    """Rows of different lengths side by side, plain (no mask) and packed, against each alone."""
    pictures = gallery[backbone.family]
    rows = [toy.ranking_row(backbone, catalog, pictures, (0, 1, 2), (3, 4, 5), (3, 5)),
            # one image less a candidate, other answers
            toy.ranking_row(backbone, catalog, pictures, (1,), (8, 9), (8, 9)),
            toy.ranking_row(backbone, catalog, pictures, (4, 5, 6, 7), (10, 11, 12), (12, 10))]
    assert len({len(row.prompt) for row in rows}) == 3
    with torch.no_grad():
        alone = torch.cat([toy.log_probs(backbone, [row], pictures) for row in rows])
        torch.testing.assert_close(
            toy.log_probs(backbone, rows, pictures), alone, atol=1e-5, rtol=5e-7
        )
        plain = [toy.single_answer(row, 1) for row in rows]
        torch.testing.assert_close(
            toy.log_probs(backbone, plain, pictures)[:, 0], alone[:, 1], atol=1e-5, rtol=5e-7
        )


def test_negative_controls(backbone, catalog, gallery):
    """A leaky mask, a wrong start position and swapped images each show, so the agreement above
    means something.
    """
    pictures = gallery[backbone.family]
    row = toy.ranking_row(backbone, catalog, pictures, (0, 2), (4, 5), (4, 5))
    batch = collate(backbone, [row], pictures)

    def moved(**changed):
        other = replace(batch, **changed)
        with torch.no_grad():
            return (answer_log_probs(forward(backbone, other), other) - right)[0].abs()

    with torch.no_grad():
        right = answer_log_probs(forward(backbone, batch), batch)
    assert moved().max() == 0
    leaky = moved(mask=None)  # causal over the whole row: the second answer sees the first
    assert leaky[0] < 1e-5 and leaky[1] > SHIFT
    late = batch.positions.clone()
    late[:, :, len(row.prompt) :] += 3
    assert moved(positions=late).min() > SHIFT
    # the second answer counts on from the first instead of starting anew
    running = batch.positions.clone()
    second = len(row.prompt) + len(row.answers[0])
    running[:, :, second:] += len(row.answers[0])
    assert moved(positions=running)[0] == 0 and moved(positions=running)[1] > SHIFT
    # the two candidates' posters exchanged
    flipped = torch.cat([pictures[i].features for i in (0, 2, 5, 4)])
    assert moved(pictures=flipped).max() > SHIFT
    # 1D positions, as a forward without image grids would take them
    if backbone.family != "llava_next":
        flat = torch.arange(len(row.prompt)).expand(3, 1, -1)
        flat = torch.cat([flat, batch.positions[:, :, len(row.prompt) :]], 2)
        assert moved(positions=flat).max() > SHIFT


def test_segments_equal_transformers_own_attention(backbone, catalog, gallery):
    """Packed rows under our attention against a row an answer under each of Transformers' own."""
    pictures = gallery[backbone.family]
    rows = [
        toy.ranking_row(backbone, catalog, pictures),
        toy.ranking_row(backbone, catalog, pictures, (6,), (7, 8), (7, 8)),
    ]
    assert backbone.config.text_config._attn_implementation == ATTENTION
    with torch.no_grad():
        ours = toy.log_probs(backbone, rows, pictures)
        for kind in ("sdpa", "eager"):
            language_model(backbone.model).set_attn_implementation(kind)
            assert backbone.config.text_config._attn_implementation == kind
            plain = collate(backbone, rows, pictures, packed=False)
            torch.testing.assert_close(
                answer_log_probs(forward(backbone, plain), plain), ours, atol=1e-5, rtol=5e-7
            )


def test_placeholders_are_counted(backbone, catalog, gallery):
    pictures = gallery[backbone.family]
    row = toy.ranking_row(backbone, catalog, pictures)
    batch = collate(backbone, [row], pictures)
    n = len(batch.pictures)
    assert int((batch.ids == backbone.image_token).sum()) == n
    item = row.images[0]
    own, grid = pictures[item]
    for wrong in (own[:-1], torch.cat([own, own[:1]]), own[:0]):
        found = n - len(own) + len(wrong)
        with pytest.raises(ValueError, match=f"{n} image placeholders, {found} image features"):
            collate(backbone, [row], {**pictures, item: ImageFeatures(wrong, grid)})


def test_items_without_any_image(backbone, catalog, gallery):
    """A prompt of titles alone: no placeholder, plain positions, and the family's own text-only
    forward gives the same.
    """
    bare = replace(catalog, images=(None,) * len(catalog.images))
    row = toy.ranking_row(backbone, bare, {}, answers=(4,))
    assert backbone.image_token not in row.prompt and row.images == []
    assert torch.equal(row.positions, torch.arange(len(row.prompt)).expand_as(row.positions))
    batch = collate(backbone, [row], {})
    ids = torch.tensor([row.prompt + row.answers[0]])
    with torch.no_grad():
        theirs = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        theirs = theirs[:, batch.columns[0]]
        torch.testing.assert_close(forward(backbone, batch), theirs, atol=1e-5, rtol=1e-5)
        # one row with images and one without, side by side
        rows = [row, toy.ranking_row(backbone, catalog, gallery[backbone.family], answers=(4,))]
        both = toy.log_probs(backbone, rows, gallery[backbone.family])
        alone = torch.cat([toy.log_probs(backbone, [r], gallery[backbone.family]) for r in rows])
        torch.testing.assert_close(both, alone, atol=1e-5, rtol=5e-7)


def test_batch_of_images_equals_one_by_one(backbone, catalog):
    images = [read_image(catalog.images[i]) for i in (0, 2, 3)]
    together = image_features(backbone, images)
    for image, picture in zip(images, together, strict=True):
        (alone,) = image_features(backbone, [image])
        torch.testing.assert_close(picture.features, alone.features, atol=1e-5, rtol=1e-5)
        assert (alone.grid is None) == (backbone.family == "llava_next")
        assert alone.grid is None or torch.equal(alone.grid, picture.grid)


@pytest.mark.parametrize("family", FAMILIES)
def test_max_pixels_lowers_the_tokens(checkpoints, catalog, family):
    """Qwen: an area of 32 x 32 is one token. LLaVA-NeXT: the smallest tiling (28 x 56, two tiles)
    becomes 28 x 28, one tile.
    """
    image, counts = read_image(catalog.images[2]), {}
    for pixels in (80 * 80, 28 * 28 if family == "llava_next" else 32 * 32):
        backbone = load_backbone(str(checkpoints[family]), "float32", "cpu", max_pixels=pixels)
        (picture,) = image_features(backbone, [image])
        counts[pixels] = len(picture.features)
        assert counts[pixels] * 32 * 32 <= pixels or family == "llava_next"
    low, high = sorted(counts)
    assert counts[low] < counts[high]
    # model and processor agree on the tilings, else features and placeholders would part
    if family == "llava_next":
        assert (
            backbone.config.image_grid_pinpoints
            == backbone.image_processor.image_grid_pinpoints
            == [[28, 28]]
        )
    else:
        assert counts[low] == 1
        with pytest.raises(
            InputError, match="max_pixels = 1000: .* 1024 pixels; allow at least that many"
        ):
            load_backbone(str(checkpoints[family]), device="cpu", max_pixels=1000)


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (150, 1), (3000, 2000)])
def test_extreme_images(backbone, size):
    """Very small, thin and large images get at least one token each, and within max_pixels."""
    (picture,) = image_features(backbone, [Image.new("RGB", size, (200, 40, 90))])
    assert len(picture.features) >= 1 and picture.features.isfinite().all()


def test_prompt_positions_of_qwen_by_hand(checkpoints):
    """Two text tokens, an image of 2 x 3 tokens, one text token. The image starts at 2 in time,
    height and width; height and width count up inside it; the text after it goes on from the
    largest position + 1 = 5.
    """
    for family in ("qwen2_vl", "qwen2_5_vl"):
        backbone = load_backbone(str(checkpoints[family]), "float32", "cpu")
        start, end = backbone.around_image()
        ids = [7, *start, *[backbone.image_token] * 6, *end]
        positions = prompt_positions(backbone, ids, [torch.tensor([1, 4, 6])])
        assert positions.tolist() == [
            [0, 1, 2, 2, 2, 2, 2, 2, 5],
            [0, 1, 2, 2, 2, 3, 3, 3, 5],
            [0, 1, 2, 3, 4, 2, 3, 4, 5],
        ]


def test_loaded_frozen_and_in_eval_mode(backbone):
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert next(backbone.model.parameters()).dtype == torch.float32
    assert backbone.width == 64 and backbone.context == 4096


def broken(make, family, change):
    """A fresh checkpoint after change(folder)."""
    folder = make(family)
    change(folder)
    return folder


def edit(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return change


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def reweigh(change):
    """Apply change to the checkpoint's tensors."""
    def rewrite(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return rewrite


def pickled(folder):
    """Weights as pytorch_model.bin: a pickle can run code, so it is refused."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (remove("config.json"), ["no config.json", "save_pretrained"]),
        (remove("model.safetensors"), ["cannot be loaded", "safetensors"]),
        (pickled, ["cannot be loaded", "safetensors"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
         ["cannot be loaded", "safetensors"]),
        (edit("config.json", model_type="gpt2"),
         ["cannot be loaded", "qwen2_vl, qwen2_5_vl, llava_next"]),
        (edit("config.json", model_type="nonesuch"), ["cannot be loaded", "nonesuch"]),
        (remove("preprocessor_config.json"),
         ["tokenizer or image processor", "copy tokenizer and preprocessor files"]),
        # Transformers makes an empty tokenizer of a folder without one, which would turn every
        # title into nothing
        (remove("tokenizer.json", "tokenizer_config.json"),
         ["the tokenizer has", "expected tokenizer and model of one checkpoint"]),
        (reweigh(lambda weights: weights.update({Q_PROJ: weights[Q_PROJ][:32].contiguous()})),
         ["cannot be loaded", "safetensors"]),
        (edit("tokenizer_config.json", eos_token=None),
         ["no end token", "set eos_token in tokenizer_config.json"]),
    ],
)
def test_broken_checkpoints_are_named(make, change, parts):
    folder = broken(make, "qwen2_5_vl", change)
    with pytest.raises(InputError) as caught:
        load_backbone(str(folder), "float32", "cpu")
    assert all(part in str(caught.value) for part in [str(folder), *parts]), str(caught.value)


def test_missing_weights_are_not_drawn_at_random(make):
    folder = broken(make, "qwen2_5_vl", reweigh(lambda weights: weights.pop(Q_PROJ)))
    with pytest.raises(InputError, match="q_proj"):
        load_backbone(str(folder), "float32", "cpu")


def test_tokenizer_of_another_checkpoint(make):
    """A tokenizer with more tokens than the model embeds."""
    folder = make("qwen2_5_vl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|new {n}|>" for n in range(100)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"tokenizer has .* tokens, .* but the model embeds \d+"):
        load_backbone(str(folder), "float32", "cpu")


def test_another_family(tmp_path):
    """A model that Transformers loads as an image-text model, but of none of the three families."""
    text = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )
    LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="model type 'llava', expected one of qwen2_vl, qwen2_5_vl, llava_next"
    ):
        load_backbone(str(tmp_path), "float32", "cpu")


def test_unknown_name_is_an_input_error():
    with pytest.raises(InputError, match="nobody/nothing: no such folder, and by this name"):
        load_backbone("nobody/nothing", "float32", "cpu")


def test_a_cache_is_refused_and_not_overlooked(qwen):
    """Of a cache's keys, attention by segments would see the first alone: other tokens, no error.
    Without one, the tokens generated are those of one forward after another.
    """
    ids = torch.tensor([text_ids(qwen, "A quiet film about space")])
    few = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(ValueError, match="use_cache=False"):
        qwen.model.generate(ids, **few)
    found = qwen.model.generate(ids, **few, use_cache=False)
    for _ in range(3):
        logits = qwen.model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
