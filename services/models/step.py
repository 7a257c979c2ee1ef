"""One denoising step of many drawings at a time.

    advance(model, drawings, cache)

A step is at most two forwards: the reference pass over those earlier frames that the cache does not hold, and the main
pass over every guidance branch. Each row has its own timestep, text, references and characters; a drawing's numbers do
not depend on which others share its batch, but for the last bits (matrix kernels sum in an order that depends on the
batch). When a reference pass is needed anyway it takes rows of later steps along, `prefill_rows` in all: wide passes
cost less a row, and one a step never holds the others up for long.

Against the published implementation: rows that it computes twice are computed once, guidance branches that count
nothing are left out, and the pass ends where the last features were taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from services.models.drawing import Drawing, Pixels, Randomness, Sketch, begin, finish, sampler_of, wearing, worn_by
from services.models.graphs import Inputs, Outputs, Work
from services.models.lora import Outfit, WornRows
from services.models.references import Pages, ReferenceCache, ReferenceKey, ReferenceRow
from services.models.registry import FrameModel
from services.models.samplers import History
from services.models.storygen import KeyValue, References, Told
from services.models.transfer import sent


class StepRows(NamedTuple):
    """What a step computed, and what it did not have to."""

    main: int
    computed: int  # of reference passes, those for later steps too
    found: int  # reference rows that were needed and lay in the cache
    shallow: int = 0  # of the main rows, those that used an earlier step's deep states

    @property
    def total(self) -> int:
        """Rows that went through the network."""
        return self.main + self.computed

    def __add__(self, other: object) -> StepRows:
        """Of two steps together."""
        if not isinstance(other, StepRows):
            return NotImplemented
        return StepRows(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = 0  # the number of the branch that sees no earlier frame


class _Row(NamedTuple):
    """One row of the main pass: whose it is, how much it counts, what it looks at."""

    owner: int
    weight: float
    drawing: Drawing
    text_SD: Tensor
    told: Told | None
    sees: tuple[ReferenceRow, ...]
    branch: int
    deep_CHW: Tensor | None  # an earlier step's; None: this step computes its own

    @property
    def shown_count(self) -> int:
        """Pictures that it sees as they are."""
        shown = self.drawing.shown
        return len(next(iter(shown.values())).key) if shown and self.branch != NOTHING else 0


@torch.inference_mode()
def advance(
    model: FrameModel, drawings: Sequence[Drawing], cache: ReferenceCache | None = None, *, prefill_rows: int = 0
) -> StepRows:
    """One denoising step of every drawing, and what that took. They must have the same latent size.

    None of them may be finished. When it raises, no drawing has changed.
    """
    cache = ReferenceCache() if cache is None else cache
    rows = [row for owner, drawing in enumerate(drawings) for row in _rows(owner, drawing)]
    pages = cache.of(_size(drawings[0]))
    computed, found = _look(model, rows, drawings, pages, cache, prefill_rows)
    answers, deep = _predict(model, rows, pages)
    stepped = [
        _sample(model, drawing, output)
        for drawing, output in zip(drawings, _combine(rows, answers, len(drawings)), strict=True)
    ]
    for drawing, (latents, history) in zip(drawings, stepped, strict=True):
        pages.discard(_done_with(drawing))
        drawing.latents_CHW, drawing.history = latents, history
        drawing.done += 1
    for row, states in zip(rows, deep, strict=True):
        if states is not None:
            row.drawing.deep[row.branch] = states
    return StepRows(len(rows), computed, found, sum(row.deep_CHW is not None for row in rows))


def forget(drawing: Drawing, cache: ReferenceCache, *, everything: bool = False) -> None:
    """Free what only this drawing would have looked at in its later steps; `everything`: what others may want too.

    A drawing whose numbers went wrong may have been shown something that is: then nobody should see it again.
    """
    later = [row for done in range(len(drawing.steps)) for row in references_of(drawing, done)]
    cache.discard(row.key for row in later if everything or not row.is_shared)


def draw(model: FrameModel, sketch: Sketch) -> Pixels:
    """A whole picture, alone: the trivial use of the above."""
    drawing, cache = begin(model, sketch), ReferenceCache()
    while not drawing.finished:
        advance(model, [drawing], cache)
    return finish(model, [drawing])[0]


def _done_with(drawing: Drawing) -> set[ReferenceKey]:
    """What only this drawing looks at, and its next step no more: stretches of steps may share a noise level."""
    after = references_of(drawing, drawing.done + 1) if drawing.done + 1 < len(drawing.steps) else []
    return {row.key for row in references_of(drawing, drawing.done) if not row.is_shared} - {row.key for row in after}


def references_of(drawing: Drawing, done: int) -> list[ReferenceRow]:
    """The reference rows that step number `done` of a drawing looks at."""
    return [row for _, _, _, _, sees in _branches(drawing, done) for row in sees]


def _size(drawing: Drawing) -> tuple[int, int]:
    return int(drawing.latents_CHW.shape[1]), int(drawing.latents_CHW.shape[2])


def _branches(
    drawing: Drawing, done: int
) -> Iterator[tuple[int, float, Tensor, Told | None, tuple[ReferenceRow, ...]]]:
    """Number, weight, text, that text as the blocks read it, and references of each branch that counts in a step."""
    sketch = drawing.sketch
    branches = drawing.branches_at(done)
    # A model that reads earlier frames has them in its texts; one that sees them as they are makes no pass of them.
    distances = sketch.distances if drawing.pictures else ()
    levels = [sketch.policy.level(drawing.steps, done, distance) for distance in distances]
    blanks = tuple(_blank(drawing, level) for level in levels) if branches.nothing != 0.0 else ()
    seen = tuple(_earlier(drawing, index, level) for index, level in enumerate(levels))
    nothing, description = _told(drawing, _NOTHING_TOLD), _told(drawing, _DESCRIPTION_TOLD)
    for number, (weight, text, told, sees) in enumerate(
        (
            (branches.nothing, drawing.nothing_SD, nothing, blanks),
            (branches.images, drawing.nothing_SD, nothing, seen),
            (branches.everything, drawing.description_SD, description, seen),
        )
    ):
        if weight != 0.0:
            yield number, weight, text, told, sees


_NOTHING_TOLD, _DESCRIPTION_TOLD, _REFERENCES_TOLD = 0, 1, 2  # places in `Drawing.told`


def _told(drawing: Drawing, place: int) -> Told | None:
    return drawing.told[place] if drawing.told else None


def _key(drawing: Drawing, picture: str, text: str, level: int, noise: tuple[int, ...], tenant: str) -> ReferenceKey:
    wearing = tuple((one.digest, one.scale) for one in drawing.sketch.characters)
    own = () if drawing.sketch.policy.shared_noise else (drawing.sketch.seed, *noise)
    return ReferenceKey(picture, text, level, own, _size(drawing), wearing, tenant)


def _blank(drawing: Drawing, level: int) -> ReferenceRow:
    return ReferenceRow(
        _key(drawing, "", "", level, (), ""),
        drawing.blank_CHW,
        drawing.reference_noise_CHW,
        drawing.nothing_SD,
        drawing.outfit,
        _told(drawing, _NOTHING_TOLD),
    )


def _earlier(drawing: Drawing, index: int, level: int) -> ReferenceRow:
    text, count = drawing.sketch.references[index].description, len(drawing.sketch.references)
    # The noise of a picture's latents depends on its place among the references, too.
    return ReferenceRow(
        _key(drawing, drawing.pictures[index], text, level, (index, count), drawing.tenant),
        drawing.reference_latents_NCHW[index],
        drawing.reference_noise_CHW,
        drawing.reference_text_NSD[index],
        drawing.outfit,
        _told(drawing, _REFERENCES_TOLD + index),
    )


def _rows(owner: int, drawing: Drawing) -> list[_Row]:
    """The main rows of one drawing's next step."""
    # Each drawing counts its own steps, so those that compute are spread over a batch's drawings as they came.
    reuses = drawing.done % drawing.sketch.deep_every != 0
    return [
        _Row(owner, weight, drawing, text, told, sees, number, drawing.deep.get(number) if reuses else None)
        for number, weight, text, told, sees in _branches(drawing, drawing.done)
    ]


def _look(
    model: FrameModel,
    rows: Sequence[_Row],
    drawings: Sequence[Drawing],
    pages: Pages,
    cache: ReferenceCache,
    prefill_rows: int,
) -> tuple[int, int]:
    """The reference pass over what the pages do not hold; how many rows it took, and how many were there."""
    now = {seen.key: seen for row in rows for seen in row.sees}
    missing = {key: seen for key, seen in now.items() if key not in pages}
    found = len(now) - len(missing)
    cache.hits_count += found
    cache.misses_count += len(missing)
    if not missing:
        return 0, found
    room = prefill_rows if pages.count == 0 else min(prefill_rows, pages.count - len(now) + len(missing))
    batch = dict(missing)
    for seen in _ahead(drawings) if len(batch) < room else ():
        if seen.key not in pages and seen.key not in now:
            batch[seen.key] = seen
            if len(batch) >= room:
                break
    taken = sorted(batch.values(), key=lambda seen: tuple(seen.outfit))  # who wears the same stands together
    schedule = model.denoiser.schedule
    unet: Any = model.denoiser.unet  # a StoryGen: nobody else's packs have passes
    levels = [seen.key.level for seen in taken]
    noisy = schedule.add_noise(
        torch.stack([seen.clean_CHW for seen in taken]),
        torch.stack([seen.noise_CHW for seen in taken]),
        torch.tensor(levels),
    )
    inputs = {
        "latents": noisy.to(model.dtype),
        "timesteps": sent(levels, model.device),
        "text": torch.stack([seen.text_SD for seen in taken]).to(model.dtype),
        **_together([seen.told for seen in taken]),
    }

    def work(given: Inputs) -> Outputs:
        features = unet.features(given["latents"], given["timesteps"], given["text"], **_told_of(given))
        return tuple(part for seen in unet.project(features).values() for part in seen)

    parts = iter(_through(model, "features", work, inputs, [seen.outfit for seen in taken]))
    projected = dict(zip(unet.block_keys, map(KeyValue, parts, parts), strict=True))
    pages.store([seen.key for seen in taken], projected, now.keys())
    cache.computed_count += len(taken)
    return len(taken), found


def _ahead(drawings: Sequence[Drawing]) -> Iterator[ReferenceRow]:
    """What later steps will look at, the nearest first."""
    per_drawing = [[references_of(d, done) for done in range(d.done + 1, len(d.steps))] for d in drawings]
    for steps in zip_longest(*per_drawing, fillvalue=()):
        for rows in steps:
            yield from rows


def _predict(model: FrameModel, rows: Sequence[_Row], pages: Pages) -> tuple[Tensor, list[Tensor | None]]:
    """The network's answer for every row of the main pass, float32; and the deep states of those who will use them."""
    # Pictures that are seen as they are lengthen a row, so only rows that see as many share a forward.
    groups: dict[tuple[bool, int], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row.deep_CHW is not None, row.shown_count), []).append(number)
    answers: list[Tensor] = [torch.empty(0)] * len(rows)
    kept: list[Tensor | None] = [None] * len(rows)
    for _, numbers in sorted(groups.items()):
        numbers.sort(key=lambda number: tuple(rows[number].drawing.outfit))  # who wears the same stands together
        some, deep = _pass(model, [rows[number] for number in numbers], pages)
        for place, number in enumerate(numbers):
            answers[number] = some[place]
            if deep is not None and rows[number].drawing.sketch.deep_every > 1:
                kept[number] = deep[place].clone()  # a view would keep the whole batch's alive
    return torch.stack(answers), kept


def _pass(model: FrameModel, rows: Sequence[_Row], pages: Pages) -> tuple[Tensor, Tensor | None]:
    """One forward over rows that all compute their deep states, or all use earlier ones; the former's states."""
    device, dtype, unet = model.device, model.dtype, model.denoiser.unet
    if model.sees_pictures:
        blocks, numbers = _shown(rows)
    else:
        blocks, numbers = pages.blocks, [pages.slots(seen.key for seen in row.sees) for row in rows]
    inputs = {
        "latents": torch.stack([row.drawing.latents_CHW for row in rows]).to(dtype),
        "timesteps": sent([row.drawing.steps[row.drawing.done] for row in rows], device),
        "text": torch.stack([row.text_SD for row in rows]).to(dtype),
        **_looked_at(numbers, device),
        **_together([row.told for row in rows]),
    }
    earlier = [row.deep_CHW for row in rows if row.deep_CHW is not None]
    if earlier:
        inputs["deep"] = torch.stack(earlier)
    keeps = not earlier and any(row.drawing.sketch.deep_every > 1 for row in rows)

    def work(given: Inputs) -> Outputs:
        asked = (given["latents"], given["timesteps"], given["text"])
        seen = References(blocks, given["seen"], given.get("present")) if "seen" in given else None
        told = _told_of(given)
        if "deep" in given:
            return (unet.predict_shallow(*asked, given["deep"], seen, **told),)
        if keeps:
            return unet.predict_and_keep(*asked, seen, **told)
        return (unet.predict(*asked, seen, **told),)

    kind = "shallow" if earlier else "keep" if keeps else "predict"
    outfits = [row.drawing.outfit for row in rows]
    answer, *deep = _through(model, kind, work, inputs, outfits, blocks if "seen" in inputs else {})
    # A copy, because the next forward may write where this one did.
    return answer.to(torch.float32, copy=True), deep[0] if deep else None


def _through(
    model: FrameModel,
    kind: str,
    work: Work,
    inputs: Inputs,
    outfits: Sequence[Outfit],
    blocks: Mapping[str, KeyValue] = MappingProxyType({}),
) -> Outputs:
    """`work` of rows that wear what they wear, replayed where the device has it recorded. It looks into `blocks`."""
    worn = worn_by(model, outfits)
    if model.graphs is None or (worn is not None and worn.merged is not None):
        with wearing(model, worn):
            return work(inputs)
    if worn is not None:
        inputs = {**inputs, "slots": worn.slots_BM, "scales": worn.scales_BM}

    def dressed(given: Inputs) -> Outputs:
        rows = WornRows(len(given["slots"]), given["slots"], given["scales"], None) if "slots" in given else None
        with wearing(model, rows):
            return work(given)

    places = [number for seen in blocks.values() for part in seen for number in (part.data_ptr(), len(part))]
    parts = model.slots.parts if worn is not None and model.slots is not None else frozenset[str]()
    return model.graphs.run(kind, dressed, inputs, places=places, parts=parts)


_TOLD = "told."  # names of inputs: "told.key.down_blocks.0…"


def _together(told: Sequence[Told | None]) -> dict[str, Tensor]:
    """The rows' texts as the network has read them before, by input; it is the same one, so it has all or none."""
    read = [one for one in told if one is not None]
    return {
        f"{_TOLD}{part}.{name}": torch.stack([getattr(one[name], part) for one in read])
        for name in (read[0] if read else ())
        for part in KeyValue._fields
    }


def _told_of(given: Inputs) -> dict[str, Any]:
    """The argument that `_together` made inputs of."""
    key = f"{_TOLD}key."
    names = [name.removeprefix(key) for name in given if name.startswith(key)]
    if not names:
        return {}
    return {"told": {name: KeyValue(*(given[f"{_TOLD}{part}.{name}"] for part in KeyValue._fields)) for name in names}}


def _shown(rows: Sequence[_Row]) -> tuple[Mapping[str, KeyValue], list[list[int]]]:
    """What the pictures of the rows' drawings left, each drawing's once, and the numbers of those a row sees."""
    first: dict[int, int] = {}
    parts: list[Mapping[str, KeyValue]] = []
    numbers, count = [], 0
    for row in rows:
        if row.shown_count and row.owner not in first:
            first[row.owner] = count
            parts.append(row.drawing.shown)
            count += row.shown_count
        numbers.append([first[row.owner] + number for number in range(row.shown_count)])
    blocks = {
        name: KeyValue(*map(torch.cat, zip(*(part[name] for part in parts), strict=True)))
        for name in (parts[0] if parts else ())
    }
    return blocks, numbers


def _looked_at(numbers: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """What rows look at, filled up to the longest, by input; nothing where nobody looks at anything.

    A row is filled up with what it sees itself: the mask keeps its weight from being counted, but a number of somebody
    else's that is not finite would spoil the row all the same.
    """
    slots = max(map(len, numbers))
    if not slots:
        return {}
    anything = next(row[0] for row in numbers if row)
    filled = [[*row, *[row[0] if row else anything] * (slots - len(row))] for row in numbers]
    seen = {"seen": sent(filled, device)}
    present = [[slot < len(row) for slot in range(slots)] for row in numbers]
    if all(all(slots_of_row) for slots_of_row in present):
        return seen  # a mask costs the attention kernel its fast path
    return {**seen, "present": sent(present, device)}


def _sample(model: FrameModel, drawing: Drawing, output_CHW: Tensor) -> tuple[Tensor, History]:
    latents = drawing.latents_CHW
    schedule = model.denoiser.schedule.at(latents.shape[1] * latents.shape[2])
    t = drawing.steps[drawing.done]
    t_next = schedule.step_after(t, drawing.sketch.steps)

    def fresh() -> Tensor:
        # Of the step, not of a stream: a step that is taken again gets the same noise again.
        return Randomness(drawing.sketch.seed, drawing.done).normal(*latents.shape)

    return sampler_of(model, drawing.sketch)(schedule, output_CHW, latents, t, t_next, drawing.history, fresh)


def _combine(rows: Sequence[_Row], answers_BCHW: Tensor, drawing_count: int) -> list[Tensor]:
    """Guidance: each drawing's weighted sum of its branches."""
    combined = [torch.zeros_like(answers_BCHW[0]) for _ in range(drawing_count)]
    for row, answer in zip(rows, answers_BCHW, strict=True):
        combined[row.owner] = combined[row.owner] + row.weight * answer
    return combined
