"""Teaching characters, without blocking. `characters_sync` is the same with the waiting done for you.

async with AsyncClient() as client:
    frames = [ExampleFrame(image="1.png", caption="Otto runs.", description="Otto, a black penguin with …, runs."), …]
    job = await client.characters.train(name="Otto", phrase="a black penguin with orange earmuffs", frames=frames)
    await job.wait()
    version = await job.publish()
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Unpack

from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import job_pb2
from fabula.customization.v1.customization_service_pb2_grpc import CustomizationServiceStub
from google.protobuf.duration_pb2 import Duration

from fabula_client.archives import MOST_REFERENCES, CharacterArchive, read_archive, write_archive
from fabula_client.calls import MOST_EXAMPLE_BYTES, MOST_IMAGE_BYTES, MOST_WEIGHTS_BYTES, Connection
from fabula_client.characters import (
    CharacterVersion,
    Checked,
    Checkpoint,
    Imported,
    Job,
    JobCancelled,
    JobEvent,
    JobFacts,
    JobFailed,
    JobPaused,
    JobState,
    JobStateChanged,
    Training,
    checked_from_pb,
    checkpoint_from_pb,
    job_event_from_pb,
    job_from_pb,
    learns_to_pb,
    version_from_pb,
)
from fabula_client.errors import FieldViolation, ImageCorrupt, InvalidArgument, Unavailable, WaitTimedOut

UPLOAD_TIMEOUT_S = 120.0  # of calls that bring a whole story: every picture is decoded and looked at
FILES_TIMEOUT_S = 330.0  # of calls for which the service reads or moves whole networks
IMPORT_TIMEOUT_S = FILES_TIMEOUT_S
WEIGHTS_TIMEOUT_S = 3600.0  # of reading a whole network over somebody's line
MOST_ARCHIVE_BYTES = MOST_EXAMPLE_BYTES + (1 << 20)

Picture = bytes | str | os.PathLike[str]
"""A file's bytes, or where it is."""


class AsyncCharacters:
    """The characters of one Fabula, and the jobs that teach them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def train(
        self,
        *,
        idempotency_key: str | None = None,
        timeout_s: float | None = UPLOAD_TIMEOUT_S,
        **wanted: Unpack[Training],
    ) -> AsyncJob:
        """Has somebody new taught from one example story. Once this returns, the job is never lost.

        `Training` says what is wanted: name, phrase and frames, and if need be how they are learned; give `steps`, or
        `budget_s`, or neither. `idempotency_key` names this request: the same key with the same body gives the same
        job. Raises InvalidArgument (EXAMPLE_STORY_REFUSED: `field_violations` say what is wrong with which frame),
        IdempotencyKeyReused, ResourceExhausted, Unavailable, and OSError for an unreadable path.
        """
        request = await _request(wanted)
        request.request_id = idempotency_key or str(uuid.uuid4())
        answer = await self._connection.call(self._stub.CreateCustomizationJob, request, timeout_s=timeout_s)
        return AsyncJob(self._connection, job_from_pb(answer.job))

    async def check(self, *, timeout_s: float | None = UPLOAD_TIMEOUT_S, **wanted: Unpack[Training]) -> Checked:
        """What is wrong with an example story, and what a job would cost. Makes nothing. See `train`."""
        request = await _request(wanted)
        request.validate_only = True
        answer = await self._connection.call(self._stub.CreateCustomizationJob, request, timeout_s=timeout_s)
        return checked_from_pb(answer)

    async def get(self, job_id: str, *, timeout_s: float | None = None) -> AsyncJob:
        """Reads a job. Raises NotFound."""
        request = pb.GetCustomizationJobRequest(job_id=job_id)
        answer = await self._connection.call(self._stub.GetCustomizationJob, request, timeout_s=timeout_s)
        return AsyncJob(self._connection, job_from_pb(answer.job))

    async def jobs(
        self, *, page_size: int = 0, show_deleted: bool = False, timeout_s: float | None = None
    ) -> AsyncIterator[AsyncJob]:
        """Every job, newest first; asks for page after page as you go. `timeout_s` is per page."""
        token = ""
        while True:
            request = pb.ListCustomizationJobsRequest(page_size=page_size, page_token=token, show_deleted=show_deleted)
            answer = await self._connection.call(self._stub.ListCustomizationJobs, request, timeout_s=timeout_s)
            for job in answer.jobs:
                yield AsyncJob(self._connection, job_from_pb(job))
            token = answer.next_page_token
            if not token:
                return

    async def versions(
        self, *, name: str = "", page_size: int = 0, show_deleted: bool = False, timeout_s: float | None = None
    ) -> AsyncIterator[CharacterVersion]:
        """Published versions, newest first: everybody's, or of one name."""
        token = ""
        while True:
            request = pb.ListCharacterVersionsRequest(
                page_size=page_size, page_token=token, name=name, show_deleted=show_deleted
            )
            answer = await self._connection.call(self._stub.ListCharacterVersions, request, timeout_s=timeout_s)
            for version in answer.versions:
                yield version_from_pb(version)
            token = answer.next_page_token
            if not token:
                return

    async def delete_version(self, version_id: str, *, timeout_s: float | None = FILES_TIMEOUT_S) -> CharacterVersion:
        """Deletes a version: nothing new is drawn with it. It can be undeleted until the answer's `purged`.

        Frames that are being drawn are finished. Deleting it again changes nothing. Raises NotFound.
        """
        request = pb.DeleteCharacterVersionRequest(version_id=version_id)
        answer = await self._connection.call(self._stub.DeleteCharacterVersion, request, timeout_s=timeout_s)
        return version_from_pb(answer.version)

    async def undelete_version(self, version_id: str, *, timeout_s: float | None = FILES_TIMEOUT_S) -> CharacterVersion:
        """Takes a deletion back. Raises NotFound once its time is over."""
        request = pb.UndeleteCharacterVersionRequest(version_id=version_id)
        answer = await self._connection.call(self._stub.UndeleteCharacterVersion, request, timeout_s=timeout_s)
        return version_from_pb(answer.version)

    async def read_weights(self, version: CharacterVersion, *, timeout_s: float | None = WEIGHTS_TIMEOUT_S) -> bytes:
        """The safetensors file of a version, checked against its SHA-256.

        Raises NotFound, FailedPrecondition for a deleted one, ImageCorrupt.
        """
        request = pb.ReadWeightsRequest(version_id=version.version_id)
        parts = await self._connection.collect(self._stub.ReadWeights, request, timeout_s=timeout_s)
        return _whole([part.chunk for part in parts], version.weights_sha256)

    async def read_image(self, version: CharacterVersion, sha256: str, *, timeout_s: float | None = None) -> bytes:
        """A reference picture of a version, checked against its SHA-256.

        Raises NotFound, FailedPrecondition for a deleted one, ImageCorrupt.
        """
        request = pb.ReadImageRequest(version_id=version.version_id, sha256=sha256)
        parts = await self._connection.collect(self._stub.ReadImage, request, timeout_s=timeout_s)
        return _whole([part.chunk for part in parts], sha256)

    async def import_version(
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
        """Makes weights from elsewhere a character version. Importing the same again changes nothing.

        `weights` is a safetensors file or its bytes: a LoRA in diffusers', PEFT's or kohya's layout; of one that lies
        in the service's store already `weights_sha256` is enough. `adapter_config` is the text of the
        `adapter_config.json` beside a file of PEFT's, `references` are pictures of the character. Raises
        InvalidArgument (CHARACTER_WEIGHTS_UNUSABLE: `metadata["cause"]` says whether the file is damaged or belongs to
        another network), ResourceExhausted, Unavailable, and OSError for an unreadable path.
        """
        request = pb.ImportCharacterVersionRequest(
            character=job_pb2.NewCharacter(name=name, phrase=phrase, noun=noun),
            pack=pack,
            adapter_config=adapter_config,
            references=[
                await asyncio.to_thread(_bytes, each, f"references[{number}]", MOST_IMAGE_BYTES)
                for number, each in enumerate(references)
            ],
        )
        if weights is not None:
            request.weights = await asyncio.to_thread(_bytes, weights, "weights", MOST_WEIGHTS_BYTES)
        if weights_sha256:
            request.weights_sha256 = weights_sha256
        if len(request.weights) + sum(map(len, request.references)) > MOST_EXAMPLE_BYTES:
            raise _too_large("references", f"weights and pictures have more than {MOST_EXAMPLE_BYTES >> 20} MiB")
        answer = await self._connection.call(self._stub.ImportCharacterVersion, request, timeout_s=timeout_s)
        return Imported(version=version_from_pb(answer.version), is_new=answer.is_new)

    async def archive(self, version: CharacterVersion, *, timeout_s: float | None = WEIGHTS_TIMEOUT_S) -> bytes:
        """A version in one file, for `import_archive` of another installation. `timeout_s` is per call."""
        pictures = version.reference_sha256s[:MOST_REFERENCES]
        return write_archive(
            CharacterArchive(
                name=version.character.name,
                phrase=version.character.phrase,
                noun=version.character.noun,
                pack=version.pack,
                base_digest=version.base_digest,
                weights=await self.read_weights(version, timeout_s=timeout_s),
                references=tuple([await self.read_image(version, one, timeout_s=timeout_s) for one in pictures]),
            )
        )

    async def import_archive(
        self, archive: Picture, *, pack: str = "", timeout_s: float | None = IMPORT_TIMEOUT_S
    ) -> Imported:
        """Makes what `archive` wrote a version here, of the pack that it names or of another one. See `import_version`.

        Raises InvalidArgument with ARCHIVE_UNREADABLE for what is no such file, too.
        """
        payload = await asyncio.to_thread(_bytes, archive, "archive", MOST_ARCHIVE_BYTES)
        told = await asyncio.to_thread(read_archive, payload)
        return await self.import_version(
            name=told.name,
            phrase=told.phrase,
            noun=told.noun,
            weights=told.weights,
            pack=pack or told.pack,
            references=told.references,
            timeout_s=timeout_s,
        )

    @property
    def _stub(self) -> CustomizationServiceStub:
        return CustomizationServiceStub(self._connection.channel)


class AsyncJob(JobFacts):
    """One job: what was last read of it (`value`), and what can be done with it."""

    def __init__(self, connection: Connection, value: Job) -> None:
        self._connection = connection
        self._value = value

    @property
    def value(self) -> Job:
        """What was last read of it."""
        return self._value

    async def refresh(self, *, timeout_s: float | None = None) -> Job:
        """Reads it again. Raises NotFound when it was purged."""
        request = pb.GetCustomizationJobRequest(job_id=self.job_id)
        answer = await self._connection.call(self._stub.GetCustomizationJob, request, timeout_s=timeout_s)
        return self._now(answer.job)

    async def watch(self, *, after_sequence: int = 0, patience_s: float = 120.0) -> AsyncIterator[JobEvent]:
        """What happened after `after_sequence` (0: from the start), then what happens, until the job ends.

        A broken connection is taken up again where it broke: no durable event is missed or given twice. A paused job
        has not ended. Raises Unavailable once the service has not been reached for `patience_s`.
        """
        last, failures, pause = after_sequence, 0, 0.0
        lost_at = time.monotonic()  # when the service was last seen to go
        while True:
            request = pb.WatchCustomizationJobRequest(job_id=self.job_id, after_sequence=last)
            error: Unavailable | None = None
            opened_at, heard = time.monotonic(), False
            try:
                try:
                    async for message in self._connection.stream(self._stub.WatchCustomizationJob, request):
                        failures, heard = 0, True
                        event = job_event_from_pb(message.event)
                        if 0 < event.sequence <= last:
                            continue  # replayed by a service that counts differently than we asked; seen already
                        last = event.sequence or last
                        yield event
                finally:
                    # A job that waits is silent, so a stream that stood for as long as the pause before it was at the
                    # service too. Where nobody answers, a try fails at once.
                    now = time.monotonic()
                    if heard or now - opened_at >= pause:
                        lost_at = now
                # The stream's end says nothing by itself: events may follow a job's last state, and what was ended may
                # have been resumed.
                if (await self.refresh()).ended and self.value.last_sequence <= last:
                    return
            except Unavailable as caught:
                error = caught
            failures += 1
            pause = self._connection.retry.pause_s(failures, random.random())
            if time.monotonic() + pause - lost_at > patience_s:
                raise error or Unavailable("the stream of events keeps ending before the job does")
            await asyncio.sleep(pause)

    async def wait(self, *, timeout_s: float | None = None, check: bool = True) -> Job:
        """Waits until the job has ended or is paused, and reads it.

        Raises WaitTimedOut after `timeout_s` (the job goes on) and, unless `check` is False, JobFailed, JobCancelled or
        JobPaused.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if not (await self.refresh()).ended and self.state is not JobState.PAUSED:
                    async for event in self.watch(after_sequence=self.value.last_sequence):
                        if isinstance(event, JobStateChanged) and event.state is JobState.PAUSED:
                            break
                await self.refresh()
        except TimeoutError:
            raise WaitTimedOut(f"job {self.job_id} had not ended after {timeout_s:g} s; it goes on") from None
        if check and self.state is JobState.FAILED:
            raise JobFailed(self.value)
        if check and self.state is JobState.CANCELLED:
            raise JobCancelled(self.value)
        if check and self.state is JobState.PAUSED:
            raise JobPaused(self.value)
        return self.value

    async def cancel(self, *, timeout_s: float | None = None) -> Job:
        """Stops it for good; its checkpoints stay. Cancelling a job that has ended changes nothing."""
        request = pb.CancelCustomizationJobRequest(job_id=self.job_id)
        answer = await self._connection.call(self._stub.CancelCustomizationJob, request, timeout_s=timeout_s)
        return self._now(answer.job)

    async def pause(self, *, timeout_s: float | None = None) -> Job:
        """Stops it for now, within one step and its save. Raises FailedPrecondition for a job that has ended."""
        request = pb.PauseCustomizationJobRequest(job_id=self.job_id)
        answer = await self._connection.call(self._stub.PauseCustomizationJob, request, timeout_s=timeout_s)
        return self._now(answer.job)

    async def resume(self, *, timeout_s: float | None = None) -> Job:
        """Puts a paused job back into the queue, or a failed one whose checkpoint is whole."""
        request = pb.ResumeCustomizationJobRequest(job_id=self.job_id)
        answer = await self._connection.call(self._stub.ResumeCustomizationJob, request, timeout_s=timeout_s)
        return self._now(answer.job)

    async def checkpoints(self, *, timeout_s: float | None = None) -> tuple[Checkpoint, ...]:
        """What it has learned so far, oldest first. `timeout_s` is per page."""
        found: list[Checkpoint] = []
        token = ""
        while True:
            request = pb.ListCheckpointsRequest(job_id=self.job_id, page_token=token)
            answer = await self._connection.call(self._stub.ListCheckpoints, request, timeout_s=timeout_s)
            found += [checkpoint_from_pb(each) for each in answer.checkpoints]
            token = answer.next_page_token
            if not token:
                return tuple(found)

    async def publish(self, step: int = 0, *, timeout_s: float | None = FILES_TIMEOUT_S) -> CharacterVersion:
        """Makes a checkpoint (0: the suggested one) a character that frame services can draw at once."""
        request = pb.PublishCheckpointRequest(job_id=self.job_id, step=step)
        answer = await self._connection.call(self._stub.PublishCheckpoint, request, timeout_s=timeout_s)
        return version_from_pb(answer.version)

    async def delete(self, *, timeout_s: float | None = None) -> Job:
        """Deletes it, cancelling it first. It can be undeleted until `value.purged`; published versions stay."""
        request = pb.DeleteCustomizationJobRequest(job_id=self.job_id)
        answer = await self._connection.call(self._stub.DeleteCustomizationJob, request, timeout_s=timeout_s)
        return self._now(answer.job)

    async def undelete(self, *, timeout_s: float | None = None) -> Job:
        """Takes a deletion back."""
        request = pb.UndeleteCustomizationJobRequest(job_id=self.job_id)
        answer = await self._connection.call(self._stub.UndeleteCustomizationJob, request, timeout_s=timeout_s)
        return self._now(answer.job)

    async def read_image(self, sha256: str, *, timeout_s: float | None = None) -> bytes:
        """A picture of its story or of a probe, checked against its SHA-256. Raises NotFound, ImageCorrupt."""
        request = pb.ReadImageRequest(job_id=self.job_id, sha256=sha256)
        parts = await self._connection.collect(self._stub.ReadImage, request, timeout_s=timeout_s)
        return _whole([part.chunk for part in parts], sha256)

    async def read_report(self, *, timeout_s: float | None = None) -> str:
        """The page on it, HTML that stands alone: curves, probes, what to publish. Raises NotFound."""
        request = pb.ReadReportRequest(job_id=self.job_id)
        parts = await self._connection.collect(self._stub.ReadReport, request, timeout_s=timeout_s)
        return b"".join(part.chunk for part in parts).decode()

    def _now(self, message: job_pb2.CustomizationJob) -> Job:
        self._value = job_from_pb(message)
        return self._value

    @property
    def _stub(self) -> CustomizationServiceStub:
        return CustomizationServiceStub(self._connection.channel)


async def _request(wanted: Training) -> pb.CreateCustomizationJobRequest:
    frames = wanted["frames"]
    pictures = [
        await asyncio.to_thread(_bytes, frame.image, f"frames[{number}].image", MOST_IMAGE_BYTES)
        for number, frame in enumerate(frames)
    ]
    if sum(map(len, pictures)) > MOST_EXAMPLE_BYTES:
        raise _too_large("frames", f"the pictures have more than {MOST_EXAMPLE_BYTES >> 20} MiB together")
    budget = None
    if (budget_s := wanted.get("budget_s")) is not None:
        budget = Duration()
        budget.FromNanoseconds(round(budget_s * 1e9))
    return pb.CreateCustomizationJobRequest(
        character=job_pb2.NewCharacter(name=wanted["name"], phrase=wanted["phrase"], noun=wanted.get("noun", "")),
        frames=[
            job_pb2.ExampleFrame(image=picture, caption=frame.caption, description=frame.description)
            for frame, picture in zip(frames, pictures, strict=True)
        ],
        accepted_findings=wanted.get("accepted_findings", ()),
        pack=wanted.get("pack", ""),
        method=wanted.get("method", ""),
        learns=learns_to_pb(wanted.get("learns")),
        steps=wanted.get("steps"),
        budget=budget,
        rate=wanted.get("rate"),
        seed=wanted.get("seed"),
        workers=wanted.get("workers"),
    )


def _bytes(given: Picture, field: str, most_bytes: int) -> bytes:
    """What was given, or what is in the file; one that is too large is not read."""
    if isinstance(given, bytes):
        found = given
    else:
        with Path(given).open("rb") as file:
            found = file.read(most_bytes + 1)
    if len(found) > most_bytes:
        is_picture = field not in ("weights", "archive")
        reason = "IMAGE_TOO_LARGE" if is_picture else "VALUE_OUT_OF_RANGE"
        raise _too_large(field, f"{field} has more than {most_bytes} bytes", reason)
    return found


def _too_large(field: str, message: str, reason: str = "IMAGE_TOO_LARGE") -> InvalidArgument:
    """Refused here, as the service would: the transport might not even carry it."""
    return InvalidArgument(
        message,
        reason=reason,
        metadata={"field": field},
        field_violations=(FieldViolation(field, message),),
    )


def _whole(chunks: Sequence[bytes], sha256: str) -> bytes:
    found = b"".join(chunks)
    if hashlib.sha256(found).hexdigest() != sha256:
        raise ImageCorrupt(f"what was received for {sha256} has another SHA-256")
    return found
