"""The public API over HTTP: `/v1/…`, events as SSE, OpenAPI, health and metrics.

The edge has no login, so two checks stand between it and web pages that the user happens to visit: the Host header
must name this edge (a rebound DNS name does not), and a request with an Origin must come from this edge or an allowed
origin.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any

import structlog
from fastapi import FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.runtime.call import call_from_headers, calling
from services.runtime.errors import (
    FabulaError,
    FieldViolation,
    HostNotAllowed,
    ImageTooLarge,
    Internal,
    InvalidArgument,
    NotFound,
    OriginNotAllowed,
    QueueFull,
    Unimplemented,
)
from services.runtime.telemetry import metrics_page
from services.story.api import MOST_CALLS, StoryApi
from services.story.config import StorySettings
from services.story.customization import Customizations
from services.story.customization_http import BODIES, UPLOADS, add_customization
from services.story.customization_http import MOST_BODY_BYTES as MOST_UPLOAD_BYTES
from services.story.documents import (
    BackendListDocument,
    CreateStoryBody,
    CreateStoryForm,
    EditFrameBody,
    EventDocument,
    HealthDocument,
    InsertFrameBody,
    ProblemDocument,
    StoryDocument,
    StoryListDocument,
    backends_document,
    event_document,
    problem,
    read_edit_body,
    read_form,
    read_insert_body,
    read_json_body,
    story_document,
)
from services.story.intake import MOST_IMAGE_BYTES
from services.story.metrics import REQUEST_SECONDS
from services.story.records import Event, kind_of

MOST_BODY_BYTES = MOST_IMAGE_BYTES * 4 // 3 + 256 * 1024  # the picture in base64, and room for the rest
PROBES = ("/livez", "/readyz", "/healthz", "/metrics")  # asked by address, not by name
MOST_INDEX = 2**31 - 1  # the largest that the database can be asked for
PROBLEM_TYPE = "application/problem+json"
RETRY_MS = 1000  # how long a browser's EventSource waits before it connects again

log = structlog.get_logger("fabula.story.http")

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What went wrong.",
        "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
    }
}


def http_app(
    api: StoryApi,
    settings: StorySettings,
    ready: Callable[[], Awaitable[None]],
    customizations: Customizations | None = None,
) -> FastAPI:
    """The ASGI application. `ready` raises FabulaError while the process is not ready."""
    app = FastAPI(
        title="Fabula",
        version="1",
        summary="Continues a story from one picture and one sentence.",
        docs_url=None,  # the bundled page would load its scripts from elsewhere
        redoc_url=None,
        responses=_PROBLEMS,
        openapi_url="/openapi.json",
    )
    _add_errors(app)
    _add_stories(app, api, settings)
    _add_backends(app, api)
    if customizations is not None:
        add_customization(app, customizations, heartbeat_s=settings.heartbeat_s)
    _add_operations(app, ready)
    _complete_openapi(app)
    if settings.origins():
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins()),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["content-type", "idempotency-key", "last-event-id", "traceparent", "x-request-id"],
            expose_headers=["location", "retry-after", "x-request-id"],
        )
    app.add_middleware(EdgeMiddleware, settings=settings)
    return app


def _add_stories(app: FastAPI, api: StoryApi, settings: StorySettings) -> None:
    @app.post(
        "/v1/stories",
        status_code=201,
        response_model=StoryDocument,
        responses={200: {"model": StoryDocument, "description": "The story an earlier call with this key made."}},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/CreateStoryBody"}},
                    "multipart/form-data": {"schema": {"$ref": "#/components/schemas/CreateStoryForm"}},
                },
            }
        },
    )
    async def create_story(
        request: Request,
        response: Response,
        idempotency_key: Annotated[
            str, Header(description="Names this request: the same key and body answer with the same story.")
        ] = "",
    ) -> StoryDocument:
        """Accepts a story. Once this returns, the story is never lost."""
        kind = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
        if kind == "application/json":
            wanted = read_json_body(await request.body(), idempotency_key)
        elif kind == "multipart/form-data":
            fields, image = await _form(request)
            wanted = read_form(fields, image, idempotency_key)
        else:
            raise InvalidArgument("send application/json or multipart/form-data", field="content-type")
        story, is_new = await api.create(wanted)
        response.status_code = 201 if is_new else 200
        response.headers["location"] = f"/v1/stories/{story.story_id}"
        return story_document(story)

    @app.get("/v1/stories", response_model=StoryListDocument)
    async def list_stories(
        page_size: Annotated[int, Query(ge=0, description="0 means 50; more than 200 is taken as 200.")] = 0,
        page_token: Annotated[str, Query(description="next_page_token of the page before.")] = "",
    ) -> StoryListDocument:
        """Lists stories, newest first, without frames."""
        page = await api.list(page_size=page_size, page_token=page_token)
        return StoryListDocument(
            stories=[story_document(story) for story in page.stories], next_page_token=page.next_page_token
        )

    @app.get("/v1/stories/{story_id}", response_model=StoryDocument)
    async def get_story(story_id: str) -> StoryDocument:
        """Reads a story as it stands."""
        return story_document(await api.get(story_id))

    @app.delete("/v1/stories/{story_id}", status_code=204)
    async def delete_story(story_id: str) -> None:
        """Deletes a story; it is cancelled first if it still runs."""
        await api.delete(story_id)

    @app.post("/v1/stories/{story_id}:cancel", response_model=StoryDocument)
    async def cancel_story(story_id: str) -> StoryDocument:
        """Stops a story. Finished frames stay. Cancelling a finished story changes nothing."""
        return story_document(await api.cancel(story_id))

    @app.post(
        "/v1/stories/{story_id}/frames/{index}:edit", response_model=StoryDocument, openapi_extra=_body("EditFrameBody")
    )
    async def edit_frame(
        story_id: str,
        index: Annotated[int, Path(ge=0, le=MOST_INDEX)],
        request: Request,
        idempotency_key: Annotated[str, Header(description="Names this request, as in create_story.")] = "",
    ) -> StoryDocument:
        """Draws a frame of a story that has ended again, made of its own picture. The old version is kept."""
        wanted = read_edit_body(await request.body(), story_id, index, idempotency_key)
        return story_document(await api.edit_frame(wanted))

    @app.post(
        "/v1/stories/{story_id}/frames/{index}:insertAfter",
        response_model=StoryDocument,
        openapi_extra=_body("InsertFrameBody"),
    )
    async def insert_frame(
        story_id: str,
        index: Annotated[int, Path(ge=0, le=MOST_INDEX)],
        request: Request,
        idempotency_key: Annotated[str, Header(description="Names this request, as in create_story.")] = "",
    ) -> StoryDocument:
        """Puts a new frame between this one and the next, of a story that has ended."""
        wanted = read_insert_body(await request.body(), story_id, index, idempotency_key)
        return story_document(await api.insert_frame(wanted))

    @app.get(
        "/v1/stories/{story_id}/events",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Server-sent events; each one's data is an EventDocument, its id the sequence.",
                "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/EventDocument"}}},
            },
            204: {"description": "The story has ended and every event was seen."},
        },
    )
    async def watch_story(
        story_id: str,
        after_sequence: Annotated[int, Query(ge=0, description="Only durable events above this one.")] = 0,
        last_event_id: Annotated[str, Header(description="The same, as browsers send it.")] = "",
    ) -> Response:
        """Follows a story: durable events after a sequence number, then what happens, until it ends."""
        after = _after(after_sequence, last_event_id)
        story = await api.get(story_id)
        if story.state.ended and after >= story.last_sequence:
            return Response(status_code=204)  # tells EventSource not to connect again
        return StreamingResponse(
            _sse(api, story_id, after, settings.heartbeat_s),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    @app.get(
        "/v1/stories/{story_id}/images/{sha256}",
        response_class=Response,
        responses={200: {"description": "The picture.", "content": {"image/png": {}}}},
    )
    async def read_image(story_id: str, sha256: str) -> Response:
        """Reads a picture of a story. It never changes."""
        image = await api.read_image(story_id, sha256)
        headers = {
            "etag": f'"{sha256}"',
            "cache-control": "private, max-age=31536000, immutable",
            "x-content-type-options": "nosniff",
        }
        return Response(image, media_type="image/png", headers=headers)


def _body(model: str) -> dict[str, Any]:
    """What OpenAPI says of a body that is read by hand."""
    return {"requestBody": {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}}}}}


def _add_backends(app: FastAPI, api: StoryApi) -> None:
    @app.get("/v1/backends", response_model=BackendListDocument)
    async def list_backends() -> BackendListDocument:
        """Says which packs this installation has, and what can be asked of each."""
        return backends_document(await api.backends())


def _add_operations(app: FastAPI, ready: Callable[[], Awaitable[None]]) -> None:
    @app.get("/livez", response_model=HealthDocument, tags=["operations"])
    async def livez() -> HealthDocument:
        """Whether the process answers at all."""
        return HealthDocument(status="ok")

    @app.get("/readyz", response_model=HealthDocument, tags=["operations"])
    async def readyz(response: Response) -> HealthDocument:
        """Whether the process takes stories."""
        try:
            await ready()
        except FabulaError as error:
            response.status_code = 503
            return HealthDocument(status="unavailable", detail=error.message)
        return HealthDocument(status="ok")

    @app.get("/healthz", response_model=HealthDocument, tags=["operations"])
    async def healthz(response: Response) -> HealthDocument:
        """The same as /readyz, under the name that load balancers know."""
        return await readyz(response)

    @app.get("/metrics", response_class=Response, tags=["operations"])
    async def metrics() -> Response:
        """Prometheus metrics of this process."""
        page, kind = metrics_page()
        return Response(page, headers={"content-type": kind})


class _FormParser(MultiPartParser):
    """Keeps uploads in memory: they are bounded, and a picture must not lie about in a temporary folder."""

    spool_max_size = MOST_BODY_BYTES


async def _form(request: Request) -> tuple[dict[str, str | list[str]], bytes]:
    try:
        form = await _FormParser(request.headers, request.stream(), max_files=1, max_fields=20).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise InvalidArgument(f"the form cannot be read: {error}") from None
    fields: dict[str, str | list[str]] = {}
    several: dict[str, list[str]] = {"characters": []}
    image = b""
    try:
        for name, value in form.multi_items():
            if name in several and isinstance(value, str):
                several[name].append(value)
                fields[name] = several[name]
                continue
            if name in fields or (name == "image" and image):
                raise InvalidArgument(f"the form has {name} twice", field=name)
            if isinstance(value, UploadFile):
                if name != "image":
                    raise InvalidArgument(f"{name} is not a file", field=name)
                image = await value.read()
            elif name == "image":
                raise InvalidArgument("send image as a file part, with a file name", field="image")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, image


def _after(after_sequence: int, last_event_id: str) -> int:
    if not last_event_id:
        return after_sequence
    if not last_event_id.isdecimal() or len(last_event_id) > 18:
        raise InvalidArgument("Last-Event-ID is the id of an event of this stream", field="last-event-id")
    return max(after_sequence, int(last_event_id))


async def _sse(api: StoryApi, story_id: str, after: int, heartbeat_s: float) -> AsyncIterator[str]:
    """The event stream. A heartbeat comment keeps it open; an error is its last event."""
    yield f"retry: {RETRY_MS}\n\n"
    async with aclosing(api.watch(story_id, after=after)) as events:
        pending: asyncio.Task[Event] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(events))
                done, _ = await asyncio.wait({pending}, timeout=heartbeat_s)
                if not done:
                    yield ": heartbeat\n\n"
                    continue
                event, pending = pending.result(), None
                yield _sse_event(event)
        except StopAsyncIteration:
            return
        except FabulaError as error:
            yield f"event: problem\ndata: {problem(error).model_dump_json()}\n\n"
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)


def _sse_event(event: Event) -> str:
    data = json.dumps(event_document(event), ensure_ascii=False, separators=(",", ":"))
    # Passing events carry no id, so that a browser's Last-Event-ID stays at the last durable one.
    identity = f"id: {event.sequence}\n" if event.sequence else ""
    return f"{identity}event: {kind_of(event.what)}\ndata: {data}\n\n"


def _problem_response(error: FabulaError) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, round(error.retry_after_s)))}
    return JSONResponse(
        problem(error).model_dump(mode="json"), error.http_status, headers=headers, media_type=PROBLEM_TYPE
    )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(FabulaError)
    async def known(_request: Request, error: FabulaError) -> JSONResponse:
        return _problem_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        violations = [FieldViolation(str(item["loc"][-1]), str(item["msg"])) for item in error.errors()]
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        return _problem_response(InvalidArgument(text, field_violations=violations))

    @app.exception_handler(HTTPException)
    async def routing(_request: Request, error: HTTPException) -> JSONResponse:
        found: FabulaError
        if error.status_code == 404:
            found = NotFound("there is nothing under this path; see /openapi.json")
        elif error.status_code == 405:
            found = Unimplemented("this path does not take this method; see /openapi.json")
        else:
            found = InvalidArgument(str(error.detail))
        response = _problem_response(found)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unknown(_request: Request, error: Exception) -> JSONResponse:
        error_id = secrets.token_hex(8)
        log.error("internal_error", error_id=error_id, exc_info=error)
        told = f"something went wrong inside; the log has it under {error_id}"
        return _problem_response(Internal(told, metadata={"error_id": error_id}))


class EdgeMiddleware:
    """Stands before everything: host, origin, size and load checks, request and trace ids, timing."""

    def __init__(self, app: ASGIApp, settings: StorySettings) -> None:
        self._app = app
        self._hosts = settings.hosts()
        self._origins = settings.origins()
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = call_from_headers(
            request_id=headers.get("x-request-id"), traceparent=headers.get("traceparent"), timeout_s=None
        )
        started, status = time.monotonic(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", call.request_id.encode()))
            await send(message)

        with calling(call), structlog.contextvars.bound_contextvars(request_id=call.request_id):
            self._in_flight += 1
            try:
                self._check(scope["path"], headers)
                await self._app(scope, _bounded(receive, headers, scope["path"]), send_with_id)
            except FabulaError as error:
                await _problem_response(error)(scope, receive, send_with_id)
            finally:
                self._in_flight -= 1
                route = scope.get("route")
                REQUEST_SECONDS.labels(
                    protocol="http", method=getattr(route, "name", "unknown"), reason=f"{status // 100}xx"
                ).observe(time.monotonic() - started)

    def _check(self, path: str, headers: Headers) -> None:
        """Raises HostNotAllowed, OriginNotAllowed, QueueFull."""
        if path in PROBES:
            return  # also under load: a process that is merely busy must not be restarted for it
        if self._in_flight > MOST_CALLS:
            raise QueueFull(f"{MOST_CALLS} calls are in flight; try again after a pause", retry_after_s=2.0)
        host = headers.get("host", "")
        name = _host_name(host)
        if "*" not in self._hosts and name not in self._hosts:
            raise HostNotAllowed(metadata={"host": host[:200]})
        origin = headers.get("origin")
        if origin is None or origin in self._origins or origin in (f"http://{host}", f"https://{host}"):
            return
        raise OriginNotAllowed(metadata={"origin": origin[:200]})


def _host_name(host: str) -> str:
    """The name in a Host header, without its port and brackets."""
    if host.startswith("["):
        return host[1:].split("]", 1)[0].lower()
    return host.rsplit(":", 1)[0].lower() if ":" in host else host.lower()


def _bounded(receive: Receive, headers: Headers, path: str) -> Receive:
    """Reads no more of a body than the largest that can be right."""
    most_bytes = MOST_UPLOAD_BYTES if path in UPLOADS else MOST_BODY_BYTES
    too_large = ImageTooLarge(
        f"the request is larger than {most_bytes} bytes; a picture has at most {MOST_IMAGE_BYTES}",
        field="image",
        metadata={"limit_bytes": str(MOST_IMAGE_BYTES)},
    )
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > most_bytes:
        raise too_large
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > most_bytes:
                raise too_large
        return message

    return bounded


def _complete_openapi(app: FastAPI) -> None:
    """Adds what no route's signature mentions: bodies that are read by hand, events, problems."""
    generate = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        schema = generate()
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        for model in (
            CreateStoryBody,
            CreateStoryForm,
            EditFrameBody,
            InsertFrameBody,
            EventDocument,
            ProblemDocument,
            *BODIES,
        ):
            found = model.model_json_schema(ref_template="#/components/schemas/{model}")
            components.update(found.pop("$defs", {}))
            components[model.__name__] = found
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # malformed requests are problems with status 400
        components.pop("HTTPValidationError", None)
        components.pop("ValidationError", None)
        return schema

    app.openapi = complete  # type: ignore[method-assign]
