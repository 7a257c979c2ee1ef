"""Customization as the public edge answers it: checks and cleans what was uploaded, and asks the customization service.

The service's own requests and answers pass through here as they are, over gRPC and, in JSON, over HTTP. What the edge
adds is what no service behind it shall do: pictures from outside are decoded in the sandbox, and go on as plain PNGs.
And who was deleted is put out of the frame service's memory, of which the customization service knows nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import structlog
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import customization_service_pb2_grpc as pb_grpc
from fabula.customization.v1 import job_pb2

from services.runtime.call import Call, calling, current_call
from services.runtime.channel import ServiceChannel
from services.runtime.errors import (
    DeadlineExceeded,
    FabulaError,
    ImageTooLarge,
    ImageUnreadable,
    InvalidArgument,
    Unavailable,
    ValueOutOfRange,
)
from services.story.intake import MOST_IMAGE_BYTES, check_request_id
from services.story.sandbox import Sandbox

MOST_UPLOAD_BYTES = 48 * 1024 * 1024  # of one story's pictures together
MOST_MESSAGE_BYTES = MOST_UPLOAD_BYTES + 4 * 1024 * 1024  # the pictures, and room for the rest
MOST_EXAMPLE_FRAMES = 20
MOST_WEIGHTS_BYTES = 40 * 1024 * 1024  # of an import
MOST_REFERENCES = 8  # pictures of an import
CALL_TIMEOUT_S = 60.0  # a story is looked over and laid out within it
IMPORT_TIMEOUT_S = 320.0  # the service reads a whole pack for it, after those who came before
FILES_TIMEOUT_S = 320.0  # the service moves a whole network, gigabytes of it, after those who came before
READ_WEIGHTS_S = 3600.0  # the same over somebody's line
TIMEOUTS_S = {
    "ImportCharacterVersion": IMPORT_TIMEOUT_S,
    "PublishCheckpoint": FILES_TIMEOUT_S,
    "DeleteCharacterVersion": FILES_TIMEOUT_S,
    "UndeleteCharacterVersion": FILES_TIMEOUT_S,
    "ReadWeights": READ_WEIGHTS_S,
}
VERSIONS_PAGE = 200
WATCH_S = 3600.0  # of one stream; whoever follows a job takes it up again

log = structlog.get_logger("fabula.story.customization")


class Customizations:
    """The operations on customization jobs. Every method raises FabulaError."""

    def __init__(
        self,
        channel: ServiceChannel,
        sandbox: Sandbox,
        *,
        unload: Callable[[str], Awaitable[None]],
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        """`unload` puts weights, by their digest, out of the frame service's memory. It may raise FabulaError."""
        self._channel = channel
        self._unload = unload
        self._sandbox = sandbox
        self._timeout_s = timeout_s
        self._stub = pb_grpc.CustomizationServiceStub(channel.grpc_channel)
        self._deleting: set[asyncio.Task[pb.DeleteCharacterVersionResponse]] = set()  # asyncio itself keeps none

    async def create(self, request: pb.CreateCustomizationJobRequest) -> pb.CreateCustomizationJobResponse:
        """Checks a story and accepts a job. A picture that cannot be decoded goes on as none, for the checks to say."""
        check_request_id(request.request_id)
        if len(request.frames) > MOST_EXAMPLE_FRAMES:
            raise ValueOutOfRange(
                f"the example story has {len(request.frames)} frames; at most {MOST_EXAMPLE_FRAMES} are taken",
                field="frames",
                metadata={"most": str(MOST_EXAMPLE_FRAMES)},
            )
        if sum(len(frame.image) for frame in request.frames) > MOST_UPLOAD_BYTES:
            raise ImageTooLarge(
                f"the pictures have more than {MOST_UPLOAD_BYTES >> 20} MiB together",
                field="frames",
                metadata={"limit_bytes": str(MOST_UPLOAD_BYTES)},
            )
        clean = pb.CreateCustomizationJobRequest()
        clean.CopyFrom(request)
        for number, frame in enumerate(clean.frames):
            frame.image = await self._cleaned(frame.image, f"frames[{number}].image")
        created: pb.CreateCustomizationJobResponse = await self.ask("CreateCustomizationJob", clean)
        return created

    async def _cleaned(self, image: bytes, field: str) -> bytes:
        try:
            return await self._decoded(image, field) if image else b""
        except ImageUnreadable:
            return b""  # one finding among others, which name the frame and say how to mend it

    async def _decoded(self, image: bytes, field: str) -> bytes:
        """The picture as a plain PNG. Raises ImageTooLarge, ImageTooSmall, ImageUnreadable with its field."""
        if len(image) > MOST_IMAGE_BYTES:
            raise ImageTooLarge(
                f"{field} has {len(image)} bytes; at most {MOST_IMAGE_BYTES} are taken",
                field=field,
                metadata={"limit_bytes": str(MOST_IMAGE_BYTES)},
            )
        try:
            return (await self._sandbox.decode(image)).png
        except InvalidArgument as error:
            raise type(error)(f"{field}: {error.message}", field=field) from None

    async def import_version(self, request: pb.ImportCharacterVersionRequest) -> pb.ImportCharacterVersionResponse:
        """Has weights from elsewhere become a version. What is in them the service reads, and not the edge."""
        if len(request.weights) > MOST_WEIGHTS_BYTES:
            raise ValueOutOfRange(
                f"the weights have {len(request.weights)} bytes; at most {MOST_WEIGHTS_BYTES} are taken",
                field="weights",
                metadata={"limit_bytes": str(MOST_WEIGHTS_BYTES)},
            )
        if len(request.references) > MOST_REFERENCES:
            raise ValueOutOfRange(
                f"there are {len(request.references)} pictures; at most {MOST_REFERENCES} are taken",
                field="references",
                metadata={"most": str(MOST_REFERENCES)},
            )
        if len(request.weights) + sum(map(len, request.references)) > MOST_UPLOAD_BYTES:
            raise ImageTooLarge(
                f"weights and pictures have more than {MOST_UPLOAD_BYTES >> 20} MiB together",
                field="references",
                metadata={"limit_bytes": str(MOST_UPLOAD_BYTES)},
            )
        clean = pb.ImportCharacterVersionRequest()
        clean.CopyFrom(request)
        for number, image in enumerate(request.references):
            clean.references[number] = await self._decoded(image, f"references[{number}]")
        imported: pb.ImportCharacterVersionResponse = await self.ask("ImportCharacterVersion", clean)
        return imported

    async def delete_version(self, request: pb.DeleteCharacterVersionRequest) -> pb.DeleteCharacterVersionResponse:
        """Deletes a version, and has the frame replica that answers forget it, if it can be reached.

        Others draw it until they need its room, or start again. Weights that another version has, too, are read again
        when somebody asks for them.
        """
        # In a task without the caller's deadline: one who hangs up keeps no replica from forgetting what is deleted.
        task = asyncio.create_task(self._delete_version(request))
        self._deleting.add(task)
        task.add_done_callback(self._deleting.discard)
        return await asyncio.shield(task)

    async def _delete_version(self, request: pb.DeleteCharacterVersionRequest) -> pb.DeleteCharacterVersionResponse:
        with calling(replace(current_call() or Call(), deadline_s=None)):
            try:
                deleted: pb.DeleteCharacterVersionResponse = await self.ask("DeleteCharacterVersion", request)
            except (DeadlineExceeded, Unavailable):
                await self._forget_if_deleted(request.version_id)  # for all that is known it is
                raise
            await self._forget(deleted.version)
        return deleted

    async def _forget_if_deleted(self, version_id: str) -> None:
        try:
            async with aclosing(self.versions(show_deleted=True)) as every:
                async for version in every:
                    if version.version_id == version_id and version.HasField("delete_time"):
                        return await self._forget(version)
        except FabulaError as error:
            log.info("not_unloaded", version_id=version_id[:64], reason=error.reason)

    async def _forget(self, version: job_pb2.CharacterVersion) -> None:
        try:
            await self._unload(version.weights_sha256)
        except FabulaError as error:  # it is deleted all the same
            log.info("not_unloaded", version_id=version.version_id, reason=error.reason)

    async def ask(self, method: str, request: Any) -> Any:
        """The service's answer to any other unary method, by its name in the proto."""
        return await self._channel.call(getattr(self._stub, method), request, timeout_s=self._limit_s(method))

    def _limit_s(self, method: str) -> float:
        return TIMEOUTS_S.get(method, self._timeout_s)

    async def versions(
        self, *, name: str = "", show_deleted: bool = False
    ) -> AsyncGenerator[job_pb2.CharacterVersion, None]:
        """Published characters, newest first; only those of a name where one is given, and deleted ones on request."""
        token = ""
        while True:
            page = await self.ask(
                "ListCharacterVersions",
                pb.ListCharacterVersionsRequest(
                    page_size=VERSIONS_PAGE, page_token=token, name=name, show_deleted=show_deleted
                ),
            )
            for version in page.versions:
                yield version
            if not (token := page.next_page_token):
                return

    async def watch(
        self, request: pb.WatchCustomizationJobRequest
    ) -> AsyncGenerator[pb.WatchCustomizationJobResponse, None]:
        """A job's events. Ends when the job does, and after an hour: take it up again after the last sequence."""
        stream = self._channel.stream(self._stub.WatchCustomizationJob, request, timeout_s=WATCH_S)
        async with aclosing(stream) as messages:  # type: ignore[type-var]  # an async generator, by construction
            try:
                async for message in messages:
                    if message.HasField("event"):  # an empty message closes a failed stream; its status follows
                        yield message
            except DeadlineExceeded:
                return

    async def read(self, method: str, request: Any) -> AsyncGenerator[bytes, None]:
        """The chunks of ReadImage, ReadReport or ReadWeights."""
        stream = self._channel.stream(getattr(self._stub, method), request, timeout_s=self._limit_s(method))
        async with aclosing(stream) as messages:  # type: ignore[type-var]  # an async generator, by construction
            async for message in messages:
                if message.chunk:  # as above
                    yield message.chunk
