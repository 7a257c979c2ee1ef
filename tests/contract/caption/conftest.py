"""One caption service for all contract tests: a tiny random LLaVA in the real vLLM, behind real gRPC.

vLLM is loaded once a process, so every test of this folder shares one engine and one event loop.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from fabula.caption.v1 import caption_service_pb2 as pb
from fabula.caption.v1 import caption_service_pb2_grpc as pb_grpc
from PIL import Image
from prometheus_client import CollectorRegistry

from services.caption.config import CaptionSettings
from services.caption.engine import CaptionEngine, Guards
from services.caption.loading import build_engine
from services.caption.metrics import PrometheusObserver
from services.caption.server import start_server
from services.caption.service import CaptionServicer
from services.models.pack import Pack
from services.models.tiny import build_tiny_pack
from services.models.world import World
from services.runtime.channel import ServiceChannel
from services.runtime.config import Installation

TOKEN = "0123456789abcdef" * 4
WORLD = World(
    words=("kite", "red", "fly"),
    characters={"Momo": "a brown monkey with a yellow party hat"},
    places=("the beach",),
    things=("a kite",),
)


@dataclass(frozen=True)
class Service:
    """The running service and a way to call it."""

    pack: Pack
    engine: CaptionEngine
    channel: ServiceChannel
    stub: Any
    address: str
    registry: CollectorRegistry

    async def write(self, timeout_s: float = 60.0, **fields: Any) -> Any:
        """One WriteCaption call; unset fields get plain values."""
        request = pb.WriteCaptionRequest(**{"image": picture(1), "captions": ["Momo found a red kite."], **fields})
        return await self.channel.call(self.stub.WriteCaption, request, timeout_s=timeout_s)

    async def describe(self, timeout_s: float = 60.0, **fields: Any) -> Any:
        """One Describe call; unset fields get plain values."""
        plain = {"image": picture(1), "previous_caption": "Momo found a kite.", "caption": "She let it fly."}
        request = pb.DescribeRequest(**{**plain, **fields})
        return await self.channel.call(self.stub.Describe, request, timeout_s=timeout_s)


def picture(seed: int, size_px: int = 32, form: str = "PNG") -> bytes:
    """A picture file of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """A pack of random weights, written by the code that writes real ones."""
    return build_tiny_pack(tmp_path_factory.mktemp("packs") / "tiny", world=WORLD)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def service(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """The service, started once."""
    installation = Installation.load(home=tmp_path_factory.mktemp("home"), packs=str(pack.folder.parent))
    settings = CaptionSettings.load(pack="tiny", device="cpu", kv_cache_mib=16)
    registry = CollectorRegistry()
    engine = build_engine(settings, installation, PrometheusObserver(registry))
    engine._guards = Guards(invention=False)  # random weights write capitals everywhere, and all would be names
    await engine.start()
    server, port = await start_server(CaptionServicer(engine, TOKEN), "127.0.0.1:0")
    address = f"127.0.0.1:{port}"
    channel = ServiceChannel(address, application="caption", token=TOKEN)
    stub = pb_grpc.CaptionServiceStub(channel.grpc_channel)
    yield Service(pack, engine, channel, stub, address, registry)
    await channel.close()
    await server.stop(None)
    await engine.stop()


@pytest.fixture
def breaking(service: Service) -> Callable[[], None]:
    """Makes the next step of vLLM raise, as an engine that dies does."""

    def break_engine() -> None:
        vllm_engine = service.engine._driver._engine  # type: ignore[attr-defined]  # nothing public can kill it

        def step() -> None:
            raise MemoryError("out of memory, says the test")

        vllm_engine.step = step

    return break_engine
