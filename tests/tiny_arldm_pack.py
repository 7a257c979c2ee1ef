"""A tiny AR-LDM as a pack, and stories in its words: of Barney, who is new to it, and of those whom it knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from services.models.arldm.checkpoint import convert
from services.models.arldm.model import LATENTS, SCHEDULE
from services.models.pack import Pack, PackSettings, Sampling, write_pack
from tests.reference_arldm import random_state
from tests.tiny_arldm import GUIDANCE, SIZES, STEPS, blip_tokenizer, clip_tokenizer, config
from training.new_story import KnownStory, NewStory, SeenFrame

SIDE_PX = 32  # the least that the frame service draws
PHRASE = "the car"
# Two words each: a description must fit with a learned name in it, of up to four vectors.
_PLACES = ("in kitchen", "in garden", "and dino", "and his", "and fred")
_DEEDS = ("sits", "runs", "laughs", "eats")


def build_arldm_pack(folder: Path, given: int = 0) -> Pack:
    """Random weights in the published layout, converted. `given` 1: it goes on from a first frame."""
    source = folder.with_suffix(".safetensors")
    save_file(random_state(SIZES, seed=0), str(source))
    convert(
        source, folder, clip_tokenizer=clip_tokenizer(), blip_tokenizer=blip_tokenizer(), config=config(given=given)
    )
    return write_pack(
        folder,
        PackSettings(
            name=folder.name,
            architecture="arldm",
            base="nothing",
            licence="Apache-2.0",
            made_by="a test",
            width_px=SIDE_PX,
            height_px=SIDE_PX,
            dtype="float32",
            max_references=SIZES.frames - 1,
            reference_range="signed",
            latents=LATENTS,
            schedule=SCHEDULE,
            sampling=Sampling(
                sampler="ddim", default_steps=STEPS, default_text_guidance=GUIDANCE, default_image_guidance=1.0
            ),
        ),
    )


def barney(count: int = 5, side_px: int = SIDE_PX) -> NewStory:
    """A new story of so many frames. The descriptions tell the look beside the name."""
    frames = tuple(_frame(number, f"barney {PHRASE}", f"new:{number}", "barney", side_px) for number in range(count))
    return NewStory(id="barney", name="barney", phrase=PHRASE, noun="car", frames=frames)


def known(count: int = 2, length: int = 5, side_px: int = SIDE_PX) -> tuple[KnownStory, ...]:
    """Stories of Fred and of Wilma, in turn."""
    return tuple(
        KnownStory(
            frames=tuple(
                _frame(number, who, f"known:{story}:{number}", who, side_px, seed=100 * (story + 1))
                for number in range(length)
            )
        )
        for story, who in zip(range(count), ("fred", "wilma") * count, strict=False)
    )


def _frame(number: int, called: str, frame_id: str, who: str, side_px: int, seed: int = 0) -> SeenFrame:
    noise = np.random.default_rng(seed + number)
    text = f"{called} {_DEEDS[number % len(_DEEDS)]} {_PLACES[number % len(_PLACES)]}"
    return SeenFrame(
        id=frame_id,
        pixels=noise.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8),
        caption=text,
        descriptions=(text,),
        characters=frozenset({who}),
    )
