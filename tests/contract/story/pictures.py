"""Pictures as people send them, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def two_colours(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red on the left, blue on the right: tells whether a picture was turned."""
    image = Image.new("RGB", size, (220, 30, 30))
    image.paste((30, 30, 220), (size[0] // 2, 0, size[0], size[1]))
    return image.convert(mode)


def plain() -> bytes:
    return encoded(two_colours())


def animated_gif() -> bytes:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)


def animated_webp() -> bytes:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)


def cmyk_jpeg() -> bytes:
    return encoded(two_colours("CMYK"), "JPEG", quality=95)


def sixteen_bit(kind: str) -> bytes:
    image = Image.new("I;16", (40, 40))
    image.putdata([65535 if x < 20 else 32768 for _ in range(40) for x in range(40)])
    return encoded(image, kind)


def rotated_jpeg() -> bytes:
    """Stored lying, to be shown upright: EXIF orientation 6 (turn clockwise)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(two_colours(size=(64, 48)), "JPEG", exif=exif, quality=95)


def transparent_png() -> bytes:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((10, 200, 10, 255), (0, 0, 20, 40))
    return encoded(image)


def bomb_png(side_px: int = 20_000) -> bytes:
    """A real PNG of `side_px` × `side_px` in some tens of kilobytes (1 bit a pixel, all zero)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    line = bytes(1 + (side_px + 7) // 8)
    data = b"".join(packer.compress(line) for _ in range(side_px)) + packer.flush()
    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def truncated_png() -> bytes:
    noise = Image.effect_noise((200, 200), 80)
    whole = encoded(noise)
    return whole[: len(whole) // 2]


def truncated_jpeg() -> bytes:
    whole = encoded(Image.effect_noise((200, 200), 80), "JPEG")
    return whole[: len(whole) // 2]
