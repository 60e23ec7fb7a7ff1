"""A checkpoint without its weights: what texts and images take in tokens, in a moment."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from hanorec.base.config import DataConfig
from hanorec.datasets.catalog import Catalog
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.load import check_family, reading, with_processors
from hanorec.mllm.spellings import read_config


def load_outline(path: str, max_pixels: int = 224 * 224) -> Backbone:
    """As `hanorec.mllm.load.load_backbone`, but the model has no weights and takes no memory.

    InputError as there, but for what is wrong with weights.
    """
    with reading(path), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(read_config(path))
    check_family(path, model)
    return with_processors(path, model, max_pixels)


def image_tokens(backbone: Backbone, width: int, height: int) -> int:
    """How many tokens an image of so many pixels takes, as image processor and model count them."""
    if backbone.family != "llava_next":
        processor = backbone.image_processor
        patches = processor.get_number_of_image_patches(height, width, {})  # None fails in 5.6
        return patches // processor.merge_size**2

    config = backbone.config
    tower = config.vision_config
    size = torch.tensor([[height, width]])
    tiles = image_size_to_num_patches(size[0], config.image_grid_pinpoints, tower.image_size)
    features = torch.zeros(tiles, (tower.image_size // tower.patch_size) ** 2, 1)
    packed, _ = backbone.model.model.pack_image_features(
        [features], size, config.vision_feature_select_strategy, torch.zeros(1)
    )
    return len(packed[0])


def outline_builder(
    backbone: Backbone,
    catalog: Catalog,
    sizes: Mapping[int, tuple[int, int]],
    config: DataConfig,
) -> PromptBuilder:
    """A builder of prompts whose images have as many features as they would have, each without a
    number in it, and Qwen's a grid that says no more than that there is one.

    sizes: catalogue row -> width and height of its image. An item that is not in it is shown
    without one.
    """
    grid = None if backbone.family == "llava_next" else torch.ones(3, dtype=torch.int64)

    @cache
    def of_size(size: tuple[int, int]) -> ImageFeatures:
        return ImageFeatures(torch.empty(image_tokens(backbone, *size), 0), grid)

    pictures = {row: of_size(size) for row, size in sizes.items()}
    images = tuple(path if row in sizes else None for row, path in enumerate(catalog.images))
    return PromptBuilder(backbone, replace(catalog, images=images), pictures, config)
