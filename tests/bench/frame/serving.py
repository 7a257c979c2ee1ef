"""Requests that come when they come: what each system makes of a stream.

The networks really run; only the waiting is skipped. The clock is the sum of what was measured, and jumps to the next
arrival when nobody is there: what one server that does nothing else would show.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.frame.scheduler import Job, Scheduler, SchedulerSettings
from services.models.drawing import Drawing, finish, rows_of_a_frame
from tests.bench.frame.systems import TOGETHER, Done, Ours, Split
from tests.bench.frame.workload import Request


@dataclass
class Served:
    """Seconds from arrival to picture of those who stayed, by tenant; how long it took and how many were drawn."""

    latencies_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ended_s: float = 0.0
    drawn: int = 0

    def tell(self, request: Request, now_s: float) -> None:
        """A picture is ready."""
        self.drawn += 1
        if request.leaves_s > now_s:
            self.latencies_s[request.tenant].append(now_s - request.arrives_s)

    @property
    def all_s(self) -> list[float]:
        """Everybody's latencies."""
        return [value for values in self.latencies_s.values() for value in values]


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve_split(system: Split, requests: Sequence[Request]) -> Served:
    """Batches of the first one's character, drawn from start to end."""
    served, now_s, coming, waiting = Served(), 0.0, list(requests), list[Request]()
    while coming or waiting:
        if not waiting:
            now_s = max(now_s, coming[0].arrives_s)
        while coming and coming[0].arrives_s <= now_s:
            waiting.append(coming.pop(0))
        waiting = [request for request in waiting if request.leaves_s > now_s]
        if not waiting:
            continue
        head = waiting[0]
        alike = [r for r in waiting if (r.adapter, r.sketch.steps) == (head.adapter, head.sketch.steps)][:TOGETHER]
        now_s += _timed(lambda alike=alike: system.draw(alike, Done()))  # type: ignore[misc]
        for request in alike:
            served.tell(request, now_s)
            waiting.remove(request)
    served.ended_s = now_s
    return served


def serve_ours(system: Ours, requests: Sequence[Request]) -> Served:
    """The engine's loop: its scheduler, its step."""
    scheduler = Scheduler(SchedulerSettings(max_running=TOGETHER, max_queued=100_000))
    served, now_s, coming = Served(), 0.0, list(requests)
    known: dict[int, Request] = {}
    drawings: dict[int, Drawing] = {}

    def arrive() -> None:
        while coming and coming[0].arrives_s <= now_s:
            request = coming.pop(0)
            known[request.number] = request
            job = Job(
                number=request.number,
                kind="frame",
                rows=-(-rows_of_a_frame(request.sketch) // request.sketch.steps),
                steps=request.sketch.steps,
                arrived_s=request.arrives_s,
                tenant=request.tenant,
            )
            scheduler.offer(job, now_s)

    def leave(number: int) -> None:
        scheduler.remove(number)
        drawings.pop(number, None)
        del known[number]

    while coming or known:
        if not known:
            now_s = max(now_s, coming[0].arrives_s)
        arrive()
        for number in [n for n, request in known.items() if request.leaves_s <= now_s]:
            leave(number)
        let_in = [job.number for job in iter(lambda: scheduler.begin(now_s), None)]  # noqa: B023 - called at once
        if let_in:

            def begin(numbers: list[int] = let_in) -> None:
                begun = system.begin(*(known[number] for number in numbers))
                drawings.update(zip(numbers, begun, strict=True))

            now_s += _timed(begin)
        batch = scheduler.choose()
        if not batch:
            continue
        seconds = _timed(lambda batch=batch: system.step([drawings[n] for n in batch]))  # type: ignore[misc]
        now_s += seconds
        scheduler.stepped(batch, seconds, now_s)
        ended = [number for number in batch if drawings[number].finished]
        if ended:
            now_s += _timed(lambda ended=ended: finish(system.model, [drawings[n] for n in ended]))  # type: ignore[misc]
        for number in ended:
            served.tell(known[number], now_s)
            leave(number)
    served.ended_s = now_s
    return served
