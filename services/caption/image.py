"""Decodes a picture that a caller sent, within strict limits, to the size the model sees.

Knows no model and no transport.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from services.runtime.errors import ImageMissing, ImageTooLarge, ImageUnreadable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF")
BYTES_MAX = 8 << 20
PIXELS_MAX = 40_000_000  # checked from the header, before anything is decoded


def read_image(data: bytes, size_px: int, *, whole: bool = False) -> Image.Image:
    """The first frame of a picture file as RGB, `size_px` square; transparency becomes white, EXIF rotation is applied.

    A `whole` picture keeps its shape instead: it is only made smaller, where its longer side is over `size_px`.

    Raises ImageMissing, ImageTooLarge or ImageUnreadable, each naming the field `image`.
    """
    if not data:
        raise ImageMissing(field="image")
    if len(data) > BYTES_MAX:
        raise ImageTooLarge(f"the picture has {len(data)} bytes and at most {BYTES_MAX} are taken", field="image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit below is the stricter one
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width_px, height_px = file.size
                if width_px * height_px > PIXELS_MAX:
                    raise ImageTooLarge(
                        f"the picture is {width_px}×{height_px} px and at most {PIXELS_MAX} pixels are taken",
                        field="image",
                    )
                file.draft("RGB", (size_px, size_px))
                picture = _rgb(ImageOps.exif_transpose(file))
    except ImageTooLarge:
        raise
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"the picture has more than {PIXELS_MAX} pixels", field="image") from None
    except Exception:  # noqa: BLE001 - decoders raise anything for damaged files; what they say is not for callers
        raise ImageUnreadable(field="image") from None
    if whole:
        picture.thumbnail((size_px, size_px), Image.Resampling.BICUBIC)
    elif picture.size != (size_px, size_px):
        picture = picture.resize((size_px, size_px), Image.Resampling.BICUBIC)
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        # Pillow clips 16-bit grey to 255 when it converts; dividing keeps what is in the picture.
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        background = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, layered).convert("RGB")
    return picture.convert("RGB")
