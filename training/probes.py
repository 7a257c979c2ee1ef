"""Draws the same few pictures at fixed steps of a customization, and says who is recognised in them.

    prober = Prober(pack, story)
    figures = prober.draw(step, artefact.payload, folder)     # {"recognised": 0.81, "look_alike": 0.0, "kept": 0.94}

Words and noise of a probe are fixed, so what differs from step to step was learned: the new character alone, told by
name and nothing else; with each of a few old ones; and these alone, which is where forgetting shows. Pictures are read
by the pack's eyes; a pack without eyes gets pictures and no figures. Drawing is done by a model of its own, and leaves
every random state as it was.

`folder` has `000100-alone.png` and so on, and `probes.jsonl`: a line for each picture, in the order of steps. A step is
in it with all its lines or not at all.

Figures are shares from 0 to 1: `recognised` of the new character's look that is right where they should be, `kept` of
the old ones' looks, `look_alike` of the new character's figures that look more like one of the old cast.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from services.models.character import CharacterWeights
from services.models.denoiser import StoryDenoiser
from services.models.drawing import Drawing, Pixels, Sketch, begin, finish
from services.models.eyes import Eyes, load_eyes
from services.models.likeness import ALIKE, Parts, Vocabulary, matches
from services.models.lora import NOBODY, Adapter, AdapterSlots, Outfit, Worn, read_adapter
from services.models.pack import Pack
from services.models.references import ReferenceCache
from services.models.registry import FrameModel, load_frame_model
from services.models.step import advance
from services.models.text_encoder import NO_WORDS, Words
from services.models.world import World
from training.customize_errors import RunStopped
from training.new_story import NewStory
from training.precision import default_device
from training.storage import save_bytes

FILE = "probes.jsonl"
RECOGNISED, LOOK_ALIKE, KEPT = "recognised", "look_alike", "kept"
_FIRST_SEED = 7001


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe:
    """How many probes there are, and how they are drawn."""

    alone: int = 2  # pictures of the new character alone, of different noise
    old_count: int = 3  # of the pack's cast: each alone, and beside the new one
    steps: int | None = None  # denoising steps; None: as many as the pack takes


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One picture that is drawn again and again."""

    name: str  # "alone", "alone#2", "with:Pip", "old:Pip"
    description: str
    seed: int
    new: str = ""  # the phrase of the new character; empty: they are not in it
    old: str = ""  # the phrase of the one of the cast who is in it


@dataclass(frozen=True)
class Seen:
    """What eyes make of one probe. None: it is not about that."""

    recognised: float | None = None
    look_alike: float | None = None
    kept: float | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture of one step, as `probes.jsonl` has it."""

    step: int
    probe: str
    description: str
    seed: int
    file: str  # beside `probes.jsonl`
    sha256: str
    seen: Mapping[str, float]


def probes_of(story: NewStory, world: World, recipe: ProbeRecipe = ProbeRecipe()) -> tuple[Probe, ...]:
    """The probes of a story, for a pack that knows `world`. The new character is told by name alone."""
    places = (*world.places, "")
    old = list(world.characters.items())[: recipe.old_count]

    def told(number: int, *people: str) -> str:
        place = places[number % max(1, len(world.places))]
        where = f"At {place} during the day. " if place else ""
        if len(people) == 1:
            return f"{where}{people[0]} waves."
        return f"{where}On the left {people[0]} waves. On the right {people[1]} waves."

    found = [
        Probe(
            name="alone" if number == 0 else f"alone#{number + 1}",
            description=told(number, story.name),
            seed=_FIRST_SEED + number,
            new=story.phrase,
        )
        for number in range(recipe.alone)
    ]
    for number, (name, look) in enumerate(old):
        whole, seed = f"{name}, {look},", _FIRST_SEED + 100 + number
        found.append(
            Probe(
                name=f"with:{name}", description=told(number, story.name, whole), seed=seed, new=story.phrase, old=look
            )
        )
    for number, (name, look) in enumerate(old):
        whole, seed = f"{name}, {look},", _FIRST_SEED + 200 + number
        found.append(Probe(name=f"old:{name}", description=told(number, whole), seed=seed, old=look))
    return tuple(found)


def seen_in(probe: Probe, figures: Sequence[Parts], vocabulary: Vocabulary, cast: Sequence[str]) -> Seen:
    """How a probe's figures look beside those who should be in it; `cast` are the old ones' phrases.

    Whoever should be there is taken for the figure that makes the best of all; for whom there is no figure has nothing
    right. Nothing is said of a look for which the eyes lack the words.
    """
    new, old = vocabulary.parts(probe.new), vocabulary.parts(probe.old)
    wanted = [look for look in (new, old) if look]
    slots: list[Parts] = [*figures, *({} for _ in wanted)]
    best = max(
        permutations(slots, len(wanted)),
        key=lambda chosen: sum(matches(look, figure) for look, figure in zip(wanted, chosen, strict=True)),
    )
    shares = [matches(look, figure) / len(look) for look, figure in zip(wanted, best, strict=True)]
    if len(new) < ALIKE:
        return Seen(kept=shares[-1] if len(old) >= ALIKE else None)
    figure = best[0]
    likeness = max((matches(vocabulary.parts(look), figure) for look in cast), default=0)
    taken_for_old = likeness >= ALIKE and likeness > matches(new, figure)
    return Seen(recognised=shares[0], look_alike=float(taken_for_old), kept=shares[1] if len(old) >= ALIKE else None)


def figures_of(seen: Sequence[Seen]) -> dict[str, float]:
    """The means over a step's probes; what none of them is about is missing."""
    found: dict[str, float] = {}
    for name in (RECOGNISED, LOOK_ALIKE, KEPT):
        values = [value for one in seen if (value := getattr(one, name)) is not None]
        if values:
            found[name] = round(sum(values) / len(values), 6)
    return found


class Prober:
    """Draws a story's probes with what was learned so far."""

    def __init__(self, pack: Pack, story: NewStory, recipe: ProbeRecipe = ProbeRecipe()) -> None:
        """Loads a model of its own. Raises what loading a pack raises."""
        with _undisturbed():
            self._model = load_frame_model(pack, device=default_device())
            self._eyes: Eyes | None = load_eyes(pack.folder)
        world = World.load(pack.folder)
        self.probes = probes_of(story, world, recipe)
        self._cast = tuple(world.characters.values())
        self._steps = recipe.steps
        self._slots: AdapterSlots | None = None

    def draw(
        self,
        step: int,
        payload: bytes | None,
        folder: Path,
        told: Callable[[Drawn], None] = lambda drawn: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """The probes of one step, into `folder`, and their figures; `told` hears of each when all are there.

        `payload` is what was learned, None before anything was. Pictures that are there already are not drawn again.
        Raises RunStopped, with nothing of the step written, when `stop` says so between two denoising steps.
        """
        drawn = [one for one in drawn_in(folder) if one.step == step]
        if not drawn:
            drawn = self._drawn(step, payload, folder, stop)
        for one in drawn:
            told(one)
        return figures_of([Seen(**one.seen) for one in drawn])

    def _drawn(self, step: int, payload: bytes | None, folder: Path, stop: Callable[[], bool]) -> list[Drawn]:
        with _undisturbed():
            pictures = self._pictures(payload, stop)
            seen = [self._seen(probe, pixels) for probe, pixels in zip(self.probes, pictures, strict=True)]
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for probe, pixels, one in zip(self.probes, pictures, seen, strict=True):
            image = _png(pixels)
            name = f"{step:06d}-{_file_name(probe.name)}.png"
            save_bytes(folder / name, image)
            found.append(
                Drawn(
                    step=step,
                    probe=probe.name,
                    description=probe.description,
                    seed=probe.seed,
                    file=name,
                    sha256=hashlib.sha256(image).hexdigest(),
                    seen={key: value for key, value in asdict(one).items() if value is not None},
                )
            )
        others = [one for one in drawn_in(folder) if one.step != step]
        both = sorted([*others, *found], key=lambda one: one.step)
        lines = (json.dumps(asdict(one), ensure_ascii=False) for one in both)
        save_bytes(folder / FILE, "".join(f"{line}\n" for line in lines).encode())
        return found

    def _seen(self, probe: Probe, pixels: Pixels) -> Seen:
        if self._eyes is None:
            return Seen()
        vocabulary = Vocabulary(self._eyes.shape)
        figures = [vocabulary.seen(figure.answers) for figure in self._eyes.figures(pixels)]
        return seen_in(probe, figures, vocabulary, self._cast)

    def _pictures(self, payload: bytes | None, stop: Callable[[], bool]) -> list[Pixels]:
        """Every probe's picture, drawn together: a picture does not depend on which others there are at a step."""
        model, characters, outfit, words = self._dressed(payload)
        manifest, sampling = model.manifest, model.manifest.sampling
        drawings: list[Drawing] = [
            begin(
                model,
                Sketch(
                    description=model.text.fitting(probe.description, words),
                    seed=probe.seed,
                    width_px=manifest.width_px,
                    height_px=manifest.height_px,
                    steps=self._steps or sampling.default_steps,
                    text_guidance=sampling.default_text_guidance,
                    image_guidance=sampling.default_image_guidance,
                    characters=characters,
                ),
                outfit,
                words=words,
            )
            for probe in self.probes
        ]
        cache = ReferenceCache()
        while not drawings[0].finished:
            if stop():
                raise RunStopped("stopped while probes were drawn")
            advance(model, drawings, cache)
        return finish(model, drawings)

    def _dressed(self, payload: bytes | None) -> tuple[FrameModel, tuple[CharacterWeights, ...], Outfit, Words]:
        """The model with what was learned, as a frame service draws it."""
        model = self._model
        if payload is None:
            return model, (), (), NO_WORDS
        adapter: Adapter = read_adapter(
            payload,
            model.denoiser.unet,
            base_digest=model.base_digest,
            text_width=model.text.width,
            name="what was learned",
        )
        characters = (CharacterWeights(adapter.digest),)
        if adapter.unet is not None:
            denoiser = StoryDenoiser(adapter.unet, model.denoiser.schedule)
            return replace(model, denoiser=denoiser), characters, (NOBODY,), adapter.words
        if not adapter.needs_slot:
            return model, characters, (NOBODY,), adapter.words
        if self._slots is None or self._slots.rank_max < adapter.rank:
            self._slots = AdapterSlots(model.denoiser.unet, 1, max(1, adapter.rank))
        self._slots.put(1, adapter)
        return replace(model, slots=self._slots), characters, (Worn(1, 1.0),), adapter.words


def drawn_in(folder: Path) -> list[Drawn]:
    """What was drawn before, by step. A line that cannot be read is drawn again."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            one = Drawn(**json.loads(line))
        except (ValueError, TypeError):
            return []
        if not (folder / one.file).is_file():
            return []
        found.append(one)
    return found


def _undisturbed() -> Any:
    """What is drawn in this block leaves the random state of training as it was, on every device."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else ())


def _file_name(probe: str) -> str:
    """A probe's name where a file system is: "with:Pip" is "with-pip"."""
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in probe.lower())


def _png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=6)
    return out.getvalue()
