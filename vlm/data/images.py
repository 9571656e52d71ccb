"""The one decoder for pictures from outside: bounded, first frame, RGB on white; failures are DataErrors."""

from __future__ import annotations

import io
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, features

from vlm.errors import DataError

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"] + (["AVIF"] if features.check("avif") else [])
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
)
# catch_warnings changes the whole process: only one thread may be inside.
_OPENING = threading.Lock()


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may ask of this machine, checked before its pixels are decoded."""

    max_bytes: int = 64 * 2**20
    """Encoded size, in bytes."""

    max_pixels: int = 64_000_000
    """Width times height: 64 million take 192 MB as RGB."""


DEFAULT_LIMITS = ImageLimits()


def decode_image(
    source: bytes | Path | str | BinaryIO,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str = "",
    min_side: int | None = None,
) -> Image.Image:
    """Decode an encoded picture to RGB: EXIF rotation applied, alpha on white, first frame of an animation.

    source: the file's bytes, its path, or an open binary file. name: what messages call it.
    min_side: a JPEG may be decoded at a smaller scale (faster) whose shorter side is still at least this.
    Raises DataError for anything that isn't a whole picture of a known format within `limits`.
    """
    content, name = read_encoded(source, limits, name)
    if not content:
        raise DataError(f"{name}: empty file (0 bytes), expected a picture", reason="damaged")
    if len(content) > limits.max_bytes:
        raise _too_long(name, limits)
    try:
        image = _open(content)
        _check_size(image, limits, name)
        if min_side is not None and image.format == "JPEG":
            image.draft(None, (min_side, min_side))
        image.load()
        return to_rgb(image)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"{name}: more pixels than the limit of {limits.max_pixels:,}: shrink it"
        raise DataError(message, reason="pixels") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{name}: {_unknown(content)}", reason="format") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise DataError(f"{name}: the picture is truncated or damaged ({error})", reason="damaged") from error


def load_image(obj: Any, *, limits: ImageLimits = DEFAULT_LIMITS, name: str = "") -> Image.Image:
    """RGB picture from a path, encoded bytes, an open binary file, a PIL picture or a numpy array.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), either uint8 or floats in [0, 1].
    Raises DataError when it can't be one.
    """
    if isinstance(obj, Image.Image):
        name = name or str(getattr(obj, "filename", "") or "the picture")
        _check_size(obj, limits, name)
        try:
            obj.load()
            return to_rgb(obj.copy())
        except Exception as error:
            raise DataError(f"{name}: the picture is truncated or damaged ({error})") from error
    if isinstance(obj, np.ndarray):
        return _from_array(obj, limits, name or "the array")
    if isinstance(obj, bytes | bytearray | str | os.PathLike) or hasattr(obj, "read"):
        return decode_image(obj, limits=limits, name=name)  # type: ignore[arg-type]
    kind = type(obj).__name__
    raise DataError(f"expected a picture as path, bytes, PIL image or numpy array, got {kind}")


def picture_suffix(content: bytes) -> str:
    """The ending, without a dot, of a file that holds this encoded picture. Raises DataError for no known format."""
    try:
        kind = str(_open(content).format).lower()
    except Exception as error:  # as in `decode_image`
        raise DataError(f"the picture: {_unknown(content)}", reason="format") from error
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)  # mpo: a JPEG with a second picture


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of a loaded picture of any mode, upright and on white."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged EXIF says nothing about the pixels
        image.getexif().clear()
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode in ("I", "F") or mode.startswith("I;"):
        image = _from_deep(image)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def read_encoded(
    source: bytes | Path | str | BinaryIO, limits: ImageLimits = DEFAULT_LIMITS, name: str = ""
) -> tuple[bytes, str]:
    """The encoded bytes of a picture and what to call it; a file over the limit is refused before reading."""
    if isinstance(source, bytes | bytearray):
        return bytes(source), name or "the picture"
    if isinstance(source, str | os.PathLike):
        if str(source).startswith(("http://", "https://")):
            raise DataError(f"{source}: addresses aren't fetched, download the picture and give its path")
        path = Path(source)
        name = name or str(path)
        try:
            if path.is_dir():
                raise DataError(f"{name}: is a folder, expected a picture file")
            if path.exists() and not path.is_file():
                raise DataError(f"{name}: not an ordinary file, expected a picture")
            if path.stat().st_size > limits.max_bytes:
                raise _too_long(name, limits)
            return path.read_bytes(), name
        except FileNotFoundError as error:
            raise DataError(f"{name}: no such file") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: can't be read ({getattr(error, 'strerror', '') or error})") from error
    name = name or str(getattr(source, "name", "") or "the picture")
    try:
        content = source.read(limits.max_bytes + 1)
    except Exception as error:
        raise DataError(f"{name}: can't be read ({error})") from error
    if not isinstance(content, bytes):
        raise DataError(f"{name}: opened as text, open it with mode 'rb'")
    return content, name


def _open(content: bytes) -> Image.Image:
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(content), formats=FORMATS)


def _check_size(image: Image.Image, limits: ImageLimits, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name}: has no pixels ({width} x {height})", reason="damaged")
    if width * height > limits.max_pixels:
        message = f"{name}: {width:,} x {height:,} pixels, over the limit of {limits.max_pixels:,}: shrink it"
        raise DataError(message, reason="pixels")


def _too_long(name: str, limits: ImageLimits) -> DataError:
    return DataError(f"{name}: larger than the limit of {limits.max_bytes:,} bytes: shrink it", reason="bytes")


def _unknown(content: bytes) -> str:
    head = content[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"<" and (b"<svg" in head.lower() or b"svg" in head[:200].lower()):
        return "an SVG drawing, which isn't decoded here: render it to PNG first (for example with resvg)"
    if head[:2] == b"\x1f\x8b":
        return "compressed with gzip (an svgz drawing?): unpack it and render it to PNG first"
    return f"not a picture of a known format ({', '.join(FORMATS)}), or its header is damaged"


def _from_deep(image: Image.Image) -> Image.Image:
    """8-bit grey of 16-bit, 32-bit or float grey."""
    image.info.pop("transparency", None)
    raw = np.asarray(image).astype(np.float64)
    raw = np.nan_to_num(raw)
    low, high = float(raw.min()), float(raw.max())
    if image.mode.startswith("I;16"):
        raw = raw / 257.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        raw = raw * 255.0
    elif image.mode == "I" and low >= 0 and 255 < high <= 65535:
        raw = raw / 257.0
    elif low < 0 or high > 255:
        raw = (raw - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.clip(np.rint(raw), 0, 255).astype(np.uint8))


def _from_array(array: np.ndarray, limits: ImageLimits, name: str) -> Image.Image:
    shape = array.shape
    if array.ndim not in (2, 3) or 0 in shape or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise DataError(f"{name}: shape {shape} isn't a picture, expected (H, W), (H, W, 3) or (H, W, 4)")
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if shape[0] * shape[1] > limits.max_pixels:
        raise DataError(f"{name}: shape {shape} is over the limit of {limits.max_pixels:,} pixels")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(f"{name}: floats must lie in [0, 1]; for 0 to 255 give uint8")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(f"{name}: dtype {array.dtype} isn't supported, expected uint8 or floats in [0, 1]")
    return to_rgb(Image.fromarray(np.ascontiguousarray(array)))
