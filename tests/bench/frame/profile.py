"""Where a step's time goes: what adapters cost in either form, what wide batches save, and which operations take it.

    python -m tests.bench.frame.profile [--pack toon] [--threads 1] [--rounds 9] [--compiled]

`--compiled` also has torch.compile make the network's forward of a few widths, each for its shape alone and with the
weights laid out for it, and says what that takes and gains: minutes, and a C++ compiler. It is no part of the service.
Forwards of the network alone, over rows with three references each; every round times every case once, in an order that
turns, and a figure is the median of the rounds. Writes `frame-profile.md` to `tests/bench/results/`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

from services.models.allocator import keep_freed_memory
from services.models.drawing import begin
from services.models.lora import MERGED_BYTES, AdapterSlots, Outfit, Worn, read_adapter
from services.models.pack import find_pack, load_pack
from services.models.registry import FrameModel, load_frame_model
from services.models.storygen import References, StoryGenUNet
from services.runtime.config import Installation
from tests.bench.frame.systems import RANK, Adapters, PeftNames
from tests.bench.frame.workload import REFERENCES, requests
from tests.bench.machine import machine_facts, revision_facts

RESULTS = Path(__file__).resolve().parents[1] / "results"
ROWS = 24  # eight frames with three guidance branches
WIDTHS = (1, 3, 6, 12, 24, 48)
COMPILED_WIDTHS = (3, 24)  # a frame alone, and eight
CHARACTERS = (1, 4, 8)  # at once: no more are drawn together
_KINDS = {
    "convolutions": ("mkldnn_convolution", "cudnn_convolution", "conv2d"),
    "attention": ("scaled_dot_product",),
    "linear layers": ("aten::addmm", "aten::mm", "aten::linear", "aten::bmm"),
    "norms": ("norm",),
    "activations": ("gelu", "silu"),
    "copies and gathers": ("copy_", "index", "cat"),
}
Forward = Callable[[], Any]


def unet_of(model: FrameModel) -> StoryGenUNet:
    """Its network. Raises TypeError for one that makes no reference passes."""
    unet: Any = model.denoiser.unet
    if not isinstance(unet, StoryGenUNet):
        raise TypeError(f"{model.manifest.name} is no StoryGen")
    return cast("StoryGenUNet", unet)


def wide(model: FrameModel, unet: StoryGenUNet, rows: int) -> Forward:
    """A main pass over so many rows, each with three references."""
    like = begin(model, requests(model, 1, adapters=0, steps=(1,))[0].sketch)
    generator = torch.Generator().manual_seed(0)

    def noise(count: int, shape: torch.Size) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator).to(model.device, model.dtype)

    latents, text = noise(rows, like.latents_CHW.shape), noise(rows, like.description_SD.shape)
    levels = torch.full((ROWS,), 100.0, device=model.device)
    before = unet.features(noise(ROWS, like.latents_CHW.shape), levels, noise(ROWS, like.description_SD.shape))
    numbers = torch.randint(0, ROWS, (rows, REFERENCES), generator=generator).to(model.device)
    looked_at = References(unet.project(before), numbers)
    times = torch.full((rows,), 500.0, device=model.device)
    return lambda: unet.predict(latents, times, text, looked_at)


def medians(cases: dict[str, Forward], rounds: int) -> dict[str, float]:
    """Seconds of each."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    names = list(cases)
    for name in names:
        cases[name]()
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            cases[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def worn(characters: int) -> Sequence[Outfit]:
    """Three rows of each frame wear the same; neighbours are as alike as can be."""
    return sorted((Worn(row // (ROWS // 8) % characters + 1, 1.0),) for row in range(ROWS))


def adapter_cases(model: FrameModel, adapters: Adapters) -> dict[str, Forward]:
    """A batch of 24 rows: without adapters, in both forms, and as PEFT does it; merged weights kept and made anew."""
    unet = unet_of(model)
    cases: dict[str, Forward] = {"nobody": wide(model, unet, ROWS)}

    def wearing(slots: Any, forward: Forward, outfits: Sequence[Outfit]) -> Forward:
        def run() -> Any:
            worn_now: AbstractContextManager[None] = slots.rows(outfits) if outfits else nullcontext()
            with worn_now:
                return forward()

        return run

    def anew(slots: AdapterSlots, forward: Forward, outfits: Sequence[Outfit]) -> Forward:
        """As when somebody joins or leaves at every step: with a scale that no pass had, nothing is merged yet."""
        scales = itertools.count(1)

        def run() -> Any:
            scale = 1.0 + next(scales) * 1e-6
            with slots.rows([[one._replace(scale=scale) for one in outfit] for outfit in outfits]):
                return forward()

        return run

    for name, merged_bytes in (("merged", MERGED_BYTES), ("added", 0)):
        own = copy.deepcopy(unet)
        slots = AdapterSlots(own, count=adapters.count, rank_max=RANK, merged_bytes=merged_bytes)
        for number in range(adapters.count):
            slots.put(number + 1, read_adapter(adapters.file(number), own))
        for characters in CHARACTERS:
            cases[f"{characters}, {name}"] = wearing(slots, wide(model, own, ROWS), worn(characters))
            if merged_bytes:
                cases[f"{characters}, anew"] = anew(slots, wide(model, own, ROWS), worn(characters))
    theirs = PeftNames(adapters)
    for characters in CHARACTERS:
        forward = wide(model, adapters.peft.base_model.model, ROWS)
        cases[f"{characters}, PEFT"] = wearing(theirs, forward, worn(characters))
    return cases


def compiled_cases(model: FrameModel, unet: StoryGenUNet) -> tuple[dict[str, Forward], dict[int, float]]:
    """Forwards as they are and compiled, by width; and what compiling took, in seconds."""
    cases: dict[str, Forward] = {}
    took_s: dict[int, float] = {}
    for rows in COMPILED_WIDTHS:
        cases[f"{rows}"] = wide(model, unet, rows)
        forward: Forward = torch.compile(wide(model, unet, rows), dynamic=False)
        with inductor.patch(freezing=True):
            start = time.perf_counter()
            forward()
            took_s[rows] = time.perf_counter() - start
        cases[f"{rows}, compiled"] = forward
    return cases, took_s


def kinds(forward: Forward) -> dict[str, float]:
    """Shares of a forward's time by kind of operation."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    forward()
    with profile(activities=activities) as seen:
        forward()
    spent: defaultdict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        kind = next((k for k, marks in _KINDS.items() if any(mark in event.key for mark in marks)), "everything else")
        spent[kind] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: value / whole for kind, value in sorted(spent.items(), key=lambda one: -one[1])}


@torch.inference_mode()
def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", default="toon")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    model = load_frame_model(load_pack(find_pack(arguments.pack, Installation.load().pack_folders)))
    machine, revision = machine_facts(), revision_facts()
    unet = unet_of(model)
    widths = medians({str(rows): wide(model, unet, rows) for rows in WIDTHS}, arguments.rounds)
    forms = medians(adapter_cases(model, Adapters(model, max(CHARACTERS))), arguments.rounds)
    shares = kinds(wide(model, unet, ROWS))
    nobody = forms["nobody"]
    where = f"{machine['cpu']}, {arguments.threads} thread(s), revision `{revision['commit'][:12]}`"
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {where}, {arguments.rounds} rounds:",
        "",
        "| rows in a forward | " + " | ".join(widths) + " |",
        "| --- | " + " | ".join("---" for _ in widths) + " |",
        "| ms a row | " + " | ".join(f"{1000 * value / int(rows):.1f}" for rows, value in widths.items()) + " |",
        "",
        f"| characters in {ROWS} rows, rank {RANK} | merged | merged anew | products added | PEFT's `adapter_names` |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {count} | "
            + " | ".join(f"×{forms[f'{count}, {name}'] / nobody:.2f}" for name in ("merged", "anew", "added", "PEFT"))
            + " |"
            for count in CHARACTERS
        ),
        "",
        f"(against the {1000 * nobody / ROWS:.1f} ms a row of the same batch without adapters)",
        "",
        f"Of a forward of {ROWS} rows without adapters: {', '.join(f'{kind} {v:.0%}' for kind, v in shares.items())}.",
        "",
    ]
    if arguments.compiled:
        with torch.inference_mode(False), torch.no_grad():
            cases, took_s = compiled_cases(model, unet)
            seconds = medians(cases, arguments.rounds)
        told = [
            f"{rows} rows ×{seconds[f'{rows}, compiled'] / seconds[str(rows)]:.2f} after {taken:.0f} s"
            for rows, taken in took_s.items()
        ]
        lines += [f"Compiled by torch.compile for its shape, of the time as it is: {', '.join(told)}.", ""]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "frame-profile.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
