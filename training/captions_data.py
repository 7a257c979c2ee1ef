"""The pictures and texts LLaVA learns from: drawn once into a memory map, then turned into token rows.

A row is one picture with one to three questions about it. They share the picture's tokens: each question sees the
picture and itself, and not the other questions, at the positions it would have alone. That trains exactly the
single-question prompts of serving at about 60 % of their cost.

Pure but for the files of the cache; knows no model and no optimiser. Shapes: B rows, N tokens, H and W pixels.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from services.models.captions import prompts
from services.models.tokenizer import StoryTokenizer
from training.pictures import STORY_BREADTHS, ShelfRecipe, shelf
from training.toon import world
from training.toon.cast import MAIN
from training.toon.grammar import describe_plainly, phrase
from training.toon.lexicon import SETTING_CUES
from training.toon.render import render
from training.toon.scene import Scene
from training.toon.stories import TOLD_TIME_CUES, told_value

FRAMES_PER_STORY = 5
IGNORED = -100  # label of a token that is read and not written


@dataclass(frozen=True)
class CacheRecipe:
    """How much of the world is drawn."""

    stories_count: int = 4000
    frames_count: int = 8000  # single frames with side characters: what the eyes learn from first
    size_px: int = 128
    seed: int = 1000
    split: str = "train"


@dataclass(frozen=True)
class Frame:
    """The truth and the texts of one picture."""

    picture: int  # row of the memory map
    scene: Scene
    caption: str  # empty for a single frame
    description: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of those in the picture who have one."""
        return tuple(actor.character.name for actor in self.scene.actors if actor.character.name)


@dataclass(frozen=True)
class Frames:
    """Single frames and their pictures."""

    images_NHWC: npt.NDArray[np.uint8]
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Stories:
    """Five-frame stories and their pictures."""

    images_NHWC: npt.NDArray[np.uint8]
    stories: tuple[tuple[Frame, ...], ...]


def draw_frames(folder: Path, recipe: CacheRecipe) -> Frames:
    """Single frames, drawn into `folder` or found there."""

    def sampled() -> Iterator[tuple[Scene, list[object]]]:
        for number in range(recipe.frames_count):
            frame = world.sample_frame(recipe.seed + number, split=recipe.split)
            yield frame.scene, [frame.scene.to_json(), frame.wording_seed]

    images, raws = _draw(folder, recipe, "frames", recipe.frames_count, sampled)
    return Frames(images, tuple(_single(n, Scene.from_json(str(text))) for n, (text, *_) in enumerate(raws)))


def draw_stories(folder: Path, recipe: CacheRecipe) -> Stories:
    """Stories, drawn into `folder` or found there."""

    def sampled() -> Iterator[tuple[Scene, list[object]]]:
        for number in range(recipe.stories_count):
            for frame in world.sample_story(recipe.seed + number, split=recipe.split).frames:
                yield frame.scene, [frame.scene.to_json(), frame.caption, frame.description]

    images, raws = _draw(folder, recipe, "stories", recipe.stories_count * FRAMES_PER_STORY, sampled)
    frames = [
        Frame(picture, Scene.from_json(str(text)), str(caption), str(description))
        for picture, (text, caption, description) in enumerate(raws)
    ]
    starts = range(0, len(frames), FRAMES_PER_STORY)
    return Stories(images, tuple(tuple(frames[start : start + FRAMES_PER_STORY]) for start in starts))


def shelf_frames(recipe: ShelfRecipe) -> Frames:
    """The frames of a shelf of single pictures."""
    frames = recipe.frames(recipe.seeds)
    return Frames(shelf(recipe), tuple(_single(n, frame.scene) for n, frame in enumerate(frames)))


def _single(picture: int, scene: Scene) -> Frame:
    return Frame(picture, scene, "", describe_plainly(scene))


def shelf_stories(recipe: ShelfRecipe) -> Stories:
    """The stories of a shelf."""
    stories = [world.sample_story(seed, recipe.split, STORY_BREADTHS[recipe.breadth]) for seed in recipe.seeds]
    frames = [
        Frame(picture, frame.scene, frame.caption, frame.description)
        for picture, frame in enumerate(frame for story in stories for frame in story.frames)
    ]
    starts = range(0, len(frames), FRAMES_PER_STORY)
    return Stories(shelf(recipe), tuple(tuple(frames[start : start + FRAMES_PER_STORY]) for start in starts))


def _draw(
    folder: Path,
    recipe: CacheRecipe,
    kind: str,
    count: int,
    sampled: Callable[[], Iterator[tuple[Scene, list[object]]]],
) -> tuple[npt.NDArray[np.uint8], list[list[object]]]:
    """Pictures as a memory map and one JSON row each; the JSON file comes last, so it is there only when all is."""
    folder.mkdir(parents=True, exist_ok=True)
    rows_file, images_file = folder / f"{kind}.json", folder / f"{kind}.u8"
    shape = (count, recipe.size_px, recipe.size_px, 3)
    wanted = {"kind": kind, **asdict(recipe)}
    if not rows_file.exists() or json.loads(rows_file.read_text(encoding="utf-8"))["recipe"] != wanted:
        rows_file.unlink(missing_ok=True)
        images = np.memmap(images_file, dtype=np.uint8, mode="w+", shape=shape)
        rows: list[list[object]] = []
        for scene, row in sampled():
            images[len(rows)] = render(scene, size_px=recipe.size_px)
            rows.append(row)
        images.flush()
        rows_file.write_text(json.dumps({"recipe": wanted, "rows": rows}), encoding="utf-8")
    document = json.loads(rows_file.read_text(encoding="utf-8"))
    return np.memmap(images_file, dtype=np.uint8, mode="r", shape=shape), document["rows"]


# What a generated previous frame looks like next to a drawn one: softer, noisier, blocky.


def degrade(image_HWC: npt.NDArray[np.uint8], rng: random.Random) -> npt.NDArray[np.uint8]:
    """The picture as a VAE, a short sampler or a JPEG file may hand it back; about half of all are left as they are."""
    if rng.random() < 0.5:
        return image_HWC
    picture = Image.fromarray(image_HWC)
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.4)))
    if rng.random() < 0.4:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(25, 85))
        picture = Image.open(file).convert("RGB")
    pixels: npt.NDArray[np.floating] = np.asarray(picture).astype(np.float32)
    if rng.random() < 0.5:
        block_px = rng.choice((1, 4))  # fine grain, or the blotches of a decoder
        grid = (pixels.shape[0] // block_px, pixels.shape[1] // block_px, 3)
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0.0, rng.uniform(2.0, 10.0), grid)
        pixels = pixels + noise.repeat(block_px, axis=0).repeat(block_px, axis=1)
    if rng.random() < 0.5:
        gains = np.array([rng.uniform(0.93, 1.07) for _ in range(3)], dtype=np.float32)
        pixels = np.asarray(pixels * gains + rng.uniform(-8.0, 8.0))
    degraded: npt.NDArray[np.uint8] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return degraded


_ONSETS = (
    "b",
    "br",
    "c",
    "ch",
    "d",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "sh",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ee", "oo", "ai")
_CODAS = ("", "", "", "n", "l", "m", "r", "s", "x", "tt", "nk", "ck")


def invented_name(rng: random.Random) -> str:
    """A pronounceable name nobody has."""
    syllables = rng.choice((2, 2, 2, 3))
    letters = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return (letters + rng.choice(_CODAS)).capitalize()


def rename(texts: Sequence[str], new_names: Mapping[str, str]) -> list[str]:
    """The texts with whole-word names replaced."""
    if not new_names:
        return list(texts)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(new_names))) + r")\b")
    return [pattern.sub(lambda match: new_names[match.group(1)], text) for text in texts]


def renamed(texts: Sequence[str], names: Sequence[str], ratio: float, rng: random.Random) -> list[str]:
    """The texts, at a chance of `ratio` with invented names."""
    return rename(texts, {name: invented_name(rng) for name in names} if rng.random() < ratio else {})


def story_names(story: world.Story) -> list[str]:
    """Everybody's name, once, in order."""
    named = (actor.character.name for frame in story.frames for actor in frame.scene.actors)
    return sorted({name for name in named if name})


@dataclass(frozen=True)
class Row:
    """One picture and its questions, tokenised; a tale has no picture."""

    image_HWC: npt.NDArray[np.uint8] | None
    ids: tuple[int, ...]
    labels: tuple[int, ...]  # IGNORED where nothing is learned; labels[n] is what ids[n] should be
    positions: tuple[int, ...]
    segments: tuple[int, ...]  # 0 for the picture, 1.. for each question


@dataclass(frozen=True)
class RowRecipe:
    """What a row asks and how its texts are varied."""

    tasks: tuple[str, ...] = ("describe", "story", "descriptive")
    image_tokens_count: int = 64
    context_tokens: int = 512
    rename_ratio: float = 0.2  # rows whose named characters get invented names: a name must be copied, not recalled
    looks_ratio: float = 0.5  # how often somebody whom no pack knows is introduced, as a new character would be
    # Descriptions over another story's picture, where the captions leave open where it is: the picture says so.
    elsewhere_ratio: float = 0.25
    long_history_ratio: float = 0.1  # story questions that begin with another story's captions
    learn_captions_so_far: bool = False  # also learn to write the story question's captions: they are stories too


def story_row(
    stories: Stories,
    story: Sequence[Frame],
    index: int,
    recipe: RowRecipe,
    tokenizer: StoryTokenizer,
    rng: random.Random,
) -> Row:
    """The row of frame `index` (0 to 3): its description, the next caption, and the next caption's description."""
    now, following = story[index], story[index + 1]
    captions = [frame.caption for frame in story[: index + 1]]
    if rng.random() < recipe.long_history_ratio:
        earlier = rng.choice(stories.stories)
        captions = [frame.caption for frame in earlier[: rng.randint(1, FRAMES_PER_STORY)]] + captions
    names = sorted({name for frame in story for name in frame.names})
    renaming = {name: invented_name(rng) for name in names} if rng.random() < recipe.rename_ratio else {}
    captions = rename(captions, renaming)
    scene, picture = following.scene, now.picture
    if recipe.tasks == ("descriptive",) and rng.random() < recipe.elsewhere_ratio:
        other = rng.choice(rng.choice(stories.stories))
        moved = moved_to(other.scene, now, following)
        if moved is not None:
            scene, picture = moved, other.picture
    now_description, following_caption, following_description, *cast = rename(
        [
            describe_plainly(now.scene),
            following.caption,
            describe_plainly(scene),
            *_looks(story, index, recipe, rng),
        ],
        renaming,
    )
    budget = recipe.context_tokens - recipe.image_tokens_count + 1 - 96
    questions: list[tuple[prompts.Prompt, str]] = []
    for task in recipe.tasks:
        match task:
            case "describe":
                questions.append((prompts.picture_prompt(tokenizer), now_description))
            case "story":
                questions.append((prompts.story_prompt(tokenizer, captions, budget), following_caption))
            case "descriptive":
                prompt = prompts.description_prompt(tokenizer, captions[-1], following_caption, budget, cast)
                questions.append((prompt, following_description))
            case _:
                raise ValueError(f"unknown task {task!r}")
    return _row(degrade(stories.images_NHWC[picture], rng), questions, recipe, tokenizer)


def moved_to(other: Scene, now: Frame, following: Frame) -> Scene | None:
    """The scene that follows when the picture before it was `other`; None where the captions say where it is.

    What a caption tells stays; the time of day is the picture's only where it did not change.
    """
    texts = (now.caption, following.caption)
    if now.scene.setting != following.scene.setting or any(told_value(SETTING_CUES, text) for text in texts):
        return None
    silent = now.scene.time == following.scene.time and not any(told_value(TOLD_TIME_CUES, text) for text in texts)
    time = other.time if silent else following.scene.time
    return replace(following.scene, setting=other.setting, time=time, side=other.side, weather=other.weather)


def _looks(story: Sequence[Frame], index: int, recipe: RowRecipe, rng: random.Random) -> list[str]:
    """What those look like whom the captions name: the cast that a pack knows, those whom an earlier description told.

    Sometimes others too, as a new character would be. Nobody described the first frame, a user gave it.
    """
    people = {a.character.name: a.character for frame in story for a in frame.scene.actors if a.character.name}
    described = {a.character.name for frame in story[1 : index + 1] for a in frame.scene.actors}
    known = {
        name: phrase(character.look)
        for name, character in sorted(people.items())
        if character in MAIN or name in described or rng.random() < recipe.looks_ratio
    }
    return list(prompts.cast_lines(known, [frame.caption for frame in story[: index + 2]]))


def tale_row(captions: Sequence[str], recipe: RowRecipe, tokenizer: StoryTokenizer, rng: random.Random) -> Row:
    """The story question without its picture, about a random place of a story; its captions are learned too.

    How stories go is a matter of words, and words alone cost a third. Positions stay as if the picture were there.
    """
    last = rng.randint(1, len(captions) - 1)
    budget = recipe.context_tokens - recipe.image_tokens_count + 1 - 96
    prompt = prompts.story_prompt(tokenizer, captions[:last], budget)
    row = _row(None, [(prompt, captions[last])], replace(recipe, learn_captions_so_far=True), tokenizer)
    real = [n for n, index in enumerate(row.ids) if index != tokenizer.image_id]
    return Row(
        None,
        *(tuple(values[n] for n in real) for values in (row.ids, row.labels, row.positions, row.segments)),
    )


def frame_row(
    frames: Frames | Stories, frame: Frame, recipe: RowRecipe, tokenizer: StoryTokenizer, rng: random.Random
) -> Row:
    """The row of a single frame: its description only."""
    renaming = {name: invented_name(rng) for name in frame.names} if rng.random() < recipe.rename_ratio else {}
    [description] = rename([frame.description], renaming)
    questions = [(prompts.picture_prompt(tokenizer), description)]
    return _row(degrade(frames.images_NHWC[frame.picture], rng), questions, recipe, tokenizer)


def _row(
    image_HWC: npt.NDArray[np.uint8] | None,
    questions: Sequence[tuple[prompts.Prompt, str]],
    recipe: RowRecipe,
    tokenizer: StoryTokenizer,
) -> Row:
    opening = prompts.picture_opening(tokenizer)
    place = opening.index(tokenizer.image_id)
    shared = [*opening[:place], *[tokenizer.image_id] * recipe.image_tokens_count, *opening[place + 1 :]]
    ids, labels = list(shared), [IGNORED] * len(shared)
    positions, segments = list(range(len(shared))), [0] * len(shared)
    for number, (prompt, answer) in enumerate(questions, start=1):
        question = list(prompt.ids[len(opening) :])
        reply = prompts.answer_ids(tokenizer, answer)
        ids += [*question, *reply]
        learned = recipe.learn_captions_so_far and bool(prompt.captions_kept)
        labels += [IGNORED, *question[1:]] if learned else [IGNORED] * len(question)
        labels += reply
        positions += range(len(shared), len(shared) + len(question) + len(reply))
        segments += [number] * (len(question) + len(reply))
    return Row(image_HWC, tuple(ids), tuple(labels), tuple(positions), tuple(segments))


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length. Padding is a segment of its own, so nothing real sees it."""

    images_BHWC: npt.NDArray[np.uint8] | None  # None where the rows have none
    ids_BN: npt.NDArray[np.int64]
    labels_BN: npt.NDArray[np.int64]
    positions_BN: npt.NDArray[np.int64]
    visible_B1NN: npt.NDArray[np.bool_]  # [b,0,i,j]: token i may read token j


def batch(rows: Sequence[Row], pad_id: int) -> Batch:
    """Stack rows; see `Batch`."""
    longest = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> npt.NDArray[np.int64]:
        return np.array([[*row, *[fill] * (longest - len(row))] for row in values], dtype=np.int64)

    segments_BN = padded([row.segments for row in rows], -1)
    same_BNN = segments_BN[:, :, None] == segments_BN[:, None, :]
    visible_BNN = (same_BNN | (segments_BN[:, None, :] == 0)) & np.tri(longest, dtype=np.bool_)
    images = [row.image_HWC for row in rows if row.image_HWC is not None]
    if images and len(images) < len(rows):
        raise ValueError("rows with and without a picture do not go together")
    return Batch(
        images_BHWC=np.stack(images) if images else None,
        ids_BN=padded([row.ids for row in rows], pad_id),
        labels_BN=padded([row.labels for row in rows], IGNORED),
        positions_BN=padded([row.positions for row in rows], 0),
        visible_B1NN=visible_BNN[:, None],
    )
