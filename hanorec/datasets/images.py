"""The images of items: found by listing a folder, checked on the header, read as upright RGB.

A data set from elsewhere must neither reach for other files of the machine nor fill its memory.
"""

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hanorec.base.errors import Fault, InputError, refuse, shown
from hanorec.datasets.lines import one_spelling

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Of images that are not read, a JPEG by a name of its own among them.
OTHER_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jxl", ".svg",
    ".tif", ".tiff",
)  # fmt: skip
MAX_BYTES = 32 * 2**20  # of an image file
MAX_PIXELS = 40_000_000  # decoded: 120 MB of RGB
MAX_ASPECT = 200  # longer to shorter side; Qwen's preprocessor takes no more


# Told of a folder, the names of files in it, and why they are ignored.
Ignored = Callable[[Path, Sequence[str], str], None]


def say_ignored(folder: Path, names: Sequence[str], why: str) -> None:
    """Count ignored files aloud, and name a few."""
    few = ", ".join(shown(name) for name in names[:3])
    rest = ", ..." if len(names) > 3 else ""
    print(f"note: {len(names)} files in {folder} are ignored, {why}: {few}{rest}")


def find_images(
    folder: Path,
    ids: Collection[str],
    fault: Fault = refuse,
    ignored: Ignored = say_ignored,
) -> dict[str, Path]:
    """Item id -> image file in `folder` whose stem is the id, in whichever spelling of Unicode.

    Other names are ignored, and those that look like images are counted aloud; a missing folder has
    none. `folder` itself may be a link.

    InputError: two files for one item, something that is no file, or a link that leads out of the
    folder.
    """
    found: dict[str, Path] = {}
    if not os.path.lexists(folder):
        return found
    if not folder.is_dir():
        fault(InputError(
            f"{folder}: a file or a broken link; "
            f"expected a folder of images, or nothing of that name"
        ))
        return found
    home = folder.resolve()
    spelt = {one_spelling(item): item for item in ids if not item.isascii()}
    unread: list[str] = []  # names with the suffix of another kind of image, or of none
    unknown: list[str] = []  # of no item
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        item, suffix = os.path.splitext(entry.name)
        if item not in ids:  # a file system may spell an accent in its own way
            item = spelt.get(one_spelling(item), item)
        if suffix.lower() not in IMAGE_SUFFIXES:
            if suffix.lower() in OTHER_SUFFIXES or entry.name in ids:
                unread.append(entry.name)
            continue
        if item not in ids:
            unknown.append(entry.name)
            continue
        path = folder / entry.name
        if not entry.is_file(follow_symlinks=False):
            try:
                check_entry(path, home)
            except InputError as error:
                fault(error)
        if item in found:
            fault(InputError(
                f"{path}: item {item!r} also has {found[item].name}; "
                f"expected one an item, so remove one"
            ))
            continue
        found[item] = path
    if unread:
        ignored(folder, unread, "no JPEG, PNG or WebP by their names; convert them")
    if unknown:
        ignored(folder, unknown, "of no item in the titles file")
    return found


def check_entry(path: Path, home: Path) -> None:
    """`path` is a file, and not a link out of `home`."""
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(home):
            raise InputError(
                f"{path}: a link to {target}, out of the image folder; "
                f"expected the image itself, so copy it there"
            )
    if not path.is_file():
        raise InputError(
            f"{path}: a broken link, a folder or a device; "
            f"expected an image file, so put it there or remove the entry"
        )


def read_image(path: Path) -> Image.Image:
    """An RGB image, upright by its EXIF tag, on white where transparent.

    InputError names a file that is too large, not whole, or not a still picture. The limits on
    bytes, pixels and frames are checked before anything is decoded.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); restore the image or remove the entry"
        ) from None
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes; expected at most {MAX_BYTES}, so shrink the image")
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            _check_header(path, image)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    # decoders raise OSError, SyntaxError, struct.error ... on broken files
    except Exception as error:  # noqa: BLE001
        raise InputError(
            f"{path}: not a whole JPEG, PNG or WebP image ({error}); replace the file"
        ) from None


def _check_header(path: Path, image: Image.Image) -> None:
    """Size, shape and number of frames, none of which needs the pixels."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{path}: {width} x {height} pixels; "
            f"expected at most {MAX_PIXELS} in all, so shrink the image"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{path}: {width} x {height} pixels; expected at most {MAX_ASPECT} times "
            f"as long as wide, so crop or replace the image"
        )
    # Which of its frames is the item's picture nobody said. MPO is a JPEG to which a camera added
    # previews: these are no frames.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise InputError(
            f"{path}: an animation; "
            f"expected a still image, so save the frame that shows the item"
        )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: keep the high byte, since convert() would clip everything above 255
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")
