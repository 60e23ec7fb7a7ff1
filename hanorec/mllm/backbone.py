"""The three MLLM families behind one small interface: image features, positions, hidden states.

All three are the same three steps, written out in `image_features` and `hidden_states`: a frozen
vision tower turns each image into a few vectors of the language model's width; they replace the
placeholder tokens' embeddings; the language model runs. They differ in how an image is
preprocessed, which tokens surround it, and in positions (Qwen counts time, height and width apart).
`hanorec.mllm.load` makes a `Backbone` from a checkpoint.
"""

import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hanorec.base.errors import InputError, brief
from hanorec.base.exhausted import is_exhausted
from hanorec.lora.layer import language_model
from hanorec.mllm.checks import window
from hanorec.mllm.template import Turn, is_marker, read_turn

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava_next")  # config.model_type


class ImageFeatures(NamedTuple):
    """What the language model sees of one image."""

    features: Tensor  # (n, d): n vectors of the language model's width
    grid: Tensor | None  # (3,) int64: patches in time, height, width (Qwen), else None

    def __repr__(self) -> str:
        return f"<ImageFeatures: {tuple(self.features.shape)}>"


@dataclass
class Backbone:
    """A loaded checkpoint. `path` is what the user named; `template` the chat template or None."""

    path: str
    family: str
    model: nn.Module
    tokenizer: Any
    image_processor: Any
    template: str | None

    def __repr__(self) -> str:
        name = Path(self.path).name
        return f"<Backbone {name}: {self.family}, {self.model.dtype}, {self.device}>"

    @property
    def device(self) -> torch.device:
        """The language model's. The vision tower's may be another one (sharding.py)."""
        return self.model.get_input_embeddings().weight.device

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def width(self) -> int:
        """d, the width of the language model."""
        return self.config.text_config.hidden_size

    @property
    def context(self) -> int:
        """The longest row, in tokens: what the language model has positions for, and no more than
        it sees at once, see `window`."""
        text = self.config.text_config
        return min(text.max_position_embeddings, window(text) or text.max_position_embeddings)

    @property
    def images_are_smallest(self) -> bool:
        """Whether fewer --max-pixels would change nothing: LLaVA-NeXT has one tiling left."""
        return self.family == "llava_next" and len(self.config.image_grid_pinpoints) == 1

    @cached_property  # asked for at every token
    def image_token(self) -> int:
        return self.config.image_token_id

    @cached_property
    def turn(self) -> Turn:
        """What the chat template writes around a question and its answer, as `read_turn` says."""
        return read_turn(self.path, self.tokenizer, self.template, self.vector_text)

    @cached_property
    def markers(self) -> dict[int, str]:
        """Token -> text of what opens or closes a turn or an image: titles must not have it."""
        start, end = self.around_image()
        always = {*start, self.image_token, *end, self.tokenizer.eos_token_id}
        found = {}
        for number, token in self.tokenizer.added_tokens_decoder.items():
            if number in always or is_marker(token, self.template):
                found[number] = token.content
        return found

    @cached_property
    def inside_markers(self) -> re.Pattern:
        """Matches, with no width, after the first character of each marker's text."""
        rests: dict[str, list[str]] = {}  # by first character: Llama 3 has 256 that begin with "<"
        for text in self.markers.values():
            if len(text) > 1:
                rests.setdefault(text[0], []).append(re.escape(text[1:]))
        places = [f"(?<={re.escape(first)})(?={'|'.join(rest)})" for first, rest in rests.items()]
        return re.compile("|".join(places) or "(?!)")  # (?!) never matches

    @cached_property
    def image_text(self) -> str:
        """What stands for an image in a prompt before it is tokenized, with a single placeholder.
        """
        start, end = self.around_image()
        return "".join(map(self._text, (*start, self.image_token, *end)))

    @cached_property
    def vector_text(self) -> str:
        """What stands in it for a vector that is no image: the placeholder alone."""
        return self._text(self.image_token)

    def _text(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token)

    def around_image(self) -> tuple[list[int], list[int]]:
        """The tokens before and after an image's placeholders."""
        if self.family == "llava_next":
            return [], []
        return [self.config.vision_start_token_id], [self.config.vision_end_token_id]


@torch.no_grad()
def image_features(backbone: Backbone, images: list[Image]) -> list[ImageFeatures]:
    """Run the frozen vision tower and its projector on a batch of RGB images.

    InputError where they or the image processor are broken.
    """
    try:
        inputs = backbone.image_processor(images=images, return_tensors="pt").to(backbone.device)
        grids = inputs.get("image_grid_thw")
        features = backbone.model.get_image_features(**inputs).pooler_output  # an image (n_i, d)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        if is_exhausted(error):
            raise
        raise InputError(
            f"{backbone.path}: its vision tower cannot take what its image processor makes "
            f"({brief(error)}); expected preprocessor_config.json and weights of one checkpoint; "
            "copy both again"
        ) from error
    if not all(f.isfinite().all() for f in features):
        raise InputError(
            f"{backbone.path}: image features hold NaN or infinity, expected finite numbers; look "
            "at image_mean and image_std in preprocessor_config.json, at the vision tower's "
            "weights, or use --dtype float32"
        )
    if grids is None:
        return [ImageFeatures(f.cpu(), None) for f in features]
    return [ImageFeatures(f.cpu(), grids[i].cpu()) for i, f in enumerate(features)]


def prompt_positions(backbone: Backbone, ids: list[int], grids: list[Tensor | None]) -> Tensor:
    """Positions of a prompt without padding, S tokens whose images have these grids.

    (3, S) for Qwen: time, height, width. (1, S) for LLaVA-NeXT. What has no grid is counted as text
    is; in one prompt all images of Qwen have one, or none has.
    """
    if backbone.family == "llava_next":
        return torch.arange(len(ids)).expand(1, -1)
    if all(grid is None for grid in grids):
        return torch.arange(len(ids)).expand(3, -1)
    row = torch.tensor([ids])
    is_image = (row == backbone.image_token).int()
    positions = backbone.model.model.get_rope_index(
        row, mm_token_type_ids=is_image, image_grid_thw=torch.stack(grids)
    )[0]  # (3, 1, S)
    return positions[:, 0]


def hidden_states(
    backbone: Backbone,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    pictures: Tensor,
) -> Tensor:
    """The language model's last hidden states.

    Args:
        ids: (B, T). positions: (R, B, T), R as in `prompt_positions`.
        mask: as in `hanorec.mllm.attention.segment_attention`; None: plainly causal, padding on the
            right.
        pictures: (n, d), the features of all images in the order of their placeholders, as many;
            `hanorec.mllm.collate.collate` counts them, where no device has to be waited for.
    Returns:
        (B, T, d).
    """
    x = backbone.model.get_input_embeddings()(ids)  # (B, T, d)
    here = ids == backbone.image_token  # (B, T)
    x = x.masked_scatter(here[..., None], pictures.to(x.device, x.dtype))
    positions = positions if len(positions) == 3 else positions[0]
    language = language_model(backbone.model)
    out = language(inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False)
    return out.last_hidden_state


def use_checkpointing(backbone: Backbone) -> None:
    """Recompute each layer's activations in backward.

    Not by the reentrant variant: it would lose the noise of NoDO.
    """
    model = backbone.model
    if is_compiled(model):
        # Around the graph: within it torch would decide what is computed again, and how it draws.
        for layer in language_model(model).layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # its name before Transformers 5.23
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # else the frozen embeddings would be given gradients


def is_compiled(model: nn.Module) -> bool:
    """Whether the layers have a `forward` of their own, as --compile gives them one."""
    return "forward" in vars(language_model(model).layers[0])
