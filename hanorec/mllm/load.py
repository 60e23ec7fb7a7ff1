"""Load a checkpoint of the three families, and refuse what would be read wrongly."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from hanorec.base.distributed import rank, usable_device, world_size
from hanorec.base.errors import InputError
from hanorec.mllm.backbone import FAMILIES, Backbone, _brief, use_segment_attention
from hanorec.mllm.sharding import divided


def load_backbone(path: str, dtype: str = "auto", device: str = "auto", max_pixels: int = 224 * 224, shard: bool = False) -> Backbone:
    """Load a checkpoint from a local folder or a hub name: safetensors only, never remote code, no torchvision.

    Args:
        dtype: float32, bfloat16, or auto = bfloat16 on a GPU and float32 elsewhere. device: cpu, cuda, or auto.
        max_pixels: an image is scaled down to at most so many pixels. Qwen: 784 pixels are one token, so 224 x 224 costs 64.
            LLaVA-NeXT cannot go below its tower's resolution; tilings above max_pixels are left out, the smallest is kept.
        shard: divide the language model's layers over the ranks (sharding.py), of which rank 0 alone reads the weights.
    Raises:
        InputError: shard in a single process, not a checkpoint, another family, weights that are missing, too many, of other shapes or no floats, a tokenizer without
            an end token, without the image token, or of another model.
    """
    device = str(usable_device(device))
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    safe = {"trust_remote_code": False}
    if shard and world_size() == 1:
        raise InputError("--shard true in a single process: expected several, to divide the base over; start with torchrun, or leave it out")
    model = read_model(path, getattr(torch, dtype)) if not shard or rank() == 0 else None
    if shard:
        model = divided(model, path, getattr(torch, dtype), torch.device(device))
    family = model.config.model_type
    try:
        if family == "llava_next":
            processor = AutoProcessor.from_pretrained(path, **safe)
            tokenizer, image_processor = processor.tokenizer, processor.image_processor
            template = processor.chat_template or tokenizer.chat_template
            _limit_tiles(model, image_processor, max_pixels)
        else:  # Qwen's own processor needs torchvision, for video; its parts do not
            tokenizer = AutoTokenizer.from_pretrained(path, **safe)
            image_processor = AutoImageProcessor.from_pretrained(path, **safe)
            template = tokenizer.chat_template
            unit = (image_processor.patch_size * image_processor.merge_size) ** 2  # pixels behind one token
            if max_pixels < unit:
                raise InputError(f"max_pixels = {max_pixels}: one token of {path} covers {unit} pixels; allow at least that many")
            own = image_processor.size  # both are areas, whatever their names say
            image_processor.size = {edge: min(own[edge], max_pixels) for edge in ("shortest_edge", "longest_edge")}
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  as above
        raise InputError(f"{path}: its tokenizer or image processor cannot be loaded ({_brief(error)}); "
                         "copy tokenizer and preprocessor files of the same checkpoint beside the weights") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no end token (eos_token), expected one; every answer ends with it: "
                         "set eos_token in tokenizer_config.json to the model's end-of-turn token")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary or model.config.image_token_id >= len(tokenizer):
        raise InputError(f"{path}: the tokenizer has {len(tokenizer)} tokens, image token {model.config.image_token_id}, but the model "
                         f"embeds {vocabulary}; expected tokenizer and model of one checkpoint")
    use_segment_attention(model)
    model.requires_grad_(False).to(device).eval()
    backbone = Backbone(str(path), family, model, tokenizer, image_processor, template)
    start, end = backbone.around_image()
    for token in (*start, backbone.image_token, *end, tokenizer.eos_token_id):  # `text_ids` keeps added tokens out of untrusted text
        if token not in tokenizer.added_tokens_decoder:
            raise InputError(f"{path}: token {token} stands for an image or ends an answer, but to the tokenizer it is a part of a word, which titles "
                             "may hold, or nothing; expected tokenizer and model of one checkpoint")
    return backbone


def read_model(path: str, dtype: torch.dtype) -> nn.Module:
    """The checkpoint's model on the CPU, every weight of it from its files. InputError as in `load_backbone`."""
    if (looks_local := Path(path).expanduser()).exists() and not (looks_local / "config.json").exists():
        raise InputError(f"{path}: no config.json in it, expected a checkpoint folder as save_pretrained writes it; check --model")
    try:
        check_stored_types(looks_local)
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  on files that do not fit Transformers raises whatever its code runs into
        raise InputError(f"{path}: cannot be loaded as an image-text model ({_brief(error)}); expected a local folder or a "
                         f"hub name of one of {', '.join(FAMILIES)}, with safetensors weights") from None
    family = model.config.model_type
    if family not in FAMILIES:
        raise InputError(f"{path}: model type {family!r}, expected one of {', '.join(FAMILIES)}")
    if missing := sorted(loading["missing_keys"]):  # Transformers would draw them at random and only warn
        raise InputError(f"{path}: {len(missing)} weights are missing, e.g. {missing[0]}, expected a whole checkpoint; copy it again")
    # Transformers would leave them out and only warn: perhaps layers that config.json lacks. Positions are computed, not learnt; old files hold them.
    if extra := sorted(key for key in loading["unexpected_keys"] if not key.endswith(("position_ids", "inv_freq"))):
        raise InputError(f"{path}: {len(extra)} weights have no place in the model that config.json describes, e.g. {extra[0]}; expected config.json "
                         "and weights of one checkpoint; copy both again")
    return model


def check_stored_types(folder: Path) -> None:
    """InputError where a weight in a local folder is stored in anything but plain floats: Transformers would read the codes of a quantised
    weight as its values. Only the files' headers are read."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no dict
                if key.endswith((".weight", ".bias")) and (stored := file.get_slice(key).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                    raise InputError(f"{path}: {key} is stored as {stored}, expected F64, F32, F16 or BF16; use a checkpoint that is not quantised")


def _limit_tiles(model: nn.Module, image_processor: Any, max_pixels: int) -> None:
    """Keep LLaVA-NeXT's tilings of at most max_pixels (at least the smallest one), the same in model and processor."""
    tiles = sorted(model.config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    kept = [size for size in tiles if size[0] * size[1] <= max_pixels] or tiles[:1]
    model.config.image_grid_pinpoints = image_processor.image_grid_pinpoints = [list(size) for size in kept]
