"""The gRPC edge over a real frame engine with a tiny pack, in a thread of its own, so that stock clients can call it.

The sandbox is the real one; captions come from the scripted service. `Steps` holds the engine between steps.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc.aio
import torch
from fabula.caption.v1 import caption_service_pb2_grpc as caption_grpc
from safetensors.torch import save

from services.frame import engine as engine_module
from services.frame.engine import EngineSettings, FrameEngine
from services.frame.server import start_server
from services.frame.service import FrameServicer
from services.models.drawing import Drawing
from services.models.lora import ALPHA, BASE_DIGEST, adapted_layers
from services.models.registry import FrameModel
from services.models.step import advance
from services.runtime.channel import ServiceChannel
from services.runtime.errors import CharacterWeightsUnknown
from services.story.api_grpc import GrpcEdge
from services.story.inference.servicer import InferenceServicer
from services.story.sandbox import Sandbox
from tests.contract.story.scripted_services import TOKEN, Script, ScriptedCaption

WAIT_S = 60.0  # a limit against hanging, not a claim
Result = TypeVar("Result")


class Steps:
    """Counts the steps of each seed, and holds the engine before a step while told to."""

    def __init__(self) -> None:
        self.count: dict[int, int] = {}
        self.jobs: dict[int, Any] = {}  # what was drawn for each seed
        self.hold_after: int | None = None  # so many steps of any one seed
        self.held = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        self._released.set()

    def __call__(self, model: FrameModel, drawings: Sequence[Drawing], *rest: Any, **more: Any) -> int:
        if self.hold_after is not None and max(self.count.values(), default=0) >= self.hold_after:
            self.held.set()
            assert self._released.wait(WAIT_S)
        for drawing in drawings:
            self.count[drawing.sketch.seed] = self.count.get(drawing.sketch.seed, 0) + 1
            self.jobs[drawing.sketch.seed] = drawing.sketch
        return advance(model, drawings, *rest, **more)


class Files(dict[str, bytes]):
    """The characters' store, and what was fetched from it."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def fetch(self, digest: str) -> bytes:
        self.fetched.append(digest)
        if digest not in self:
            raise CharacterWeightsUnknown(metadata={"digest": digest})
        return self[digest]

    def keep_character(self, model: FrameModel, seed: int) -> str:
        """Puts a small random LoRA into the store and gives its digest."""
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name, layer in adapted_layers(model.denoiser.unet).items():
            if "attn" in name:
                state[f"{name}.lora_A.weight"] = 0.5 * torch.randn(2, layer.weight.shape[1], generator=generator)
                state[f"{name}.lora_B.weight"] = 0.5 * torch.randn(layer.weight.shape[0], 2, generator=generator)
        payload = save(state, metadata={ALPHA: "2", BASE_DIGEST: model.base_digest})
        digest = hashlib.sha256(payload).hexdigest()
        self[digest] = payload
        return digest


class Edge:
    """Everything of it; `start`, then `stop`. `target` is where clients call."""

    def __init__(self, model: FrameModel, **settings: Any) -> None:
        self.model = model
        self.files = Files()
        self.script = Script()
        self.script.packs = ["tiny"]
        self.steps = Steps()
        self.engine = FrameEngine({"tiny": model}, "tiny", EngineSettings(**settings), fetch=self.files.fetch)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> Edge:
        self._advance = engine_module.advance
        engine_module.advance = self.steps  # type: ignore[assignment]  # put back by `stop`
        self.engine.start()
        self._thread.start()
        self.run(self._start)
        return self

    def stop(self) -> None:
        self.steps.release()
        self.run(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self.engine.stop()
        engine_module.advance = self._advance

    def run(self, method: Callable[[], Awaitable[Result]]) -> Result:
        """Runs something on the edge's own loop."""

        async def call() -> Result:
            return await method()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(WAIT_S)

    def outage(self, service: str) -> None:
        """The frame or caption service goes away."""
        self.run(lambda: {"frame": self.frame_server, "caption": self.caption_server}[service].stop(0))

    async def _start(self) -> None:
        self.frame_server, frame_port = await start_server(FrameServicer(self.engine, TOKEN), "127.0.0.1:0")
        self.caption_server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
        caption_grpc.add_CaptionServiceServicer_to_server(ScriptedCaption(self.script), self.caption_server)
        caption_port = self.caption_server.add_insecure_port("127.0.0.1:0")
        await self.caption_server.start()
        self.channels = (
            ServiceChannel(f"127.0.0.1:{caption_port}", application="caption", token=TOKEN),
            ServiceChannel(f"127.0.0.1:{frame_port}", application="frame", token=TOKEN),
        )
        self.sandbox = Sandbox()
        self.servicer = InferenceServicer(
            caption_channel=self.channels[0],
            frame_channel=self.channels[1],
            sandbox=self.sandbox,
            caption_timeout_s=WAIT_S,
            frame_timeout_s=WAIT_S,
        )
        no_stories: Any = None
        self.grpc = GrpcEdge(no_stories, host="127.0.0.1", port=0, inference_servicer=self.servicer)
        self.target = f"127.0.0.1:{self.grpc.port}"
        await self.grpc.start()
        await self.grpc.serving(True)

    async def _stop(self) -> None:
        await self.grpc.stop(0)
        await self.frame_server.stop(0)
        await self.caption_server.stop(0)
        for channel in self.channels:
            await channel.close()
        await self.sandbox.close()
