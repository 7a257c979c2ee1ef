"""Draws several frames on one stream with the stock asyncio client, and keeps the previews as they come.

    pip install "tritonclient[grpc]"
    python watch_frames.py "Pip, an orange cat, runs." "Pip, an orange cat, sleeps." --out frames/

Frames that are drawn at the same time share their steps on the server. Nothing of Fabula is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio


def prompt_input(prompt: str) -> triton.InferInput:
    """The input of a frame model."""
    tensor = triton.InferInput("PROMPT", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))
    return tensor


async def requests(flags: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    """One request for each prompt; its id says which."""
    for number, prompt in enumerate(flags.prompts):
        parameters = {"seed": flags.seed + number, "preview_every": flags.preview_every}
        if flags.steps:
            parameters["steps"] = flags.steps
        yield {
            "model_name": f"frame/{flags.pack}",
            "inputs": [prompt_input(prompt)],
            "request_id": f"frame-{number}",
            "parameters": parameters,
        }


async def watch(flags: argparse.Namespace) -> int:
    """Returns how many frames failed."""
    flags.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    async with triton_aio.InferenceServerClient(flags.url) as client:
        # Leaving the loop early and calling `answers.cancel()` would stop every job of the stream.
        answers = client.stream_infer(requests(flags))
        async for result, error in answers:
            if error is not None:  # of one request, which its message names; the others go on
                print(error.message(), file=sys.stderr)
                failed += 1
                continue
            response = result.get_response()
            is_final = response.parameters["triton_final_response"].bool_param
            step = response.parameters["step"].int64_param
            path = flags.out / (f"{response.id}.png" if is_final else f"{response.id}-step-{step:03}.webp")
            path.write_bytes(result.as_numpy("IMAGE")[0])
            print(path)
    return failed


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("prompts", nargs="+", help="what to draw, literally; a frame each")
    parser.add_argument("--url", default="127.0.0.1:8471")
    parser.add_argument("--pack", default="toon")
    parser.add_argument("--seed", type=int, default=7, help="of the first frame; the next has the next")
    parser.add_argument("--steps", type=int, help="the pack's own number if left out")
    parser.add_argument("--preview-every", type=int, default=2, help="steps; fewer come while the server is busy")
    parser.add_argument("--out", type=Path, default=Path("frames"))
    return 1 if asyncio.run(watch(parser.parse_args())) else 0


if __name__ == "__main__":
    raise SystemExit(main())
