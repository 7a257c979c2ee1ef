"""Writes pictures as PNG files and lays many out on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import skia

Pixels = npt.NDArray[np.uint8]
GAP_PX = 3


def grid(rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """Return one picture with `rows` of equally sized uint8 RGB pictures on white; short rows are padded."""
    size = rows[0][0].shape[0]
    step = size + GAP_PX
    sheet = np.full((len(rows) * step + GAP_PX, max(map(len, rows)) * step + GAP_PX, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            y, x = GAP_PX + i * step, GAP_PX + j * step
            sheet[y : y + size, x : x + size] = pixels
    return sheet


def save_png(pixels: Pixels, path: Path) -> None:
    """Write uint8 RGB `pixels` [H,W,3] to `path`. Raises `OSError` when the file cannot be written."""
    opaque = np.full((*pixels.shape[:2], 1), 255, np.uint8)
    rgba = np.ascontiguousarray(np.concatenate([pixels, opaque], axis=2))
    image = skia.Image.fromarray(rgba, colorType=skia.kRGBA_8888_ColorType)
    path.write_bytes(bytes(image.encodeToData(skia.EncodedImageFormat.kPNG, 100)))
