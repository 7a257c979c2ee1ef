"""The frame engine: draws many jobs at once, one denoising step at a time.

One thread owns the networks. Before each step it lets waiting jobs join, drops those that were cancelled or are too
late, asks the scheduler who steps, and steps them in one forward. A job that fails fails alone. On a GPU a second
thread decodes the pictures that are done.

    async for event in engine.render(job):      # Queued, Progress, Preview …, and at last RenderedFrame
        ...

Knows no transport: it runs in a notebook. Knows no metrics library either: it tells an `Observer`.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import itertools
import math
import operator
import platform
import queue
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import numpy as np
import structlog
import torch

from services.frame.adapters import AdapterStore, NetworkPlaces, SlotTable
from services.frame.config import (
    ADAPTER_RANK_MAX,
    ADAPTERS_BYTES,
    NETWORKS_MAX,
    PREFILL_ROWS,
    REFERENCES_BYTES,
    STACKS_BYTES,
    STALL_S,
)
from services.frame.decoding import Decoding
from services.frame.job import Event, FrameJob, Preview, Progress, Queued, ReferenceImage, RenderedFrame
from services.frame.picture import png, webp
from services.frame.scheduler import KINDS_MAX, Job, Refusal, Scheduler, SchedulerSettings
from services.frame.sketch import CHARACTERS_MAX, checked_characters, sketch_of
from services.models.character import CharacterWeights
from services.models.cost import flops_of_a_row, peak_flops
from services.models.denoiser import StoryDenoiser
from services.models.drawing import (
    Drawing,
    Pixels,
    Sketch,
    Start,
    are_sound,
    begin_together,
    decodable,
    finish,
    preview,
    rows_of_a_frame,
)
from services.models.errors import AdapterDamaged, AdapterError
from services.models.familiarity import gain_over_shrinking_db
from services.models.lora import NOBODY, Adapter, AdapterSlots, Worn, is_whole_unet, read_adapter
from services.models.references import EXACT, SIZES_KEPT, ReferenceCache, ReferencePolicy
from services.models.registry import FrameModel
from services.models.step import StepRows, advance, forget
from services.models.text_encoder import TextChange
from services.models.world import Unfamiliar, World
from services.runtime.errors import (
    Cancelled,
    CharacterWeightsUnknown,
    CharacterWeightsUnusable,
    DeadlineExceeded,
    DeadlineUnreachable,
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

_NO_ROWS = StepRows(0, 0, 0)
_THREADS = 4  # that read callers' pictures, and as many that fetch and check characters' weights

Fetch = Callable[[str], bytes]
"""The file of a character's weights, by its SHA-256. Slow; raises FabulaError."""

Deliver = Callable[[Event | FabulaError], None]
"""Where a job's events go, the last of them a RenderedFrame or an error. Called in the engine's threads, but for the
first one, Queued, which comes from the thread that submits. Must not block."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How much the engine takes on."""

    max_running: int = SchedulerSettings.max_running  # denoised in turns; more means fuller batches and longer waits
    max_queued: int = SchedulerSettings.max_queued  # jobs that wait for room; one more is refused at once
    max_rows: int = SchedulerSettings.max_rows  # network rows in one step; memory grows with it
    tenant_queue_share: float = SchedulerSettings.tenant_queue_share  # of the waiting jobs that a named tenant may have
    aging_s: float = SchedulerSettings.aging_s  # waiting that lifts a job by one priority
    adapter_slots: int = 0  # characters whose weights lie in the network at the same time; 0: as few as do
    adapter_rank_max: int = ADAPTER_RANK_MAX  # of their weights
    adapters_bytes: int = ADAPTERS_BYTES  # of weights that are kept in memory for later
    adapter_stacks_bytes: int = STACKS_BYTES  # of weights side by side in one pack's network
    references: ReferencePolicy = EXACT  # how earlier frames are noised
    networks_max: int = NETWORKS_MAX  # UNets that characters brought, of all who wait or are drawn
    deep_every: int = 1  # steps of a frame of which one computes the UNet's deep blocks
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # the part of a frame's steps in which guidance counts
    references_bytes: int = REFERENCES_BYTES  # of what their passes left, for each of two picture sizes
    prefill_rows: int = PREFILL_ROWS  # rows of a reference pass that takes later steps' along; 0: a step's own only
    # Every job steps in forwards of its own, so that its picture is bit for bit the same whoever is drawn beside it.
    strict: bool = False
    # Pictures are decoded in a thread of their own while others step: for devices that work without the host.
    decode_beside: bool = False
    stall_s: float = STALL_S  # a step that takes longer means the thread hangs

    def __post_init__(self) -> None:
        if self.stall_s <= 0 or min(self.adapter_rank_max, self.deep_every, self.networks_max) < 1:
            raise ValueError("every limit of the frame engine must be positive")
        if min(self.adapters_bytes, self.adapter_stacks_bytes, self.references_bytes, self.prefill_rows) < 0:
            raise ValueError("every limit of the frame engine must be positive")
        first, last = self.guidance_interval
        if not 0.0 <= first < last <= 1.0:
            raise ValueError("guidance counts in a part of the steps, from 0 to 1")
        if 0 < self.adapter_slots < self.max_running * CHARACTERS_MAX:
            raise ValueError(
                f"{self.adapter_slots} slots are too few: {self.max_running} jobs that are drawn at the same time may "
                f"have {CHARACTERS_MAX} characters each"
            )
        self.scheduling()

    def scheduling(self) -> SchedulerSettings:
        """The scheduler's part. Raises ValueError."""
        return SchedulerSettings(
            max_running=self.max_running,
            max_queued=self.max_queued,
            max_rows=self.max_rows,
            tenant_queue_share=self.tenant_queue_share,
            aging_s=self.aging_s,
        )


class Observer(Protocol):
    """Who is told what the engine does, in its threads."""

    def step_done(self, *, jobs: int, rows: StepRows, seconds: float, flops: float) -> None:
        """A denoising step of `jobs` jobs took so long and about so many operations (0: nobody counted a row's)."""

    def job_done(self, *, outcome: str, queue_s: float, render_s: float) -> None:
        """A job left; `outcome` is "rendered" or an error's reason."""

    def job_refused(self, *, reason: str) -> None:
        """A job was not taken; in the thread that submitted it. `reason` is a `Refusal`'s."""

    def load_changed(self, *, queued: int, running: int) -> None:
        """So many jobs wait and are drawn."""

    def adapters_changed(self, *, resident: int, kept_bytes: int, loads: int) -> None:
        """So many adapters lie in slots, so much of them is in memory; `loads` more were read from the store."""

    def peak_measured(self, *, flops_per_s: float) -> None:
        """What the machine does at best."""


class _Silence:
    """The observer of an engine that nobody watches."""

    def step_done(self, *, jobs: int, rows: StepRows, seconds: float, flops: float) -> None: ...
    def job_done(self, *, outcome: str, queue_s: float, render_s: float) -> None: ...
    def job_refused(self, *, reason: str) -> None: ...
    def load_changed(self, *, queued: int, running: int) -> None: ...
    def adapters_changed(self, *, resident: int, kept_bytes: int, loads: int) -> None: ...
    def peak_measured(self, *, flops_per_s: float) -> None: ...


@dataclass(eq=False)
class Ticket:
    """A job inside the engine. `cancel` may be called from any thread, at any time, more than once."""

    sketch: Sketch
    model: FrameModel
    preview_every_steps: int
    job: Job
    deliver: Deliver
    adapters: tuple[Adapter, ...]  # of the sketch's characters, in their order
    given: int | None = None  # which reference is somebody's own picture, the first of them
    network: Hashable | None = None  # that one of its characters brought
    cancelled: bool = False
    # From here on the engine's thread only, and once it is being decoded the thread that does it.
    decoded: bool = False  # or about to be: it is nobody's to drop any more
    is_begun: bool = False  # or about to be: from here on a device that breaks may have broken of it
    drawing: Drawing | None = None
    started_s: float = 0.0
    warnings: tuple[Unfamiliar, ...] = ()
    worn: tuple[str, ...] = ()  # digests of the adapters that lie in slots for it
    cache: ReferenceCache | None = None  # what its references left

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
        fetch: Fetch | None = None,
    ) -> None:
        """`worlds` says what packs know; one that is not in it never warns. `fetch` finds characters' weights.

        Raises ValueError for the default pack.
        """
        if default_pack not in models:
            raise ValueError(f"the default pack {default_pack!r} is not loaded")
        self.settings = settings or EngineSettings()
        slots = self.settings.adapter_slots or self.settings.max_running * CHARACTERS_MAX
        slots += max(len(model.adapters) for model in models.values())  # the pack's own, and the same for everybody
        self.models = {
            name: replace(
                model,
                slots=AdapterSlots(
                    model.denoiser.unet,
                    slots,
                    self._rank_max(model),
                    stacks_bytes_max=self.settings.adapter_stacks_bytes,
                ),
            )
            for name, model in models.items()
        }
        self.default_pack = default_pack
        self._fetch = fetch
        self._adapters = AdapterStore(self.settings.adapters_bytes)
        self._tables = {name: SlotTable(slots) for name in models}
        self._caches: weakref.WeakKeyDictionary[torch.nn.Module, ReferenceCache] = weakref.WeakKeyDictionary()
        self._observer: Observer = observer or _Silence()
        self._clock = clock
        self._worlds = dict(worlds or {})
        self._gains_db: dict[tuple[str, bytes], float] = {}  # by pack and picture, oldest first
        self._changed = threading.Condition()  # guards the scheduler and the tickets
        self._scheduler = Scheduler(self.settings.scheduling())
        self._networks = NetworkPlaces(self.settings.networks_max)
        # Whoever waits for a slow store holds up nobody whose weights are here, or who has none.
        self._submitting = ThreadPoolExecutor(_THREADS, "frame-submit")
        self._fetching = ThreadPoolExecutor(_THREADS, "frame-characters")
        self._arriving = 0  # that one of these threads looks at, or will
        self._stepped_kinds: set[Hashable] = set()
        self._tickets: dict[int, Ticket] = {}  # of everybody who waits or is drawn, by the job's number
        self._arrivals = 0
        self._dead = False
        self._stopping = False
        self._unwanted: set[str] = set()  # digests of adapters that are to leave when nobody wears them
        self._told_adapters = (0, 0, 0)
        self._row_flops: dict[str, tuple[float, float]] = {}  # of a whole and a shallow one, by pack, once warmed up
        self._busy_since_s: float | None = None  # start of the unit of work in hand; None while idle
        self._decoding: Decoding | None = None
        if self.settings.decode_beside:
            device = models[default_pack].device
            self._decoding = Decoding(device, done=self._wake, clock=clock)
        self._thread = threading.Thread(target=self._run, name="frame-engine", daemon=True)

    def _rank_max(self, model: FrameModel) -> int:
        """Of what may lie in a slot: characters' weights, and the pack's own."""
        return max(self.settings.adapter_rank_max, *(own.rank for own in model.adapters.values()), 1)

    def start(self) -> None:
        """Start the engine's threads."""
        if self._decoding is not None:
            self._decoding.start()
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Refuse new jobs, end those in hand with ShuttingDown, and wait for the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Everybody who waits or is drawn now, in order of arrival."""
        with self._changed:
            return tuple(self._tickets.values())

    @property
    def is_healthy(self) -> bool:
        """The thread lives and no unit of work in hand is overdue."""
        since = (self._busy_since_s, self._decoding.busy_since_s if self._decoding else None)
        overdue = any(one is not None and self._clock() - one > self.settings.stall_s for one in since)
        return self._thread.is_alive() and not overdue

    @property
    def has_characters(self) -> bool:
        """Whether it knows where characters' weights are kept."""
        return self._fetch is not None

    def submit(self, job: FrameJob, deliver: Deliver) -> Ticket:
        """Check `job` and put it in the queue; its events go to `deliver`, beginning with Queued.

        Reads and resizes the references, so call it off the event loop. Raises QueueFull, DeadlineUnreachable,
        ShuttingDown, EngineDead, DeadlineExceeded, or what `sketch_of` raises; then nothing was started.
        """
        self._refuse_if_stopped()
        with self._changed:
            if self._scheduler.is_full:  # before the work of reading pictures
                self._refuse(self._scheduler.full(self._clock()))
        model = self.models.get(job.pack or self.default_pack)
        if model is None:
            raise PackUnknown(f"no pack {job.pack!r} here; loaded: {', '.join(sorted(self.models))}", field="pack")
        with ExitStack() as undo:
            adapters = tuple(self._adapter(model, one.digest, undo) for one in checked_characters(job))
            ticket = self._queued(job, model, adapters, deliver)
            undo.pop_all()  # the ticket leaves its network's place at its end
        return ticket

    def _queued(self, job: FrameJob, model: FrameModel, adapters: tuple[Adapter, ...], deliver: Deliver) -> Ticket:
        whole = _whole(adapters, job.characters)
        for adapter in adapters:
            if model.slots is not None and adapter.needs_slot:
                with _usable(adapter.digest):
                    model.slots.check_room(adapter)
        sketch = sketch_of(
            job,
            model,
            self.settings.references,
            _words(adapters),
            adapters=whole is None,
            deep_every=self.settings.deep_every,
            guidance_interval=self.settings.guidance_interval,
        )
        own = {adapter.digest: adapter for adapter in model.adapters.values()}
        adapters += tuple(own[one.digest] for one in sketch.characters[len(adapters) :])
        if whole is not None:
            denoiser = StoryDenoiser(whole.unet, model.denoiser.schedule)
            model = replace(model, denoiser=denoiser, slots=None, graphs=None)
        if job.deadline_s is not None and self._clock() >= job.deadline_s:
            raise DeadlineExceeded()
        manifest = model.manifest
        with self._changed:
            self._refuse_if_stopped()
            offered = Job(
                number=self._arrivals,
                # Only those who share a network can share a forward.
                kind=(manifest.name, sketch.height_px, sketch.width_px, whole.digest if whole else ""),
                rows=self._rows_a_step(sketch, model),
                steps=sketch.steps_taken,
                arrived_s=self._clock(),
                tenant=job.tenant,
                priority=job.priority,
                deadline_s=job.deadline_s,
            )
            room = self.settings.max_running - self._scheduler.running_count
            ahead = max(0, self._scheduler.waiting_count - room + 1)
            if (refusal := self._scheduler.offer(offered, offered.arrived_s)) is not None:
                self._refuse(refusal)
            self._arrivals += 1
            given = next((index for index, reference in enumerate(job.references) if reference.given), None)
            network = None if whole is None else (manifest.name, whole.digest)
            ticket = Ticket(sketch, model, job.preview_every_steps, offered, deliver, adapters, given, network)
            self._tickets[offered.number] = ticket
            deliver(Queued(ahead_count=ahead))
            self._changed.notify()
        return ticket

    @staticmethod
    def _rows_a_step(sketch: Sketch, model: FrameModel) -> int:
        """In rows of the pack's size: a larger picture's take as much more of the machine and its memory.

        A smaller one's count as the pack's, so that no forward has more rows than it may.
        """
        rows = rows_of_a_frame(sketch, reads=model.reader is not None, sees=model.sees_pictures) / sketch.steps_taken
        return math.ceil(rows * max(1.0, _area(sketch, model)))

    def fingerprint(self, model: FrameModel) -> str:
        """16 hex digits of all that a picture depends on besides its sketch: weights, arithmetic, machine, mode.

        Under `strict`, equal sketches and equal fingerprints give equal bytes; otherwise, and between unlike
        fingerprints, pictures may differ by a level of 255 here and there, or by more where the mode is another.
        """
        settings = self.settings
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else cpu_name()
        parts = (
            model.manifest.digest,
            str(model.dtype),
            device,
            str(torch.get_num_threads()),
            torch.__version__,
            repr(settings.references),
            f"strict={settings.strict}",
            *((f"deep_every={settings.deep_every}",) if settings.deep_every > 1 else ()),
            *((f"guidance={settings.guidance_interval}",) if settings.guidance_interval != (0.0, 1.0) else ()),
            *(("graphs",) if model.graphs is not None and not model.graphs.is_broken else ()),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _adapter(self, model: FrameModel, digest: str, undo: ExitStack) -> Adapter:
        """Checked weights of a character, with a place for their network if they are one; `undo` gives that back.

        Raises CharacterWeightsUnusable, QueueFull where no place is free, or what fetching raises.
        """
        network = (model.manifest.name, digest)
        has_place = False

        def take_place() -> None:
            nonlocal has_place
            with self._changed:
                if not self._networks.enter(network, self._clock()):
                    self._refuse(Refusal(reason="queue_full", retry_after_s=1.0))
            has_place = True
            undo.callback(self._leave, network)

        def read() -> Adapter:
            if self._fetch is None:
                raise CharacterWeightsUnknown(metadata={"digest": digest})
            payload = self._fetch(digest)
            if is_whole_unet(payload, model.denoiser.unet):
                take_place()  # before it takes as much memory as the pack's own
            with _usable(digest):
                adapter = read_adapter(
                    payload,
                    model.denoiser.unet,
                    name=digest[:12],
                    base_digest=model.base_digest,
                    rank_max=self.settings.adapter_rank_max,
                    text_width=model.text.width,
                    texts=model.text.networks,
                )
                if adapter.digest != digest:
                    raise AdapterDamaged(f"{digest[:12]} is stored with the bytes of {adapter.digest[:12]}")
            return adapter

        adapter = self._adapters.get(model.manifest.name, digest, read)
        if adapter.unet is not None and not has_place:  # somebody else has read it
            take_place()
        return adapter

    def _leave(self, network: Hashable) -> None:
        with self._changed:
            self._networks.leave(network)

    def unload(self, digest: str) -> bool:
        """Put an adapter out of memory, and out of the networks as soon as no job here asks for it; was it there?

        Whoever asks for it later loads it again.
        """
        with self._changed:
            resident = any(digest in table.resident for table in self._tables.values())
            self._unwanted.add(digest)
            self._changed.notify()
        return self._adapters.drop(digest) or resident

    def warm_up(self, timeout_s: float = 120.0) -> None:
        """Draw one step of as many frames as may run at once, with every pack, so that the first caller does not pay.

        Raises RenderFailed when that does not work: a service that cannot draw must not call itself ready.
        """
        for name, model in self.models.items():
            full = flops_of_a_row(model)
            reuses = self.settings.deep_every > 1 and model.has_deep_blocks
            shallow = flops_of_a_row(model, shallow=True) if reuses else full
            self._row_flops[name] = (full, shallow)
            self._observer.peak_measured(flops_per_s=peak_flops(model.device, model.dtype))
            manifest = model.manifest
            grey = png(np.full((manifest.height_px, manifest.width_px, 3), 127, dtype=np.uint8))
            references = (ReferenceImage(image=grey, description="warm-up"),) * manifest.max_references
            last: queue.Queue[Event | FabulaError] = queue.Queue()
            for number in range(self.settings.max_running):
                # Each with a text of its own, as they will come.
                text = f"warm-up {number}"
                self.submit(FrameJob(description=text, seed=0, pack=name, references=references, steps=1), last.put)
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

        self._refuse_if_stopped()
        pack = job.pack or self.default_pack
        is_here = all(self._adapters.has(pack, one.digest) for one in job.characters)
        with self._changed:
            if self._scheduler.is_full_with(self._arriving):
                self._refuse(self._scheduler.full(self._clock()))
            self._arriving += 1
        pool = self._submitting if is_here else self._fetching
        submission = loop.run_in_executor(pool, self._arrive, job, deliver)
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

    def _arrive(self, job: FrameJob, deliver: Deliver) -> Ticket:
        try:
            return self.submit(job, deliver)
        finally:
            with self._changed:
                self._arriving -= 1

    def _refuse_if_stopped(self) -> None:
        if self._stopping:
            raise ShuttingDown()
        if self._dead or not self._thread.is_alive():
            raise EngineDead()

    def _refuse(self, refusal: Refusal) -> NoReturn:
        self._observer.job_refused(reason=refusal.reason)
        pause_s = None if refusal.retry_after_s is None else round(refusal.retry_after_s, 1)
        if refusal.reason == "deadline":
            predicted = f"{refusal.predicted_s:.1f}"
            raise DeadlineUnreachable(
                f"the picture would take {predicted} s, which is more than the call has left",
                metadata={"predicted_s": predicted},
                retry_after_s=pause_s,
            )
        whose = "of yours " if refusal.reason == "tenant_queue_full" else ""
        raise QueueFull(f"too many frames {whose}wait already; try again later", retry_after_s=pause_s)

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while self._wait_for_work():
                self._busy_since_s = self._clock()
                if self._decoding is not None:
                    self._decoding.collect()
                self._drop_unwanted()
                self._admit()
                self._drop_lost()
                batch = self._choose()
                if batch:
                    self._step(batch)
                self._observer.load_changed(queued=self._scheduler.waiting_count, running=self._scheduler.running_count)
                self._busy_since_s = None
        except Exception:
            log.exception("engine_thread_died")  # health turns bad, and the process is replaced
            raise
        finally:
            if self._decoding is not None:
                self._decoding.close()
            with self._changed:
                self._dead = True  # whoever submits from now on is told, although the thread still lives a moment
                left = list(self._tickets.values())
            # One of those that were begun may have killed the engine, and would kill the next one too: callers count
            # how often they get ReplicaLost. Those that only waited had no part in it.
            for ticket in left:
                lost = ReplicaLost() if ticket.is_begun else EngineDead()
                self._end(ticket, ShuttingDown() if self._stopping else lost)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._stopping and not self._has_work:
                self._changed.wait()
            return not self._stopping

    @property
    def _has_work(self) -> bool:
        """For the engine's thread: those whose pictures are decoded beside it are none."""
        jobs = self._scheduler.waiting_count + self._scheduler.running_count
        return jobs > 0 or bool(self._unwanted) or (self._decoding is not None and self._decoding.broke)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _admit(self) -> None:
        """Let waiting jobs in while there is room. One that cannot be begun fails, and the next gets its chance."""
        while waiting := list(iter(self._next_in, None)):
            starts: dict[int, list[tuple[Ticket, Start]]] = {}  # by model
            for ticket in waiting:
                try:
                    if (reason := self._lost(ticket)) is not None:
                        self._end(ticket, reason)
                        continue
                    start = Start(
                        sketch=ticket.sketch,
                        outfit=self._dress(ticket),
                        tenant=ticket.job.tenant,
                        words=_words(ticket.adapters),
                        changes=_text_changes(ticket),
                    )
                    starts.setdefault(id(ticket.model), []).append((ticket, start))
                except Exception as error:  # noqa: BLE001 - whatever a network raises, it is this job's and no other's
                    self._fail(ticket, error)
            for together in starts.values():
                # Strictly: a matrix product's last bits depend on who shares it.
                for some in [[one] for one in together] if self.settings.strict else [together]:
                    self._begin(some)
            self._tell_adapters()

    def _begin(self, starts: Sequence[tuple[Ticket, Start]]) -> None:
        """Drawings of one model, begun together; alone where that does not work."""
        tickets = [ticket for ticket, _ in starts]
        for ticket in tickets:
            ticket.is_begun = True
        try:
            drawings = begin_together(tickets[0].model, [start for _, start in starts])
        except Exception as error:  # noqa: BLE001 - as above
            if len(tickets) == 1 or isinstance(error, torch.AcceleratorError):
                self._fail(tickets[0], error)
                return
            log.warning("batched_beginning_failed", jobs=len(tickets), error=type(error).__name__)
            drawings = None
        if drawings is None:  # and the error is gone, with all that it held of the device's memory
            for one in starts:
                self._begin([one])
            return
        for ticket, drawing in zip(tickets, drawings, strict=True):
            try:
                ticket.drawing = drawing
                # Strictly: what others left, or did not, would decide which rows share a pass.
                ticket.cache = ReferenceCache() if self.settings.strict else self._cache_of(ticket.model)
                self._beside(functools.partial(self._warn, ticket))
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(ticket, error)

    def _dress(self, ticket: Ticket) -> list[Worn]:
        """Lays the weights of the ticket's characters into slots; they stay until it leaves."""
        outfit = []
        table, slots = self._tables[ticket.model.manifest.name], ticket.model.slots
        for adapter, character in zip(ticket.adapters, ticket.sketch.characters, strict=True):
            if not adapter.needs_slot:
                outfit.append(NOBODY)
                continue
            place = table.wear(adapter.digest)
            assert place is not None, "there are as many slots as those who are drawn can need"
            assert slots is not None
            slot, is_new = place
            if is_new:
                try:
                    slots.put(slot, adapter)
                except BaseException:
                    table.forget(adapter.digest)  # else the next one would find it in a slot that holds nothing
                    raise
            ticket.worn = (*ticket.worn, adapter.digest)
            outfit.append(Worn(slot, character.scale))
        return outfit

    def _cache_of(self, model: FrameModel) -> ReferenceCache:
        """What references left in this network; gone with the network."""
        unet = model.denoiser.unet
        if unet not in self._caches:
            packs = any(unet is own.denoiser.unet for own in self.models.values())
            budget_bytes = self.settings.references_bytes // (1 if packs else self.settings.networks_max)
            self._caches[unet] = ReferenceCache(budget_bytes)
        return self._caches[unet]

    def _drop_unwanted(self) -> None:
        """Clear the slots of adapters that are to leave and that no job here, drawn or waiting, asks for."""
        with self._changed:
            asked = {
                adapter.digest for ticket in self._tickets.values() if not ticket.decoded for adapter in ticket.adapters
            }
            leaving = self._unwanted - asked
            self._unwanted &= asked
        for digest in leaving:
            for name, table in self._tables.items():
                slot, slots = table.slot_of(digest), self.models[name].slots
                if slot is not None and slots is not None:
                    slots.clear(slot)
                    table.forget(digest)
        self._tell_adapters()

    def _tell_adapters(self) -> None:
        resident = sum(len(table.resident) for table in self._tables.values())
        told = (resident, self._adapters.kept_bytes, self._adapters.loads_count)
        if told != self._told_adapters:
            loads = told[2] - self._told_adapters[2]
            self._told_adapters = told
            self._observer.adapters_changed(resident=told[0], kept_bytes=told[1], loads=loads)

    def _next_in(self) -> Ticket | None:
        with self._changed:
            now_s = self._clock()
            job = self._scheduler.begin(now_s)
            if job is None:
                return None
            ticket = self._tickets[job.number]
            ticket.started_s = now_s
            return ticket

    def _warn(self, ticket: Ticket) -> None:
        ticket.warnings = self._warnings(ticket)

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
        with self._changed:
            everybody = [ticket for ticket in self._tickets.values() if not ticket.decoded]
        for ticket in everybody:
            if (reason := self._lost(ticket)) is not None:
                self._end(ticket, reason)

    def _lost(self, ticket: Ticket) -> FabulaError | None:
        if ticket.cancelled:
            return Cancelled()
        if ticket.job.deadline_s is not None and self._clock() >= ticket.job.deadline_s:
            return DeadlineExceeded()
        return None

    def _choose(self) -> list[Ticket]:
        with self._changed:
            return [self._tickets[number] for number in self._scheduler.choose()]

    def _step(self, batch: Sequence[Ticket]) -> None:
        """One denoising step of `batch`, then tell, preview, finish or fail each of them."""
        began_s, graphs = self._clock(), batch[0].model.graphs
        recorded = graphs.recorded_count if graphs is not None else 0
        stepped, rows = self._advance(batch)
        sound = are_sound([_drawing(ticket) for ticket in stepped]) if stepped else []
        seconds = self._clock() - began_s  # the device is done: it has answered
        with self._changed:
            # The time of a step that was taken again, one by one, or that recorded, says nothing of the next one.
            # Nor does that of a kind's first one, which chose kernels and filled tables.
            kind = batch[0].job.kind
            is_usual = rows.total > 0 and kind in self._stepped_kinds
            is_usual = is_usual and (graphs is None or graphs.recorded_count == recorded)
            if len(self._stepped_kinds) >= KINDS_MAX:
                self._stepped_kinds.clear()
            self._stepped_kinds.add(kind)
            numbers = [ticket.job.number for ticket in stepped]
            self._scheduler.stepped(numbers, seconds if is_usual else None, self._clock())
        flops = self._flops(batch[0], rows)
        self._observer.step_done(jobs=len(stepped), rows=rows, seconds=seconds, flops=flops)
        whole = []
        for ticket, is_sound in zip(stepped, sound, strict=True):
            if not is_sound:
                forget(_drawing(ticket), _cache(ticket), everything=True)
                self._end(ticket, RenderFailed("the picture's numbers are not finite; try another seed or guidance"))
                continue
            try:
                self._tell(ticket)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(ticket, error)
                continue
            if _drawing(ticket).finished:
                whole.append(ticket)
        sizes = [len(each) for each in decodable([_drawing(ticket) for ticket in whole])]
        waiting = iter(whole)
        for size in [1] * len(whole) if self.settings.strict else sizes:
            self._decode(list(itertools.islice(waiting, size)))

    def _flops(self, ticket: Ticket, rows: StepRows) -> float:
        """About what a step of tickets like this one took; attention's growth with a picture's size is left out."""
        full, shallow = self._row_flops.get(ticket.model.manifest.name, (0.0, 0.0))
        counted = (rows.total - rows.shallow) * full + rows.shallow * shallow
        return counted * _area(ticket.sketch, ticket.model)

    def _advance(self, batch: Sequence[Ticket]) -> tuple[list[Ticket], StepRows]:
        """Those of `batch` that took their step, and what that took; nothing when it did not go as it should.

        When the batch as a whole fails, each tries alone, so that one bad job costs its neighbours a moment and not
        their pictures.
        """
        if self.settings.strict and len(batch) > 1:
            alone = [self._advance([ticket]) for ticket in batch]
            return [ticket for stepped, _ in alone for ticket in stepped], functools.reduce(
                operator.add, (rows for _, rows in alone)
            )
        prefill_rows = 0 if self.settings.strict or self._sizes_drawn > SIZES_KEPT else self.settings.prefill_rows
        drawings = [_drawing(ticket) for ticket in batch]
        try:
            return list(batch), advance(batch[0].model, drawings, _cache(batch[0]), prefill_rows=prefill_rows)
        except Exception as error:  # noqa: BLE001 - as above
            if len(batch) == 1:
                self._fail(batch[0], error)
                return [], _NO_ROWS
            log.warning("batched_step_failed", jobs=len(batch), error=type(error).__name__)
        return [ticket for single in batch for ticket in self._advance([single])[0]], _NO_ROWS

    def _tell(self, ticket: Ticket) -> None:
        drawing = _drawing(ticket)
        done, count = drawing.done, len(drawing.steps)
        now_s = self._clock()
        eta_s = (now_s - ticket.started_s) / done * (count - done)
        ticket.deliver(Progress(step=done, step_count=count, eta_s=eta_s))
        wanted = ticket.preview_every_steps and done % ticket.preview_every_steps == 0
        if wanted and not drawing.finished and not self._others_wait:
            self._beside(functools.partial(self._preview, ticket, copy.copy(drawing)), or_not_at_all=True)

    def _preview(self, ticket: Ticket, drawing: Drawing) -> None:
        """Tells how a frame looks now. One that cannot be made is left out: it costs nobody a frame."""
        try:
            event = Preview(image=webp(preview(ticket.model, drawing)), step=drawing.done)
        except torch.AcceleratorError:
            raise  # the device is broken, and with it everything
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("preview_not_made", step=drawing.done, error=type(error).__name__)
            return
        with self._changed:  # a job's last word is its last
            if ticket.job.number in self._tickets:
                ticket.deliver(event)

    def _beside(self, work: Callable[[], None], *, or_not_at_all: bool = False) -> None:
        """In the thread that decodes, where there is one and it has time; else here, or not at all."""
        if self._decoding is None or not (self._decoding.hand_over_if_free(work) or or_not_at_all):
            work()

    def _decode(self, tickets: Sequence[Ticket]) -> None:
        """Now, or by the thread that does nothing else."""
        if self._decoding is None:
            self._finish(tickets)
            return
        for ticket in tickets:
            ticket.decoded = True
            self._release(ticket)
        self._decoding.hand_over(functools.partial(self._finish, tickets))

    def _finish(self, tickets: Sequence[Ticket]) -> None:
        """The pictures of those who took their last step, decoded together; alone where that does not work."""
        try:
            pictures = finish(tickets[0].model, [_drawing(ticket) for ticket in tickets])
        except Exception as error:  # noqa: BLE001 - as above
            if len(tickets) == 1:
                self._fail(tickets[0], error)
                return
            log.warning("batched_decoding_failed", jobs=len(tickets), error=type(error).__name__)
            pictures = None
        if pictures is None:  # and the error is gone, with all that it held of the device's memory
            for ticket in tickets:
                self._finish([ticket])
            return
        for ticket, pixels in zip(tickets, pictures, strict=True):
            try:
                self._end(ticket, self._rendered(ticket, pixels))
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(ticket, error)

    def _rendered(self, ticket: Ticket, pixels: Pixels) -> RenderedFrame:
        image = png(pixels)
        return RenderedFrame(
            image=image,
            sha256=hashlib.sha256(image).hexdigest(),
            sketch=ticket.sketch,
            pack_digest=ticket.model.manifest.digest,
            fingerprint=self.fingerprint(ticket.model),
            queue_s=ticket.started_s - ticket.job.arrived_s,
            render_s=self._clock() - ticket.started_s,
            warnings=ticket.warnings,
        )

    @property
    def _sizes_drawn(self) -> int:
        """Picture sizes that take turns now: with more than a cache keeps, what is prefilled would be gone in vain."""
        with self._changed:
            drawn = [ticket.sketch for ticket in self._tickets.values() if ticket.drawing is not None]
        return len({(sketch.height_px, sketch.width_px) for sketch in drawn})

    @property
    def _others_wait(self) -> bool:
        """Somebody waits for room: then nobody's preview may hold up the steps."""
        with self._changed:
            return self._scheduler.waiting_count > 0

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if isinstance(error, FabulaError):
            self._end(ticket, error)
            return
        if isinstance(error, torch.AcceleratorError):
            # The GPU's context is broken and every later call would fail at once, which to a router looks like a very
            # fast replica. So the engine dies, and its replica with it.
            self._end(ticket, ReplicaLost())
            raise error
        log.error("job_failed", exc_info=error, seed=ticket.sketch.seed, kind=ticket.job.kind)
        self._end(ticket, RenderFailed())

    def _end(self, ticket: Ticket, last: RenderedFrame | FabulaError) -> None:
        """The ticket's last word."""
        self._release(ticket)
        with self._changed:
            is_last = self._tickets.pop(ticket.job.number, None) is not None
            if is_last and ticket.network is not None:
                self._networks.leave(ticket.network)
        ticket.drawing = None
        now_s = self._clock()
        started_s = ticket.started_s or now_s
        self._observer.job_done(
            outcome="rendered" if isinstance(last, RenderedFrame) else last.reason,
            queue_s=started_s - ticket.job.arrived_s,
            render_s=now_s - started_s,
        )
        ticket.deliver(last)

    def _release(self, ticket: Ticket) -> None:
        """Its place, its slots and what its references left are others' from now on. A second time changes nothing."""
        with self._changed:
            self._scheduler.remove(ticket.job.number)
        if ticket.drawing is not None and ticket.cache is not None:
            forget(ticket.drawing, ticket.cache)
        ticket.cache = None
        if ticket.worn:
            self._tables[ticket.model.manifest.name].take_off(ticket.worn)
            ticket.worn = ()


@functools.cache
def cpu_name() -> str:
    """What the processor can do, which is what its kernels are chosen by."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _area(sketch: Sketch, model: FrameModel) -> float:
    """Of a picture, in those of the pack's size."""
    return sketch.height_px * sketch.width_px / (model.manifest.height_px * model.manifest.width_px)


@contextmanager
def _usable(digest: str) -> Iterator[None]:
    """Whatever is wrong with a character's weights, told as callers are told."""
    try:
        yield
    except AdapterError as error:
        raise CharacterWeightsUnusable(
            str(error), metadata={"digest": digest, "cause": error.reason}, field="characters"
        ) from None


def _words(adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """All that a job's characters taught the text encoder. Raises CharacterWeightsUnusable when two mean the same."""
    words: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        if twice := sorted(words.keys() & adapter.words.keys()):
            raise CharacterWeightsUnusable(
                f"two characters of the frame taught the word {twice[0]!r}",
                metadata={"digest": adapter.digest, "cause": "WORD_TAKEN"},
                field="characters",
            )
        words |= adapter.words
    return words


def _text_changes(ticket: Ticket) -> tuple[TextChange, ...]:
    """What a job's characters change of the text encoder, each as strongly as it counts."""
    pairs = zip(ticket.adapters, ticket.sketch.characters, strict=True)
    return tuple(TextChange(adapter.texts, character.scale) for adapter, character in pairs if adapter.texts)


def _whole(adapters: Sequence[Adapter], characters: Sequence[CharacterWeights]) -> Adapter | None:
    """The one that brings a UNet instead of the pack's. Raises CharacterWeightsUnusable when it is not alone."""
    for adapter, character in zip(adapters, characters, strict=True):
        if adapter.unet is None:
            continue
        others = [other for other in adapters if other is not adapter]
        if character.scale != 1.0 or any(other.needs_slot or other.unet is not None for other in others):
            raise CharacterWeightsUnusable(
                "a character that is a whole UNet counts fully, and beside nobody else's changes of one",
                metadata={"digest": adapter.digest, "cause": "NOT_COMBINABLE"},
                field="characters",
            )
        return adapter
    return None


def _drawing(ticket: Ticket) -> Drawing:
    assert ticket.drawing is not None
    return ticket.drawing


def _cache(ticket: Ticket) -> ReferenceCache:
    assert ticket.cache is not None
    return ticket.cache


def _cancel_submitted(submission: asyncio.Future[Ticket]) -> None:
    if not submission.cancelled() and submission.exception() is None:
        submission.result().cancel()
