"""A value that is not the base's for every attribute of the table, and checkpoints that have it.

`CASES` are compared with Transformers one by one, `WITHOUT_EFFECT` all at once, `REFUSED` are
refused; what is left has a test of its own (`ELSEWHERE`).
"""

import json
import shutil
import zlib
from copy import deepcopy
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = DEFAULT | {"mrope_section": [4, 6, 6]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TILES = [[28, 28], [28, 56], [56, 28]]
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}
QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2
}
CLIP = TOWER | {"model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = TOWER | {"model_type": "siglip_vision_model"}
LLAVA = {
    "model_type": "llava_next", "image_grid_pinpoints": TILES, "vision_config": CLIP,
    "tie_word_embeddings": False,
}
QWEN = {"tie_word_embeddings": False, "text_config": TEXT | {"rope_parameters": MROPE}}

# Name -> config.json, without what depends on the tokenizer.
BASES = {
    "qwen2_vl": QWEN | {
        "model_type": "qwen2_vl",
        "vision_config": QWEN_TOWER | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    },
    "qwen2_5_vl": QWEN | {
        "model_type": "qwen2_5_vl",
        "vision_config": QWEN_TOWER | {
            "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 64,
            "fullatt_block_indexes": [1],
        },
    },
    "llama": LLAVA | {"text_config": TEXT | {"model_type": "llama"}},
    "mistral": LLAVA | {"text_config": TEXT | {"model_type": "mistral", "sliding_window": None}},
    "qwen2": LLAVA | {
        "text_config": TEXT | {"model_type": "qwen2"}, "vision_config": SIGLIP,
        "vision_feature_select_strategy": "full",
    },
}

# Class -> the base that has it, and where.
HOMES = {
    "Qwen2VLConfig": ("qwen2_vl", ""),
    "Qwen2VLTextConfig": ("qwen2_vl", "text_config."),
    "Qwen2VLVisionConfig": ("qwen2_vl", "vision_config."),
    "Qwen2_5_VLConfig": ("qwen2_5_vl", ""),
    "Qwen2_5_VLTextConfig": ("qwen2_5_vl", "text_config."),
    "Qwen2_5_VLVisionConfig": ("qwen2_5_vl", "vision_config."),
    "LlavaNextConfig": ("llama", ""),
    "LlamaConfig": ("llama", "text_config."),
    "MistralConfig": ("mistral", "text_config."),
    "Qwen2Config": ("qwen2", "text_config."),
    "CLIPVisionConfig": ("llama", "vision_config."),
    "SiglipVisionConfig": ("qwen2", "vision_config."),
}


class Case(NamedTuple):
    """An attribute's value, and what else has to change with it: dotted names -> values."""

    value: object
    also: dict | tuple = ()


# ---- honoured ----

OF_TEXT = {
    "vocab_size": [Case(1100)],
    "hidden_size": [Case(128)],
    "intermediate_size": [Case(160)],
    "num_hidden_layers": [Case(3)],
    "num_attention_heads": [Case(4)],
    "num_key_value_heads": [Case(2)],
    "hidden_act": [Case("gelu")],
    "rms_norm_eps": [Case(0.5)],
    "rope_parameters": [
        Case(DEFAULT | {"rope_theta": 50.0}),
        Case(DEFAULT | {"rope_type": "linear", "factor": 4.0}),
        Case(DEFAULT | YARN),
        Case(DEFAULT | LLAMA3),
    ],
}
WIDE = {"text_config.rope_parameters": MROPE | {"mrope_section": [8, 12, 12]}}
OF_QWEN_TEXT = OF_TEXT | {
    "hidden_size": [Case(128, WIDE | {"vision_config.hidden_size": 128})],
    "num_attention_heads": [
        Case(4, {"text_config.rope_parameters": MROPE | {"mrope_section": [2, 3, 3]}})
    ],
    "rope_parameters": [Case(MROPE | case.value) for case in OF_TEXT["rope_parameters"]] + [
        Case(MROPE | {"mrope_section": [8, 4, 4]}),
    ],
}
OF_QWEN2_5_TEXT = OF_QWEN_TEXT | {
    "hidden_size": [Case(128, WIDE | {"vision_config.out_hidden_size": 128})],
}
OF_QWEN_TOWER = {
    "depth": [Case(3)],
    "hidden_act": [Case("relu")],
    "num_heads": [Case(4)],
    "patch_size": [Case(14)],
    "spatial_merge_size": [Case(1)],
    "temporal_patch_size": [Case(1)],
    "in_channels": [],  # no other value is allowed
    "rope_parameters": [],
}
OF_TOWER = {
    "hidden_size": [Case(64)],
    "intermediate_size": [Case(96)],
    "num_hidden_layers": [Case(4)],
    "num_attention_heads": [Case(4)],
    "image_size": [Case(42, {"image_grid_pinpoints": [[42, 42], [42, 84], [84, 42]]})],
    "patch_size": [Case(7)],
    "hidden_act": [Case("relu")],
    "layer_norm_eps": [Case(0.5)],
    "num_channels": [],
}
HEAD = {"head_dim": [Case(16)]}
TIED = {"tie_word_embeddings": [Case(True)]}

CASES = {
    "Qwen2VLConfig": TIED,
    "Qwen2VLTextConfig": OF_QWEN_TEXT,
    "Qwen2VLVisionConfig": OF_QWEN_TOWER | {
        "embed_dim": [Case(64)],
        "mlp_ratio": [Case(3)],
        "hidden_size": [Case(128, WIDE | {"text_config.hidden_size": 128})],
    },
    "Qwen2_5_VLConfig": TIED,
    "Qwen2_5_VLTextConfig": OF_QWEN2_5_TEXT,
    "Qwen2_5_VLVisionConfig": OF_QWEN_TOWER | {
        "hidden_size": [Case(64)],
        "intermediate_size": [Case(96)],
        "out_hidden_size": [Case(128, WIDE | {"text_config.hidden_size": 128})],
        "window_size": [Case(32)],
        "fullatt_block_indexes": [Case([0]), Case([0, 1])],
    },
    "LlavaNextConfig": TIED | {
        "projector_hidden_act": [Case("relu")],
        "multimodal_projector_bias": [Case(False)],
        "image_grid_pinpoints": [Case([[28, 28], [56, 56]])],
        "vision_feature_layer": [Case(-1), Case(1), Case([-2, -3])],
        # full is tried with SigLIP
        "vision_feature_select_strategy": [],
    },
    "LlamaConfig": OF_TEXT | HEAD | {"attention_bias": [Case(True)], "mlp_bias": [Case(True)]},
    "MistralConfig": OF_TEXT | HEAD,
    "Qwen2Config": OF_TEXT | HEAD,
    "CLIPVisionConfig": OF_TOWER,
    "SiglipVisionConfig": OF_TOWER,
}

# What another test of test_attributes.py is about.
BY_WINDOW = dict.fromkeys(
    ["use_sliding_window", "sliding_window", "max_window_layers", "layer_types"],
    "test_a_row_longer_than_the_window_is_refused",
)
BY_TEXT = {
    "attention_dropout": "test_attention_dropout_is_active_in_training_alone",
    "max_position_embeddings": "test_longest_row",
    "tie_word_embeddings": "test_tied_by_either_flag",
}
BY_PARTS = dict.fromkeys(["text_config", "vision_config"], "test_other_parts_are_refused")
BY_TOKENS = dict.fromkeys(
    ["image_token_id", "image_token_index", "vision_start_token_id", "vision_end_token_id"],
    "test_tokens_of_an_image",
)
ELSEWHERE = BY_WINDOW | BY_TEXT | BY_PARTS | BY_TOKENS

# ---- without effect ----

COMMON = {
    "architectures": ["Nonesuch"], "transformers_version": "4.45.0", "output_hidden_states": True,
    "problem_type": "regression", "id2label": {"0": "no"}, "label2id": {"no": 0},
    "is_encoder_decoder": True, "chunk_size_feed_forward": 2, "dtype": "float16",
    "output_attentions": True,
}
IDS = {"pad_token_id": 5, "bos_token_id": 6, "eos_token_id": 7}
OF_ANY_TEXT = COMMON | IDS | {"initializer_range": 0.5, "use_cache": False}
OF_ANY_TOWER = COMMON | {"attention_dropout": 0.5}
WITHOUT_EFFECT = {
    "Qwen2VLConfig": COMMON | {"video_token_id": 3},
    "Qwen2VLTextConfig": OF_ANY_TEXT,
    "Qwen2VLVisionConfig": COMMON | {"initializer_range": 0.5},
    "Qwen2_5_VLConfig": COMMON | {"video_token_id": 3},
    "Qwen2_5_VLTextConfig": OF_ANY_TEXT,
    "Qwen2_5_VLVisionConfig": COMMON | {"initializer_range": 0.5, "tokens_per_second": 9},
    "LlavaNextConfig": COMMON | {"image_seq_length": 99},
    "LlamaConfig": OF_ANY_TEXT | {"pretraining_tp": 2},
    "MistralConfig": OF_ANY_TEXT,
    "Qwen2Config": OF_ANY_TEXT,
    "CLIPVisionConfig": OF_ANY_TOWER
    | {"projection_dim": 7, "initializer_range": 0.5, "initializer_factor": 2.0},
    "SiglipVisionConfig": OF_ANY_TOWER | {"vision_use_head": False},
}

# ---- refused ----

EVERYWHERE = {
    "return_dict": [False],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "auto_map": [{"AutoModelForImageTextToText": "modeling.Model"}],
    "tie_last_hidden_states": [True],
    "is_causal": [False],
}
PER_LAYER = {"per_layer_config": [{"0": {"num_key_value_heads": 2}}]}
ROPES = [
    DEFAULT | {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    DEFAULT | {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
]
OF_ALL_TEXT = EVERYWHERE | PER_LAYER | {"rope_parameters": ROPES}
WINDOWS = {"layer_types": [["full_attention", "sliding_attention"]]}
QWEN_TEXT = OF_ALL_TEXT | WINDOWS | {
    "rope_parameters": [*(MROPE | rope for rope in ROPES), DEFAULT,
                        MROPE | {"mrope_section": [4, 4, 4]}],
    "head_dim": [16],
}
VISION = EVERYWHERE | {"is_causal": [True, False]}
QWEN_VISION = VISION | {
    "in_channels": [1],
    "rope_parameters": [{"rope_type": "axial", "rope_theta": 500.0}],
}
REFUSED = {
    "Qwen2VLConfig": VISION,
    "Qwen2VLTextConfig": QWEN_TEXT,
    "Qwen2VLVisionConfig": QWEN_VISION,
    "Qwen2_5_VLConfig": VISION,
    "Qwen2_5_VLTextConfig": QWEN_TEXT,
    "Qwen2_5_VLVisionConfig": QWEN_VISION | {"head_dim": [8]},
    "LlavaNextConfig": VISION | {
        "vision_feature_layer": [0, 4, -4, []], "vision_feature_select_strategy": ["full"]
    },
    "LlamaConfig": OF_ALL_TEXT,
    "MistralConfig": OF_ALL_TEXT
    | {"sliding_window": [0], "layer_types": [["full_attention", "full_attention"]]},
    "Qwen2Config": OF_ALL_TEXT | WINDOWS,
    "CLIPVisionConfig": VISION | {"num_channels": [1]},
    "SiglipVisionConfig": VISION | {"num_channels": [1]},
}


# ---- checkpoints ----


def changed(config, **changes):
    """A copy of a config.json with values at dotted names: text_config.hidden_size, say."""
    config = deepcopy(config)
    for name, value in changes.items():
        *places, last = name.split(".")
        part = config
        for place in places:
            part = part[place]
        part[last] = value
    return config


def write_checkpoint(folder, tokenizer_from, config):
    """A checkpoint with this config.json, beside tokenizer and template of another: its weights are
    drawn by their names, so those that two configurations share are the same."""
    shutil.copytree(tokenizer_from, folder)
    (folder / "model.safetensors").unlink()
    write_json(folder / "config.json", config)
    write_processors(folder, config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    weights = {name: draw(name, weight.shape) for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def draw(name, shape):
    """A weight, large enough that a wrong forward shows."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return drawn * (0.5 if "embed" in name else 1.5 / drawn[0].numel() ** 0.5)
    is_scale = name.endswith("weight") and ("norm" in name or "ln_q" in name)
    return 0.3 * drawn + is_scale


def write_processors(folder, config):
    """The image processor that fits a config.json."""
    path = folder / "preprocessor_config.json"
    image_processor = json.loads(path.read_text())
    tower = config["vision_config"]
    if config["model_type"] != "llava_next":
        unit = (tower["patch_size"] * tower["spatial_merge_size"]) ** 2
        write_json(path, image_processor | {
            "patch_size": tower["patch_size"], "merge_size": tower["spatial_merge_size"],
            "temporal_patch_size": tower["temporal_patch_size"],
            "size": {"shortest_edge": unit, "longest_edge": 6 * unit},
        })
        return
    size = tower["image_size"]
    write_json(path, image_processor | {
        "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size},
        "image_grid_pinpoints": config["image_grid_pinpoints"],
    })


def write_json(path, value):
    path.write_text(json.dumps(value))
