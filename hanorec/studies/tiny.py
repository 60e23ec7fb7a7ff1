"""Tiny checkpoints of the three families: the real architectures, small enough for a CPU.

    python -m hanorec.studies.tiny FAMILY OUT [--titles CATALOGUE_FOLDER]

They are saved as any checkpoint is and loaded by the same code. Tokenizer and chat template are of
the hub's shapes (`hanorec.studies.tiny_text`); the vocabulary is learnt from the texts given, and
bytes stand for what is not in it. The weights are drawn at random and know nothing: such a
checkpoint is for tests, or for `hanorec.studies.pretrain`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.tiny")
    result.add_argument("family", choices=["qwen2_vl", "qwen2_5_vl", "llava_next"])
    result.add_argument("out", type=Path)
    result.add_argument(
        "--titles", type=Path, help="a data set folder whose titles train the tokenizer")
    result.add_argument("--width", type=int, default=64)
    result.add_argument("--layers", type=int, default=2)
    result.add_argument("--vocabulary", type=int, default=1024)
    result.add_argument("--seed", type=int, default=0)
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
)

from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder
from hanorec.datasets.catalog import load_catalog
from hanorec.mllm.backbone import FAMILIES
from hanorec.studies.tiny_text import write_text_files

# 28 x 28 pixels, or two such tiles one above or beside the other.
LLAVA_TILES = [[28, 28], [28, 56], [56, 28]]

# The settings of LLaVA-NeXT's processor that stand beside its image processor's.
LLAVA_PROCESSOR = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "processor_class": "LlavaNextProcessor",
    "vision_feature_select_strategy": "default",
}


def make_checkpoint(
    family: str,
    out: Path,
    texts: Iterable[str],
    width: int = 64,
    layers: int = 2,
    seed: int = 0,
    context: int = 4096,
    vision_width: int = 32,
    vision_layers: int = 2,
    vocabulary: int = 1024,
    language: str = "mistral",
) -> None:
    """Write a checkpoint of `family` with random weights: model, tokenizer, template, processor.

    One image is one token for the Qwen families at 32 x 32 pixels, and 4 + 4 + newlines for
    LLaVA-NeXT at 28 x 28. language: which model LLaVA-NeXT speaks with, mistral or vicuna.
    InputError for an unknown family.
    """
    if family not in FAMILIES:
        raise InputError(f"family {family!r}: expected one of {', '.join(FAMILIES)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    shape = language if family == "llava_next" else family
    ids = write_text_files(shape, out, texts, vocabulary, context)
    text = {
        "vocab_size": 64 * (max(ids.values()) // 64 + 1),  # more than there are, as on the hub
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": max(1, width // 64),
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": ids.get("<s>"),
        "eos_token_id": ids["</s>" if family == "llava_next" else "<|im_end|>"],
    }
    if family == "llava_next":
        config = _llava_config(language, ids, text, vision_width, vision_layers)
        image_processor = LlavaNextImageProcessor(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=LLAVA_TILES,
        )
        (out / "processor_config.json").write_text(json.dumps(LLAVA_PROCESSOR, indent=2) + "\n")
    else:
        config = _qwen_config(family, ids, text, vision_width, vision_layers)
        image_processor = Qwen2VLImageProcessor(
            patch_size=16,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32},
        )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(out)
    image_processor.save_pretrained(out)


def _qwen_config(
    family: str, ids: dict[str, int], text: dict[str, Any], vision_width: int, vision_layers: int
) -> Qwen2VLConfig | Qwen2_5_VLConfig:
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    width = text["hidden_size"]
    head = width // text["num_attention_heads"]
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
    }
    vision = {
        "depth": vision_layers, "num_heads": 2,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }
    if family == "qwen2_5_vl":
        vision |= {
            "hidden_size": vision_width, "intermediate_size": 2 * vision_width,
            "out_hidden_size": width,
            "window_size": 64, "fullatt_block_indexes": [vision_layers - 1],
        }
        kind = Qwen2_5_VLConfig
    else:
        vision |= {"embed_dim": vision_width, "hidden_size": width, "mlp_ratio": 2}
        kind = Qwen2VLConfig
    return kind(text_config=text, vision_config=vision, **tokens, tie_word_embeddings=True)


def _llava_config(
    language: str, ids: dict[str, int], text: dict[str, Any], vision_width: int, vision_layers: int
) -> LlavaNextConfig:
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_hidden_layers=vision_layers + 1,
        num_attention_heads=2,
        projection_dim=vision_width,
        image_size=28,
        patch_size=14,
    )
    if language == "mistral":
        text_config = MistralConfig(**text, sliding_window=None)
    else:
        text_config = LlamaConfig(**text)
    return LlavaNextConfig(
        text_config=text_config,
        vision_config=vision,
        image_grid_pinpoints=LLAVA_TILES,
        image_token_index=ids["<image>"],
        image_seq_length=4,
        tie_word_embeddings=True,
    )


def main() -> None:
    args = parser().parse_args()
    texts = load_catalog(args.titles).titles if args.titles else []
    out = claim_folder(args.out)
    make_checkpoint(
        args.family, out, texts, args.width, args.layers, args.seed, vocabulary=args.vocabulary)
    print(f"wrote {args.out}: {args.family} with random weights")
