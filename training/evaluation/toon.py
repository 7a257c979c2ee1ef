"""Evaluates a toon pack: what it draws, what it writes, and the stories it tells alone.

Prints a table and, as its last line, one JSON object with every figure, its interval, its target and whether it passed.
What each figure means stands in `frames`, `captions` and `stories` beside this file. Nothing here was seen in training;
every seed has its own stories and its own noise, so `--seeds 2` measures other frames than `--seeds 1` does.

    python -m training.evaluation.toon [--pack DIR] [--frames 400] [--stories 100] [--seeds 2] [--threads 2]
        [--workers 2] [--sheets DIR] [--card]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from services.models.drawing import Pixels
from services.models.pack import Pack, load_pack
from services.models.registry import FrameModel, load_frame_model
from training.evaluation.captions import Captioner, caption_figures
from training.evaluation.figures import Figure, share_of, table
from training.evaluation.frames import (
    FIRST_SEED,
    Say,
    Task,
    crowd_figures,
    first_figures,
    frame_figures,
    held_out_stories,
    reference_figures,
    speed_figure,
    story_tasks,
    vae_figures,
)
from training.evaluation.judge import Judge, load_judge
from training.evaluation.stories import Told, story_figures, tell
from training.toon.picture import grid, save_png
from training.toon.render import render

DEFAULT_PACK = Path(__file__).resolve().parents[2] / "services" / "models" / "packs" / "toon"
SHEET_ROWS = 8
SPEED_FRAMES = 7  # drawn alone to see how long that takes, the first of them to warm up


def pooled(parts: Sequence[Sequence[Figure]]) -> list[Figure]:
    """Figures of several seeds as one each: shares are counted together, other values are weighted by their counts.

    Seeds measure other frames, so their errors are independent.
    """
    if len(parts) == 1:
        return list(parts[0])
    out = []
    for first in parts[0]:
        same = [f for part in parts for f in part if f.name == first.name and f.n > 0]
        n = sum(f.n for f in same)
        if not n:
            out.append(first)
            continue
        if first.is_share:
            hits = sum(round(f.value * f.n) for f in same)
            out.append(share_of(first.name, hits, n, first.target, at_most=first.at_most))
            continue
        value = sum(f.value * f.n for f in same) / n
        halves = [(((f.high or 0.0) - (f.low or 0.0)) / 2 * f.n / n) ** 2 for f in same]
        wide = sum(halves) ** 0.5
        known = all(f.low is not None for f in same)
        out.append(
            Figure(
                name=first.name,
                value=value,
                n=n,
                low=value - wide if known else None,
                high=value + wide if known else None,
                target=first.target,
                at_most=first.at_most,
                surely=first.surely,
            )
        )
    return out


def picture_figures(
    pack: Pack, model: FrameModel, judge: Judge, frames: int, seed: int, say: Say
) -> tuple[list[Figure], list[Task], list[Pixels]]:
    """Everything about pictures, for one seed; and what was drawn from true descriptions."""
    figures = vae_figures(model, judge, min(100, frames), seed)
    tasks = story_tasks(held_out_stories(-(-frames // 4), seed), frames, model.manifest.width_px, seed)
    measured, drawn = frame_figures(model, judge, tasks, say)
    figures += measured
    fewer = max(1, frames // 4)
    figures += crowd_figures(model, judge, fewer, seed, say)
    figures += first_figures(model, judge, fewer, seed)
    if "clip/config.json" in pack.manifest.files:
        figures += reference_figures(pack, model, judge, tasks[:fewer], drawn[:fewer], say)
    return figures, tasks, drawn


def frames_sheet(tasks: Sequence[Task], drawn: Sequence[Pixels], size_px: int) -> Pixels:
    """The first drawn frames, nothing chosen: a row of true pictures over the row of drawn ones, again and again."""
    rows = []
    for first in range(0, min(len(tasks), 8 * SHEET_ROWS // 2), 8):
        rows.append([render(task.scene, size_px) for task in tasks[first : first + 8]])
        rows.append(list(drawn[first : first + 8]))
    return grid(rows)


def stories_sheet(told: Sequence[Told]) -> Pixels:
    """The first stories, nothing chosen: the true first frame and the pack's four."""
    return grid([one.pictures for one in told[:SHEET_ROWS]])


def report(pack: Pack, figures: Sequence[Figure], seeds: int, not_measured: Sequence[str] = ()) -> dict[str, Any]:
    """What the last line says. A pack of which something was not measured has not passed."""
    return {
        "pack": pack.name,
        "digest": pack.digest,
        "first_seed": FIRST_SEED,
        "seeds": seeds,
        "threads": torch.get_num_threads(),
        "figures": [f.as_dict() for f in figures],
        "not_measured": list(not_measured),
        "passed": all(f.passed for f in figures) and not not_measured,
    }


@dataclass(frozen=True, kw_only=True)
class Part:
    """One seed's share of an evaluation."""

    folder: Path  # of the pack
    frames: int
    stories: int
    seed: int
    sheets: Path | None  # where to draw contact sheets; None: nowhere
    threads: int


def evaluate_part(part: Part) -> list[Figure]:
    """All figures of one seed; those of texts are left out where the pack writes none or no stories are wanted."""
    torch.set_num_threads(part.threads)

    def say(line: str) -> None:
        print(f"seed {part.seed}: {line}", flush=True)

    pack = load_pack(part.folder)
    model, judge = load_frame_model(pack), load_judge()
    figures, tasks, drawn = picture_figures(pack, model, judge, part.frames, part.seed, say)
    if part.sheets is not None:
        save_png(frames_sheet(tasks, drawn, model.manifest.width_px), part.sheets / "frames.png")
    if part.stories and writes(pack):
        captioner = Captioner(pack.folder)
        figures += caption_figures(captioner, held_out_stories(part.stories, part.seed), part.seed, say)
        told = tell(model, captioner, held_out_stories(part.stories, part.seed), part.seed, say)
        figures += story_figures(told, judge)
        if part.sheets is not None:
            save_png(stories_sheet(told), part.sheets / "stories.png")
    return figures


def writes(pack: Pack) -> bool:
    """Whether a pack has a captioner."""
    return "llava/config.json" in pack.manifest.files


def evaluate(
    pack: Pack, frames: int, stories: int, seeds: int, sheets: Path | None, workers: int = 1
) -> tuple[list[Figure], list[str]]:
    """All figures, pooled over the seeds, and the names of what could not be measured.

    `workers` seeds at a time, each in a process of its own with its share of the threads. How long a frame takes is
    measured afterwards, alone, with all of them.
    """
    threads = torch.get_num_threads()
    parts = [
        Part(
            folder=pack.folder,
            frames=-(-frames // seeds),
            stories=-(-stories // seeds),
            seed=seed,
            sheets=sheets if seed == 0 else None,
            threads=max(1, threads // workers),
        )
        for seed in range(seeds)
    ]
    if workers == 1:
        found = [evaluate_part(part) for part in parts]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(evaluate_part, parts))
    torch.set_num_threads(threads)
    model = load_frame_model(pack)
    speed = speed_figure(model, story_tasks(held_out_stories(2, 0), SPEED_FRAMES, model.manifest.width_px))
    return [*pooled(found), speed], [] if stories and writes(pack) else ["texts", "stories"]


def main() -> None:
    """Evaluate a pack. Ends with status 0 also when a target is missed: the last line says it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK)
    parser.add_argument("--frames", type=int, default=400, help="story frames to draw, over all seeds")
    parser.add_argument("--stories", type=int, default=100, help="stories to tell, over all seeds; 0: no texts at all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--workers", type=int, default=1, help="seeds measured at the same time; they share the threads"
    )
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--card", action="store_true", help="write the figures into the pack's card and seal it again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pack = load_pack(arguments.pack)
    if arguments.sheets is not None:
        arguments.sheets.mkdir(parents=True, exist_ok=True)
    figures, missing = evaluate(
        pack,
        arguments.frames,
        arguments.stories,
        arguments.seeds,
        arguments.sheets,
        arguments.workers,
    )
    print(table(figures))
    said = report(pack, figures, arguments.seeds, missing)
    if arguments.card:
        from training.card import write_card

        write_card(pack, said)
    print(json.dumps(said, ensure_ascii=False))


if __name__ == "__main__":
    main()
