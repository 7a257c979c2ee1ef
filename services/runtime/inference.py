"""Somebody else's model behind the Open Inference Protocol: one connection, our deadlines, our errors.

    server = InferenceChannel("host:8001", "caption/toon", tls=False)
    await server.check(inputs={"IMAGE"}, outputs={"TEXT"})
    result = await server.infer(tensors, ["TEXT"], parameters, limit_s=60.0)
    async for result in server.stream(tensors, ["IMAGE"], parameters, limit_s=600.0): ...

Calls go through tritonclient. Whatever it raises becomes a FabulaError here: with the reason that the server gave where
it is one of ours, else by its status. Cancelling a call cancels it on the server. Knows no model.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
import numpy as np
import structlog

from services.runtime.call import current_call
from services.runtime.errors import (
    Code,
    DeadlineExceeded,
    FabulaError,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    ModelUnknown,
    PermissionDenied,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
    error_from_reason,
)
from services.runtime.wire import error_from_status

log = structlog.get_logger("fabula.inference")

Rename = Callable[[str], str]
"""A tensor or parameter of the server → the field that the caller's own callers know."""

_REASON = re.compile(r"(?:\[request id: [^\]]*\] )?(?P<reason>[A-Z][A-Z0-9_]+): (?P<message>.*)", re.DOTALL)


class InferenceChannel:
    """One model on one server. Make it inside a running event loop, or use it there first."""

    def __init__(self, address: str, model: str, *, tls: bool) -> None:
        self.address = address
        self.model = model
        self._tls = tls
        self._own: Any = None
        self._closed = False

    @property
    def _client(self) -> Any:
        if self._closed:
            raise ShuttingDown
        if self._own is None:
            from tritonclient.grpc.aio import InferenceServerClient

            self._own = InferenceServerClient(self.address, ssl=self._tls)
        return self._own

    async def check(self, *, inputs: Collection[str], outputs: Collection[str], limit_s: float) -> frozenset[str]:
        """All inputs of the model, if it is there and has these tensors.

        Raises FabulaError; FailedPrecondition where it has not got them.
        """
        try:
            is_ready = await self._client.is_model_ready(self.model, client_timeout=limit_s)
            metadata = await self._client.get_model_metadata(self.model, client_timeout=limit_s)
        except Exception as error:  # noqa: BLE001 - what the client raises must not leave this file
            raise self._failure(error, str) from None
        has = {each.name for each in metadata.inputs}, {each.name for each in metadata.outputs}
        missing = sorted(set(inputs) - has[0]) + sorted(set(outputs) - has[1])
        if missing:
            raise FailedPrecondition(f"{self.model} on {self.address} has no {', '.join(missing)}")
        if not is_ready:
            raise Unavailable(f"{self.model} on {self.address} is not ready")
        return frozenset(has[0])

    async def facts(self, limit_s: float) -> dict[str, str]:
        """The parameters of the model's configuration; empty where the server has none to tell. Raises FabulaError."""
        try:
            answer = await self._client.get_model_config(self.model, client_timeout=limit_s)
        except Exception as error:  # noqa: BLE001 - see `check`
            raise self._failure(error, str) from None
        return {name: value.string_value for name, value in answer.config.parameters.items()}

    async def infer(
        self,
        tensors: Sequence[Any],
        outputs: Sequence[str],
        parameters: Mapping[str, Any],
        *,
        limit_s: float,
        rename: Rename = str,
        priority: int = 0,
    ) -> Any:
        """The model's one answer, within `limit_s` or the current call's deadline. Raises FabulaError."""
        limit_s = self._limited(limit_s)
        try:
            return await self._client.infer(
                self.model,
                list(tensors),
                outputs=_requested(outputs),
                parameters=dict(parameters),
                priority=priority,
                timeout=int(limit_s * 1e6),
                client_timeout=limit_s,
            )
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled():
                raise ShuttingDown from None  # grpc cancels calls whose connection is closed
            raise
        except Exception as error:  # noqa: BLE001 - see `check`
            raise self._failure(error, rename) from None

    async def stream(
        self,
        tensors: Sequence[Any],
        outputs: Sequence[str],
        parameters: Mapping[str, Any],
        *,
        limit_s: float,
        rename: Rename = str,
        priority: int = 0,
    ) -> AsyncIterator[Any]:
        """The model's answers to one request, until the one that calls itself the last. Raises FabulaError.

        Leaving the loop early cancels the request on the server.
        """
        limit_s = self._limited(limit_s)

        async def asked() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": self.model,
                "inputs": list(tensors),
                "outputs": _requested(outputs),
                "parameters": dict(parameters),
                "priority": priority,
                "timeout": int(limit_s * 1e6),
            }

        answers = self._client.stream_infer(asked(), stream_timeout=limit_s)
        try:
            async for result, error in answers:
                if error is not None:
                    raise self._told(str(error.message()), rename)
                yield result
                final = result.get_response().parameters
                if "triton_final_response" in final and final["triton_final_response"].bool_param:
                    return
        except (FabulaError, GeneratorExit):
            raise
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled():
                raise ShuttingDown from None
            raise
        except Exception as error:  # noqa: BLE001 - see `check`
            raise self._failure(error, rename) from None
        finally:
            answers.cancel()  # does nothing to a finished call

    async def close(self) -> None:
        """Closes the connection; calls in flight end with ShuttingDown."""
        self._closed = True
        if self._own is not None:
            await self._own.close()

    def _limited(self, limit_s: float) -> float:
        call = current_call()
        remaining_s = call.remaining_s() if call is not None else None
        limit_s = limit_s if remaining_s is None else min(limit_s, remaining_s)
        if limit_s <= 0:
            raise DeadlineExceeded(f"the deadline had passed before {self.model} was asked")
        return limit_s

    def _failure(self, error: Exception, rename: Rename) -> FabulaError:
        """An exception of a call as ours. The client tells a line; the status behind it, where there is one, all."""
        if isinstance(error, FabulaError):
            return error
        if self._closed or isinstance(error, grpc.aio.UsageError | asyncio.InvalidStateError):
            return ShuttingDown()  # the connection was closed under the call
        cause = error if isinstance(error, grpc.RpcError) else error.__context__
        if not isinstance(cause, grpc.RpcError) or not hasattr(cause, "trailing_metadata"):
            log.warning("remote_answer_unreadable", model=self.model, error=type(error).__name__, message=str(error))
            return Internal(f"{self.model} gave an answer that cannot be read")
        failed: Any = cause
        found = error_from_status(failed.code(), failed.details() or "", failed.trailing_metadata() or ())
        return self._ours(found, rename)

    def _told(self, line: str, rename: Rename) -> FabulaError:
        """An error that a stream told in a line: ours begin with their reason."""
        found = _REASON.fullmatch(line)
        if found is None:
            return self._ours(Internal(f"{self.model}: {line[:300]}"), rename)
        reason = found["reason"]
        field, colon, _ = found["message"].partition(": ")
        violations = [FieldViolation(field, found["message"])] if colon and " " not in field else []
        error = error_from_reason(Code.INTERNAL, reason, found["message"], field_violations=violations)
        return self._ours(error, rename)

    def _ours(self, error: FabulaError, rename: Rename) -> FabulaError:
        if isinstance(error, Unauthenticated | PermissionDenied):
            return FailedPrecondition(f"{self.address} does not let this service in: {error.message}")
        if isinstance(error, ModelUnknown):
            return Unavailable(f"{self.model} is not loaded on {self.address} now")
        if isinstance(error, InvalidArgument):
            error.field_violations = tuple(
                FieldViolation(rename(each.field), each.description) for each in error.field_violations
            )
            if "field" in error.metadata:
                error.metadata["field"] = rename(error.metadata["field"])
        error.metadata.setdefault("endpoint", self.model)
        return error


def bytes_tensor(name: str, values: Sequence[bytes]) -> Any:
    """An input of texts or files."""
    from tritonclient.grpc import InferInput

    tensor = InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=np.object_))
    return tensor


def small_numbers_tensor(name: str, values: Sequence[int]) -> Any:
    """An input of whole numbers from 0 to 255."""
    from tritonclient.grpc import InferInput

    tensor = InferInput(name, [len(values)], "UINT8")
    tensor.set_data_from_numpy(np.array(values, dtype=np.uint8))
    return tensor


def one_of_bytes(result: Any, name: str) -> bytes | None:
    """The single element of a BYTES output; None where the answer holds no such thing."""
    values = result.as_numpy(name)
    if values is None or values.size != 1:
        return None
    value = values.reshape(-1)[0]
    return value if isinstance(value, bytes) else str(value).encode()


def _requested(outputs: Sequence[str]) -> list[Any]:
    from tritonclient.grpc import InferRequestedOutput

    return [InferRequestedOutput(name) for name in outputs]


def _is_cancelled() -> bool:
    """Whether whoever waits for this gave up, rather than the connection."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
