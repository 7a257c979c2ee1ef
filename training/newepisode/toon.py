"""Two casts of the toon world, as the paper has two data sets, in the same shape: windows of five overlap in episodes.

An episode is two stories of one hero, one after the other: ten frames, six windows, as in the published data.
Everything follows from ids: the same cast, hero and number give the same frames on every machine.

Nobody new was ever shown to the pack's frame model. For nine of them and Zora the world itself sees to that (`splits`);
the five others have a species, colour and accessory that none of the strangers has whom the frame model's recipe draws.
`check_pretraining` asserts it for all fifteen, frame by frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from training.customize_errors import FramesSeen
from training.new_story import KnownStory, NewStory, SeenFrame
from training.newepisode.records import WINDOW_CLIPS, Clip, Corpus, Window
from training.newepisode.registry import NewCharacter, Registry
from training.pictures import ShelfRecipe
from training.toon.cast import MAIN, NEW, combination
from training.toon.grammar import describe_plainly, phrase
from training.toon.render import render
from training.toon.scene import Character, Look
from training.toon.seeding import generator
from training.toon.stories import Story, StoryFrame, draw_story

_STORIES = 2  # of an episode
_PREFIX = "newepisode"


@dataclass(frozen=True, kw_only=True)
class ToonCast:
    """Who is new, who else is in the stories, and the paper's λ₁ and λ₂ for the data set in whose place it is."""

    name: str
    stands_for: str
    new: tuple[Character, ...]
    old: tuple[Character, ...]
    adversarial: float
    distillation: float

    @property
    def registry(self) -> Registry:
        """The new ones, by name and phrase."""
        return Registry(
            tuple(
                NewCharacter(id=one.id, names=(str(one.name),), phrase=phrase(one.look), noun=one.look.species)
                for one in self.new
            )
        )


def _further(name: str, pronoun: str, colour: str, species: str, accessory_colour: str, accessory: str) -> Character:
    look = Look(species=species, colour=colour, accessory=accessory, accessory_colour=accessory_colour)
    return Character(id=f"further-{name.lower()}", name=name, pronoun=pronoun, look=look)


FURTHER: tuple[Character, ...] = (
    _further("Lotte", "she", "white", "frog", "red", "flower"),
    _further("Tuli", "he", "purple", "koala", "yellow", "bow tie"),
    _further("Wanda", "she", "yellow", "cow", "green", "earmuffs"),
    _further("Vito", "he", "red", "lion", "blue", "wizard hat"),
    _further("Rufus", "he", "black", "dog", "yellow", "beanie"),
)
MEADOW = ToonCast(
    name="meadow", stands_for="Flintstones", new=NEW[:9], old=MAIN[:4], adversarial=0.75, distillation=0.5
)
HARBOUR = ToonCast(
    name="harbour", stands_for="Pororo", new=(NEW[9], *FURTHER), old=MAIN[4:], adversarial=0.25, distillation=0.25
)
CASTS: dict[str, ToonCast] = {cast.name: cast for cast in (MEADOW, HARBOUR)}


@lru_cache(maxsize=4096)
def _episode(cast_name: str, hero: Character, number: int) -> tuple[StoryFrame, ...]:
    rng = generator(_PREFIX, cast_name, hero.id, number)
    frames: list[StoryFrame] = []
    for _ in range(_STORIES):
        company = rng.sample([one for one in CASTS[cast_name].old if one.id != hero.id], 2)
        story: Story = draw_story(rng, hero, (company[0], company[1]))
        frames += story.frames
    return tuple(frames)


def _heroes(cast: ToonCast) -> dict[str, Character]:
    return {one.id: one for one in (*cast.new, *cast.old)}


def story_frame(cast: ToonCast, clip: str) -> StoryFrame:
    """The frame that a clip's id means. Raises ValueError for an id of another cast or of nobody."""
    prefix, name, hero, number, beat = clip.split(":")
    if (prefix, name) != (_PREFIX, cast.name) or hero not in _heroes(cast):
        raise ValueError(f"{clip!r} is no clip of {cast.name}")
    return _episode(cast.name, _heroes(cast)[hero], int(number))[int(beat)]


def toon_corpus(cast: ToonCast, new_episodes: int, old_episodes: int) -> Corpus:
    """So many episodes of each new hero, and of each old one. All windows are published as "train"."""
    clips: dict[str, Clip] = {}
    windows: list[Window] = []
    new_ids = {one.id for one in cast.new}
    for heroes, count in ((cast.new, new_episodes), (cast.old, old_episodes)):
        for hero in heroes:
            for number in range(count):
                ids = []
                for beat, frame in enumerate(_episode(cast.name, hero, number)):
                    ids.append(f"{_PREFIX}:{cast.name}:{hero.id}:{number}:{beat}")
                    shown = frozenset(actor.character.id for actor in frame.scene.actors)
                    clips[ids[-1]] = Clip(id=ids[-1], caption=frame.caption, new=shown & new_ids, known=shown - new_ids)
                starts = range(len(ids) - WINDOW_CLIPS + 1)
                spans = [tuple(ids[first : first + WINDOW_CLIPS]) for first in starts]
                windows += [Window(id=span[0], clips=span, split="train") for span in spans]
    return Corpus(f"{_PREFIX}-{cast.name}", clips, tuple(windows))


def seen_frame(cast: ToonCast, clip: str, size_px: int) -> SeenFrame:
    """A clip as a customization learns from it."""
    frame = story_frame(cast, clip)
    return SeenFrame(
        id=clip,
        pixels=render(frame.scene, size_px),
        caption=frame.caption,
        descriptions=(frame.description, describe_plainly(frame.scene)),
        characters=frozenset(actor.character.id for actor in frame.scene.actors),
    )


def new_story(cast: ToonCast, character: str, lesson: Window, size_px: int) -> NewStory:
    """A lesson as a customization is given it. Raises StoryInvalid for a window that does not show them throughout."""
    who = _heroes(cast)[character]
    return NewStory(
        id=who.id,
        name=str(who.name),
        phrase=phrase(who.look),
        noun=who.look.species,
        frames=tuple(seen_frame(cast, clip, size_px) for clip in lesson.clips),
    )


def known_stories_of(cast: ToonCast, windows: Sequence[Window], size_px: int) -> tuple[KnownStory, ...]:
    """Windows of pretraining, as stories of those whom the pack knows."""
    return tuple(KnownStory(frames=tuple(seen_frame(cast, clip, size_px) for clip in one.clips)) for one in windows)


def check_pretraining(characters: Iterable[Character], shelves: Iterable[ShelfRecipe]) -> int:
    """How many frames of a frame model's recipe were looked through for the new characters' looks and ids.

    Raises FramesSeen naming the frame that shows one: the same species, colour and accessory are the same character.
    """
    new = {combination(one.look): one.name for one in characters}
    ids = {one.id for one in characters}
    count = 0
    for recipe in shelves:
        per_seed = recipe.pictures_count // recipe.count
        for number, scene in enumerate(recipe.scenes(recipe.seeds)):
            count += 1
            for actor in scene.actors:
                if combination(actor.character.look) in new or actor.character.id in ids:
                    seed, beat = divmod(number, per_seed)
                    frame = f"{recipe.breadth}:{recipe.split}:{recipe.first_seed + seed}:{beat}"
                    who = new.get(combination(actor.character.look), actor.character.name)
                    raise FramesSeen(f"{frame}, which the frame model was trained on, shows {who}")
    return count


_looks = [combination(one.look) for one in (*MAIN, *NEW, *FURTHER)]
if len(set(_looks)) != len(_looks):
    raise AssertionError("a further new character looks like one of the cast")
