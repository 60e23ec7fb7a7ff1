"""Settings of a checkpoint of which some values are refused: which are allowed, and why.

`hanorec.mllm.attributes` says where they stand. The rest of this package would compute the other
values otherwise than Transformers computes them, or Transformers itself fails on them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedConfig


class Only(NamedTuple):
    """Which values of a setting are allowed, in words too, and why no others."""

    allows: Callable[[Any, PreTrainedConfig], bool]  # a value, None if not set, and what has it
    expected: str
    why: str


def _absent(value: Any, config: PreTrainedConfig) -> bool:
    return value is None


def _part_of_width(value: Any, config: PreTrainedConfig) -> bool:
    heads = getattr(config, "num_heads", None) or config.num_attention_heads  # a tower's, a text's
    return value in (None, config.hidden_size // heads)


# ---- of any configuration ----

RETURN_DICT = Only(
    lambda value, config: value is not False, "true", "what modules return is taken by name"
)
QUANTIZATION = Only(_absent, "none", "use a checkpoint that is not quantised")
NOT_CAUSAL = Only(_absent, "none", "it would reach the attention of the vision tower")
LAST_STATES = Only(_absent, "none", "older versions of Transformers do not know it")


def _runs_no_code(value: Any, config: PreTrainedConfig) -> bool:
    return not any(name.startswith("AutoModel") for name in value or ())


AUTO_MAP = Only(
    _runs_no_code, "no model's",
    "code of a checkpoint never runs: take it out if the forward is Transformers' own all the same",
)
LAYERS = Only(_absent, "none", "layers are taken to be alike")
HEAD_WIDTH = Only(_part_of_width, "none", "the heads divide the width")

# ---- of a language model ----

CAUSAL = Only(lambda value, config: value in (None, True), "true", "a prompt is read in one order")
WINDOW = Only(
    lambda value, config: value is None or value > 0, "null or at least 1",
    "a token always sees itself",
)


def _layer_types(value: Any, config: PreTrainedConfig) -> bool:
    without_window = "sliding_attention" in value and config.sliding_window is None
    return set(value) <= {"full_attention", "sliding_attention"} and not without_window


LAYER_TYPES = Only(
    _layer_types, "full_attention, or sliding_attention with a sliding_window",
    "no other attention is known",
)
ONE_TYPE = Only(_absent, "none", "Transformers computes all layers of a Mistral alike")


def _rope(value: Any, config: PreTrainedConfig) -> bool:
    whole = value.get("partial_rotary_factor") in (None, 1)
    return whole and value.get("rope_type") in ("default", "linear", "dynamic", "yarn", "llama3")


def _mrope(value: Any, config: PreTrainedConfig) -> bool:
    half = config.hidden_size // config.num_attention_heads // 2
    return _rope(value, config) and sum(value.get("mrope_section", ())) == half


ROPE = Only(
    _rope, "rope_type default, linear, dynamic, yarn or llama3, and whole heads turned",
    "others depend on the rows beside a row, or on the version of Transformers",
)
MROPE = Only(
    _mrope, f"{ROPE.expected}, mrope_section with a sum of half a head", "as its three parts need"
)

# ---- of a vision tower ----

RGB = Only(lambda value, config: value == 3, "3", "images are RGB")


def _tower_rope(value: Any, config: PreTrainedConfig) -> bool:
    value = value or {}
    axial = value.get("rope_type", "axial") in ("axial", "default")
    return axial and value.get("rope_theta", 10000) == 10000


TOWER_ROPE = Only(
    _tower_rope, "axial with rope_theta 10000", "older versions of Transformers know no other"
)


def _feature_layer(value: Any, config: PreTrainedConfig) -> bool:
    depth = config.vision_config.num_hidden_layers
    layers = [value] if isinstance(value, int) else value
    return len(layers) > 0 and all(-depth <= layer <= depth and layer for layer in layers)


FEATURE_LAYER = Only(_feature_layer, "layers of the vision tower", "image features are theirs")


def _strategy(value: Any, config: PreTrainedConfig) -> bool:
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    return value == ("default" if has_class_token else "full")


STRATEGY = Only(
    _strategy, "default with a CLIP tower, full with a SigLIP tower",
    "the first has a class token to leave out, the other has none",
)
