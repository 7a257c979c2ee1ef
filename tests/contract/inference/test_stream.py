"""Streams of the unmodified tritonclient: previews, many requests side by side, errors of one, cancelling all."""

from __future__ import annotations

import asyncio
import io
import queue
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferRequestedOutput, InferResult
from tritonclient.grpc import aio as stock_aio
from tritonclient.utils import InferenceServerException

from tests.contract.inference.edge import WAIT_S, Edge
from tests.contract.inference.requests import caption_inputs, frame_inputs

Answers = queue.Queue[tuple[InferResult | None, InferenceServerException | None]]


def told(result: InferResult) -> dict[str, Any]:
    """A response's parameters as plain values."""
    found = result.get_response().parameters
    return {name: getattr(found[name], found[name].WhichOneof("parameter_choice")) for name in found}


@contextmanager
def streaming(edge: Edge) -> Iterator[tuple[InferenceServerClient, Answers]]:
    """A stock client with an open stream, and what comes back on it."""
    answers: Answers = queue.Queue()
    with InferenceServerClient(edge.target) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        failed = True
        try:
            yield client, answers
            failed = False
        finally:
            client.stop_stream(cancel_requests=failed)


def final(answers: Answers) -> InferResult:
    """The next last answer of a request."""
    while True:
        result, error = answers.get(timeout=WAIT_S)
        assert error is None, error
        assert result is not None
        if told(result)["triton_final_response"]:
            return result


async def until(condition: Callable[[], bool]) -> None:
    """Waits for the other side to notice something."""
    for _ in range(int(WAIT_S * 100)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


def test_previews_come_before_the_picture(edge: Edge) -> None:
    with streaming(edge) as (client, answers):
        asked = {"steps": 6, "seed": 3, "preview_every": 2}
        outputs = [InferRequestedOutput("IMAGE"), InferRequestedOutput("PIXELS")]
        client.async_stream_infer("frame/tiny", frame_inputs(), request_id="a", outputs=outputs, parameters=asked)
        got = [answers.get(timeout=WAIT_S)[0] for _ in range(3)]
    assert [told(each)["triton_final_response"] for each in got] == [False, False, True]
    assert [(told(each)["preview"], told(each)["step"]) for each in got[:2]] == [(True, 2), (True, 4)]
    assert "preview" not in told(got[2])
    for each, kind in zip(got, ("WEBP", "WEBP", "PNG"), strict=True):
        picture = Image.open(io.BytesIO(each.as_numpy("IMAGE")[0]))
        assert picture.format == kind
        assert each.as_numpy("PIXELS").shape == (*picture.size[::-1], 3)
        assert each.get_response().id == "a"
    assert np.array_equal(got[2].as_numpy("PIXELS"), np.asarray(picture))


def test_no_previews_unless_asked_for(edge: Edge) -> None:
    with streaming(edge) as (client, answers):
        client.async_stream_infer(
            "frame/tiny", frame_inputs(), parameters={"steps": 6}, enable_empty_final_response=True
        )
        result, _ = answers.get(timeout=WAIT_S)
    assert result is not None
    assert told(result)["triton_final_response"]
    assert result.as_numpy("IMAGE") is not None  # the last answer is the picture, not an empty one after it
    assert answers.empty()


def test_many_requests_of_one_stream_are_told_apart(edge: Edge) -> None:
    seeds = range(100, 112)
    with streaming(edge) as (client, answers):
        for seed in seeds:
            asked = {"steps": 2, "seed": seed}
            client.async_stream_infer("frame/tiny", frame_inputs(), request_id=f"seed {seed}", parameters=asked)
        client.async_stream_infer("caption/tiny", caption_inputs(), request_id="text", parameters={"seed": 1})
        found = {result.get_response().id: told(result)["seed"] for result in (final(answers) for _ in range(13))}
    assert found == {**{f"seed {seed}": seed for seed in seeds}, "text": 1}


def test_one_bad_request_leaves_the_stream_open(edge: Edge) -> None:
    with streaming(edge) as (client, answers):
        client.async_stream_infer("frame/tiny", frame_inputs(" "), request_id="bad")
        result, error = answers.get(timeout=WAIT_S)
        assert result is None
        assert error is not None
        assert error.message().startswith("[request id: bad] DESCRIPTION_EMPTY: PROMPT: ")
        client.async_stream_infer("frame/nowhere", frame_inputs(), request_id="lost")
        assert "[request id: lost] MODEL_UNKNOWN: " in answers.get(timeout=WAIT_S)[1].message()
        client.async_stream_infer("frame/tiny", frame_inputs(), request_id="good", parameters={"steps": 1})
        assert final(answers).get_response().id == "good"


def test_what_goes_wrong_inside_is_told_without_its_details(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("the secret of the house")

    with streaming(edge) as (client, answers):
        with monkeypatch.context() as patch:
            patch.setattr("services.story.inference.servicer.read_inputs", broken)
            client.async_stream_infer("frame/tiny", frame_inputs(), request_id="a")
            error = answers.get(timeout=WAIT_S)[1]
        assert "INTERNAL: something went wrong inside; the log has it under" in error.message()
        assert "secret" not in error.message()
        client.async_stream_infer("frame/tiny", frame_inputs(), parameters={"steps": 1})
        final(answers)


def test_a_timeout_of_one_request_leaves_the_others(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge()
    edge.steps.hold_after = 1
    with streaming(edge) as (client, answers):
        asked = {"steps": 3, "seed": 1}
        client.async_stream_infer("frame/tiny", frame_inputs(), request_id="slow", parameters=asked)
        assert edge.steps.held.wait(WAIT_S)
        client.async_stream_infer(
            "frame/tiny", frame_inputs(), request_id="short", timeout=300_000, parameters={"steps": 3, "seed": 2}
        )
        error = answers.get(timeout=WAIT_S)[1]
        # Either is told: the frame service may foresee that it cannot be done in time.
        assert re.match(r"\[request id: short\] DEADLINE_(EXCEEDED|UNREACHABLE): ", error.message())
        edge.steps.release()
        assert final(answers).get_response().id == "slow"
    assert 2 not in edge.steps.count


async def test_cancelling_the_stream_stops_its_jobs_within_two_steps(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge()
    edge.steps.hold_after = 3
    answers: Answers = queue.Queue()
    with InferenceServerClient(edge.target) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for seed in (1, 2):
            client.async_stream_infer("frame/tiny", frame_inputs(), parameters={"steps": 90, "seed": seed})
        await until(edge.steps.held.is_set)
        assert edge.engine.tickets
        client.stop_stream(cancel_requests=True)
        await until(lambda: all(ticket.cancelled for ticket in edge.engine.tickets))
        error = (await asyncio.to_thread(answers.get, timeout=WAIT_S))[1]
        assert error is not None
        assert error.status() == "StatusCode.CANCELLED"
        edge.steps.release()
        # The engine is free for others, and no cancelled job went on.
        client.infer("frame/tiny", frame_inputs(), parameters={"steps": 1, "seed": 3})
        await until(lambda: not edge.engine.tickets)
    assert all(edge.steps.count.get(seed, 0) <= 3 + 2 for seed in (1, 2)), edge.steps.count


async def test_cancelling_one_call_stops_its_job_within_two_steps(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge()
    edge.steps.hold_after = 3
    answers: Answers = queue.Queue()
    with InferenceServerClient(edge.target) as client:
        call = client.async_infer(
            "frame/tiny",
            frame_inputs(),
            lambda result, error: answers.put((result, error)),
            parameters={"steps": 90, "seed": 1},
        )
        await until(edge.steps.held.is_set)
        call.cancel()
        await until(lambda: all(ticket.cancelled for ticket in edge.engine.tickets))
        error = (await asyncio.to_thread(answers.get, timeout=WAIT_S))[1]
        assert error is not None
        assert error.status() == "StatusCode.CANCELLED"
        edge.steps.release()
        client.infer("frame/tiny", frame_inputs(), parameters={"steps": 1, "seed": 2})
        await until(lambda: not edge.engine.tickets)
    assert edge.steps.count[1] <= 3 + 2


async def test_the_asyncio_client_streams_and_cancels(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge()
    edge.steps.hold_after = 4

    async def requests() -> AsyncIterator[dict[str, Any]]:
        asked = {"steps": 90, "seed": 1, "preview_every": 1}
        yield {"model_name": "frame/tiny", "inputs": frame_inputs(), "request_id": "one", "parameters": asked}
        await asyncio.Event().wait()  # the stream stays open

    async with stock_aio.InferenceServerClient(edge.target) as client:
        stream = client.stream_infer(requests())
        steps = []
        async for result, error in stream:
            assert error is None
            steps.append(told(result)["step"])
            if len(steps) == 3:
                break
        assert steps == [1, 2, 3]
        await until(edge.steps.held.is_set)
        stream.cancel()
        await until(lambda: all(ticket.cancelled for ticket in edge.engine.tickets))
        edge.steps.release()
        await until(lambda: not edge.engine.tickets)
    assert edge.steps.count[1] <= 4 + 2
