"""Evaluates a toon pack as it is served: pictures drawn by its own samplers, texts written by its own captioner.

Prints a table and, as its last line, one JSON object with every figure, its target and whether it passed.

* `vae_psnr_db…` the autoencoder alone, on held-out pictures of the known and of new characters;
* `frame_*` frames of held-out stories, drawn from their true descriptions with the true earlier frames as references,
  as the product draws, and read by the judge. Right means the whole answer of a frame: exactly these of the main cast;
* `first_*` the same without references, on frames whose combination was held out;
* `reference_*` what references are worth: the same frames with none, and with another story's;
* `description_*` descriptions the captioner writes for true captions: do they parse and name whom the caption names;
* `judge_*` the judge on the true pictures of the same frames: no figure above can be trusted beyond it.

    python -m training.evaluation.toon [--pack DIR] [--frames 200] [--descriptions 100] [--threads 2]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from services.models.drawing import Drawing, Pixels, Seen, Sketch, advance, begin, finish
from services.models.pack import Pack, load_pack
from services.models.registry import FrameModel, load_frame_model
from training.evaluation.captions import is_whole, names_agree, names_in
from training.evaluation.judge import Judge, agreement, load_judge, truth
from training.toon.reading import parse
from training.toon.render import render
from training.toon.scene import Scene
from training.toon.stories import Story
from training.toon.world import sample_frame, sample_story
from training.vae import reconstruction_psnr_db

DEFAULT_PACK = Path(__file__).resolve().parents[2] / "services" / "models" / "packs" / "toon"
MAX_REFERENCES = 3
FIRST_SEED = 500_000  # seeds of evaluation frames; training's are far below
_TOGETHER = 8  # frames drawn in one batch


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number. `target` None: reported, not judged. `passed` is true when there is no target."""

    name: str
    value: float
    n: int
    target: float | None = None
    at_most: bool = False  # the target is an upper limit

    @property
    def passed(self) -> bool:
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class Task:
    """A frame to be drawn and its truth."""

    scene: Scene
    description: str
    seed: int
    references: tuple[Seen, ...] = ()


def held_out_stories(count: int, split: str = "test") -> list[Story]:
    """The evaluation's stories; the same ones every time."""
    return [sample_story(FIRST_SEED + number, split=split) for number in range(count)]


def story_tasks(stories: Sequence[Story], count: int, size_px: int) -> list[Task]:
    """Frames 2 to 5 of the stories, with the true earlier frames as references."""
    tasks: list[Task] = []
    for number, story in enumerate(stories):
        seen: list[Seen] = []
        for beat, frame in enumerate(story.frames):
            if beat > 0:
                references = tuple(seen[-MAX_REFERENCES:])
                tasks.append(Task(frame.scene, frame.description, 1000 * number + beat, references))
            seen.append(Seen(pixels=render(frame.scene, size_px), description=frame.description))
    return tasks[:count]


def first_tasks(count: int) -> list[Task]:
    """Held-out single frames, without references."""
    frames = [sample_frame(FIRST_SEED + number, split="test") for number in range(count)]
    return [Task(frame.scene, frame.description, number) for number, frame in enumerate(frames)]


def shuffled(tasks: Sequence[Task]) -> list[Task]:
    """The same tasks, each with the references of a task of another story (a quarter of the list further on)."""
    away = max(4, len(tasks) // 4)
    return [replace(task, references=tasks[(i + away) % len(tasks)].references) for i, task in enumerate(tasks)]


def draw_all(model: FrameModel, tasks: Sequence[Task]) -> list[Pixels]:
    """Every task's picture, with the pack's own sampling settings."""
    sampling = model.manifest.sampling
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
                    steps=sampling.default_steps,
                    text_guidance=sampling.default_text_guidance,
                    image_guidance=sampling.default_image_guidance,
                    references=task.references,
                ),
            )
            for task in tasks[first : first + _TOGETHER]
        ]
        while not drawings[0].finished:
            advance(model, drawings)
        pictures += [finish(model, drawing) for drawing in drawings]
    return pictures


def background_jump(tasks: Sequence[Task], pictures: Sequence[Pixels]) -> float:
    """Mean difference (0..1) of a drawn frame's upper third to its newest reference's, where both tell the same place.

    The upper third is mostly background: this is how much it jumps between frames of one scene.
    """
    jumps = []
    for task, picture in zip(tasks, pictures, strict=True):
        if not task.references:
            continue
        said, before = parse(task.description), parse(task.references[-1].description)
        if (said.setting, said.time, said.side) == (before.setting, before.time, before.side):
            rows = picture.shape[0] // 3
            here, there = picture[:rows].astype(np.float64), task.references[-1].pixels[:rows].astype(np.float64)
            jumps.append(float(np.abs(here - there).mean() / 255.0))
    return float(np.mean(jumps)) if jumps else 0.0


def judged(
    prefix: str, judge: Judge, tasks: Sequence[Task], pictures: Sequence[Pixels], targets: dict[str, float]
) -> list[Figure]:
    """One figure per question of the judge."""
    shares = agreement(judge.verdicts(np.stack(pictures)), [truth(task.scene) for task in tasks])
    return [
        Figure(name=f"{prefix}_{question}", value=share, n=len(tasks), target=targets.get(question))
        for question, share in shares.items()
    ]


FRAME_TARGETS = {"characters": 0.80, "setting": 0.85, "time": 0.90}
JUDGE_TARGETS = {"characters": 0.98, "setting": 0.98, "time": 0.98}


def picture_figures(pack: Pack, frames: int, say: Callable[[str], None]) -> list[Figure]:
    """Everything about pictures."""
    model, judge = load_frame_model(pack), load_judge()
    size_px = model.manifest.width_px
    figures: list[Figure] = []
    for name, split in (("known", "test"), ("new", "new")):
        n = min(100, frames)
        pictures = np.stack([render(sample_frame(FIRST_SEED + i, split=split).scene, size_px) for i in range(n)])
        target = 23.0 if name == "known" else None
        psnr = reconstruction_psnr_db(model.codec.vae, pictures)
        figures.append(Figure(name=f"vae_psnr_db_{name}", value=psnr, n=n, target=target))
    say("pictures: autoencoder done")
    tasks = story_tasks(held_out_stories(-(-frames // 4)), frames, size_px)
    figures += judged("judge", judge, tasks, [render(task.scene, size_px) for task in tasks], JUDGE_TARGETS)
    start = time.perf_counter()
    drawn = draw_all(model, tasks)
    each_s = (time.perf_counter() - start) / len(tasks)
    figures += judged("frame", judge, tasks, drawn, FRAME_TARGETS)
    figures.append(Figure(name="frame_seconds", value=each_s, n=len(tasks)))
    say(f"pictures: {len(tasks)} story frames done, {each_s:.2f} s each")
    fewer = max(1, frames // 4)
    singles = first_tasks(fewer)
    figures += judged("first", judge, singles, draw_all(model, singles), {})
    some = tasks[:fewer]
    without = [replace(task, references=()) for task in some]
    others = shuffled(tasks)[:fewer]
    figures.append(Figure(name="reference_jump_on", value=background_jump(some, drawn[:fewer]), n=fewer))
    for name, variant in (("off", without), ("shuffled", others)):
        pictures_of = draw_all(model, variant)
        figures.append(Figure(name=f"reference_jump_{name}", value=background_jump(some, pictures_of), n=fewer))
        figures += [
            f
            for f in judged(f"reference_{name}", judge, variant, pictures_of, {})
            if f.name.endswith(("_characters", "_setting"))
        ]
    say("pictures: first frames and reference ablation done")
    return figures


@dataclass(frozen=True)
class Told:
    """A true caption, the one before it, and the description the pack's captioner wrote for it."""

    previous_caption: str
    caption: str
    description: str


async def write_descriptions(pack: Pack, stories: Sequence[Story], count: int) -> list[Told]:
    """Descriptions for frames 2 to 5 with their true predecessors."""
    from services.caption.driver import DriverSettings, InProcessDriver
    from services.caption.engine import NAME_LOCK_TRIES, CaptionEngine, adapter_folders, adapter_rank_max, read_model
    from services.caption.job import DescribeJob, Sampling

    model, adapters = read_model(pack), adapter_folders(pack)
    settings = DriverSettings(
        llava=pack.path("llava/config.json").parent,
        adapters=adapters,
        adapter_rank_max=adapter_rank_max(tuple(adapters.values())),
        context_tokens=model.context_tokens,
        on_gpu=False,
        dtype="float32",
        threads=1,
        max_running=16,
        kv_cache_bytes=64 << 20,
        gpu_memory_ratio=0.5,
        stall_s=60.0,
    )
    # Room for everything at once, second choices included: nobody else is asking.
    engine = CaptionEngine(model, InProcessDriver(settings), max_requests=2 * count * (1 + NAME_LOCK_TRIES))
    await engine.start(warm_up=False)
    try:
        jobs = []
        for story in stories:
            for before, frame in pairwise(story.frames):
                file = io.BytesIO()
                Image.fromarray(render(before.scene)).save(file, format="PNG")
                jobs.append(
                    DescribeJob(
                        image=file.getvalue(),
                        previous_caption=before.caption,
                        caption=frame.caption,
                        sampling=Sampling(temperature=0.0),
                    )
                )
        answers = await asyncio.gather(*(engine.describe(job) for job in jobs[:count]))
        return [
            Told(job.previous_caption, job.caption, answer.text) for job, answer in zip(jobs, answers, strict=False)
        ]
    finally:
        await engine.stop()


def text_figures(told: Sequence[Told]) -> list[Figure]:
    """Do descriptions parse, do they name whom the caption names, and nobody who is in neither caption?"""
    understood = [is_whole(parse(one.description)) for one in told]
    named = [names_in(one.caption) <= names_in(one.description) for one in told]
    both = [u and n for u, n in zip(understood, named, strict=True)]
    agreed = [names_agree(one.description, one.caption, names_in(one.previous_caption)) for one in told]
    n = len(told)
    return [
        Figure(name="description_parses", value=sum(understood) / n, n=n),
        Figure(name="description_names", value=sum(named) / n, n=n),
        Figure(name="description_parses_and_names", value=sum(both) / n, n=n, target=0.90),
        Figure(name="description_names_nobody_else", value=sum(agreed) / n, n=n),
    ]


def table(figures: Sequence[Figure]) -> str:
    """The figures as lines of text."""
    lines = [f"{'figure':34} {'value':>8} {'target':>8} {'n':>5}"]
    for figure in figures:
        target = "" if figure.target is None else f"{'≤' if figure.at_most else '≥'} {figure.target:g}"
        mark = "" if figure.target is None else ("  ok" if figure.passed else "  MISSED")
        lines.append(f"{figure.name:34} {figure.value:8.3f} {target:>8} {figure.n:5d}{mark}")
    return "\n".join(lines)


def report(pack: Pack, figures: Sequence[Figure], not_measured: Sequence[str] = ()) -> dict[str, object]:
    """What the last line says. A pack of which something was not measured has not passed."""
    return {
        "pack": pack.name,
        "digest": pack.digest,
        "first_seed": FIRST_SEED,
        "threads": torch.get_num_threads(),
        "figures": [{**asdict(f), "value": round(f.value, 5), "passed": f.passed} for f in figures],
        "not_measured": list(not_measured),
        "passed": all(f.passed for f in figures) and not not_measured,
    }


def main() -> None:
    """Evaluate a pack. Ends with status 0 also when a target is missed: the last line says it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK)
    parser.add_argument("--frames", type=int, default=200, help="story frames to draw")
    parser.add_argument(
        "--descriptions", type=int, default=100, help="descriptions to write; 0 leaves the captioner out"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--card", action="store_true", help="write the figures into the pack's card and seal it again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pack = load_pack(arguments.pack)
    figures = picture_figures(pack, arguments.frames, lambda line: print(line, flush=True))
    not_measured = []
    if arguments.descriptions and importlib.util.find_spec("vllm") is None:
        print("descriptions: not measured, vLLM is not installed here")
        not_measured = ["description"]
    elif arguments.descriptions:
        stories = held_out_stories(-(-arguments.descriptions // 4))
        figures += text_figures(asyncio.run(write_descriptions(pack, stories, arguments.descriptions)))
    print(table(figures))
    said = report(pack, figures, not_measured)
    if arguments.card:
        from training.card import write_card

        write_card(pack, said)
    print(json.dumps(said, ensure_ascii=False))


if __name__ == "__main__":
    main()
