"""The frame engine: draws many jobs at once, one denoising step at a time.

One thread owns the networks. Before each step it lets waiting jobs join, drops those that were cancelled or are too
late, asks `batching.choose` who steps, and steps them in one forward. A job that fails fails alone.

    async for event in engine.render(job):      # Queued, Progress, Preview …, and at last RenderedFrame
        ...

Knows no transport: it runs in a notebook. Knows no metrics library either: it tells an `Observer`.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import structlog
import torch

from services.frame.batching import Candidate, choose
from services.frame.job import Event, FrameJob, Preview, Progress, Queued, ReferenceImage, RenderedFrame
from services.frame.picture import png, webp
from services.frame.sketch import sketch_of
from services.models.drawing import Drawing, Pixels, Sketch, advance, begin, finish, preview
from services.models.familiarity import gain_over_shrinking_db
from services.models.registry import FrameModel
from services.models.world import Unfamiliar, World
from services.runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineDead,
    FabulaError,
    PackUnknown,
    QueueFull,
    RenderFailed,
    ReplicaLost,
    ShuttingDown,
)

log = structlog.get_logger("fabula.frame")

GAINS_REMEMBERED = (
    256  # given pictures whose familiarity is known: a story gives the same one to its first three frames
)

Deliver = Callable[[Event | FabulaError], None]
"""Where a job's events go, the last of them a RenderedFrame or an error. Called in the engine's thread, but for the
first one, Queued, which comes from the thread that submits. Must not block."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How much the engine takes on."""

    max_running: int = 8  # jobs denoised in turns; more means fuller batches and a longer wait for each
    max_queued: int = 32  # jobs that wait for room; one more is refused at once
    max_rows: int = 64  # network rows in one step; memory grows with it
    stall_s: float = 60.0  # a step that takes longer means the thread hangs

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.max_queued < 1 or self.max_rows < 1 or self.stall_s <= 0:
            raise ValueError("every limit of the frame engine must be positive")


class Observer(Protocol):
    """Who is told what the engine does, in its thread."""

    def step_done(self, *, jobs: int, rows: int, seconds: float) -> None:
        """A denoising step of `jobs` jobs took so long."""

    def job_done(self, *, outcome: str, queue_s: float, render_s: float) -> None:
        """A job left; `outcome` is "rendered" or an error's reason."""

    def load_changed(self, *, queued: int, running: int) -> None:
        """So many jobs wait and are drawn."""


class _Silence:
    """The observer of an engine that nobody watches."""

    def step_done(self, *, jobs: int, rows: int, seconds: float) -> None: ...
    def job_done(self, *, outcome: str, queue_s: float, render_s: float) -> None: ...
    def load_changed(self, *, queued: int, running: int) -> None: ...


@dataclass(eq=False)
class Ticket:
    """A job inside the engine. `cancel` may be called from any thread, at any time, more than once."""

    sketch: Sketch
    model: FrameModel
    preview_every_steps: int
    deadline_s: float | None
    deliver: Deliver
    arrival: int
    arrived_s: float
    given: int | None = None  # which reference is somebody's own picture, the first of them
    cancelled: bool = False
    # From here on the engine's thread only.
    drawing: Drawing | None = None
    started_s: float = 0.0
    last_turn: int = -1
    warnings: tuple[Unfamiliar, ...] = ()
    kind: tuple[str, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.kind = (self.model.manifest.name, self.sketch.height_px, self.sketch.width_px)

    def cancel(self) -> None:
        """Give the job up. It takes part in at most the step that is running."""
        self.cancelled = True


class FrameEngine:
    """Draws frames with the packs it was given. Start it, use it from any thread or event loop, stop it."""

    def __init__(
        self,
        models: Mapping[str, FrameModel],
        default_pack: str,
        settings: EngineSettings | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        worlds: Mapping[str, World] | None = None,
    ) -> None:
        """`worlds` says what packs know; one that is not in it never warns. Raises ValueError for the default pack."""
        if default_pack not in models:
            raise ValueError(f"the default pack {default_pack!r} is not loaded")
        self.models = dict(models)
        self.default_pack = default_pack
        self.settings = settings or EngineSettings()
        self._observer: Observer = observer or _Silence()
        self._clock = clock
        self._worlds = dict(worlds or {})
        self._gains_db: dict[tuple[str, bytes], float] = {}  # by pack and picture, oldest first
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._arrivals = 0
        self._turn = 0
        self._beginning = 0  # jobs that are neither waiting nor running: the one that is being begun
        self._dead = False
        self._stopping = False
        self._busy_since_s: float | None = None  # start of the unit of work in hand; None while idle
        self._job_s = 1.0  # running mean of a job's seconds, for retry advice
        self._thread = threading.Thread(target=self._run, name="frame-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Refuse new jobs, end those in hand with ShuttingDown, and wait for the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def is_healthy(self) -> bool:
        """The thread lives and its current unit of work is not overdue."""
        busy_since = self._busy_since_s
        overdue = busy_since is not None and self._clock() - busy_since > self.settings.stall_s
        return self._thread.is_alive() and not overdue

    def submit(self, job: FrameJob, deliver: Deliver) -> Ticket:
        """Check `job` and put it in the queue; its events go to `deliver`, beginning with Queued.

        Reads and resizes the references, so call it off the event loop. Raises QueueFull, ShuttingDown, EngineDead,
        DeadlineExceeded, or what `sketch_of` raises; then nothing was started.
        """
        self._refuse_if_full()  # before the work of reading pictures
        model = self.models.get(job.pack or self.default_pack)
        if model is None:
            raise PackUnknown(f"no pack {job.pack!r} here; loaded: {', '.join(sorted(self.models))}", field="pack")
        sketch = sketch_of(job, model)
        if job.deadline_s is not None and self._clock() >= job.deadline_s:
            raise DeadlineExceeded()
        with self._changed:
            self._refuse_if_full()
            ticket = Ticket(
                sketch,
                model,
                job.preview_every_steps,
                job.deadline_s,
                deliver,
                self._arrivals,
                self._clock(),
                next((index for index, reference in enumerate(job.references) if reference.given), None),
            )
            self._arrivals += 1
            room = self.settings.max_running - len(self._running)
            deliver(Queued(ahead_count=max(0, len(self._waiting) - room + 1)))
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def warm_up(self, timeout_s: float = 120.0) -> None:
        """Draw one step of as many frames as may run at once, with every pack, so that the first caller does not pay.

        Raises RenderFailed when that does not work: a service that cannot draw must not call itself ready.
        """
        for name, model in self.models.items():
            manifest = model.manifest
            grey = png(np.full((manifest.height_px, manifest.width_px, 3), 127, dtype=np.uint8))
            references = (ReferenceImage(image=grey, description="warm-up"),) * manifest.max_references
            job = FrameJob(description="warm-up", seed=0, pack=name, references=references, steps=1)
            last: queue.Queue[Event | FabulaError] = queue.Queue()
            for _ in range(self.settings.max_running):
                self.submit(job, last.put)
            drawn = 0
            while drawn < self.settings.max_running:
                try:
                    event = last.get(timeout=timeout_s)
                except queue.Empty:
                    raise RenderFailed(f"the pack {name!r} did not draw its warm-up in {timeout_s:g} s") from None
                if isinstance(event, FabulaError):
                    raise event
                drawn += isinstance(event, RenderedFrame)

    async def render(self, job: FrameJob) -> AsyncGenerator[Event, None]:
        """Events of `job` as they happen, the last a RenderedFrame. Closing the iterator cancels the job.

        Raises what `submit` raises, and RenderFailed, DeadlineExceeded, ReplicaLost or ShuttingDown.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | FabulaError] = asyncio.Queue()

        def deliver(event: Event | FabulaError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        submission = loop.run_in_executor(None, self.submit, job, deliver)
        try:
            ticket = await asyncio.shield(submission)
        except asyncio.CancelledError:
            # The thread cannot be interrupted: whatever it still submits is cancelled on arrival.
            submission.add_done_callback(_cancel_submitted)
            raise
        try:
            while True:
                event = await events.get()
                if isinstance(event, FabulaError):
                    raise event
                yield event
                if isinstance(event, RenderedFrame):
                    return
        finally:
            ticket.cancel()

    def _refuse_if_full(self) -> None:
        if self._stopping:
            raise ShuttingDown()
        if self._dead or not self._thread.is_alive():
            raise EngineDead()
        queued = len(self._waiting)
        # Free places count too: a burst that comes while the thread is busy finds nobody running yet.
        if queued + len(self._running) + self._beginning >= self.settings.max_running + self.settings.max_queued:
            pause_s = max(1.0, self._job_s * queued / self.settings.max_running)
            raise QueueFull(f"{queued} frames wait already; try again later", retry_after_s=round(pause_s, 1))

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while self._wait_for_work():
                self._busy_since_s = self._clock()
                self._admit()
                self._drop_lost()
                batch = self._choose()
                if batch:
                    self._step(batch)
                self._observer.load_changed(queued=len(self._waiting), running=len(self._running))
                self._busy_since_s = None
        except Exception:
            log.exception("engine_thread_died")  # health turns bad, and the process is replaced
            raise
        finally:
            with self._changed:
                self._dead = True  # whoever submits from now on is told, although the thread still lives a moment
                running, waiting = list(self._running), list(self._waiting)
                self._running.clear()
                self._waiting.clear()
            # One of those that were drawn may have killed the engine, and would kill the next one too: callers count
            # how often they get ReplicaLost. Those that only waited had no part in it.
            for ticket in running:
                self._end(ticket, ShuttingDown() if self._stopping else ReplicaLost())
            for ticket in waiting:
                self._end(ticket, ShuttingDown() if self._stopping else EngineDead())

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._stopping and not self._waiting and not self._running:
                self._changed.wait()
            return not self._stopping

    def _admit(self) -> None:
        """Let waiting jobs in while there is room. One that cannot be begun fails, and the next gets its chance."""
        while len(self._running) < self.settings.max_running:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
                self._beginning = 1
            ticket.started_s = self._clock()
            ticket.last_turn = self._turn  # newcomers go behind those who wait for a step, or they could starve them
            try:
                if (reason := self._lost(ticket)) is not None:
                    self._end(ticket, reason)
                    continue
                ticket.drawing = begin(ticket.model, ticket.sketch)
                ticket.warnings = self._warnings(ticket)
            except Exception as error:  # noqa: BLE001 - whatever a network raises, it is this job's and no other's
                self._fail(ticket, error)
            else:
                self._running.append(ticket)
            finally:
                self._beginning = 0

    def _warnings(self, ticket: Ticket) -> tuple[Unfamiliar, ...]:
        """What the pack does not know of the job's given picture. Costs one decoding a picture, and never the frame."""
        world = self._worlds.get(ticket.model.manifest.name)
        if world is None or world.familiar_gain_db is None or ticket.given is None:
            return ()
        try:
            gain_db = self._gain_db(ticket.model, ticket.sketch.references[ticket.given].pixels)
        except Exception as error:  # noqa: BLE001 - a broken device will fail the step that follows, with its own name
            log.warning("familiarity_not_measured", error=type(error).__name__)
            return ()
        told = world.unfamiliar_picture(gain_db, f"references[{ticket.given}].image")
        return () if told is None else (told,)

    def _gain_db(self, model: FrameModel, pixels: Pixels) -> float:
        key = (model.manifest.name, hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest())
        if key not in self._gains_db:
            self._gains_db[key] = gain_over_shrinking_db(model.codec, pixels)
            if len(self._gains_db) > GAINS_REMEMBERED:
                del self._gains_db[next(iter(self._gains_db))]
        return self._gains_db[key]

    def _drop_lost(self) -> None:
        for ticket in list(self._running):
            if (reason := self._lost(ticket)) is not None:
                self._leave(ticket, reason)
        with self._changed:
            lost = [(ticket, reason) for ticket in self._waiting if (reason := self._lost(ticket)) is not None]
            for ticket, _ in lost:
                self._waiting.remove(ticket)
        for ticket, reason in lost:
            self._end(ticket, reason)

    def _lost(self, ticket: Ticket) -> FabulaError | None:
        if ticket.cancelled:
            return Cancelled()
        if ticket.deadline_s is not None and self._clock() >= ticket.deadline_s:
            return DeadlineExceeded()
        return None

    def _choose(self) -> list[Ticket]:
        candidates = [
            Candidate(
                kind=ticket.kind,
                row_count=_drawing(ticket).row_count,
                last_turn=ticket.last_turn,
                arrival=ticket.arrival,
            )
            for ticket in self._running
        ]
        return [self._running[index] for index in choose(candidates, self.settings.max_rows)]

    def _step(self, batch: Sequence[Ticket]) -> None:
        """One denoising step of `batch`, then tell, preview, finish or fail each of them."""
        self._turn += 1
        began_s = self._clock()
        stepped = self._advance(batch)
        self._observer.step_done(
            jobs=len(stepped),
            rows=sum(_drawing(ticket).row_count for ticket in stepped),
            seconds=self._clock() - began_s,
        )
        for ticket in stepped:
            ticket.last_turn = self._turn
            if not _drawing(ticket).is_sound:
                self._leave(ticket, RenderFailed("the picture's numbers are not finite; try another seed or guidance"))
                continue
            try:
                self._tell(ticket)
            except Exception as error:  # noqa: BLE001 - as above
                self._running.remove(ticket)
                self._fail(ticket, error)

    def _advance(self, batch: Sequence[Ticket]) -> list[Ticket]:
        """Those of `batch` that took their step. When the batch as a whole fails, each tries alone, so that one bad
        job costs its neighbours a moment and not their pictures."""
        model = batch[0].model
        try:
            advance(model, [_drawing(ticket) for ticket in batch])
            return list(batch)
        except Exception as error:  # noqa: BLE001 - as above
            if len(batch) == 1:
                self._running.remove(batch[0])
                self._fail(batch[0], error)
                return []
            log.warning("batched_step_failed", jobs=len(batch), error=type(error).__name__)
        return [ticket for single in batch for ticket in self._advance([single])]

    def _tell(self, ticket: Ticket) -> None:
        drawing = _drawing(ticket)
        done, count = drawing.done, len(drawing.steps)
        now_s = self._clock()
        eta_s = (now_s - ticket.started_s) / done * (count - done)
        ticket.deliver(Progress(step=done, step_count=count, eta_s=eta_s))
        if drawing.finished:
            image = png(finish(ticket.model, drawing))
            ended_s = self._clock()
            frame = RenderedFrame(
                image=image,
                sha256=hashlib.sha256(image).hexdigest(),
                sketch=ticket.sketch,
                pack_digest=ticket.model.manifest.digest,
                queue_s=ticket.started_s - ticket.arrived_s,
                render_s=ended_s - ticket.started_s,
                warnings=ticket.warnings,
            )
            self._job_s += 0.2 * (frame.render_s - self._job_s)
            self._leave(ticket, frame)
        elif ticket.preview_every_steps and done % ticket.preview_every_steps == 0:
            ticket.deliver(Preview(image=webp(preview(ticket.model, drawing)), step=done))

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if isinstance(error, FabulaError):
            self._end(ticket, error)
            return
        if isinstance(error, torch.AcceleratorError):
            # The GPU's context is broken and every later call would fail at once, which to a router looks like a very
            # fast replica. So the engine dies, and its replica with it.
            self._end(ticket, ReplicaLost())
            raise error
        log.error("job_failed", exc_info=error, seed=ticket.sketch.seed, kind=ticket.kind)
        self._end(ticket, RenderFailed())

    def _leave(self, ticket: Ticket, last: RenderedFrame | FabulaError) -> None:
        self._running.remove(ticket)
        self._end(ticket, last)

    def _end(self, ticket: Ticket, last: RenderedFrame | FabulaError) -> None:
        """The ticket's last word."""
        ticket.drawing = None
        now_s = self._clock()
        started_s = ticket.started_s or now_s
        self._observer.job_done(
            outcome="rendered" if isinstance(last, RenderedFrame) else last.reason,
            queue_s=started_s - ticket.arrived_s,
            render_s=now_s - started_s,
        )
        ticket.deliver(last)


def _drawing(ticket: Ticket) -> Drawing:
    assert ticket.drawing is not None
    return ticket.drawing


def _cancel_submitted(submission: asyncio.Future[Ticket]) -> None:
    if not submission.cancelled() and submission.exception() is None:
        submission.result().cancel()
