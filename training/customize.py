"""Teaches a pack somebody new from one story of 3 to 20 frames, in one process or several, and writes what was learned.

    python -m training.customize --pack services/models/packs/toon --world-character otto --method epicevo \\
        --out otto.safetensors --minutes 5
    python -m training.customize --pack DIR --story FOLDER --method lora --out FILE --steps 200 --workers 2

1. The story is checked (`new_story`), and what the frozen encoders say of it is computed once (`lessons`).
2. A method (`methods`) trains on it and on stories of those whom the pack knows; the loop keeps checkpoints that are
   complete or not there. A run that was killed goes on from the last one and ends with the same weights, bit for bit.
3. The weights are read back as a frame service reads them, and written; then the card beside them, last.

Whoever starts a run may follow and stop it (`customize_progress`): `--progress FILE` is told of steps and snapshots;
SIGTERM, or a file at `--stop-file`, ends a run after the step in progress and its save. `--snapshots N` writes what was
learned after each N-th part of the steps, as weights and card like the last ones. `--probes` draws the same pictures
before the first step, at every snapshot and at the end, and puts what is recognised in them into the cards (`probes`);
what was recognised before the first step, of which there is no card, it tells of.

`--workers N` trains in N processes under Ray Train (`customize_ray`), without it this process trains alone. A step's
batches are numbered, and every process takes its share of them: what is learned depends on how many there are, and but
for rounding not on how many processes take them. `--accumulate K` is how many each process takes.

`--minutes` becomes a number of steps before the first one is taken, by timing a few, and stays that number: what a run
learns does not depend on the clock, however often it is interrupted. On a machine that gets busier it takes longer.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from services.models.captions.cast import Cast
from services.models.epicevo import EpicEvoWeights
from services.models.errors import ModelError
from services.models.lora import read_adapter
from services.models.pack import Pack, load_pack
from services.models.registry import FrameModel, load_frame_model
from training.command import run_arguments
from training.customize_errors import (
    CustomizationError,
    DiskFull,
    LossNotFinite,
    RecipeInvalid,
    RunMismatch,
    RunStopped,
    WorkerUnable,
)
from training.customize_progress import NO_ROOM, STOPPED, Progress, Stop
from training.lessons import LessonRecipe, Lessons
from training.loop import STARTED_FROM, LoopRecipe, PeersApart, step_generator, train
from training.methods.adam import GroupedAdam
from training.methods.custom_diffusion import CustomDiffusionRecipe
from training.methods.dreambooth import DreamBoothRecipe
from training.methods.epicevo import EpicEvoRecipe
from training.methods.lora import LoraRecipe
from training.methods.method import TOTAL, Method, Parts, ground_of, parameter_names
from training.methods.registry import METHODS, MethodRecipe, method_of, name_of
from training.methods.textual_inversion import TextualInversionRecipe
from training.new_story import (
    KnownStory,
    NewStory,
    check_wall,
    known_stories,
    names_in,
    read_known,
    read_story,
    together,
    world_story,
)
from training.optimizer import OptimizerRecipe, Pace
from training.peers import PeerEnded, Peers, joined
from training.precision import autocast, default_device
from training.probes import Drawn, Prober
from training.storage import Checkpoint, load_checkpoint, save_bytes, save_checkpoint, with_prefix

CHECKPOINT = "checkpoint.safetensors"
PLAN = "plan.json"
SNAPSHOTS = "snapshots"  # folder of what was learned on the way
PROBES = "probes"  # folder of the pictures that were drawn with it
CARD_FORMAT = 1
_STRETCHES = 10  # of a run, of each of which the card tells the mean losses
_TIMED_STEPS = 2
_CONSTANT = 1e-9  # the part of a run in which the rate falls, where it is not to fall
_PARTS = ("mse_new", "mse_existing", "mse_prior", "mse", "adversarial", "discriminator", "distillation", TOTAL)

Say = Callable[[str], None]
Watch = Callable[[int, Mapping[str, float]], None]
"""Is told each step's number and losses, before it moves anything."""
Keep = Callable[[int, "Artefact"], None]
"""Is given what was learned in so many steps."""
TOLD = ("character", "steps", "elapsed_s", "losses", "figures")  # of the card, when a run has ended
_STATUSES = {RunStopped.reason: STOPPED, DiskFull.reason: NO_ROOM}  # of the process; 1 for every other reason
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, kw_only=True)
class CustomizationRecipe:
    """How somebody new is taught. The defaults are EpicEvo's: 100 passes over one story, at a constant rate."""

    method: MethodRecipe = field(default_factory=EpicEvoRecipe)
    lessons: LessonRecipe = field(default_factory=LessonRecipe)
    steps: int = 100
    warmup_steps: int = 1
    decay_share: float = 0.0  # the last part of a run, in which the rate falls to zero
    accumulate: int = 1  # batches of a step, of all processes together: their mean gradient, in the memory of one each
    clip_norm: float = 1.0  # for each group of parameters alone
    seed: int = 0
    save_every_s: float = 60.0
    measure_every_s: float = 240.0

    def __post_init__(self) -> None:
        """Raises ValueError for what is no run."""
        if self.steps < 1 or self.warmup_steps < 1 or self.accumulate < 1:
            raise ValueError("steps, warmup_steps and accumulate are at least 1")
        if not 0.0 <= self.decay_share <= 1.0 or self.clip_norm <= 0.0:
            raise ValueError("decay_share is from 0 to 1, and clip_norm above 0")

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the method's name."""
        told: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**told, "method": {"name": name_of(self.method), **told["method"]}}


@dataclass(frozen=True)
class Artefact:
    """What a run made: the file's bytes, and its card without the file's name."""

    payload: bytes
    card: dict[str, Any]


class Tally(nn.Module):
    """Mean losses of each stretch of a run. A part of its networks, so that a checkpoint holds it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.sums_SP: Tensor
        self.counts_SP: Tensor
        for name in ("sums_SP", "counts_SP"):
            self.register_buffer(name, torch.zeros(_STRETCHES, len(_PARTS), dtype=torch.float64))

    def add(self, progress: float, parts: Mapping[str, float]) -> None:
        """Count one step's losses."""
        stretch = min(int(progress * _STRETCHES), _STRETCHES - 1)
        for place, name in enumerate(_PARTS):
            if name in parts:
                self.sums_SP[stretch, place] += parts[name]
                self.counts_SP[stretch, place] += 1

    def means(self) -> dict[str, list[float]]:
        """By part, the means of the stretches in which it was counted."""
        told = {}
        for place, name in enumerate(_PARTS):
            counted = self.counts_SP[:, place] > 0
            if bool(counted.any()):
                means = self.sums_SP[counted, place] / self.counts_SP[counted, place]
                told[name] = [round(value, 6) for value in means.tolist()]
        return told


class Customization:
    """Somebody new in training."""

    def __init__(
        self,
        method: Method,
        lessons: Lessons,
        device: torch.device,
        watch: Watch,
        *,
        seed: int = 0,
        accumulate: int = 1,
        peers: Peers | None = None,
    ) -> None:
        """Raises ValueError when `peers` (none, if None) cannot share `accumulate` batches of a step out evenly."""
        self.method, self.lessons, self.device, self.watch = method, lessons, device, watch
        self.seed, self.accumulate, self.peers = seed, accumulate, peers or Peers()
        self.own_batches = self.peers.batches(accumulate)
        self.tally = Tally()
        self.networks = nn.ModuleDict({**dict(method.networks.items()), "tally": self.tally})

    def parts(self, generator: torch.Generator, *, varied: bool = True) -> Parts:
        """The losses of a batch."""
        with autocast(self.device):
            return self.method.loss(self.lessons.batch(generator, self.method.words, varied=varied))

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        """The mean loss of this process's batches. Raises FloatingPointError when a part of anyone's is not finite."""
        parts = self.parts(generator) if self.accumulate == 1 else self._accumulated(step)
        values = self._means({name: float(value.detach()) for name, value in parts.items()})
        if broken := sorted(name for name, value in values.items() if not math.isfinite(value)):
            raise FloatingPointError(f"{', '.join(broken)} is not finite at step {step}")
        self.tally.add(progress, values)
        self.watch(step, values)
        return parts[TOTAL]

    def _accumulated(self, step: int) -> Parts:
        """The mean losses of this process's batches of a step. Each batch has a generator of its own, so that it is the
        same whoever takes it. `TOTAL` has their mean gradient, and holds on to none of their graphs.
        """
        learned = [one for one in self.networks.parameters() if one.requires_grad]
        gradients = [torch.zeros_like(one) for one in learned]
        means: dict[str, Tensor] = {}
        for number in self.own_batches:
            parts = self.parts(step_generator(self.seed, step, number))
            own = torch.autograd.grad(parts[TOTAL] / len(self.own_batches), learned, allow_unused=True)
            for sum_, gradient in zip(gradients, own, strict=True):
                if gradient is not None:
                    sum_ += gradient
            for name, value in parts.items():
                means[name] = means.get(name, torch.zeros_like(value)) + value.detach() / len(self.own_batches)
        # Each p − p is zero and has the gradient one, so the loop's own backward pass finds the sums.
        carried = [((one - one.detach()) * sum_).sum() for one, sum_ in zip(learned, gradients, strict=True)]
        return {**means, TOTAL: means[TOTAL] + torch.stack(carried).sum()}

    def _means(self, values: Mapping[str, float]) -> dict[str, float]:
        """Losses over the batches of all processes. One that has none of a kind counts as zero, as a batch does."""
        if self.peers.count == 1:
            return dict(values)
        told = [values.get(name, 0.0) for name in _PARTS] + [float(name in values) for name in _PARTS]
        means = self.peers.means(told)
        return {
            name: mean
            for name, mean, known in zip(_PARTS, means[: len(_PARTS)], means[len(_PARTS) :], strict=True)
            if known > 0.0
        }

    def measure(self) -> dict[str, float]:
        """The squared error on the story itself and on one that the pack knows, with the same noise at every call.

        Raises FloatingPointError when any part is not finite: what no error shows, as a discriminator's, counts too.
        """
        parts = self.parts(torch.Generator().manual_seed(0), varied=False)
        if broken := sorted(name for name, value in parts.items() if not bool(torch.isfinite(value).all())):
            raise FloatingPointError(f"{', '.join(broken)} is not finite in what was learned")
        return {name: float(parts[name]) for name in ("mse_new", "mse_existing")}


def customization(
    model: FrameModel,
    story: NewStory | Sequence[NewStory],
    existing: Sequence[KnownStory],
    recipe: CustomizationRecipe,
    watch: Watch = lambda step, parts: None,
    peers: Peers | None = None,
) -> Customization:
    """Everything ready to train, on the model's device; the model itself stays as it is.

    Trains alone when `peers` is None. Raises FramesSeen, StoryInvalid or RecipeInvalid.
    """
    check_wall(story, existing)
    stories = together(story)
    try:
        ground = ground_of(model, [one.called for one in stories], recipe.seed)
        method = method_of(ground, recipe.method)
    except ValueError as error:
        raise RecipeInvalid(str(error)) from None
    lessons = Lessons(
        model,
        stories,
        existing,
        recipe.lessons,
        named_share=recipe.method.named_share,
        words=method.words,
        with_prior=isinstance(recipe.method, DreamBoothRecipe) and recipe.method.prior_weight > 0.0,
    )
    try:
        return Customization(
            method, lessons, model.device, watch, seed=recipe.seed, accumulate=recipe.accumulate, peers=peers
        )
    except ValueError as error:
        raise RecipeInvalid(str(error)) from None


def customize(
    pack: Pack,
    story: NewStory | Sequence[NewStory],
    existing: Sequence[KnownStory],
    recipe: CustomizationRecipe,
    folder: Path,
    *,
    say: Say = lambda line: print(line, flush=True),
    watch: Watch = lambda step, parts: None,
    until_step: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    snapshot_steps: Collection[int] = (),
    keep: Keep = lambda step, artefact: None,
    peers: Peers | None = None,
) -> Artefact:
    """Run `recipe` to its end, or to `until_step`, from the checkpoint in `folder` where there is one.

    With `peers` (those this process was started with, if None) this process takes its share of every step's batches,
    and all see the same `folder`. The first one alone writes, measures and keeps.

    Several new characters, a story each, are taught jointly: a step shows one of them, and all are in one artefact.

    `keep` is given what was learned after each of `snapshot_steps`; a run that goes on may give it one again.

    Raises what `customization` raises, RunMismatch when the checkpoint is of another run, RunStopped when `stop` said
    so, and LossNotFinite when training went wrong; the checkpoint in `folder` is then the last good one. WorkerUnable
    when another process cannot do the same, and PeerEnded when the first one ends for a reason of its own.
    """
    peers = joined() if peers is None else peers
    stories = together(story)

    def seen(step: int, parts: Mapping[str, float]) -> None:
        if step in snapshot_steps:
            peers.alone(lambda: keep(step, artefact(step)))
        watch(step, parts)

    def artefact(steps: int) -> Artefact:
        return _artefact(trainee, model, pack, stories, existing, recipe, run=identity, steps=steps)

    def prepared() -> tuple[FrameModel, Customization]:
        model = load_frame_model(pack, device=default_device())
        return model, customization(model, stories, existing, recipe, seen, peers)

    path, identity = folder / CHECKPOINT, _identity(pack, stories, existing, recipe)
    with _all_able(peers):
        model, trainee = peers.together(prepared)

        def begun() -> None:
            if load_checkpoint(path) is None:
                # Step 0 is a checkpoint as any other, so that there always is a last good one.
                facts = {"step": 0, "elapsed_s": 0.0, "figures": {}, "done": False, STARTED_FROM: identity}
                save_checkpoint(path, Checkpoint(with_prefix("networks", trainee.networks.state_dict()), facts))

        def of_this_run() -> None:
            found = load_checkpoint(path)
            if found is None:
                raise WorkerUnable(f"worker {peers.rank} does not see {path}: all workers need one folder")
            if found.facts.get(STARTED_FROM) != identity:
                raise RunMismatch(f"{path} is of another pack, story or recipe: choose another folder")

        peers.alone(begun)
        peers.together(of_this_run)
    try:
        result = train(
            trainee,
            _loop(recipe),
            path,
            optimizer_of=lambda named: GroupedAdam(named, trainee.method.rates, recipe.clip_norm),
            say=say,
            until_step=until_step,
            stop=stop,
            device=str(model.device),
            peers=peers,
        )
    except PeersApart as error:
        raise WorkerUnable(f"{error}: all workers need one folder") from error
    except FloatingPointError as error:
        kept = load_checkpoint(path)
        step = kept.facts["step"] if kept is not None else 0
        raise LossNotFinite(f"{error}; {path} holds the state after step {step}") from error
    if until_step is None and result.steps < recipe.steps:
        raise RunStopped(f"stopped after step {result.steps} of {recipe.steps}")
    learned = artefact(result.steps)
    figures = {name: round(value, 6) for name, value in result.figures.items()}
    return Artefact(learned.payload, {**learned.card, "elapsed_s": round(result.elapsed_s, 1), "figures": figures})


@contextmanager
def _all_able(peers: Peers) -> Iterator[None]:
    """What only other processes failed at while they prepared. Raises WorkerUnable in the first one."""
    try:
        yield
    except PeerEnded:
        if not peers.is_first:
            raise
        raise WorkerUnable(str(WorkerUnable.__doc__)) from None


def _artefact(
    trainee: Customization,
    model: FrameModel,
    pack: Pack,
    stories: Sequence[NewStory],
    existing: Sequence[KnownStory],
    recipe: CustomizationRecipe,
    *,
    run: str,
    steps: int,
) -> Artefact:
    """What was learned so far, read back as a frame service reads it."""
    payload = trainee.method.payload()
    adapter = read_adapter(
        payload,
        model.denoiser.unet,
        base_digest=model.base_digest,
        text_width=model.text.width,
        name="what was learned",
    )
    told = [{"id": one.id, "name": one.name, "phrase": one.phrase, "noun": one.noun} for one in stories]
    card = {
        "format": CARD_FORMAT,
        **({"character": told[0]} if len(told) == 1 else {}),
        "characters": told,
        "recipe": recipe.to_dict(),
        "run": run,
        "pack": {"name": pack.name, "digest": pack.digest, "base_digest": model.base_digest},
        "weights": {"sha256": adapter.digest, "size_bytes": len(payload), "rank": adapter.rank},
        "trained": parameter_names(trainee.method.networks),
        "dataset": {
            "new": {frame.id: frame.digest for one in stories for frame in one.frames},
            "existing": {frame.id: frame.digest for one in existing for frame in one.frames},
        },
        "steps": steps,
        "losses": trainee.tally.means(),
    }
    return Artefact(payload, card)


def _loop(recipe: CustomizationRecipe) -> LoopRecipe:
    return LoopRecipe(
        pace=Pace(
            steps=recipe.steps,
            warmup_steps=recipe.warmup_steps,
            decay_share=max(recipe.decay_share, _CONSTANT),
        ),
        # Each group of parameters is clipped alone, by `GroupedAdam`.
        optimizer=OptimizerRecipe(clip_norm=math.inf),
        seed=recipe.seed,
        save_every_s=recipe.save_every_s,
        measure_every_s=recipe.measure_every_s,
    )


def _identity(
    pack: Pack, stories: Sequence[NewStory], existing: Sequence[KnownStory], recipe: CustomizationRecipe
) -> str:
    """64 hex digits of all that decides what a run learns."""

    def told(frames: Sequence[Any]) -> list[list[Any]]:
        return [[frame.id, frame.digest, list(frame.descriptions), sorted(frame.characters)] for frame in frames]

    clock = ("save_every_s", "measure_every_s")  # how often a run is looked at changes nothing of it
    document = {
        "pack": pack.digest,
        "characters": [[one.id, one.name, one.phrase, one.noun] for one in stories],
        "new": [told(one.frames) for one in stories],
        "existing": [told(one.frames) for one in existing],
        "recipe": {key: value for key, value in recipe.to_dict().items() if key not in clock},
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def seconds_a_step(trainee: Customization, seed: int) -> float:
    """How long this process's batches of a step take now. Takes none: nothing moves and nothing is counted."""
    seconds = []
    for number in range(_TIMED_STEPS + 1):  # the first one warms up
        start = time.monotonic()
        trainee.parts(step_generator(seed, number))[TOTAL].backward()  # type: ignore[no-untyped-call]
        trainee.networks.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - start)
    return min(seconds[1:]) * len(trainee.own_batches)


def write_artefact(artefact: Artefact, path: Path) -> None:
    """Write the weights to `path` and the card to `card_path(path)`, the card last: where it is, the weights are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_bytes(path, artefact.payload)
    card = {**artefact.card, "weights": {"file": path.name, **artefact.card["weights"]}}
    save_bytes(card_path(path), (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def card_path(path: Path) -> Path:
    """Where the card of the weights at `path` is."""
    return path.with_suffix(".json")


def toon_customization(method: str, *, learns: str = "lora") -> CustomizationRecipe:
    """What suits the toon pack: a network a hundred times smaller than those that the papers' rates are for.

    Half of the new descriptions name the character alone, so that the name comes to mean the look; the methods that
    learn a word see nothing else. Beside a LoRA the name starts as the phrase: from the first step on it means what the
    pack makes of those words, where a name that starts as itself still meant nobody after 120 steps.
    Raises RecipeInvalid for a method that is none.
    """
    low_rank = EpicEvoRecipe(
        weights=EpicEvoWeights(adversarial=0.1, distillation=0.25, levels="signal", mismatch_negatives=True),
        learns="lora",
        distil_on="existing",
        rate=2e-3,
        word_rate=1e-3,
        named_share=0.5,
    )
    recipes: dict[str, MethodRecipe] = {
        "custom-diffusion": CustomDiffusionRecipe(rate=5e-4, word_rate=5e-3, vectors=2),
        "dreambooth": DreamBoothRecipe(rate=1e-4, named_share=0.5),
        "epicevo": EpicEvoRecipe(rate=1e-4, named_share=0.5) if learns == "unet" else low_rank,
        "lora": LoraRecipe(rank=16, rate=2e-3, word_rate=1e-3, named_share=0.5),
        "textual-inversion": TextualInversionRecipe(rate=1e-2, vectors=4),
    }
    if method not in recipes:
        raise RecipeInvalid(f"there is no method {method!r}; there are {', '.join(sorted(METHODS))}")
    return CustomizationRecipe(
        method=recipes[method],
        lessons=LessonRecipe(existing_stories=24, frames_per_story=3),
        steps=300,
        warmup_steps=10,
        decay_share=0.5,
    )


def published_customization(method: str, *, learns: str = "lora") -> CustomizationRecipe:
    """The published numbers of each method, for networks of the size that they are for.

    EpicEvo was published for the whole UNet; as a LoRA it moves as fast as one.
    Raises RecipeInvalid for a method that is none.
    """
    rate = LoraRecipe().rate
    recipes: dict[str, tuple[MethodRecipe, int]] = {
        "custom-diffusion": (CustomDiffusionRecipe(), 250),
        "dreambooth": (DreamBoothRecipe(), 400),
        "epicevo": (EpicEvoRecipe() if learns == "unet" else EpicEvoRecipe(learns="lora", rate=rate), 100),
        "lora": (LoraRecipe(), 500),
        "textual-inversion": (TextualInversionRecipe(), 3000),
    }
    if method not in recipes:
        raise RecipeInvalid(f"there is no method {method!r}; there are {', '.join(sorted(METHODS))}")
    chosen, steps = recipes[method]
    return CustomizationRecipe(method=chosen, steps=steps)


def recipe_for(pack: Pack, method: str, *, learns: str = "lora") -> CustomizationRecipe:
    """What a pack is taught with unless somebody says otherwise: an arldm pack is no toon world's small network."""
    made = published_customization if pack.manifest.architecture == "arldm" else toon_customization
    return made(method, learns=learns)


def _planned(pack: Pack, arguments: argparse.Namespace, folder: Path, recipe: CustomizationRecipe, peers: Peers) -> int:
    """How many steps a run takes: as asked for, as planned when it began, or as many as fit the minutes."""
    if arguments.steps is not None:
        return int(arguments.steps)
    if arguments.minutes is None:
        return recipe.steps
    plan = folder / PLAN

    def told() -> int:
        return int(json.loads(plan.read_text(encoding="utf-8"))["steps"]) if plan.is_file() else 0

    def timed() -> float:
        story, existing = _stories(pack, arguments, recipe)
        model = load_frame_model(pack, device=default_device())
        trainee = customization(model, story, existing, recipe, peers=peers)
        trainee.networks.to(default_device())
        return seconds_a_step(trainee, recipe.seed)

    if planned := int(peers.agreed(float(peers.alone(told) or 0))):
        return planned
    with _all_able(peers):
        seconds = peers.most(peers.together(timed))  # all at once, as they will train
    steps: int = max(1, round(arguments.minutes * 60.0 / seconds))

    def write() -> None:
        print(f"{seconds:.2f} s a step: {steps} steps", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_bytes(plan, json.dumps({"steps": steps, "seconds_a_step": round(seconds, 3)}).encode())

    peers.alone(write)
    return steps


def _stories(
    pack: Pack, arguments: argparse.Namespace, recipe: CustomizationRecipe
) -> tuple[NewStory, tuple[KnownStory, ...]]:
    width, height = pack.manifest.width_px, pack.manifest.height_px
    lessons, taken = recipe.lessons, set(Cast.load(pack.folder).names)
    count, first = lessons.existing_stories, lessons.existing_first_seed
    if width != height and (arguments.known is None or arguments.story is None):
        raise RecipeInvalid("the toon world's pictures are square, and the pack's are not: give --known and --story")
    if arguments.known is not None:
        known = read_known(arguments.known, width, height, count, first)
        taken |= names_in(known)
    elif pack.manifest.architecture == "arldm":  # there is none of the toon world: it would unlearn its own
        raise RecipeInvalid("an arldm pack is taught beside stories of those whom it knows: give --known")
    else:
        known = known_stories(count, width, first)
    if arguments.world_character is not None:
        return world_story(arguments.world_character, width), known
    return read_story(arguments.story, width, height, taken), known


def snapshot_steps(steps: int, count: int) -> tuple[int, ...]:
    """The ends of `count` equal parts of a run but the last, whose artefact is the run's own."""
    return tuple(sorted({round(steps * part / count) for part in range(1, count)} - {0, steps}))


def run_folder(arguments: argparse.Namespace) -> Path:
    """Where a run keeps what it goes on from."""
    chosen: Path | None = arguments.folder
    return chosen or Path.home() / ".cache" / "fabula" / "customize" / arguments.out.stem


def run(arguments: argparse.Namespace, progress: Progress, stop: Stop, peers: Peers) -> dict[str, Any]:
    """What the command line asks for; the train function of every worker. Returns the card.

    The first of `peers` alone tells `progress` and writes; the others' cards are of no use.
    """

    def asked() -> tuple[Pack, CustomizationRecipe]:
        pack = load_pack(arguments.pack)
        recipe = replace(recipe_for(pack, arguments.method, learns=arguments.learns), seed=arguments.seed)
        recipe = replace(recipe, accumulate=recipe.accumulate * arguments.accumulate * peers.count)
        if arguments.rate is not None:
            recipe = replace(recipe, method=replace(recipe.method, rate=arguments.rate))
        if arguments.save_every_s is not None:
            recipe = replace(recipe, save_every_s=arguments.save_every_s)
        return pack, recipe

    folder = run_folder(arguments)
    with _all_able(peers):
        pack, recipe = peers.together(asked)
    recipe = replace(recipe, steps=_planned(pack, arguments, folder, recipe, peers))
    with _all_able(peers):
        story, existing = peers.together(lambda: _stories(pack, arguments, recipe))
    peers.alone(lambda: progress.tell("began", pid=os.getpid(), steps=recipe.steps))
    prober = peers.alone(lambda: Prober(pack, story) if arguments.probes else None)

    def seen(step: int, parts: Mapping[str, float]) -> None:
        peers.alone(lambda: progress.step(step + 1, parts, is_last=step + 1 == recipe.steps))

    def probed(step: int, payload: bytes | None) -> dict[str, float]:
        def told(one: Drawn) -> None:
            file = str(folder / PROBES / one.file)
            progress.tell("probe", step=step, probe=one.probe, description=one.description, file=file)

        return {} if prober is None else prober.draw(step, payload, folder / PROBES, told, stop)

    def with_probes(step: int, artefact: Artefact) -> Artefact:
        figures = {**artefact.card.get("figures", {}), **probed(step, artefact.payload)}
        return Artefact(artefact.payload, {**artefact.card, "figures": figures})

    def keep(step: int, artefact: Artefact) -> None:
        path = folder / SNAPSHOTS / f"{step:06d}.safetensors"
        if not card_path(path).is_file():
            write_artefact(with_probes(step, artefact), path)
        progress.tell("snapshot", step=step, file=str(path))

    def finish(artefact: Artefact) -> dict[str, Any]:
        artefact = with_probes(recipe.steps, artefact)
        write_artefact(artefact, arguments.out)
        progress.tell("snapshot", step=recipe.steps, file=str(arguments.out))
        return artefact.card

    def measure_before() -> None:
        """What is forgotten is forgotten since then, and no card of weights has these figures."""
        if figures := probed(0, None):
            progress.tell("probed", step=0, figures=figures)

    peers.alone(measure_before)
    artefact = customize(
        pack,
        story,
        existing,
        recipe,
        folder,
        watch=seen,
        stop=stop,
        snapshot_steps=snapshot_steps(recipe.steps, arguments.snapshots),
        keep=keep,
        peers=peers,
    )
    return peers.alone(lambda: finish(artefact)) or {}


@contextmanager
def _room_named() -> Iterator[None]:
    """A full disk by its own name, whoever met it. Raises DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"{DiskFull.__doc__} ({error.strerror})") from error
        raise
    except SafetensorError as error:  # tells the number only in words
        if (told := re.search(r"os error (\d+)", str(error))) and int(told[1]) in _FULL:
            raise DiskFull(f"{DiskFull.__doc__} ({error})") from error
        raise


@contextmanager
def reasons_named() -> Iterator[None]:
    """Whatever ends a run that is no fault of the code, as a CustomizationError or ModelError."""
    try:
        with _room_named():
            yield
    except ValueError as error:
        raise RecipeInvalid(str(error)) from None


def command() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--story", type=Path, help="folder with story.json and 3 to 20 PNG files")
    parser.add_argument(
        "--known", type=Path, help="folder of stories of those whom the pack knows; else of the toon world"
    )
    who.add_argument("--world-character", help="id of one of the toon world's new characters")
    parser.add_argument("--method", choices=tuple(sorted(METHODS)), default="epicevo")
    parser.add_argument("--learns", choices=("lora", "unet"), default="lora", help="what EpicEvo trains")
    parser.add_argument("--out", type=Path, required=True, help="the weights; their card lies beside them")
    parser.add_argument("--folder", type=Path, help="for checkpoints; a run goes on from what is there")
    long = parser.add_mutually_exclusive_group()
    long.add_argument("--minutes", type=float, help="as many steps as fit, by timing a few before the first one")
    long.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--progress", type=Path, help="file to tell of steps and snapshots, one JSON object a line")
    parser.add_argument("--stop-file", type=Path, help="where it is, the run ends as after SIGTERM")
    parser.add_argument("--snapshots", type=int, default=1, help="parts of a run after each of which weights are kept")
    parser.add_argument("--probes", action="store_true", help="draw probes before, at every snapshot, and at the end")
    parser.add_argument("--save-every-s", type=float, help="between checkpoints; instead of the recipe's")
    several = parser.add_argument_group("several workers")
    several.add_argument("--workers", type=_at_least_one, help="processes under Ray Train; without it, this one alone")
    several.add_argument("--accumulate", type=_at_least_one, default=1, help="batches of a step, for each worker")
    several.add_argument("--worker-cpus", type=_share, default=1.0, help="CPUs that each worker asks Ray for")
    several.add_argument("--worker-gpus", type=_share, default=0.0, help="GPUs that each worker asks Ray for")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not math.isfinite(share) or share < 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return share


def main() -> None:
    """Teach somebody new. Ends with status 1 and a line of JSON that names the reason when that cannot be done."""
    arguments = run_arguments(command())
    stop = Stop(arguments.stop_file)
    stop.listen()
    progress: Progress | None = None
    try:
        with reasons_named():
            progress = Progress(arguments.progress)
            card = _run_as_asked(arguments, progress, stop)
            progress.tell("ended", outcome="succeeded", step=card["steps"])
    except (CustomizationError, ModelError) as error:
        outcome = "stopped" if error.reason == RunStopped.reason else "failed"
        with suppress(OSError):  # there may be no room for it; the exit status says so, too
            if progress is not None:
                progress.tell("ended", outcome=outcome, reason=error.reason, message=str(error))
            print(json.dumps({"error": error.reason, "message": str(error)}, ensure_ascii=False), file=sys.stderr)
        sys.exit(_STATUSES.get(error.reason, 1))
    print(json.dumps({key: card[key] for key in TOLD}))


def _run_as_asked(arguments: argparse.Namespace, progress: Progress, stop: Stop) -> dict[str, Any]:
    if arguments.workers is None:
        return run(arguments, progress, stop, Peers())
    from training.customize_ray import run_with_workers  # a run alone needs no Ray

    return run_with_workers(arguments, stop)


if __name__ == "__main__":
    main()
