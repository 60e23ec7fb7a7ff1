"""Load a checkpoint of the three families, and refuse what would be read wrongly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

# Before 5.18 its name in transformers itself asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hanorec.base.distributed import rank, usable_device, world_size
from hanorec.base.errors import InputError, brief
from hanorec.mllm.attention import use_segment_attention
from hanorec.mllm.backbone import FAMILIES, Backbone
from hanorec.mllm.checks import (
    check_every_weight,
    check_image_text,
    check_patches,
    check_stored_types,
)
from hanorec.mllm.sharding import divided
from hanorec.mllm.spellings import has_older_processor, pixel_limits, read_config
from hanorec.mllm.template import choose_template

SAFE = {"trust_remote_code": False}


def load_backbone(
    path: str,
    dtype: str = "auto",
    device: str = "auto",
    max_pixels: int = 224 * 224,
    shard: bool = False,
) -> Backbone:
    """Load a checkpoint from a local folder or a hub name: safetensors only, never remote code, no
    torchvision.

    Args:
        dtype: float32, bfloat16, or auto = bfloat16 on a GPU and float32 elsewhere.
        device: cpu, cuda, or auto.
        max_pixels: an image is scaled down to at most so many pixels. Qwen: 784 pixels are one
            token, so 224 x 224 costs 64. LLaVA-NeXT cannot go below its tower's resolution;
            tilings above max_pixels are left out, the smallest is kept.
        shard: divide the language model's layers over the ranks (sharding.py), of which rank 0
            alone reads the weights.
    Raises:
        InputError: shard in a single process, not a checkpoint, another family, a setting that
            `hanorec.mllm.attributes` does not allow, weights that are missing, too many, of other
            shapes or no floats, a tokenizer without an end token, without the image token, or of
            another model.
    """
    device = str(usable_device(device))
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if shard and world_size() == 1:
        raise InputError(
            "--shard true in a single process: expected several, to divide the base over; start "
            "with torchrun, or leave it out"
        )
    numbers = getattr(torch, dtype)
    if shard:
        full = read_model(path, numbers) if rank() == 0 else None
        model = divided(full, path, numbers, torch.device(device))
    else:
        model = read_model(path, numbers)
    backbone = with_processors(path, model, max_pixels)
    use_segment_attention(model)
    model.requires_grad_(False).to(device).eval()
    return backbone


def with_processors(path: str, model: nn.Module, max_pixels: int) -> Backbone:
    """The backbone of a model, with what else its checkpoint holds."""
    tokenizer, image_processor, template = read_processors(path, model, max_pixels)
    check_tokenizer(path, model, tokenizer)
    family = model.config.model_type
    backbone = Backbone(str(path), family, model, tokenizer, image_processor, template)
    check_markers(backbone)
    check_image_text(path, tokenizer, template, backbone.image_text)
    return backbone


# ---- weights ----


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Whatever Transformers' code runs into, while it reads a model, becomes an InputError."""
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").exists():
        raise InputError(
            f"{path}: no config.json in it, expected a checkpoint folder as save_pretrained writes "
            "it; check --model"
        )
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001
        what = "" if folder.exists() else "no such folder, and by this name "
        raise InputError(
            f"{path}: {what}cannot be loaded as an image-text model ({brief(error)}); expected a "
            f"local folder or a hub name of one of {', '.join(FAMILIES)}, with safetensors weights"
        ) from None


def check_family(path: str, model: nn.Module) -> None:
    """InputError for a model that is none of the three."""
    family = model.config.model_type
    if family not in FAMILIES:
        raise InputError(f"{path}: model type {family!r}, expected one of {', '.join(FAMILIES)}")


def read_model(path: str, dtype: torch.dtype) -> nn.Module:
    """The checkpoint's model on the CPU, every weight of it from its files.

    InputError as in `load_backbone`.
    """
    with reading(path):
        check_stored_types(Path(path))
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path,
            config=read_config(path),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **SAFE,
        )
    check_family(path, model)
    check_every_weight(path, loading)
    return model


# ---- tokenizer and image processor ----


def read_processors(path: str, model: nn.Module, max_pixels: int) -> tuple[Any, Any, str | None]:
    """Tokenizer, image processor and chat template, if there is one: the processor's, which may be
    a file of its own, before the tokenizer's. Images are limited to max_pixels."""
    read = _llava_processors if model.config.model_type == "llava_next" else _qwen_processors
    try:
        return read(path, model, max_pixels)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  as in `reading`
        raise InputError(
            f"{path}: its tokenizer or image processor cannot be loaded ({brief(error)}); copy "
            "tokenizer and preprocessor files of the same checkpoint beside the weights"
        ) from None


def _llava_processors(path: str, model: nn.Module, max_pixels: int) -> tuple[Any, Any, str | None]:
    """Tilings of at most max_pixels, or the smallest (the first of several, on the hub that of two
    tiles side by side), the same in model and processor."""
    processor = AutoProcessor.from_pretrained(path, **SAFE)
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    template = choose_template(path, processor.chat_template, tokenizer)
    tilings = sorted(model.config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    kept = [size for size in tilings if size[0] * size[1] <= max_pixels] or tilings[:1]
    pinpoints = [list(size) for size in kept]
    model.config.image_grid_pinpoints = image_processor.image_grid_pinpoints = pinpoints
    return tokenizer, image_processor, template


def _qwen_processors(path: str, model: nn.Module, max_pixels: int) -> tuple[Any, Any, str | None]:
    """The parts of Qwen's processor: the whole needs torchvision, for video."""
    tokenizer = AutoTokenizer.from_pretrained(path, **SAFE)
    limits = pixel_limits(path)
    options: dict[str, Any] = {"size": limits} if limits else {}
    if has_older_processor(path):
        options["config"] = model.config  # then Transformers takes the family's, by whatever name
    image_processor = AutoImageProcessor.from_pretrained(path, **options, **SAFE)
    check_patches(path, image_processor, model.config.vision_config)
    unit = (image_processor.patch_size * image_processor.merge_size) ** 2  # pixels behind one token
    if max_pixels < unit:
        raise InputError(
            f"max_pixels = {max_pixels}: one token of {path} covers {unit} pixels; allow at least "
            "that many with --max-pixels"
        )
    own = image_processor.size  # both are areas, whatever their names say
    edges = ("shortest_edge", "longest_edge")
    image_processor.size = {edge: min(own[edge], max_pixels) for edge in edges}
    of_processor, _ = ProcessorMixin.get_processor_dict(path)
    template = choose_template(path, of_processor.get("chat_template"), tokenizer)
    return tokenizer, image_processor, template


def check_tokenizer(path: str, model: nn.Module, tokenizer: Any) -> None:
    """InputError where the tokenizer has no end token, or has tokens that the model lacks."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{path}: the tokenizer has no end token (eos_token), expected one; every answer ends "
            "with it: set eos_token in tokenizer_config.json to the model's end-of-turn token"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    image_token = model.config.image_token_id
    if len(tokenizer) > vocabulary or image_token >= len(tokenizer):
        raise InputError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, image token {image_token}, but "
            f"the model embeds {vocabulary}; expected tokenizer and model of one checkpoint"
        )


def check_markers(backbone: Backbone) -> None:
    """InputError where what stands for an image, or ends an answer, is no added token.

    Only added tokens can be kept out of untrusted text, as `hanorec.mllm.prompts.text_ids` does.
    """
    start, end = backbone.around_image()
    tokenizer = backbone.tokenizer
    for token in (*start, backbone.image_token, *end, tokenizer.eos_token_id):
        if token not in tokenizer.added_tokens_decoder:
            raise InputError(
                f"{backbone.path}: token {token} stands for an image or ends an answer, but to the "
                "tokenizer it is a part of a word, which titles may hold, or nothing; expected "
                "tokenizer and model of one checkpoint"
            )
