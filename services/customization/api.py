"""What the customization service can do, once. gRPC only translates to and from these methods.

Every method raises FabulaError and nothing else that a client should see.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import uuid_utils

from services.customization.backends import STORY_FOLDER
from services.customization.checks import (
    Finding,
    GivenStory,
    KnownCharacter,
    Looks,
    check_story,
    is_acceptable,
)
from services.customization.config import CustomizationSettings
from services.customization.estimate import estimate
from services.customization.events import Broadcaster, watch
from services.customization.importing import Importer
from services.customization.intake import (
    ImportRequest,
    JobRequest,
    TaughtPack,
    check_import,
    check_request_id,
    check_upload,
    clean_pictures,
    description_window,
    given_story,
    known_cast,
    known_pack,
    new_character,
    taught_pack,
    training_settings,
    violations,
)
from services.customization.metrics import CHECK_SECONDS, CREATED, PUBLISHED, REFUSED
from services.customization.publishing import (
    imported_manifest,
    imported_version,
    manifest_of,
    version_of,
    weights_of,
)
from services.customization.records import (
    CharacterVersion,
    Checkpoint,
    Estimate,
    Event,
    Job,
    StoredFrame,
    TrainingSettings,
)
from services.customization.reporting import Reporter
from services.customization.repository import Repository, unsuitable
from services.customization.shelf import Shelf
from services.customization.states import State, Wish, wished
from services.customization.suggestion import Measured, suggestion
from services.runtime import paging
from services.runtime.database import now_us
from services.runtime.errors import (
    CharacterVersionDeleted,
    CharacterVersionNotFound,
    CharacterWeightsUnknown,
    CheckpointNotFound,
    CustomizationJobNotFound,
    ExampleStoryRefused,
    ImageNotFound,
    InvalidArgument,
    ObjectNotFound,
    ShuttingDown,
)
from services.runtime.store import SHA256, ObjectStore

_STEP = re.compile(r"\d{1,9}")  # where a page of checkpoints ends
_VERSION_PLACE = re.compile(r"(\d{1,20}) ([0-9a-f]{64})")  # where a page of versions does
JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TRIES = 5  # of a wish, against whatever else happens to the job meanwhile

Eyes = Callable[[Path], Looks | None]
"""The eyes of the pack in a folder; slow at the first call."""

log = structlog.get_logger("fabula.customization.api")


@dataclass(frozen=True, kw_only=True)
class Created:
    """What became of a request: no job where it was only to be checked."""

    job: Job | None
    findings: tuple[Finding, ...]
    estimate: Estimate
    is_acceptable: bool


@dataclass(frozen=True, kw_only=True)
class JobPage:
    """A page of jobs; an empty token is the end."""

    jobs: tuple[Job, ...]
    next_page_token: str


@dataclass(frozen=True, kw_only=True)
class CheckpointPage:
    """A page of checkpoints; an empty token is the end."""

    checkpoints: tuple[Checkpoint, ...]
    suggested_step: int
    next_page_token: str


@dataclass(frozen=True, kw_only=True)
class VersionPage:
    """A page of character versions; an empty token is the end."""

    versions: tuple[CharacterVersion, ...] = field(default_factory=tuple)
    next_page_token: str = ""


class CustomizationApi:
    """The operations of the service."""

    def __init__(
        self,
        *,
        repository: Repository,
        objects: ObjectStore,
        characters: ObjectStore,
        shelf: Shelf,
        broadcaster: Broadcaster,
        settings: CustomizationSettings,
        folder: Path,
        pack_folders: Sequence[Path],
        eyes: Eyes,
    ) -> None:
        """`objects` has pictures, `characters` is what frame replicas read weights from; `shelf` is over both."""
        self._repository, self._objects, self._characters = repository, objects, characters
        self._shelf = shelf
        self._broadcaster, self._settings, self._folder = broadcaster, settings, folder
        self._pack_folders, self._eyes = tuple(pack_folders), eyes
        self._reporter = Reporter(repository, objects)
        self._importer = Importer(folder, rank_max=settings.import_rank_max)
        self.accepting = True  # false once the process is stopping

    async def create(self, request: JobRequest) -> Created:
        """Checks a story and accepts a job. Once this returns, the job is never lost."""
        if not self.accepting:
            raise ShuttingDown()
        check_request_id(request.request_id)
        check_upload(request.frames)
        if not request.validate_only:
            made = await self._repository.find_by_request(request.request_id, request.body_sha256)
            if made is not None:
                return Created(job=made, findings=made.findings, estimate=made.estimate, is_acceptable=True)
        name = request.pack or self._settings.default_pack
        pack = await asyncio.to_thread(taught_pack, name, self._pack_folders)
        settings = training_settings(request, pack, self._settings)
        story = given_story(request, pack)
        with CHECK_SECONDS.time():
            known = await self._known(pack, story)
            findings = await asyncio.to_thread(self._look_over, story, known, pack, settings)
        measured = await self._repository.measured(
            pack_digest=settings.pack_digest,
            method=settings.method,
            learns=settings.learns,
            workers=settings.workers,
        )
        expected = estimate(
            settings, measured=measured, ahead=await self._repository.waiting(), gpus=self._settings.gpus
        )
        acceptable = is_acceptable(findings, request.accepted_findings)
        if request.validate_only:
            return Created(job=None, findings=tuple(findings), estimate=expected, is_acceptable=acceptable)
        if not acceptable:
            REFUSED.inc()
            raise _refusal(findings, request.accepted_findings)
        await self._repository.check_room(max_queued=self._settings.max_queued)
        pictures = await asyncio.to_thread(clean_pictures, [frame.image for frame in request.frames], "frames")
        async with self._shelf.putting():  # what somebody else has no use for any more is not removed between the two
            frames = [
                StoredFrame(
                    image_sha256=await self._objects.put(picture),
                    caption=given.caption.strip(),
                    description=given.description.strip(),
                )
                for given, picture in zip(request.frames, pictures, strict=True)
            ]
            job, is_new = await self._repository.create(
                job_id=str(uuid_utils.uuid7()),
                character=new_character(story),
                frames=frames,
                settings=settings,
                findings=findings,
                estimate=expected,
                request_id=request.request_id,
                body_sha256=request.body_sha256,
                max_queued=self._settings.max_queued,
            )
        if is_new:
            CREATED.inc()
            log.info("job_created", job_id=job.job_id, pack=settings.pack, method=settings.method)
        return Created(job=job, findings=job.findings, estimate=job.estimate, is_acceptable=True)

    def _look_over(
        self, story: GivenStory, cast: Sequence[KnownCharacter], pack: TaughtPack, settings: TrainingSettings
    ) -> list[Finding]:
        return check_story(story, cast, self._eyes(pack.folder), description_window(pack, story, settings))

    async def _known(self, pack: TaughtPack, story: GivenStory) -> list[KnownCharacter]:
        """The pack's cast, who is in the stories that it is taught beside, and who else was published for it.

        The same one as a published one may be taught again.
        """
        folder = self._settings.known_of(pack.manifest.name)
        beside = () if folder is None else await asyncio.to_thread(known_cast, folder)
        published = await self._repository.versions(limit=1000)
        own = {one.character.name: one.character.phrase for one in published if one.pack == pack.manifest.name}
        told = {one.name for one in pack.cast}
        cast = [*pack.cast, *(one for one in beside if one.name not in told)]
        known = {*(one.name for one in cast), story.name}
        return [*cast, *(KnownCharacter(name=name, phrase=look) for name, look in own.items() if name not in known)]

    async def get(self, job_id: str) -> Job:
        """A job as it stands."""
        return await self._repository.get(_checked(job_id))

    async def list(self, *, page_size: int, page_token: str, show_deleted: bool) -> JobPage:
        """Jobs, newest first, without findings and versions."""
        size = paging.page_size(page_size)
        last = paging.place_after(page_token, JOB_ID)
        found = await self._repository.page(limit=size + 1, before=last[0] if last else "", show_deleted=show_deleted)
        jobs, token = paging.cut(found, size, lambda job: job.job_id)
        return JobPage(jobs=jobs, next_page_token=token)

    async def watch(self, job_id: str, *, after: int) -> AsyncGenerator[Event, None]:
        """Durable events above `after`, then what happens, until the job has ended."""
        events = watch(self._repository, self._broadcaster, _checked(job_id), after=after, poll_s=self._settings.poll_s)
        async for event in events:
            yield event

    async def wish(self, job_id: str, wish: Wish) -> Job:
        """Cancels, pauses or resumes a job. Raises JobStateUnsuitable where that cannot be."""
        _checked(job_id)
        for _ in range(_TRIES):
            job = await self._repository.get(job_id)
            if job.delete_us is not None and wish == "resume":
                raise unsuitable(job, "go on while it is deleted")
            to = wished(job.state, wish)
            if to is None:
                raise unsuitable(job, "be paused" if wish == "pause" else "go on")
            if to is job.state:
                return job
            if to is State.QUEUED:
                await self._repository.check_room(max_queued=self._settings.max_queued)
                # A job that was paused before its story was laid out has that before it still.
                to = State.QUEUED if await asyncio.to_thread(self._is_laid_out, job_id) else State.VALIDATING
            if await self._repository.change_state(job_id, to, only_from={job.state}):
                self._broadcaster.note(job_id)
                return await self._repository.get(job_id)
        raise unsuitable(await self._repository.get(job_id), f"{wish} just now, so much happens to it; try again")

    def _is_laid_out(self, job_id: str) -> bool:
        return (self._folder / job_id / STORY_FOLDER).is_dir()

    async def checkpoints(self, job_id: str, *, page_size: int, page_token: str) -> CheckpointPage:
        """What a job has learned so far, oldest first."""
        last = paging.place_after(page_token, _STEP)
        job = await self._repository.get(_checked(job_id))
        every = await self._repository.checkpoints(job_id)
        found = [one for one in every if last is None or one.step > int(last[0])]
        checkpoints, token = paging.cut(found, paging.page_size(page_size), lambda one: str(one.step))
        return CheckpointPage(checkpoints=checkpoints, suggested_step=_suggested(every, job), next_page_token=token)

    async def publish(self, job_id: str, step: int) -> CharacterVersion:
        """Makes a checkpoint a version that frame services can draw at once; a deleted one is back by that."""
        job = await self._repository.get(_checked(job_id))
        if not step:
            step = _suggested(await self._repository.checkpoints(job_id), job)
            if not step:
                raise CheckpointNotFound("the job has no checkpoint yet; wait for the first one")
        checkpoint, file, card = await self._repository.checkpoint(job_id, step)
        manifest = manifest_of(job, card, [frame.image_sha256 for frame in job.frames])
        version = version_of(job, checkpoint, card, manifest, now_us())
        weights = await weights_of(checkpoint, self._folder / job_id / file)
        published, is_new = await self._shelf.publish(version, manifest, weights)
        if is_new:
            PUBLISHED.inc()
            log.info("version_published", job_id=job_id, version_id=published.version_id, step=step)
            self._broadcaster.note(job_id)
        return published

    async def import_version(self, request: ImportRequest) -> tuple[CharacterVersion, bool]:
        """Makes weights from elsewhere a version; says whether it is new. A deleted one is back by that.

        Raises CharacterWeightsUnusable with the cause in its metadata, CharacterWeightsUnknown for a SHA-256 that the
        store has not got, PackUnknown, InvalidArgument, QueueFull.
        """
        if not self.accepting:
            raise ShuttingDown()
        name = request.pack or self._settings.default_pack
        pack = await asyncio.to_thread(known_pack, name, self._pack_folders)
        character = check_import(request, pack)
        pictures = await asyncio.to_thread(clean_pictures, request.references, "references")
        weights = request.weights or await self._stored(request.weights_sha256)
        fitted = await self._importer.fit(weights, request.adapter_config, pack.folder)
        references = [hashlib.sha256(picture).hexdigest() for picture in pictures]
        manifest = imported_manifest(character, fitted, pack.manifest.name, references)
        version = imported_version(character, fitted, pack.manifest, references, manifest, now_us())
        published, is_new = await self._shelf.publish(version, manifest, fitted.payload, pictures)
        if is_new:
            PUBLISHED.inc()
            log.info("version_imported", version_id=published.version_id, pack=pack.manifest.name)
        return published, is_new

    async def _stored(self, sha256: str) -> bytes:
        try:
            return await self._characters.get(sha256)
        except ObjectNotFound:
            raise CharacterWeightsUnknown(
                f"the characters' store has no {sha256}", metadata={"digest": sha256}
            ) from None

    async def delete(self, job_id: str) -> Job:
        """Deletes a job, after cancelling it; it can be undeleted for a while. Published versions stay."""
        await self.wish(job_id, "cancel")
        return await self._repository.delete(job_id, purge_us=self._purge_us())

    def _purge_us(self) -> int:
        """When what is deleted now goes for good."""
        return now_us() + round(self._settings.keep_deleted_s * 1e6)

    async def undelete(self, job_id: str) -> Job:
        """Takes a deletion back. Raises CustomizationJobNotFound, also once its time is over."""
        return await self._repository.undelete(_checked(job_id))

    async def versions(self, *, page_size: int, page_token: str, name: str, show_deleted: bool) -> VersionPage:
        """Versions, newest first."""
        size = paging.page_size(page_size)
        last = paging.place_after(page_token, _VERSION_PLACE)
        before = (int(last[1]), last[2]) if last else None
        found = await self._repository.versions(limit=size + 1, before=before, name=name, show_deleted=show_deleted)
        versions, token = paging.cut(found, size, lambda one: f"{one.publish_us} {one.version_id}")
        return VersionPage(versions=versions, next_page_token=token)

    async def delete_version(self, version_id: str) -> CharacterVersion:
        """Deletes a version: frame services find its weights no more. It can be undeleted for a while.

        Raises CharacterVersionNotFound, and Unavailable while they find them still, though it is deleted.
        """
        version = await self._shelf.delete(_checked_version(version_id), purge_us=self._purge_us())
        log.info("version_deleted", version_id=version_id)
        return version

    async def undelete_version(self, version_id: str) -> CharacterVersion:
        """Takes a deletion back. Raises CharacterVersionNotFound, also once its time is over, and DataLoss."""
        version = await self._shelf.undelete(_checked_version(version_id))
        log.info("version_undeleted", version_id=version_id)
        return version

    async def read_weights(self, version_id: str, chunk_bytes: int) -> AsyncGenerator[bytes, None]:
        """The safetensors file of a version, chunk by chunk: it may be a whole network.

        Raises CharacterVersionNotFound, CharacterVersionDeleted.
        """
        version = await self._version(version_id)
        try:
            async with aclosing(self._characters.chunks(version.weights_sha256, chunk_bytes)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ObjectNotFound:
            await self._version(version_id)  # it may have been deleted just now
            raise

    async def _version(self, version_id: str) -> CharacterVersion:
        version = await self._repository.version(_checked_version(version_id))
        if version.delete_us is not None:
            raise CharacterVersionDeleted(
                "this character version is deleted; undelete it to read what belongs to it",
                metadata={"version_id": version_id},
            )
        return version

    async def read_report(self, job_id: str) -> bytes:
        """The page on a job: HTML that stands alone."""
        return await self._reporter.read(_checked(job_id))

    async def read_image(self, job_id: str, sha256: str, version_id: str = "") -> bytes:
        """A picture of a job, or a reference picture of a version, as PNG."""
        if job_id and version_id:
            raise InvalidArgument("name the job of the picture, or its version", field="version_id")
        if version_id:
            if sha256 not in (await self._version(version_id)).reference_sha256s:
                raise ImageNotFound(
                    "this version has no picture with this SHA-256",
                    metadata={"version_id": version_id, "sha256": sha256[:64]},
                )
            try:
                return await self._objects.get(sha256)
            except ObjectNotFound:
                await self._version(version_id)  # it may have been purged just now
                raise
        if not await self._repository.has_image(_checked(job_id), sha256):
            raise ImageNotFound(
                "this job has no picture with this SHA-256", metadata={"job_id": job_id, "sha256": sha256[:64]}
            )
        return await self._objects.get(sha256)


def _suggested(checkpoints: Sequence[Checkpoint], job: Job) -> int:
    chosen = suggestion([Measured(step=one.step, figures=one.figures) for one in checkpoints], job.baseline)
    return chosen.step if chosen is not None else 0


def _refusal(findings: Sequence[Finding], accepted: Sequence[str]) -> ExampleStoryRefused:
    errors = [one for one in findings if one.severity == "error"]
    open_ = errors or [one for one in findings if one.code not in accepted]
    first = open_[0]
    more = f" ({len(open_) - 1} more)" if len(open_) > 1 else ""
    hint = "" if errors else f" Or accept {', '.join(dict.fromkeys(one.code for one in open_))}."
    return ExampleStoryRefused(
        f"{first.message} {first.mend}{hint}{more}",
        metadata={"codes": ",".join(dict.fromkeys(one.code for one in open_))},
        field_violations=violations(open_),
    )


def _checked_version(version_id: str) -> str:
    # As with jobs: what cannot be an id is not looked up.
    if not SHA256.fullmatch(version_id):
        raise CharacterVersionNotFound(metadata={"version_id": version_id[:64]})
    return version_id


def _checked(job_id: str) -> str:
    # What cannot be an id is not looked up; the answer is the same as for an id that does not exist.
    if not JOB_ID.fullmatch(job_id):
        raise CustomizationJobNotFound(metadata={"job_id": job_id[:64]})
    return job_id
