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
from dataclasses import dataclass
from pathlib import Path

from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import job_pb2
from fabula.customization.v1.customization_service_pb2_grpc import CustomizationServiceStub
from google.protobuf.duration_pb2 import Duration

from fabula_client.calls import MOST_EXAMPLE_BYTES, MOST_IMAGE_BYTES, Connection
from fabula_client.characters import (
    CharacterVersion,
    Checked,
    Checkpoint,
    Job,
    JobCancelled,
    JobEvent,
    JobFailed,
    JobPaused,
    JobState,
    JobStateChanged,
    Learns,
    checked_from_pb,
    checkpoint_from_pb,
    job_event_from_pb,
    job_from_pb,
    learns_to_pb,
    version_from_pb,
)
from fabula_client.errors import FieldViolation, ImageCorrupt, InvalidArgument, Unavailable, WaitTimedOut

UPLOAD_TIMEOUT_S = 120.0  # of calls that bring a whole story: every picture is decoded and looked at


@dataclass(frozen=True, kw_only=True)
class ExampleFrame:
    """One frame of the example story."""

    image: bytes | str | os.PathLike[str]  # the picture, or where it is
    caption: str
    description: str = ""  # empty: the caption


class AsyncCharacters:
    """The characters of one Fabula, and the jobs that teach them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def train(
        self,
        *,
        name: str,
        phrase: str,
        frames: Sequence[ExampleFrame],
        noun: str = "",
        accepted_findings: Sequence[str] = (),
        pack: str = "",
        method: str = "",
        learns: Learns | None = None,
        steps: int | None = None,
        budget_s: float | None = None,
        rate: float | None = None,
        seed: int | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = UPLOAD_TIMEOUT_S,
    ) -> AsyncJob:
        """Has somebody new taught from one example story. Once this returns, the job is never lost.

        `phrase` says what they look like; `accepted_findings` are codes of warnings that are accepted ("*": all).
        `method` is epicevo (the default), dreambooth, custom-diffusion, textual-inversion or lora. Give `steps`, or
        `budget_s` of training time to fit them into, or neither. `idempotency_key` names this request: the same key
        with the same body gives the same job. Raises InvalidArgument (EXAMPLE_STORY_REFUSED: `field_violations` say
        what is wrong with which frame), IdempotencyKeyReused, ResourceExhausted, Unavailable, and OSError for an
        unreadable path.
        """
        request = await _request(
            name, phrase, frames, noun, accepted_findings, pack, method, learns, steps, budget_s, rate, seed
        )
        request.request_id = idempotency_key or str(uuid.uuid4())
        answer = await self._connection.call(self._stub.CreateCustomizationJob, request, timeout_s=timeout_s)
        return AsyncJob(self._connection, job_from_pb(answer.job))

    async def check(
        self,
        *,
        name: str,
        phrase: str,
        frames: Sequence[ExampleFrame],
        noun: str = "",
        accepted_findings: Sequence[str] = (),
        pack: str = "",
        method: str = "",
        learns: Learns | None = None,
        steps: int | None = None,
        budget_s: float | None = None,
        rate: float | None = None,
        seed: int | None = None,
        timeout_s: float | None = UPLOAD_TIMEOUT_S,
    ) -> Checked:
        """What is wrong with an example story, and what a job would cost. Makes nothing. See `train`."""
        request = await _request(
            name, phrase, frames, noun, accepted_findings, pack, method, learns, steps, budget_s, rate, seed
        )
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
        self, *, name: str = "", page_size: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[CharacterVersion]:
        """Published versions, newest first: everybody's, or of one name."""
        token = ""
        while True:
            request = pb.ListCharacterVersionsRequest(page_size=page_size, page_token=token, name=name)
            answer = await self._connection.call(self._stub.ListCharacterVersions, request, timeout_s=timeout_s)
            for version in answer.versions:
                yield version_from_pb(version)
            token = answer.next_page_token
            if not token:
                return

    async def read_weights(self, version: CharacterVersion, *, timeout_s: float | None = UPLOAD_TIMEOUT_S) -> bytes:
        """The safetensors file of a version, checked against its SHA-256. Raises NotFound, ImageCorrupt."""
        request = pb.ReadWeightsRequest(version_id=version.version_id)
        parts = await self._connection.collect(self._stub.ReadWeights, request, timeout_s=timeout_s)
        return _whole([part.chunk for part in parts], version.weights_sha256)

    @property
    def _stub(self) -> CustomizationServiceStub:
        return CustomizationServiceStub(self._connection.channel)


class AsyncJob:
    """One job: what was last read of it (`value`), and what can be done with it."""

    def __init__(self, connection: Connection, value: Job) -> None:
        self._connection = connection
        self.value = value

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.job_id} {self.state}>"

    @property
    def job_id(self) -> str:
        """Its id."""
        return self.value.job_id

    @property
    def state(self) -> JobState:
        """Its state when it was last read."""
        return self.value.state

    async def refresh(self, *, timeout_s: float | None = None) -> Job:
        """Reads it again. Raises NotFound when it was purged."""
        request = pb.GetCustomizationJobRequest(job_id=self.job_id)
        answer = await self._connection.call(self._stub.GetCustomizationJob, request, timeout_s=timeout_s)
        self.value = job_from_pb(answer.job)
        return self.value

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

    async def publish(self, step: int = 0, *, timeout_s: float | None = None) -> CharacterVersion:
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

    def _now(self, message: job_pb2.CustomizationJob) -> Job:
        self.value = job_from_pb(message)
        return self.value

    @property
    def _stub(self) -> CustomizationServiceStub:
        return CustomizationServiceStub(self._connection.channel)


async def _request(
    name: str,
    phrase: str,
    frames: Sequence[ExampleFrame],
    noun: str,
    accepted_findings: Sequence[str],
    pack: str,
    method: str,
    learns: Learns | None,
    steps: int | None,
    budget_s: float | None,
    rate: float | None,
    seed: int | None,
) -> pb.CreateCustomizationJobRequest:
    pictures = [await asyncio.to_thread(_read, frame, number) for number, frame in enumerate(frames)]
    if sum(map(len, pictures)) > MOST_EXAMPLE_BYTES:
        raise _too_large("frames", f"the pictures have more than {MOST_EXAMPLE_BYTES >> 20} MiB together")
    budget = None
    if budget_s is not None:
        budget = Duration()
        budget.FromNanoseconds(round(budget_s * 1e9))
    return pb.CreateCustomizationJobRequest(
        character=job_pb2.NewCharacter(name=name, phrase=phrase, noun=noun),
        frames=[
            job_pb2.ExampleFrame(image=picture, caption=frame.caption, description=frame.description)
            for frame, picture in zip(frames, pictures, strict=True)
        ],
        accepted_findings=accepted_findings,
        pack=pack,
        method=method,
        learns=learns_to_pb(learns),
        steps=steps,
        budget=budget,
        rate=rate,
        seed=seed,
    )


def _read(frame: ExampleFrame, number: int) -> bytes:
    """A picture's bytes; a file that is too large is not read."""
    if isinstance(frame.image, bytes):
        picture = frame.image
    else:
        with Path(frame.image).open("rb") as file:
            picture = file.read(MOST_IMAGE_BYTES + 1)
    if len(picture) > MOST_IMAGE_BYTES:
        field = f"frames[{number}].image"
        raise _too_large(field, f"the picture has more than {MOST_IMAGE_BYTES} bytes")
    return picture


def _too_large(field: str, message: str) -> InvalidArgument:
    """Refused here, as the service would: the transport might not even carry it."""
    return InvalidArgument(
        message,
        reason="IMAGE_TOO_LARGE",
        metadata={"field": field},
        field_violations=(FieldViolation(field, message),),
    )


def _whole(chunks: Sequence[bytes], sha256: str) -> bytes:
    found = b"".join(chunks)
    if hashlib.sha256(found).hexdigest() != sha256:
        raise ImageCorrupt(f"what was received for {sha256} has another SHA-256")
    return found
