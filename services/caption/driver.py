"""Drives vLLM's engine: token ids and a picture in, token ids out, many requests decoded together.

Two ways behind one interface, `Driver` (`plain.py` has a third, for networks that vLLM does not serve):

    InProcessDriver   vLLM's LLMEngine stepped by one thread of this process. Lightest: for CPUs.
    AsyncDriver       vLLM's AsyncLLM, whose engine core is a child process. For GPUs.

Cancelling `generate` aborts the request inside the engine. Adapters are loaded with `add_lora` before any request
names them, because a request with an adapter that cannot be loaded would kill the engine for everybody. No exception of
vLLM's leaves this file, so that no process that receives one has to import vLLM. Knows no prompt and no transport.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import structlog
from PIL import Image

from services.caption.job import Finish
from services.runtime.errors import EngineDead, Internal, ReplicaLost, ShuttingDown

log = structlog.get_logger("fabula.caption")

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the sizes that vLLM makes room for
_STOP_WITHIN_S = 5.0  # how long `stop` waits for the thread


@dataclass(frozen=True, kw_only=True)
class DriverSettings:
    """What vLLM is told."""

    base: Path  # folder of the network
    adapters: Mapping[str, Path]  # name to PEFT folder
    adapter_rank_max: int  # 0 without adapters
    context_tokens: int
    on_gpu: bool
    dtype: str
    threads: int
    max_running: int
    kv_cache_bytes: int
    gpu_memory_ratio: float
    stall_s: float
    sees_pictures: bool = True


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request. `ids` hold one image token, which stands for `image`; none where there is none."""

    ids: Sequence[int]
    image: Image.Image | None
    adapter: str | None  # None asks the base
    temperature: float
    top_p: float
    seed: int  # below 2**63
    max_tokens: int
    stop_ids: Sequence[int]
    forbidden_ids: Sequence[int] = ()  # never written


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back. `ids` end before the stop token."""

    ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int


class Driver(Protocol):
    """vLLM's engine, started."""

    async def start(self) -> None:
        """Load base and adapters. Raises RuntimeError, free of vLLM's types, when one cannot be loaded."""

    async def generate(self, ask: Ask) -> Reply:
        """Decode one request together with the others in flight.

        Raises EngineDead, ShuttingDown or Internal; ReplicaLost when the engine died while it held this request. The
        difference matters: one of those it held may have killed it, and would kill the next engine too.
        """

    def check_health(self) -> None:
        """Raises EngineDead once the engine has died or hangs; it does not come back."""

    @property
    def unfinished_count(self) -> int:
        """Requests inside the engine, cancelled ones not counted."""

    async def stop(self) -> None:
        """Release everything. Requests in flight end with ShuttingDown."""


def prepare_environment(settings: DriverSettings) -> None:
    """vLLM's process-wide settings. Must run before vLLM is imported; what the operator has set wins."""
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # vLLM must not take over the root logger of a process that logs JSON.
        "VLLM_CONFIGURE_LOGGING": "0",
    }
    if not settings.on_gpu:
        wanted |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Without this vLLM pins its threads to cores, and a second engine on the machine to the same ones.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads would take the cores that draw frames
        }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # its warnings are about choices made here on purpose


def engine_arguments(settings: DriverSettings) -> dict[str, Any]:
    """vLLM's EngineArgs."""
    arguments: dict[str, Any] = {
        "model": str(settings.base),
        "tokenizer": str(settings.base),
        "load_format": "safetensors",  # a pickle can run code
        "trust_remote_code": False,
        "dtype": settings.dtype,
        "max_model_len": settings.context_tokens,
        "max_num_seqs": settings.max_running,
        "generation_config": "vllm",  # all sampling options come with the request
        "disable_log_stats": True,
    }
    if settings.adapters:
        arguments |= {
            "enable_lora": True,
            "max_loras": len(settings.adapters),
            "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= settings.adapter_rank_max),
        }
    if settings.sees_pictures:
        arguments |= {
            "limit_mm_per_prompt": {"image": 1},
            "mm_processor_cache_gb": 0.05,  # some thousand pictures; vLLM's own default may take 4 GiB
        }
    if settings.on_gpu:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_ratio
    else:
        arguments |= {
            "distributed_executor_backend": "uni",
            "enforce_eager": True,
            "kv_cache_memory_bytes": settings.kv_cache_bytes,
        }
    return arguments


def _lora_requests(settings: DriverSettings) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(settings.adapters.items(), start=1)
    }


def _prompt(ask: Ask) -> Any:
    prompt: dict[str, Any] = {"prompt_token_ids": list(ask.ids)}
    return prompt if ask.image is None else {**prompt, "multi_modal_data": {"image": ask.image}}


def _parameters(ask: Ask) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=ask.temperature,
        top_p=ask.top_p,
        seed=ask.seed,
        max_tokens=ask.max_tokens,
        stop_token_ids=list(ask.stop_ids),
        logit_bias=dict.fromkeys(ask.forbidden_ids, -100.0) or None,
        detokenize=False,  # the pack's own tokenizer does it, dropping special tokens
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _reply(output: Any, ask: Ask) -> Reply:
    completion = output.outputs[0]
    ids = tuple(completion.token_ids)
    while ids and ids[-1] in ask.stop_ids:
        ids = ids[:-1]
    finish = Finish.LENGTH if completion.finish_reason == "length" else Finish.STOP
    return Reply(ids=ids, finish=finish, prompt_tokens=len(output.prompt_token_ids))


class InProcessDriver:
    """LLMEngine stepped by one thread. The thread owns the engine; everything else talks to it through a queue."""

    def __init__(self, settings: DriverSettings) -> None:
        self._settings = settings
        self._engine: Any = None
        self._adapters: dict[str, Any] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._death = ""
        self._closed: Exception | None = None  # set once the thread takes no more commands
        self._step_began_s: float | None = None
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Future[Reply], Ask]] = {}
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)

    async def start(self) -> None:
        """Load base and adapters, then start the thread."""
        await asyncio.to_thread(self._load)
        self._thread.start()

    def _load(self) -> None:
        prepare_environment(self._settings)
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            self._engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(self._settings)))
            self._adapters = _lora_requests(self._settings)
            for request in self._adapters.values():
                self._engine.add_lora(request)
        except Exception as error:
            log.exception("vllm_cannot_start")
            raise RuntimeError(f"vLLM cannot start: {type(error).__name__}: {error}") from None

    async def generate(self, ask: Ask) -> Reply:
        """See `Driver`."""
        self.check_health()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        number = str(next(self._numbers))
        if not self._send(lambda: self._add(number, loop, future, ask)):
            raise self._closed or ShuttingDown()
        try:
            return await future
        finally:
            if not future.done() or future.cancelled():
                self._send(lambda: self._abort(number))

    def check_health(self) -> None:
        """See `Driver`."""
        if self._death:
            raise EngineDead(f"the caption engine has died: {self._death}")
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stopping:
            raise EngineDead("the caption engine's thread has ended")
        began_s = self._step_began_s
        if began_s is not None and time.monotonic() - began_s > self._settings.stall_s:
            raise EngineDead(f"a step of the caption engine has taken more than {self._settings.stall_s:g} s")

    @property
    def unfinished_count(self) -> int:
        """See `Driver`."""
        return len(self._waiting) + len(self._commands)

    async def stop(self) -> None:
        """See `Driver`."""
        self._stopping = True
        with self._wake:
            self._wake.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, _STOP_WITHIN_S)

    # --- below: only in the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._wake:
                    while not (self._commands or self._waiting or self._stopping):
                        self._wake.wait()
                while self._commands:
                    self._commands[0]()  # counted as unfinished until it is done
                    self._commands.popleft()
                if self._waiting:
                    self._step()
        except Exception as error:
            self._death = type(error).__name__
            log.exception("vllm_died")
        self._close()

    def _close(self) -> None:
        error = EngineDead(f"the caption engine has died: {self._death}") if self._death else ShuttingDown()
        with self._wake:
            self._closed = error
        engine, self._engine = self._engine, None
        waiting, self._waiting = self._waiting, {}
        for loop, future, _ in waiting.values():
            _fail(loop, future, ReplicaLost(error.message) if self._death else error)
        while self._commands:  # what came in between meets `_engine` None and is refused
            self._commands.popleft()()
        engine.engine_core.shutdown()

    def _send(self, command: Callable[[], None]) -> bool:
        with self._wake:
            if self._closed is not None:
                return False
            self._commands.append(command)
            self._wake.notify()
            return True

    def _add(self, number: str, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Reply], ask: Ask) -> None:
        if future.cancelled():
            return
        if self._engine is None:
            _fail(loop, future, self._closed or ShuttingDown())
            return
        try:
            self._submit(number, ask)
        except Exception as error:
            log.exception("vllm_refused_request")
            _fail(loop, future, Internal(f"vLLM refused the request: {type(error).__name__}"))
        else:
            self._waiting[number] = (loop, future, ask)

    def _submit(self, number: str, ask: Ask) -> None:
        adapter = self._adapters[ask.adapter] if ask.adapter is not None else None
        self._engine.add_request(number, _prompt(ask), _parameters(ask), lora_request=adapter)

    def _finished(self) -> list[tuple[str, Callable[[Ask], Reply]]]:
        """One step of the engine: the requests that it ended, and how their replies are read."""
        return [(each.request_id, partial(_reply, each)) for each in self._engine.step() if each.finished]

    def _abort(self, number: str) -> None:
        if self._waiting.pop(number, None) is not None:
            self._engine.abort_request([number])

    def _step(self) -> None:
        self._step_began_s = time.monotonic()
        finished = self._finished()
        self._step_began_s = None
        for number, reply in finished:
            if number in self._waiting:
                loop, future, ask = self._waiting.pop(number)
                _settle(loop, future, reply(ask))


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Reply], reply: Reply) -> None:
    def settle() -> None:
        if not future.done():
            future.set_result(reply)

    _call(loop, settle)


def _fail(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Reply], error: Exception) -> None:
    def fail() -> None:
        if not future.done():
            future.set_exception(error)

    _call(loop, fail)


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        log.warning("caller_gone")  # its event loop has been closed: nobody waits for this any more


class AsyncDriver:
    """AsyncLLM. Its engine core is a child process; when that dies, requests and the health check say so."""

    def __init__(self, settings: DriverSettings) -> None:
        self._settings = settings
        self._engine: Any = None
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._running: set[str] = set()
        self._stopping = False

    async def start(self) -> None:
        """Load base and adapters in the child process."""
        prepare_environment(self._settings)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = AsyncEngineArgs(**engine_arguments(self._settings))
            self._engine = AsyncLLM.from_engine_args(arguments)
            self._adapters = _lora_requests(self._settings)
            for request in self._adapters.values():
                await self._engine.add_lora(request)
        except Exception as error:
            log.exception("vllm_cannot_start")
            raise RuntimeError(f"vLLM cannot start: {type(error).__name__}: {error}") from None

    async def generate(self, ask: Ask) -> Reply:
        """See `Driver`."""
        self.check_health()
        if self._stopping:
            raise ShuttingDown
        number = str(next(self._numbers))
        adapter = self._adapters[ask.adapter] if ask.adapter is not None else None
        outputs = self._engine.generate(_prompt(ask), _parameters(ask), number, lora_request=adapter)
        self._running.add(number)
        last: Any = None
        try:
            async for output in outputs:
                last = output
        except asyncio.CancelledError:
            raise
        except Exception as error:
            try:
                self.check_health()
            except EngineDead as death:
                raise ReplicaLost(death.message) from None
            log.exception("vllm_refused_request")
            raise Internal(f"vLLM refused the request: {type(error).__name__}") from None
        finally:
            self._running.discard(number)
            await outputs.aclose()  # cancellation reaches the engine here
        if last is None:
            raise Internal("vLLM gave no answer")
        return _reply(last, ask)

    def check_health(self) -> None:
        """See `Driver`."""
        if self._engine is not None and self._engine.errored and not self._stopping:
            raise EngineDead("the caption engine's process has died")

    @property
    def unfinished_count(self) -> int:
        """See `Driver`."""
        engine_count: int = self._engine.output_processor.get_num_unfinished_requests() if self._engine else 0
        return max(len(self._running), engine_count)

    async def stop(self) -> None:
        """See `Driver`."""
        self._stopping = True
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
