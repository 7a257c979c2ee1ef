"""Makes the demo's first frames: `python -m training.toon.first_frames`.

Two are first frames of held-out test stories; the third is a crayon drawing that no renderer of the world made. Each
is a PNG with the sentence that begins its story; `first_frames.json` lists name, image, caption and source.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.toon.crayon import beach_day
from training.toon.picture import Pixels, save_png
from training.toon.render import render
from training.toon.world import sample_story

HOME = Path(__file__).resolve().parents[2] / "clients" / "cli" / "fabula_cli" / "first_frames"
TEST_STORIES = {"tiko_balloon": 7, "ella_snow": 46}  # name: seed of a story of split "test"


@dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """A picture and the sentence that begins a story with it."""

    name: str
    pixels: Pixels  # uint8 RGB [H,W,3]
    caption: str
    source: str  # who or what drew it


def first_frames() -> tuple[FirstFrame, ...]:
    """Return the shipped first frames, always the same ones."""
    frames = []
    for name, seed in TEST_STORIES.items():
        opening = sample_story(seed, "test").frames[0]
        frames.append(
            FirstFrame(
                name=name,
                pixels=render(opening.scene, 256),
                caption=opening.caption,
                source=f"toon world, split test, story {seed}",
            )
        )
    frames.append(
        FirstFrame(
            name="pip_crayon",
            pixels=beach_day(),
            caption="Pip went to the beach on a sunny morning, hoping to find somebody to play with.",
            source="crayon drawing, not made by the toon renderer",
        )
    )
    return tuple(frames)


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
