"""Studies of a finished pack: one dial at a time, everything else as the pack has it, on the same held-out frames.

    python -m training.evaluation.studies steps guidance references --frames 48
    python -m training.evaluation.studies temperature history --stories 16

* `steps`        sampling steps: the fewest within 2 % of the best
* `guidance`     text guidance and image guidance
* `references`   how many earlier frames are looked at, and how noisy they are made
* `shortcuts`    what the frame service may leave out: shared noise, few noise levels, guidance in some steps only
* `temperature`  of captions: the report's Tables 1 and 3 (repetition, names, arcs)
* `history`      captions from all earlier ones against the last one only
* `guards`       name lock and repetition guard, on and off

Prints one Markdown table a study, to be kept in `training/LOG.md` with its date.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from services.models.denoiser import REFERENCE_LEVEL_DIVISOR
from services.models.pack import Pack, load_pack
from services.models.quality import Quality
from services.models.references import ReferencePolicy
from services.models.registry import FrameModel, load_frame_model
from training.evaluation.arcs import drops_hero, has_arc, places_of
from training.evaluation.captions import Captioner, is_whole, names_agree, names_in
from training.evaluation.figures import Figure, mean, share
from training.evaluation.frames import (
    Dials,
    Say,
    Task,
    background_jump,
    draw_all,
    held_out_stories,
    same_place,
    story_tasks,
)
from training.evaluation.judge import Judge, load_judge
from training.evaluation.toon import DEFAULT_PACK
from training.toon.reading import parse
from training.toon.render import render
from training.toon.stories import STORY_LENGTH, Story
from training.verdicts import outcomes, truth

QUESTIONS = ("characters", "look", "mood", "action", "prop", "setting", "time")
STEPS = (4, 6, 8, 10, 15, 20)
TEXT_GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)
IMAGE_GUIDANCE = (1.0, 1.5, 2.0)
NOISE_DIVISORS = (5, 10, 20, 1000)  # of the frame's own noise level; the last one shows references clean
LEVELS = (4, 2, 1)
INTERVALS = ((0.0, 0.8), (0.0, 0.5), (0.2, 0.8))
TEMPERATURES = (0.0, 0.2, 0.5, 0.7, 1.0)


def rows(title: str, lines: Iterable[tuple[str, Sequence[Figure]]]) -> str:
    """A Markdown table: a setting a row, a figure a column."""
    lines = list(lines)
    names = [figure.name for figure in lines[0][1]]
    out = [f"| {title} | {' | '.join(names)} |", f"| {' | '.join(['---'] * (1 + len(names)))} |"]
    for setting, figures in lines:
        out.append(f"| {setting} | {' | '.join(f'{f.value:.3f}' for f in figures)} |")
    return "\n".join(out) + f"\n\nn = {lines[0][1][0].n} (first column's)"


def drawn_figures(
    model: FrameModel, judge: Judge, tasks: Sequence[Task], dials: Dials, questions: Sequence[str] = QUESTIONS
) -> list[Figure]:
    """What the judge says of the tasks drawn so, and how much the background jumps."""
    pictures = draw_all(model, tasks, dials)
    found = outcomes(judge.verdicts(pictures), [truth(task.scene) for task in tasks])
    jumps = [background_jump(t, p) for t, p in zip(tasks, pictures, strict=True) if same_place(t)]
    return [*(share(name, found[name]) for name in questions), mean("jump", jumps)]


def told_figures(
    captioner: Captioner, stories: Sequence[Story], *, temperature: float, history: int | None = None, guarded: bool
) -> list[Figure]:
    """Stories continued in words, over the true pictures: repetition, coherence, the hero.

    `history` is how many captions so far are read; None reads all.
    """
    torch.manual_seed(0)
    told = [[story.frames[0].caption] for story in stories]
    descriptions: list[tuple[str, str, set[str]]] = []
    copies: list[bool] = []
    described: list[list[str]] = [[] for _ in stories]
    for beat in range(1, STORY_LENGTH):
        images = [render(story.frames[beat - 1].scene) for story in stories]
        read = [captions if history is None else captions[-history:] for captions in told]
        written = captioner.next_captions(read, images, temperature=temperature, guarded=guarded)
        longer = [[*captions, caption] for captions, caption in zip(told, written, strict=True)]
        answers = captioner.descriptions(longer, images, described, temperature=temperature, guarded=guarded)
        for texts, answer in zip(described, answers, strict=True):
            texts.append(answer)
        for captions, caption, answer in zip(told, written, answers, strict=True):
            copies.append(caption in captions)
            descriptions.append((answer, caption, names_in(" ".join(captions))))
            captions.append(caption)
    return [
        share("copies", copies),
        share("of the grammar", [bool(places_of(c)) for captions in told for c in captions[1:]]),
        share("arc", [has_arc(captions) for captions in told]),
        share("drops hero", [drops_hero(c, str(s.hero.name)) for c, s in zip(told, stories, strict=True)]),
        share("descriptions parse", [is_whole(parse(text)) for text, _, _ in descriptions]),
        share("names agree", [names_agree(*one) for one in descriptions]),
    ]


def _frames(pack: Pack, count: int) -> tuple[FrameModel, Judge, list[Task]]:
    model = load_frame_model(pack)
    return model, load_judge(), story_tasks(held_out_stories(-(-count // 4), 7), count, model.manifest.width_px, 7)


def steps_study(pack: Pack, count: int, say: Say) -> None:
    """Sampling steps."""
    model, judge, tasks = _frames(pack, count)
    say(rows("steps", [(str(n), drawn_figures(model, judge, tasks, Dials(steps=n))) for n in STEPS]))


def qualities_study(pack: Pack, count: int, say: Say) -> None:
    """The qualities that a request may ask for."""
    model, judge, tasks = _frames(pack, count)
    lines = [(quality.value, drawn_figures(model, judge, tasks, Dials(quality=quality))) for quality in Quality]
    say(rows("quality", lines))


def guidance_study(pack: Pack, count: int, say: Say) -> None:
    """Text guidance, then image guidance."""
    model, judge, tasks = _frames(pack, count)
    for title, values, dials in (
        ("text guidance", TEXT_GUIDANCE, [Dials(text_guidance=v) for v in TEXT_GUIDANCE]),
        ("image guidance", IMAGE_GUIDANCE, [Dials(image_guidance=v) for v in IMAGE_GUIDANCE]),
    ):
        drawn = [drawn_figures(model, judge, tasks, d) for d in dials]
        say(rows(title, zip(map(str, values), drawn, strict=True)))


def references_study(pack: Pack, count: int, say: Say) -> None:
    """How many references, and how noisy."""
    model, judge, tasks = _frames(pack, count)
    variants = [(str(n), [replace(t, references=t.references[-n:] if n else ()) for t in tasks]) for n in range(4)]
    say(rows("references", [(name, drawn_figures(model, judge, some, Dials())) for name, some in variants]))
    policies = [(f"1/{divisor}", ReferencePolicy(level_divisor=divisor)) for divisor in NOISE_DIVISORS]
    lines = [(name, drawn_figures(model, judge, tasks, Dials(policy=policy))) for name, policy in policies]
    say(rows(f"reference noise (trained with 1/{REFERENCE_LEVEL_DIVISOR})", lines))


def shortcuts_study(pack: Pack, count: int, say: Say) -> None:
    """What the frame service may leave out, against nothing left out."""
    model, judge, tasks = _frames(pack, count)
    variants = [
        ("nothing", Dials()),
        ("noise of one's own", Dials(policy=ReferencePolicy(shared_noise=True))),
        *((f"all but {n} levels", Dials(policy=ReferencePolicy(shared_noise=True, levels_count=n))) for n in LEVELS),
        ("deep blocks in every second step", Dials(deep_every=2)),
        *((f"guidance outside {a:g} to {b:g}", Dials(guidance_interval=(a, b))) for a, b in INTERVALS),
    ]
    say(rows("left out", [(name, drawn_figures(model, judge, tasks, dials)) for name, dials in variants]))


def temperature_study(pack: Pack, count: int, say: Say) -> None:
    """Temperatures of both texts."""
    captioner, stories = Captioner(pack.folder), held_out_stories(count, 7)
    say(
        rows(
            "temperature",
            [(str(t), told_figures(captioner, stories, temperature=t, guarded=True)) for t in TEMPERATURES],
        )
    )


def history_study(pack: Pack, count: int, say: Say) -> None:
    """All captions so far, against the last one."""
    captioner, stories = Captioner(pack.folder), held_out_stories(count, 7)
    variants = (("all", None), ("last two", 2), ("last", 1))
    say(
        rows(
            "captions read",
            [(n, told_figures(captioner, stories, temperature=0.2, history=h, guarded=True)) for n, h in variants],
        )
    )


def guards_study(pack: Pack, count: int, say: Say) -> None:
    """With and without name lock and repetition guard."""
    captioner, stories = Captioner(pack.folder), held_out_stories(count, 7)
    say(
        rows(
            "guards",
            [
                (name, told_figures(captioner, stories, temperature=0.2, guarded=guarded))
                for name, guarded in (("on", True), ("off", False))
            ],
        )
    )


STUDIES: dict[str, Callable[[Pack, int, Say], None]] = {
    "steps": steps_study,
    "qualities": qualities_study,
    "guidance": guidance_study,
    "references": references_study,
    "shortcuts": shortcuts_study,
    "temperature": temperature_study,
    "history": history_study,
    "guards": guards_study,
}
_OF_FRAMES = ("steps", "qualities", "guidance", "references", "shortcuts")


def main() -> None:
    """Run the named studies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=tuple(STUDIES))
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK)
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--stories", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pack = load_pack(arguments.pack)
    for name in arguments.studies:
        count = arguments.frames if name in _OF_FRAMES else arguments.stories
        STUDIES[name](pack, count, lambda text: print(f"{text}\n", flush=True))


if __name__ == "__main__":
    main()
