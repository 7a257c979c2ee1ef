"""Who hears what when the engine dies, with a scripted engine in vLLM's place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from services.caption import driver as driver_module
from services.caption.driver import Ask, AsyncDriver, DriverSettings, InProcessDriver
from services.runtime.errors import EngineDead, ReplicaLost, ShuttingDown

SETTINGS = DriverSettings(
    base=Path("nowhere"),
    adapters={},
    adapter_rank_max=8,
    context_tokens=64,
    on_gpu=False,
    dtype="float32",
    threads=1,
    max_running=4,
    kv_cache_bytes=1 << 20,
    gpu_memory_ratio=0.5,
    stall_s=600.0,
)
ASK = Ask(
    ids=(1, 2),
    image=Image.new("RGB", (8, 8)),
    adapter=None,
    temperature=0.0,
    top_p=1.0,
    seed=1,
    max_tokens=4,
    stop_ids=(0,),
)


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_parameters", lambda ask: None)


class SteppedEngine:
    """Takes requests and, once told so, dies in its next step."""

    def __init__(self, expected: int) -> None:
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.all_in = threading.Event()
        self.go_on = threading.Event()
        self._left = expected

    def add_request(self, *_: Any, **__: Any) -> None:
        self._left -= 1
        if not self._left:
            self.all_in.set()

    def abort_request(self, numbers: list[str]) -> None: ...

    def step(self) -> list[Any]:
        if self.all_in.is_set():
            assert self.go_on.wait(60)
            raise MemoryError("out of memory, says the test")
        return []


async def started(engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch) -> InProcessDriver:
    driver = InProcessDriver(SETTINGS)
    monkeypatch.setattr(driver, "_load", lambda: setattr(driver, "_engine", engine))
    await driver.start()
    return driver


async def test_who_was_in_the_engine_lost_its_replica_and_who_comes_later_finds_it_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = SteppedEngine(expected=2)
    driver = await started(engine, monkeypatch)
    inside = [asyncio.create_task(driver.generate(ASK)) for _ in range(2)]
    await asyncio.to_thread(engine.all_in.wait, 60)
    outside = asyncio.create_task(driver.generate(ASK))  # the engine is in its last step and does not see it
    while not driver._commands:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    engine.go_on.set()
    ends = await asyncio.gather(*inside, outside, return_exceptions=True)
    assert [type(end) for end in ends] == [ReplicaLost, ReplicaLost, EngineDead]
    assert all("MemoryError" in str(end) for end in ends)
    with pytest.raises(EngineDead):
        await driver.generate(ASK)
    await driver.stop()


async def test_an_ordinary_stop_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SteppedEngine(expected=2)
    driver = await started(engine, monkeypatch)
    inside = asyncio.create_task(driver.generate(ASK))
    await asyncio.sleep(0.05)
    await driver.stop()
    with pytest.raises(ShuttingDown):
        await inside


class ChildEngine:
    """AsyncLLM whose child process dies under every request."""

    errored = False

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        self.errored = True
        raise RuntimeError("EngineDeadError")
        yield

    def shutdown(self) -> None: ...


async def test_a_child_process_that_dies_under_a_request_is_told_apart_from_a_dead_one() -> None:
    driver = AsyncDriver(SETTINGS)
    driver._engine = ChildEngine()
    with pytest.raises(ReplicaLost):
        await driver.generate(ASK)
    with pytest.raises(EngineDead):
        await driver.generate(ASK)
