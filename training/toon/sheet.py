"""Draws contact sheets of the world: `python -m training.toon.sheet --out sheets`.

Sheets are for human eyes: every character in every action, every mood on every species, every place at every time,
every thing held and lying, the new characters, and stories with their captions in a text file beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.toon.arcs import ARCS
from training.toon.cast import MAIN, NEW, SIDE
from training.toon.colours import CLOTH, FUR
from training.toon.picture import Pixels, grid, save_png
from training.toon.render import render
from training.toon.scene import (
    ACCESSORIES,
    ACTIONS,
    INDOORS,
    MOODS,
    PROPS,
    SETTINGS,
    SIDES,
    SPECIES,
    TIMES,
    Actor,
    Character,
    Look,
    Scene,
)
from training.toon.world import Story, sample_frame, sample_story


@dataclass(frozen=True)
class Sheet:
    """Rows of scenes, and the text that goes beside them."""

    rows: Sequence[Sequence[Scene]]
    text: str = ""


def _scene(actors: Sequence[Actor], index: int, setting: str | None = None, time: str | None = None) -> Scene:
    """Return a scene of `actors` with places, times and sides taken in turn by `index`."""
    return Scene(
        actors=tuple(actors),
        setting=setting or SETTINGS[index % len(SETTINGS)],
        time=time or TIMES[(index // 2) % len(TIMES)],
        side=SIDES[(index // 3) % 2],
    )


def _doing(character: Character, action: str, index: int) -> Actor:
    mood = {"cry": "sad", "sleep": "sleepy"}.get(action, "happy")
    return Actor(
        character=character, action=action, mood=mood, prop=PROPS[index % len(PROPS)] if action == "hold" else None
    )


def _holding(character: Character, prop: str) -> Actor:
    return Actor(character=character, action="hold", mood="happy", prop=prop)


def _cast_in_action(cast: Sequence[Character]) -> Sheet:
    rows = [[_scene([_doing(who, action, i)], i + j) for j, action in enumerate(ACTIONS)] for i, who in enumerate(cast)]
    return Sheet(rows)


def _plain(species: str, index: int) -> Character:
    """Return an unnamed character of `species`, with colours and accessory taken in turn."""
    colour = tuple(FUR)[index % len(FUR)]
    cloth = [name for name in CLOTH if name != colour]
    look = Look(
        species=species,
        colour=colour,
        accessory=ACCESSORIES[index % len(ACCESSORIES)],
        accessory_colour=cloth[index % len(cloth)],
    )
    return Character(id=f"plain-{index}", name=None, pronoun="he", look=look)


def characters() -> Sheet:
    """Main cast × actions."""
    return _cast_in_action(MAIN)


def new_characters() -> Sheet:
    """The held-out characters × actions."""
    return _cast_in_action(NEW)


def species() -> Sheet:
    """Species × moods."""
    rows = []
    for i, name in enumerate(SPECIES):
        who = _plain(name, i)
        actors = [Actor(character=who, action="stand", mood=mood) for mood in MOODS]
        actors += [_doing(who, "cry", i), _doing(who, "sleep", i)]
        rows.append([_scene([actor], i, setting="park", time="day") for actor in actors])
    return Sheet(rows)


def accessories() -> Sheet:
    """Accessories on four differently shaped heads."""
    rows = []
    for kind in ("cat", "frog", "elephant", "sheep"):
        row = []
        for i, accessory in enumerate(ACCESSORIES):
            look = Look(
                species=kind, colour="brown", accessory=accessory, accessory_colour=tuple(CLOTH)[(i + 2) % len(CLOTH)]
            )
            who = Character(id=f"wears-{i}", name=None, pronoun="he", look=look)
            row.append(_scene([_doing(who, "stand", i)], 0, setting="beach", time="day"))
        rows.append(row)
    return Sheet(rows)


def settings() -> Sheet:
    """Settings × times for one, then for two and three characters, then with weather."""
    rows = []
    for i, setting in enumerate(SETTINGS):
        row = [_scene([_doing(MAIN[i % len(MAIN)], "stand", i)], i, setting, time) for time in TIMES]
        for count in (2, 3):
            actors = [_doing(MAIN[(i + k) % len(MAIN)], ("wave", "stand", "sit")[k], i) for k in range(count)]
            row.append(_scene(actors, i, setting, "day"))
        if setting not in INDOORS:
            for weather in ("rain", "snow"):
                one = (_doing(MAIN[i % len(MAIN)], "jump", i),)
                row.append(Scene(actors=one, setting=setting, time="day", side="right", weather=weather))
        rows.append(row)
    return Sheet(rows)


def props() -> Sheet:
    """Things held by one, held by the right one of two, and lying on the ground."""
    first, second = MAIN[0], MAIN[1]
    lying = [
        Scene(actors=(_doing(second, "point", i),), setting=SETTINGS[i % 8], time="day", side="left", ground_prop=prop)
        for i, prop in enumerate(PROPS)
    ]
    return Sheet(
        [
            [_scene([_holding(first, prop)], i) for i, prop in enumerate(PROPS)],
            [_scene([_doing(second, "stand", i), _holding(first, prop)], i) for i, prop in enumerate(PROPS)],
            lying,
        ]
    )


def side_characters() -> Sheet:
    """The first hundred side characters."""
    scenes = [_scene([_doing(who, "stand", i)], i, time="day") for i, who in enumerate(SIDE[:100])]
    return Sheet([scenes[i : i + 10] for i in range(0, len(scenes), 10)])


def wide() -> Sheet:
    """Frames as the picture codec sees them."""
    scenes = [sample_frame(i, breadth="wide").scene for i in range(100)]
    return Sheet([scenes[i : i + 10] for i in range(0, len(scenes), 10)])


def stories() -> Sheet:
    """One story of each arc, with captions and descriptions as text."""
    found: dict[str, Story] = {}
    seed = 0
    while len(found) < len(ARCS):
        story = sample_story(seed)
        found.setdefault(story.arc, story)
        seed += 1
    lines: list[str] = []
    for arc, story in sorted(found.items()):
        lines.append(arc)
        lines += [f"  {frame.beat + 1}. {frame.caption}\n     {frame.description}" for frame in story.frames]
    return Sheet([[frame.scene for frame in found[arc].frames] for arc in sorted(found)], "\n".join(lines) + "\n")


SHEETS: dict[str, Callable[[], Sheet]] = {
    "characters": characters,
    "new_characters": new_characters,
    "species": species,
    "accessories": accessories,
    "settings": settings,
    "props": props,
    "side_characters": side_characters,
    "wide": wide,
    "stories": stories,
}


def draw(sheet: Sheet, size_px: int) -> Pixels:
    """Return the sheet as one picture, with frames of `size_px`."""
    return grid([[render(scene, size_px) for scene in row] for row in sheet.rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the sheets asked for, or all, and say where they are."""
    parser = argparse.ArgumentParser(description="Draw contact sheets of the toon world.")
    parser.add_argument("sheets", nargs="*", help=f"which ones (default all): {', '.join(SHEETS)}")
    parser.add_argument("--out", type=Path, default=Path("build/toon_sheets"), help="folder for the PNG files")
    parser.add_argument("--size", type=int, default=128, help="side of a frame, in pixels")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sheets if name not in SHEETS]
    if unknown:
        parser.error(f"no sheet named {', '.join(unknown)}; there are {', '.join(SHEETS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.sheets or SHEETS:
        sheet = SHEETS[name]()
        path = options.out / f"{name}.png"
        save_png(draw(sheet, options.size), path)
        print(path)
        if sheet.text:
            words = path.with_suffix(".txt")
            words.write_text(sheet.text, encoding="utf-8")
            print(words)


if __name__ == "__main__":
    main()
