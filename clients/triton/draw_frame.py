"""Draws one frame with a stock Triton client, and asks for the caption that follows.

    pip install "tritonclient[grpc]"
    python draw_frame.py --prompt "Pip, an orange cat, stands on the beach." --out frame.png
    python draw_frame.py --prompt "…" --reference earlier.png --caption "Pip went to the beach."

Nothing of Fabula is imported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def strings(name: str, values: list[bytes]) -> triton.InferInput:
    """An input of texts or files."""
    tensor = triton.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=np.object_))
    return tensor


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--url", default="127.0.0.1:8471")
    parser.add_argument("--pack", default="toon")
    parser.add_argument("--prompt", required=True, help="what to draw, literally")
    parser.add_argument("--reference", type=Path, action="append", default=[], help="an earlier frame; up to three")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, help="the pack's own number if left out")
    parser.add_argument("--caption", help="the story's caption of the frame; asks for the next one")
    parser.add_argument("--out", type=Path, default=Path("frame.png"))
    flags = parser.parse_args()

    inputs = [strings("PROMPT", [flags.prompt.encode()])]
    if flags.reference:
        inputs.append(strings("REFERENCE_IMAGES", [path.read_bytes() for path in flags.reference]))
    parameters = {"seed": flags.seed, **({"steps": flags.steps} if flags.steps else {})}

    client = triton.InferenceServerClient(flags.url)
    try:
        # `timeout` is in microseconds and reaches the engine, which then refuses what it could not finish.
        drawn = client.infer(f"frame/{flags.pack}", inputs, timeout=600_000_000, parameters=parameters)
        image: bytes = drawn.as_numpy("IMAGE")[0]
        flags.out.write_bytes(image)
        told = drawn.get_response().parameters
        print(f"{flags.out}: seed {told['seed'].int64_param}, {told['steps'].int64_param} steps")
        if flags.caption:
            asked = [strings("IMAGE", [image]), strings("CAPTIONS", [flags.caption.encode()])]
            written = client.infer(f"caption/{flags.pack}", asked, parameters={"seed": flags.seed})
            print(written.as_numpy("TEXT")[0].decode())
    except InferenceServerException as error:
        print(f"{error.status()}: {error.message()}", file=sys.stderr)
        return 1
    finally:
        client.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
