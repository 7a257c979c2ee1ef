"""Writes what a toon pack knows: its words, characters, places, things, and how familiar its own pictures are to it.

    python -m training.toon.knowledge --out PACK_FOLDER     # writes PACK_FOLDER/world.json, before the pack is sealed

The words are those that training has really seen: of seeded stories and frames of split "train", and of the lexicon.
The level of familiarity belongs to the pack's autoencoder and is measured with it.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from services.models.familiarity import gain_over_shrinking_db
from services.models.registry import CONFIG, VAE_WEIGHTS, load_weights
from services.models.vae import Codec, LatentScaling, VaeShape, build_vae
from services.models.world import FILE_NAME, World, words_of
from training.toon import lexicon
from training.toon.cast import MAIN, SIDE
from training.toon.grammar import phrase
from training.toon.picture import Pixels
from training.toon.render import render
from training.toon.scene import SETTINGS
from training.toon.world import sample_frame, sample_story

SHIPPED = Path(__file__).resolve().parents[2] / "services" / "models" / "packs" / "toon"
STORIES, FRAMES = 3000, 2000  # whose words are collected; more add none
PICTURES = 96  # of the world, half of them as JPEG files, that must all be familiar
JPEG_QUALITY = 75
MARGIN_DB = 0.5  # below the least familiar of them


def world_knowledge(folder: Path = SHIPPED) -> dict[str, Any]:
    """The content of `world.json` for the pack whose `vae/` lies in `folder`; it need not be sealed yet.

    Raises OSError or PackWeightsMismatch when its autoencoder cannot be read.
    """
    world = World(
        words=tuple(sorted(_vocabulary())),
        characters={character.name: phrase(character.look) for character in MAIN if character.name},
        names=tuple(sorted({character.name for character in SIDE if character.name})),
        places=tuple(f"the {setting}" for setting in SETTINGS),
        there={f"the {setting}": word for setting in SETTINGS if (word := _before(setting)) != "in"},
        things=tuple(ways[0] for ways in lexicon.PROP_WAYS.values()),
        familiar_gain_db=familiar_gain_db(_codec(folder)),
    )
    return asdict(world)


def _before(setting: str) -> str:
    """The word before a place: "at" the beach."""
    return lexicon.SETTING_WAYS[setting][0].split()[0]


def write_knowledge(folder: Path = SHIPPED) -> None:
    """Write `world.json` into an unsealed pack's folder. Raises what `world_knowledge` raises."""
    World(**world_knowledge(folder)).save(folder)


def familiar_gain_db(codec: Codec, pictures: int = PICTURES) -> float:
    """The least gain of that many pictures of the world, less a margin, to a tenth of a decibel."""
    lowest = min(
        gain_over_shrinking_db(codec, _as_jpeg(pixels) if seed % 2 else pixels)
        for seed in range(pictures)
        for pixels in (render(sample_frame(seed, "new" if seed % 4 < 2 else "validation").scene),)
    )
    return round(lowest - MARGIN_DB, 1)


def _vocabulary() -> set[str]:
    return {word for text in _texts() for word in words_of(text)}


def _texts() -> Iterator[str]:
    for seed in range(STORIES):
        for told in sample_story(seed, "train").frames:
            yield told.caption
            yield told.description
    for seed in range(FRAMES):
        yield sample_frame(seed, "train").description
    yield from lexicon.WEATHER_CUES.values()  # "rainy"
    for ways in (lexicon.PROP_WAYS, lexicon.SETTING_WAYS, lexicon.TIME_WAYS, lexicon.WEATHER_WAYS, lexicon.MOOD_WAYS):
        for phrases in ways.values():
            yield from phrases
    for phrases in (*lexicon.LANDMARKS.values(), lexicon.LIGHT_WAYS, *lexicon.POSITION_WAYS.values()):
        yield from phrases
    for phrases in lexicon.ACTION_WAYS.values():
        yield from (each.replace("{}", "") for each in phrases)


def _codec(folder: Path) -> Codec:
    """The autoencoder alone. How its latents are scaled does not matter to pictures that go there and back."""
    shape = VaeShape.from_dict(json.loads((folder / "vae" / CONFIG).read_text(encoding="utf-8")))
    vae: Any = build_vae(shape)
    load_weights(vae, folder / "vae" / VAE_WEIGHTS)
    channels = shape.latent_channels
    return Codec(vae, LatentScaling(shift=(0.0,) * channels, scale=(1.0,) * channels))


def _as_jpeg(pixels: Pixels) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(file).convert("RGB"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `world.json`, or show it."""
    parser = argparse.ArgumentParser(description="Write what a toon pack knows into its folder, before it is sealed.")
    parser.add_argument("--pack", type=Path, default=SHIPPED, help="the folder whose autoencoder is measured")
    parser.add_argument("--out", type=Path, help="folder to write world.json to; without it, it is printed")
    options = parser.parse_args(arguments)
    world = World(**world_knowledge(options.pack))
    if options.out is None:
        print(json.dumps(asdict(world), indent=1, ensure_ascii=False))
    else:
        world.save(options.out)
        print(options.out / FILE_NAME)


if __name__ == "__main__":
    main()
