"""Measures what a character's weights are worth: is the new one recognised, and are the old ones still themselves?

    python -m training.evaluation.character otto.safetensors [--pack DIR] [--frames 24] [--sheet FILE]

Frames of the "new" split that show the character, and of the "test" split that show the main cast alone, are drawn with
and without the weights, from the same noise, and read by the judge:

* `told_*` the description tells the look, as a captioner writes it; `named_*` it says the name alone, so that what is
  right can only come from the weights;
* `old_*` the main cast;
* `*_without`, `*_with` shares of figures that are right; `*_gain`, `*_drop` the difference, frame by frame;
* `*_recognised` species, colour and accessory are right at once; `*_look` the accessory's colour, too;
* `judge_*` the judge on the true pictures: no figure above can be trusted beyond it.

Frames are drawn without references: an earlier frame would show what the weights should know. None of them was learned
from; that is checked, by id and by pixels, against the card beside the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from services.models.character import CharacterWeights
from services.models.denoiser import StoryDenoiser
from services.models.drawing import Drawing, Pixels, Sketch, begin, finish
from services.models.errors import ModelError
from services.models.lora import NOBODY, Adapter, AdapterSlots, Outfit, Worn, read_adapter_file
from services.models.pack import load_pack
from services.models.references import ReferenceCache
from services.models.registry import FrameModel, load_frame_model
from services.models.step import advance
from services.models.text_encoder import NO_WORDS, Words
from training.customize import card_path
from training.customize_errors import CustomizationError, FramesSeen, StoryInvalid
from training.evaluation.figures import Figure, difference, share, table
from training.evaluation.frames import FIRST_SEED, Task
from training.evaluation.judge import Judge, load_judge
from training.evaluation.toon import DEFAULT_PACK
from training.new_story import Called, SeenFrame
from training.toon.cast import MAIN, NEW
from training.toon.grammar import describe_plainly
from training.toon.picture import grid, save_png
from training.toon.render import render
from training.toon.scene import Scene
from training.toon.world import sample_frame
from training.verdicts import Someone, Verdict, truth

QUESTIONS = ("species", "colour", "accessory", "accessory_colour")
LOOK = "look"  # all of them at once
RECOGNISED = "recognised"  # species, colour and accessory: what makes somebody the same character in this world
_MAKE_SOMEBODY = QUESTIONS[:3]
_TOGETHER = 8  # frames drawn in one batch
_SEARCHED = 60  # frames looked through for each that is wanted
_MAIN_IDS = frozenset(character.id for character in MAIN)
_SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Dressed:
    """A model that draws one character with what they wear; nobody when it wears nothing."""

    model: FrameModel
    characters: tuple[CharacterWeights, ...] = ()
    outfit: Outfit = ()
    words: Words = field(default_factory=lambda: NO_WORDS)


def dressed(model: FrameModel, adapter: Adapter) -> Dressed:
    """`model` with a character's weights, as the frame service draws them. Hooks stay in the model's UNet."""
    characters = (CharacterWeights(adapter.digest),)
    if adapter.unet is not None:
        denoiser = StoryDenoiser(adapter.unet, model.denoiser.schedule)
        return Dressed(replace(model, denoiser=denoiser), characters, (NOBODY,), adapter.words)
    if not adapter.needs_slot:
        return Dressed(model, characters, (NOBODY,), adapter.words)
    slots = AdapterSlots(model.denoiser.unet, 1, max(1, adapter.rank))
    slots.put(1, adapter)
    return Dressed(replace(model, slots=slots), characters, (Worn(1, 1.0),), adapter.words)


def drawn(who: Dressed, tasks: Sequence[Task], steps: int | None = None) -> list[Pixels]:
    """Every task's picture; `steps` None: as many as the pack takes."""
    sampling, manifest = who.model.manifest.sampling, who.model.manifest
    pictures: list[Pixels] = []
    for first in range(0, len(tasks), _TOGETHER):
        drawings: list[Drawing] = [
            begin(
                who.model,
                Sketch(
                    description=task.description,
                    seed=task.seed,
                    width_px=manifest.width_px,
                    height_px=manifest.height_px,
                    steps=steps or sampling.default_steps,
                    text_guidance=sampling.default_text_guidance,
                    image_guidance=sampling.default_image_guidance,
                    references=task.references,
                    characters=who.characters,
                ),
                who.outfit,
                words=who.words,
            )
            for task in tasks[first : first + _TOGETHER]
        ]
        cache = ReferenceCache()
        while not drawings[0].finished:
            advance(who.model, drawings, cache)
        pictures += finish(who.model, drawings)
    return pictures


def new_scenes(character: str, count: int) -> list[tuple[str, Scene]]:
    """Held-out frames that show a new character, by id."""
    return _scenes("new", count, lambda scene: any(actor.character.id == character for actor in scene.actors))


def old_scenes(count: int) -> list[tuple[str, Scene]]:
    """Held-out frames that show the main cast and nobody else, by id."""
    return _scenes("test", count, lambda scene: all(actor.character.id in _MAIN_IDS for actor in scene.actors))


def _scenes(split: str, count: int, wanted: Callable[[Scene], bool]) -> list[tuple[str, Scene]]:
    found: list[tuple[str, Scene]] = []
    for seed in range(FIRST_SEED, FIRST_SEED + _SEARCHED * count):
        if len(found) == count:
            break
        scene = sample_frame(seed, split).scene
        if wanted(scene):
            found.append((f"frame:{split}:{seed}", scene))
    return found


def check_unseen(scenes: Sequence[tuple[str, Scene]], card: Mapping[str, Any], size_px: int) -> None:
    """Raises FramesSeen when a run saw one of the frames it is measured on, by id or by pixels."""
    seen = {**card["dataset"]["new"], **card["dataset"]["existing"]}
    digests = set(seen.values())
    for frame_id, scene in scenes:
        frame = SeenFrame(
            id=frame_id, pixels=render(scene, size_px), caption="", descriptions=(), characters=frozenset()
        )
        if frame_id in seen or frame.digest in digests:
            raise FramesSeen(f"{frame_id} was learned from, so nothing can be measured on it")


def told_and_named(character: Mapping[str, str], scene: Scene) -> tuple[str, str]:
    """A scene's description with the character's look, and with the name alone."""
    told = describe_plainly(scene)
    return told, Called(name=character["name"], phrase=character["phrase"], noun=character["noun"]).by_name(told)


def right(said: Sequence[Verdict], true: Sequence[Verdict], whom: Sequence[Sequence[int]]) -> dict[str, list[bool]]:
    """Right or wrong, per question, of the figures `whom` of each picture; all wrong where their number is."""
    out: dict[str, list[bool]] = {name: [] for name in (*QUESTIONS, LOOK, RECOGNISED)}
    for seen, real, places in zip(said, true, whom, strict=True):
        for place in places:
            there: Someone | None = seen.figures[place] if len(seen.figures) == len(real.figures) else None
            should = real.figures[place]
            for name in QUESTIONS:
                out[name].append(there is not None and getattr(there, name) == getattr(should, name))
            out[LOOK].append(there is not None and there.look == should.look)
            out[RECOGNISED].append(all(out[name][-1] for name in _MAKE_SOMEBODY))
    return out


def compared(prefix: str, without: Mapping[str, list[bool]], worn: Mapping[str, list[bool]]) -> list[Figure]:
    """Shares without and with the weights, and how much was gained, question by question."""
    figures: list[Figure] = []
    for name in (*QUESTIONS, LOOK, RECOGNISED):
        figures += [share(f"{prefix}_{name}_without", without[name]), share(f"{prefix}_{name}_with", worn[name])]
        figures.append(difference(f"{prefix}_{name}_gain", _numbers(worn[name]), _numbers(without[name])))
    return figures


def _numbers(values: Sequence[bool]) -> list[float]:
    return [float(value) for value in values]


def character_figures(
    model: FrameModel, judge: Judge, adapter: Adapter, card: Mapping[str, Any], count: int, sheet: Path | None = None
) -> list[Figure]:
    """Everything that is measured of one character.

    Raises StoryInvalid for somebody whom the world does not draw, and FramesSeen.
    """
    character, size = card["character"], model.manifest.width_px
    if character["id"] not in {one.id for one in NEW}:
        raise StoryInvalid(f"{character['id']!r} is none of the world's new characters", field="character")
    new, old = new_scenes(character["id"], count), old_scenes(count)
    check_unseen([*new, *old], card, size)
    texts = [told_and_named(character, scene) for _, scene in new]
    tasks = {
        "told": [Task(scene, texts[number][0], number) for number, (_, scene) in enumerate(new)],
        "named": [Task(scene, texts[number][1], number) for number, (_, scene) in enumerate(new)],
        "old": [Task(scene, describe_plainly(scene), number) for number, (_, scene) in enumerate(old)],
    }
    whom = {name: [_places(task.scene, None if name == "old" else character["id"]) for task in own]
            for name, own in tasks.items()}  # fmt: skip
    # Without the weights first: they leave hooks, which add nothing for nobody but are not there at all yet.
    plain = {name: drawn(Dressed(model), own) for name, own in tasks.items()}
    who = dressed(model, adapter)
    worn = {name: drawn(who, own) for name, own in tasks.items()}
    figures: list[Figure] = []
    for name, own in tasks.items():
        true = [truth(task.scene) for task in own]
        pictures = [render(task.scene, size) for task in own]
        if name != "named":  # the same pictures as told
            sure = right(judge.verdicts(pictures), true, whom[name])
            figures += [share(f"judge_{name}_{question}", sure[question]) for question in (LOOK, RECOGNISED)]
        without, with_them = (right(judge.verdicts(one[name]), true, whom[name]) for one in (plain, worn))
        figures += compared(name, without, with_them)
    if sheet is not None:
        rows = [[render(task.scene, size) for task in tasks["told"]]]
        rows += [one[name] for name in ("told", "named") for one in (plain, worn)]
        save_png(grid([row[:_SHEET_COLUMNS] for row in rows]), sheet)
    return [_dropped(figure) for figure in figures]


def _places(scene: Scene, character: str | None) -> list[int]:
    """Where the character stands from left to right; everybody's place for None."""
    return [place for place, actor in enumerate(scene.actors) if character in (None, actor.character.id)]


def _dropped(figure: Figure) -> Figure:
    """What the old cast gained, told as what it lost."""
    if not (figure.name.startswith("old_") and figure.name.endswith("_gain")):
        return figure
    name = figure.name.removesuffix("_gain") + "_drop"
    low, high = (None if value is None else -value for value in (figure.high, figure.low))
    return replace(figure, name=name, value=-figure.value, low=low, high=high)


def main() -> None:
    """Measure a character's weights; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="what training.customize wrote; its card lies beside it")
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK)
    parser.add_argument("--frames", type=int, default=24, help="of the new character, and as many of the main cast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sheet", type=Path, help="the pictures: true; told without, with; named without, with")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        card = json.loads(card_path(arguments.weights).read_text(encoding="utf-8"))
        model = load_frame_model(load_pack(arguments.pack))
        adapter = read_adapter_file(
            arguments.weights, model.denoiser.unet, base_digest=model.base_digest, text_width=model.text.width
        )
        figures = character_figures(model, load_judge(), adapter, card, arguments.frames, arguments.sheet)
    except (CustomizationError, ModelError) as error:
        print(json.dumps({"error": error.reason, "message": str(error)}, ensure_ascii=False), file=sys.stderr)
        sys.exit(1)
    print(table(figures))
    told = {"character": card["character"]["id"], "method": card["recipe"]["method"]["name"], "steps": card["steps"]}
    print(json.dumps({**told, "figures": [figure.as_dict() for figure in figures]}, ensure_ascii=False))


if __name__ == "__main__":
    main()
