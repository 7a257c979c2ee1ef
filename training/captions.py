"""Trains the pack's LLaVA: its eyes on the world's labels, the base on every question, one LoRA adapter per question.

    python -m training.captions --work ~/.cache/fabula/training/captions --out services/models/packs/toon

The vision tower first learns to read a scene's truth off its picture (`captions_sight`). The base then learns "Describe the picture.", the story question and the descriptive question in full weights; the adapters
`story` and `descriptive` then refine their own question with the base frozen. Single-process and seeded: the rows of a
step depend on the seed and the step only, so a run that was interrupted goes on from its last checkpoint as if it had
not been. A checkpoint is one safetensors file, moved into place when it is complete.

Optimiser: Muon for the matrices inside the networks, AdamW for tables, norms and biases; the learning rate rises over
the first steps and falls to zero along a cosine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from services.models import llava
from services.models.tokenizer import StoryTokenizer
from training.captions_data import (
    FRAMES_PER_STORY,
    IGNORED,
    Batch,
    CacheRecipe,
    Frames,
    Row,
    RowRecipe,
    Stories,
    batch,
    degrade,
    draw_frames,
    draw_stories,
    frame_row,
    story_row,
)
from training.captions_sight import Sight, accuracy, targets


@dataclass(frozen=True)
class Phase:
    """One training run: which questions, how long, how fast."""

    name: str
    tasks: tuple[str, ...]
    steps: int
    rows_per_step: int
    learning_rate: float
    frames_ratio: float = 0.0  # steps that look at single frames instead of stories
    warmup_steps: int = 60
    weight_decay: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class CaptionsRecipe:
    """The whole recipe of the shipped captioner."""

    cache: CacheRecipe = field(default_factory=CacheRecipe)
    shape: llava.LlavaShape = field(default_factory=llava.LlavaShape)
    sight: Phase = Phase("sight", (), 500, 48, 2e-3)
    base: Phase = Phase("base", ("describe", "story", "descriptive"), 3000, 10, 3e-3, frames_ratio=0.25)
    story: Phase = Phase("story", ("story",), 300, 16, 1.5e-3, seed=1, warmup_steps=20)
    descriptive: Phase = Phase("descriptive", ("descriptive",), 300, 16, 1.5e-3, seed=2, warmup_steps=20)
    adapter_rank: int = 8
    adapter_alpha: float = 16.0
    checkpoint_every_steps: int = 100
    seed: int = 7


def answer_loss(model: Any, given: Batch) -> Tensor:
    """Mean cross entropy over the answers' tokens of one batch: what the model is trained on, and what is reported."""
    llava_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels_BN = torch.from_numpy(given.labels_BN)
    hidden_BND = llava_model.model(
        input_ids=torch.from_numpy(given.ids_BN),
        pixel_values=llava.pixels(given.images_BHWC),
        attention_mask=_additive(given.visible_B1NN),
        position_ids=torch.from_numpy(given.positions_BN),
        use_cache=False,
    ).last_hidden_state
    asked_BN = labels_BN[:, 1:] != IGNORED  # the logits of all other places are never computed
    logits = llava_model.lm_head(hidden_BND[:, :-1][asked_BN])
    return nn.functional.cross_entropy(logits.float(), labels_BN[:, 1:][asked_BN])


def _additive(visible_B1NN: npt.NDArray[np.bool_]) -> Tensor:
    """The mask as zeros and a large negative number; plain attention adds it to the scores."""
    visible = torch.from_numpy(visible_B1NN)
    return torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill_(~visible, -1e4)


def rate_at(phase: Phase, step: int) -> float:
    """Learning rate of a step (0-based): a linear rise, then a cosine to zero at the last step. Pure."""
    rise = min(1.0, (step + 1) / phase.warmup_steps)
    return phase.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / phase.steps))


def draw_rows(
    frames: Frames, stories: Stories, phase: Phase, step: int, tokenizer: StoryTokenizer, shape: llava.LlavaShape
) -> Iterator[Row]:
    """The rows of one step, from the seed and the step alone."""
    rng = random.Random(f"{phase.name} {phase.seed} {step}")
    recipe = RowRecipe(phase.tasks, shape.image_tokens_count, shape.context_tokens)
    if rng.random() < phase.frames_ratio:
        for _ in range(2 * phase.rows_per_step):  # these rows are less than half as long
            yield frame_row(frames, rng.choice(frames.frames), recipe, tokenizer, rng)
    else:
        # One place in the story per step keeps the rows of a batch about equally long.
        index = rng.randrange(FRAMES_PER_STORY - 1)
        for _ in range(phase.rows_per_step):
            yield story_row(stories, rng.choice(stories.stories), index, recipe, tokenizer, rng)


def sight_batch(frames: Frames, phase: Phase, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures [B,C,H,W] and labels of one step of the sight phase."""
    rng = random.Random(f"{phase.name} {phase.seed} {step}")
    chosen = [rng.choice(frames.frames) for _ in range(phase.rows_per_step)]
    images_BHWC = np.stack([degrade(frames.images_NHWC[frame.picture], rng) for frame in chosen])
    return llava.pixels(images_BHWC), targets([frame.scene for frame in chosen])


class Optimiser:
    """Muon and AdamW behind one step; its state is plain tensors."""

    def __init__(self, model: nn.Module, phase: Phase) -> None:
        inner, outer = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim == 2 and "embed" not in name and "lora_" not in name
                (inner if matrix else outer).append((name, parameter))
        self.parts: list[torch.optim.Optimizer] = []
        self.names: list[list[str]] = []
        if inner:
            parameters = [parameter for _, parameter in inner]
            self.parts.append(
                torch.optim.Muon(
                    parameters, lr=0.0, weight_decay=phase.weight_decay, ns_steps=4, adjust_lr_fn="match_rms_adamw"
                )
            )
            self.names.append([name for name, _ in inner])
        if outer:
            parameters = [parameter for _, parameter in outer]
            self.parts.append(torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, foreach=True))
            self.names.append([name for name, _ in outer])

    def step(self, rate: float) -> None:
        """Update at a learning rate and forget the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every moment, named `<parameter>/<moment>`."""
        found: dict[str, Tensor] = {}
        for part, names in zip(self.parts, self.names, strict=True):
            for index, moments in part.state_dict()["state"].items():
                found |= {f"{names[index]}/{key}": torch.as_tensor(value) for key, value in moments.items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for part, names in zip(self.parts, self.names, strict=True):
            document = part.state_dict()
            document["state"] = {
                index: {key.rsplit("/", 1)[1]: value for key, value in state.items() if key.rsplit("/", 1)[0] == name}
                for index, name in enumerate(names)
            }
            part.load_state_dict(document)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The tensors a phase changes."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def save_checkpoint(file: Path, step: int, model: nn.Module, optimiser: Optimiser) -> None:
    """Write a checkpoint that is complete or invisible."""
    tensors = {f"model/{name}": tensor.detach().contiguous() for name, tensor in trainable(model).items()}
    tensors |= {f"optimiser/{name}": tensor.contiguous() for name, tensor in optimiser.state().items()}
    draft = file.with_suffix(".draft")
    save_file(tensors, draft, metadata={"step": str(step)})
    draft.replace(file)


def load_checkpoint(file: Path, model: nn.Module, optimiser: Optimiser) -> int:
    """Put a checkpoint back and return the step to go on with; 0 when there is none."""
    if not file.exists():
        return 0
    with safe_open(file, framework="pt") as archive:
        tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118 - not a mapping
        step = int((archive.metadata() or {})["step"])
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(tensors[f"model/{name}"])
    prefix = "optimiser/"
    optimiser.load({key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)})
    return step


def run_phase(
    model: nn.Module,
    phase: Phase,
    loss_at: Callable[[int], Tensor],
    file: Path,
    checkpoint_every_steps: int,
    say: Callable[[str], None] = print,
) -> None:
    """Train until the phase's last step, from `file` when it holds a checkpoint. `loss_at(step)` is a step's loss."""
    optimiser = Optimiser(model, phase)
    first = load_checkpoint(file, model, optimiser)
    model.train()
    started, recent = time.monotonic(), 0.0
    for step in range(first, phase.steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_at(step)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(trainable(model).values()), 1.0)
        optimiser.step(rate_at(phase, step))
        recent = loss.item() if step == first else 0.95 * recent + 0.05 * loss.item()
        done = step + 1
        if done % 25 == 0 or done == phase.steps:
            pace = (time.monotonic() - started) / (done - first)
            left_s = pace * (phase.steps - done)
            say(f"{phase.name} {done}/{phase.steps} loss {recent:.3f} {pace:.2f} s/step, {left_s / 60:.1f} min left")
        if done % checkpoint_every_steps == 0 or done == phase.steps:
            save_checkpoint(file, done, model, optimiser)
    model.eval()


@dataclass(frozen=True)
class Workshop:
    """A recipe, the folder it works in, and what is the same for all its phases."""

    recipe: CaptionsRecipe
    work: Path

    def say(self, line: str) -> None:
        """Print at once: the run is watched through a log file."""
        print(line, flush=True)

    def run(self, model: nn.Module, phase: Phase, loss_at: Callable[[int], Tensor]) -> None:
        """`run_phase` with this run's files."""
        file = self.work / f"{phase.name}.safetensors"
        run_phase(model, phase, loss_at, file, self.recipe.checkpoint_every_steps, self.say)

    def learn_to_see(self, model: Any) -> None:
        """The sight phase: changes the model's vision tower."""
        frames = draw_frames(self.work / "cache", self.recipe.cache)
        self.say(f"{len(frames.frames)} frames drawn")
        phase = self.recipe.sight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(phase.seed)
            sight = Sight(model.model.vision_tower, self.recipe.shape.vision_width)

        def loss_at(step: int) -> Tensor:
            pixels_BCHW, truth = sight_batch(frames, phase, step)
            return sight.loss(pixels_BCHW, truth)

        self.run(sight, phase, loss_at)
        with torch.no_grad():
            pixels_BCHW, truth = sight_batch(frames, phase, -1)
            self.say(json.dumps({name: round(value, 2) for name, value in accuracy(sight(pixels_BCHW), truth).items()}))

    def learn_to_speak(self, model: Any, phase: Phase, tokenizer: StoryTokenizer) -> None:
        """The base phase or an adapter's phase."""
        frames = draw_frames(self.work / "cache", self.recipe.cache)
        stories = draw_stories(self.work / "cache", self.recipe.cache)
        self.say(f"{len(stories.stories)} stories drawn")

        def loss_at(step: int) -> Tensor:
            rows = list(draw_rows(frames, stories, phase, step, tokenizer, self.recipe.shape))
            return answer_loss(model, batch(rows, tokenizer.pad_id))

        self.run(model, phase, loss_at)


def train(recipe: CaptionsRecipe, tokenizer: StoryTokenizer, work: Path, out: Path) -> None:
    """Run every phase and write `llava/` and `adapters/` under `out`. Goes on where an earlier run stopped."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    workshop = Workshop(recipe, work)
    base = llava.build(recipe.shape, tokenizer, recipe.seed)
    workshop.learn_to_see(base)
    workshop.learn_to_speak(base, recipe.base, tokenizer)
    llava.save_base(base, tokenizer, out / "llava")
    for number, phase in enumerate((recipe.story, recipe.descriptive), start=1):
        # An adapter is trained on the weights it will be served with: those rounded to fp16.
        rounded = llava.load_base(out / "llava")
        adapted = llava.add_adapter(rounded, recipe.adapter_rank, recipe.adapter_alpha, recipe.seed + number)
        workshop.learn_to_speak(adapted, phase, tokenizer)
        llava.save_adapter(adapted, out / "adapters" / phase.name)


def main() -> None:
    """Train the captioner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of drawings and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="pack folder; its tokenizer/ is read")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer = StoryTokenizer.load(arguments.out / "tokenizer")
    train(CaptionsRecipe(), tokenizer, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
