"""Reference pictures: every kind a store may hold is read or refused by name."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.frame.picture import MAX_BYTES, png, read_reference, webp
from services.runtime.errors import FabulaError, ImageMissing, ImageTooLarge, ImageUnreadable


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def read(data: bytes, width_px: int = 16, height_px: int = 16) -> np.ndarray:
    return read_reference(data, width_px, height_px, field="references[0].image")


def png_bomb(side: int) -> bytes:
    """A PNG that says it is `side` pixels square, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


RED = Image.new("RGB", (20, 20), (200, 30, 40))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read(format: str) -> None:
    pixels = read(encoded(RED, format))
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (200, 30, 40)).max() < 6


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ImageMissing),
        (b"not a picture", ImageUnreadable),
        (encoded(RED)[:60], ImageUnreadable),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], ImageUnreadable),
        (encoded(RED, "GIF"), ImageUnreadable),
        (png_bomb(20_000), ImageTooLarge),
        (png_bomb(5_000), ImageTooLarge),
        (b"\x89PNG" + b"x" * MAX_BYTES, ImageTooLarge),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "GIF", "bomb", "large", "heavy"],
)
def test_what_cannot_be_used_is_refused_by_name(data: bytes, error: type[FabulaError]) -> None:
    with pytest.raises(error) as raised:
        read(data)
    assert raised.value.metadata["field"] == "references[0].image"


def test_colour_models_become_rgb() -> None:
    for mode in ("L", "P", "CMYK", "1", "LA"):
        format = "JPEG" if mode == "CMYK" else "PNG"
        assert read(encoded(RED.convert(mode), format)).shape == (16, 16, 3)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    grey = Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16))
    assert np.abs(read(encoded(grey)).astype(int) - 40_000 // 256).max() <= 1


def test_transparency_is_white_paper() -> None:
    assert (read(encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0)))) == 255).all()


def test_a_turned_photograph_is_turned_back() -> None:
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera says: rotate by 90° clockwise, so left becomes top
    pixels = read(encoded(image, "JPEG", exif=exif, quality=95), 16, 32)
    assert pixels[4].mean() > 240
    assert pixels[28].mean() < 15


def test_another_shape_loses_its_edges_and_is_not_squeezed() -> None:
    image = Image.new("RGB", (64, 16), (0, 0, 0))
    image.paste((255, 255, 255), (24, 0, 40, 16))  # the middle square
    assert read(encoded(image)).mean() > 250


def test_only_the_first_picture_of_an_animation_counts() -> None:
    blue = Image.new("RGB", (20, 20), (0, 0, 250))
    data = encoded(RED, "PNG", save_all=True, append_images=[blue])
    assert np.abs(read(data).reshape(-1, 3).mean(0) - (200, 30, 40)).max() < 6


def test_frames_are_lossless_and_carry_no_metadata() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(png(pixels)))
    assert np.array_equal(np.asarray(image), pixels)
    assert image.info == {}
    assert png(pixels) == png(pixels.copy())


def test_previews_are_small() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    data = webp(pixels)
    assert Image.open(io.BytesIO(data)).format == "WEBP"
    assert len(data) < len(png(pixels)) / 2
