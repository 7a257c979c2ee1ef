"""How long the edge waits for the customization service, and who is forgotten when the answer does not come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import job_pb2

from services.runtime.call import Call, calling, current_call
from services.runtime.errors import CharacterVersionNotFound, DeadlineExceeded, FabulaError, Internal, Unavailable
from services.story.customization import (
    CALL_TIMEOUT_S,
    FILES_TIMEOUT_S,
    IMPORT_TIMEOUT_S,
    READ_WEIGHTS_S,
    Customizations,
)

VERSION_ID, WEIGHTS = "a" * 64, "b" * 64
REQUEST = pb.DeleteCharacterVersionRequest(version_id=VERSION_ID)


class Stub:
    """Its methods are their own names."""

    def __init__(self, _channel: Any) -> None: ...

    def __getattr__(self, name: str) -> str:
        return name


class Channel:
    """A channel to a customization service with two versions."""

    grpc_channel = None

    def __init__(self) -> None:
        self.called: list[str] = []
        self.limits: dict[str, float] = {}
        self.deadlines: list[float | None] = []
        self.failures: dict[str, FabulaError] = {}
        self.is_deleted = False
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()
        self.go_on.set()

    async def stream(self, method: str, request: Any, *, timeout_s: float) -> AsyncGenerator[Any, None]:
        self.limits[method] = timeout_s
        if method in self.failures:  # as a replica ends a stream: a status travels only together with a message
            yield pb.ReadWeightsResponse()
            raise self.failures[method]
        yield pb.ReadWeightsResponse(chunk=b"w")

    async def call(self, method: str, request: Any, *, timeout_s: float) -> Any:
        self.called.append(method)
        self.limits[method] = timeout_s
        self.deadlines.append((current_call() or Call()).deadline_s)
        self.asked.set()
        await self.go_on.wait()
        if method in self.failures:
            raise self.failures[method]
        otto = job_pb2.CharacterVersion(version_id=VERSION_ID, weights_sha256=WEIGHTS)
        if self.is_deleted:
            otto.delete_time.GetCurrentTime()
        if method == "DeleteCharacterVersion":
            return pb.DeleteCharacterVersionResponse(version=otto)
        if method == "ListCharacterVersions":
            other = job_pb2.CharacterVersion(version_id="c" * 64, weights_sha256="d" * 64)
            if not request.page_token:
                return pb.ListCharacterVersionsResponse(versions=[other], next_page_token="next")
            return pb.ListCharacterVersionsResponse(versions=[otto] * (request.show_deleted or not self.is_deleted))
        return None


class Edge:
    """The operations over such a channel, and what the frame service was told to forget."""

    def __init__(self) -> None:
        self.channel = Channel()
        self.forgotten: list[str] = []
        self.frame_error: FabulaError | None = None
        self.customizations = Customizations(self.channel, None, unload=self._unload)  # type: ignore[arg-type]

    async def _unload(self, digest: str) -> None:
        self.forgotten.append(digest)
        if self.frame_error is not None:
            raise self.frame_error


@pytest.fixture
async def edge(monkeypatch: pytest.MonkeyPatch) -> Edge:
    monkeypatch.setattr("services.story.customization.pb_grpc.CustomizationServiceStub", Stub)
    return Edge()


async def test_what_is_refused_is_no_file_of_nothing(edge: Edge) -> None:
    """A first chunk, though empty, would be answered with a status of success."""
    edge.channel.failures["ReadWeights"] = CharacterVersionNotFound()
    with pytest.raises(CharacterVersionNotFound):
        await anext(edge.customizations.read("ReadWeights", None))


async def test_what_moves_gigabytes_may_take_longer(edge: Edge) -> None:
    for method in ("PublishCheckpoint", "UndeleteCharacterVersion", "GetCustomizationJob"):
        await edge.customizations.ask(method, None)
    await edge.customizations.delete_version(REQUEST)
    await edge.customizations.import_version(pb.ImportCharacterVersionRequest())
    for method in ("ReadWeights", "ReadReport"):
        assert [chunk async for chunk in edge.customizations.read(method, None)] == [b"w"]
    assert edge.channel.limits == {
        "ReadWeights": READ_WEIGHTS_S,
        "ReadReport": CALL_TIMEOUT_S,
        "PublishCheckpoint": FILES_TIMEOUT_S,
        "UndeleteCharacterVersion": FILES_TIMEOUT_S,
        "DeleteCharacterVersion": FILES_TIMEOUT_S,
        "ImportCharacterVersion": IMPORT_TIMEOUT_S,
        "GetCustomizationJob": CALL_TIMEOUT_S,
    }
    assert READ_WEIGHTS_S > FILES_TIMEOUT_S > CALL_TIMEOUT_S


@pytest.mark.parametrize("error", [DeadlineExceeded(), Unavailable("its files are not yet out of reach")])
async def test_who_was_deleted_is_forgotten_though_the_answer_did_not_come(edge: Edge, error: FabulaError) -> None:
    edge.channel.failures["DeleteCharacterVersion"] = error
    edge.channel.is_deleted = True
    with pytest.raises(type(error)):
        await edge.customizations.delete_version(REQUEST)
    assert edge.forgotten == [WEIGHTS]
    edge.frame_error = Internal("away")
    with pytest.raises(type(error)):
        await edge.customizations.delete_version(REQUEST)


async def test_who_was_not_deleted_is_not_forgotten(edge: Edge) -> None:
    edge.channel.failures["DeleteCharacterVersion"] = Unavailable()
    with pytest.raises(Unavailable):
        await edge.customizations.delete_version(REQUEST)
    edge.channel.failures["ListCharacterVersions"] = Unavailable("nobody is there")
    with pytest.raises(Unavailable, match="is not reachable"):  # the first error, and not the second
        await edge.customizations.delete_version(REQUEST)
    edge.channel.called.clear()
    edge.channel.failures["DeleteCharacterVersion"] = CharacterVersionNotFound()
    with pytest.raises(CharacterVersionNotFound):
        await edge.customizations.delete_version(REQUEST)
    assert edge.channel.called == ["DeleteCharacterVersion"], "that is known, and nothing has to be looked up"
    assert edge.forgotten == []


async def test_who_hangs_up_or_is_out_of_time_keeps_nobody_from_forgetting(edge: Edge) -> None:
    edge.channel.go_on.clear()
    with calling(Call(deadline_s=time.monotonic() + 3600)):
        deleting = asyncio.create_task(edge.customizations.delete_version(REQUEST))
    await edge.channel.asked.wait()
    deleting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deleting
    edge.channel.go_on.set()
    for _ in range(100):
        await asyncio.sleep(0)
    assert edge.forgotten == [WEIGHTS]
    assert edge.channel.deadlines == [None]
