"""Every attribute of the families' configurations: in the table, and as the table says, by the
logits of Transformers' own forward on tiny random models.
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import toy
import transformers
from attribute_cases import (
    BASES,
    CASES,
    DEFAULT,
    ELSEWHERE,
    HOMES,
    MROPE,
    REFUSED,
    WITHOUT_EFFECT,
    changed,
    write_checkpoint,
    write_json,
)
from processes import together
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hanorec.base.distributed import rank
from hanorec.base.errors import InputError
from hanorec.datasets.images import read_image
from hanorec.lora.layer import language_model
from hanorec.mllm.allowed import Only
from hanorec.mllm.attributes import ATTRIBUTES, EVERYWHERE, HONOURED, NO_EFFECT, UNLISTED
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.items import encode_pictures, item_embeddings
from hanorec.mllm.load import load_backbone
from hanorec.scoring import answer_logits

ROOT = Path(__file__).parent.parent
PINNED = (
    f"transformers=={importlib.metadata.version('transformers')}"
    in (ROOT / "constraints.txt").read_text().splitlines()
)
AGREE = 1e-4  # largest difference of two logits that are the same
SHIFT = 1e-3  # and the least of two that are not


# ---- the table against the classes ----


def configuration(kind):
    """A configuration class of the installed Transformers."""
    if hasattr(transformers, kind):
        return getattr(transformers, kind)
    for family in ("qwen2_vl", "qwen2_5_vl"):
        module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        if hasattr(module, kind):
            return getattr(module, kind)
    raise AssertionError(f"Transformers has no {kind}")


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_the_table_has_every_attribute(kind):
    """A field that is new fails in every version, one that is gone in the pinned one alone."""
    fields = {field.name for field in dataclasses.fields(configuration(kind))}
    assert fields - ATTRIBUTES[kind].keys() == set(), "decide what they do, and test it"
    if PINNED:
        assert ATTRIBUTES[kind].keys() - fields == set(), "gone"


# What the modelling code reads of other configurations: of CLIP's and SigLIP's text models and
# classifiers, of encoder-decoders. Names that begin with an underscore are Transformers' own.
OF_OTHERS = {
    "num_labels", "logit_scale_init_value", "projection_size", "eos_token_id", "vocab_size",
    "max_position_embeddings", "text_config", "vision_config", "initializer_factor",
}
SHARED = {"attention_chunk_size"}  # of masks that no module here asks for
MODULES = {
    "qwen2_vl": ["Qwen2VLConfig", "Qwen2VLTextConfig", "Qwen2VLVisionConfig"],
    "qwen2_5_vl": ["Qwen2_5_VLConfig", "Qwen2_5_VLTextConfig", "Qwen2_5_VLVisionConfig"],
    "llava_next": ["LlavaNextConfig", "LlamaConfig", "CLIPVisionConfig"],
    "llama": ["LlamaConfig"],
    "mistral": ["MistralConfig"],
    "qwen2": ["Qwen2Config"],
    "clip": ["CLIPVisionConfig"],
    "siglip": ["SiglipVisionConfig"],
}
CONFIGS = ("config", "vision_config", "text_config")
BY_NAME = ("getattr", "hasattr")


def reads(module):
    """Names of settings that a module of Transformers takes from configurations, methods left out.
    """
    def is_config(node):
        return getattr(node, "id", getattr(node, "attr", None)) in CONFIGS

    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in BY_NAME:
            continue
        if is_config(node.args[0]) and isinstance(node.args[1], ast.Constant):
            found.add(node.args[1].value)
    base = transformers.PreTrainedConfig
    methods = {name for name in found if callable(getattr(base, name, None))}
    return {name for name in found - methods if not name.startswith("_")}


@pytest.mark.parametrize("family", MODULES)
def test_the_table_has_what_the_modelling_code_reads(family):
    """Attributes that no class lists, too, since config.json may have them."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    known = set(EVERYWHERE) | (OF_OTHERS if family in ("clip", "siglip") else set())
    for kind in MODULES[family]:
        known |= ATTRIBUTES[kind].keys() | UNLISTED.get(kind, {}).keys()
        known |= configuration(kind).attribute_map.keys()
    assert reads(module) - known == set()


@pytest.mark.parametrize(
    "name", ["masking_utils", "modeling_rope_utils", "utils.generic", "utils.output_capturing"]
)
def test_the_table_has_what_every_forward_reads(name):
    known = set(EVERYWHERE) | SHARED
    for kind in ATTRIBUTES:
        known |= ATTRIBUTES[kind].keys() | UNLISTED.get(kind, {}).keys()
    assert reads(importlib.import_module(f"transformers.{name}")) - known == set()


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_every_attribute_has_a_test(kind):
    """Honoured: compared below, or by the test that is named; without effect; refused."""
    table = EVERYWHERE | ATTRIBUTES[kind] | UNLISTED.get(kind, {})
    for name, verdict in table.items():
        of_its_own = callable(globals().get(ELSEWHERE.get(name, "")))
        compared = name in CASES[kind] or of_its_own
        if verdict == NO_EFFECT:
            assert name in WITHOUT_EFFECT[kind], name
        elif verdict == HONOURED:
            assert compared, name
        else:
            assert isinstance(verdict, Only), name
            refused = name in REFUSED[kind] or name in ELSEWHERE or name == "per_layer_config"
            assert refused and (compared or name not in ATTRIBUTES[kind] or name == "return_dict")
    for cases in (CASES, WITHOUT_EFFECT, REFUSED):
        assert cases[kind].keys() <= table.keys()


# ---- logits under each attribute ----


@pytest.fixture(scope="module")
def write(checkpoints, tmp_path_factory):
    """write(base, {dotted name: value}) -> folder of a new checkpoint."""
    def one(base, changes):
        family = BASES[base]["model_type"]
        own = json.loads((checkpoints[family] / "config.json").read_text())
        ids = {name: value for name, value in own.items() if "token_i" in name}
        vocabulary = {"text_config.vocab_size": own["text_config"]["vocab_size"]}
        config = changed(BASES[base] | ids, **vocabulary | changes)
        folder = tmp_path_factory.mktemp(base) / "model"
        write_checkpoint(folder, checkpoints[family], config)
        return folder

    return one


def row_of(backbone, catalog):
    """A prompt with images of two shapes and two answers, and the images' features."""
    pictures = encode_pictures(backbone, catalog, (0, 2))
    return toy.ranking_row(backbone, catalog, pictures, (0,), (2, 1), (2, 1)), pictures


def ours(folder, catalog):
    """Logits (M, V) of two packed answers by this package, and their row."""
    backbone = load_backbone(str(folder), "float32", "cpu", max_pixels=10**6)
    row, pictures = row_of(backbone, catalog)
    batch = collate(backbone, [row], pictures)
    with torch.no_grad():
        return answer_logits(forward(backbone, batch), batch), row


def theirs(folder, row, catalog):
    """The same by Transformers alone: a forward an answer, pixels in."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    images = [read_image(catalog.images[i]) for i in row.images]
    found = []
    for answer in row.answers:
        ids = torch.tensor([row.prompt + answer])
        inputs = image_processor(images=images, return_tensors="pt")
        if model.config.model_type != "llava_next":
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
        found.append(logits[0, -len(answer) - 1 : -1])
    return torch.cat(found)


def apart(a, b):
    """Largest difference of two logits; infinite where there are other tokens."""
    return (a - b).abs().max().item() if a.shape == b.shape else float("inf")


@pytest.fixture(scope="module")
def plain(write, catalog):
    """plain(base) -> logits of the base itself, by this package."""
    known = {}

    def one(base):
        if base not in known:
            known[base] = ours(write(base, {}), catalog)[0]
        return known[base]

    return one


@pytest.mark.parametrize("base", BASES)
def test_logits_of_the_bases(base, write, catalog):
    folder = write(base, {})
    logits, row = ours(folder, catalog)
    assert logits.std() > 0.3  # not a flat model, for which everything agrees
    assert apart(logits, theirs(folder, row, catalog)) < AGREE


def single_cases():
    for kind, of_kind in CASES.items():
        for name, cases in of_kind.items():
            for number, case in enumerate(cases):
                yield pytest.param(kind, name, case, id=f"{kind}-{name}-{number}")


@pytest.mark.parametrize(("kind", "name", "case"), single_cases())
def test_honoured(kind, name, case, write, plain, catalog):
    """With another value the logits are Transformers', and not what they were."""
    base, place = HOMES[kind]
    folder = write(base, {place + name: case.value} | dict(case.also))
    logits, row = ours(folder, catalog)
    assert apart(logits, theirs(folder, row, catalog)) < AGREE
    assert apart(logits, plain(base)) > SHIFT


@pytest.mark.parametrize("kind", WITHOUT_EFFECT)
def test_without_effect(kind, write, plain, catalog):
    """All at once: the logits are what they were, and Transformers'."""
    base, place = HOMES[kind]
    changes = {place + name: value for name, value in WITHOUT_EFFECT[kind].items()}
    folder = write(base, changes)
    logits, row = ours(folder, catalog)
    assert apart(logits, plain(base)) == 0
    assert apart(logits, theirs(folder, row, catalog)) < AGREE


def refused_cases():
    for kind, of_kind in REFUSED.items():
        for name, values in of_kind.items():
            for number, value in enumerate(values):
                yield pytest.param(kind, name, value, id=f"{kind}-{name}-{number}")


def edit(folder, place, **values):
    """Change config.json alone."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    write_json(path, changed(config, **{place + name: value for name, value in values.items()}))


@pytest.fixture(scope="module")
def wrong(write, tmp_path_factory):
    """wrong(base, place, **values) -> a checkpoint whose config.json alone was changed."""
    folders = {}

    def one(base, place, **values):
        if base not in folders:
            folders[base] = write(base, {})
        folder = tmp_path_factory.mktemp("wrong") / "model"
        shutil.copytree(folders[base], folder)
        edit(folder, place, **values)
        return folder

    return one


@pytest.mark.parametrize(("kind", "name", "value"), refused_cases())
def test_refused_by_name(kind, name, value, tmp_path):
    base, place = HOMES[kind]
    write_json(tmp_path / "config.json", changed(BASES[base], **{place + name: value}))
    with pytest.raises(InputError) as caught:
        load_backbone(str(tmp_path), "float32", "cpu")  # before any weight is looked for
    verdict = (EVERYWHERE | ATTRIBUTES[kind] | UNLISTED.get(kind, {}))[name]
    assert f"{place}{name} in config.json is" in str(caught.value)
    assert verdict.expected in str(caught.value)


# ---- what a forward alone does not show ----

TEXTS = [kind for kind, (_, place) in HOMES.items() if place == "text_config."]


def backbone_of(folder):
    return load_backbone(str(folder), "float32", "cpu", max_pixels=10**6)


@pytest.fixture(scope="module")
def need(write, catalog):
    """need(base) -> tokens of its longest answer and the prompt."""
    def one(base):
        row, _ = row_of(backbone_of(write(base, {})), catalog)
        return len(row.prompt) + max(map(len, row.answers))

    return one


@pytest.mark.parametrize("kind", TEXTS)
def test_attention_dropout_is_active_in_training_alone(kind, write, plain, catalog):
    """With one seed the dropout is that of Transformers' own attention function."""
    base, place = HOMES[kind]
    backbone = backbone_of(write(base, {place + "attention_dropout": 0.5}))
    row, pictures = row_of(backbone, catalog)
    packed = collate(backbone, [row], pictures)
    batch = collate(backbone, [toy.single_answer(row, 0)], pictures)

    def drawn(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return answer_logits(forward(backbone, batch), batch)

    with torch.no_grad():
        assert apart(answer_logits(forward(backbone, packed), packed), plain(base)) == 0
    still = drawn(0)
    backbone.model.train()
    first, second = drawn(0), drawn(1)
    assert min(apart(first, still), apart(first, second)) > SHIFT
    language_model(backbone.model).set_attn_implementation("sdpa")
    assert apart(drawn(0), first) < AGREE


@pytest.mark.parametrize("kind", TEXTS)
def test_longest_row(kind, write, need, plain, catalog):
    """As many tokens as there are positions, no more. Up to there a dynamic rope changes nothing.
    """
    base, place = HOMES[kind]
    rope = (MROPE if "VL" in kind else DEFAULT) | {"rope_type": "dynamic", "factor": 4.0}
    longest = need(base)
    for tokens in (longest, longest - 1):
        changes = {place + "max_position_embeddings": tokens, place + "rope_parameters": rope}
        folder = write(base, changes)
        if tokens == longest:
            logits, row = ours(folder, catalog)
            assert apart(logits, plain(base)) < AGREE
            assert apart(logits, theirs(folder, row, catalog)) < AGREE
        else:
            with pytest.raises(InputError, match=f"{longest} tokens.* context of {tokens}"):
                ours(folder, catalog)


def windows(kind, tokens):
    """Settings under which the second layer, or every layer of a Mistral, has a window."""
    if kind == "MistralConfig":
        return [{"sliding_window": tokens}]
    on = {"use_sliding_window": True, "sliding_window": tokens}
    types = {"layer_types": ["full_attention", "sliding_attention"]}
    return [on | {"max_window_layers": 1}, on | types]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "LlamaConfig"])
def test_a_row_longer_than_the_window_is_refused(kind, number, write, need, plain, catalog):
    """One as long is not, and its logits are Transformers'; those of a longer one would not be."""
    base, place = HOMES[kind]
    if number >= len(windows(kind, 1)):
        pytest.skip("Mistral has one way to say it")

    def with_window(tokens):
        settings = windows(kind, tokens)[number]
        return write(base, {place + name: value for name, value in settings.items()})

    longest = need(base)
    exact = with_window(longest)
    logits, row = ours(exact, catalog)
    assert apart(logits, theirs(exact, row, catalog)) < AGREE
    small = with_window(longest - 1)
    with pytest.raises(InputError, match=f"{longest} tokens.* sliding_window of {longest - 1}"):
        ours(small, catalog)
    short = with_window(8)
    assert apart(plain(base), theirs(short, row, catalog)) > 0.1
    # titles and images alone, too: HN-1 from hidden states
    backbone = backbone_of(with_window(2))
    with pytest.raises(InputError, match=r"a text of \d+ tokens .* sliding_window of 2"):
        item_embeddings(backbone, catalog, {}, "hidden")


@pytest.mark.parametrize("base", BASES)
def test_windows_that_no_layer_has(base, write):
    """No window: switched off, or for layers that there are not. Mistral without the key: 4096, as
    Transformers takes it.
    """
    settings = {
        "mistral": [{"sliding_window": None}],
        "llama": [{"sliding_window": 8}],  # a Llama has none
    }.get(base, [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ])
    for changes in settings:
        folder = write(base, {f"text_config.{name}": value for name, value in changes.items()})
        assert backbone_of(folder).context == 4096
    if base == "mistral":
        edit(folder, "text_config.", max_position_embeddings=10000)
        assert backbone_of(folder).context == 10000
        config = json.loads((folder / "config.json").read_text())
        del config["text_config"]["sliding_window"]
        write_json(folder / "config.json", config)
        assert backbone_of(folder).context == 4096


@pytest.mark.parametrize("base", BASES)
def test_tied_by_either_flag(base, write, plain, catalog):
    whole = write(base, {"tie_word_embeddings": True})
    logits, row = ours(whole, catalog)
    assert apart(logits, theirs(whole, row, catalog)) < AGREE
    assert apart(logits, plain(base)) > SHIFT
    edit(whole, "", tie_word_embeddings=False)
    edit(whole, "text_config.", tie_word_embeddings=True)
    assert apart(logits, ours(whole, catalog)[0]) == 0


def head_of_divided(folder, out):
    """In a rank: what it has as head."""
    head = load_backbone(folder, "float32", "cpu", shard=True).model.lm_head.weight
    save_file({"head": head.detach()}, f"{out}/{rank()}.safetensors")


def test_two_weights_are_not_tied_by_a_flag(wrong, plain, catalog, tmp_path):
    """Stored and different: kept, as Transformers does it; divided over ranks, too."""
    folder = wrong("llama", "", tie_word_embeddings=True)
    logits, row = ours(folder, catalog)
    assert apart(logits, theirs(folder, row, catalog)) < AGREE
    assert apart(logits, plain("llama")) == 0
    assert together(2, head_of_divided, str(folder), str(tmp_path)) == [0, 0]
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    for r in range(2):
        assert torch.equal(load_file(tmp_path / f"{r}.safetensors")["head"], head)


@pytest.mark.parametrize(
    ("name", "model_type", "kind"),
    [("text_config", "gemma2", "Gemma2Config"), ("vision_config", "clip", "CLIPConfig")],
)
def test_other_parts_are_refused(name, model_type, kind, wrong):
    """Gemma 2 caps the logits of its attention, which ours would not."""
    folder = wrong("llama", "", **{name: {"model_type": model_type}})
    with pytest.raises(InputError, match=f"{name} in config.json is a {kind}, expected one of"):
        backbone_of(folder)


@pytest.mark.parametrize(
    ("base", "name", "other"),
    [
        ("qwen2_5_vl", "image_token_id", "<|video_pad|>"),
        ("qwen2_5_vl", "vision_start_token_id", "<|vision_pad|>"),
        ("qwen2_vl", "vision_end_token_id", "<|vision_pad|>"),
        ("llama", "image_token_index", "<pad>"),
    ],
)
def test_tokens_of_an_image(base, name, other, wrong, catalog):
    """As config.json says, and refused where the chat template writes others."""
    usual = backbone_of(wrong(base, ""))
    token = usual.tokenizer.convert_tokens_to_ids(other)
    folder = wrong(base, "", **{name: token})
    with pytest.raises(InputError, match="its chat template writes"):
        backbone_of(folder)
    before = usual.tokenizer.convert_ids_to_tokens(getattr(usual.config, name))
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace(before, other))
    ids = row_of(backbone_of(folder), catalog)[0].prompt
    row = row_of(usual, catalog)[0].prompt
    expected = [token if number == getattr(usual.config, name) else number for number in row]
    assert ids == expected and token in ids


@pytest.mark.parametrize("name", ["patch_size", "merge_size", "temporal_patch_size"])
def test_patches_as_the_tower_reads_them(name, wrong):
    """Where merge_size is another the patches come in another order, and no shape tells."""
    folder = wrong("qwen2_5_vl", "")
    path = folder / "preprocessor_config.json"
    write_json(path, json.loads(path.read_text()) | {name: 1})
    with pytest.raises(InputError, match=f"{name} in preprocessor_config.json is 1, but vision"):
        backbone_of(folder)
