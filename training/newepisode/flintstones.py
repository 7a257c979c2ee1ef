"""FlintstonesSV's folder: clips of three seconds with a description each, and who follows whom.

    flintstones_annotations_v1-0.json     a list of {globalID, description, characters: [{entityLabel}]}
    train-val-test_split.json             {"train": [globalID …], "val": […], "test": […]}
    following_cache4.pkl                  globalID → the four that follow it
    video_frames_sampled/<globalID>.npy   frames of a clip, uint8 [n, 128, 128, 3]

A test story may hold clips of the training split: the cache was built over all of them. That is why nothing here trusts
a published split to keep anybody out.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from training.new_story import Pixels
from training.newepisode.foreign import read_pickle, text_of
from training.newepisode.records import WINDOW_CLIPS, Clip, Corpus, DataInvalid, Window

ANNOTATIONS = "flintstones_annotations_v1-0.json"
SPLIT = "train-val-test_split.json"
FOLLOWING = "following_cache4.pkl"
FRAMES = "video_frames_sampled"
TEST_FRAME = 2  # of a clip, where nothing may be left to chance
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_ID = re.compile(r"[\w.-]+")
_NAME = "flintstones"


def read_flintstones(folder: Path) -> Corpus:
    """Raises DataInvalid naming the file and what is wrong with it."""
    clips: dict[str, Clip] = {}
    for number, entry in enumerate(_json(folder / ANNOTATIONS, list), 1):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("globalID", "description")):
            raise DataInvalid(f"{folder / ANNOTATIONS}, entry {number}, has no globalID or no description")
        if not _ID.fullmatch(entry["globalID"]):
            raise DataInvalid(f"{folder / ANNOTATIONS}, entry {number}: {entry['globalID']!r} is no id of a clip")
        if entry["globalID"] in clips:
            raise DataInvalid(f"{folder / ANNOTATIONS} tells {entry['globalID']} twice")
        clips[entry["globalID"]] = Clip(id=entry["globalID"], caption=entry["description"].strip(), known=_cast(entry))
    following = read_pickle(folder / FOLLOWING)
    if not isinstance(following, dict):
        raise DataInvalid(f"{folder / FOLLOWING} is no dictionary")
    after = {text_of(key): value for key, value in following.items()}
    published = _json(folder / SPLIT, dict)
    windows: list[Window] = []
    unread: list[str] = []
    for name, split in _SPLITS.items():
        if not isinstance(published.get(name), list):
            raise DataInvalid(f"{folder / SPLIT} has no list {name!r}")
        for first in map(str, published[name]):
            if first not in after:  # the last clips of an episode start no story
                continue
            ids = (first, *(text_of(one) for one in after[first]))
            if len(ids) == WINDOW_CLIPS and all(one in clips for one in ids):
                windows.append(Window(id=first, clips=ids, split=split))
            else:
                unread.append(first)
    return Corpus(_NAME, clips, tuple(windows), tuple(unread))


def _cast(entry: dict[str, Any]) -> frozenset[str]:
    """Who the annotation says is there, in lower case; of entries that say nothing, nobody."""
    told = entry.get("characters", [])
    names = (one.get("entityLabel") for one in told if isinstance(one, dict)) if isinstance(told, list) else ()
    return frozenset(name.strip().lower() for name in names if isinstance(name, str) and name.strip())


def frame_of(folder: Path, clip: str, rng: random.Random | None = None) -> Pixels:
    """One frame of a clip: `TEST_FRAME`, or any of them by a generator. Raises DataInvalid."""
    if not _ID.fullmatch(clip):
        raise DataInvalid(f"{clip!r} is no id of a clip")
    path = folder / FRAMES / f"{clip}.npy"
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataInvalid(f"{path} cannot be read: {str(error)[:80]}") from None
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise DataInvalid(f"{path} holds no frames: {frames.dtype} {frames.shape}")
    number = min(TEST_FRAME, len(frames) - 1) if rng is None else rng.randrange(len(frames))
    return np.array(frames[number])


def _json(path: Path, kind: type) -> Any:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataInvalid(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataInvalid(f"{path} is no JSON: {str(error)[:80]}") from None
    if not isinstance(document, kind):
        raise DataInvalid(f"{path} holds no {'list' if kind is list else 'object'}")
    return document
