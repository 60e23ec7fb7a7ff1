"""The three MLLM families behind one small interface: load, image features, positions, forward.

All three are the same three steps, written out in `forward` and `image_features` below: a frozen vision tower turns each image
into a few vectors of the language model's width; they replace the placeholder tokens' embeddings; the language model runs. They
differ in how an image is preprocessed, which tokens surround it, and in positions (Qwen counts time, height and width apart).
"""

import os
import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from hanorec.distributed import rank, ranks
from hanorec.errors import InputError
from hanorec.lora import language_model
from hanorec.sharding import divided

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava_next")  # config.model_type
ATTENTION = "prompt_and_answers"  # the name under which Transformers is told of `segment_attention`


class Picture(NamedTuple):
    """What the language model sees of one image."""

    features: Tensor  # (n, d): n vectors of the language model's width
    grid: Tensor | None  # (3,) int64: patches in time, height, width (Qwen), else None


@dataclass
class Backbone:
    """A loaded checkpoint. `path` is what the user named; `template` is the chat template or None."""

    path: str
    family: str
    model: nn.Module
    tokenizer: Any
    image_processor: Any
    template: str | None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # the vision tower's may be another (sharding.py)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def width(self) -> int:
        """d, the width of the language model."""
        return self.config.text_config.hidden_size

    @property
    def context(self) -> int:
        """The longest row, in tokens, that the language model has positions for."""
        return self.config.text_config.max_position_embeddings

    @property
    def image_token(self) -> int:
        return self.config.image_token_id

    @cached_property
    def inside_tokens(self) -> re.Pattern:
        """Matches, with no width, after the first character of each added token that the tokenizer does not call special."""
        texts = [token.content for token in self.tokenizer.added_tokens_decoder.values() if not token.special]
        return re.compile("|".join(f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in texts if len(text) > 1) or "(?!)")

    def around_image(self) -> tuple[list[int], list[int]]:
        """The tokens before and after an image's placeholders."""
        if self.family == "llava_next":
            return [], []
        return [self.config.vision_start_token_id], [self.config.vision_end_token_id]


def usable_device(name: str) -> torch.device:
    """cpu, cuda (this process's own), or auto = cuda if there is one. InputError for a device that this machine does not have."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used ({_brief(error)}); expected cpu, or cuda on a machine with a GPU") from None


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
    if shard and ranks() == 1:
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


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _limit_tiles(model: nn.Module, image_processor: Any, max_pixels: int) -> None:
    """Keep LLaVA-NeXT's tilings of at most max_pixels (at least the smallest one), the same in model and processor."""
    tiles = sorted(model.config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    kept = [size for size in tiles if size[0] * size[1] <= max_pixels] or tiles[:1]
    model.config.image_grid_pinpoints = image_processor.image_grid_pinpoints = [list(size) for size in kept]


@torch.no_grad()
def image_features(backbone: Backbone, images: list[Image]) -> list[Picture]:
    """Run the frozen vision tower and its projector on a batch of RGB images. InputError where they or the image processor are broken."""
    try:
        inputs = backbone.image_processor(images=images, return_tensors="pt").to(backbone.device)
        grids = inputs.get("image_grid_thw")
        features = backbone.model.get_image_features(**inputs).pooler_output  # per image (n_i, d)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"{backbone.path}: its vision tower cannot take what its image processor makes ({_brief(error)}); expected "
                         "preprocessor_config.json and weights of one checkpoint; copy both again") from error
    if not all(f.isfinite().all() for f in features):
        raise InputError(f"{backbone.path}: image features hold NaN or infinity, expected finite numbers; look at image_mean and image_std in "
                         "preprocessor_config.json, at the vision tower's weights, or use --dtype float32")
    return [Picture(f.cpu(), None if grids is None else grids[i].cpu()) for i, f in enumerate(features)]


def prompt_positions(backbone: Backbone, ids: list[int], grids: list[Tensor | None]) -> Tensor:
    """Positions of a prompt without padding: (3, S) for Qwen (time, height, width), (1, S) for LLaVA-NeXT."""
    row = torch.tensor([ids])
    if backbone.family == "llava_next" or not grids:
        return torch.arange(len(ids)).expand(1 if backbone.family == "llava_next" else 3, -1)
    is_image = (row == backbone.image_token).int()
    return backbone.model.model.get_rope_index(row, mm_token_type_ids=is_image, image_grid_thw=torch.stack(grids))[0][:, 0]


def use_segment_attention(model: nn.Module) -> None:
    """Let the language model attend by `segment_attention`; the vision tower keeps its own."""
    AttentionInterface.register(ATTENTION, segment_attention)
    language_model(model).set_attn_implementation(ATTENTION)


def segment_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
                      dropout: float = 0.0, **_: Any) -> tuple[Tensor, None]:
    """Attention of [prompt | answer | answer ...] by segments, as Transformers' attention functions are called.

    query (B, heads, T, width of a head), key and value with as many heads or fewer, mask (B, 1, N, T) of the last N columns or None
    -> (B, T, heads, width). The prompt is causal and needs no mask: padding stands behind it, where none of its tokens looks. So the
    T x T mask of a packed row never exists, and half of the prompt's products are never computed.
    """
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=True)
    prompt = query.shape[2] - (0 if mask is None else mask.shape[2])  # P
    out = attend(query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], is_causal=True)
    if mask is not None:
        out = torch.cat([out, attend(query[:, :, prompt:], key, value, attn_mask=mask.to(query.dtype))], 2)
    return out.transpose(1, 2), None


def hidden_states(backbone: Backbone, ids: Tensor, positions: Tensor, mask: Tensor | None, pictures: Tensor) -> Tensor:
    """The language model's last hidden states: ids (B, T), positions (R, B, T), mask as in `segment_attention` (None: plainly causal,
    padding on the right), pictures (n, d) = the features of all images in the order of their placeholders -> (B, T, d).

    Raises ValueError where placeholders and features differ in number: they would silently shift.
    """
    x = backbone.model.get_input_embeddings()(ids)  # (B, T, d)
    here = ids == backbone.image_token  # (B, T)
    if int(here.sum()) != len(pictures):
        raise ValueError(f"{int(here.sum())} image placeholders, {len(pictures)} image features: expected as many")
    x = x.masked_scatter(here[..., None], pictures.to(x.device, x.dtype))
    positions = positions if len(positions) == 3 else positions[0]
    language = language_model(backbone.model)
    return language(inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
