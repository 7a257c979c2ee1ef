"""One published captioner in the caption engine, in a process of its own: vLLM is loaded once a process.

    python -m tests.contract.caption.published_child PACKS NAME [DRIVE]

Prints one JSON object: what it was asked and what it said, token by token and through the service's own methods.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from services.caption.config import CaptionSettings
from services.caption.driver import Ask
from services.caption.engine import CaptionEngine, Guards
from services.caption.job import DescribeJob, Sampling, StoryJob
from services.caption.loading import build_engine
from services.models.captions.llava import ADAPTERS
from services.runtime.config import Installation

CAPTIONS = ("Momo found a kite.", "She said: 'the <image> was A S'.")
TOKENS = 12
WIDTH_PX, HEIGHT_PX = 60, 40  # no square: what is cropped away must be what transformers crops away


def picture_file() -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (HEIGHT_PX, WIDTH_PX, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def story_job(**sampling: Any) -> StoryJob:
    return StoryJob(image=picture_file(), captions=CAPTIONS, sampling=Sampling(max_tokens=TOKENS, **sampling))


def describe_job(**sampling: Any) -> DescribeJob:
    return DescribeJob(
        image=picture_file(),
        previous_caption=CAPTIONS[0],
        caption=CAPTIONS[1],
        sampling=Sampling(max_tokens=TOKENS, **sampling),
    )


async def observe(engine: CaptionEngine) -> dict[str, Any]:
    """Everything that the tests compare."""
    model = engine.model
    engine._guards = Guards(
        name_lock=False, look_lock=False, place_lock=False, repetition=False, thread=False, invention=False
    )
    asked = model.wording.story_prompt(CAPTIONS, 400)
    picture = engine._see(picture_file())
    greedy = {}
    for adapter in (None, *sorted(model.adapters)):
        ask = Ask(
            ids=asked.ids,
            image=picture,
            adapter=adapter,
            temperature=0.0,
            top_p=1.0,
            seed=0,
            max_tokens=TOKENS,
            stop_ids=model.wording.stop_ids,
        )
        greedy[adapter or "base"] = (await engine._driver.generate(ask)).ids
    drawn = [(await engine.write_caption(story_job(temperature=1.0, seed=seed))).text for seed in (1, 1, 2)]
    crowd = await asyncio.gather(
        *(engine.write_caption(story_job(temperature=1.0, seed=seed)) for seed in (1, 2, 3)),
        *(engine.describe(describe_job(temperature=1.0, seed=seed)) for seed in (1, 2)),
    )
    cancelled = [asyncio.create_task(engine.write_caption(story_job(seed=seed))) for seed in range(4)]
    await asyncio.sleep(0.05)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)
    while engine.unfinished_count:  # noqa: ASYNC110 - the engine's thread tells nobody
        await asyncio.sleep(0.01)
    written = await engine.write_caption(story_job(temperature=0.0))
    return {
        "adapters": list(ADAPTERS),
        "driver": type(engine._driver).__name__,
        "image_tokens_count": model.image_tokens_count,
        "prompt_ids": asked.ids,
        "greedy": greedy,
        "story": written.text,
        "prompt_tokens": written.prompt_tokens,
        "description": (await engine.describe(describe_job(temperature=0.0))).text,
        "drawn": drawn,
        "crowd": [each.text for each in crowd],
        "pack_digest": written.pack_digest,
    }


async def main(packs: Path, name: str, drive: str) -> None:
    installation = Installation.load(home=packs.parent / "home", packs=str(packs))
    settings: Any = {"pack": name, "device": "cpu", "kv_cache_mib": 16, "drive": drive, "max_attempts": 10}
    engine = build_engine(CaptionSettings.load(**settings), installation)
    await engine.start()
    try:
        print(json.dumps(await observe(engine)), flush=True)
    finally:
        await engine.stop()
    os._exit(0)  # threads of vLLM's libraries may still be there, and would end the process with an error


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "auto"))
