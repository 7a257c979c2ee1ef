"""The one example story of somebody new, and stories of those whom the pack knows: what a customization learns from.

A new story is a folder with `story.json` and a PNG file for each of its 3 to 20 frames, or is taken from the procedural
world. Everything in a folder is checked here, at the edge. Knows no network.

    {"name": "Otto", "phrase": "a black penguin with orange earmuffs", "noun": "penguin",
     "frames": [{"image": "1.png", "caption": "…", "description": "Otto, a black penguin with orange earmuffs, runs …"},
                …]}

Stories of those whom a pack knows come from the procedural world, or from a folder that holds a folder for each, with a
`story.json` of frames alone; each frame says who is in it.

    {"frames": [{"image": "1.png", "caption": "…", "description": "…", "characters": ["Fred", "Dino"]}, …]}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.customize_errors import FramesSeen, StoryInvalid
from training.toon.cast import NEW
from training.toon.grammar import describe_plainly, phrase
from training.toon.render import render
from training.toon.world import Story, StoryFrame, sample_story

Pixels = npt.NDArray[np.uint8]
STORY_FRAMES = 5  # of the world's stories, and of those that the methods were made for
FEWEST_FRAMES, MOST_FRAMES = 3, 20  # of an example story: `services.customization.checks` takes as many
STORY_FILE = "story.json"
_PIXELS_MAX = 4096 * 4096
_FILE_BYTES_MAX = 32 << 20
_NAME_LETTERS_MAX, _PHRASE_LETTERS_MAX, _TEXT_LETTERS_MAX = 40, 200, 1000
_NAME = re.compile(r"[^\W\d_](?:[\w'’ -]*\w)?")
_WORN = re.compile(r" (?:with|wearing|in) ")
_NEW_IDS = frozenset(one.id for one in NEW)
_SEARCHED_STORIES = 400  # of the world, for the one that a new character is taught from


@dataclass(frozen=True, kw_only=True)
class Called:
    """How somebody is spoken of, and how to speak of them otherwise."""

    name: str
    phrase: str  # "a black penguin with orange earmuffs"
    noun: str  # "penguin"

    def is_told_in(self, description: str) -> bool:
        """Whether a description speaks of the character, by name or by phrase."""
        return bool(_word(self.name).search(description)) or bool(self._looks.search(description))

    def by_name(self, description: str) -> str:
        """The same with the name alone, where the look was told."""
        return self._spoken(description, self.name)

    def by_noun(self, description: str) -> str:
        """The same about anybody of the character's kind: "a penguin"."""
        article = "an" if self.noun[0].lower() in "aeiou" else "a"
        general = f"{article} {self.noun}"
        text = _word(self.name).sub(general, self._spoken(description, self.name))
        return text[:1].upper() + text[1:]

    def _spoken(self, description: str, word: str) -> str:
        named = self._named.sub(word, description)
        if _word(word).search(named):
            return named
        return self._looks.sub(word, named)

    @property
    def _core(self) -> tuple[str, str]:
        """Patterns of what somebody is ("black penguin") and, with its joint, what they wear."""
        bare = re.sub(r"^(?:an?|the) ", "", self.phrase.strip(), flags=re.IGNORECASE)
        joint = _WORN.search(bare)
        what, worn = (bare, "") if joint is None else (bare[: joint.start()], bare[joint.end() :])
        wears = rf"(?: (?:with|wearing|in) {re.escape(worn)})?" if worn else ""
        return re.escape(what), wears

    @property
    def _looks(self) -> re.Pattern[str]:
        what, wears = self._core
        return re.compile(rf"\b(?:an?|the) {what}{wears}", re.IGNORECASE)

    @property
    def _named(self) -> re.Pattern[str]:
        """The name with its look: "Otto, a black penguin with …,", "Otto the …", "the black penguin Otto with …"."""
        (what, wears), name = self._core, re.escape(self.name)
        after = rf"(?<!\w){name}(?:, (?:an?|the) {what}{wears},?| the {what}{wears})"
        before = rf"\b(?:an?|the) {what} {name}{wears}"
        return re.compile(f"{after}|{before}", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class SeenFrame:
    """One frame that a run learns from. `id` names it, `characters` are ids of those in it."""

    id: str
    pixels: Pixels
    caption: str
    descriptions: tuple[str, ...]  # of the same picture, in different words
    characters: frozenset[str]

    @property
    def digest(self) -> str:
        """The SHA-256 of its pixels."""
        return hashlib.sha256(str(self.pixels.shape).encode() + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KnownStory:
    """Frames of somebody whom the pack knows, in their order."""

    frames: tuple[SeenFrame, ...]


@dataclass(frozen=True, kw_only=True)
class NewStory:
    """Frames of somebody new, in their order, and how they are called.

    Raises StoryInvalid for what cannot be learned from.
    """

    id: str  # of the character
    name: str
    phrase: str  # "a black penguin with orange earmuffs"
    noun: str  # "penguin"
    frames: tuple[SeenFrame, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.name) > _NAME_LETTERS_MAX:
            raise StoryInvalid(f"a name is letters, at most {_NAME_LETTERS_MAX} of them", field="name")
        if not self.phrase.strip() or len(self.phrase) > _PHRASE_LETTERS_MAX:
            raise StoryInvalid(f"a phrase has 1 to {_PHRASE_LETTERS_MAX} letters", field="phrase")
        if not self.noun.strip() or len(self.noun) > _NAME_LETTERS_MAX:
            raise StoryInvalid(f"a noun has 1 to {_NAME_LETTERS_MAX} letters", field="noun")
        if not FEWEST_FRAMES <= len(self.frames) <= MOST_FRAMES:
            raise StoryInvalid(_counted(len(self.frames)), field="frames")
        digests = [frame.digest for frame in self.frames]
        for number, frame in enumerate(self.frames):
            field = f"frames[{number}]"
            if self.id not in frame.characters:
                raise StoryInvalid(f"frame {number + 1} does not show {self.name}", field=field)
            if digests.index(digests[number]) != number:
                raise StoryInvalid(f"frame {number + 1} is a picture that came before", field=f"{field}.image")
            for text in (*frame.descriptions, frame.caption):
                if not text.strip() or len(text) > _TEXT_LETTERS_MAX:
                    raise StoryInvalid(f"frame {number + 1} has a text of no or too many letters", field=field)
            for text in frame.descriptions:
                if not self.called.is_told_in(text):
                    raise StoryInvalid(
                        f"the description of frame {number + 1} says neither {self.name!r} nor {self.phrase!r}",
                        field=f"{field}.description",
                    )

    @property
    def called(self) -> Called:
        """How the character is spoken of."""
        return Called(name=self.name, phrase=self.phrase, noun=self.noun)


def _counted(count: int) -> str:
    return f"an example story has {FEWEST_FRAMES} to {MOST_FRAMES} frames and not {count}"


def _word(text: str) -> re.Pattern[str]:
    """A text as a whole word."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


def read_story(folder: Path, width_px: int, height_px: int, taken: Iterable[str] = ()) -> NewStory:
    """The story of a folder, its pictures at this size; `taken` are names that mean somebody already.

    Raises StoryInvalid for whatever is wrong with it.
    """
    told = _object(_document(folder, STORY_FILE), {"name", "phrase", "frames"}, {"noun"}, STORY_FILE)
    name, look = _text(told, "name", "name"), _text(told, "phrase", "phrase")
    if name in set(taken):
        raise StoryInvalid(f"{name} is somebody whom the pack knows; choose another name", field="name")
    if not isinstance(told["frames"], list):
        raise StoryInvalid("frames is not a list", field="frames")
    if not FEWEST_FRAMES <= len(told["frames"]) <= MOST_FRAMES:  # before any picture is decoded
        raise StoryInvalid(_counted(len(told["frames"])), field="frames")
    new_id = f"new:{name}"
    frames = []
    for number, entry in enumerate(told["frames"]):
        field = f"frames[{number}]"
        one = _object(entry, {"image", "caption", "description"}, set(), field)
        image = _text(one, "image", f"{field}.image")
        pixels = _picture(folder, image, width_px, height_px, f"{field}.image")
        frames.append(
            SeenFrame(
                id=f"{new_id}:{number}",
                pixels=pixels,
                caption=_text(one, "caption", f"{field}.caption"),
                descriptions=(_text(one, "description", f"{field}.description"),),
                characters=frozenset({new_id}),
            )
        )
    bare = _WORN.split(look)[0].split()
    noun = _text(told, "noun", "noun") if "noun" in told else (bare[-1] if bare else "")
    return NewStory(id=new_id, name=name, phrase=look, noun=noun, frames=tuple(frames))


def read_known(folder: Path, width_px: int, height_px: int, count: int, first: int = 0) -> tuple[KnownStory, ...]:
    """`count` stories of those whom a pack knows, the `first` by name of their folders and those that follow it.

    Their pictures are at this size. A character's id is the name, so `names_in` says who cannot be new any more.
    Raises StoryInvalid for whatever is wrong with one, and where there are none.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise StoryInvalid(f"{folder} cannot be read: {error.strerror}", field="known") from None
    if not (chosen := found[first : first + count]):
        raise StoryInvalid(f"{folder} has {len(found)} stories, and none is number {first}", field="known")
    return tuple(_known(path, width_px, height_px) for path in chosen)


def names_in(stories: Sequence[KnownStory]) -> frozenset[str]:
    """Who is in stories that were read from a folder."""
    return frozenset().union(*(frame.characters for story in stories for frame in story.frames))


def _known(folder: Path, width_px: int, height_px: int) -> KnownStory:
    field = f"{folder.name}/{STORY_FILE}"
    told = _object(_document(folder, field), {"frames"}, set(), field)
    if not isinstance(told["frames"], list) or not 1 <= len(told["frames"]) <= MOST_FRAMES:
        raise StoryInvalid(f"a known story has 1 to {MOST_FRAMES} frames", field=f"{folder.name}/frames")
    frames = []
    for number, entry in enumerate(told["frames"]):
        field = f"{folder.name}/frames[{number}]"
        one = _object(entry, {"image", "caption", "description", "characters"}, set(), field)
        who = one["characters"]
        if not isinstance(who, list) or not all(isinstance(name, str) and name.strip() for name in who):
            raise StoryInvalid(f"{field}.characters is not a list of names", field=f"{field}.characters")
        image = _text(one, "image", f"{field}.image")
        frames.append(
            SeenFrame(
                id=f"known:{folder.name}:{number}",
                pixels=_picture(folder, image, width_px, height_px, f"{field}.image"),
                caption=_text(one, "caption", f"{field}.caption"),
                descriptions=(_text(one, "description", f"{field}.description"),),
                characters=frozenset(name.strip() for name in who),
            )
        )
    return KnownStory(frames=tuple(frames))


def _document(folder: Path, field: str) -> object:
    """What a story's file says."""
    file = folder / STORY_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoryInvalid(f"{file} cannot be read: {error.strerror}", field=field) from None
    except (ValueError, RecursionError) as error:
        raise StoryInvalid(f"{file} is no JSON: {str(error)[:80]}", field=field) from None


def _object(value: object, needed: set[str], also: set[str], field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StoryInvalid(f"{field} is not an object", field=field)
    if missing := sorted(needed - value.keys()):
        raise StoryInvalid(f"{field} lacks {', '.join(missing)}", field=field)
    if unknown := sorted(map(str, value.keys() - needed - also)):
        raise StoryInvalid(f"{field} has unknown keys: {', '.join(unknown)[:80]}", field=field)
    return value


def _text(values: dict[str, Any], key: str, field: str) -> str:
    value = values[key]
    if not isinstance(value, str) or not value.strip() or "\x00" in value:
        raise StoryInvalid(f"{field} is not a text", field=field)
    return str(value.strip())


def _picture(folder: Path, name: str, width_px: int, height_px: int, field: str) -> Pixels:
    """A PNG of the folder, at the pack's size. One of another shape is refused, not squeezed."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoryInvalid(f"{name} leads out of the story's folder", field=field)
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise StoryInvalid(f"{name} is larger than {_FILE_BYTES_MAX >> 20} MiB", field=field)
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
            if width * height > _PIXELS_MAX:
                raise StoryInvalid(f"{name} has {width}×{height} pixels, which is too many", field=field)
            if width * height_px != height * width_px:
                raise StoryInvalid(
                    f"{name} is {width}×{height}; crop it to the shape {width_px}×{height_px}", field=field
                )
            image.load()
            picture = image.convert("RGB")
    except StoryInvalid:
        raise
    except Exception as error:  # noqa: BLE001 - a decoder raises whatever it likes for a broken file
        raise StoryInvalid(f"{name} cannot be read as PNG ({type(error).__name__})", field=field) from None
    if picture.size != (width_px, height_px):
        picture = picture.resize((width_px, height_px), Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.uint8).copy()


def world_story(character: str, size_px: int) -> NewStory:
    """The story of the world's "new" split that a new character is taught from.

    Of those of which they are the hero, the one with the fewest others in its frames. Raises StoryInvalid for somebody
    who is none of the world's new characters.
    """
    who = next((one for one in NEW if one.id == character), None)
    if who is None or who.name is None:
        known = ", ".join(one.id for one in NEW)
        raise StoryInvalid(f"{character!r} is none of the world's new characters: {known}", field="character")
    found = [
        (seed, story) for seed in range(_SEARCHED_STORIES) if (story := sample_story(seed, "new")).hero.id == who.id
    ]
    seed, story = min(found, key=lambda one: (sum(len(frame.scene.actors) for frame in one[1].frames), one[0]))
    frames = _frames(story, f"story:new:{seed}", size_px)
    return NewStory(id=who.id, name=who.name, phrase=phrase(who.look), noun=who.look.species, frames=frames)


def known_stories(count: int, size_px: int, first_seed: int = 0) -> tuple[KnownStory, ...]:
    """Stories of the world's "train" split, of the cast that packs were trained on."""
    seeds = range(first_seed, first_seed + count)
    return tuple(
        KnownStory(frames=_frames(sample_story(seed, "train"), f"story:train:{seed}", size_px)) for seed in seeds
    )


def _frames(story: Story, of: str, size_px: int) -> tuple[SeenFrame, ...]:
    return tuple(_frame(frame, f"{of}:{beat}", size_px) for beat, frame in enumerate(story.frames))


def _frame(frame: StoryFrame, frame_id: str, size_px: int) -> SeenFrame:
    return SeenFrame(
        id=frame_id,
        pixels=render(frame.scene, size_px),
        caption=frame.caption,
        descriptions=(frame.description, describe_plainly(frame.scene)),
        characters=frozenset(actor.character.id for actor in frame.scene.actors),
    )


def together(new: NewStory | Sequence[NewStory]) -> tuple[NewStory, ...]:
    """The stories of all who are taught in one run. Raises StoryInvalid when there is none, or somebody comes twice."""
    stories = (new,) if isinstance(new, NewStory) else tuple(new)
    if not stories:
        raise StoryInvalid("nobody is to be taught", field="stories")
    for what, values in (("id", [one.id for one in stories]), ("name", [one.name for one in stories])):
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise StoryInvalid(f"two of the new characters have the {what} {twice!r}", field="stories")
    return stories


def check_wall(new: NewStory | Sequence[NewStory], known: Sequence[KnownStory]) -> None:
    """No frame of the known stories may show somebody new, or be one of theirs.

    By id and by pixels. Raises FramesSeen.
    """
    stories = together(new)
    frames = [frame for story in stories for frame in story.frames]
    ids, digests = {frame.id for frame in frames}, {frame.digest for frame in frames}
    new_ids = {story.id for story in stories} | _NEW_IDS
    for frame in (frame for story in known for frame in story.frames):
        if frame.characters & new_ids:
            raise FramesSeen(f"{frame.id} shows somebody new")
        if frame.id in ids or frame.digest in digests:
            raise FramesSeen(f"{frame.id} is a frame of the new character's story")
