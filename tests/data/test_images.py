"""The decoder against every mode and format, hostile and broken pictures made here."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.data.images import FORMATS, SUFFIXES, ImageLimits, decode_image, load_image, picture_suffix
from vlm.errors import DataError


def gradient(width=12, height=8):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns * 20, rows * 30, columns * 5 + rows * 5], axis=2).astype(np.uint8)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixel(image, x=0, y=0):
    return np.array(image)[y, x].tolist()


def near(image, colour, x=0, y=0, by=6):
    return np.abs(np.array(pixel(image, x, y)) - np.array(colour)).max() <= by


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_comes_back(kind):
    options = {
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100},
        "JPEG": {"quality": 100, "subsampling": 0},
    }
    picture = decode_image(encoded(Image.fromarray(gradient()), kind, **options.get(kind, {})))
    assert picture.mode == "RGB" and picture.size == (12, 8)
    exact = kind in ("PNG", "WEBP", "BMP", "TIFF", "PPM")
    worst = np.abs(np.array(picture).astype(int) - gradient()).max()
    assert worst == 0 if exact else worst < 30


@pytest.mark.parametrize("kind", FORMATS)
def test_the_ending_of_every_format_is_one_that_shards_take(kind):
    ending = picture_suffix(encoded(Image.fromarray(gradient()), kind))
    assert f".{ending}" in SUFFIXES and ending in (kind.lower(), "jpg", "tif")


def test_no_picture_has_no_ending():
    with pytest.raises(DataError, match="not a picture of a known format"):
        picture_suffix(b"no picture")


def test_sources(tmp_path):
    content = encoded(Image.fromarray(gradient()), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with path.open("rb") as opened:
        pictures = [decode_image(source) for source in (content, path, str(path), io.BytesIO(content), opened)]
    assert all(np.array_equal(np.array(picture), gradient()) for picture in pictures)


def test_alpha_lies_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (255, 0, 0, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        out = decode_image(encoded(image, kind, **options))
        assert pixel(out) == [255, 255, 255] and pixel(out, 1, 1) == [255, 0, 0]
        assert near(out, [127, 127, 127], 2, 2)
    grey = Image.new("LA", (2, 2), (0, 0))
    assert pixel(decode_image(encoded(grey, "PNG"))) == [255, 255, 255]


def test_transparent_palette_and_colour_keys():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 0, 0, 255] + [0] * 762)
    image.putpixel((1, 1), 1)
    for kind in ("PNG", "GIF"):
        out = decode_image(encoded(image, kind, transparency=0))
        assert pixel(out) == [255, 255, 255] and pixel(out, 1, 1) == [0, 0, 255]
    keyed = encoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert pixel(decode_image(keyed)) == [255, 255, 255]
    assert pixel(decode_image(encoded(Image.new("L", (2, 2), 9), "PNG", transparency=9))) == [255, 255, 255]
    assert pixel(decode_image(encoded(image, "PNG"))) == [0, 0, 0]


def test_cmyk_grey_and_bilevel():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert near(decode_image(encoded(red, "JPEG", quality=100)), [255, 0, 0], by=20)
    assert pixel(decode_image(encoded(red, "TIFF"))) == [255, 0, 0]
    assert pixel(decode_image(encoded(Image.new("L", (3, 3), 77), "PNG"))) == [77, 77, 77]
    assert pixel(decode_image(encoded(Image.new("1", (3, 3), 1), "PNG"))) == [255, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits(kind):
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    out = np.array(decode_image(encoded(deep, kind)))
    assert out[0, :, 0].tolist() == [0, 100, 255] and (out[..., 0] == out[..., 2]).all()


def test_float_and_integer_grey():
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert np.array(decode_image(encoded(floats, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    wide = Image.fromarray(np.array([[-1000, 0, 1000]], dtype=np.int32))
    assert np.array(decode_image(encoded(wide, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    broken = Image.fromarray(np.array([[np.nan, np.inf]], dtype=np.float32))
    assert decode_image(encoded(broken, "TIFF")).mode == "RGB"


def test_exif_rotation_is_applied_once():
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to be upright
    out = decode_image(encoded(image, "PNG", exif=exif.tobytes()))
    assert np.array_equal(np.array(out), np.rot90(gradient(), -1))
    assert np.array_equal(np.array(load_image(out)), np.rot90(gradient(), -1))


def test_damaged_exif_leaves_the_picture():
    content = encoded(Image.fromarray(gradient()), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert decode_image(content).size == (12, 8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixel(decode_image(content)) == [255, 0, 0]


def test_one_pixel():
    assert decode_image(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).size == (1, 1)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A PNG that claims a size without holding it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [9_000, 10_000, 20_000, 2_000_000])
def test_too_many_pixels_are_refused_before_decoding(side):
    with pytest.raises(DataError, match=r"big\.png: .*limit"):
        decode_image(bomb(side, side), name="big.png")


def test_limits_are_settings(tmp_path):
    content = encoded(Image.fromarray(gradient()), "PNG")
    with pytest.raises(DataError, match="12 x 8 pixels"):
        decode_image(content, limits=ImageLimits(max_pixels=95))
    assert decode_image(content, limits=ImageLimits(max_pixels=96)).size == (12, 8)
    path = tmp_path / "long.png"
    path.write_bytes(content)
    for source in (content, path, io.BytesIO(content)):
        with pytest.raises(DataError, match="bytes"):
            decode_image(source, limits=ImageLimits(max_bytes=len(content) - 1))


def test_truncated_and_damaged():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        content = encoded(Image.fromarray(noise), kind)
        with pytest.raises(DataError, match=r"x\.pic: "):
            decode_image(content[: len(content) // 2], name="x.pic")
    with pytest.raises(DataError, match="truncated or damaged"):
        decode_image(bomb(50, 50))


def test_not_pictures(tmp_path):
    cases = {
        b"": "empty",
        b"hello": "not a picture of a known format",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>": "SVG",
        b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg></svg>": "SVG",
        b"\x1f\x8b\x08svgz": "gzip",
        b"<html><body>no</body></html>": "not a picture of a known format",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not a picture of a known format",
    }
    for content, message in cases.items():
        with pytest.raises(DataError, match=message):
            decode_image(content, name="f")
        path = tmp_path / "f.png"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            decode_image(path)
        assert "f.png" in str(caught.value)


def test_not_files(tmp_path):
    for source, message in (
        (tmp_path, "folder"),
        (tmp_path / "none.png", "no such file"),
        ("/dev/null", "not an ordinary file"),
        ("a\0b.png", "can't be read"),
        ("https://example.org/a.png", "download"),
    ):
        with pytest.raises(DataError, match=message):
            decode_image(source)
    with pytest.raises(DataError, match="rb"):
        decode_image(io.StringIO("text"))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), st.integers(0, 2**32))
def test_no_foreign_exception_leaves_the_decoder(kind, seed):
    rng = random.Random(seed)
    content = bytearray(encoded(Image.fromarray(gradient()), kind))
    for _ in range(rng.randint(1, 12)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    try:
        picture = decode_image(bytes(content[: rng.randint(1, len(content))]))
    except DataError:
        return
    assert picture.mode == "RGB"


def test_a_jpeg_is_decoded_smaller_when_asked():
    content = encoded(Image.new("RGB", (800, 600), "red"), "JPEG")
    small = decode_image(content, min_side=100)
    assert min(small.size) >= 100 and small.size == (200, 150)
    assert decode_image(content).size == (800, 600)
    assert decode_image(content, min_side=600).size == (800, 600)


def test_load_image_takes_pictures_and_arrays(tmp_path):
    rgb = gradient()
    for obj in (
        rgb,
        Image.fromarray(rgb),
        rgb.astype(np.float64) / 255,
        encoded(Image.fromarray(rgb), "PNG"),
    ):
        assert np.array_equal(np.array(load_image(obj)), rgb)
    assert load_image(rgb[:, :, 0]).mode == "RGB"
    assert pixel(load_image(rgb[:, :, :1]), 2) == [40, 40, 40]
    assert pixel(load_image(np.zeros((3, 3, 4), np.uint8))) == [255, 255, 255]
    assert pixel(load_image(np.ones((3, 3), bool))) == [255, 255, 255]
    source = Image.fromarray(rgb).convert("RGBA")
    load_image(source)
    assert source.mode == "RGBA"


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (np.zeros((3, 3, 2), np.uint8), "shape"),
        (np.zeros((0, 3, 3), np.uint8), "shape"),
        (np.zeros((3, 3, 3), np.float32) + 2, "0, 1"),
        (np.full((3, 3, 3), np.nan), "0, 1"),
        (np.zeros((3, 3, 3), np.int64), "int64"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_load_image_refuses_other_things(obj, message):
    with pytest.raises(DataError, match=message):
        load_image(obj)


def test_load_image_reports_a_lazy_truncated_picture():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    lazy = Image.open(io.BytesIO(content[: len(content) // 2]))
    with pytest.raises(DataError, match="truncated"):
        load_image(lazy)
