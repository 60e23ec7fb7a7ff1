"""What checkpoints state in more than one place or way: tied embeddings, the image processor's
name, limits on an image.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from hanorec.base.errors import InputError, shown
from hanorec.mllm.checks import check_attributes


def read_config(path: str) -> PreTrainedConfig:
    """config.json, tied where either of its two places says so.

    Transformers looks at the whole model's `tie_word_embeddings`; older files have it for the
    language model alone. Where both weights are stored and differ, it does not tie them.
    InputError where it has a setting that the table of `hanorec.mllm.attributes` does not allow.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    language = getattr(config, "text_config", None)
    if getattr(language, "tie_word_embeddings", False):
        config.tie_word_embeddings = True
    config.output_attentions = False  # no use is made of them, and a model with them is not saved
    check_attributes(path, config)
    return config


def has_older_processor(path: str) -> bool:
    """Whether the image processor has the name of early 2025, which Transformers no longer knows:
    it was the same as Qwen2-VL's, and is one with it since."""
    stated, _ = ImageProcessingMixin.get_image_processor_dict(path)
    return stated.get("image_processor_type") == "Qwen2_5_VLImageProcessor"


def pixel_limits(path: str) -> dict[str, int] | None:
    """What Qwen's image processor calls `size`: the least and the largest area of an image.

    They are called shortest_edge and longest_edge, or min_pixels and max_pixels, in `size` or
    beside it; what stands beside it counts first. None where nothing is stated: then Transformers'
    default holds. InputError where one of the two is missing, or no area.
    """
    stated, _ = ImageProcessingMixin.get_image_processor_dict(path)
    size = stated.get("size")
    if size is None and stated.get("min_pixels") is None and stated.get("max_pixels") is None:
        return None
    size = size if isinstance(size, dict) else {}
    limits = {}
    for edge, other in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        found = [stated.get(other), size.get(other), size.get(edge)]
        limits[edge] = next((value for value in found if value is not None), None)
    if not all(type(value) is int and value > 0 for value in limits.values()):
        raise InputError(
            f"{path}: preprocessor_config.json limits images by {_stated(stated)}, expected "
            "two areas in pixels, shortest_edge and longest_edge or min_pixels and max_pixels, in "
            "size; copy it from the same checkpoint again"
        )
    return limits


def _stated(stated: dict[str, Any]) -> str:
    names = [name for name in ("size", "min_pixels", "max_pixels") if name in stated]
    return ", ".join(f"{name} = {shown(stated[name])}" for name in names)
