"""The scheduler: nobody is lost, nobody starves, nobody is promised what cannot be kept."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.frame.scheduler import Job, Priority, Refusal, Scheduler, SchedulerSettings, StepTimes

SETTINGS = SchedulerSettings(max_running=2, max_queued=8, max_rows=16)


def job(number: int, **changes: object) -> Job:
    return replace(Job(number=number, kind="a", rows=4, steps=3, arrived_s=0.0), **changes)  # type: ignore[arg-type]


def begun(scheduler: Scheduler, now_s: float = 0.0) -> list[int]:
    numbers = []
    while (one := scheduler.begin(now_s)) is not None:
        numbers.append(one.number)
    return numbers


def order(scheduler: Scheduler, now_s: float = 0.0) -> list[int]:
    """Everybody who waits, as they would begin if each were gone before the next."""
    numbers = []
    while (one := scheduler.begin(now_s)) is not None:
        numbers.append(one.number)
        for _ in range(one.steps):
            scheduler.stepped([one.number], None, 0.0)
        scheduler.remove(one.number)
    return numbers


def test_a_job_waits_begins_steps_and_is_gone() -> None:
    scheduler = Scheduler(SETTINGS)
    assert [scheduler.offer(job(n), 0.0) for n in range(3)] == [None] * 3
    assert (scheduler.waiting_count, scheduler.running_count) == (3, 0)
    assert begun(scheduler) == [0, 1]
    assert scheduler.choose() == (0, 1)
    scheduler.remove(0)
    scheduler.remove(0)
    assert begun(scheduler) == [2]
    assert (scheduler.waiting_count, scheduler.running_count) == (0, 2)


def test_a_full_queue_takes_nobody_and_a_tenant_only_its_part() -> None:
    scheduler = Scheduler(replace(SETTINGS, tenant_queue_share=0.5))
    for n in range(4):
        assert scheduler.offer(job(n, tenant="greedy"), 0.0) is None
    refused = scheduler.offer(job(4, tenant="greedy"), 0.0)
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == ("tenant_queue_full", 1.0)
    assert [scheduler.offer(job(n), 0.0) for n in range(5, 11)] == [None] * 6, "who has no name has no part"
    assert scheduler.is_full
    refused = scheduler.offer(job(11, tenant="modest"), 0.0)
    assert refused is not None
    assert refused.reason == "queue_full"


def test_higher_priorities_begin_first_and_waiting_makes_up_for_it() -> None:
    scheduler = Scheduler(SETTINGS)
    scheduler.offer(job(0, priority=Priority.BATCH), 0.0)
    scheduler.offer(job(1, priority=Priority.STANDARD), 0.0)
    scheduler.offer(job(2, priority=Priority.INTERACTIVE), 0.0)
    assert order(scheduler) == [2, 1, 0]
    scheduler.offer(job(3, priority=Priority.BATCH, arrived_s=0.0), 0.0)
    late_s = 2 * SETTINGS.aging_s
    scheduler.offer(job(4, priority=Priority.INTERACTIVE, arrived_s=late_s), late_s)
    assert order(scheduler, late_s) == [3, 4]


def test_the_earliest_deadline_begins_first_and_one_without_has_patience() -> None:
    scheduler = Scheduler(SETTINGS)
    scheduler.offer(job(0), 0.0)
    scheduler.offer(job(1, deadline_s=50.0), 0.0)
    scheduler.offer(job(2, deadline_s=20.0), 0.0)
    scheduler.offer(job(3, deadline_s=5000.0), 0.0)
    assert order(scheduler) == [2, 1, 0, 3]


def test_a_job_whose_deadline_has_passed_never_begins() -> None:
    scheduler = Scheduler(SETTINGS)
    scheduler.offer(job(0, deadline_s=10.0), 0.0)
    assert begun(scheduler, 10.0) == []
    assert scheduler.late(10.0) == [0]
    assert scheduler.late(9.9) == []


def test_tenants_take_turns_by_what_they_were_given() -> None:
    scheduler = Scheduler(SETTINGS)
    for n in range(4):
        scheduler.offer(job(n, tenant="a"), 0.0)
    for n in range(4, 6):
        scheduler.offer(job(n, tenant="b", steps=6), 0.0)  # twice as dear
    assert order(scheduler) == [0, 4, 1, 2, 5, 3]


def test_an_idle_tenant_has_saved_nothing_up() -> None:
    scheduler = Scheduler(SETTINGS)
    for n in range(4):
        scheduler.offer(job(n, tenant="a"), 0.0)
        assert order(scheduler) == [n]
    for n in range(4, 8):
        scheduler.offer(job(n, tenant="ab"[n % 2]), 0.0)
    assert order(scheduler) in ([4, 5, 6, 7], [5, 4, 7, 6])


def test_a_cancelled_job_is_not_charged() -> None:
    scheduler = Scheduler(replace(SETTINGS, max_running=1))
    scheduler.offer(job(0, tenant="a", steps=100), 0.0)
    assert begun(scheduler) == [0]
    scheduler.offer(job(1, tenant="a"), 0.0)
    scheduler.offer(job(2, tenant="b"), 0.0)
    scheduler.remove(0)
    assert order(scheduler) == [1, 2]


def test_whoever_is_overdue_goes_before_everybody() -> None:
    scheduler = Scheduler(SETTINGS)
    scheduler.offer(job(0, tenant="a", steps=1000), 0.0)
    assert order(scheduler) == [0]
    scheduler.offer(job(1, tenant="a", priority=Priority.BATCH), 0.0)
    now_s = SETTINGS.overdue_s
    scheduler.offer(job(2, tenant="b", priority=Priority.INTERACTIVE, arrived_s=now_s), now_s)
    assert order(scheduler, now_s) == [1, 2]


def test_unlike_kinds_take_turns_and_a_large_one_steps_alone() -> None:
    scheduler = Scheduler(replace(SETTINGS, max_running=4))
    for n, kind in enumerate("aab"):
        scheduler.offer(job(n, kind=kind), 0.0)
    scheduler.offer(job(3, kind="a", rows=99), 0.0)
    begun(scheduler)
    turns = []
    for _ in range(6):
        turns.append(scheduler.choose())
        scheduler.stepped(turns[-1], 0.1, 0.0)
    assert turns == [(0, 1), (2,), (3,)] * 2


def test_step_times_are_a_constant_and_so_much_a_row() -> None:
    times = StepTimes()
    assert times.predict("a", 4, 0.0) is None
    times.add("a", 4, 2.0, 0.0)
    assert times.predict("a", 8, 0.0) == pytest.approx(4.0), "one measurement only scales"
    for _ in range(50):
        times.add("a", 8, 3.0, 0.0)
        times.add("a", 4, 2.0, 0.0)
    assert times.predict("a", 16, 0.0) == pytest.approx(5.0, rel=0.02)
    for _ in range(300):
        times.add("a", 8, 6.0, 0.0)
        times.add("a", 4, 4.0, 0.0)
    assert times.predict("a", 8, 0.0) == pytest.approx(6.0, rel=0.02), "what was long ago is forgotten"


def test_what_was_measured_long_ago_is_held_against_nobody() -> None:
    """One stall, and everybody after it refused and so nobody measured: that would never end."""
    scheduler = Scheduler(SETTINGS)
    scheduler.times.add("a", 4, 30.0, 0.0)
    late = scheduler.offer(job(0, deadline_s=40.0), 30.0)
    assert late is not None
    assert late.reason == "deadline"
    assert scheduler.offer(job(1, deadline_s=80.0), 70.0) is None


def test_somebody_of_an_unknown_kind_does_not_hide_who_will_be_late() -> None:
    scheduler = measured(SETTINGS)
    assert scheduler.offer(job(0, kind="new", steps=50), 0.0) is None
    assert scheduler.offer(job(1, deadline_s=30.0), 0.0) is None
    refused = scheduler.offer(job(2, steps=20, deadline_s=31.0), 0.0)
    assert refused is not None
    assert refused.reason == "deadline"
    assert scheduler.times.guess(8, 0.0) == pytest.approx(1.8)
    assert StepTimes().guess(8, 0.0) is None


def test_only_so_many_kinds_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.frame.scheduler.KINDS_MAX", 2)
    times = StepTimes()
    for kind in "abac":
        times.add(kind, 1, 1.0, 0.0)
    assert [kind for kind in "abc" if times.predict(kind, 1, 0.0) is not None] == ["a", "c"]


def measured(settings: SchedulerSettings) -> Scheduler:
    """A second a step and a tenth a row."""
    scheduler = Scheduler(settings)
    for rows in (4, 8, 4, 8):
        scheduler.times.add("a", rows, 1.0 + rows / 10, 0.0)
    return scheduler


def test_a_prediction_is_what_then_happens() -> None:
    scheduler = measured(SETTINGS)
    jobs = [job(n, steps=2 + n) for n in range(5)]
    predicted = {}
    for one in jobs:
        assert scheduler.offer(one, 0.0) is None
    for one in jobs:
        predicted[one.number] = scheduler.predicted_s(one, 0.0)
    happened = {}
    now_s = 0.0
    left = {one.number: one.steps for one in jobs}
    while len(happened) < len(jobs):
        begun(scheduler, 0.0)
        batch = scheduler.choose()
        now_s += 1.0 + 4 * len(batch) / 10
        scheduler.stepped(batch, None, now_s)
        for number in batch:
            left[number] -= 1
            if not left[number]:
                happened[number] = now_s
                scheduler.remove(number)
    assert happened == pytest.approx(predicted)


def test_what_cannot_be_done_in_time_is_refused_with_advice() -> None:
    scheduler = measured(SETTINGS)
    for n in range(4):
        assert scheduler.offer(job(n), 0.0) is None
    assert scheduler.offer(job(4, deadline_s=20.0), 0.0) is None, "as often as it can be done, it is taken"
    refused = scheduler.offer(job(5, deadline_s=4.5), 0.0)
    assert isinstance(refused, Refusal)
    assert refused.reason == "deadline"
    assert refused.retry_after_s is not None
    assert refused.predicted_s is not None
    assert refused.retry_after_s >= 1.0
    hopeless = scheduler.offer(job(6, deadline_s=2.0), 0.0)
    assert hopeless is not None
    assert (hopeless.reason, hopeless.retry_after_s) == ("deadline", None)
    assert Scheduler(SETTINGS).offer(job(0, deadline_s=0.1), 0.0) is None, "what was never measured is tried"


@dataclass
class World:
    """Arrivals, cancellations and steps in a time of their own; keeps count of everybody."""

    settings: SchedulerSettings
    seed: int
    now_s: float = 0.0
    offered: dict[int, Job] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    finished: dict[int, float] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    served: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def run(self, count: int, load: float, tenants: int = 3, cancels: float = 0.1) -> Scheduler:
        rng = random.Random(self.seed)
        scheduler = Scheduler(self.settings)
        left: dict[int, int] = {}
        capacity = self.settings.max_running / (8 * self.step_s(4 * self.settings.max_running))  # jobs a second
        next_s, number = 0.0, 0
        while number < count or left or scheduler.waiting_count:
            while number < count and next_s <= self.now_s:
                self.arrive(scheduler, rng, number, next_s, tenants)
                number += 1
                next_s += rng.expovariate(load * capacity)
            for late in scheduler.late(self.now_s):
                self.leave(scheduler, left, late)
            if rng.random() < cancels:
                present = [n for n in self.offered if n not in self.gone] if len(self.offered) < 50 else list(left)
                if present:
                    self.leave(scheduler, left, rng.choice(present))
            while (one := scheduler.begin(self.now_s)) is not None:
                assert one.number not in self.began, "nobody begins twice"
                assert one.deadline_s is None or self.now_s < one.deadline_s
                self.began[one.number], left[one.number] = self.now_s, one.steps
            batch = scheduler.choose()
            assert bool(batch) == bool(left)
            if not batch:
                self.now_s = max(self.now_s, next_s) if number < count else self.now_s
                continue
            rows = sum(self.offered[n].rows for n in batch)
            assert len({self.offered[n].kind for n in batch}) == 1
            assert len(batch) == 1 or rows <= self.settings.max_rows
            assert len(left) <= self.settings.max_running
            self.now_s += self.step_s(rows)
            scheduler.stepped(batch, self.step_s(rows), self.now_s)
            for n in batch:
                left[n] -= 1
                self.served[self.offered[n].tenant] += self.offered[n].rows
                if not left[n]:
                    self.finished[n] = self.now_s
                    self.leave(scheduler, left, n)
        return scheduler

    def arrive(self, scheduler: Scheduler, rng: random.Random, number: int, at_s: float, tenants: int) -> None:
        one = Job(
            number=number,
            kind=rng.choice("aaab"),
            rows=rng.choice((2, 4, 6)),
            steps=rng.choice((4, 8, 12)),
            arrived_s=at_s,
            tenant=f"t{rng.randrange(tenants)}",
            priority=rng.choice(tuple(Priority)),
            deadline_s=at_s + rng.uniform(1.0, 60.0) if rng.random() < 0.3 else None,
        )
        refusal = scheduler.offer(one, self.now_s)
        if refusal is None:
            self.offered[number] = one
        else:
            self.refused[refusal.reason] += 1
            assert refusal.retry_after_s is None or refusal.retry_after_s >= 1.0

    def leave(self, scheduler: Scheduler, left: dict[int, int], number: int) -> None:
        scheduler.remove(number)
        left.pop(number, None)
        self.gone.add(number)

    @staticmethod
    def step_s(rows: int) -> float:
        return 0.05 + 0.01 * rows


@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.9, 1.5, 4.0]), st.integers(1, 5), st.integers(1, 6))
def test_whatever_comes_everybody_is_finished_cancelled_late_or_refused(
    seed: int, load: float, max_running: int, tenants: int
) -> None:
    settings = SchedulerSettings(max_running=max_running, max_queued=6, max_rows=12, aging_s=2.0, overdue_s=30.0)
    world = World(settings, seed)
    scheduler = world.run(60, load, tenants)
    assert set(world.offered) == world.gone
    assert len(world.offered) + world.refused.total() == 60
    assert set(world.finished) <= set(world.began) <= set(world.offered)
    assert (scheduler.waiting_count, scheduler.running_count) == (0, 0)


def test_a_hundred_thousand_jobs() -> None:
    """The same in the large: overloaded, with tenants of very unequal appetite."""
    settings = SchedulerSettings(max_running=8, max_queued=32, max_rows=64)
    world = World(settings, seed=1)
    world.run(100_000, load=1.2, tenants=4, cancels=0.02)
    assert set(world.offered) == world.gone
    assert len(world.offered) + world.refused.total() == 100_000
    assert world.refused.total() > 0
    assert max(world.served.values()) <= 1.2 * min(world.served.values()), "equal demands are served alike"
    # Whoever is overdue goes first, so nobody waits longer than that and for those places that are taken then.
    waits = sorted(world.began[n] - world.offered[n].arrived_s for n in world.began)
    place_s = 12 * 2 * World.step_s(64)  # twelve steps, every other one another kind's
    assert waits[-1] <= settings.overdue_s + settings.max_queued / settings.max_running * place_s
    assert waits[-1] <= 20 * waits[len(waits) // 2], "nor much longer than others"
    met = [n for n, at_s in world.finished.items() if (d := world.offered[n].deadline_s) is not None and at_s <= d]
    promised = [n for n in world.began if world.offered[n].deadline_s is not None]
    assert len(met) >= 0.8 * len(promised), "what was taken with a deadline mostly keeps it"


def test_a_flood_of_one_tenant_does_not_drown_the_others() -> None:
    scheduler = Scheduler(SchedulerSettings(max_running=1, max_queued=40, max_rows=64))
    for n in range(30):
        scheduler.offer(job(n, tenant="flood"), 0.0)
    for n in range(30, 35):
        scheduler.offer(job(n, tenant="trickle"), 0.0)
    places = [index for index, number in enumerate(order(scheduler)) if number >= 30]
    assert max(places) <= 10
