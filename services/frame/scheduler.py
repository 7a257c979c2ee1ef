"""Decides which jobs are taken, which begin, and which take the next step together.

Pure: time is an argument, nothing is random, and no network is known. The engine tells it what happens and does what
it says:

    refusal = scheduler.offer(job, now_s)       # None: it waits now
    while job := scheduler.begin(now_s): ...    # those for whom there is room
    batch = scheduler.choose()                  # who steps now, in one forward
    scheduler.stepped(batch, seconds, now_s)    # what that took
    scheduler.remove(job.number)                # finished, failed, cancelled or late

**Who begins next.** Priority bands come first, and waiting lifts a job from band to band (`aging_s`), so that no band
waits for ever. Within a band tenants take turns by what they have been given so far, in row steps (start-time fair
queueing): whoever was idle has saved nothing up. Among one tenant's jobs the earliest deadline is first; a job without
one, or with a far one, counts as due `patience_s` after it came. Above all stands whoever has waited `overdue_s`.

**Who steps next.** Of those that have begun, the one that has not stepped for longest, and all of its kind that fit
into a forward. So a kind that only one job has gets its turn between those of a kind that everybody has.

**Who is refused.** A job that finds the queue full, or its tenant's part of it; and one whose predicted finish, from
the measured times of steps, lies beyond its deadline. A refusal says after how many seconds it is worth another try.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

_FORGETTING = 0.97  # what a measurement still counts after the next one of its kind
_REMEMBERED_S = 60.0  # a kind that was not measured for so long counts as not measured: the machine may be another now
KINDS_MAX = 1024  # that are remembered
_PREDICTED_MAX = 256  # jobs ahead that a prediction follows one by one; more are taken as one stream
_RETRY_LEAST_S = 1.0


class Priority(IntEnum):
    """Bands; a higher one begins first."""

    BATCH = 0
    STANDARD = 1
    INTERACTIVE = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the scheduler knows of a job. `number` tells jobs apart and grows with every arrival."""

    number: int
    kind: Hashable  # only equal kinds can share a forward: same networks, same size
    rows: int  # of the networks, in one step
    steps: int
    arrived_s: float
    tenant: str = ""
    priority: Priority = Priority.STANDARD
    deadline_s: float | None = None

    @property
    def cost(self) -> int:
        """Row steps: what its tenant is charged."""
        return self.rows * self.steps


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a job was not taken, and when it is worth another try. None: never, as it stands."""

    reason: str  # "queue_full", "tenant_queue_full" or "deadline"
    retry_after_s: float | None
    predicted_s: float | None = None  # seconds from now to its picture, where that is why


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Limits and patience."""

    max_running: int = 8  # jobs that are drawn in turns
    max_queued: int = 32  # jobs that wait for room
    max_rows: int = 64  # of one forward
    tenant_queue_share: float = 0.75  # of the queue that one named tenant may fill
    aging_s: float = 20.0  # waiting that lifts a job by one band
    patience_s: float = 60.0  # after which a job without a deadline counts as due
    overdue_s: float = 300.0  # after which a job goes before everybody else

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.max_queued < 1 or self.max_rows < 1:
            raise ValueError("every limit of the scheduler must be positive")
        if min(self.aging_s, self.patience_s, self.overdue_s) <= 0 or not 0 < self.tenant_queue_share <= 1:
            raise ValueError("waiting times of the scheduler must be positive, a tenant's share from 0 to 1")

    @property
    def tenant_queued_max(self) -> int:
        """Waiting jobs of one named tenant."""
        return max(1, math.ceil(self.max_queued * self.tenant_queue_share))


class StepTimes:
    """Measured times of steps, by kind: a constant and so much a row, least squares that forgets.

    Diffusion costs are predictable: the same rows take the same time, until something else wants the machine. Who is
    refused is not measured, so what was measured long ago is not held against anybody: else one stall would be the last
    word.
    """

    def __init__(self) -> None:
        self._sums: dict[Hashable, tuple[float, float, float, float, float]] = {}  # measured longest ago first
        self._measured_s: dict[Hashable, float] = {}

    def add(self, kind: Hashable, rows: int, seconds: float, now_s: float) -> None:
        """A step of so many rows took so long."""
        n, x, y, xx, xy = (value * _FORGETTING for value in self._sums.pop(kind, (0.0,) * 5))
        self._sums[kind] = (n + 1, x + rows, y + seconds, xx + rows * rows, xy + rows * seconds)
        self._measured_s[kind] = now_s
        if len(self._sums) > KINDS_MAX:
            oldest = next(iter(self._sums))
            del self._sums[oldest], self._measured_s[oldest]

    def guess(self, rows: int, now_s: float) -> float | None:
        """Seconds of a step of so many rows of a kind that is not known: those of the slowest that is."""
        return max((self.predict(kind, rows, now_s) or 0.0 for kind in self._sums), default=0.0) or None

    def predict(self, kind: Hashable, rows: int, now_s: float) -> float | None:
        """Seconds of a step of so many rows; None for a kind that was not measured lately."""
        if kind not in self._sums or now_s - self._measured_s[kind] > _REMEMBERED_S:
            return None
        n, x, y, xx, xy = self._sums[kind]
        spread = n * xx - x * x
        # Only ever one number of rows: time in proportion to rows is the careful guess for more of them.
        slope = (n * xy - x * y) / spread if spread > 1e-6 * n * xx else y / x
        slope = min(max(slope, 0.0), y / x)
        return max((y - slope * x) / n, 0.0) + slope * rows


@dataclass
class _Running:
    """A job that has begun."""

    job: Job
    steps_left: int
    last_turn: int


@dataclass
class _Tenant:
    """What a tenant has been given, on the scale of the fair queue's clock."""

    tag: float = 0.0
    waiting: dict[int, Job] = field(default_factory=dict)  # by number, which is the order of arrival


class Scheduler:
    """Jobs that wait and jobs that are drawn. Not thread-safe: its owner holds a lock."""

    def __init__(self, settings: SchedulerSettings | None = None) -> None:
        self.settings = settings or SchedulerSettings()
        self.times = StepTimes()
        self._tenants: dict[str, _Tenant] = {}
        self._waiting: dict[int, Job] = {}
        self._running: dict[int, _Running] = {}
        self._clock = 0.0  # of the fair queue, in row steps
        self._turn = 0

    @property
    def waiting_count(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        """Jobs that are drawn."""
        return len(self._running)

    @property
    def is_full(self) -> bool:
        """Nobody is taken now. Free places count too: a burst between two steps finds nobody running yet."""
        return self.is_full_with(0)

    def is_full_with(self, arriving_count: int) -> bool:
        """The same, were so many more here, who are about to be."""
        here = len(self._waiting) + len(self._running) + arriving_count
        return here >= self.settings.max_queued + self.settings.max_running

    def full(self, now_s: float) -> Refusal:
        """What somebody is told who comes when it is full."""
        return Refusal(reason="queue_full", retry_after_s=self._until_room_s(now_s))

    def offer(self, job: Job, now_s: float) -> Refusal | None:
        """Take a job into the queue, or say why not. Then nothing has changed."""
        settings = self.settings
        tenant = self._tenants.get(job.tenant)
        if self.is_full:
            return self.full(now_s)
        if job.tenant and tenant is not None and len(tenant.waiting) >= settings.tenant_queued_max:
            return Refusal(reason="tenant_queue_full", retry_after_s=self._until_room_s(now_s))
        if job.deadline_s is not None and (late := self._lateness(job, now_s)) is not None:
            return late
        if tenant is None:
            tenant = self._tenants[job.tenant] = _Tenant()
        if not tenant.waiting:
            tenant.tag = max(tenant.tag, self._clock)
        tenant.waiting[job.number] = self._waiting[job.number] = job
        return None

    def begin(self, now_s: float) -> Job | None:
        """The job that leaves the queue now; None when there is no room, or nobody who is not late."""
        if len(self._running) >= self.settings.max_running:
            return None
        job = self._next(now_s)
        if job is None:
            return None
        self._take(job)
        tenant = self._tenants[job.tenant]
        self._clock = max(self._clock, tenant.tag)
        tenant.tag += job.cost
        # A newcomer goes behind those who wait for a step, or a stream of newcomers could starve them.
        self._running[job.number] = _Running(job, job.steps, self._turn)
        return job

    def late(self, now_s: float) -> list[int]:
        """Jobs whose deadline has passed, waiting or running. They are still here: `remove` them."""
        everybody = [*self._waiting.values(), *(one.job for one in self._running.values())]
        return [job.number for job in everybody if job.deadline_s is not None and now_s >= job.deadline_s]

    def choose(self) -> tuple[int, ...]:
        """Numbers of the jobs that step now, longest-waiting first; empty only when nobody is drawn.

        The one that has waited most turns always steps, alone if it is larger than `max_rows`, and those of its kind
        fill the rest in the same order.
        """
        order = sorted(self._running.values(), key=lambda one: (one.last_turn, one.job.number))
        chosen: list[int] = []
        kind: Hashable = None
        rows = 0
        for one in order:
            if not chosen:
                kind = one.job.kind
            elif one.job.kind != kind or rows + one.job.rows > self.settings.max_rows:
                continue
            chosen.append(one.job.number)
            rows += one.job.rows
        return tuple(chosen)

    def stepped(self, numbers: Sequence[int], seconds: float | None, now_s: float) -> None:
        """These took a step together. `seconds` is None when the time says nothing, as of a step that failed."""
        self._turn += 1
        stepped = [self._running[number] for number in numbers]
        for one in stepped:
            one.last_turn = self._turn
            one.steps_left = max(0, one.steps_left - 1)
        if seconds is not None and stepped:
            self.times.add(stepped[0].job.kind, sum(one.job.rows for one in stepped), seconds, now_s)

    def remove(self, number: int) -> None:
        """A job is gone; what it did not use of what its tenant was charged is given back. Unknown numbers are well."""
        if (waiting := self._waiting.get(number)) is not None:
            self._take(waiting)
        elif (running := self._running.pop(number, None)) is not None:
            tenant = self._tenants[running.job.tenant]
            tenant.tag = max(tenant.tag - running.job.rows * running.steps_left, 0.0)
        self._forget_idle()

    def predicted_s(self, job: Job, now_s: float) -> float | None:
        """Seconds from now to the end of `job`, which is waiting or about to; None while nothing was measured.

        Follows the queue job by job as if nobody else came or left.
        """
        ahead = sorted({**self._waiting, job.number: job}.values(), key=lambda one: self._order(one, now_s))
        place = next(index for index, one in enumerate(ahead) if one.number == job.number)
        if place > _PREDICTED_MAX:
            return self._streamed_s(ahead[: place + 1], now_s)
        queue = iter(ahead)  # those behind count too: they fill places that are free beside it
        drawn = [(one.steps_left, one.job) for one in self._running.values() if one.steps_left > 0]
        passed_s = 0.0
        while True:
            while len(drawn) < self.settings.max_running and (entering := next(queue, None)) is not None:
                drawn.append((entering.steps, entering))
            turns = min(left for left, _ in drawn)
            turn_s = self._turn_s([one for _, one in drawn], now_s)
            if turn_s is None:
                return None
            passed_s += turns * turn_s
            if any(left == turns and one.number == job.number for left, one in drawn):
                return passed_s
            drawn = [(left - turns, one) for left, one in drawn if left > turns]

    def _next(self, now_s: float) -> Job | None:
        """Who begins next of those that are not late."""
        best: tuple[object, ...] | None = None
        found: Job | None = None
        for job in self._waiting.values():
            if job.deadline_s is not None and now_s >= job.deadline_s:
                continue
            order = self._order(job, now_s)
            if best is None or order < best:
                best, found = order, job
        return found

    def _order(self, job: Job, now_s: float) -> tuple[float, ...]:
        """Smaller goes first."""
        waited_s = now_s - job.arrived_s
        if waited_s >= self.settings.overdue_s:
            return (-1.0, job.arrived_s, 0.0, float(job.number))
        band = min(Priority.INTERACTIVE, job.priority + int(max(waited_s, 0.0) / self.settings.aging_s))
        due_s = job.arrived_s + self.settings.patience_s
        if job.deadline_s is not None:
            due_s = min(due_s, job.deadline_s)
        tenant = self._tenants.get(job.tenant)
        tag = self._clock if tenant is None else tenant.tag
        return (float(Priority.INTERACTIVE - band), tag, due_s, float(job.number))

    def _lateness(self, job: Job, now_s: float) -> Refusal | None:
        """A refusal when `job` cannot make its deadline."""
        assert job.deadline_s is not None
        left_s = job.deadline_s - now_s
        alone_s = self.times.predict(job.kind, job.rows, now_s)
        if alone_s is None:
            return None
        if alone_s * job.steps > left_s:  # not even if it were the only one
            return Refusal(reason="deadline", retry_after_s=None, predicted_s=alone_s * job.steps)
        predicted_s = self.predicted_s(job, now_s)
        if predicted_s is None or predicted_s <= left_s:
            return None
        return Refusal(
            reason="deadline",
            retry_after_s=max(_RETRY_LEAST_S, predicted_s - left_s),
            predicted_s=predicted_s,
        )

    def _until_room_s(self, now_s: float) -> float:
        """Seconds until somebody who is drawn is done, as far as one knows."""
        turn_s = self._turn_s([one.job for one in self._running.values()], now_s)
        if turn_s is None or not self._running:
            return _RETRY_LEAST_S
        return max(_RETRY_LEAST_S, turn_s * min(one.steps_left for one in self._running.values()))

    def _turn_s(self, jobs: Iterable[Job], now_s: float) -> float | None:
        """Seconds until each of these has taken a step. Kinds take turns; too many rows take several.

        None only where nothing is known of any kind: somebody of an unknown one must not hide when the others are late.
        """
        rows: defaultdict[Hashable, int] = defaultdict(int)
        for job in jobs:
            rows[job.kind] += job.rows
        passed_s = 0.0
        for kind, count in rows.items():
            forwards = math.ceil(count / self.settings.max_rows)
            each = math.ceil(count / forwards)
            each_s = self.times.predict(kind, each, now_s) or self.times.guess(each, now_s)
            if each_s is None:
                return None
            passed_s += forwards * each_s
        return passed_s

    def _streamed_s(self, jobs: Sequence[Job], now_s: float) -> float | None:
        """The end of a long queue, as if all places were always taken."""
        turn_s = self._turn_s(jobs[: self.settings.max_running], now_s)
        steps = sum(one.steps_left for one in self._running.values()) + sum(job.steps for job in jobs)
        return None if turn_s is None else steps / self.settings.max_running * turn_s

    def _take(self, job: Job) -> None:
        del self._waiting[job.number]
        del self._tenants[job.tenant].waiting[job.number]

    def _forget_idle(self) -> None:
        """Tenants whom the clock has caught up with need not be remembered: they would start from the clock anyway."""
        drawn = {one.job.tenant for one in self._running.values()}
        idle = [
            name
            for name, tenant in self._tenants.items()
            if not tenant.waiting and name not in drawn and tenant.tag <= self._clock
        ]
        for name in idle:
            del self._tenants[name]
