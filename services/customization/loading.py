"""From settings to a service that answers and runs jobs: puts the parts together, starts and stops them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import structlog

from services.customization.api import CustomizationApi
from services.customization.backends import Backend
from services.customization.checks import Looks
from services.customization.config import CustomizationSettings
from services.customization.database import async_url, database_url, is_current, upgrade
from services.customization.events import Broadcaster
from services.customization.intake import taught_pack
from services.customization.kuberay import InClusterApi, KubeRayBackend, KubeRaySettings
from services.customization.local import LocalBackend
from services.customization.ray_jobs import RayJobsBackend, job_client
from services.customization.repository import Repository
from services.customization.runner import Runner
from services.customization.shelf import Shelf
from services.customization.turns import Turns
from services.runtime.config import ConfigInvalid, Installation
from services.runtime.database import open_async
from services.runtime.store import ObjectStore

_LAST_LOOK_S = 10.0  # that the runner's look in progress may take when the process ends

log = structlog.get_logger("fabula.customization")


def _local(settings: CustomizationSettings, installation: Installation) -> Backend:
    return LocalBackend(niceness=settings.niceness)


def _ray(settings: CustomizationSettings, installation: Installation) -> Backend:
    return RayJobsBackend(
        lambda: job_client(settings.ray_address),
        cpus=0.0 if settings.gpus else float(settings.threads_of(0)),
        gpus=settings.gpus,
        stop_grace_s=settings.stop_grace_s,
    )


def _kuberay(settings: CustomizationSettings, installation: Installation) -> Backend:
    if not settings.kuberay_image:
        raise ConfigInvalid("FABULA_CUSTOMIZATION_KUBERAY_IMAGE: the kuberay backend needs an image with training")
    return KubeRayBackend(
        InClusterApi(settings.kuberay_api),
        KubeRaySettings(
            namespace=settings.kuberay_namespace,
            image=settings.kuberay_image,
            claim=settings.kuberay_claim,
            mount=settings.jobs_folder(installation),
            cpus=settings.kuberay_cpus,
            memory_gib=settings.kuberay_memory_gib,
            gpus=settings.gpus,
            auth_secret=settings.kuberay_auth_secret,
        ),
    )


BACKENDS: dict[str, Callable[[CustomizationSettings, Installation], Backend]] = {
    "local": _local,
    "ray": _ray,
    "kuberay": _kuberay,
}


class CustomizationProcess:
    """Everything of one customization process. `start`, then `stop`."""

    def __init__(self, installation: Installation, settings: CustomizationSettings) -> None:
        """Raises ConfigInvalid."""
        self._installation, self._settings = installation, settings
        self._url = database_url(installation.database_url, installation.home)
        self.backend = BACKENDS[settings.backend](settings, installation)
        self._starting = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[None] | None = None
        self.api: CustomizationApi

    async def start(self) -> None:
        """Returns when jobs are taken; again and again if need be. Raises ConfigInvalid, FabulaError or OSError."""
        async with self._starting:
            if self._running is None:
                await self._start()

    async def _start(self) -> None:
        installation, settings = self._installation, self._settings
        installation.make_home()
        folder = settings.jobs_folder(installation)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._url.startswith("sqlite"):
            await asyncio.to_thread(upgrade, self._url)
        elif not await asyncio.to_thread(is_current, self._url):
            raise ConfigInvalid(
                "the customization tables are not up to date; run `python -m services.customization migrate` first"
            )
        self._engine = open_async(async_url(self._url))
        repository = Repository(self._engine)
        objects = ObjectStore.open("", folder / "objects")
        characters = ObjectStore.open(settings.characters_url, installation.home / "characters")
        shelf = Shelf(repository, characters=characters, objects=objects, turns=Turns(folder))
        self._broadcaster = Broadcaster()
        self.api = CustomizationApi(
            repository=repository,
            objects=objects,
            characters=characters,
            shelf=shelf,
            broadcaster=self._broadcaster,
            settings=settings,
            folder=folder,
            pack_folders=installation.pack_folders,
            eyes=_eyes if settings.eyes else _no_eyes,
        )
        self._runner = Runner(
            repository=repository,
            objects=objects,
            shelf=shelf,
            backend=self.backend,
            broadcaster=self._broadcaster,
            settings=settings,
            folder=folder,
            pack_folders=installation.pack_folders,
        )
        self._running = asyncio.create_task(self._runner.run(), name="runner")
        if settings.eyes:  # importing torch takes seconds, which no caller shall wait for
            self._warming = asyncio.create_task(asyncio.to_thread(_warm, settings.default_pack, installation))
        log.info("customization_ready", backend=settings.backend, folder=str(folder))

    @property
    def is_healthy(self) -> bool:
        """Whether jobs are looked after."""
        return self._running is not None and not self._running.done()

    async def stop(self) -> None:
        """Takes no more jobs and tells watchers to come back. Local training processes save and end."""
        if self._running is None:
            return
        self.api.accepting = False
        self._broadcaster.close()
        self._runner.stop()
        _, late = await asyncio.wait((self._running,), timeout=_LAST_LOOK_S)
        for task in late:  # a backend that does not answer: what it was asked is asked again by the next process
            task.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.backend.close()
        await self._engine.dispose()


@lru_cache(maxsize=4)
def _eyes(pack_folder: Path) -> Looks | None:
    """The eyes of a pack; None for one without. The first call imports torch."""
    from services.models.eyes import load_eyes

    eyes: Looks | None = load_eyes(pack_folder)
    return eyes


def _warm(pack: str, installation: Installation) -> None:
    """Loads the eyes of the pack that most requests are about. A pack that cannot be read is told of when one comes."""
    try:
        _eyes(taught_pack(pack, installation.pack_folders).folder)
    except Exception as error:
        log.warning("eyes_not_loaded", pack=pack, exc_info=error)


def _no_eyes(_pack_folder: Path) -> Looks | None:
    return None
