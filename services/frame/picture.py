"""Reads reference pictures and writes frames.

References come from our own store, and are checked all the same: a service does not trust its network.
Knows pixels and bytes only.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from services.models.drawing import Pixels
from services.runtime.errors import ImageMissing, ImageTooLarge, ImageUnreadable

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 8 << 20
MAX_PIXELS = 4096 * 4096
PREVIEW_QUALITY = 70
PAPER = (255, 255, 255)  # what shows through transparent pixels


def read_reference(data: bytes, width_px: int, height_px: int, *, field: str) -> Pixels:
    """The picture as RGB at the wanted size: turned upright, its middle cut to the wanted shape, then resized.

    Raises ImageMissing, ImageTooLarge or ImageUnreadable, naming `field`.
    """
    if not data:
        raise ImageMissing(f"{field} is empty", field=field)
    if len(data) > MAX_BYTES:
        raise ImageTooLarge(f"{field} has {len(data)} bytes; at most {MAX_BYTES} are taken", field=field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit follows
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"{field} has more than {MAX_PIXELS} pixels", field=field) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise ImageUnreadable(f"{field} is not a PNG, JPEG or WebP picture", field=field) from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageTooLarge(
            f"{field} is {image.width}×{image.height}; at most {MAX_PIXELS} pixels are taken", field=field
        )
    try:
        upright = ImageOps.exif_transpose(image)
        rgb = _rgb(upright)
        fitted = ImageOps.fit(rgb, (width_px, height_px), method=Image.Resampling.LANCZOS)
    # Decoders of damaged files raise what they like, zlib's and struct's errors among them.
    except Exception as error:  # noqa: BLE001
        raise ImageUnreadable(f"{field} cannot be decoded ({type(error).__name__})", field=field) from None
    return np.asarray(fitted, dtype=np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (*PAPER, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


def png(pixels: Pixels) -> bytes:
    """PNG without metadata: the same pixels give the same bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=6)
    return out.getvalue()


def webp(pixels: Pixels) -> bytes:
    """A small WebP, for previews."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="WEBP", quality=PREVIEW_QUALITY, method=0)
    return out.getvalue()
