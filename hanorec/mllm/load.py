"""Load a checkpoint of the three families, and refuse what would be read wrongly."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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
from hanorec.mllm.backbone import FAMILIES, Backbone, use_segment_attention
from hanorec.mllm.sharding import divided
from hanorec.mllm.spellings import pixel_limits, read_config
from hanorec.mllm.template import choose_template

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types that a weight may have
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
        InputError: shard in a single process, not a checkpoint, another family, weights that are
            missing, too many, of other shapes or no floats, a tokenizer without an end token,
            without the image token, or of another model.
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
    tokenizer, image_processor, template = read_processors(path, model, max_pixels)
    check_tokenizer(path, model, tokenizer)
    use_segment_attention(model)
    model.requires_grad_(False).to(device).eval()
    family = model.config.model_type
    backbone = Backbone(str(path), family, model, tokenizer, image_processor, template)
    check_markers(backbone)
    return backbone


# ---- weights ----


def read_model(path: str, dtype: torch.dtype) -> nn.Module:
    """The checkpoint's model on the CPU, every weight of it from its files.

    InputError as in `load_backbone`.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").exists():
        raise InputError(
            f"{path}: no config.json in it, expected a checkpoint folder as save_pretrained writes "
            "it; check --model"
        )
    try:
        check_stored_types(folder)
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path,
            config=read_config(path),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **SAFE,
        )
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  Transformers raises whatever its code runs into
        raise InputError(
            f"{path}: cannot be loaded as an image-text model ({brief(error)}); expected a local "
            f"folder or a hub name of one of {', '.join(FAMILIES)}, with safetensors weights"
        ) from None
    family = model.config.model_type
    if family not in FAMILIES:
        raise InputError(f"{path}: model type {family!r}, expected one of {', '.join(FAMILIES)}")
    check_every_weight(path, loading)
    return model


def check_stored_types(folder: Path) -> None:
    """InputError where a weight in a local folder is stored in anything but plain floats.

    Transformers would read the codes of a quantised weight as its values. Only the files' headers
    are read.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no dict
                if not key.endswith((".weight", ".bias")):
                    continue
                stored = file.get_slice(key).get_dtype()
                if stored not in FLOATS:
                    raise InputError(
                        f"{path}: {key} is stored as {stored}, expected F64, F32, F16 or BF16; use "
                        "a checkpoint that is not quantised"
                    )


def check_every_weight(path: str, loading: dict[str, Any]) -> None:
    """InputError where files and model do not hold the same weights. loading: what Transformers
    says of it."""
    missing = sorted(loading["missing_keys"])
    if missing == ["lm_head.weight"]:
        raise InputError(
            f"{path}: lm_head.weight is missing, and config.json does not say that the embeddings "
            "serve as it (tie_word_embeddings), expected one of the two; copy the checkpoint again"
        )
    if missing:  # Transformers would draw them at random and only warn
        raise InputError(
            f"{path}: {len(missing)} weights are missing, e.g. {missing[0]}, expected a whole "
            "checkpoint; copy it again"
        )
    # Positions are computed, not learnt; old files hold them.
    computed = ("position_ids", "inv_freq")
    extra = sorted(key for key in loading["unexpected_keys"] if not key.endswith(computed))
    if extra:  # left out with a warning: perhaps layers that config.json lacks
        raise InputError(
            f"{path}: {len(extra)} weights have no place in the model that config.json describes, "
            f"e.g. {extra[0]}; expected config.json and weights of one checkpoint; copy both again"
        )


# ---- tokenizer and image processor ----


def read_processors(path: str, model: nn.Module, max_pixels: int) -> tuple[Any, Any, str | None]:
    """Tokenizer, image processor and chat template, if there is one: the processor's, which may be
    a file of its own, before the tokenizer's. Images are limited to max_pixels."""
    read = _llava_processors if model.config.model_type == "llava_next" else _qwen_processors
    try:
        return read(path, model, max_pixels)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  as in `read_model`
        raise InputError(
            f"{path}: its tokenizer or image processor cannot be loaded ({brief(error)}); copy "
            "tokenizer and preprocessor files of the same checkpoint beside the weights"
        ) from None


def _llava_processors(path: str, model: nn.Module, max_pixels: int) -> tuple[Any, Any, str | None]:
    """Tilings of at most max_pixels (at least the smallest one), the same in model and processor.
    """
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
    size = {"size": limits} if limits else {}
    image_processor = AutoImageProcessor.from_pretrained(path, **size, **SAFE)
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

    `hanorec.mllm.prompts.text_ids` keeps added tokens, and no others, out of untrusted text.
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
