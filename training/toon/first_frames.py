"""Makes the demo's first frames: `python -m training.toon.first_frames`.

Two are first frames of held-out test stories; the third is a crayon drawing that no renderer of the world made; three
more are gifts that nobody chose: for each of the main cast, in its order, who begins no other, the test story of
the smallest seed of which they are the hero. Each is a PNG with the sentence that begins its story; `first_frames.json`
lists name, image, caption and source.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.toon.cast import MAIN
from training.toon.crayon import beach_day
from training.toon.picture import Pixels, save_png
from training.toon.render import render
from training.toon.world import sample_story

HOME = Path(__file__).resolve().parents[2] / "clients" / "cli" / "fabula_cli" / "first_frames"
TEST_STORIES = {"tiko_balloon": 7, "ella_snow": 46}  # name: seed of a story of split "test"
CRAYON = "pip_crayon"
GIFTS_COUNT = 3


@dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """A picture and the sentence that begins a story with it."""

    name: str
    pixels: Pixels  # uint8 RGB [H,W,3]
    caption: str
    source: str  # who or what drew it


def gifts() -> dict[str, int]:
    """Name and seed of the stories that the rule at the top of this module picks."""
    taken = {name.split("_")[0] for name in (*TEST_STORIES, CRAYON)}
    heroes = [character.id for character in MAIN if character.id not in taken][:GIFTS_COUNT]
    found: dict[str, int] = {}
    seed = 0
    while len(found) < len(heroes):
        hero = sample_story(seed, "test").hero.id
        if hero in heroes and f"{hero}_gift" not in found:
            found[f"{hero}_gift"] = seed
        seed += 1
    return {f"{hero}_gift": found[f"{hero}_gift"] for hero in heroes}


def first_frames() -> tuple[FirstFrame, ...]:
    """Return the shipped first frames, always the same ones."""
    frames = [_of_a_story(name, seed) for name, seed in TEST_STORIES.items()]
    frames.append(
        FirstFrame(
            name=CRAYON,
            pixels=beach_day(),
            caption="Pip went to the beach on a sunny morning, hoping to find somebody to play with.",
            source="crayon drawing, not made by the toon renderer",
        )
    )
    frames += [_of_a_story(name, seed) for name, seed in gifts().items()]
    return tuple(frames)


def _of_a_story(name: str, seed: int) -> FirstFrame:
    opening = sample_story(seed, "test").frames[0]
    return FirstFrame(
        name=name,
        pixels=render(opening.scene, 256),
        caption=opening.caption,
        source=f"toon world, split test, story {seed}",
    )


def write(frames: Sequence[FirstFrame], folder: Path) -> None:
    """Write the PNG files and `first_frames.json` to `folder`. Raises `OSError` when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for frame in frames:
        save_png(frame.pixels, folder / f"{frame.name}.png")
        entries.append(
            {"name": frame.name, "image": f"{frame.name}.png", "caption": frame.caption, "source": frame.source}
        )
    text = json.dumps(entries, indent=2, ensure_ascii=False)
    (folder / "first_frames.json").write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the first frames where the command line client ships them, or to --out."""
    parser = argparse.ArgumentParser(description="Make the first frames of the demo.")
    parser.add_argument("--out", type=Path, default=HOME)
    options = parser.parse_args(arguments)
    write(first_frames(), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
