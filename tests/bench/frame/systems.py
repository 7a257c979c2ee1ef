"""What is compared: five ways to draw the same requests with the same weights, each with a network of its own.

* published   one request at a time, as a pipeline behind a Ray Serve replica does, with StoryGen's published schedule:
              3 (n + 1) rows a step, the earlier frames one after the other (n of them)
* split       requests of the same character together, from start to end, as `@serve.batch` with multiplexed models
              does; the published schedule; adapters beside the weights (PEFT) or merged into a copy of them
* split_ours  the same with our rows: no row twice, the blank's as a table (adapters merged)
* peft        our rows, all characters in one forward by PEFT's `adapter_names`
* ours        the engine: its scheduler, its slots, its cache

A baseline gets what costs it nothing: its merged copies are ready, and its reference passes end early as ours do.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

from services.models.denoiser import StoryDenoiser
from services.models.drawing import Drawing, Pixels, Start, begin_together, finish
from services.models.graphs import Graphs
from services.models.lora import ALPHA, MERGED_BYTES, AdapterSlots, Outfit, Worn, read_adapter
from services.models.references import ReferenceCache
from services.models.registry import FrameModel
from services.models.step import advance
from services.models.storygen import KeyValue, References
from tests.bench.frame.workload import Request

RANK = 8
TARGETS = r".*attentions.*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out)"
TOGETHER = 8  # requests in one batch, of every system
CACHE_BYTES = 1 << 30  # of what passes left: sixteen characters have a table of the blank's rows each


@dataclass
class Done:
    """What a system made of some requests."""

    pictures: dict[int, Pixels] = field(default_factory=dict)
    rows: int = 0


class Adapters:
    """`count` random adapters, as PEFT holds them and as files."""

    def __init__(self, model: FrameModel, count: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.peft: Any = None
            for number in range(count):
                config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
                if self.peft is None:
                    self.peft = peft.get_peft_model(copy.deepcopy(model.denoiser.unet), config, adapter_name="a0")
                else:
                    self.peft.add_adapter(f"a{number}", config)
            for name, value in self.peft.named_parameters():
                if "lora_B" in name:
                    value.data *= 0.02  # as small as a trained one's
        self.peft.eval()
        self.peft.requires_grad_(False)
        self.count = count

    def file(self, number: int) -> bytes:
        """An adapter as the engine reads it."""
        state = get_peft_model_state_dict(self.peft, adapter_name=f"a{number}")
        return save({k: v.contiguous() for k, v in state.items()}, {ALPHA: str(RANK)})

    def merged(self, number: int) -> Any:
        """A copy of the network with one adapter in its weights."""
        whole = copy.deepcopy(self.peft)
        whole.set_adapter(f"a{number}")
        unet = whole.merge_and_unload(adapter_names=[f"a{number}"])
        unet.requires_grad_(False)
        return unet


def with_unet(model: FrameModel, unet: Any, slots: Any = None) -> FrameModel:
    """The same pack around another network."""
    return replace(model, denoiser=StoryDenoiser(unet, model.denoiser.schedule), slots=slots)


@torch.inference_mode()
def published_step(model: FrameModel, drawings: Sequence[Drawing]) -> int:
    """A step of equal drawings as published: three rows for everything, a pass per earlier frame. Its rows."""
    unet, schedule, count = model.denoiser.unet, model.denoiser.schedule, len(drawings)
    t = drawings[0].steps[drawings[0].done]
    passes: list[dict[str, KeyValue]] = []
    references = len(drawings[0].sketch.references)
    for index in range(references):
        level = drawings[0].sketch.policy.level(drawings[0].steps, drawings[0].done, references - index)
        noise = torch.stack([d.reference_noise_CHW for d in drawings])
        blank, seen = (
            schedule.add_noise(clean, noise, torch.full((count,), level))
            for clean in (
                torch.stack([d.blank_CHW for d in drawings]),
                torch.stack([d.reference_latents_NCHW[index] for d in drawings]),
            )
        )
        told = torch.stack([d.reference_text_NSD[index] for d in drawings])
        texts = torch.cat([torch.stack([d.nothing_SD for d in drawings]), told, told])
        latents = torch.cat([blank, seen, seen])
        passes.append(unet.project(unet.features(latents, torch.full((3 * count,), level), texts)))
    together = {
        name: KeyValue(*(torch.cat([one[name][part] for one in passes]) for part in range(2))) for name in passes[0]
    }
    looks = torch.arange(3 * count)[:, None] + 3 * count * torch.arange(references)[None]
    nothing = torch.stack([d.nothing_SD for d in drawings])
    texts = torch.cat([nothing, nothing, torch.stack([d.description_SD for d in drawings])])
    latents = torch.stack([d.latents_CHW for d in drawings]).repeat(3, 1, 1, 1)
    answers = unet.predict(latents, torch.full((3 * count,), t), texts, References(together, looks)).float()
    for number, drawing in enumerate(drawings):
        weights = drawing.guided
        answer: Tensor = (
            weights.nothing * answers[number]
            + weights.images * answers[count + number]
            + weights.everything * answers[2 * count + number]
        )
        t_next = schedule.step_after(t, len(drawing.steps))
        drawing.latents_CHW, drawing.history = model.sampler(
            schedule, answer, drawing.latents_CHW, t, t_next, drawing.history, lambda: torch.zeros(())
        )
        drawing.done += 1
    return 3 * count * (references + 1)


class Published:
    """One request at a time."""

    name = "published"

    def __init__(self, model: FrameModel) -> None:
        self.model = model

    def batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """What is drawn together."""
        for request in requests:
            yield [request]

    def draw(self, batch: Sequence[Request], done: Done) -> None:
        """A batch from start to end."""
        self._draw(self.model, batch, done)

    def run(self, requests: Sequence[Request]) -> Done:
        """All of them, one batch after the other."""
        done = Done()
        for batch in self.batches(requests):
            self.draw(batch, done)
        return done

    @staticmethod
    def _draw(model: FrameModel, batch: Sequence[Request], done: Done) -> None:
        drawings = begin_together(model, [Start(sketch=request.sketch) for request in batch])
        while not drawings[0].finished:
            done.rows += published_step(model, drawings)
        for request, picture in zip(batch, finish(model, drawings), strict=True):
            done.pictures[request.number] = picture


class Split(Published):
    """Requests of the same character, and of as many steps, together."""

    def __init__(self, model: FrameModel, adapters: Adapters, *, merged: bool) -> None:
        super().__init__(model)
        self.name = "split_merged" if merged else "split_unmerged"
        self.adapters = adapters
        self.models = {n: with_unet(model, adapters.merged(n)) for n in range(adapters.count)} if merged else None
        self.shared = with_unet(model, adapters.peft.base_model.model)

    def batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Of the same character and length, in order of arrival."""
        groups: defaultdict[tuple[int | None, int], list[Request]] = defaultdict(list)
        for request in requests:
            groups[request.adapter, request.sketch.steps].append(request)
        for group in groups.values():
            for first in range(0, len(group), TOGETHER):
                yield group[first : first + TOGETHER]

    def draw(self, batch: Sequence[Request], done: Done) -> None:
        """A batch from start to end, with its character's weights."""
        self._draw(self._model(batch[0].adapter), batch, done)

    def _model(self, adapter: int | None) -> FrameModel:
        assert adapter is not None
        if self.models is not None:
            return self.models[adapter]
        self.adapters.peft.base_model.set_adapter(f"a{adapter}")
        return self.shared


class SplitOurs(Split):
    """The same batches with our rows."""

    def __init__(self, model: FrameModel, adapters: Adapters) -> None:
        super().__init__(model, adapters, merged=True)
        self.name = "split_ours"
        self.caches: defaultdict[int | None, ReferenceCache] = defaultdict(lambda: ReferenceCache(64 << 20))

    def draw(self, batch: Sequence[Request], done: Done) -> None:
        """A batch from start to end."""
        model = self._model(batch[0].adapter)
        cache = self.caches[batch[0].adapter]
        drawings = begin_together(model, [Start(sketch=request.sketch, tenant=_stranger()) for request in batch])
        while not drawings[0].finished:
            done.rows += advance(model, drawings, cache).total
        for request, picture in zip(batch, finish(model, drawings), strict=True):
            done.pictures[request.number] = picture


class PeftNames:
    """PEFT's mixed batch behind the interface of our slots."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters

    def prepared(self, outfits: Sequence[Outfit]) -> list[str]:
        """Every row's name."""
        return [f"a{outfit[0].slot - 1}" if outfit else "__base__" for outfit in outfits]

    @contextmanager
    def worn(self, names: list[str]) -> Iterator[None]:
        """Every row by name."""
        with self.adapters.peft.base_model._enable_peft_forward_hooks(adapter_names=names):
            yield

    @contextmanager
    def rows(self, outfits: Sequence[Outfit]) -> Iterator[None]:
        """Both at once."""
        with self.worn(self.prepared(outfits)):
            yield


class Ours:
    """The engine's step, over everybody who is there."""

    def __init__(
        self,
        model: FrameModel,
        adapters: Adapters,
        name: str = "ours",
        *,
        strict: bool = False,
        merges: bool = True,
        prefill_rows: int = 24,
        together: int = TOGETHER,
        graphs: Graphs | None = None,
    ) -> None:
        """`merges`: rows go through weights with what they wear merged in, as the engine does on a processor."""
        self.name, self.strict, self.prefill_rows, self.together = name, strict, prefill_rows, together
        if name.startswith("peft"):
            self.model = with_unet(model, adapters.peft.base_model.model, PeftNames(adapters))
        else:
            unet = copy.deepcopy(model.denoiser.unet)
            budget_bytes = MERGED_BYTES if merges else 0
            slots = AdapterSlots(unet, count=adapters.count, rank_max=RANK, merged_bytes=budget_bytes)
            for number in range(adapters.count):
                slots.put(number + 1, read_adapter(adapters.file(number), unet))
            self.model = replace(with_unet(model, unet, slots), graphs=graphs)
        self.cache = ReferenceCache(CACHE_BYTES)

    def begin(self, *batch: Request) -> list[Drawing]:
        """Requests' drawings. Every request is a tenant's of its own: only what is everybody's is found."""
        starts = []
        for request in batch:
            outfit = () if request.adapter is None else (Worn(request.adapter + 1, 1.0),)
            worn = () if request.adapter is None else (_weights(request.adapter),)
            sketch = replace(request.sketch, characters=worn)
            starts.append(Start(sketch=sketch, outfit=outfit, tenant=_stranger()))
        return begin_together(self.model, starts)

    def step(self, drawings: Sequence[Drawing]) -> int:
        """One step of everybody; its rows."""
        if self.strict:
            return sum(advance(self.model, [drawing], self.cache).total for drawing in drawings)
        return advance(self.model, drawings, self.cache, prefill_rows=self.prefill_rows).total

    def run(self, requests: Sequence[Request]) -> Done:
        """All of them: whoever is done makes room for the next."""
        done, waiting = Done(), list(requests)
        running: list[tuple[Request, Drawing]] = []
        while waiting or running:
            room = self.together - len(running)
            coming, waiting = waiting[:room], waiting[room:]
            if coming:
                running += zip(coming, self.begin(*coming), strict=True)
            done.rows += self.step([drawing for _, drawing in running])
            ended = [one for one in running if one[1].finished]
            pictures = finish(self.model, [drawing for _, drawing in ended])
            for (request, _), picture in zip(ended, pictures, strict=True):
                done.pictures[request.number] = picture
            running = [one for one in running if not one[1].finished]
        return done


_strangers = itertools.count()


def _stranger() -> str:
    """A tenant that nobody was before: the same request in the next round must not find what this one left."""
    return f"tenant {next(_strangers)}"


def _weights(adapter: int) -> Any:
    from services.models.character import CharacterWeights

    return CharacterWeights(f"{adapter:064x}", 1.0)
