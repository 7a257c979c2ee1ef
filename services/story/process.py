"""The story process: puts the parts together, starts them in order, stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator

import structlog
import uvicorn

from services.runtime.channel import ServiceChannel
from services.runtime.config import ConfigInvalid, Installation
from services.runtime.errors import FabulaError, ShuttingDown, Unavailable
from services.runtime.store import ObjectStore
from services.story.api import MOST_CALLS, StoryApi
from services.story.api_grpc import GrpcEdge
from services.story.api_http import http_app
from services.story.backends import CaptionBackend, FrameBackend
from services.story.caretaker import Caretaker
from services.story.characters import CharacterLookup
from services.story.config import StorySettings, port_refused
from services.story.customization import Customizations
from services.story.database import database_urls, open_database
from services.story.events import Broadcaster
from services.story.inference.servicer import InferenceServicer
from services.story.intake import PackCheck
from services.story.migrate import is_current, upgrade
from services.story.repository import Repository
from services.story.sandbox import Sandbox
from services.story.workflow import StoryWorkflows

log = structlog.get_logger("fabula.story.process")


class StoryProcess:
    """Everything of one story process. `start`, then `stop`."""

    def __init__(self, installation: Installation, settings: StorySettings) -> None:
        settings.check()
        self._installation = installation
        self._settings = settings
        self._urls = database_urls(installation.database_url, installation.home)
        self._is_ready = False

    async def start(self) -> None:
        """Returns when both servers answer and stories are taken. Raises ConfigInvalid, FabulaError."""
        installation, settings = self._installation, self._settings
        installation.make_home()
        token = installation.read_token()
        if self._urls.is_sqlite and settings.migrate:
            await asyncio.to_thread(upgrade, self._urls)
        elif not await asyncio.to_thread(is_current, self._urls):
            raise ConfigInvalid("the database is not up to date; run `python -m services.story migrate` first")
        self._engine = open_database(self._urls)
        repository = Repository(self._engine)
        store = ObjectStore.open(installation.object_store_url, installation.home / "objects")
        caption_target, frame_target = settings.targets(installation)
        self._channels = (
            ServiceChannel(caption_target, application="caption", token=token),
            ServiceChannel(frame_target, application="frame", token=token),
        )
        caption = CaptionBackend(self._channels[0], timeout_s=settings.caption_timeout_s)
        frame = FrameBackend(
            self._channels[1], timeout_s=settings.frame_timeout_s, preview_every_steps=settings.preview_every_steps
        )
        self._broadcaster = Broadcaster()
        self._workflows = StoryWorkflows(
            repository=repository,
            store=store,
            caption=caption,
            frame=frame,
            broadcaster=self._broadcaster,
            settings=settings,
        )
        self._sandbox = Sandbox()
        customizations = Customizations(
            ServiceChannel(settings.customizing_target(installation), application="customization", token=token),
            self._sandbox,
            unload=frame.unload,
        )
        self._api = StoryApi(
            repository=repository,
            store=store,
            workflows=self._workflows,
            broadcaster=self._broadcaster,
            sandbox=self._sandbox,
            packs=PackCheck(caption, frame, default_pack=settings.default_pack),
            characters=CharacterLookup(customizations, frame),
            caption=caption,
            frame=frame,
            settings=settings,
        )
        self._caretaker = Caretaker(
            repository=repository,
            workflows=self._workflows,
            store=store,
            broadcaster=self._broadcaster,
            settings=settings,
        )
        # Both ports first: nothing has been started that would have to be stopped again.
        http_sockets = bound_sockets(settings.host, installation.story_http_port)
        self._grpc = GrpcEdge(
            self._api,
            host=settings.host,
            port=installation.story_grpc_port,
            inference_servicer=self._inference() if settings.inference else None,
            customizations=customizations,
        )
        self._http = _HttpServer(
            uvicorn.Config(
                http_app(self._api, settings, self._check_ready, customizations),
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=2 * MOST_CALLS,  # connections, idle ones included; the app says no long before
                timeout_graceful_shutdown=max(1, round(settings.drain_s)),
            )
        )
        await self._grpc.start()
        self._serving = asyncio.create_task(self._http.serve(http_sockets), name="http")
        await asyncio.gather(self._http_up(), self._sandbox.start(), self._launch())
        self._housekeeping = asyncio.create_task(self._caretaker.run(), name="caretaker")
        self._is_ready = True
        await self._grpc.serving(True)
        log.info("ready", http_port=installation.story_http_port, grpc_port=installation.story_grpc_port)

    async def stop(self) -> None:
        """Takes no more work, lets calls in flight end, tells watchers to come back; running stories stay resumable."""
        self._is_ready = False
        self._api.accepting = False
        await self._grpc.serving(False)
        self._broadcaster.close()
        self._housekeeping.cancel()
        self._http.should_exit = True
        await asyncio.gather(
            self._grpc.stop(self._settings.drain_s), self._serving, self._housekeeping, return_exceptions=True
        )
        await self._sandbox.close()
        with contextlib.suppress(FabulaError):
            await self._caretaker.sign_off()

    def _inference(self) -> InferenceServicer:
        caption_channel, frame_channel = self._channels
        return InferenceServicer(
            caption_channel=caption_channel,
            frame_channel=frame_channel,
            sandbox=self._sandbox,
            caption_timeout_s=self._settings.caption_timeout_s,
            frame_timeout_s=self._settings.frame_timeout_s,
        )

    async def _launch(self) -> None:
        await self._caretaker.sign_on()
        await self._workflows.launch(
            system_database_url=self._urls.workflows,
            executor_id=self._caretaker.executor_id,
            migrate=self._urls.is_sqlite,
        )
        await self._caretaker.start()

    async def _http_up(self) -> None:
        while not self._http.started:
            if self._serving.done():
                raise Unavailable("the HTTP server ended while it started", metadata={"service": "story"})
            await asyncio.sleep(0.01)

    async def _check_ready(self) -> None:
        if self._broadcaster.closed:
            raise ShuttingDown()
        if not self._is_ready:
            raise Unavailable("starting")
        await self._api.check_database()


def bound_sockets(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`. uvicorn would bind them itself, but ends the process when it cannot.

    Raises ConfigInvalid.
    """
    sockets: list[socket.socket] = []
    try:
        found = dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))  # hosts files repeat themselves
        for family, kind, _, _, address in found:
            sockets.append(socket.socket(family, kind))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise port_refused(host, port, error.strerror or str(error)) from error
    return sockets


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling: the process has one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(installation: Installation, settings: StorySettings) -> None:
    """Runs until SIGTERM or SIGINT. Does not return: see the last line."""
    process = StoryProcess(installation, settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await process.start()
    await stopping.wait()
    log.info("stopping")
    await process.stop()
    sys.stderr.flush()
    # Stories in progress must look exactly as if the process had been killed: unwinding them would have the workflow
    # engine record a cancellation as their outcome. Everything that matters is in the database already.
    os._exit(0)
