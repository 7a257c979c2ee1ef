"""Teaching characters, for programs without an event loop. See `characters_aio`; no rule lives here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar, Unpack

from fabula_client.characters import (
    CharacterVersion,
    Checked,
    Checkpoint,
    Imported,
    Job,
    JobEvent,
    JobFacts,
    Training,
)
from fabula_client.characters_aio import (
    FILES_TIMEOUT_S,
    IMPORT_TIMEOUT_S,
    UPLOAD_TIMEOUT_S,
    WEIGHTS_TIMEOUT_S,
    AsyncCharacters,
    AsyncJob,
    Picture,
)

T = TypeVar("T")


class Loop(Protocol):
    """Where the work is done."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Does it and waits for it."""
        ...

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """The items, fetched one by one."""
        ...


class Characters:
    """The characters of one Fabula, and the jobs that teach them. See AsyncCharacters."""

    def __init__(self, loop: Loop, core: AsyncCharacters) -> None:
        self._loop = loop
        self._core = core

    def train(
        self,
        *,
        idempotency_key: str | None = None,
        timeout_s: float | None = UPLOAD_TIMEOUT_S,
        **wanted: Unpack[Training],
    ) -> JobHandle:
        """Has somebody new taught from one example story. See AsyncCharacters.train."""
        job = self._core.train(idempotency_key=idempotency_key, timeout_s=timeout_s, **wanted)
        return JobHandle(self._loop, self._loop.run(job))

    def check(self, *, timeout_s: float | None = UPLOAD_TIMEOUT_S, **wanted: Unpack[Training]) -> Checked:
        """What is wrong with an example story, and what a job would cost. See AsyncCharacters.check."""
        return self._loop.run(self._core.check(timeout_s=timeout_s, **wanted))

    def get(self, job_id: str, *, timeout_s: float | None = None) -> JobHandle:
        """Reads a job. See AsyncCharacters.get."""
        return JobHandle(self._loop, self._loop.run(self._core.get(job_id, timeout_s=timeout_s)))

    def jobs(
        self, *, page_size: int = 0, show_deleted: bool = False, timeout_s: float | None = None
    ) -> Iterator[JobHandle]:
        """Every job, newest first. See AsyncCharacters.jobs."""
        found = self._core.jobs(page_size=page_size, show_deleted=show_deleted, timeout_s=timeout_s)
        for job in self._loop.iterate(found):
            yield JobHandle(self._loop, job)

    def versions(
        self, *, name: str = "", page_size: int = 0, show_deleted: bool = False, timeout_s: float | None = None
    ) -> Iterator[CharacterVersion]:
        """Published versions, newest first. See AsyncCharacters.versions."""
        found = self._core.versions(name=name, page_size=page_size, show_deleted=show_deleted, timeout_s=timeout_s)
        return self._loop.iterate(found)

    def delete_version(self, version_id: str, *, timeout_s: float | None = FILES_TIMEOUT_S) -> CharacterVersion:
        """Deletes a version. See AsyncCharacters.delete_version."""
        return self._loop.run(self._core.delete_version(version_id, timeout_s=timeout_s))

    def undelete_version(self, version_id: str, *, timeout_s: float | None = FILES_TIMEOUT_S) -> CharacterVersion:
        """Takes a deletion back. See AsyncCharacters.undelete_version."""
        return self._loop.run(self._core.undelete_version(version_id, timeout_s=timeout_s))

    def read_weights(self, version: CharacterVersion, *, timeout_s: float | None = WEIGHTS_TIMEOUT_S) -> bytes:
        """The safetensors file of a version. See AsyncCharacters.read_weights."""
        return self._loop.run(self._core.read_weights(version, timeout_s=timeout_s))

    def read_image(self, version: CharacterVersion, sha256: str, *, timeout_s: float | None = None) -> bytes:
        """A reference picture of a version. See AsyncCharacters.read_image."""
        return self._loop.run(self._core.read_image(version, sha256, timeout_s=timeout_s))

    def import_version(
        self,
        *,
        name: str,
        phrase: str,
        noun: str = "",
        weights: Picture | None = None,
        weights_sha256: str = "",
        adapter_config: str = "",
        pack: str = "",
        references: Sequence[Picture] = (),
        timeout_s: float | None = IMPORT_TIMEOUT_S,
    ) -> Imported:
        """Makes weights from elsewhere a character version. See AsyncCharacters.import_version."""
        imported = self._core.import_version(
            name=name,
            phrase=phrase,
            noun=noun,
            weights=weights,
            weights_sha256=weights_sha256,
            adapter_config=adapter_config,
            pack=pack,
            references=references,
            timeout_s=timeout_s,
        )
        return self._loop.run(imported)

    def archive(self, version: CharacterVersion, *, timeout_s: float | None = WEIGHTS_TIMEOUT_S) -> bytes:
        """A version in one file. See AsyncCharacters.archive."""
        return self._loop.run(self._core.archive(version, timeout_s=timeout_s))

    def import_archive(
        self, archive: Picture, *, pack: str = "", timeout_s: float | None = IMPORT_TIMEOUT_S
    ) -> Imported:
        """Makes what `archive` wrote a version here. See AsyncCharacters.import_archive."""
        return self._loop.run(self._core.import_archive(archive, pack=pack, timeout_s=timeout_s))


class JobHandle(JobFacts):
    """One job: what was last read of it, and what can be done with it. See AsyncJob."""

    def __init__(self, loop: Loop, core: AsyncJob) -> None:
        self._loop = loop
        self._core = core

    @property
    def value(self) -> Job:
        """What was last read of it."""
        return self._core.value

    def refresh(self, *, timeout_s: float | None = None) -> Job:
        """Reads it again. See AsyncJob.refresh."""
        return self._loop.run(self._core.refresh(timeout_s=timeout_s))

    def watch(self, *, after_sequence: int = 0, patience_s: float = 120.0) -> Iterator[JobEvent]:
        """Follows it until it ends, across broken connections. See AsyncJob.watch."""
        return self._loop.iterate(self._core.watch(after_sequence=after_sequence, patience_s=patience_s))

    def wait(self, *, timeout_s: float | None = None, check: bool = True) -> Job:
        """Waits until it has ended or is paused. See AsyncJob.wait."""
        return self._loop.run(self._core.wait(timeout_s=timeout_s, check=check))

    def cancel(self, *, timeout_s: float | None = None) -> Job:
        """Stops it for good. See AsyncJob.cancel."""
        return self._loop.run(self._core.cancel(timeout_s=timeout_s))

    def pause(self, *, timeout_s: float | None = None) -> Job:
        """Stops it for now. See AsyncJob.pause."""
        return self._loop.run(self._core.pause(timeout_s=timeout_s))

    def resume(self, *, timeout_s: float | None = None) -> Job:
        """Has it go on. See AsyncJob.resume."""
        return self._loop.run(self._core.resume(timeout_s=timeout_s))

    def checkpoints(self, *, timeout_s: float | None = None) -> tuple[Checkpoint, ...]:
        """What it has learned so far. See AsyncJob.checkpoints."""
        return self._loop.run(self._core.checkpoints(timeout_s=timeout_s))

    def publish(self, step: int = 0, *, timeout_s: float | None = FILES_TIMEOUT_S) -> CharacterVersion:
        """Makes a checkpoint a character. See AsyncJob.publish."""
        return self._loop.run(self._core.publish(step, timeout_s=timeout_s))

    def delete(self, *, timeout_s: float | None = None) -> Job:
        """Deletes it. See AsyncJob.delete."""
        return self._loop.run(self._core.delete(timeout_s=timeout_s))

    def undelete(self, *, timeout_s: float | None = None) -> Job:
        """Takes a deletion back. See AsyncJob.undelete."""
        return self._loop.run(self._core.undelete(timeout_s=timeout_s))

    def read_image(self, sha256: str, *, timeout_s: float | None = None) -> bytes:
        """A picture of the job. See AsyncJob.read_image."""
        return self._loop.run(self._core.read_image(sha256, timeout_s=timeout_s))

    def read_report(self, *, timeout_s: float | None = None) -> str:
        """The page on the job. See AsyncJob.read_report."""
        return self._loop.run(self._core.read_report(timeout_s=timeout_s))
