"""Pictures of every package as 96-pixel squares on white."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.data.images import decode_image
from vlm.errors import DataError

SIDE = 96
MAX_SVG = 8 << 20
# An SVG may name files of this machine or addresses; only references inside the file itself stay.
_HREF = re.compile(rb"""(\b(?:xlink:)?href\s*=\s*)(["'])(?!\#|data:image/(?:png|jpeg|gif);)[^"']*\2""", re.IGNORECASE)
_IMPORT = re.compile(rb"@import[^;]*;|url\(\s*['\"]?(?!\#)[^)#]*\)", re.IGNORECASE)
_DOCTYPE = re.compile(rb"<!DOCTYPE[^\[>]*(\[.*?\]\s*)?>", re.DOTALL)
_ENTITY = re.compile(rb"""<!ENTITY\s+([\w.-]+)\s+["']([^"']*)["']\s*>""")


def render(path: Path, *, crop: bool = False) -> Image.Image:
    """The picture (RGB, 96 x 96) at `path` (SVG, PNG or WebP), centred, its shape kept.

    crop: cut the empty page around a drawing, all but a margin. Raises DataError when the picture can't be
    read or is blank on white.
    """
    content = path.read_bytes()
    if path.suffix != ".svg":
        image = decode_image(content, name=path.name)
    else:
        image = _from_svg(content, path.name, 6 * SIDE if crop else 2 * SIDE)
    if crop:
        image = _cropped(image)
    scale = SIDE / max(image.size)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    resized = image if image.size == inner else image.resize(inner, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((SIDE - inner[0]) // 2, (SIDE - inner[1]) // 2))
    low = int(np.asarray(canvas).min())
    if low > 235:
        raise DataError(f"{path.name}: blank on white")
    return canvas


def encode(image: Image.Image, quality: int = 85) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def harmless(svg: bytes) -> bytes:
    """An SVG without references out of itself, its own entities written out."""
    for doctype in _DOCTYPE.findall(svg):
        for name, value in _ENTITY.findall(doctype):
            if len(value) < 1000:
                svg = svg.replace(b"&" + name + b";", value)
    svg = _DOCTYPE.sub(b"", svg)
    return _IMPORT.sub(b"", _HREF.sub(rb"\1\2\2", svg))


def _cropped(image: Image.Image) -> Image.Image:
    """The part that isn't white, with a margin of 4 % of its longer side."""
    box = image.convert("L").point(lambda value: 255 if value < 250 else 0).getbbox()
    if box is None:
        return image
    margin = round(0.04 * max(box[2] - box[0], box[3] - box[1]))
    # Beyond the edge of the page `crop` would give black.
    left, top = max(0, box[0] - margin), max(0, box[1] - margin)
    return image.crop((left, top, min(image.width, box[2] + margin), min(image.height, box[3] + margin)))


def _from_svg(content: bytes, name: str, side: int) -> Image.Image:
    import resvg_py

    if len(content) > MAX_SVG:
        raise DataError(f"{name}: {len(content):,} bytes, expected an SVG of at most {MAX_SVG:,}")
    text = harmless(content).decode("utf-8", "replace")
    try:
        # Larger than needed, then a smooth reduction; forced, since an SVG may ask for 30,000 pixels.
        png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=side, height=side, dpi=96))
    except Exception as error:  # the binding raises its own kinds, ValueError and others
        raise DataError(f"{name}: the SVG can't be drawn ({error})") from error
    return decode_image(png, name=name)
