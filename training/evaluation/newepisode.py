"""The NewEpisode benchmark on the toon world: what ways to teach new characters are worth, all of them alike.

    python -m training.evaluation.newepisode [--budget minutes | hours | full] [--until-minutes M] [--out DIR]

Two casts (`training.newepisode.toon`) stand for the paper's two data sets. For each, every method teaches all new
characters jointly, one story each, beside stories of the old cast; then the other stories are drawn, every frame from
its description and the frames drawn before it, and those that show the character are measured, per character:

* FID of what the judge's convolutions see, the mean over the picture: 128 numbers a frame. Few frames make it large, so
  N stands beside it, and no figure compares with one of other features or another N
* CLIP-I, all pairs of a drawn and a true frame, and CLIP-T, drawn frames and descriptions with the look told, by the
  pack's own CLIP
* recognised: the judge sees their species, colour and accessory in the right place; and the same of the old cast in
  frames without anybody new, against the pack without weights

`all` measures every frame of the test stories, as the paper does; `strict` leaves out those that a lesson held. By
default descriptions say the name alone, for every method: the pack can read a look that is told, which the paper's
networks cannot, so a phrase would measure the pack. `--wording phrase` does that.

`dreambooth` trains the whole UNet on the new stories alone, without a prior loss, as the paper's does. That one also
gives each character a rare token and trains the encoders' word tables; here the name is told as it is, and no table
moves.

Every finished cell (cast, method, wording, seed) is a file, with the recipe that it was taught by; a later run goes on
with those that are missing, refuses those that would be taught otherwise now, and makes the tables of those that are
there: means over characters and seeds, and then each character alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from services.models.drawing import Pixels, Seen
from services.models.epicevo import EpicEvoWeights
from services.models.errors import ModelError
from services.models.eyes import as_input
from services.models.lora import read_adapter_file
from services.models.pack import Pack, load_pack
from services.models.registry import load_frame_model
from services.models.tokenizer import StoryTokenizer
from training.clip import TEXT_POSITIONS
from training.customize import CustomizationRecipe, customize, toon_customization, write_artefact
from training.customize_errors import CustomizationError, RunMismatch
from training.evaluation.character import RECOGNISED, Dressed, drawn, dressed, right
from training.evaluation.figures import Figure, difference, mean, share
from training.evaluation.frames import MAX_REFERENCES, Task
from training.evaluation.judge import Judge, load_judge
from training.evaluation.toon import DEFAULT_PACK
from training.methods.dreambooth import DreamBoothRecipe
from training.methods.epicevo import EpicEvoRecipe
from training.methods.lora import LoraRecipe
from training.new_story import Called, NewStory
from training.newepisode.records import Window
from training.newepisode.split import VARIANTS, Protocol, Split, Variant, build_split
from training.newepisode.toon import (
    CASTS,
    ToonCast,
    check_pretraining,
    known_stories_of,
    new_story,
    story_frame,
    toon_corpus,
)
from training.recipes import toon_frame
from training.toon.grammar import describe_plainly, phrase
from training.toon.render import render
from training.toon.scene import Scene
from training.verdicts import truth

PRETRAINED = "pretrained"
WORDINGS = ("name", "phrase")
METRICS = ("fid", "clip_i", "clip_t")
_OLD_EPISODES = 8  # of each old hero: what a run learns from beside the new, and what forgetting is measured on
_KNOWN_PER_NEW = 5  # stories of the old cast for each new character, as MODELS.md reads the paper
_FORMAT = 2  # of a cell; since 2 it holds the recipe
_CLOCK = ("save_every_s", "measure_every_s")  # of a recipe: how often a run is looked at changes nothing of it
Say = Callable[[str], None]
Features = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is trained, drawn and repeated."""

    episodes: int  # of each new character, six overlapping stories each
    tests_max: Mapping[str, int | None]  # stories of a character that are drawn, by cast; None: all
    steps_per_character: int  # a cast's run takes so many for each that it teaches
    old_frames: int  # of the old cast alone
    seeds: int

    @property
    def told(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


BUDGETS: dict[str, Budget] = {
    "minutes": Budget(episodes=2, tests_max={"meadow": 1, "harbour": 1}, steps_per_character=2, old_frames=8, seeds=1),
    "hours": Budget(episodes=3, tests_max={"meadow": 2, "harbour": 2}, steps_per_character=25, old_frames=32, seeds=3),
    "full": Budget(
        episodes=16, tests_max={"meadow": None, "harbour": 100}, steps_per_character=100, old_frames=128, seeds=3
    ),
}

TABLE_2 = (PRETRAINED, "textual-inversion", "custom-diffusion", "dreambooth", "lora", "epicevo")
TABLE_3 = (PRETRAINED, "epicevo-mse", "epicevo-mse-distil", "epicevo")
BEYOND = ("lora-phrase", "epicevo-lora")
"""Not the paper's: LoRA, and EpicEvo's losses for one, with a name that starts as its phrase: the product's way."""
METHODS = tuple(dict.fromkeys((*TABLE_2, *TABLE_3, *BEYOND)))

PAPER: dict[str, dict[str, tuple[float, float, float]]] = {
    "meadow": {
        PRETRAINED: (210.45, 0.8203, 0.2510),
        "epicevo-mse": (192.76, 0.8360, 0.2542),
        "epicevo-mse-distil": (192.04, 0.8345, 0.2550),
        "epicevo": (188.30, 0.8380, 0.2573),
    },
    "harbour": {
        PRETRAINED: (143.98, 0.7690, 0.2358),
        "epicevo-mse": (132.51, 0.7940, 0.2546),
        "epicevo-mse-distil": (130.73, 0.7915, 0.2537),
        "epicevo": (130.40, 0.7954, 0.2551),
    },
}
"""FID, CLIP-I and CLIP-T as published (Table 3). Table 2's baselines are missing in the text at hand, so here, too."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the benchmark."""

    cast: str
    method: str
    wording: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cast}-{self.method}-{self.wording}-{self.seed}"


def cells(casts: Sequence[str], methods: Sequence[str], wording: str, seeds: int) -> list[Cell]:
    """All of them, seed by seed: whoever stops early has every method once."""
    return [
        Cell(cast=cast, method=method, wording=wording, seed=seed)
        for seed in range(seeds)
        for cast in casts
        for method in methods
    ]


def recipe_of(cast: ToonCast, method: str, steps: int, seed: int) -> CustomizationRecipe:
    """How a method is run: as published but for rates, with the cast's λ's; those of `BEYOND` as the product does.

    The variants of the ablation differ in their losses' weights alone. Raises RecipeInvalid for a method that is none.
    """
    name, _, variant = method.partition("epicevo")
    if method == "lora-phrase":
        recipe = toon_customization("lora")
    elif method == "lora":
        recipe = toon_customization("lora")
        assert isinstance(recipe.method, LoraRecipe)
        recipe = replace(recipe, method=replace(recipe.method, word_rate=0.0))
    elif name:
        recipe = toon_customization(method)
        if isinstance(recipe.method, DreamBoothRecipe):  # the paper's learns from the new stories alone
            recipe = replace(recipe, method=replace(recipe.method, existing_weight=0.0))
    elif variant == "-lora":
        recipe = toon_customization("epicevo")
    else:
        recipe = toon_customization("epicevo", learns="unet")
        assert isinstance(recipe.method, EpicEvoRecipe)
        weights = EpicEvoWeights(
            adversarial=0.0 if variant in ("-mse", "-mse-distil") else cast.adversarial,
            distillation=0.0 if variant == "-mse" else cast.distillation,
        )
        recipe = replace(recipe, method=replace(recipe.method, weights=weights))
    return replace(recipe, steps=steps, warmup_steps=min(recipe.warmup_steps, steps), seed=seed)


def recipe_of_cell(cell: Cell, budget: Budget) -> CustomizationRecipe | None:
    """What a cell is taught by; None where nothing is. Raises RecipeInvalid as `recipe_of` does."""
    if cell.method == PRETRAINED:
        return None
    cast = CASTS[cell.cast]
    return recipe_of(cast, cell.method, budget.steps_per_character * len(cast.new), cell.seed)


def split_of(cast: ToonCast, budget: Budget) -> Split:
    """The cast's split. Raises FramesSeen where it leaks."""
    corpus = toon_corpus(cast, budget.episodes, _OLD_EPISODES)
    return build_split(corpus, cast.registry.ids, Protocol(tests_max=budget.tests_max[cast.name]))


def known_windows(cast: ToonCast, split: Split, seed: int) -> tuple[Window, ...]:
    """Stories of the old cast that a run learns from: of the first half of its episodes, drawn by the seed."""
    first_half = [one for one in split.pretraining["train"] if _episode_of(one.id) < _OLD_EPISODES // 2]
    rng = random.Random(f"{cast.name} known {seed}")
    return tuple(rng.sample(first_half, min(len(first_half), _KNOWN_PER_NEW * len(cast.new))))


def old_clips(split: Split, count: int) -> tuple[str, ...]:
    """Frames that forgetting is measured on: of the other half of the old cast's episodes, spread over it."""
    clips = sorted(
        {c for one in split.pretraining["train"] if _episode_of(one.id) >= _OLD_EPISODES // 2 for c in one.clips}
    )
    step = max(1, len(clips) // count)
    return tuple(clips[::step][:count])


def _episode_of(clip: str) -> int:
    return int(clip.split(":")[3])


def described(scene: Scene, called: Called | None) -> str:
    """A scene's plain description, with the name alone for whom it is `called`."""
    told = describe_plainly(scene)
    return told if called is None else called.by_name(told)


def drawn_stories(
    who: Dressed, cast: ToonCast, windows: Sequence[Window], called: Called | None, seed: int
) -> list[list[Pixels]]:
    """The frames of each window, each seeing those that were drawn before it: nothing true is shown."""
    stories: list[list[Seen]] = [[] for _ in windows]
    for beat in range(len(windows[0].clips)):
        tasks = []
        for number, window in enumerate(windows):
            scene = story_frame(cast, window.clips[beat]).scene
            noise = int(hashlib.sha256(f"{window.clips[beat]} {seed}".encode()).hexdigest()[:8], 16)
            references = tuple(stories[number][-MAX_REFERENCES:])
            tasks.append(Task(scene, described(scene, called), noise, references))
        for number, (task, pixels) in enumerate(zip(tasks, drawn(who, tasks), strict=True)):
            stories[number].append(Seen(pixels=pixels, description=task.description))
    return [[one.pixels for one in story] for story in stories]


class Eye:
    """What measures: the judge, and the pack's CLIP."""

    def __init__(self, pack: Pack) -> None:
        self.judge: Judge = load_judge()
        self.clip: Any = CLIPModel.from_pretrained(pack.path("clip/config.json").parent).float().eval()
        self.tokenizer = StoryTokenizer.load(pack.path("tokenizer/tokenizer.json").parent)

    @torch.no_grad()
    def features(self, pictures: Sequence[Pixels]) -> Features:
        """What the judge's convolutions see, the mean over the picture, `[N, 128]`."""
        cells = [self.judge.cells(as_input(np.stack([one]))).mean(dim=(2, 3))[0] for one in pictures]
        out: Features = torch.stack(cells).double().numpy()
        return out

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Pixels]) -> Features:
        """CLIP's unit vectors of pictures, `[N, 128]`."""
        seen = self.clip.get_image_features(as_input(np.stack(pictures))).pooler_output
        out: Features = F.normalize(seen.double(), dim=-1).numpy()
        return out

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Features:
        """The same of texts."""
        padded = self.tokenizer.pad(list(texts), TEXT_POSITIONS)
        ids, mask = torch.from_numpy(padded.ids_BN).long(), torch.from_numpy(padded.mask_BN).long()
        seen = self.clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        out: Features = F.normalize(seen.double(), dim=-1).numpy()
        return out


def frechet(first_ND: Features, second_ND: Features) -> float:
    """Fréchet's distance of two normal distributions fitted to features (Heusel et al., 2017). Needs two rows each.

    The root of the covariances' product is taken of a symmetric matrix of the same eigenvalues, which a few rows of
    many numbers, singular as their covariances are, cannot make complex.
    """
    apart = first_ND.mean(axis=0) - second_ND.mean(axis=0)
    one, two = (np.cov(rows, rowvar=False) for rows in (first_ND, second_ND))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ two @ root)
    distance = apart @ apart + np.trace(one) + np.trace(two) - 2.0 * np.sqrt(mixed.clip(min=0.0)).sum()
    return max(0.0, float(distance))  # rounding alone makes it negative


def measured(eye: Eye, pictures: Sequence[Pixels], scenes: Sequence[Scene], character: str) -> dict[str, Any]:
    """FID, CLIP-I, CLIP-T and recognition of drawn frames that all should show somebody."""
    if len(pictures) < 2:
        return {"n": len(pictures)}
    true = [render(scene, pictures[0].shape[0]) for scene in scenes]
    seen, real = eye.pictures(pictures), eye.pictures(true)
    told = eye.texts([describe_plainly(scene) for scene in scenes])
    return {
        "n": len(pictures),
        "fid": frechet(eye.features(pictures), eye.features(true)),
        "clip_i": float((seen @ real.T).mean()),
        "clip_i_matched": float((seen * real).sum(axis=1).mean()),
        "clip_t": float((seen * told).sum(axis=1).mean()),
        "recognised": recognised(eye.judge, pictures, scenes, {character}),
    }


def recognised(judge: Judge, pictures: Sequence[Pixels], scenes: Sequence[Scene], characters: set[str]) -> list[bool]:
    """Of every figure that is one of `characters`, whether species, colour and accessory are seen in its place."""
    whom = [[n for n, actor in enumerate(one.actors) if actor.character.id in characters] for one in scenes]
    return right(judge.verdicts(pictures), [truth(one) for one in scenes], whom)[RECOGNISED]


def run_cell(pack: Pack, cell: Cell, budget: Budget, out: Path, eye: Eye, say: Say) -> dict[str, Any]:
    """Train, draw and measure one cell. What training has done is kept, and gone on from."""
    start = time.monotonic()
    cast, size = CASTS[cell.cast], pack.manifest.width_px
    split = split_of(cast, budget)
    model = load_frame_model(pack)
    who = Dressed(model)
    losses: dict[str, Any] = {}
    recipe = recipe_of_cell(cell, budget)
    if recipe is not None:
        stories: list[NewStory] = [new_story(cast, one.id, split.lessons[one.id], size) for one in cast.new]
        known = known_stories_of(cast, known_windows(cast, split, cell.seed), size)
        folder = _run_folder(out, cell)
        artefact = customize(pack, stories, known, recipe, folder, say=say)
        path = folder / "weights.safetensors"
        write_artefact(artefact, path)
        losses = artefact.card["losses"]
        adapter = read_adapter_file(
            path, model.denoiser.unet, base_digest=model.base_digest, text_width=model.text.width
        )
        who = dressed(model, adapter)
    told: dict[str, Any] = {}
    for character in cast.new:
        called = Called(name=str(character.name), phrase=phrase(character.look), noun=character.look.species)
        windows = split.tests[character.id]
        frames = drawn_stories(who, cast, windows, called if cell.wording == "name" else None, cell.seed)
        told[character.id] = {
            variant: _of_variant(eye, cast, split, character.id, windows, frames, variant) for variant in VARIANTS
        }
        say(f"{cell.name}: {character.name} drawn")
    clips = old_clips(split, budget.old_frames)
    scenes = [story_frame(cast, clip).scene for clip in clips]
    tasks = [Task(scene, describe_plainly(scene), cell.seed * 100_000 + n) for n, scene in enumerate(scenes)]
    old = recognised(eye.judge, drawn(who, tasks), scenes, {one.id for one in cast.old})
    return {
        "format": _FORMAT,
        "cell": asdict(cell),
        "settings": settings_of(pack, budget),
        "recipe": {} if recipe is None else recipe.to_dict(),
        "split": split.to_dict() | {"pretraining": {k: len(v) for k, v in split.pretraining.items()}},
        "characters": told,
        "old": old,
        "losses": losses,
        "elapsed_s": round(time.monotonic() - start, 1),
    }


def _of_variant(
    eye: Eye,
    cast: ToonCast,
    split: Split,
    character: str,
    windows: Sequence[Window],
    frames: Sequence[Sequence[Pixels]],
    variant: Variant,
) -> dict[str, Any]:
    pictures: list[Pixels] = []
    scenes: list[Scene] = []
    for window, story in zip(windows, frames, strict=True):
        counted = set(split.measured(character, window, variant))
        for clip, picture in zip(window.clips, story, strict=True):
            if clip in counted:
                pictures.append(picture)
                scenes.append(story_frame(cast, clip).scene)
    return measured(eye, pictures, scenes, character)


def settings_of(pack: Pack, budget: Budget) -> str:
    """16 hex digits of what every cell of a table must share."""
    told = {"format": _FORMAT, "pack": pack.digest, "budget": {**budget.told, "seeds": 0}}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def finished(out: Path, pack: Pack, budget: Budget) -> dict[str, dict[str, Any]]:
    """Cells that are there, by name.

    Raises RunMismatch for one of another format, pack, budget or recipe: no table mixes them.
    """
    found: dict[str, dict[str, Any]] = {}
    settings = settings_of(pack, budget)
    for path in sorted((out / "cells").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("format") != _FORMAT:
            raise RunMismatch(f"{path} is of another format of cells: choose another --out, or remove it")
        if document["settings"] != settings:
            raise RunMismatch(f"{path} is of another pack or budget: choose another --out")
        cell = Cell(**document["cell"])
        if cell.cast not in CASTS or cell.method not in METHODS:
            raise RunMismatch(f"{path} is of a cast or method that is none: choose another --out, or remove it")
        recipe = recipe_of_cell(cell, budget)
        before, now = _settings(document["recipe"]), _settings({} if recipe is None else recipe.to_dict())
        if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
            raise RunMismatch(
                f"{path} was taught by another recipe than {cell.method} has now ({', '.join(changed)}): "
                f"choose another --out, or remove it and {_run_folder(out, cell)}"
            )
        found[path.stem] = document
    return found


def _settings(recipe: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """What a recipe says, by names such as `method.weights.adversarial`; without the clock."""
    told: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            told |= _settings(value, f"{within}{key}.")
        elif key not in _CLOCK:
            told[f"{within}{key}"] = value
    return told


def _run_folder(out: Path, cell: Cell) -> Path:
    """Where a cell's training is kept."""
    return out / "runs" / cell.name


def write_cell(out: Path, name: str, document: Mapping[str, Any]) -> None:
    """Complete, or not there."""
    path = out / "cells" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def figures_of(
    done: Mapping[str, Mapping[str, Any]], cast: str, method: str, wording: str, variant: Variant
) -> dict[str, Figure]:
    """A row: means over characters and seeds, shares over figures. Without a finished cell, nothing.

    `old_drop` compares figure by figure with the same seed's pack without weights, where that cell is there.
    """
    found = [done[cell.name] for cell in _cells_of(done, cast, method, wording)]
    if not found:
        return {}
    rows = [one[variant] for document in found for one in document["characters"].values()]
    whole = [row for row in rows if "fid" in row]
    out = {name: mean(name, [row[name] for row in whole]) for name in (*METRICS, "clip_i_matched")}
    out["recognised"] = share("recognised", [value for row in whole for value in row["recognised"]])
    out["frames"] = mean("frames", [float(row["n"]) for row in rows])
    before: list[float] = []
    after: list[float] = []
    for cell in _cells_of(done, cast, method, wording):
        plain = done.get(replace(cell, method=PRETRAINED).name)
        if plain is not None:
            before += [float(value) for value in plain["old"]]
            after += [float(value) for value in done[cell.name]["old"]]
    if before:
        out["old_drop"] = difference("old_drop", before, after)
    return out


def _cells_of(done: Mapping[str, Any], cast: str, method: str, wording: str) -> list[Cell]:
    all_cells = [Cell(**document["cell"]) for document in done.values()]
    wanted = (cast, method, wording)
    return sorted((one for one in all_cells if (one.cast, one.method, one.wording) == wanted), key=lambda one: one.seed)


def markdown(done: Mapping[str, Mapping[str, Any]], wording: str, casts: Sequence[str]) -> str:
    """Tables 2 and 3 for each cast and variant, the paper's numbers beside ours; then the characters one by one.

    Rows without a cell are left out.
    """

    def lines(methods: Sequence[str], cast: str, variant: Variant) -> list[str]:
        return [line for method in methods if (line := _row(done, cast, method, wording, variant))]

    tables: tuple[tuple[str, str, Callable[[str, Variant], list[str]]], ...] = (
        ("Table 2: methods", _TABLE_2_NOTE + _HEADER, partial(lines, TABLE_2 + BEYOND)),
        ("Table 3: losses", _HEADER, partial(lines, TABLE_3)),
        ("Characters", _CHARACTERS_HEADER, partial(_character_lines, done, wording)),
    )
    parts = []
    for title, header, lines_of in tables:
        for cast in casts:
            for variant in VARIANTS:
                if found := lines_of(cast, variant):
                    stands = f"{cast} (in the place of {CASTS[cast].stands_for}), {variant}, told by {wording}"
                    parts.append(f"### {title}: {stands}\n\n{header}" + "\n".join(found))
    return "\n\n".join(parts) + "\n"


_TABLE_2_NOTE = (
    "`dreambooth` is the whole UNet on the new stories alone, without a prior loss; unlike the paper's it has no rare"
    " token, and no word table is trained.\n\n"
)
_CHARACTERS_HEADER = (
    "N: frames measured, seed by seed.\n\n"
    "| character | method | N | FID ↓ | CLIP-I ↑ | CLIP-T ↑ | recognised ↑ |\n| " + " | ".join(["---"] * 7) + " |\n"
)
_TOO_FEW = "too few"
_HEADER = (
    "| method | FID ↓ | paper | CLIP-I ↑ | paper | CLIP-T ↑ | paper | recognised ↑ | old cast lost ↓"
    " | frames a character | characters × seeds |\n| " + " | ".join(["---"] * 11) + " |\n"
)


def _row(done: Mapping[str, Mapping[str, Any]], cast: str, method: str, wording: str, variant: Variant) -> str:
    figures = figures_of(done, cast, method, wording, variant)
    if not figures:
        return ""
    published = PAPER[cast].get(method, (None, None, None))
    out = [method]
    for name, number in zip(METRICS, published, strict=True):
        digits = 2 if name == "fid" else 4
        out += [_told(figures[name], digits), "—" if number is None else f"{number:.{digits}f}"]
    drop = figures.get("old_drop")
    out += [_told(figures["recognised"], 3), "—" if drop is None else _told(drop, 3)]
    out += [f"{figures['frames'].value:.1f}", str(figures["fid"].n)]
    return f"| {' | '.join(out)} |"


def _character_lines(done: Mapping[str, Mapping[str, Any]], wording: str, cast: str, variant: Variant) -> list[str]:
    """A line for each character and method: means over seeds, shares over figures."""
    lines = []
    for character in CASTS[cast].new:
        for method in METHODS:
            told = [done[cell.name]["characters"].get(character.id) for cell in _cells_of(done, cast, method, wording)]
            rows = [one[variant] for one in told if one is not None]
            if not rows:
                continue
            whole = [row for row in rows if "fid" in row]
            out = [str(character.name), method, " + ".join(str(row["n"]) for row in rows)]
            if whole:
                out += [_told(mean(name, [row[name] for row in whole]), 2 if name == "fid" else 4) for name in METRICS]
                out += [_told(share("recognised", [value for row in whole for value in row["recognised"]]), 3)]
            else:
                out += [_TOO_FEW] * (len(METRICS) + 1)
            lines.append(f"| {' | '.join(out)} |")
    return lines


def _told(figure: Figure, digits: int) -> str:
    if figure.n == 0:
        return "—"
    is_alone = figure.n == 1 and not figure.is_share  # one value says nothing of its spread
    interval = "" if figure.low is None or is_alone else f" ({figure.low:.{digits}f} … {figure.high:.{digits}f})"
    return f"{figure.value:.{digits}f}{interval}"


def run(
    pack: Pack, todo: Sequence[Cell], budget: Budget, out: Path, say: Say, until: Callable[[], bool] = lambda: False
) -> dict[str, dict[str, Any]]:
    """Every cell that is not there yet, until `until` says that it is enough. Returns all that are there.

    Raises FramesSeen before anything is trained where the pack's frame model was shown somebody new.
    """
    done = finished(out, pack, budget)
    missing = [cell for cell in todo if cell.name not in done]
    if missing:
        shelves = (*toon_frame().singles, *toon_frame().stories)
        new = [one for name in sorted({cell.cast for cell in missing}) for one in CASTS[name].new]
        count = check_pretraining(new, shelves)
        say(f"{count} frames of pretraining show none of {len(new)} new characters; {len(missing)} cells to do")
    eye = Eye(pack) if missing else None
    for cell in missing:
        if until():
            say("enough for now: run again to go on")
            break
        assert eye is not None
        document = run_cell(pack, cell, budget, out, eye, say)
        write_cell(out, cell.name, document)
        done[cell.name] = document
        say(f"{cell.name}: {document['elapsed_s']} s")
    return done


def main() -> None:
    """Run what is missing, print the tables; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK)
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="hours")
    parser.add_argument("--casts", nargs="+", choices=tuple(CASTS), default=tuple(CASTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--wording", choices=WORDINGS, default="name", help="how descriptions speak of the new ones")
    parser.add_argument("--seeds", type=int, help="instead of the budget's")
    parser.add_argument("--steps-per-character", type=int, help="instead of the budget's")
    parser.add_argument("--until-minutes", type=float, help="begin no cell after so many; a later run goes on")
    parser.add_argument("--out", type=Path, help="cells, weights and tables; by default one folder a budget")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    budget = BUDGETS[arguments.budget]
    if arguments.steps_per_character is not None:
        budget = replace(budget, steps_per_character=arguments.steps_per_character)
    out = arguments.out or Path("bench-results") / "characters" / arguments.budget
    start = time.monotonic()

    def is_enough() -> bool:
        limit = arguments.until_minutes
        return limit is not None and time.monotonic() - start >= 60.0 * limit

    todo = cells(arguments.casts, arguments.methods, arguments.wording, arguments.seeds or budget.seeds)
    try:
        pack = load_pack(arguments.pack)
        done = run(pack, todo, budget, out, lambda line: print(line, flush=True), is_enough)
    except (CustomizationError, ModelError) as error:
        print(json.dumps({"error": error.reason, "message": str(error)}, ensure_ascii=False), file=sys.stderr)
        sys.exit(1)
    tables = markdown(done, arguments.wording, arguments.casts)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"tables-{arguments.wording}.md").write_text(tables, encoding="utf-8")
    print(tables)
    left = sum(cell.name not in done for cell in todo)
    print(json.dumps({"settings": settings_of(pack, budget), "cells": len(done), "left": left, "out": str(out)}))


if __name__ == "__main__":
    main()
