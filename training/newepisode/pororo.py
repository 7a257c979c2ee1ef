"""PororoSV's folder: pictures of an animation's episodes with captions, and who follows whom.

img_cache4.npy              the first picture of each story, as a path in the folder
following_cache4.npy        the four that follow it, row for row
train_seen_unseen_ids.npy   three lists of rows: train, validation, test
descriptions.npy            a dictionary: path without ".png" → captions, of which the first one counts
<episode>/<picture>.png     frames of a clip, one below the other, each as high as the strip is wide
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from training.new_story import Pixels
from training.newepisode.foreign import read_array, text_of
from training.newepisode.records import SPLITS, WINDOW_CLIPS, Clip, Corpus, DataInvalid, Window

FIRST = "img_cache4.npy"
FOLLOWING = "following_cache4.npy"
ROWS = "train_seen_unseen_ids.npy"
DESCRIPTIONS = "descriptions.npy"
_PIXELS_MAX = 1 << 26
_NAME = "pororo"


def read_pororo(folder: Path) -> Corpus:
    """Raises DataInvalid naming the file and what is wrong with it."""
    firsts, following = (_rows(read_array(folder / name)) for name in (FIRST, FOLLOWING))
    if len(firsts) != len(following):
        raise DataInvalid(f"{folder / FIRST} has {len(firsts)} rows and {FOLLOWING} {len(following)}")
    told = _captions(folder)
    published = read_array(folder / ROWS)
    if len(published) != len(SPLITS):
        raise DataInvalid(f"{folder / ROWS} holds {len(published)} lists, not one for each of {', '.join(SPLITS)}")
    clips: dict[str, Clip] = {}
    windows: list[Window] = []
    unread: list[str] = []
    for split, rows in zip(SPLITS, published, strict=True):
        for row in (int(one) for one in np.asarray(rows).ravel()):
            if not 0 <= row < len(firsts):
                raise DataInvalid(f"{folder / ROWS} asks for row {row} of {len(firsts)}")
            paths = (*firsts[row], *following[row])
            ids = tuple(_clip_id(path, folder) for path in paths)
            if len(ids) != WINDOW_CLIPS or any(one not in told for one in ids):
                unread.append(ids[0])
                continue
            for one in ids:
                clips.setdefault(one, Clip(id=one, caption=told[one]))
            windows.append(Window(id=ids[0], clips=ids, split=split))
    return Corpus(_NAME, clips, tuple(windows), tuple(unread))


def _rows(values: Any) -> list[tuple[str, ...]]:
    """Paths, row for row, of an array of one or two dimensions."""
    if not isinstance(values, np.ndarray) or values.ndim not in (1, 2):
        raise DataInvalid("a list of pictures has one or two dimensions")
    return [tuple(text_of(one) for one in np.atleast_1d(np.asarray(row))) for row in values]


def _captions(folder: Path) -> Mapping[str, str]:
    held = read_array(folder / DESCRIPTIONS)
    told = held.item() if isinstance(held, np.ndarray) and held.ndim == 0 else held
    if not isinstance(told, dict):
        raise DataInvalid(f"{folder / DESCRIPTIONS} is no dictionary")
    captions = {}
    for key, values in told.items():
        first = values[0] if isinstance(values, list | tuple | np.ndarray) and len(values) else values
        text = text_of(first).strip()
        if text:
            captions[_clip_id(text_of(key), folder)] = text
    return captions


def _clip_id(path: str, folder: Path) -> str:
    """A picture's path without its ending. Raises DataInvalid for one that leads out of the folder."""
    plain = PurePosixPath(path)
    if plain.is_absolute() or ".." in plain.parts or not plain.parts:
        raise DataInvalid(f"{path!r} leads out of {folder}")
    return str(plain).removesuffix(".png")


def frame_of(folder: Path, clip: str, rng: random.Random | None = None) -> Pixels:
    """One frame of a clip's strip: the first one, or any of them by a generator. Raises DataInvalid."""
    path = folder / f"{_clip_id(clip, folder)}.png"
    try:
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
            if width * height > _PIXELS_MAX:
                raise DataInvalid(f"{path} has {width}×{height} pixels, which is too many")
            strip = np.asarray(image.convert("RGB"), dtype=np.uint8)
    except DataInvalid:
        raise
    except Exception as error:  # noqa: BLE001 - a decoder raises whatever it likes for a broken file
        raise DataInvalid(f"{path} cannot be read as PNG ({type(error).__name__})") from None
    count = height // width
    if count < 1 or height % width:
        raise DataInvalid(f"{path} is {width}×{height}: no strip of squares")
    number = 0 if rng is None else rng.randrange(count)
    return strip[number * width : (number + 1) * width].copy()
