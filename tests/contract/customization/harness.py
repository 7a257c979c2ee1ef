"""A customization service over real gRPC, in this process or in one that can be killed, and requests for it."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import customization_service_pb2_grpc as pb_grpc
from fabula.customization.v1 import job_pb2
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from services.customization.config import CustomizationSettings
from services.customization.loading import CustomizationProcess
from services.customization.local import LocalBackend
from services.customization.server import start_server
from services.customization.service import CustomizationServicer
from services.runtime.channel import OPTIONS
from services.runtime.config import Installation
from training.new_story import world_story

TOKEN = "t" * 64
WAIT_S = 240.0
PRETEND = (sys.executable, str(Path(__file__).with_name("pretend_trainer.py")))
REPOSITORY = Path(__file__).resolve().parents[3]
SERVICE = Path(__file__).with_name("service_process.py")
State = job_pb2.CustomizationJob


@lru_cache
def example(character: str = "otto", size_px: int = 128) -> tuple[job_pb2.NewCharacter, list[job_pb2.ExampleFrame]]:
    """The world's story of somebody new, as somebody would upload it."""
    story = world_story(character, size_px)
    frames = []
    for frame in story.frames:
        out = io.BytesIO()
        Image.fromarray(frame.pixels).save(out, "PNG")
        described = job_pb2.ExampleFrame(image=out.getvalue(), caption=frame.caption, description=frame.descriptions[0])
        frames.append(described)
    return job_pb2.NewCharacter(name=story.name, phrase=story.phrase, noun=story.noun), frames


def request(**fields: Any) -> pb.CreateCustomizationJobRequest:
    """A job that the service takes, and any field replaced."""
    character, frames = example()
    base: dict[str, Any] = {"character": character, "frames": frames, "accepted_findings": ["*"], "seed": 7}
    if "budget" not in fields:
        base["steps"] = 30
    return pb.CreateCustomizationJobRequest(**{**base, **fields})


class Client:
    """A channel to a service."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(OPTIONS))
        self.stub = pb_grpc.CustomizationServiceStub(self.channel)
        self.metadata = [("fabula-token", TOKEN)]

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=WAIT_S)

    async def create(self, **fields: Any) -> job_pb2.CustomizationJob:
        return (await self.call("CreateCustomizationJob", request(**fields))).job

    async def job(self, job_id: str) -> job_pb2.CustomizationJob:
        return (await self.call("GetCustomizationJob", pb.GetCustomizationJobRequest(job_id=job_id))).job

    async def wish(self, verb: str, job_id: str) -> job_pb2.CustomizationJob:
        """Cancel, Pause, Resume, Delete or Undelete."""
        message = getattr(pb, f"{verb}CustomizationJobRequest")(job_id=job_id)
        return (await self.call(f"{verb}CustomizationJob", message)).job

    async def watch(self, job_id: str, after: int = 0) -> AsyncGenerator[job_pb2.CustomizationEvent, None]:
        message = pb.WatchCustomizationJobRequest(job_id=job_id, after_sequence=after)
        call = self.stub.WatchCustomizationJob(message, metadata=self.metadata, timeout=1800.0)
        try:
            async for response in call:
                yield response.event
        finally:
            call.cancel()  # one that is left in the middle would outlive the test

    async def durable(self, job_id: str, after: int = 0) -> list[job_pb2.CustomizationEvent]:
        """Every durable event until the job ends."""
        return [event async for event in self.watch(job_id, after) if event.sequence]

    async def until(self, job_id: str, *states: int, within_s: float = WAIT_S) -> job_pb2.CustomizationJob:
        """The job, once it is in one of these states."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            job = await self.job(job_id)
            if job.state in states:
                return job
            await asyncio.sleep(0.05)
        raise AssertionError(f"it stays {State.State.Name(job.state)}: {job.error}")

    async def until_step(self, job_id: str, step: int) -> None:
        """Returns when so many steps are told of, or the job has ended."""
        async with aclosing(self.watch(job_id)) as events:
            async for event in events:
                if event.WhichOneof("event") == "progress" and event.progress.step >= step:
                    return

    async def checkpoints(self, job_id: str) -> list[job_pb2.Checkpoint]:
        return list((await self.call("ListCheckpoints", pb.ListCheckpointsRequest(job_id=job_id))).checkpoints)

    async def publish(self, job_id: str, step: int = 0) -> job_pb2.CharacterVersion:
        return (await self.call("PublishCheckpoint", pb.PublishCheckpointRequest(job_id=job_id, step=step))).version

    async def bytes_of(self, method: str, message: Any) -> bytes:
        stream = getattr(self.stub, method)(message, metadata=self.metadata, timeout=WAIT_S)
        return b"".join([response.chunk async for response in stream])

    async def refusal(self, awaitable: Any) -> tuple[grpc.StatusCode, str, list[Any]]:
        """How a call was refused: code, reason, field violations."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await awaitable
        return refused(raised.value)


def refused(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, list[Any]]:
    """Code, reason and field violations of a refusal."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    assert info.domain == "fabula"
    return error.code(), info.reason, list(bad.field_violations)


class Service(Client):
    """A service in this process."""

    def __init__(self, process: CustomizationProcess, port: int, home: Path) -> None:
        super().__init__(port)
        self.process, self.home = process, home

    def folder(self, job_id: str) -> Path:
        return self.home / "customization" / job_id

    def kill_driver(self, job_id: str) -> bool:
        """SIGKILL to the training process, if there is one now."""
        return kill_driver(self.folder(job_id))


def is_trained(folder: Path) -> bool:
    """Whether a process trains in a folder."""
    try:
        with (folder / "driver.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def kill_driver(folder: Path) -> bool:
    """SIGKILL to the process that trains in a folder; False when there is none."""
    if not is_trained(folder):
        return False
    try:
        os.kill(int((folder / "driver.lock").read_text()), signal.SIGKILL)
    except (ValueError, ProcessLookupError):
        return False
    return True


@asynccontextmanager
async def running(
    home: Path, program: Sequence[str] = PRETEND, *, packs: Path | None = None, niceness: int = 0, **fields: Any
) -> AsyncIterator[Service]:
    """A service with its home; `fields` are settings, or `PRETEND_*` variables of its training processes."""
    pretend = {name: str(fields.pop(name)) for name in list(fields) if name.isupper()}
    settings = CustomizationSettings(
        **{"poll_s": 0.05, "threads": 1, "eyes": False, "niceness": niceness, "save_every_s": 0.5, **fields}
    )
    installation = Installation(home=home, packs=str(packs) if packs else "")
    process = CustomizationProcess(installation, settings)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **pretend}
    process.backend = LocalBackend(niceness=niceness, environment=environment, program=program)
    await process.start()
    server, port = await start_server(CustomizationServicer(process, TOKEN), "127.0.0.1:0")
    service = Service(process, port, home)
    try:
        yield service
    finally:
        await process.stop()
        await server.stop(None)
        await service.channel.close()
        for folder in (home / "customization").glob("*-*-*-*-*"):
            await eventually(lambda folder=folder: not kill_driver(folder))


class KillableService(Client):
    """A service in a process of its own."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self._environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "FABULA_HOME": str(home), **environment}
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            (sys.executable, str(SERVICE)), env=self._environment, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith("port ")), "")  # after its log
        assert line, "it did not start"
        super().__init__(int(line.split()[1]))

    def restart(self) -> None:
        """SIGKILL, and a new process over what the old one left."""
        self.kill()
        self._start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def folder(self, job_id: str) -> Path:
        return self.home / "customization" / job_id


async def eventually(condition: Callable[[], Any]) -> Any:
    """Its first true answer."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        await asyncio.sleep(0.02)
    raise AssertionError("it never happened")
