"""Tiny checkpoints of the three families: the real architectures, small enough for a CPU.

    python -m hanorec.studies.tiny FAMILY OUT [--titles CATALOGUE_FOLDER]

They are saved as any checkpoint is and loaded by the same code. The tokenizer is a byte-level BPE
trained on the texts given, so it covers any text. The weights are drawn at random and know nothing:
such a checkpoint is for tests, or for `hanorec.studies.pretrain`.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
)

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder
from hanorec.datasets.catalog import load_catalog
from hanorec.mllm import prompts
from hanorec.mllm.backbone import FAMILIES

QWEN_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAVA_TOKENS = ["<s>", "</s>", "<image>"]

LLAVA_TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %}{{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
)

# 28 x 28 pixels, or two such tiles one above or beside the other.
LLAVA_TILES = [[28, 28], [28, 56], [56, 28]]


def train_tokenizer(
    texts: Iterable[str], special: list[str], vocabulary: int = 1024,
) -> Tokenizer:
    """Byte-level BPE: 256 bytes, the special tokens, and merges learnt from the texts.

    No text is unknown to it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=1, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # the words of the prompts whole, too
    frame = 200 * [
        prompts.HISTORY, prompts.WHICH, prompts.TITLE_ALONE, prompts.WHETHER, prompts.YES_OR_NO,
    ]
    tokenizer.train_from_iterator([*texts, *frame], trainer)
    return tokenizer


def make_checkpoint(
    family: str, out: Path, texts: Iterable[str], width: int = 64, layers: int = 2, seed: int = 0,
    context: int = 4096, vision_width: int = 32, vision_layers: int = 2, vocabulary: int = 1024,
) -> None:
    """Write a checkpoint of `family` with random weights: model, tokenizer, template, processor.

    One image is one token for the Qwen families at 32 x 32 pixels, and 4 + 4 + newlines for
    LLaVA-NeXT at 28 x 28. InputError for an unknown family.
    """
    if family not in FAMILIES:
        raise InputError(f"family {family!r}: expected one of {', '.join(FAMILIES)}")
    out = Path(out)
    torch.manual_seed(seed)
    qwen = family != "llava_next"
    bpe = train_tokenizer(texts, QWEN_TOKENS if qwen else LLAVA_TOKENS, vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>" if qwen else "</s>",
        pad_token="<|endoftext|>" if qwen else "</s>",
        model_max_length=context)
    tokenizer.chat_template = QWEN_TEMPLATE if qwen else LLAVA_TEMPLATE
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": max(1, width // 64),
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if qwen:
        config = _qwen_config(family, tokenizer, text, vision_width, vision_layers)
        processor = Qwen2VLImageProcessor(
            patch_size=16, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32})
    else:
        config = _llava_config(tokenizer, text, vision_width, vision_layers)
        image_processor = LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=LLAVA_TILES)
        processor = LlavaNextProcessor(
            image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE)

    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor.save_pretrained(out)


def _qwen_config(
    family: str, tokenizer: PreTrainedTokenizerFast, text: dict[str, Any],
    vision_width: int, vision_layers: int,
) -> Qwen2VLConfig | Qwen2_5_VLConfig:
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
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
    return kind(text_config=text, vision_config=vision, **ids, tie_word_embeddings=True)


def _llava_config(
    tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], vision_width: int, vision_layers: int,
) -> LlavaNextConfig:
    vision = CLIPVisionConfig(
        hidden_size=vision_width, intermediate_size=2 * vision_width,
        num_hidden_layers=vision_layers + 1, num_attention_heads=2, projection_dim=vision_width,
        image_size=28, patch_size=14)
    return LlavaNextConfig(
        text_config=LlamaConfig(**text), vision_config=vision, image_grid_pinpoints=LLAVA_TILES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4,
        tie_word_embeddings=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--titles", type=Path, help="a data set folder whose titles train the tokenizer")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = load_catalog(args.titles).titles if args.titles else []
    out = claim_folder(args.out)
    make_checkpoint(
        args.family, out, texts, args.width, args.layers, args.seed, vocabulary=args.vocabulary)
    print(f"wrote {args.out}: {args.family} with random weights")


if __name__ == "__main__":
    run(main)
