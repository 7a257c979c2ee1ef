"""The caption service over somebody else's server: a Triton, a KServe, or another installation of ours.

`RemoteEngine` is what the servicer takes an engine for. It checks what it is given as our own engine does, asks a
model of the Open Inference Protocol through tritonclient, and turns whatever comes back into our texts and errors.
The model must take what our own `caption/<pack>` takes: IMAGE and CAPTIONS as BYTES, the parameters `adapter`,
`temperature`, `top_p`, `seed` and `max_tokens`; and it must give TEXT. Guards against repetition and lost names are the
server's business, but for the names of characters that were learned here, of whom it has never heard. A server that is
away is no reason to end this process: calls say so, and the next may find it back.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.caption.engine import (
    CAPTIONS_MAX,
    DESCRIPTIVE,
    STORY,
    TEXT_CHARACTERS_MAX,
    Observer,
    check_caption,
    derived_seed,
    readable,
)
from services.caption.image import read_image
from services.caption.job import DescribeJob, Finish, Sampling, StoryJob, Written
from services.caption.learned import check_learned, completed, told
from services.models.pack import Endpoint
from services.models.world import World
from services.runtime.errors import (
    CaptionEmpty,
    CaptionNotWritten,
    CaptionTooLong,
    FabulaError,
    PackUnknown,
    QueueFull,
)
from services.runtime.inference import InferenceChannel, bytes_tensor, one_of_bytes

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
        self._server = InferenceChannel(endpoint.address, endpoint.model, tls=endpoint.tls)
        self._running = 0

    async def start(self, *, warm_up: bool = True) -> None:
        """Connects, and checks that the model is there and has the right tensors. Raises RuntimeError when it is not.

        `warm_up` makes no difference: a server that calls its model ready has warmed it.
        """
        limit_s = min(START_WITHIN_S, self._endpoint.timeout_s)
        try:
            await self._server.check(inputs={IMAGE, CAPTIONS}, outputs={TEXT}, limit_s=limit_s)
        except FabulaError as error:
            await self._server.close()
            where = f"{self._endpoint.model} on {self._endpoint.address}"
            raise RuntimeError(f"{where} cannot write captions: {error.reason}: {error.message}") from None

    async def stop(self) -> None:
        """Closes the connection; calls in flight end with ShuttingDown."""
        await self._server.close()

    def check_health(self) -> None:
        """Never raises: starting this process again would not mend somebody else's server."""

    @property
    def unfinished_count(self) -> int:
        """Requests that the server has now."""
        return self._running

    async def write_caption(self, job: StoryJob) -> Written:
        """The caption after the last of `job.captions`; who may be in it is the server's business.

        Raises what our own engine raises for bad input, QueueFull; for what the server did Unavailable,
        DeadlineExceeded, CaptionNotWritten, ShuttingDown, FailedPrecondition or Internal.
        """
        self._check_pack(job.pack)
        if not job.captions:
            raise CaptionEmpty("at least one caption is needed: that of the picture", field="captions")
        _check_texts("captions", job.captions)
        check_learned(job.learned)
        names = [f"captions[{number}]" for number in range(len(job.captions))]
        return await self._write(job.image, STORY, job.captions, names, (), job.sampling)

    async def describe(self, job: DescribeJob) -> Written:
        """The description of `job.caption`, which has those of `job.learned` who are in that.

        Raises the same errors as `write_caption`.
        """
        self._check_pack(job.pack)
        check_caption(job.previous_caption, "previous_caption")
        check_caption(job.caption, "caption")
        _check_texts("earlier_captions", job.earlier_captions)
        _check_texts("earlier_descriptions", job.earlier_descriptions)
        check_learned(job.learned)
        captions = (*job.earlier_captions, job.previous_caption, job.caption)
        names = [f"earlier_captions[{number}]" for number in range(len(job.earlier_captions))]
        names += ["previous_caption", "caption"]
        descriptions = (*told(job.learned), *job.earlier_descriptions)
        written = await self._write(job.image, DESCRIPTIVE, captions, names, descriptions, job.sampling)
        text = completed(written.text, job.caption, captions[:-1], job.learned, _fits)
        return replace(written, text=text)

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
            answer = one_of_bytes(response, TEXT)
            text = readable((answer or b"").decode(errors="replace"))
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
        """The server's answer, within the deadline."""
        tensors = [bytes_tensor(IMAGE, [image]), bytes_tensor(CAPTIONS, [text.encode() for text in captions])]
        if descriptions:
            tensors.append(bytes_tensor(EARLIER_DESCRIPTIONS, [text.encode() for text in descriptions]))
        parameters: dict[str, Any] = {
            "adapter": adapter,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "seed": sampling.seed if sampling.seed < SEEDS else derived_seed(sampling.seed, 0) % SEEDS,
        }
        if sampling.max_tokens:
            parameters["max_tokens"] = sampling.max_tokens

        def rename(name: str) -> str:
            return _own_name(name, names)

        limit_s = self._endpoint.timeout_s
        return await self._server.infer(tensors, [TEXT], parameters, limit_s=limit_s, rename=rename)

    def _check_pack(self, name: str) -> None:
        if name not in ("", self.model.pack_name, *self.model.also_called):
            raise PackUnknown(f"pack {name!r} is not loaded here; {self.model.pack_name!r} is", field="pack")

    def _count(self, change: int) -> None:
        self._running += change
        if self._observer is not None:
            self._observer.load_changed(running=self._running)


def _fits(text: str) -> bool:
    return len(text) <= TEXT_CHARACTERS_MAX


def _check_texts(name: str, texts: Sequence[str]) -> None:
    if len(texts) > CAPTIONS_MAX:
        raise CaptionTooLong(f"{len(texts)} texts are more than {CAPTIONS_MAX}", field=name)
    for number, text in enumerate(texts):
        check_caption(text, f"{name}[{number}]")


def _own_name(name: str, names: Sequence[str]) -> str:
    """Our field of a server's tensor or parameter."""
    if found := _PLACE.fullmatch(name):
        number = int(found[1])
        return names[number] if number < len(names) else name
    if name in ("temperature", "top_p", "seed", "max_tokens"):
        return f"sampling.{name}"
    return {IMAGE: "image", CAPTIONS: "captions"}.get(name, name.replace(EARLIER_DESCRIPTIONS, "earlier_descriptions"))
