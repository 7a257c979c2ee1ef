"""Measures a pack's pictures: its autoencoder, and frames drawn from true descriptions, read by the judge.

* `vae_*` the autoencoder alone, on held-out pictures of the known and of new characters;
* `frame_*` frames 2 to 5 of held-out stories, from their true descriptions with the true earlier frames as references,
  as the product draws; `frame_*_known` and `_held_out` are those without and with a combination kept out of training;
* `crowd_two`, `crowd_three` frames with two and three figures: all who should be there, each with the right look;
  `…_apart` counts only what the figures do to each other: nobody missing, doubled, or with a part of another's look;
* `first_*` frames without references;
* `reference_*` what references are worth: the same frames with them, without, and with another story's;
* `judge_*` the judge on the true pictures of the same frames: no figure above can be trusted beyond it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from services.models.character import CharacterWeights
from services.models.drawing import Drawing, Pixels, Seen, Sketch, begin, finish
from services.models.eyes import as_input
from services.models.lora import AdapterSlots, Outfit, Worn
from services.models.pack import Pack
from services.models.quality import Quality
from services.models.references import EXACT, ReferenceCache, ReferencePolicy
from services.models.registry import FrameModel
from services.models.step import advance
from training.evaluation.figures import Figure, difference, gap, mean, share
from training.evaluation.judge import Judge
from training.toon.reading import parse
from training.toon.render import render
from training.toon.scene import Scene
from training.toon.splits import is_held_out
from training.toon.stories import Story
from training.toon.world import sample_frame, sample_story
from training.vae import psnr_of_pictures
from training.verdicts import Verdict, outcomes, truth

MAX_REFERENCES = 3
FIRST_SEED = 500_000  # seeds of evaluation frames; training's are far below
SEED_STEP = 10_000  # between the stories of one evaluation seed and the next
_TOGETHER = 8  # frames drawn in one batch

FRAME_TARGETS = {"characters": 0.92, "setting": 0.96, "time": 0.97, "action": 0.80, "prop": 0.70}
GAP_TARGET = 0.08
JUDGE_TARGET = 0.98
JUDGED = ("count", "characters", "species", "colours", "look", "action", "mood", "prop", "setting", "time", "side")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A frame to be drawn and its truth."""

    scene: Scene
    description: str
    seed: int
    references: tuple[Seen, ...] = ()

    @property
    def is_held_out(self) -> bool:
        """Whether somebody in it does something, somewhere, that training never showed."""
        return any(is_held_out(actor, self.scene.setting) for actor in self.scene.actors)


def held_out_stories(count: int, seed: int = 0, split: str = "test", breadth: str = "scene") -> list[Story]:
    """The evaluation's stories of one seed; the same ones every time. `breadth` "looks": of heroes of any look."""
    first = FIRST_SEED + SEED_STEP * seed
    return [sample_story(number, split, breadth) for number in range(first, first + count)]


def story_tasks(stories: Sequence[Story], count: int, size_px: int, seed: int = 0) -> list[Task]:
    """Frames 2 to 5 of the stories, with the true earlier frames as references."""
    tasks: list[Task] = []
    for number, story in enumerate(stories):
        seen: list[Seen] = []
        for beat, frame in enumerate(story.frames):
            if beat > 0:
                references = tuple(seen[-MAX_REFERENCES:])
                noise = 1_000_000 * seed + 1000 * number + beat
                tasks.append(Task(frame.scene, frame.description, noise, references))
            seen.append(Seen(pixels=render(frame.scene, size_px), description=frame.description))
    return tasks[:count]


def crowd_tasks(figures_count: int, count: int, size_px: int, seed: int = 0) -> list[Task]:
    """Later frames of held-out stories in which so many figures stand, from as many stories as it takes."""
    found: list[Task] = []
    first = FIRST_SEED + SEED_STEP * seed + SEED_STEP // 2
    for number in range(first, first + 40 * count):
        if len(found) == count:
            break
        story = sample_story(number, split="test")
        if any(len(frame.scene.actors) == figures_count for frame in story.frames[1:]):
            tasks = story_tasks([story], len(story.frames), size_px, seed)
            found.append(next(task for task in tasks if len(task.scene.actors) == figures_count))
    return found


def first_tasks(count: int, seed: int = 0) -> list[Task]:
    """Held-out single frames, without references."""
    first = FIRST_SEED + SEED_STEP * seed
    frames = [sample_frame(number, split="test") for number in range(first, first + count)]
    return [Task(frame.scene, frame.description, number) for number, frame in enumerate(frames)]


def shuffled(tasks: Sequence[Task]) -> list[Task]:
    """The same tasks, each with the references of a task of another story (a quarter of the list further on)."""
    away = max(4, len(tasks) // 4)
    return [replace(task, references=tasks[(i + away) % len(tasks)].references) for i, task in enumerate(tasks)]


@dataclass(frozen=True, kw_only=True)
class Dials:
    """How frames are drawn; None is the pack's own default."""

    steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    policy: ReferencePolicy = EXACT
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    deep_every: int = 1
    quality: Quality = Quality.STANDARD


def draw_all(model: FrameModel, tasks: Sequence[Task], dials: Dials | None = None) -> list[Pixels]:
    """Every task's picture, several at a time."""
    dials = dials or Dials()
    quality = model.manifest.sampling.at(dials.quality)
    characters: tuple[CharacterWeights, ...] = ()
    outfit: Outfit = ()
    if quality.adapter:
        own = model.adapters[quality.adapter]
        slots = AdapterSlots(model.denoiser.unet, 1, own.rank)
        slots.put(1, own)
        model = replace(model, slots=slots)
        characters, outfit = (CharacterWeights(own.digest),), (Worn(1, 1.0),)
    pictures: list[Pixels] = []
    for first in range(0, len(tasks), _TOGETHER):
        drawings: list[Drawing] = [
            begin(
                model,
                Sketch(
                    description=task.description,
                    seed=task.seed,
                    width_px=model.manifest.width_px,
                    height_px=model.manifest.height_px,
                    steps=dials.steps or quality.steps,
                    text_guidance=quality.text_guidance if dials.text_guidance is None else dials.text_guidance,
                    image_guidance=quality.image_guidance if dials.image_guidance is None else dials.image_guidance,
                    references=task.references,
                    characters=characters,
                    guidance_interval=dials.guidance_interval,
                    deep_every=dials.deep_every,
                    policy=dials.policy,
                ),
                outfit,
            )
            for task in tasks[first : first + _TOGETHER]
        ]
        cache = ReferenceCache()
        while not drawings[0].finished:
            advance(model, drawings, cache)
        pictures += finish(model, drawings)
    return pictures


def same_place(task: Task) -> bool:
    """Whether the task's description tells the same place and time as its newest reference's."""
    if not task.references:
        return False
    said, before = parse(task.description), parse(task.references[-1].description)
    return (said.setting, said.time, said.side) == (before.setting, before.time, before.side)


def background_jump(task: Task, picture: Pixels) -> float:
    """Mean difference (0..1) of a drawn frame's upper third to its newest reference's.

    The upper third is mostly background: between frames of one scene this is how much it jumps.
    """
    rows = picture.shape[0] // 3
    here, there = picture[:rows].astype(np.float64), task.references[-1].pixels[:rows].astype(np.float64)
    return float(np.abs(here - there).mean() / 255.0)


def similarities(clip: CLIPModel, pictures: Sequence[Pixels], others: Sequence[Pixels]) -> list[float]:
    """Cosine of the CLIP embeddings of each picture with its other one."""
    with torch.no_grad():
        a, b = (
            F.normalize(clip.get_image_features(as_input(np.stack(p))).pooler_output, dim=-1)
            for p in (pictures, others)
        )
        return [float(v) for v in (a * b).sum(dim=-1)]


def judged(prefix: str, said: Sequence[Verdict], true: Sequence[Verdict], targets: dict[str, float]) -> list[Figure]:
    """One figure per question of the judge."""
    found = outcomes(said, true)
    return [share(f"{prefix}_{name}", found[name], targets.get(name)) for name in found if found[name]]


def vae_figures(model: FrameModel, judge: Judge, count: int, seed: int) -> list[Figure]:
    """Reconstruction, and whether looks that training never showed survive it."""
    figures = []
    first = FIRST_SEED + SEED_STEP * seed
    for name, split in (("known", "test"), ("new", "new")):
        scenes = [sample_frame(i, split=split).scene for i in range(first, first + count)]
        pictures = np.stack([render(scene, model.manifest.width_px) for scene in scenes])
        again, psnr = psnr_of_pictures(model.codec.vae, pictures)
        figures.append(mean(f"vae_psnr_db_{name}", psnr, 27.0 if name == "known" else None))
        true = [truth(scene) for scene in scenes]
        sure = outcomes(judge.verdicts(pictures), true)  # what a perfect autoencoder would reach
        found = outcomes(judge.verdicts(again), true)
        figures.append(share(f"vae_look_{name}", found["look"], 0.90 if name == "new" else None))
        figures.append(share(f"vae_look_{name}_untouched", sure["look"]))
    return figures


def speed_figure(model: FrameModel, tasks: Sequence[Task]) -> Figure:
    """Seconds of a frame that is drawn alone, on all of torch's threads; the first one warms up."""
    seconds = []
    for task in tasks:
        start = time.perf_counter()
        draw_all(model, [task])
        seconds.append(time.perf_counter() - start)
    return mean("frame_seconds", seconds[1:] or seconds, 1.5, at_most=True)


def frame_figures(
    model: FrameModel, judge: Judge, tasks: Sequence[Task], say: Say
) -> tuple[list[Figure], list[Pixels]]:
    """Story frames from true descriptions, and the judge's own accuracy on their true pictures."""
    true = [truth(task.scene) for task in tasks]
    figures = [
        f
        for f in judged(
            "judge",
            judge.verdicts([render(task.scene, model.manifest.width_px) for task in tasks]),
            true,
            dict.fromkeys(JUDGED, JUDGE_TARGET),
        )
        if f.name.removeprefix("judge_") in JUDGED
    ]
    drawn = draw_all(model, tasks)
    said = judge.verdicts(drawn)
    figures += judged("frame", said, true, FRAME_TARGETS)
    apart = {
        name: judged(
            f"frame_{name}",
            [v for v, task in zip(said, tasks, strict=True) if task.is_held_out is held_out],
            [v for v, task in zip(true, tasks, strict=True) if task.is_held_out is held_out],
            {},
        )
        for name, held_out in (("known", False), ("held_out", True))
    }
    by_name = {f.name: f for group in apart.values() for f in group}
    for question in FRAME_TARGETS:
        known, held_out = by_name.get(f"frame_known_{question}"), by_name.get(f"frame_held_out_{question}")
        if known and held_out:
            figures += [known, held_out, gap(f"gap_{question}", known, held_out, GAP_TARGET)]
    say(f"frames: {len(tasks)} story frames")
    return figures, drawn


def crowd_figures(model: FrameModel, judge: Judge, count: int, seed: int, say: Say) -> list[Figure]:
    """Two and three in a frame: nobody missing, doubled or blended with another; and all there with the right look.

    The promise is the first (`_apart`); the second, which also counts every wrong button, is held to the same numbers.
    """
    figures = []
    for name, number, target in (("two", 2, 0.85), ("three", 3, 0.70)):
        tasks = crowd_tasks(number, count, model.manifest.width_px, seed)
        found = outcomes(judge.verdicts(draw_all(model, tasks)), [truth(task.scene) for task in tasks])
        figures.append(share(f"crowd_{name}", found["whole"], target))
        figures.append(share(f"crowd_{name}_apart", found["apart"], target))
        say(f"frames: {len(tasks)} with {name} figures")
    return figures


def first_figures(model: FrameModel, judge: Judge, count: int, seed: int) -> list[Figure]:
    """Held-out single frames without references."""
    tasks = first_tasks(count, seed)
    found = judged("first", judge.verdicts(draw_all(model, tasks)), [truth(t.scene) for t in tasks], {})
    return [f for f in found if f.name.removeprefix("first_") in FRAME_TARGETS]


def reference_figures(
    pack: Pack, model: FrameModel, judge: Judge, tasks: Sequence[Task], drawn: Sequence[Pixels], say: Say
) -> list[Figure]:
    """The first frames of `tasks` again without references and with another story's, against `drawn`."""
    clip: CLIPModel = CLIPModel.from_pretrained(pack.path("clip/config.json").parent).float().eval()
    previous = [task.references[-1].pixels for task in tasks]
    still = [number for number, task in enumerate(tasks) if same_place(task)]
    variants = {
        "on": list(drawn),
        "off": draw_all(model, [replace(task, references=()) for task in tasks]),
        "shuffled": draw_all(model, shuffled(tasks)),
    }
    true = [truth(task.scene) for task in tasks]
    alike = {name: similarities(clip, pictures, previous) for name, pictures in variants.items()}
    calm = {name: [-background_jump(tasks[i], pictures[i]) for i in still] for name, pictures in variants.items()}
    figures = []
    for name, pictures in variants.items():
        figures.append(mean(f"reference_{name}_clip", alike[name]))
        figures.append(mean(f"reference_{name}_jump", [-v for v in calm[name]]))
        found = outcomes(judge.verdicts(pictures), true)
        figures.append(share(f"reference_{name}_characters", found["characters"]))
    for other in ("off", "shuffled"):
        figures.append(difference(f"reference_gain_clip_{other}", alike["on"], alike[other], 0.0))
        figures.append(difference(f"reference_gain_background_{other}", calm["on"], calm[other], 0.0))
    say(f"frames: {len(tasks)} without references and with another story's")
    return figures
