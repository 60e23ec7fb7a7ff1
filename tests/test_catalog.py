"""The catalogue: what is read, and that each kind of bad input names the file, the line, the value
and the remedy.
"""

import numpy as np
import pytest
from hostile import huge_png
from PIL import Image

from hanorec.base.errors import InputError
from hanorec.datasets import images
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.images import read_image


def titles(folder, data, name="Toy_titles.csv"):
    (folder / name).write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return folder


def message(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    return str(caught.value)


def picture(path, colour=(200, 30, 60), size=(4, 3)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_reads_bom_crlf_quotes_and_images(tmp_path):
    titles(
        tmp_path,
        '\ufeffitem,title\r\n7,"Good, the Bad, The"\r\nx9,Café\r\n7b,"Say ""hi"""\r\n8,Café\r\n',
    )
    picture(tmp_path / "images" / "x9.PNG")
    picture(tmp_path / "images" / "7b.jpeg")
    picture(tmp_path / "images" / "unknown.jpg")  # no item of that id: not an error
    (tmp_path / "images" / "8.txt").write_text("not an image")
    items = load_catalog(tmp_path)
    assert items.ids == ("7", "x9", "7b", "8")
    # equal titles are two items
    assert items.titles == ("Good, the Bad, The", "Café", 'Say "hi"', "Café")
    assert [path and path.name for path in items.images] == [None, "x9.PNG", "7b.jpeg", None]
    assert items.row == {"7": 0, "x9": 1, "7b": 2, "8": 3}
    assert (items.name, items.covers) == ("Toy", "real")


def test_titles_are_the_text_they_are_in_one_spelling(tmp_path):
    """"nan" and "NA" are titles; two spellings of one text are one text; other letters stay."""
    rows = ["nan", "NA", "None", "Café", "Cafe\u0301", "ﬁn", "②", "\u00a0A\u200d"]
    titles(tmp_path, "item,title\n" + "".join(f"{n},{row}\n" for n, row in enumerate(rows)))
    found = load_catalog(tmp_path).titles
    assert found == ("nan", "NA", "None", "Café", "Café", "ﬁn", "②", "A\u200d")
    assert rows[3] != rows[4]


def test_images_that_are_not_read_are_told(tmp_path, capsys):
    """Other kinds of images, images without a suffix, and images of no item are counted and named;
    what is no image is not.
    """
    titles(tmp_path, "item,title\n1,A\n2,B\n3,C\n4,D\n")
    folder = tmp_path / "images"
    picture(folder / "1.png")
    load_catalog(tmp_path)
    assert capsys.readouterr().out == ""
    for name in ("2.gif", "3.TIFF", "4", "9.bmp", "notes.txt", ".DS_Store", "1.json"):
        (folder / name).write_bytes(b"x")
    picture(folder / "0001.png")
    assert [path and path.name for path in load_catalog(tmp_path).images] == [
        "1.png", None, None, None
    ]
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        f"note: 4 files in {folder} are ignored, no JPEG, PNG or WebP by their names; convert "
        "them: '2.gif', '3.TIFF', '4', ..."
    )
    assert second == (
        f"note: 1 files in {folder} are ignored, of no item in the titles file: '0001.png'"
    )


def test_an_image_is_found_in_either_spelling_of_its_id(tmp_path):
    """Some file systems spell an accent apart; two files for one id are still an error."""
    titles(tmp_path, "item,title\nété,A\n")
    picture(tmp_path / "images" / "e\u0301te\u0301.png")
    (found,) = load_catalog(tmp_path).images
    assert found.name == "e\u0301te\u0301.png"
    picture(tmp_path / "images" / "été.jpg")
    assert "one an item" in message(load_catalog, tmp_path)


def test_dataset_json_and_its_absence(tmp_path):
    titles(tmp_path, "item,title\n1,A\n")
    assert (load_catalog(tmp_path).name, load_catalog(tmp_path).covers) == ("Toy", "none")
    picture(tmp_path / "images" / "1.jpg")
    (tmp_path / "dataset.json").write_text('{"name": "Other", "covers": "drawn"}')
    assert (load_catalog(tmp_path).name, load_catalog(tmp_path).covers) == ("Other", "drawn")
    (tmp_path / "dataset.json").write_text('{"covers": "none"}')
    text = message(load_catalog, tmp_path)
    assert "dataset.json" in text and "'none'" in text and "mend" in text
    (tmp_path / "dataset.json").write_text('{"covers": "painted"}')
    assert "'painted'" in message(load_catalog, tmp_path)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("id,title\n1,A\n", [":1:", "'id,title'", "expected 'item,title'", "mend"]),
        ("item,title\n1,A\n2,B\n1,C\n", [":4:", "'1'", "line 2", "remove one"]),
        ("item,title\n1,A\n2,  \n", [":3:", "'2'", "empty title", "add one"]),
        ("item,title\n,A\n", [":2:", "''", "item id"]),
        ("item,title\n1 2,A\n", [":2:", "'1 2'", "without spaces"]),
        ("item,title\n1,A\n2,B, C\n", [":3:", "3 fields", "expected 2", "double quotes"]),
        ("item,title\n1,A\n\n2,B\n", [":3:", "0 fields", "expected 2"]),
        ("item,title\n1,A\n2,B\0C\n", [":3:", "NUL", "remove"]),
        ("item,title\n1,A\n2,A\x9b2JB\n", [":3:", r"'\x9b'", "position 4", "remove"]),
        ("item,title\n1,A\x85\n", [":2:", r"'\x85'", "position 4", "remove"]),
        ("item,title\n1,A\u2028B\n", [":2:", r"'\u2028'", "position 4"]),
        ("item,title\n1,A\u2029\n", [":2:", r"'\u2029'", "position 4"]),
        (b"item,title\n1,A\n2,Caf\xe9\n", [":3:", "0xe9", "position 6", "utf-8"]),
        ('item,title\n1,A\n2,"B\n3,C\n4,"D"\n', [":3:", "not csv", "close the quotes"]),
        ('item,title\n1,A\n2,"B\nC"\n', [":3:", "line 4", "remove the break"]),
        ('item,title\n1,"A" B\n', [":2:", "not csv", "double those inside"]),
        ("item,title\n", ["no items", "expected"]),
    ],
)
def test_bad_titles_name_file_line_value_and_remedy(tmp_path, data, parts):
    text = message(load_catalog, titles(tmp_path, data))
    assert "Toy_titles.csv" in text
    for part in parts:
        assert part in text, text


def test_exactly_one_titles_file_and_one_image(tmp_path):
    assert "no file *_titles.csv" in message(load_catalog, tmp_path)
    assert "not a folder" in message(load_catalog, tmp_path / "absent")
    titles(tmp_path, "item,title\n1,A\n")
    titles(tmp_path, "item,title\n1,A\n", "Second_titles.csv")
    text = message(load_catalog, tmp_path)
    assert "Second_titles.csv, Toy_titles.csv" in text and "move" in text
    (tmp_path / "Second_titles.csv").unlink()
    load_catalog(tmp_path)
    picture(tmp_path / "images" / "1.jpg")
    picture(tmp_path / "images" / "1.png")
    text = message(load_catalog, tmp_path)
    assert "1.png" in text and "1.jpg" in text and "remove one" in text


def test_read_image_modes(tmp_path):
    """Each file is one flat colour, so that the expected RGB follows from the mode alone."""
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 51))  # black at 20 % on white: 255 * 0.8 = 204
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    keyed = palette.copy()
    keyed.info["transparency"] = 1
    deep = Image.fromarray(np.full((2, 2), 0x80FF, dtype=np.uint16))  # high byte 0x80
    cases = {
        "clear.png": (clear, (255, 255, 255)),
        "half.png": (half, (204, 204, 204)),
        "half.webp": (half, (204, 204, 204)),
        "palette.png": (palette, (10, 20, 30)),
        "keyed.png": (keyed, (255, 255, 255)),
        "grey.png": (Image.new("L", (2, 2), 90), (90, 90, 90)),
        "deep.png": (deep, (128, 128, 128)),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),  # no cyan = red
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        result = read_image(tmp_path / name)
        assert result.mode == "RGB", name
        assert np.abs(np.asarray(result).astype(int) - expected).max() <= 2, name


def test_read_image_applies_exif_rotation(tmp_path):
    """Orientation 6 = the camera was turned: a 4 x 2 file shows as 2 x 4, with its left column on
    top.
    """
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    result = read_image(tmp_path / "turned.jpg")
    assert result.size == (16, 32)
    assert result.getpixel((8, 4))[0] > 200 and result.getpixel((8, 28))[2] > 200


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
# past our limit; past Pillow's warning; past Pillow's error
@pytest.mark.parametrize("width", [8000, 12000, 100000])
def test_read_image_refuses_too_many_pixels(tmp_path, width):
    (tmp_path / "huge.png").write_bytes(huge_png(width, 8000))
    text = message(read_image, tmp_path / "huge.png")
    assert "huge.png" in text and "pixels" in text


def test_read_image_refuses_bad_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png", "a.webp"):
        noise.save(tmp_path / name)
        read_image(tmp_path / name)  # whole: fine
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        text = message(read_image, tmp_path / name)
        assert name in text and "replace" in text
    noise.save(tmp_path / "g.gif")
    (tmp_path / "g.gif").rename(tmp_path / "g.jpg")  # a GIF under another name
    assert "g.jpg" in message(read_image, tmp_path / "g.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert "empty.jpg" in message(read_image, tmp_path / "empty.jpg")
    assert "absent.jpg" in message(read_image, tmp_path / "absent.jpg")
    noise.save(tmp_path / "big.png")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    text = message(read_image, tmp_path / "big.png")
    assert "big.png" in text and "at most 100" in text
