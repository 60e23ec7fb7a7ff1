"""Toy models and preference pairs for the benchmarks against peers: random weights, but the real
architectures and proportions.

One word is one token, so that texts (what TRL reads) and tokens (what hanorec packs) are the same
thing by construction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
)

from hanorec.lora.layer import LoRALinear, add_lora
from hanorec.mllm.attention import use_segment_attention
from hanorec.mllm.backbone import Backbone, ImageFeatures, image_features, prompt_positions
from hanorec.mllm.prompts import Row

SPECIAL = ["<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
EDGE, IMAGES = 224, 5  # pixels; 64 tokens an image
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class Example(NamedTuple):
    prompt: str
    answers: list[str]
    images: list[Image.Image]


@dataclass(frozen=True)
class Work:
    """What a step is made of. Layers as in Qwen2-0.5B / Qwen2.5-VL-3B, scaled to width 256: MLP 5.4
    x, two queries a key.
    """

    vision: bool = False
    vocabulary: int = 32_000
    prompt: int = 512
    prompts: int = 4
    width: int = 256
    layers: int = 6
    mlp: int = 1376
    heads: int = 4
    kv_heads: int = 2
    vision_width: int = 160
    vision_layers: int = 5
    images: int = IMAGES  # a prompt
    dtype: str = "float32"


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), vocabulary)]
    ids = {word: i for i, word in enumerate(words)}
    bare = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>")


def model(work: Work, device: str = "cpu") -> nn.Module:
    """Weights are large enough (0.05) for logits to differ from uniform: a difference between two
    sides then shows. device: where they are drawn.
    """
    dtype = getattr(torch, work.dtype)
    torch.manual_seed(0)
    text = {
        "vocab_size": work.vocabulary, "hidden_size": work.width, "intermediate_size": work.mlp,
        "num_hidden_layers": work.layers, "num_attention_heads": work.heads,
        "num_key_value_heads": work.kv_heads, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
        "initializer_range": 0.05,
    }
    if not work.vision:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(Qwen2Config(**text), dtype=dtype)
    half = work.width // work.heads // 2
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 10000.0,
        "mrope_section": [half // 4, 3 * half // 8, 3 * half // 8],
    }
    vision = {
        "depth": work.vision_layers, "hidden_size": work.vision_width,
        "intermediate_size": 8 * work.vision_width // 3, "num_heads": work.vision_width // 32,
        "out_hidden_size": work.width, "fullatt_block_indexes": [work.vision_layers - 1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=4,
        video_token_id=5, vision_start_token_id=2, vision_end_token_id=3,
    )
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": EDGE * EDGE, "longest_edge": EDGE * EDGE}
    )


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without its video part, which alone needs torchvision."""

    def __init__(
        self, image_processor: Qwen2VLImageProcessorPil, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        super().__init__(image_processor, tokenizer)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def examples(work: Work, lengths: list[int] | None = None) -> list[Example]:
    """Prompts with their answers, as texts. lengths: tokens of the answers, end token included;
    default two of 12.
    """
    draw = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(len(SPECIAL), work.vocabulary, n))

    made = []
    images = work.images if work.vision else 0
    text = work.prompt - images * (2 + (EDGE // 28) ** 2)  # tokens that are words
    for _ in range(work.prompts):
        sizes = [text // (images + 1)] * images  # words before each image; the rest comes last
        prompt = " ".join([*(f"{words(n)} {IMAGE}" for n in sizes), words(text - sum(sizes))])
        answers = [f" {words(n - 1)}<eos>" for n in lengths or [12, 12]]
        shown = []
        for _ in range(images):
            pixels = draw.integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8)
            shown.append(Image.fromarray(pixels))
        made.append(Example(prompt, answers, shown))
    return made


def encode(backbone: Backbone, made: list[Example]) -> dict[int, ImageFeatures]:
    """Features of every image, numbered through, a prompt's images in one batch."""
    found = []
    for example in made:
        if example.images:
            found += image_features(backbone, example.images)
    return dict(enumerate(found))


def load(
    work: Work, made: list[Example], device: str
) -> tuple[Backbone, list[Row], dict[int, ImageFeatures]]:
    """hanorec's side: the backbone, the rows that share one prompt among their answers, and every
    image's features, computed once.
    """
    loaded = model(work, "cpu" if work.dtype == "float32" else device)
    loaded.requires_grad_(False).to(device).eval()
    use_segment_attention(loaded)
    if not work.vision:
        loaded.config.image_token_id = -1
        loaded.config.text_config = loaded.config
    # which counts positions as a text model does
    family = "qwen2_5_vl" if work.vision else "llava_next"
    backbone = Backbone("toy", family, loaded, tokenizer(work.vocabulary), image_processor(), None)
    rows, pictures = [], encode(backbone, made)
    for n, example in enumerate(made):
        images = [n * work.images + i for i in range(len(example.images))]
        ids = []
        for token in backbone.tokenizer.encode(example.prompt):
            if images and token == backbone.image_token:
                ids += [token] * len(pictures[images[0]].features)
            else:
                ids.append(token)
        positions = prompt_positions(backbone, ids, [pictures[i].grid for i in images])
        answers = [backbone.tokenizer.encode(answer) for answer in example.answers]
        rows.append(Row(f"user {n}", ids, positions, images, answers))
    return backbone, rows, pictures


def busy_lora(policy: nn.Module, r: int, alpha: float = 32) -> list[LoRALinear]:
    """add_lora with both A and B drawn: a fresh adapter has B = 0, the loss would be ln 2 on any
    side, whatever it computes.
    """
    layers = add_lora(policy, r, alpha, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers:
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.02)
    return layers


def forward_flops(
    work: Work, lengths: Sequence[int] = (12, 12), rank: int = 0, backward: bool = False
) -> float:
    """The least that a pass over all prompts computes, two operations a multiply-add: each prompt
    once; causal attention, half of the square; the last layer beyond its keys and values, and the
    head, only where an answer is predicted; no gradients of frozen weights.
    """
    d, kv, S, N = work.width, work.width * work.kv_heads // work.heads, work.prompt, sum(lengths)
    T, L, sides = S + N, work.layers, 2 if backward else 1
    linears = L * T * 2 * d * kv + ((L - 1) * T + N) * (2 * d * d + 3 * d * work.mlp)
    attention = (
        2 * d * (L * sum(n * S + n * (n + 1) / 2 for n in lengths) + (L - 1) * S * (S + 1) / 2)
    )
    # inputs and outputs of q, k, v, o, gate, up, down
    lora = rank * L * T * (9 * d + 2 * kv + 3 * work.mlp)
    return 2 * work.prompts * (linears + sides * (attention + lora) + N * d * work.vocabulary)
