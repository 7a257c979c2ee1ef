"""The caption service over somebody else's server: a Triton, a KServe, or another installation of ours.

`RemoteEngine` is what the servicer takes an engine for. It checks what it is given as our own engine does, asks a
model of the Open Inference Protocol through tritonclient, and turns whatever comes back into our texts and errors.
The model must take what our own `caption/<pack>` takes: IMAGE and CAPTIONS as BYTES, the parameters `adapter`,
`temperature`, `top_p`, `seed` and `max_tokens`; and it must give TEXT. Guards against repetition and lost names are the
server's business. A server that is away is no reason to end this process: calls say so, and the next may find it back.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
import structlog

from services.caption.engine import (
    CAPTIONS_MAX,
    DESCRIPTIVE,
    STORY,
    Observer,
    check_caption,
    derived_seed,
    readable,
)
from services.caption.image import read_image
from services.caption.job import DescribeJob, Finish, Sampling, StoryJob, Written
from services.models.pack import Endpoint
from services.models.world import World
from services.runtime.call import current_call
from services.runtime.errors import (
    CaptionEmpty,
    CaptionNotWritten,
    CaptionTooLong,
    DeadlineExceeded,
    FabulaError,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    ModelUnknown,
    PackUnknown,
    PermissionDenied,
    QueueFull,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
)
from services.runtime.wire import error_from_status

log = structlog.get_logger("fabula.caption")

IMAGE, CAPTIONS, EARLIER_DESCRIPTIONS, TEXT = "IMAGE", "CAPTIONS", "EARLIER_DESCRIPTIONS", "TEXT"
SEEDS = 2**53  # our own servers take seeds below it
START_WITHIN_S = 30.0  # a server that does not answer so long when we start is a wrong address
_CHECKED_PX = 32
_PLACE = re.compile(rf"{CAPTIONS}\[(\d+)\]")


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """What callers are told of the model. Nobody here knows what it knows, so it never warns."""

    pack_name: str
    pack_digest: str
    architecture: str
    also_called: tuple[str, ...] = ()
    world: World = field(default_factory=World)


class RemoteEngine:
    """Writes texts by asking a server. `start` it before use and `stop` it after."""

    def __init__(
        self,
        model: RemoteModel,
        endpoint: Endpoint,
        *,
        max_requests: int = 80,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_requests` are asked at the same time; one more is refused with QueueFull."""
        self.model = model
        self._endpoint = endpoint
        self._max_requests = max_requests
        self._observer = observer
        self._clock = clock
        self._client: Any = None
        self._running = 0
        self._stopping = False

    async def start(self, *, warm_up: bool = True) -> None:
        """Connects, and checks that the model is there and has the right tensors. Raises RuntimeError when it is not.

        `warm_up` makes no difference: a server that calls its model ready has warmed it.
        """
        from tritonclient.grpc.aio import InferenceServerClient

        endpoint = self._endpoint
        self._client = InferenceServerClient(endpoint.address, ssl=endpoint.tls)
        limit_s = min(START_WITHIN_S, endpoint.timeout_s)
        try:
            is_ready = await self._client.is_model_ready(endpoint.model, client_timeout=limit_s)
            metadata = await self._client.get_model_metadata(endpoint.model, client_timeout=limit_s)
        except Exception as error:  # noqa: BLE001 - what the client raises must not leave this file
            await self._client.close()
            raise RuntimeError(f"{endpoint.address} does not answer for {endpoint.model}: {_line(error)}") from None
        inputs, outputs = ({each.name for each in tensors} for tensors in (metadata.inputs, metadata.outputs))
        fault = "" if is_ready else "is not ready"
        if missing := sorted({IMAGE, CAPTIONS} - inputs) + sorted({TEXT} - outputs):
            fault = f"has no {', '.join(missing)}: it is no caption model"
        if fault:
            await self._client.close()
            raise RuntimeError(f"{endpoint.model} on {endpoint.address} {fault}")

    async def stop(self) -> None:
        """Closes the connection; calls in flight end with ShuttingDown."""
        self._stopping = True
        if self._client is not None:
            await self._client.close()

    def check_health(self) -> None:
        """Never raises: starting this process again would not mend somebody else's server."""

    @property
    def unfinished_count(self) -> int:
        """Requests that the server has now."""
        return self._running

    async def write_caption(self, job: StoryJob) -> Written:
        """The caption after the last of `job.captions`.

        Raises what our own engine raises for bad input, QueueFull; for what the server did Unavailable,
        DeadlineExceeded, CaptionNotWritten, ShuttingDown, FailedPrecondition or Internal.
        """
        self._check_pack(job.pack)
        if not job.captions:
            raise CaptionEmpty("at least one caption is needed: that of the picture", field="captions")
        _check_texts("captions", job.captions)
        names = [f"captions[{number}]" for number in range(len(job.captions))]
        return await self._write(job.image, STORY, job.captions, names, (), job.sampling)

    async def describe(self, job: DescribeJob) -> Written:
        """The description of `job.caption`. Raises the same errors as `write_caption`."""
        self._check_pack(job.pack)
        check_caption(job.previous_caption, "previous_caption")
        check_caption(job.caption, "caption")
        _check_texts("earlier_captions", job.earlier_captions)
        _check_texts("earlier_descriptions", job.earlier_descriptions)
        captions = (*job.earlier_captions, job.previous_caption, job.caption)
        names = [f"earlier_captions[{number}]" for number in range(len(job.earlier_captions))]
        names += ["previous_caption", "caption"]
        return await self._write(job.image, DESCRIPTIVE, captions, names, job.earlier_descriptions, job.sampling)

    async def _write(
        self,
        image: bytes,
        adapter: str,
        captions: Sequence[str],
        names: Sequence[str],
        descriptions: Sequence[str],
        sampling: Sampling,
    ) -> Written:
        if self._running >= self._max_requests:
            raise QueueFull(f"{self._running} captions are being written; try again after a pause")
        started_s, tokens, outcome = self._clock(), 0, "cancelled"
        self._count(1)
        try:
            await asyncio.to_thread(read_image, image, _CHECKED_PX)
            response = await self._ask(image, adapter, captions, names, descriptions, sampling)
            told = response.get_response().parameters
            tokens = told["completion_tokens"].int64_param if "completion_tokens" in told else 0
            text = readable(_text(response))
            if not text:
                raise CaptionNotWritten(f"{self._endpoint.model} wrote nothing")
            outcome = "written"
            cut = "finish_reason" in told and told["finish_reason"].string_param == "length"
            return Written(
                text=text,
                finish=Finish.LENGTH if cut else Finish.STOP,
                prompt_tokens=told["prompt_tokens"].int64_param if "prompt_tokens" in told else 0,
                completion_tokens=tokens,
                duration_s=self._clock() - started_s,
                pack_digest=self.model.pack_digest,
            )
        except FabulaError as error:
            outcome = error.reason.lower()
            raise
        finally:
            self._count(-1)
            if self._observer is not None:
                seconds = self._clock() - started_s
                self._observer.text_done(adapter=adapter, outcome=outcome, tokens=tokens, seconds=seconds)

    async def _ask(
        self,
        image: bytes,
        adapter: str,
        captions: Sequence[str],
        names: Sequence[str],
        descriptions: Sequence[str],
        sampling: Sampling,
    ) -> Any:
        """The server's answer, within the deadline. Cancelling it cancels the server's work."""
        from tritonclient.grpc import InferRequestedOutput
        from tritonclient.utils import InferenceServerException

        if self._stopping:
            raise ShuttingDown
        inputs = [_tensor(IMAGE, [image]), _tensor(CAPTIONS, [text.encode() for text in captions])]
        if descriptions:
            inputs.append(_tensor(EARLIER_DESCRIPTIONS, [text.encode() for text in descriptions]))
        parameters: dict[str, Any] = {
            "adapter": adapter,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "seed": sampling.seed if sampling.seed < SEEDS else derived_seed(sampling.seed, 0) % SEEDS,
        }
        if sampling.max_tokens:
            parameters["max_tokens"] = sampling.max_tokens
        limit_s = self._limit_s()
        try:
            return await self._client.infer(
                self._endpoint.model,
                inputs,
                outputs=[InferRequestedOutput(TEXT)],
                parameters=parameters,
                timeout=int(limit_s * 1e6),
                client_timeout=limit_s,
            )
        except InferenceServerException as error:
            raise self._failure(error, names) from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError):
            raise ShuttingDown from None  # the connection was closed under the call
        except asyncio.CancelledError:
            if self._stopping and not _is_cancelled():
                raise ShuttingDown from None  # grpc cancels calls whose connection is closed
            raise

    def _limit_s(self) -> float:
        call = current_call()
        remaining_s = call.remaining_s() if call is not None else None
        limit_s = self._endpoint.timeout_s if remaining_s is None else min(self._endpoint.timeout_s, remaining_s)
        if limit_s <= 0:
            raise DeadlineExceeded(f"the deadline had passed before {self._endpoint.model} was asked")
        return limit_s

    def _failure(self, error: Exception, names: Sequence[str]) -> FabulaError:
        """The server's refusal as ours. The client tells a line; the status behind it, where there is one, the rest."""
        cause = error.__context__
        if not isinstance(cause, grpc.RpcError) or not hasattr(cause, "trailing_metadata"):
            log.warning("remote_answer_unreadable", model=self._endpoint.model, message=_line(error))
            return Internal(f"{self._endpoint.model} gave an answer that cannot be read")
        failed: Any = cause
        found = error_from_status(failed.code(), failed.details() or "", failed.trailing_metadata() or ())
        if isinstance(found, Unauthenticated | PermissionDenied):
            return FailedPrecondition(f"{self._endpoint.address} does not let this service in: {found.message}")
        if isinstance(found, ModelUnknown):
            return Unavailable(f"{self._endpoint.model} is not loaded on {self._endpoint.address} now")
        if isinstance(found, InvalidArgument):
            found.field_violations = tuple(
                FieldViolation(_own_name(each.field, names), each.description) for each in found.field_violations
            )
            if "field" in found.metadata:
                found.metadata["field"] = _own_name(found.metadata["field"], names)
        found.metadata.setdefault("endpoint", self._endpoint.model)
        return found

    def _check_pack(self, name: str) -> None:
        if name not in ("", self.model.pack_name, *self.model.also_called):
            raise PackUnknown(f"pack {name!r} is not loaded here; {self.model.pack_name!r} is", field="pack")

    def _count(self, change: int) -> None:
        self._running += change
        if self._observer is not None:
            self._observer.load_changed(running=self._running)


def _check_texts(name: str, texts: Sequence[str]) -> None:
    if len(texts) > CAPTIONS_MAX:
        raise CaptionTooLong(f"{len(texts)} texts are more than {CAPTIONS_MAX}", field=name)
    for number, text in enumerate(texts):
        check_caption(text, f"{name}[{number}]")


def _tensor(name: str, values: Sequence[bytes]) -> Any:
    from tritonclient.grpc import InferInput

    tensor = InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=np.object_))
    return tensor


def _text(response: Any) -> str:
    """Raises CaptionNotWritten when the answer holds none."""
    values = response.as_numpy(TEXT)
    if values is None or values.size != 1:
        raise CaptionNotWritten(f"the server's answer holds no {TEXT}")
    value = values.reshape(-1)[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _own_name(name: str, names: Sequence[str]) -> str:
    """Our field of a server's tensor or parameter."""
    if found := _PLACE.fullmatch(name):
        number = int(found[1])
        return names[number] if number < len(names) else name
    if name in ("temperature", "top_p", "seed", "max_tokens"):
        return f"sampling.{name}"
    return {IMAGE: "image", CAPTIONS: "captions"}.get(name, name.replace(EARLIER_DESCRIPTIONS, "earlier_descriptions"))


def _is_cancelled() -> bool:
    """Whether whoever waits for this gave up, rather than the connection."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
