"""The engine: jobs join, leave, fail and are given up without their neighbours noticing."""

from __future__ import annotations

import asyncio
import hashlib
import io
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from services.frame import engine as engine_module
from services.frame.acceleration import accelerations
from services.frame.engine import EngineSettings, FrameEngine, Ticket
from services.frame.job import Event, FrameJob, Preview, Progress, Queued, ReferenceImage, RenderedFrame
from services.frame.scheduler import Scheduler
from services.frame.sketch import sketch_of
from services.models.cost import flops_of_a_row
from services.models.drawing import Drawing, Start, begin_together, finish
from services.models.references import ReferencePolicy
from services.models.registry import FrameModel
from services.models.step import StepRows, advance, draw
from services.runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    DeadlineUnreachable,
    DescriptionEmpty,
    DescriptionTooLong,
    EngineDead,
    FabulaError,
    ImageUnreadable,
    PackUnknown,
    QueueFull,
    RenderFailed,
    ReplicaLost,
    ShuttingDown,
    TooManyReferences,
    ValueOutOfRange,
)

from .conftest import picture

WAIT_S = 30.0  # a test that waits so long has failed


def job(seed: int = 1, references: int = 0, **changes: Any) -> FrameJob:
    base = FrameJob(
        description=f"a fox and a lamp {seed}",
        seed=seed,
        references=tuple(ReferenceImage(image=picture(i), description=f"frame {i}") for i in range(references)),
    )
    return replace(base, **changes)


class Inbox:
    """What an engine told about one job."""

    def __init__(self, engine: FrameEngine, job: FrameJob) -> None:
        self._events: queue.Queue[Event | FabulaError] = queue.Queue()
        self.seen: list[Event | FabulaError] = []
        self.ticket: Ticket = engine.submit(job, self._events.put)

    def next(self) -> Event | FabulaError:
        self.seen.append(self._events.get(timeout=WAIT_S))
        return self.seen[-1]

    def last(self) -> RenderedFrame | FabulaError:
        while True:
            event = self.next()
            if isinstance(event, RenderedFrame | FabulaError):
                return event

    @property
    def frame_seen(self) -> RenderedFrame:
        """What `frame` returned."""
        assert isinstance(self.seen[-1], RenderedFrame)
        return self.seen[-1]

    def frame_of_kind(self) -> Any:
        self.frame()
        return self.ticket.job.kind

    def frame(self) -> RenderedFrame:
        last = self.last()
        assert isinstance(last, RenderedFrame), last
        return last


@contextmanager
def running(
    model: FrameModel,
    settings: EngineSettings | None = None,
    clock: Callable[[], float] = time.monotonic,
    **more: Any,
) -> Iterator[FrameEngine]:
    engine = FrameEngine({"tiny": model}, "tiny", settings, clock=clock, **more)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


class Gate:
    """Stands before every step of an engine: lets steps through when told, and notes who took each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turns: list[list[int]] = []  # seeds, per step
        self._permits = threading.Semaphore(0)
        self._arrived: queue.Queue[None] = queue.Queue()
        self._open = False
        monkeypatch.setattr(engine_module, "advance", self._advance)

    def _advance(self, model: FrameModel, drawings: Sequence[Drawing], *rest: Any, **more: Any) -> int:
        self._arrived.put(None)
        if not self._open:
            assert self._permits.acquire(timeout=WAIT_S)
        self.turns.append([d.sketch.seed for d in drawings])
        return advance(model, drawings, *rest, **more)

    def wait(self) -> None:
        """Until the engine stands before a step."""
        self._arrived.get(timeout=WAIT_S)

    def step(self) -> None:
        """Let one step through and wait until the engine stands before the next."""
        self._permits.release()
        self.wait()

    def open(self) -> None:
        """Let everything through from now on."""
        self._open = True
        self._permits.release()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_a_job_is_told_about_each_step_and_ends_with_its_picture(tiny_model: FrameModel) -> None:
    with running(tiny_model) as engine:
        inbox = Inbox(engine, job(references=2, preview_every_steps=2))
        frame = inbox.frame()
    kinds = [type(event) for event in inbox.seen]
    assert kinds == [Queued, Progress, Progress, Preview, Progress, Progress, RenderedFrame]
    progress = [event for event in inbox.seen if isinstance(event, Progress)]
    assert [(p.step, p.step_count) for p in progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(p.eta_s > 0 for p in progress[:-1])
    assert progress[-1].eta_s == 0
    preview = next(event for event in inbox.seen if isinstance(event, Preview))
    assert (preview.step, Image.open(io.BytesIO(preview.image)).format) == (2, "WEBP")
    assert frame.sha256 == hashlib.sha256(frame.image).hexdigest()
    assert frame.pack_digest == tiny_model.manifest.digest
    assert Image.open(io.BytesIO(frame.image)).size == (64, 64)
    assert frame.queue_s >= 0
    assert frame.render_s > 0


def test_the_picture_is_the_one_that_drawing_alone_gives(tiny_model: FrameModel) -> None:
    expected = draw(tiny_model, sketch_of(job(references=2), tiny_model))
    with running(tiny_model) as engine:
        frames = [Inbox(engine, job(references=2)).frame() for _ in range(2)]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(frames[0].image))), expected)
    assert frames[0].sha256 == frames[1].sha256


def test_jobs_join_and_leave_between_steps(tiny_model: FrameModel, gate: Gate) -> None:
    with running(tiny_model) as engine:
        first = Inbox(engine, job(1, references=1))
        gate.wait()
        gate.step()
        second, third = Inbox(engine, job(2, steps=2)), Inbox(engine, job(3, references=3))
        gate.open()
        frames = [inbox.frame() for inbox in (first, second, third)]
    assert gate.turns[0] == [1]
    assert sorted(max(gate.turns, key=len)) == [1, 2, 3]
    assert sum(turn.count(2) for turn in gate.turns) == 2
    assert all(frame.image for frame in frames)


def test_a_frame_does_not_depend_on_its_neighbours(tiny_model: FrameModel, gate: Gate) -> None:
    """At most one level of 255 in a pixel; alone, not even that."""
    with running(tiny_model) as engine:
        inboxes = [Inbox(engine, job(seed, references=seed % 4)) for seed in range(1, 7)]
        gate.open()
        together = [inbox.frame() for inbox in inboxes]
    assert max(len(turn) for turn in gate.turns) >= 5
    for seed, frame in enumerate(together, start=1):
        alone = draw(tiny_model, sketch_of(job(seed, references=seed % 4), tiny_model)).astype(int)
        assert np.abs(np.asarray(Image.open(io.BytesIO(frame.image))).astype(int) - alone).max() <= 1


def test_other_sizes_take_turns_in_the_same_engine(tiny_model: FrameModel) -> None:
    with running(tiny_model) as engine:
        sizes = [(64, 64), (32, 96), (64, 64), (96, 40)]
        inboxes = [Inbox(engine, job(i, 1, width_px=w, height_px=h)) for i, (w, h) in enumerate(sizes)]
        frames = [inbox.frame() for inbox in inboxes]
    assert [Image.open(io.BytesIO(frame.image)).size for frame in frames] == sizes


def test_a_cancelled_job_takes_part_in_no_step_but_the_one_that_runs(tiny_model: FrameModel, gate: Gate) -> None:
    with running(tiny_model) as engine:
        given_up, kept = Inbox(engine, job(1, steps=50)), Inbox(engine, job(2, steps=8))
        gate.wait()
        gate.step()
        gate.step()  # and stands before the third one, in which both are
        given_up.ticket.cancel()
        before = len(gate.turns)
        gate.open()
        assert isinstance(given_up.last(), Cancelled)
        assert isinstance(kept.last(), RenderedFrame)
    assert [1 in turn for turn in gate.turns[before:]] == [True, *[False] * (len(gate.turns) - before - 1)]


def test_a_job_cancelled_in_the_queue_never_starts(tiny_model: FrameModel, gate: Gate) -> None:
    with running(tiny_model, EngineSettings(max_running=1)) as engine:
        first, waiting = Inbox(engine, job(1)), Inbox(engine, job(2))
        gate.wait()
        waiting.ticket.cancel()
        gate.step()
        assert isinstance(waiting.last(), Cancelled)  # at once, while the first is still being drawn
        gate.open()
        first.frame()
    assert all(2 not in turn for turn in gate.turns)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(tiny_model: FrameModel, gate: Gate) -> None:
    with running(tiny_model, EngineSettings(max_running=1, max_queued=2)) as engine:
        inboxes = [Inbox(engine, job(1))]
        gate.wait()
        inboxes += [Inbox(engine, job(seed)) for seed in (2, 3)]
        with pytest.raises(QueueFull) as raised:
            engine.submit(job(4), lambda _: None)
        assert raised.value.retry_after_s is not None
        assert raised.value.retry_after_s >= 1.0
        gate.open()
        for inbox in inboxes:
            inbox.frame()
    ahead = [inbox.seen[0] for inbox in inboxes]
    assert ahead == [Queued(0), Queued(1), Queued(2)]


def test_a_job_whose_deadline_has_passed_never_starts(tiny_model: FrameModel, gate: Gate) -> None:
    now = [100.0]
    with running(tiny_model, EngineSettings(max_running=1, stall_s=1e9), clock=lambda: now[0]) as engine:
        with pytest.raises(DeadlineExceeded):
            engine.submit(job(9, deadline_s=99.0), lambda _: None)
        first = Inbox(engine, job(1))
        gate.wait()
        late = Inbox(engine, job(2, deadline_s=150.0))
        now[0] = 151.0
        gate.open()
        assert isinstance(late.last(), DeadlineExceeded)
        first.frame()
    assert all(2 not in turn for turn in gate.turns)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(tiny_model: FrameModel) -> None:
    now = [100.0]

    class Slow(Gate):
        def _advance(self, model: FrameModel, drawings: Sequence[Drawing], *rest: Any, **more: Any) -> int:
            now[0] += 1.0
            return advance(model, drawings, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        Slow(patch)
        with running(tiny_model, EngineSettings(max_running=1, stall_s=1e9), clock=lambda: now[0]) as engine:
            Inbox(engine, job(1, steps=4)).frame()
            with pytest.raises(DeadlineUnreachable, match=r"20\.0 s") as refused:
                engine.submit(job(2, steps=20, deadline_s=now[0] + 10.0), lambda _: None)
            assert refused.value.retry_after_s is None, "it would not help"
            Inbox(engine, job(3, steps=4, deadline_s=now[0] + 10.0)).frame()


def test_tenants_take_turns(tiny_model: FrameModel, gate: Gate) -> None:
    with running(tiny_model, EngineSettings(max_running=1)) as engine:
        first = Inbox(engine, job(1, steps=1, tenant="greedy"))
        gate.wait()
        greedy = [Inbox(engine, job(seed, steps=1, tenant="greedy")) for seed in (2, 3, 4)]
        modest = Inbox(engine, job(9, steps=1, tenant="modest"))
        gate.open()
        for inbox in (first, *greedy, modest):
            inbox.frame()
    assert [seed for turn in gate.turns for seed in turn] == [1, 9, 2, 3, 4]


def test_a_deadline_ends_a_job_that_is_being_drawn(tiny_model: FrameModel, gate: Gate) -> None:
    now = [100.0]
    with running(tiny_model, EngineSettings(stall_s=1e9), clock=lambda: now[0]) as engine:
        inbox = Inbox(engine, job(1, steps=50, deadline_s=150.0))
        gate.wait()
        gate.step()
        now[0] = 151.0
        gate.open()
        assert isinstance(inbox.last(), DeadlineExceeded)
    assert len(gate.turns) <= 3


def test_one_bad_job_fails_alone(tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_for_seven(model: FrameModel, drawings: Sequence[Drawing], *rest: Any, **more: Any) -> int:
        if any(d.sketch.seed == 7 and d.done == 2 for d in drawings):
            raise RuntimeError("CUDA error: secret path /home/me")
        return advance(model, drawings, *rest, **more)

    monkeypatch.setattr(engine_module, "advance", fails_for_seven)
    with running(tiny_model) as engine:
        inboxes = {seed: Inbox(engine, job(seed, references=1)) for seed in (6, 7, 8)}
        ends = {seed: inbox.last() for seed, inbox in inboxes.items()}
        assert isinstance(ends[7], RenderFailed)
        assert "secret" not in str(ends[7])
        steps = {s: [e.step for e in i.seen if isinstance(e, Progress)] for s, i in inboxes.items()}
        assert steps == {6: [1, 2, 3, 4], 7: [1, 2], 8: [1, 2, 3, 4]}
        assert isinstance(ends[6], RenderedFrame)
        assert isinstance(ends[8], RenderedFrame)
        assert Inbox(engine, job(9)).frame()
        assert engine.is_healthy


class Decoding:
    """Notes the seeds of those whose pictures an engine decodes together; one of `seed` cannot be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: int | None = None) -> None:
        self.together: list[list[int]] = []
        self._fails = fails
        monkeypatch.setattr(engine_module, "finish", self._finish)

    def _finish(self, model: FrameModel, drawings: Sequence[Drawing]) -> list[Any]:
        seeds = [drawing.sketch.seed for drawing in drawings]
        self.together.append(seeds)
        if self._fails in seeds:
            raise RuntimeError("no room")
        return finish(model, drawings)


both_ways = pytest.mark.parametrize("beside", [False, True], ids=["between-steps", "beside-steps"])


@both_ways
@pytest.mark.parametrize("strict", [False, True])
def test_pictures_that_end_together_are_decoded_together(
    tiny_model: FrameModel, gate: Gate, monkeypatch: pytest.MonkeyPatch, strict: bool, beside: bool
) -> None:
    decoding = Decoding(monkeypatch)
    with running(tiny_model, EngineSettings(strict=strict, decode_beside=beside)) as engine:
        first = Inbox(engine, job(5))
        gate.wait()
        both = [Inbox(engine, job(seed)) for seed in (6, 7)]
        gate.open()
        assert all(inbox.frame() for inbox in (first, *both))
    assert decoding.together == ([[5], [6], [7]] if strict else [[5], [6, 7]])


def test_pictures_too_large_to_be_decoded_together_do_not_wait_for_each_other(
    tiny_model: FrameModel, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.models.drawing._DECODED_PX", 1)
    decoding = Decoding(monkeypatch)
    with running(tiny_model) as engine:
        first = Inbox(engine, job(5))
        gate.wait()
        both = [Inbox(engine, job(seed)) for seed in (6, 7)]
        gate.open()
        assert all(inbox.frame() for inbox in (first, *both))
    assert decoding.together == [[5], [6], [7]]


@both_ways
def test_a_picture_that_cannot_be_decoded_fails_alone(
    tiny_model: FrameModel, gate: Gate, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    decoding = Decoding(monkeypatch, fails=7)
    with running(tiny_model, EngineSettings(decode_beside=beside)) as engine:
        first = Inbox(engine, job(5))
        gate.wait()
        inboxes = {seed: Inbox(engine, job(seed)) for seed in (6, 7, 8)}
        gate.open()
        ends = {seed: inbox.last() for seed, inbox in inboxes.items()}
        assert isinstance(ends[7], RenderFailed)
        assert isinstance(ends[6], RenderedFrame)
        assert isinstance(ends[8], RenderedFrame)
        assert first.frame()
        assert engine.is_healthy
    assert decoding.together == [[5], [6, 7, 8], [6], [7], [8]]


class Beginning:
    """Notes the seeds of those who begin together in an engine; one of `fails` cannot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: int | None = None) -> None:
        self.together: list[list[int]] = []
        self._fails = fails
        monkeypatch.setattr(engine_module, "begin_together", self._begin)

    def _begin(self, model: FrameModel, starts: Sequence[Start]) -> list[Drawing]:
        seeds = [start.sketch.seed for start in starts]
        self.together.append(seeds)
        if self._fails in seeds:
            raise RuntimeError("no room")
        return begin_together(model, starts)


@pytest.mark.parametrize("strict", [False, True])
def test_jobs_that_come_in_together_begin_together(
    tiny_model: FrameModel, gate: Gate, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    beginning = Beginning(monkeypatch)
    with running(tiny_model, EngineSettings(strict=strict)) as engine:
        first = Inbox(engine, job(5))
        gate.wait()
        both = [Inbox(engine, job(seed, references=1)) for seed in (6, 7)]
        gate.open()
        assert all(inbox.frame() for inbox in (first, *both))
    assert beginning.together == ([[5], [6], [7]] if strict else [[5], [6, 7]])


def test_a_job_that_cannot_begin_fails_alone(
    tiny_model: FrameModel, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginning = Beginning(monkeypatch, fails=7)
    with running(tiny_model) as engine:
        first = Inbox(engine, job(5))
        gate.wait()
        inboxes = {seed: Inbox(engine, job(seed)) for seed in (6, 7, 8)}
        gate.open()
        ends = {seed: inbox.last() for seed, inbox in inboxes.items()}
        assert isinstance(ends[7], RenderFailed)
        assert isinstance(ends[6], RenderedFrame)
        assert isinstance(ends[8], RenderedFrame)
        assert first.frame()
        assert engine.is_healthy
        assert Inbox(engine, job(9)).frame(), "its place is free again"
    assert beginning.together == [[5], [6, 7, 8], [6], [7], [8], [9]]


def test_a_device_that_breaks_while_jobs_begin_may_have_broken_of_any_of_them(
    tiny_model: FrameModel, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def broken(model: FrameModel, starts: Sequence[Start]) -> list[Drawing]:
        tried.append(len(starts))
        if len(tried) > 1:
            raise torch.AcceleratorError("the context is gone")
        return begin_together(model, starts)

    monkeypatch.setattr(engine_module, "begin_together", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with running(tiny_model, EngineSettings(max_running=3)) as engine:
        first = Inbox(engine, job(5))
        gate.wait()
        begun = [Inbox(engine, job(seed)) for seed in (6, 7)]
        waits = Inbox(engine, job(8))
        gate.open()
        assert all(isinstance(inbox.last(), ReplicaLost) for inbox in (first, *begun))
        assert isinstance(waits.last(), EngineDead)
        assert not engine.is_healthy
    assert tried == [1, 2], "nobody tries again on a broken device"


class SlowDecoding:
    """Stands before every decoding of an engine, and lets it through when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, raises: BaseException | None = None) -> None:
        self.arrived = threading.Event()
        self.may_go_on = threading.Event()
        self._raises = raises
        monkeypatch.setattr(engine_module, "finish", self._finish)

    def _finish(self, model: FrameModel, drawings: Sequence[Drawing]) -> list[Any]:
        self.arrived.set()
        assert self.may_go_on.wait(WAIT_S)
        if self._raises is not None:
            raise self._raises
        return finish(model, drawings)


def test_others_step_while_a_picture_is_decoded_beside_them(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    decoding = SlowDecoding(monkeypatch)
    with running(
        tiny_model, EngineSettings(max_running=1, decode_beside=True, stall_s=60.0), clock=lambda: now[0]
    ) as engine:
        first = Inbox(engine, job(1))
        assert decoding.arrived.wait(WAIT_S)
        first.ticket.cancel()  # too late: the picture is made already
        second = Inbox(engine, job(2))  # whose place is free
        while not (isinstance(event := second.next(), Progress) and event.step == event.step_count):
            assert not isinstance(event, FabulaError)
        assert engine.is_healthy
        now[0] = 161.0
        assert not engine.is_healthy, "a decoding that hangs is a unit of work that hangs"
        assert [ticket.sketch.seed for ticket in engine.tickets] == [1, 2]
        decoding.may_go_on.set()
        assert first.frame()
        assert second.frame()
    with running(tiny_model, EngineSettings()) as engine:
        assert Inbox(engine, job(1)).frame().image == first.frame_seen.image


def test_stopping_waits_for_pictures_that_are_being_decoded(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = SlowDecoding(monkeypatch)
    with running(tiny_model, EngineSettings(max_running=1, decode_beside=True)) as engine:
        ready = Inbox(engine, job(1))
        assert decoding.arrived.wait(WAIT_S)
        drawn = Inbox(engine, job(2, steps=200))
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        decoding.may_go_on.set()
        assert isinstance(drawn.last(), ShuttingDown)
        stopper.join(WAIT_S)
        assert ready.frame()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_breaks_while_it_decodes_takes_the_engine_with_it(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = SlowDecoding(monkeypatch, raises=torch.AcceleratorError("the context is gone"))
    with running(tiny_model, EngineSettings(max_running=1, decode_beside=True)) as engine:
        first = Inbox(engine, job(1))
        assert decoding.arrived.wait(WAIT_S)
        second = Inbox(engine, job(2, steps=200))
        decoding.may_go_on.set()
        assert isinstance(first.last(), ReplicaLost)
        assert isinstance(second.last(), ReplicaLost | EngineDead)
        engine._thread.join(WAIT_S)
        assert not engine.is_healthy


def test_what_makes_drawing_faster_is_told_with_the_reason() -> None:
    here = {
        one.name: one for one in accelerations(torch.device("cpu"), torch.float32, decode_beside=False, graphs=False)
    }
    gpu = {
        one.name: one for one in accelerations(torch.device("cuda"), torch.bfloat16, decode_beside=True, graphs=True)
    }
    assert {name for name, one in here.items() if one.on} == {"merged_characters"}
    assert {name for name, one in gpu.items() if one.on} == set(gpu) - {"merged_characters"}
    assert all(here[name].why != gpu[name].why for name in here)


def test_numbers_that_are_not_finite_are_an_error_and_no_black_frame(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisons_seven(model: FrameModel, drawings: Sequence[Drawing], *rest: Any, **more: Any) -> int:
        rows = advance(model, drawings, *rest, **more)
        for drawing in drawings:
            if drawing.sketch.seed == 7:
                drawing.latents_CHW = torch.full_like(drawing.latents_CHW, float("nan"))
        return rows

    monkeypatch.setattr(engine_module, "advance", poisons_seven)
    with running(tiny_model) as engine:
        sick, well = Inbox(engine, job(7)), Inbox(engine, job(8))
        end = sick.last()
        assert isinstance(end, RenderFailed)
        assert end.reason == "RENDER_FAILED"
        assert well.frame()


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"description": "  "}, DescriptionEmpty, "description"),
        ({"description": "x" * 95}, DescriptionTooLong, "description"),
        ({"description": "x" * 20_000}, DescriptionTooLong, "description"),
        ({"pack": "sketch"}, PackUnknown, "pack"),
        ({"width_px": 60}, ValueOutOfRange, "width_px"),
        ({"height_px": 8}, ValueOutOfRange, "height_px"),
        ({"width_px": 1024, "height_px": 1024}, ValueOutOfRange, "width_px"),
        ({"steps": 201}, ValueOutOfRange, "steps"),
        ({"text_guidance": -1.0}, ValueOutOfRange, "text_guidance"),
        ({"text_guidance": float("nan")}, ValueOutOfRange, "text_guidance"),
        ({"image_guidance": 31.0}, ValueOutOfRange, "image_guidance"),
        ({"seed": -1}, ValueOutOfRange, "seed"),
        ({"references": (ReferenceImage(image=b"x", description=""),)}, ImageUnreadable, "references[0].image"),
        ({"references": (ReferenceImage(image=b"", description=""),) * 4}, TooManyReferences, "references"),
    ],
)
def test_a_job_that_cannot_be_drawn_is_refused_naming_the_field(
    tiny_model: FrameModel, changes: dict[str, Any], error: type[FabulaError], field: str
) -> None:
    with running(tiny_model) as engine, pytest.raises(error) as raised:
        engine.submit(replace(job(), **changes), lambda _: None)
    assert raised.value.metadata["field"] == field


def test_of_a_long_text_of_an_earlier_frame_the_beginning_is_read(tiny_model: FrameModel) -> None:
    text = "Ä long caption, " * 20
    sketch = sketch_of(job(references=1), tiny_model)
    long = replace(job(), references=(ReferenceImage(image=picture(), description=text),))
    read = sketch_of(long, tiny_model).references[0].description
    assert sketch.references[0].description == "frame 0"
    assert text.startswith(read)
    assert 80 <= len(tiny_model.text.tokenizer.encode(read)) <= 94


def test_zero_guidance_is_a_value_and_not_the_default(tiny_model: FrameModel) -> None:
    sketch = sketch_of(job(text_guidance=0.0, image_guidance=0.0), tiny_model)
    assert (sketch.text_guidance, sketch.image_guidance) == (0.0, 0.0)
    default = sketch_of(job(), tiny_model)
    sampling = tiny_model.manifest.sampling
    assert (default.text_guidance, default.image_guidance, default.steps) == (
        sampling.default_text_guidance,
        sampling.default_image_guidance,
        sampling.default_steps,
    )


def test_stopping_tells_everybody(tiny_model: FrameModel, gate: Gate) -> None:
    with running(tiny_model, EngineSettings(max_running=1)) as engine:
        inboxes = [Inbox(engine, job(seed, steps=50)) for seed in (1, 2)]
        gate.wait()
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        gate.open()
        assert all(isinstance(inbox.last(), ShuttingDown) for inbox in inboxes)
        stopper.join(WAIT_S)
        with pytest.raises(ShuttingDown):
            engine.submit(job(3), lambda _: None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_makes_the_engine_unhealthy_and_answers_everybody(
    tiny_model: FrameModel, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any) -> Any:
        raise RuntimeError("a bug in the chooser")

    with running(tiny_model, EngineSettings(max_running=1)) as engine:
        drawn, waiting = Inbox(engine, job(1)), Inbox(engine, job(3))
        gate.wait()
        assert engine.is_healthy
        monkeypatch.setattr(Scheduler, "choose", bug)
        gate.open()
        # What was being drawn may be the cause, so its caller counts; what only waited is not blamed.
        assert isinstance(drawn.last(), ReplicaLost)
        assert isinstance(waiting.last(), EngineDead)
        engine._thread.join(WAIT_S)
        assert not engine.is_healthy
        with pytest.raises(EngineDead):
            engine.submit(job(2), lambda _: None)


def test_a_step_that_hangs_makes_the_engine_unhealthy(tiny_model: FrameModel, gate: Gate) -> None:
    now = [100.0]
    with running(tiny_model, EngineSettings(stall_s=60.0), clock=lambda: now[0]) as engine:
        inbox = Inbox(engine, job(1))
        gate.wait()
        now[0] = 150.0
        assert engine.is_healthy
        now[0] = 161.0
        assert not engine.is_healthy
        gate.open()
        inbox.frame()


def test_warm_up_draws_a_full_batch(tiny_model: FrameModel, gate: Gate) -> None:
    gate.open()
    with running(tiny_model, EngineSettings(max_running=3)) as engine:
        engine.warm_up()
    assert sum(len(turn) for turn in gate.turns) == 3


async def test_closing_the_stream_gives_the_job_up(tiny_model: FrameModel) -> None:
    with running(tiny_model) as engine:
        events = engine.render(job(1, steps=200))
        seen = [await anext(events) for _ in range(3)]
        assert isinstance(seen[-1], Progress)
        await events.aclose()
        frame = [event async for event in engine.render(job(2))][-1]
        assert isinstance(frame, RenderedFrame)
        assert not engine.tickets


async def test_a_task_cancelled_while_its_job_is_checked_leaves_nothing_behind(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **more: Any) -> Any:
        checking.set()
        assert go_on.wait(WAIT_S)
        return sketch_of(*arguments, **more)

    monkeypatch.setattr(engine_module, "sketch_of", slow)
    with running(tiny_model) as engine:
        submitted: list[Ticket] = []
        submit = engine.submit

        def remembered(*arguments: Any) -> Ticket:
            submitted.append(submit(*arguments))
            return submitted[-1]

        monkeypatch.setattr(engine, "submit", remembered)

        async def consume() -> None:
            async for _ in engine.render(job(1, steps=200)):
                pass

        task = asyncio.create_task(consume())
        await asyncio.to_thread(checking.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        monkeypatch.setattr(engine_module, "sketch_of", sketch_of)
        async with asyncio.timeout(WAIT_S):
            while not (submitted and submitted[0].cancelled):  # noqa: ASYNC110 - a thread submits, and tells nobody
                await asyncio.sleep(0.01)
        assert [event async for event in engine.render(job(2))]


def test_settings_that_cannot_work_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="positive"):
        EngineSettings(max_running=0)


def test_an_unknown_default_pack_is_refused(tiny_model: FrameModel) -> None:
    with pytest.raises(ValueError, match="default pack"):
        FrameEngine({"tiny": tiny_model}, "toon")


def test_a_broken_gpu_ends_the_engine_and_not_only_the_job(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: FrameModel, drawings: Sequence[Drawing], *rest: Any, **more: Any) -> int:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine_module, "advance", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with running(tiny_model, EngineSettings(max_running=2)) as engine:
        assert isinstance(Inbox(engine, job(1)).last(), ReplicaLost)
        engine._thread.join(WAIT_S)
        assert not engine.is_healthy
        with pytest.raises(EngineDead):
            engine.submit(job(2), lambda _: None)


def test_a_burst_on_an_idle_engine_is_refused_only_beyond_places_and_queue(tiny_model: FrameModel, gate: Gate) -> None:
    with running(tiny_model, EngineSettings(max_running=3, max_queued=1)) as engine:
        inboxes = [Inbox(engine, job(seed)) for seed in range(4)]
        gate.wait()
        with pytest.raises(QueueFull):
            engine.submit(job(9), lambda _: None)
        gate.open()
        for inbox in inboxes:
            inbox.frame()


class TestStrict:
    """Bit for bit the same, whoever else is drawn."""

    SETTINGS = EngineSettings(strict=True, max_running=6)

    def jobs(self) -> list[FrameJob]:
        samplers = ("ddim", "dpm_solver_pp_2m", "euler", "lcm")
        return [job(seed, references=seed % 4, sampler=samplers[seed % 4], steps=3 + seed % 3) for seed in range(6)]

    def test_alone_batched_permuted_and_after_a_restart(self, tiny_model: FrameModel) -> None:
        alone = {}
        for one in self.jobs():
            with running(tiny_model, self.SETTINGS) as engine:
                alone[one.seed] = Inbox(engine, one).frame()
        for order in (self.jobs(), self.jobs()[::-1]):
            with running(tiny_model, self.SETTINGS) as engine:
                inboxes = {one.seed: Inbox(engine, one) for one in order}
                together = {seed: inbox.frame() for seed, inbox in inboxes.items()}
            assert {s: f.sha256 for s, f in together.items()} == {s: f.sha256 for s, f in alone.items()}
            assert {f.fingerprint for f in together.values()} == {f.fingerprint for f in alone.values()}

    def test_joined_late(self, tiny_model: FrameModel, gate: Gate) -> None:
        with running(tiny_model, self.SETTINGS) as engine:
            first = Inbox(engine, job(1, references=2))
            gate.wait()
            gate.step()
            late = Inbox(engine, job(2, references=3))
            gate.open()
            told = first.frame().sha256, late.frame().sha256
        with running(tiny_model, self.SETTINGS) as engine:
            assert told == (
                Inbox(engine, job(1, references=2)).frame().sha256,
                Inbox(engine, job(2, references=3)).frame().sha256,
            )

    def test_what_others_left_does_not_count(self, tiny_model: FrameModel) -> None:
        settings = replace(self.SETTINGS, references=ReferencePolicy(shared_noise=True, levels_count=2))
        with running(tiny_model, settings) as engine:
            first = Inbox(engine, job(3, references=3)).frame()
        with running(tiny_model, settings) as engine:
            Inbox(engine, job(4, references=2)).frame()  # has seen the same pictures
            assert Inbox(engine, job(3, references=3)).frame().sha256 == first.sha256

    def test_the_fingerprint_tells_modes_apart(self, tiny_model: FrameModel) -> None:
        told = set()
        for settings in (
            EngineSettings(),
            EngineSettings(strict=True),
            EngineSettings(references=ReferencePolicy(shared_noise=True)),
            EngineSettings(references=ReferencePolicy(levels_count=2)),
            EngineSettings(deep_every=2),
        ):
            engine = FrameEngine({"tiny": tiny_model}, "tiny", settings)
            told.add(engine.fingerprint(tiny_model))
        assert len(told) == 5


def test_a_story_finds_what_its_last_frame_left(tiny_model: FrameModel) -> None:
    settings = EngineSettings(references=ReferencePolicy(shared_noise=True, levels_count=1))
    with running(tiny_model, settings) as engine:
        Inbox(engine, job(1, references=2)).frame()
        cache = engine._cache_of(tiny_model)
        missed = cache.misses_count
        Inbox(engine, job(2, references=3)).frame()
        assert cache.misses_count - missed == 1, "only the new picture"


def test_an_unknown_sampler_is_refused(tiny_model: FrameModel) -> None:
    with running(tiny_model) as engine, pytest.raises(ValueOutOfRange, match="no sampler 'magic'; known: ddim"):
        engine.submit(job(sampler="magic"), lambda _: None)


class Watcher(engine_module._Silence):
    """Keeps what steps cost, and what the machine can do."""

    def __init__(self) -> None:
        self.flops: list[tuple[StepRows, float]] = []
        self.peaks: list[float] = []

    def step_done(self, *, jobs: int, rows: StepRows, seconds: float, flops: float) -> None:
        self.flops.append((rows, flops))

    def peak_measured(self, *, flops_per_s: float) -> None:
        self.peaks.append(flops_per_s)


def test_a_warmed_up_engine_knows_what_a_step_costs(tiny_model: FrameModel) -> None:
    watcher = Watcher()
    engine = FrameEngine({"tiny": tiny_model}, "tiny", EngineSettings(max_running=1), watcher)
    engine.start()
    try:
        engine.warm_up()
        Inbox(engine, job(1, references=2, steps=2)).frame()
    finally:
        engine.stop()
    assert watcher.peaks[0] > 1e6
    row = flops_of_a_row(tiny_model)
    parameters = sum(p.numel() for n, p in tiny_model.denoiser.unet.named_parameters() if "attn" in n)
    assert row > 2 * parameters, "every weight is used at least once"
    assert all(flops == rows.total * row for rows, flops in watcher.flops)
    assert [rows for rows, _ in watcher.flops[-2:]] == [StepRows(3, 8, 0), StepRows(3, 0, 4)]


def test_shallow_rows_and_large_pictures_are_counted_as_what_they_cost(tiny_model: FrameModel) -> None:
    watcher = Watcher()
    engine = FrameEngine({"tiny": tiny_model}, "tiny", EngineSettings(max_running=1, deep_every=2), watcher)
    engine.start()
    try:
        engine.warm_up()
        Inbox(engine, job(1, steps=2, width_px=128)).frame()
    finally:
        engine.stop()
    (deep, all_of_it), (shallow, part) = watcher.flops[-2:]
    full, little = flops_of_a_row(tiny_model), flops_of_a_row(tiny_model, shallow=True)
    assert (deep.shallow, shallow.shallow) == (0, shallow.main)
    assert all_of_it == deep.main * full * 2
    assert part == shallow.main * little * 2
    assert 0 < little < 0.9 * full


def test_previews_and_warnings_do_not_hold_up_steps_where_pictures_are_decoded_beside(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    plain = engine_module.preview

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return plain(*given)

    monkeypatch.setattr(engine_module, "preview", noted)
    with running(tiny_model, EngineSettings(decode_beside=True)) as engine:
        inbox = Inbox(engine, job(1, steps=6, preview_every_steps=2))
        inbox.frame()
    shown = [event.step for event in inbox.seen if isinstance(event, Preview)]
    assert set(threads) <= {"frame-decoding"}
    assert shown == sorted(shown)
    assert set(shown) <= {2, 4}


@pytest.mark.parametrize("decode_beside", [False, True])
def test_a_preview_that_cannot_be_made_costs_nobody_a_frame(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch, decode_beside: bool
) -> None:
    tried: list[int] = []

    def fails(model: FrameModel, drawing: Drawing) -> Any:
        tried.append(drawing.done)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine_module, "preview", fails)
    with running(tiny_model, EngineSettings(decode_beside=decode_beside)) as engine:
        shown, beside = Inbox(engine, job(1, steps=4, preview_every_steps=1)), Inbox(engine, job(2, steps=4))
        assert shown.frame().image
        assert beside.frame().image
        assert Inbox(engine, job(3, steps=1)).frame().image, "the engine lives on"
    assert tried


def test_a_large_picture_counts_for_as_much_as_it_takes(tiny_model: FrameModel) -> None:
    with running(tiny_model, EngineSettings(max_running=1)) as engine:
        sizes = [(64, 64), (128, 128), (32, 32)]
        jobs = [Inbox(engine, job(n, 2, steps=2, width_px=w, height_px=h)) for n, (w, h) in enumerate(sizes)]
        usual, large, small = (inbox.ticket.job.rows for inbox in jobs)
    assert (large, small) == (4 * usual, usual)


def test_with_more_sizes_than_the_cache_keeps_nothing_is_prefilled_in_vain(
    tiny_model: FrameModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def noted(*given: Any, prefill_rows: int) -> StepRows:
        told.append(prefill_rows)
        return advance(*given, prefill_rows=prefill_rows)

    monkeypatch.setattr(engine_module, "advance", noted)
    with running(tiny_model, EngineSettings(max_running=3)) as engine:
        for widths in ((64, 32), (64, 32, 96)):
            told.clear()
            for inbox in [Inbox(engine, job(n, 1, steps=6, width_px=width)) for n, width in enumerate(widths)]:
                inbox.frame()
            assert (0 in told) is (len(widths) == 3)


def test_guidance_may_count_in_a_part_of_the_steps_alone(tiny_model: FrameModel) -> None:
    rows = []
    for interval in ((0.0, 1.0), (0.0, 0.5)):
        with running(tiny_model, EngineSettings(guidance_interval=interval)) as engine:
            frame = Inbox(engine, job(1, 1, steps=4, text_guidance=3.0, image_guidance=2.0)).frame()
            assert frame.sketch.guidance_interval == interval
            rows.append(frame.fingerprint)
    assert rows[0] != rows[1], "it is another picture"
    for wrong in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match="guidance"):
            EngineSettings(guidance_interval=wrong)


def test_the_first_step_of_a_kind_says_nothing_of_the_next(tiny_model: FrameModel) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    with running(tiny_model, clock=clock) as engine:
        kind = Inbox(engine, job(1, steps=1)).frame_of_kind()
        assert engine._scheduler.times.predict(kind, 1, now[0]) is None
        assert Inbox(engine, job(2, steps=1)).frame_of_kind() == kind
        assert engine._scheduler.times.predict(kind, 1, now[0]) is not None


def test_previews_are_dropped_while_others_wait(tiny_model: FrameModel, gate: Gate) -> None:
    with running(tiny_model, EngineSettings(max_running=1)) as engine:
        shown = Inbox(engine, job(1, steps=3, preview_every_steps=1))
        gate.wait()
        waits = Inbox(engine, job(2, steps=3, preview_every_steps=1))
        gate.open()
        shown.frame()
        waits.frame()
    assert [event for event in shown.seen if isinstance(event, Preview)] == []
    assert [event.step for event in waits.seen if isinstance(event, Preview)] == [1, 2]
