"""Images that are odd but whole: what the package makes of them. Those that it refuses stand in the
corpus of test_bad_input.py.
"""

import socket
import struct
import zlib

import numpy as np
import pytest
from hostile import huge_png
from PIL import Image

from hanorec.base.errors import InputError
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.images import MAX_ASPECT, find_images, read_image
from hanorec.mllm.backbone import image_features


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colours, rows, *more):
    """A PNG by hand, for what Pillow does not write: `rows` are the bytes of each row, `more`
    chunks before the pixels.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(more)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def corners():
    """An upright picture whose four corners differ: (32, 48, 3)."""
    colours = np.array(
        [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[250, 250, 0], [0, 250, 250], [250, 0, 250]]],
        np.uint8,
    )
    return colours.repeat(16, 0).repeat(16, 1)


# What lies in the file for each value of the EXIF tag, so that the picture is upright once the tag
# is obeyed (EXIF 2.3, table of tag 0x0112).
STORED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_turns_and_mirrors(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](corners())))
    stored.save(
        tmp_path / f"a.{suffix}", exif=exif,
        **({"lossless": True} if suffix == "webp" else {"quality": 98, "subsampling": 0}),
    )
    found = np.asarray(read_image(tmp_path / f"a.{suffix}")).astype(int)
    assert found.shape == corners().shape
    assert np.abs(found - corners())[4::8, 4::8].max() <= (12 if suffix == "jpg" else 0)


def test_depths_and_modes(tmp_path):
    """One flat colour each; the expected RGB follows from the mode: the high byte of 16 bits, white
    behind what is clear.
    """
    cases = {
        "rgb16.png": (png(2, 1, 16, 2, [b"\x80\xff\x40\xff\x20\xff" * 2]), (0x80, 0x40, 0x20)),
        "grey16.png": (png(2, 1, 16, 0, [b"\x80\xff" * 2]), (0x80, 0x80, 0x80)),
        "grey_alpha16.png": (png(2, 1, 16, 4, [b"\x80\xff\xff\xff" * 2]), (0x80, 0x80, 0x80)),
        "grey_clear.png": (png(2, 1, 8, 4, [b"\x10\x00" * 2]), (255, 255, 255)),
        "bit.png": (png(8, 1, 1, 0, [b"\xff"]), (255, 255, 255)),
    }
    for name, (data, expected) in cases.items():
        (tmp_path / name).write_bytes(data)
        image = read_image(tmp_path / name)
        assert image.mode == "RGB", name
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1, name


def test_one_frame_is_no_animation_and_neither_is_a_preview(tmp_path):
    """A still image saved by an animating writer, and a camera's JPEG with a preview behind it
    (MPO), are read; the first is the picture.
    """
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    red.save(tmp_path / "still.webp", save_all=True, lossless=True)
    red.save(tmp_path / "still.png", save_all=True)
    red.save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=[blue])
    for name in ("still.webp", "still.png", "camera.jpg"):
        image = np.asarray(read_image(tmp_path / name)).astype(int)
        assert np.abs(image - (255, 0, 0)).max() <= 2, name
    with Image.open(tmp_path / "camera.jpg") as camera:
        # control: there is something to leave out
        assert camera.format == "MPO" and camera.n_frames == 2


def test_compressed_text_in_a_png_is_bounded(tmp_path):
    """A hundred megabytes of text behind a few hundred bytes: refused before they exist."""
    bomb = zlib.compress(bytes(100 * 2**20), 9)
    (tmp_path / "a.png").write_bytes(
        png(1, 1, 8, 2, [b"\1\2\3"], chunk(b"zTXt", b"Comment\0\0" + bomb))
    )
    assert (tmp_path / "a.png").stat().st_size < 2**18
    with pytest.raises(InputError, match="a.png: not a whole"):
        read_image(tmp_path / "a.png")


def test_links_inside_the_folder(tmp_path):
    """A link to another image of the folder is an image; `images` itself may be a link; a name that
    is no item's may be anything.
    """
    store = tmp_path / "store"
    store.mkdir()
    Image.new("RGB", (4, 4), "red").save(store / "1.png")
    (store / "2.png").symlink_to("1.png")
    (store / "other.png").symlink_to("/etc/passwd")
    (tmp_path / "images").symlink_to(store)
    found = find_images(tmp_path / "images", {"1", "2", "3"})
    assert sorted(found) == ["1", "2"] and read_image(found["2"]).size == (4, 4)


def test_ids_and_titles_reach_for_no_file_and_no_network(tmp_path, monkeypatch):
    """Ids that look like addresses or paths have no image, since images are found by listing the
    folder alone; titles are text.
    """
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "7.png")
    rows = [
        "../secret,A", f"{tmp_path}/secret,B", "http://example.com/a,C", "file:///etc/passwd,D",
        "7,http://example.com/a.png", "..,E", "7.png,F",
    ]
    (tmp_path / "X_titles.csv").write_text("\n".join(["item,title", *rows]) + "\n")
    catalog = load_catalog(tmp_path)
    assert [path and path.name for path in catalog.images] == [
        None, None, None, None, "7.png", None, None
    ]


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (MAX_ASPECT, 1), (1, MAX_ASPECT)])
def test_the_smallest_images_go_through_each_tower(backbone, tmp_path, size):
    """From one pixel to the longest thread that `read_image` lets through: finite features, and
    colour still tells.
    """
    found = []
    for colour in ("red", "blue"):
        Image.new("RGB", size, colour).save(tmp_path / "a.png")
        (picture,) = image_features(backbone, [read_image(tmp_path / "a.png")])
        assert len(picture.features) >= 1 and picture.features.isfinite().all()
        found.append(picture.features)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_header_alone_decides_on_size(tmp_path, monkeypatch):
    """The limits hold before a pixel is decoded: with decoding made impossible the messages are the
    same.
    """
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    (tmp_path / "a.png").write_bytes(huge_png(8000, 8000))
    with pytest.raises(InputError, match="8000 x 8000 pixels"):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(huge_png(8000, 10))
    with pytest.raises(InputError, match="at most 200 times"):
        read_image(tmp_path / "a.png")
