"""Forwards that are recorded and replayed: the same pictures, whatever moves, and none lost where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.models.drawing import Drawing, Start, begin_together
from services.models.graphs import ROWS, Graphs, Inputs, Outputs
from services.models.lora import Adapter, AdapterSlots, LowRank, Outfit, Worn, adapted_layers
from services.models.references import ReferenceCache, ReferencePolicy
from services.models.registry import FrameModel
from services.models.step import advance
from tests.tape import Tape

from .test_drawing import sketch

CLOSE: Any = {"atol": 1e-5, "rtol": 1e-4}
ALONE: Outfit = ()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def double(given: Inputs) -> Outputs:
    return (given["x"] * 2, given["x"].flatten(1).sum(1))


def numbers(rows: int, width: int = 3) -> dict[str, Tensor]:
    return {"x": torch.arange(rows * width, dtype=torch.float32).view(rows, width)}


def test_the_second_forward_of_a_shape_is_recorded_and_the_third_one_replayed() -> None:
    graphs, calls = Graphs(Tape()), 0

    def work(given: Inputs) -> Outputs:
        nonlocal calls
        calls += 1
        return double(given)

    for _ in range(2):
        graphs.run("double", work, numbers(5))
    assert (graphs.recorded_count, graphs.replayed_count) == (1, 0)
    other = {"x": numbers(5)["x"] + 100}
    doubled, summed = graphs.run("double", work, other)
    assert graphs.replayed_count == 1
    assert doubled.equal(other["x"] * 2)
    assert summed.equal(other["x"].sum(1))


@pytest.mark.parametrize("rows", [1, 9, 11, 17, 31, 32, 33, 64])
def test_rows_are_filled_up_to_few_counts_and_nobody_sees_the_others(rows: int) -> None:
    graphs, counts = Graphs(Tape()), set()

    def work(given: Inputs) -> Outputs:
        counts.add(len(given["x"]))
        return double(given)

    for _ in range(3):
        doubled, summed = graphs.run("double", work, numbers(rows))
        assert doubled.equal(numbers(rows)["x"] * 2)
        assert len(summed) == rows
    assert counts == {rows if rows > ROWS[-1] else next(count for count in ROWS if count >= rows)}
    assert bool(graphs.replayed_count) == (rows <= ROWS[-1])


def test_narrower_rows_use_the_recording_of_their_count() -> None:
    graphs = Graphs(Tape())
    for rows in (10, 9, 10, 9):
        assert graphs.run("double", double, numbers(rows))[0].equal(numbers(rows)["x"] * 2)
    assert (graphs.recorded_count, graphs.replayed_count) == (1, 2)


def test_what_moved_is_recorded_anew() -> None:
    graphs, table = Graphs(Tape()), torch.zeros(3)

    def look(given: Inputs) -> Outputs:
        return (given["x"] + table,)

    def run() -> Tensor:
        return graphs.run("look", look, numbers(2), places=[table.data_ptr()])[0]

    for _ in range(3):
        run()
    before, table = table, torch.ones(3)
    for _ in range(3):
        assert run().equal(numbers(2)["x"] + 1)
    assert graphs.recorded_count == 2
    table = before
    assert run().equal(numbers(2)["x"])


def test_a_recording_that_read_more_serves_and_one_that_read_less_does_not() -> None:
    graphs = Graphs(Tape())

    def run(*parts: str) -> int:
        graphs.run("double", double, numbers(1), parts=frozenset(parts))
        return graphs.replayed_count

    assert [run("a", "b"), run("a", "b"), run("a"), run("b"), run("a", "c"), run("a", "c"), run("c")] == [
        0,
        0,
        1,
        2,
        2,
        2,
        3,
    ]


@pytest.mark.parametrize("lies", [False, True])
def test_a_device_that_cannot_record_is_asked_once_and_every_answer_is_right(*, lies: bool) -> None:
    class Bad:
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            if lies:
                return lambda: None
            raise RuntimeError("no such capability")

    told: list[str] = []
    graphs = Graphs(Bad(), tell=told.append)
    for _ in range(4):
        assert graphs.run("double", double, numbers(4))[0].equal(numbers(4)["x"] * 2)
    assert graphs.is_broken
    assert told == ["a replay answered something else" if lies else "RuntimeError: no such capability"]


def test_a_row_that_is_not_a_number_breaks_nothing() -> None:
    graphs, bad = Graphs(Tape()), numbers(3)
    bad["x"][1] = torch.nan
    for _ in range(3):
        answer = graphs.run("double", double, bad)[0]
        assert answer[[0, 2]].equal(numbers(3)["x"][[0, 2]] * 2)
        assert answer[1].isnan().all()
    assert not graphs.is_broken


def test_a_work_that_asks_the_device_is_not_recorded() -> None:
    told: list[str] = []
    graphs = Graphs(Tape(), tell=told.append)

    def asks(given: Inputs) -> Outputs:
        return (given["x"] * float(given["x"].max()),)

    for _ in range(3):
        assert graphs.run("asks", asks, numbers(2))[0].equal(numbers(2)["x"] * 5)
    assert told == ["Asked: aten::item"]


def test_shapes_that_nobody_asks_for_any_more_are_let_go_where_buffers_fill() -> None:
    graphs = Graphs(Tape(), bytes_max=4 * 3 * 8)
    for _ in range(2):
        for width in (3, 4, 5):
            graphs.run("double", double, numbers(3, width))
    assert graphs.recorded_count == 0  # each was gone before it came again
    graphs.run("double", double, numbers(3, 5))
    assert graphs.recorded_count == 1


def test_memory_that_runs_out_is_given_back_and_the_forward_made_once_more() -> None:
    told: list[str] = []
    graphs, calls = Graphs(Tape(), tell=told.append), 0
    for _ in range(3):
        graphs.run("double", double, numbers(3))

    def large(given: Inputs) -> Outputs:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("full")
        return double(given)

    assert graphs.run("large", large, numbers(3))[0].equal(numbers(3)["x"] * 2)
    assert calls == 2
    assert told == ["memory ran out"]
    assert not graphs.is_broken
    for _ in range(3):
        graphs.run("double", double, numbers(3))
    assert (graphs.recorded_count, graphs.replayed_count) == (2, 2)


def test_wider_rows_get_wider_buffers_and_narrow_ones_are_recorded_again() -> None:
    graphs = Graphs(Tape())
    for rows in (2, 2, 2, 9, 9, 9, 2, 2, 2, 9):
        assert graphs.run("double", double, numbers(rows))[0].equal(numbers(rows)["x"] * 2)
    assert (graphs.recorded_count, graphs.replayed_count) == (3, 4)


def worn(model: FrameModel, graphs: Graphs | None) -> FrameModel:
    """With two characters' weights, of linear layers and convolutions, in products of their own as on a GPU."""
    unet = model.denoiser.unet
    slots, generator = AdapterSlots(unet, count=2, rank_max=2, merged_bytes=0), torch.Generator().manual_seed(5)
    for slot, ends in ((1, ("to_q", "conv1")), (2, ("to_k", "proj"))):
        factors = {}
        for name, layer in adapted_layers(unet).items():
            if name.endswith(ends):
                down = torch.randn(2, *layer.weight.shape[1:], generator=generator)
                factors[name] = LowRank(down, torch.randn(layer.weight.shape[0], 2, generator=generator) * 0.1, 2.0)
        slots.put(slot, Adapter(digest=str(slot) * 64, factors=factors, deltas={}, size_bytes=0))
    return replace(model, slots=slots, graphs=graphs)


@pytest.mark.parametrize("policy", [ReferencePolicy(), ReferencePolicy(shared_noise=True, levels_count=2)])
@pytest.mark.parametrize("deep_every", [1, 2])
def test_frames_are_the_same_recorded_or_not(tiny_model: FrameModel, policy: ReferencePolicy, deep_every: int) -> None:
    def drawn(model: FrameModel) -> list[Drawing]:
        starts = [
            Start(sketch=sketch(count, policy=policy, seed=number, steps=9, deep_every=deep_every))
            for number, count in enumerate((0, 1, 3, 2))
        ]
        drawings, cache = begin_together(model, starts), ReferenceCache()
        late = drawings.pop()
        while not late.finished:  # they come and go, so that shapes change and come again
            some = [one for one in drawings if not one.finished] + [late] * (drawings[0].done > 2)
            advance(model, some, cache, prefill_rows=6)
        return [*drawings, late]

    graphs = Graphs(Tape())
    for one, other in zip(drawn(tiny_model), drawn(replace(tiny_model, graphs=graphs)), strict=True):
        torch.testing.assert_close(one.latents_CHW, other.latents_CHW, **CLOSE)
    assert graphs.replayed_count
    assert not graphs.is_broken


def test_a_frame_alone_is_bit_for_bit_the_same_before_and_after_its_forwards_are_recorded(
    tiny_model: FrameModel,
) -> None:
    model = replace(tiny_model, graphs=Graphs(Tape()))

    def drawn() -> Tensor:
        drawings = begin_together(model, [Start(sketch=sketch(2))])
        while not drawings[0].finished:
            advance(model, drawings, ReferenceCache())
        return drawings[0].latents_CHW

    first = drawn()
    assert model.graphs is not None
    recorded = model.graphs.recorded_count
    assert drawn().equal(first)
    assert drawn().equal(first)
    assert recorded
    assert model.graphs.replayed_count


def test_who_wears_what_lies_in_inputs_and_a_new_character_is_seen(tiny_model: FrameModel) -> None:
    def drawn(model: FrameModel, *outfits: Outfit) -> list[Tensor]:
        drawings = begin_together(model, [Start(sketch=sketch(1, seed=seed, steps=6)) for seed in range(len(outfits))])
        for drawing, outfit in zip(drawings, outfits, strict=True):
            drawing.outfit = outfit
            drawing.told = ()  # which were read before it wore anything
        cache = ReferenceCache()
        while not drawings[0].finished:
            advance(model, drawings, cache)
        return [drawing.latents_CHW for drawing in drawings]

    graphs = Graphs(Tape())
    one, two, faint = (Worn(1, 1.0),), (Worn(2, 0.5),), (Worn(1, 0.25),)
    casts: list[tuple[Outfit, ...]] = [(one, two, ALONE), (two, ALONE, one), (faint, faint, faint), (one, two, ALONE)]
    try:
        model = worn(tiny_model, None)
        expected = [drawn(model, *outfits) for outfits in casts]
        recorded = replace(model, graphs=graphs)
        for outfits, wanted in zip(casts, expected, strict=True):
            for latents, other in zip(drawn(recorded, *outfits), wanted, strict=True):
                torch.testing.assert_close(latents, other, **CLOSE)
        assert graphs.replayed_count
        slots = recorded.slots
        assert slots is not None
        slots.clear(2)
        unet = tiny_model.denoiser.unet
        changed = {  # layers that nobody changed when the forwards were recorded
            name: LowRank(torch.ones(1, *layer.weight.shape[1:]) * 0.1, torch.ones(layer.weight.shape[0], 1), 1.0)
            for name, layer in adapted_layers(unet).items()
            if name.endswith("to_out.0")
        }
        slots.put(2, Adapter(digest="3" * 64, factors=changed, deltas={}, size_bytes=0))
        wanted = drawn(model, one, two, ALONE)
        assert (wanted[1] - expected[0][1]).abs().max() > 1e-3
        for _ in range(2):
            for latents, other in zip(drawn(recorded, one, two, ALONE), wanted, strict=True):
                torch.testing.assert_close(latents, other, **CLOSE)
        assert not graphs.is_broken
    finally:
        for layer in adapted_layers(tiny_model.denoiser.unet).values():
            layer.__dict__.pop("forward", None)  # the model is others' too
