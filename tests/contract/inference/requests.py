"""Requests as people make them with the stock client."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from tritonclient.grpc import InferInput


def strings(name: str, *values: str | bytes) -> InferInput:
    """A BYTES input."""
    array = np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=np.object_)
    tensor = InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def pixels(name: str, array: np.ndarray) -> InferInput:
    """A UINT8 input."""
    tensor = InferInput(name, list(array.shape), "UINT8")
    tensor.set_data_from_numpy(array)
    return tensor


def noise(seed: int, count: int = 1, side_px: int = 64) -> np.ndarray:
    """Pictures as pixels, [count, side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side_px, side_px, 3), dtype=np.uint8)


def file(array: np.ndarray, kind: str = "PNG") -> bytes:
    """One picture's file."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


def frame_inputs(prompt: str = "a fox and a lamp", references: Sequence[bytes] = ()) -> list[InferInput]:
    """The inputs of a frame model."""
    inputs = [strings("PROMPT", prompt)]
    if references:
        inputs.append(strings("REFERENCE_IMAGES", *references))
    return inputs


def caption_inputs(*captions: str) -> list[InferInput]:
    """The inputs of a caption model."""
    return [strings("IMAGE", file(noise(0)[0])), strings("CAPTIONS", *(captions or ("Pip found a kite.",)))]
