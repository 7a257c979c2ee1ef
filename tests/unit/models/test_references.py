"""Earlier frames as prefill: which rows are computed, which are found again, and that pictures do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.models.denoiser import reference_level
from services.models.drawing import Drawing, Seen, Sketch, begin, finish, rows_of_a_frame
from services.models.references import EXACT, Pages, ReferenceCache, ReferenceKey, ReferencePolicy
from services.models.registry import FrameModel
from services.models.step import advance, forget
from services.models.storygen import KeyValue

from .test_drawing import SIZE_PX, sketch

SHARED = ReferencePolicy(shared_noise=True)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def drawn(model: FrameModel, job: Sketch, cache: ReferenceCache | None = None, prefill_rows: int = 0) -> Drawing:
    drawing, cache = begin(model, job), ReferenceCache() if cache is None else cache
    while not drawing.finished:
        advance(model, [drawing], cache, prefill_rows=prefill_rows)
    return drawing


@contextmanager
def counted(model: FrameModel) -> Iterator[list[int]]:
    """Rows of every forward."""
    rows: list[int] = []
    handle = model.denoiser.unet.conv_in.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def key(number: int, *, size: tuple[int, int] = (4, 4), noise: tuple[int, ...] = ()) -> ReferenceKey:
    return ReferenceKey(str(number), "", number, noise, size, (), "")


def projected(*numbers: int) -> dict[str, KeyValue]:
    values = torch.tensor([float(number) for number in numbers])[:, None, None].expand(-1, 3, 2).contiguous()
    return {"block": KeyValue(values, -values)}


class TestPolicy:
    def test_the_rule_of_storygen_is_the_default(self) -> None:
        steps = (999, 500, 20)
        for done, t in enumerate(steps):
            for distance in (1, 2, 3):
                assert EXACT.level(steps, done, distance) == reference_level(t, distance)

    @pytest.mark.parametrize(("count", "levels"), [(40, 4), (10, 3), (7, 1), (3, 8)])
    def test_a_few_levels_are_few_fall_and_do_not_ask_for_the_distance(self, count: int, levels: int) -> None:
        steps = tuple(range(990, 990 - count * 20, -20))
        policy = ReferencePolicy(levels_count=levels)
        told = [policy.level(steps, done, 1) for done in range(count)]
        assert len(set(told)) == min(levels, count)
        assert told == sorted(told, reverse=True)
        assert all(min(s // 10 for s in steps) <= level <= max(s // 10 for s in steps) for level in told)
        assert told == [policy.level(steps, done, 3) for done in range(count)]

    def test_a_level_lies_within_its_stretch_of_steps(self) -> None:
        steps = tuple(range(900, 0, -100))
        policy = ReferencePolicy(levels_count=3)
        assert [policy.level(steps, done, 1) for done in range(9)] == [80] * 3 + [50] * 3 + [20] * 3

    def test_levels_are_counted_from_zero(self) -> None:
        with pytest.raises(ValueError, match="negative"):
            ReferencePolicy(levels_count=-1)


class TestPages:
    def test_what_was_stored_is_found_in_its_page(self) -> None:
        pages = Pages(budget_bytes=1000)
        pages.store([key(1), key(2)], projected(1, 2), keep=())
        pages.store([key(3)], projected(3), keep=())
        for number, slot in zip((3, 1, 2), pages.slots([key(3), key(1), key(2)]), strict=True):
            assert pages.blocks["block"].key[slot].unique().tolist() == [number]
            assert pages.blocks["block"].value[slot].unique().tolist() == [-number]

    def test_the_budget_says_how_many_there_are_and_who_was_used_longest_ago_goes(self) -> None:
        row_bytes = 2 * 3 * 2 * 4
        pages = Pages(budget_bytes=3 * row_bytes)
        pages.store([key(1), key(2), key(3)], projected(1, 2, 3), keep=())
        pages.slots([key(1)])
        pages.store([key(4)], projected(4), keep=())
        assert [key(n) in pages for n in (1, 2, 3, 4)] == [True, False, True, True]
        assert pages.count == len(pages) == 3

    def test_what_a_step_needs_stays_and_finds_room_above_the_budget(self) -> None:
        pages = Pages(budget_bytes=0)
        pages.store([key(1), key(2)], projected(1, 2), keep=[key(1), key(2), key(3)])
        pages.store([key(3)], projected(3), keep=[key(1), key(2), key(3)])
        assert pages.count == 3
        slots = pages.slots([key(1), key(2), key(3)])
        assert pages.blocks["block"].key[slots, 0, 0].tolist() == [1, 2, 3]

    def test_the_blanks_rows_stay_longer_than_pictures_but_never_take_more_than_half(self) -> None:
        row_bytes = 2 * 3 * 2 * 4
        pages = Pages(budget_bytes=4 * row_bytes)
        blanks = [key(n)._replace(picture="") for n in (1, 2, 3)]
        pages.store([blanks[0], blanks[1], key(3), key(4)], projected(1, 2, 3, 4), keep=())
        pages.store([key(5)], projected(5), keep=())
        assert [one in pages for one in (*blanks[:2], key(3), key(4), key(5))] == [True, True, False, True, True]
        pages.store([blanks[2]], projected(6), keep=())  # in a picture's place: three of four pages
        pages.slots([blanks[0]])
        pages.store([key(7)], projected(7), keep=())
        assert [one in pages for one in (*blanks, key(4), key(5), key(7))] == [True, False, True, False, True, True]

    def test_a_page_that_is_given_back_is_used_again(self) -> None:
        pages = Pages(budget_bytes=0)
        pages.store([key(1), key(2)], projected(1, 2), keep=())
        pages.discard([key(1), key(7)])
        pages.store([key(3)], projected(3), keep=[key(2)])
        assert pages.count == 2
        with pytest.raises(KeyError):
            pages.slots([key(1)])

    def test_only_the_sizes_that_were_drawn_last_are_kept(self) -> None:
        cache = ReferenceCache()
        for side in (4, 5, 6):
            cache.of((side, side)).store([key(side, size=(side, side))], projected(side), keep=())
        assert cache.rows_count == 2
        assert len(cache.of((4, 4))) == 0


class TestExact:
    @pytest.mark.parametrize("prefill_rows", [1, 7, 100])
    def test_prefill_changes_no_picture_and_computes_no_row_more(
        self, tiny_model: FrameModel, prefill_rows: int
    ) -> None:
        plain = drawn(tiny_model, sketch(3))
        with counted(tiny_model) as rows:
            ahead = drawn(tiny_model, sketch(3), ReferenceCache(1 << 20), prefill_rows)
        torch.testing.assert_close(ahead.latents_CHW, plain.latents_CHW, **CLOSE)
        assert sum(rows) == rows_of_a_frame(sketch(3)) == 5 * 9

    def test_prefill_takes_fewer_and_wider_passes(self, tiny_model: FrameModel) -> None:
        with counted(tiny_model) as rows:
            drawn(tiny_model, sketch(3), ReferenceCache(1 << 20), prefill_rows=12)
        passes = [count for count in rows if count != 3]  # a main pass has three rows
        assert passes == [12, 12, 6]

    def test_nothing_is_left_behind(self, tiny_model: FrameModel) -> None:
        cache = ReferenceCache(1 << 20)
        drawn(tiny_model, sketch(3), cache, prefill_rows=7)
        assert cache.rows_count == 0
        given_up = begin(tiny_model, sketch(2))
        advance(tiny_model, [given_up], cache, prefill_rows=50)
        assert cache.rows_count > 0
        forget(given_up, cache)
        assert cache.rows_count == 0

    def test_pages_that_are_too_few_cost_rows_and_no_picture(self, tiny_model: FrameModel) -> None:
        plain = drawn(tiny_model, sketch(3, steps=12))
        cache = ReferenceCache(1)
        tight = drawn(tiny_model, sketch(3, steps=12), cache, prefill_rows=30)
        torch.testing.assert_close(tight.latents_CHW, plain.latents_CHW, **CLOSE)

    def test_frames_of_other_seeds_share_nothing(self, tiny_model: FrameModel) -> None:
        cache = ReferenceCache(1 << 20)
        a, b = begin(tiny_model, sketch(2)), begin(tiny_model, replace(sketch(2), seed=8))
        advance(tiny_model, [a, b], cache)
        assert cache.misses_count == 8
        assert cache.hits_count == 0


def story(model: FrameModel, policy: ReferencePolicy, cache: ReferenceCache, steps: int = 40) -> list[Tensor]:
    """A given frame and four more, each looking at up to three before it; latents of the four."""
    base = sketch(1)
    seen: list[Seen] = list(base.references)
    latents = []
    for number in range(4):
        job = replace(base, seed=100 + number, steps=steps, references=tuple(seen[-3:]), policy=policy)
        drawing = drawn(model, job, cache, prefill_rows=24)
        latents.append(drawing.latents_CHW)
        seen.append(Seen(pixels=finish(model, [drawing])[0], description=f"frame {number}"))
    return latents


class TestSharedNoise:
    def test_few_levels_are_computed_once_each_with_noise_of_ones_own(self, tiny_model: FrameModel) -> None:
        job = replace(sketch(3), steps=8, policy=ReferencePolicy(levels_count=2))
        with counted(tiny_model) as rows:
            drawn(tiny_model, job, ReferenceCache(64 << 20))
        assert sum(rows) == rows_of_a_frame(job)

    def test_the_reports_story_takes_fewer_rows_than_the_published_codes_1920(self, tiny_model: FrameModel) -> None:
        """Frame one given, four drawn, 40 steps, three references (the published code pads to three, in three rows)."""
        counts = {}
        for policy in (EXACT, SHARED):
            cache = ReferenceCache(64 << 20)
            if policy == SHARED:  # the blank's table belongs to the pack and is there from the first frame on
                job = replace(sketch(3), steps=40, policy=policy)
                drawn(tiny_model, job, cache)
            with counted(tiny_model) as rows:
                story(tiny_model, policy, cache)
            counts[policy] = sum(rows)
        # 480 main rows and nine references' 40 levels each are 840; some levels of a frame are those it had at another
        # distance (⌊t/10⌋ once, ⌊t'/10⌋ twice), and are found.
        assert counts == {EXACT: 1197, SHARED: 758}

    def test_the_picture_is_the_same_with_a_warm_cache_and_a_cold_one(self, tiny_model: FrameModel) -> None:
        job = replace(sketch(3), policy=SHARED)
        cache = ReferenceCache(1 << 20)
        cold = drawn(tiny_model, job, cache)
        with counted(tiny_model) as rows:
            warm = drawn(tiny_model, job, cache)
        assert sum(rows) == 5 * 3, "every reference row was found"
        torch.testing.assert_close(warm.latents_CHW, cold.latents_CHW, **CLOSE)

    def test_it_is_another_noise_and_so_another_picture(self, tiny_model: FrameModel) -> None:
        exact, shared = drawn(tiny_model, sketch(2)), drawn(tiny_model, replace(sketch(2), policy=SHARED))
        assert (exact.latents_CHW - shared.latents_CHW).abs().max() > 1e-3

    def test_the_blank_is_everybodys_and_pictures_are_their_tenants(self, tiny_model: FrameModel) -> None:
        cache = ReferenceCache(1 << 20)
        job = replace(sketch(2), policy=SHARED)
        mine, theirs = begin(tiny_model, job, tenant="mine"), begin(tiny_model, job, tenant="theirs")
        advance(tiny_model, [mine], cache)
        assert (cache.hits_count, cache.misses_count) == (0, 4)
        advance(tiny_model, [theirs], cache)
        assert (cache.hits_count, cache.misses_count) == (2, 6)

    def test_a_frame_whose_numbers_went_wrong_leaves_nothing_for_others(self, tiny_model: FrameModel) -> None:
        cache = ReferenceCache(1 << 20)
        sick = begin(tiny_model, replace(sketch(2), policy=SHARED))
        advance(tiny_model, [sick], cache, prefill_rows=100)
        assert cache.rows_count > 0
        forget(sick, cache, everything=True)
        assert cache.rows_count == 0

    def test_a_few_levels_are_computed_once_a_picture(self, tiny_model: FrameModel) -> None:
        policy = ReferencePolicy(shared_noise=True, levels_count=2)
        cache = ReferenceCache(64 << 20)
        with counted(tiny_model) as rows:
            latents = story(tiny_model, policy, cache, steps=10)
        # Four frames of ten steps and three branches; the blank and each of four pictures at two levels. A picture is
        # described in the same words in every frame that looks at it, so it is never computed again.
        assert sum(rows) == 4 * 10 * 3 + 2 + 4 * 2
        assert all(bool(one.isfinite().all()) for one in latents)

    def test_frames_that_share_a_forward_find_each_others_rows(self, tiny_model: FrameModel) -> None:
        job = replace(sketch(3), policy=SHARED)
        alone = drawn(tiny_model, job)
        cache = ReferenceCache(1 << 20)
        pair = [begin(tiny_model, job), begin(tiny_model, replace(job, seed=9))]
        while not pair[0].finished:
            advance(tiny_model, pair, cache, prefill_rows=24)
        torch.testing.assert_close(pair[0].latents_CHW, alone.latents_CHW, **CLOSE)
        assert cache.computed_count == 5 * 6


def test_guidance_outside_its_interval_costs_no_rows(tiny_model: FrameModel) -> None:
    job = replace(sketch(2, steps=4), guidance_interval=(0.25, 0.75))
    with counted(tiny_model) as rows:
        drawing = drawn(tiny_model, job)
    assert rows == [2, 1, 4, 3, 4, 3, 2, 1]  # references, then branches
    everywhere = drawn(tiny_model, sketch(2, steps=4))
    assert (drawing.latents_CHW - everywhere.latents_CHW).abs().max() > 1e-3


def test_jobs_of_every_sampler_share_a_forward(tiny_model: FrameModel) -> None:
    jobs = [
        replace(sketch(1, seed=seed, steps=4), sampler=name)
        for seed, name in enumerate(("ddim", "dpm_solver_pp_2m", "euler", "lcm"))
    ]
    alone = [drawn(tiny_model, job) for job in jobs]
    together = [begin(tiny_model, job) for job in jobs]
    while not together[0].finished:
        advance(tiny_model, together)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.latents_CHW, other.latents_CHW, **CLOSE)


def test_sizes_do_not_mix(tiny_model: FrameModel) -> None:
    wide = replace(sketch(0), width_px=2 * SIZE_PX)
    with counted(tiny_model) as rows:
        drawn(tiny_model, wide)
    assert rows == [2] * 5


@pytest.mark.parametrize("other", ["caption", "picture", "place"])
def test_a_shared_row_is_of_one_picture_with_one_caption_at_one_distance(tiny_model: FrameModel, other: str) -> None:
    """Whoever finds another frame's rows finds those of what it looks at itself."""
    one = sketch(2).references
    two = {
        "caption": tuple(replace(seen, description=f"{seen.description}, at night") for seen in one),
        "picture": tuple(replace(seen, pixels=255 - seen.pixels) for seen in one),
        "place": one[::-1],
    }[other]
    first, second = (replace(sketch(2), policy=SHARED, references=seen) for seen in (one, two))
    cache = ReferenceCache(64 << 20)
    drawn(tiny_model, first, cache)
    after = drawn(tiny_model, second, cache).latents_CHW
    torch.testing.assert_close(after, drawn(tiny_model, second).latents_CHW, **CLOSE)
    assert (after - drawn(tiny_model, first).latents_CHW).abs().max() > 1e-3, "it counts at all"
