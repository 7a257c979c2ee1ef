"""Customization over HTTP: `/v1/customization-jobs…` and `/v1/character-versions…`, events as SSE."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Annotated, Any

from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import job_pb2
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from services.runtime.errors import CharacterVersionNotFound, FabulaError, ImageNotFound, InvalidArgument
from services.story.customization import MOST_UPLOAD_BYTES, Customizations
from services.story.customization_documents import (
    CharacterVersionDocument,
    CharacterVersionListDocument,
    CheckpointListDocument,
    CreateCustomizationJobBody,
    CreatedJobDocument,
    CustomizationEventDocument,
    CustomizationJobDocument,
    CustomizationJobListDocument,
    ImportCharacterVersionBody,
    PublishBody,
    checkpoint_document,
    created_document,
    event_document,
    job_document,
    read_create_body,
    read_import_body,
    read_publish_body,
    version_document,
)
from services.story.documents import problem

JOBS = "/v1/customization-jobs"
VERSIONS = "/v1/character-versions"
IMPORT = f"{VERSIONS}:import"
UPLOADS = (JOBS, IMPORT)  # whose bodies may be so large:
MOST_BODY_BYTES = MOST_UPLOAD_BYTES * 4 // 3 + 1024 * 1024  # what was uploaded in base64, and room for the rest
BODIES = (  # that no route's signature mentions
    CreateCustomizationJobBody,
    CustomizationEventDocument,
    ImportCharacterVersionBody,
    PublishBody,
)
RETRY_MS = 1000  # how long a browser's EventSource waits before it connects again
_ENDED = (
    job_pb2.CustomizationJob.STATE_CANCELLED,
    job_pb2.CustomizationJob.STATE_FAILED,
    job_pb2.CustomizationJob.STATE_SUCCEEDED,
)


def add_customization(app: FastAPI, customizations: Customizations, *, heartbeat_s: float) -> None:
    """Adds the routes."""
    _add_jobs(app, customizations)
    _add_wishes(app, customizations)
    _add_events(app, customizations, heartbeat_s)
    _add_versions(app, customizations)


def _body(model: str, *, required: bool = True) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}}}
    return {"requestBody": {"required": required, "content": content}}


def _check_json(request: Request) -> None:
    """Raises InvalidArgument: a form that some web page sends is no request of ours."""
    if request.headers.get("content-type", "").split(";", 1)[0].strip().lower() != "application/json":
        raise InvalidArgument("send application/json", field="content-type")


def _add_jobs(app: FastAPI, customizations: Customizations) -> None:
    @app.post(
        JOBS,
        status_code=201,
        response_model=CreatedJobDocument,
        responses={200: {"model": CreatedJobDocument, "description": "What the checks found; nothing was made."}},
        openapi_extra=_body("CreateCustomizationJobBody"),
    )
    async def create_customization_job(
        request: Request,
        response: Response,
        idempotency_key: Annotated[
            str, Header(description="Names this request: the same key and body answer with the same job.")
        ] = "",
    ) -> CreatedJobDocument:
        """Checks an example story and accepts a job. Once this returns, the job is never lost."""
        _check_json(request)
        created = await customizations.create(read_create_body(await request.body(), idempotency_key))
        if created.HasField("job"):
            response.headers["location"] = f"{JOBS}/{created.job.job_id}"
        else:
            response.status_code = 200
        return created_document(created)

    @app.get(JOBS, response_model=CustomizationJobListDocument)
    async def list_customization_jobs(
        page_size: Annotated[
            int, Query(ge=0, lt=1 << 32, description="0 means 50; more than 200 is taken as 200.")
        ] = 0,
        page_token: Annotated[str, Query(description="next_page_token of the page before.")] = "",
        show_deleted: Annotated[bool, Query(description="Deleted jobs that are not yet purged, too.")] = False,
    ) -> CustomizationJobListDocument:
        """Lists jobs, newest first, without findings and versions."""
        found = await customizations.ask(
            "ListCustomizationJobs",
            pb.ListCustomizationJobsRequest(page_size=page_size, page_token=page_token, show_deleted=show_deleted),
        )
        return CustomizationJobListDocument(
            jobs=[job_document(job) for job in found.jobs], next_page_token=found.next_page_token
        )

    @app.get(f"{JOBS}/{{job_id}}", response_model=CustomizationJobDocument)
    async def get_customization_job(job_id: str) -> CustomizationJobDocument:
        """Reads a job as it stands."""
        return await _job(customizations, "GetCustomizationJob", pb.GetCustomizationJobRequest(job_id=job_id))

    @app.delete(f"{JOBS}/{{job_id}}", response_model=CustomizationJobDocument)
    async def delete_customization_job(job_id: str) -> CustomizationJobDocument:
        """Deletes a job; it is cancelled first if it still runs. Until `purge_time` it can be undeleted."""
        return await _job(customizations, "DeleteCustomizationJob", pb.DeleteCustomizationJobRequest(job_id=job_id))

    @app.get(f"{JOBS}/{{job_id}}/checkpoints", response_model=CheckpointListDocument)
    async def list_checkpoints(
        job_id: str,
        page_size: Annotated[
            int, Query(ge=0, lt=1 << 32, description="0 means 50; more than 200 is taken as 200.")
        ] = 0,
        page_token: Annotated[str, Query(description="next_page_token of the page before.")] = "",
    ) -> CheckpointListDocument:
        """Lists what a job has learned so far, oldest first."""
        found = await customizations.ask(
            "ListCheckpoints",
            pb.ListCheckpointsRequest(job_id=job_id, page_size=page_size, page_token=page_token),
        )
        return CheckpointListDocument(
            checkpoints=[checkpoint_document(each) for each in found.checkpoints],
            next_page_token=found.next_page_token,
        )

    @app.get(
        f"{JOBS}/{{job_id}}/images/{{sha256}}",
        response_class=Response,
        responses={200: {"description": "The picture.", "content": {"image/png": {}}}},
    )
    async def read_customization_image(job_id: str, sha256: str) -> Response:
        """Reads a picture of a job: of its example story, or of a probe. It never changes."""
        return await _image(customizations, pb.ReadImageRequest(job_id=job_id, sha256=sha256))

    @app.get(
        f"{JOBS}/{{job_id}}/report",
        response_class=Response,
        responses={200: {"description": "An HTML document that stands alone.", "content": {"text/html": {}}}},
    )
    async def read_customization_report(job_id: str) -> Response:
        """Reads the page on a job. Of a job that has ended it is the page that was kept then."""
        request = pb.ReadReportRequest(job_id=job_id)
        page = b"".join([chunk async for chunk in customizations.read("ReadReport", request)])
        headers = {
            # As the page says of itself: it loads nothing and runs nothing.
            "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox",
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
        }
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


async def _image(customizations: Customizations, request: pb.ReadImageRequest) -> Response:
    image = b"".join([chunk async for chunk in customizations.read("ReadImage", request)])
    if not image:
        raise ImageNotFound(metadata={"sha256": request.sha256[:100]})
    headers = {
        "etag": f'"{request.sha256}"',
        "cache-control": "private, max-age=31536000, immutable",
        "x-content-type-options": "nosniff",
    }
    return Response(image, media_type="image/png", headers=headers)


def _add_wishes(app: FastAPI, customizations: Customizations) -> None:
    @app.post(f"{JOBS}/{{job_id}}:cancel", response_model=CustomizationJobDocument)
    async def cancel_customization_job(job_id: str) -> CustomizationJobDocument:
        """Stops a job for good, within one step and its save. Its checkpoints stay."""
        return await _job(customizations, "CancelCustomizationJob", pb.CancelCustomizationJobRequest(job_id=job_id))

    @app.post(f"{JOBS}/{{job_id}}:pause", response_model=CustomizationJobDocument)
    async def pause_customization_job(job_id: str) -> CustomizationJobDocument:
        """Stops a job for now, within one step and its save."""
        return await _job(customizations, "PauseCustomizationJob", pb.PauseCustomizationJobRequest(job_id=job_id))

    @app.post(f"{JOBS}/{{job_id}}:resume", response_model=CustomizationJobDocument)
    async def resume_customization_job(job_id: str) -> CustomizationJobDocument:
        """Puts a paused job back into the queue, or a failed one whose checkpoint is whole."""
        return await _job(customizations, "ResumeCustomizationJob", pb.ResumeCustomizationJobRequest(job_id=job_id))

    @app.post(f"{JOBS}/{{job_id}}:undelete", response_model=CustomizationJobDocument)
    async def undelete_customization_job(job_id: str) -> CustomizationJobDocument:
        """Takes a deletion back."""
        request = pb.UndeleteCustomizationJobRequest(job_id=job_id)
        return await _job(customizations, "UndeleteCustomizationJob", request)

    @app.post(
        f"{JOBS}/{{job_id}}:publish",
        response_model=CharacterVersionDocument,
        openapi_extra=_body("PublishBody", required=False),
    )
    async def publish_checkpoint(job_id: str, request: Request) -> CharacterVersionDocument:
        """Makes a checkpoint a character version that frame services can draw at once."""
        step = read_publish_body(await request.body())
        found = await customizations.ask("PublishCheckpoint", pb.PublishCheckpointRequest(job_id=job_id, step=step))
        return version_document(found.version)


async def _job(customizations: Customizations, method: str, request: Any) -> CustomizationJobDocument:
    return job_document((await customizations.ask(method, request)).job)


def _add_events(app: FastAPI, customizations: Customizations, heartbeat_s: float) -> None:
    @app.get(
        f"{JOBS}/{{job_id}}/events",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Server-sent events; each one's data is an event document, its id the sequence.",
                "content": {
                    "text/event-stream": {"schema": {"$ref": "#/components/schemas/CustomizationEventDocument"}}
                },
            },
            204: {"description": "The job has ended and every event was seen."},
        },
    )
    async def watch_customization_job(
        job_id: str,
        after_sequence: Annotated[int, Query(ge=0, lt=1 << 63, description="Only durable events above this one.")] = 0,
        last_event_id: Annotated[str, Header(description="The same, as browsers send it.")] = "",
    ) -> Response:
        """Follows a job: durable events after a sequence number, then what happens, until it ends."""
        after = after_sequence
        if last_event_id:
            if not last_event_id.isdecimal() or len(last_event_id) > 18:
                raise InvalidArgument("Last-Event-ID is the id of an event of this stream", field="last-event-id")
            after = max(after, int(last_event_id))
        job = (await customizations.ask("GetCustomizationJob", pb.GetCustomizationJobRequest(job_id=job_id))).job
        if job.state in _ENDED and after >= job.last_sequence:
            return Response(status_code=204)  # tells EventSource not to connect again
        return StreamingResponse(
            _sse(lambda: customizations.watch(_watch(job_id, after)), heartbeat_s),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )


def _watch(job_id: str, after: int) -> pb.WatchCustomizationJobRequest:
    return pb.WatchCustomizationJobRequest(job_id=job_id, after_sequence=after)


async def _sse(watch: Callable[[], AsyncGenerator[Any, None]], heartbeat_s: float) -> AsyncIterator[str]:
    """The event stream. A heartbeat comment keeps it open; an error is its last event."""
    yield f"retry: {RETRY_MS}\n\n"
    async with aclosing(watch()) as messages:
        pending: asyncio.Task[Any] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(messages))
                done, _ = await asyncio.wait({pending}, timeout=heartbeat_s)
                if not done:
                    yield ": heartbeat\n\n"
                    continue
                message, pending = pending.result(), None
                yield _sse_event(message.event)
        except StopAsyncIteration:
            return
        except FabulaError as error:
            yield f"event: problem\ndata: {problem(error).model_dump_json()}\n\n"
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)


def _sse_event(event: job_pb2.CustomizationEvent) -> str:
    kind, document = event_document(event)
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    # Passing events carry no id, so that a browser's Last-Event-ID stays at the last durable one.
    identity = f"id: {event.sequence}\n" if event.sequence else ""
    return f"{identity}event: {kind}\ndata: {data}\n\n"


def _add_versions(app: FastAPI, customizations: Customizations) -> None:
    @app.get(VERSIONS, response_model=CharacterVersionListDocument)
    async def list_character_versions(
        page_size: Annotated[
            int, Query(ge=0, lt=1 << 32, description="0 means 50; more than 200 is taken as 200.")
        ] = 0,
        page_token: Annotated[str, Query(description="next_page_token of the page before.")] = "",
        name: Annotated[str, Query(description="Only versions of this name.")] = "",
        show_deleted: Annotated[bool, Query(description="Deleted versions that are not yet purged, too.")] = False,
    ) -> CharacterVersionListDocument:
        """Lists character versions, newest first."""
        found = await customizations.ask(
            "ListCharacterVersions",
            pb.ListCharacterVersionsRequest(
                page_size=page_size, page_token=page_token, name=name, show_deleted=show_deleted
            ),
        )
        return CharacterVersionListDocument(
            versions=[version_document(each) for each in found.versions], next_page_token=found.next_page_token
        )

    @app.post(
        IMPORT,
        status_code=201,
        response_model=CharacterVersionDocument,
        responses={200: {"model": CharacterVersionDocument, "description": "It was there before."}},
        openapi_extra=_body("ImportCharacterVersionBody"),
    )
    async def import_character_version(request: Request, response: Response) -> CharacterVersionDocument:
        """Makes weights from elsewhere a character version. Equal content gives the same version."""
        _check_json(request)
        imported = await customizations.import_version(read_import_body(await request.body()))
        if not imported.is_new:
            response.status_code = 200
        return version_document(imported.version)

    @app.delete(f"{VERSIONS}/{{version_id}}", response_model=CharacterVersionDocument)
    async def delete_character_version(version_id: str) -> CharacterVersionDocument:
        """Deletes a version: nothing new is drawn with it. Until `purge_time` it can be undeleted."""
        deleted = await customizations.delete_version(pb.DeleteCharacterVersionRequest(version_id=version_id))
        return version_document(deleted.version)

    @app.post(f"{VERSIONS}/{{version_id}}:undelete", response_model=CharacterVersionDocument)
    async def undelete_character_version(version_id: str) -> CharacterVersionDocument:
        """Takes a deletion back: the version can be drawn at once."""
        request = pb.UndeleteCharacterVersionRequest(version_id=version_id)
        return version_document((await customizations.ask("UndeleteCharacterVersion", request)).version)

    @app.get(
        f"{VERSIONS}/{{version_id}}/images/{{sha256}}",
        response_class=Response,
        responses={200: {"description": "The picture.", "content": {"image/png": {}}}},
    )
    async def read_character_image(version_id: str, sha256: str) -> Response:
        """Reads a reference picture of a version. It never changes."""
        return await _image(customizations, pb.ReadImageRequest(version_id=version_id, sha256=sha256))

    @app.get(
        f"{VERSIONS}/{{version_id}}/weights",
        response_class=StreamingResponse,
        responses={200: {"description": "A safetensors file.", "content": {"application/octet-stream": {}}}},
    )
    async def read_weights(version_id: str) -> Response:
        """Reads the weights of a version that is not deleted. They never change."""
        chunks = customizations.read("ReadWeights", pb.ReadWeightsRequest(version_id=version_id))
        try:
            first = await anext(chunks)  # what is refused is refused with a status, and not in the middle of a file
        except StopAsyncIteration:
            raise CharacterVersionNotFound(metadata={"version_id": version_id[:100]}) from None

        async def rest() -> AsyncIterator[bytes]:
            async with aclosing(chunks) as following:
                yield first
                async for chunk in following:
                    yield chunk

        headers = {"cache-control": "private, max-age=31536000, immutable", "x-content-type-options": "nosniff"}
        return StreamingResponse(rest(), media_type="application/octet-stream", headers=headers)
