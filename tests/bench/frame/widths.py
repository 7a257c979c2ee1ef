"""`make bench-frame`, its part for a GPU: images a second at Stable Diffusion's sizes, by how many are drawn together.

    python -m tests.bench.frame.widths                        SD 1.5 at 512 px and SDXL at 1024 px, 50 steps, guidance
    python -m tests.bench.frame.widths --kinds tiny --steps 2 --widths 1 2    whether it works; on a processor, too

Weights are random. Every width draws its images with sixteen characters mixed and with none, forwards recorded and, to
say what that gains, as they are; beside them diffusers' pipeline, one image at a time. What a width does includes
reading the texts and decoding. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from services.models.cost import flops_of_a_row, peak_flops
from services.models.graphs import CudaRecorder, Graphs
from services.models.registry import FrameModel, load_frame_model
from tests.bench.frame.report import GPU_TARGETS, document
from tests.bench.frame.systems import Adapters, Ours
from tests.bench.frame.workload import Request, requests
from tests.bench.full_size import write_full_size
from tests.bench.machine import machine_facts, revision_facts
from tests.stable_diffusion_checkpoints import sealed, write_checkpoint

Kind = Literal["sd15", "sdxl", "tiny"]
KINDS: tuple[Kind, ...] = ("sd15", "sdxl")
WIDTHS = (1, 2, 4, 8, 16, 32)  # images at once; with guidance twice as many rows
GUIDANCE = 7.5
CHARACTERS = 16
STEPS, ROUNDS = 50, 3
WARM_STEPS = 3  # the third forward of a shape is the first that is replayed


def images(model: FrameModel, count: int, *, steps: int, characters: int) -> list[Request]:
    """As many as are asked for, with plain guidance; each of another character while there are any."""
    return requests(model, count, adapters=characters, steps=(steps,), guidance=(GUIDANCE, 1.0), references=0)


def seconds(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """The median of a few times."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def by_width(
    model: FrameModel, name: str, widths: Sequence[int], *, characters: int, steps: int, rounds: int, console: Console
) -> dict[str, Any]:
    """What each width draws a second, and how much of the device's best it uses."""
    device = model.device
    adapters = Adapters(model, characters)
    row_flops, peak = flops_of_a_row(model), peak_flops(device, model.dtype)
    figures: dict[str, Any] = {f"{name}_peak_tflops": peak / 1e12, f"{name}_row_tflop": row_flops / 1e12}

    def measure(mode: str, graphs: Graphs | None) -> dict[str, float]:
        system, found = Ours(model, adapters, graphs=graphs), {}
        for width in widths:
            mixed = images(model, width, steps=steps, characters=min(characters, width))
            for kind, wanted in (("mixed", mixed), ("plain", [replace(one, adapter=None) for one in mixed])):
                system.together = width
                system.run([replace(one, sketch=replace(one.sketch, steps=WARM_STEPS)) for one in wanted])
                taken_s = seconds(functools.partial(system.run, wanted), rounds, device)
                at = f"{name}_{kind}_{mode}_at_{width}"
                found[f"{at}_images_per_s"] = width / taken_s
                found[f"{at}_of_peak"] = 2 * width * steps * row_flops / taken_s / peak
                console.print(f"  {at}: {width / taken_s:.2f} images/s, {found[f'{at}_of_peak']:.0%} of the peak")
        return found

    figures |= measure("as_it_is", None)
    if device.type == "cuda":
        broken: list[str] = []
        recorded = measure("recorded", Graphs(CudaRecorder(), tell=broken.append))
        figures |= {f"{name}_graphs_broken": broken[0]} if broken else recorded
    best = [value for key, value in figures.items() if key.startswith(f"{name}_mixed") and key.endswith("_per_s")]
    figures[f"{name}_images_per_s_mixed"] = max(best)
    return figures


def pipeline(checkpoint: Path, name: str, model: FrameModel, *, steps: int, rounds: int) -> dict[str, float]:
    """diffusers, one image at a time."""
    manifest = model.manifest
    pipe: Any = DiffusionPipeline.from_pretrained(str(checkpoint), dtype=model.dtype).to(model.device)
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int) -> None:
        pipe(
            "a cat runs",
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            height=manifest.height_px,
            width=manifest.width_px,
            output_type="np",
        )

    draw(WARM_STEPS)
    return {f"{name}_diffusers_images_per_s": 1.0 / seconds(lambda: draw(steps), rounds, model.device)}


def measured(
    kinds: Sequence[Kind],
    device: torch.device,
    widths: Sequence[int],
    *,
    steps: int,
    rounds: int,
    characters: int,
    console: Console,
) -> dict[str, Any]:
    """All figures, by name. A checkpoint at a time lies in a scratch folder, up to 15 GB with its pack."""
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else ""}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for kind in kinds:
        console.print(f"{kind} …")
        with tempfile.TemporaryDirectory(prefix="fabula-bench-") as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            if kind == "tiny":
                write_checkpoint(checkpoint, "sd15")
            else:
                write_full_size(checkpoint, kind, torch.float16)
            pack = sealed(checkpoint, Path(scratch) / "packs" / kind, "sd15" if kind == "tiny" else kind)
            model = load_frame_model(pack, device=str(device), dtype=dtype)
            figures |= pipeline(checkpoint, kind, model, steps=steps, rounds=rounds)
            figures |= by_width(model, kind, widths, characters=characters, steps=steps, rounds=rounds, console=console)
            del model
    return figures


def main() -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=("sd15", "sdxl", "tiny"), default=KINDS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--characters", type=int, default=CHARACTERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    figures = measured(
        arguments.kinds,
        torch.device(arguments.device),
        arguments.widths,
        steps=arguments.steps,
        rounds=arguments.rounds,
        characters=arguments.characters,
        console=Console(stderr=True),
    )
    plan = {"rounds": arguments.rounds, "steps": arguments.steps, "characters": arguments.characters}
    machine, revision = machine_facts(), revision_facts()
    print(json.dumps(document(figures, targets=GPU_TARGETS, machine=machine, revision=revision, date="", plan=plan)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
