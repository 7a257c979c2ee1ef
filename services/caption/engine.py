"""The caption engine: from pictures and captions to a new caption or a description, in words.

    written = await engine.write_caption(StoryJob(image=png, captions=("Momo found a kite.",)))

It checks what it is given, builds the prompt, asks vLLM through a `Driver` with the right adapter, and hands back clean
text: never empty, one line, no special tokens. Requests that are in flight together are decoded together. Every request
has a seed of its own, so the same request alone gives the same text. Knows no transport: it runs in a notebook.

Guards look at what was written (`Guards`): the name lock at a description's names, also of learned characters, the
repetition guard at a caption's likeness to the ones before, the thread guard at how long a story goes without its
hero and at who is there twice, the invention guard at names that are nobody's. A fault is answered by second choices,
of which the best is taken, and by a repair where there is one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog
from PIL import Image

from services.caption.driver import Ask, Driver
from services.caption.image import read_image
from services.caption.job import TOKENS_MAX, DescribeJob, Finish, Sampling, StoryJob, Written
from services.caption.learned import check_learned, completed, told
from services.models.captions import companions, invention, llava, prompts, repetition, thread
from services.models.captions import looks as look_lock
from services.models.captions import places as place_lock
from services.models.captions.captioner import read_adapters, read_captioner
from services.models.captions.cast import Cast, name_tokens
from services.models.captions.wording import StoryWording, Wording
from services.models.errors import PackManifestInvalid
from services.models.eyes import Eyes, load_eyes, new_looks
from services.models.likeness import whole_word
from services.models.pack import CaptionerManifest, SealedPack
from services.models.tokenizer import SPECIAL_TOKENS, StoryTokenizer
from services.models.world import World
from services.runtime.errors import CaptionEmpty, CaptionNotWritten, CaptionTooLong, FabulaError, PackUnknown, QueueFull

log = structlog.get_logger("fabula.caption")

CAPTION_CHARACTERS_MAX = 2000  # of one caption that comes in
CAPTIONS_MAX = 1000  # captions so far; the prompt's window keeps what fits
TEXT_CHARACTERS_MAX = 1000  # of a text that goes out
STORY, DESCRIPTIVE = llava.ADAPTERS
# The world's longest caption has 45 tokens, its longest description 79, and a frame's text encoder reads 94.
DEFAULT_TOKENS = {STORY: 64, DESCRIPTIVE: 90}
NAME_LOCK_TRIES = 7  # more descriptions to choose from when the first leaves somebody out or names one twice
CAPTION_TRIES = 4  # more captions to choose from when the first repeats itself or loses the story's hero
RETRY_TEMPERATURE = 0.7  # at least this for another try: a greedy try would only repeat itself

_UNSEEN_PX = 32  # a picture that only needs to be one

_SENTENCE_END = re.compile(r"[.!?…。！？؟]+[\"'”’»)]*(?=\s|$)")
_EXAMPLE = "Once upon a time there was a small bear who found a red kite."


@dataclass(frozen=True, kw_only=True)
class Guards:
    """Which guards are on. Off is for measuring what a guard is worth."""

    name_lock: bool = True  # costs up to NAME_LOCK_TRIES more descriptions where names are wrong
    look_lock: bool = True  # costs nothing more: looks are mended, and better tries than the first share the above
    place_lock: bool = True  # costs up to NAME_LOCK_TRIES where the place is wrong; never more for all of them
    repetition: bool = True  # costs up to CAPTION_TRIES more captions where something is said again
    thread: bool = True  # costs as many where the hero has long been out of sight
    # Costs as many where somebody is named nobody knows; never more for all three. Of descriptions nothing: mended.
    invention: bool = True


@dataclass(frozen=True, kw_only=True)
class CaptionModel:
    """What the engine needs to know of a pack's captioner; its weights are the driver's business."""

    pack_name: str
    pack_digest: str
    architecture: str
    wording: Wording
    image_px: int  # side of the square that pictures are squeezed to; 0: it sees none
    image_tokens_count: int  # that a picture takes in a prompt; 1 where no token stands for it
    context_tokens: int
    whole_pictures: bool = False  # pictures keep their shape, and `image_px` is the longest side
    adapters: frozenset[str] = frozenset(llava.ADAPTERS)  # questions that have one; others are put to the base
    also_called: tuple[str, ...] = ()  # more names that requests may give as their pack's
    cast: Cast = field(default_factory=Cast)
    world: World = field(default_factory=World)
    eyes: Eyes | None = None


def read_model(pack: SealedPack, context_tokens_max: int = 1 << 20) -> CaptionModel:
    """What a checked pack's captioner is: its own LLaVA, or one that others published.

    Raises PackFileMissing when the pack has none, PackManifestInvalid for a published one that contradicts itself or
    has no room for a question, and ValueError when a `cast.json`, `world.json` or eyes are malformed.
    """
    if isinstance(pack.manifest, CaptionerManifest):
        return _read_published(pack, pack.manifest, context_tokens_max)
    config = json.loads(pack.path("llava/config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"]
    return CaptionModel(
        pack_name=pack.name,
        pack_digest=pack.digest,
        architecture="llava",
        wording=StoryWording(StoryTokenizer.load(pack.path("tokenizer/tokenizer.json"))),
        image_px=vision["image_size"],
        image_tokens_count=(vision["image_size"] // vision["patch_size"]) ** 2,
        context_tokens=min(config["text_config"]["max_position_embeddings"], context_tokens_max),
        cast=Cast.load(pack.folder),
        world=World.load(pack.folder),
        eyes=load_eyes(pack.folder),
    )


def _read_published(pack: SealedPack, manifest: CaptionerManifest, context_tokens_max: int) -> CaptionModel:
    asked = manifest.captioner
    published = read_captioner(pack)
    model = CaptionModel(
        pack_name=pack.name,
        pack_digest=pack.digest,
        architecture=manifest.architecture,
        wording=published.wording,
        image_px=asked.image_px,
        image_tokens_count=published.image_tokens_count,
        context_tokens=min(asked.context_tokens, context_tokens_max),
        whole_pictures=asked.whole_pictures,
        adapters=frozenset(asked.adapters),
    )
    budget = model.context_tokens - (model.image_tokens_count - 1) - TOKENS_MAX
    longest = "0 1 2 3 4 5 6 7 8 9 " * prompts.CAPTION_TOKENS_MAX
    try:
        model.wording.story_prompt([longest], budget)
        model.wording.description_prompt(longest, longest, budget)
    except ValueError as error:
        raise PackManifestInvalid(
            f"pack {pack.name!r} has {model.context_tokens} tokens of context, too few for a question: {error}"
        ) from None
    return model


def adapter_folders(pack: SealedPack) -> dict[str, Path]:
    """The pack's adapters by name. Raises PackFileMissing when one is not there."""
    if isinstance(pack.manifest, CaptionerManifest):
        return read_adapters(pack, pack.manifest)
    return {name: pack.path(f"adapters/{name}/{llava.ADAPTER_CONFIG_FILE}").parent for name in llava.ADAPTERS}


def adapter_rank_max(folders: Sequence[Path]) -> int:
    """The largest LoRA rank among PEFT folders; 0 without any."""
    configs = (json.loads((folder / llava.ADAPTER_CONFIG_FILE).read_text(encoding="utf-8")) for folder in folders)
    return max((int(config["r"]) for config in configs), default=0)


Rule = Callable[[str], int]  # how many faults a guard finds in a text
Writer = Callable[[Sampling, int], Awaitable[Written]]  # gives the try of a number


class Observer(Protocol):
    """Who wants to know what the engine does; `services.caption.metrics` is one."""

    def load_changed(self, *, running: int) -> None:
        """How many requests are in the engine now."""

    def text_done(self, *, adapter: str, outcome: str, tokens: int, seconds: float) -> None:
        """A request has ended. `outcome` is `written` or an error's reason in lower case."""

    def text_guarded(self, *, guard: str, outcome: str) -> None:
        """A guard found a fault in the first try.

        It is `name_lock`, `look_lock`, `place_lock`, `repetition`, `thread` or `invention`.

        `outcome` is `second_choice` (another try has none), `repaired`, or `kept_faulty`.
        """


class _Nobody:
    def load_changed(self, *, running: int) -> None: ...
    def text_done(self, *, adapter: str, outcome: str, tokens: int, seconds: float) -> None: ...
    def text_guarded(self, *, guard: str, outcome: str) -> None: ...


class CaptionEngine:
    """Writes texts. `start` it before use and `stop` it after."""

    def __init__(
        self,
        model: CaptionModel,
        driver: Driver,
        *,
        max_requests: int = 80,
        max_attempts: int = 3,
        guards: Guards | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_requests` counts those being decoded and those that wait; one more is refused with QueueFull.

        All `guards` are on unless told otherwise.
        """
        self.model = model
        self._driver = driver
        self._max_requests = max_requests
        self._max_attempts = max_attempts
        self._guards = guards or Guards()
        self._observer = observer or _Nobody()
        self._clock = clock
        self._running = 0
        self._choosing = 0  # places that second choices will take or have taken

    async def start(self, *, warm_up: bool = True) -> None:
        """Load the model, then write an example caption and description. Raises RuntimeError when it cannot."""
        await self._driver.start()
        if warm_up:
            side_px = self.model.image_px
            picture = Image.new("RGB", (side_px, side_px), (150, 190, 220)) if side_px else None
            wording, budget = self.model.wording, self._budget(0, STORY)
            asks = {
                STORY: wording.story_prompt([_EXAMPLE], budget),
                DESCRIPTIVE: wording.description_prompt(_EXAMPLE, _EXAMPLE, budget),
            }
            sampling = Sampling(max_tokens=16)
            await asyncio.gather(
                *(self._driver.generate(self._ask(prompt, picture, name, sampling, 0)) for name, prompt in asks.items())
            )

    async def stop(self) -> None:
        """Release the model; requests in flight end with ShuttingDown."""
        await self._driver.stop()

    def check_health(self) -> None:
        """Raises EngineDead once the engine has died or hangs; it does not come back by itself."""
        self._driver.check_health()

    @property
    def unfinished_count(self) -> int:
        """Requests inside vLLM now."""
        return self._driver.unfinished_count

    async def write_caption(self, job: StoryJob) -> Written:
        """The caption after the last of `job.captions`.

        None that repeats the story, loses its hero or makes up somebody's name, where a try is none of these. Those of
        `job.learned` belong to the story, whether or not a caption has named them.

        Raises PackUnknown, CaptionEmpty, CaptionTooLong, ImageMissing, ImageTooLarge, ImageUnreadable, ValueOutOfRange
        for a learned character that is none, QueueFull, CaptionNotWritten, ReplicaLost, EngineDead or ShuttingDown.
        """
        self._check_pack(job.pack)
        if not job.captions:
            raise CaptionEmpty("at least one caption is needed: that of the picture", field="captions")
        if len(job.captions) > CAPTIONS_MAX:
            raise CaptionTooLong(f"{len(job.captions)} captions are more than {CAPTIONS_MAX}", field="captions")
        for number, caption in enumerate(job.captions):
            check_caption(caption, f"captions[{number}]")
        check_learned(job.learned)
        names = tuple(one.name for one in job.learned)
        cast = Cast((*self.model.cast.names, *thread.people(names, job.captions, self.model.world)))
        budget = self._budget(job.sampling.max_tokens, STORY)
        prompt = self.model.wording.story_prompt(job.captions, budget)

        openings: tuple[str, ...] = ()

        async def write(sampling: Sampling, number: int) -> Written:
            nonlocal openings
            last = number - 1 - CAPTION_TRIES + len(openings)  # of the tries, as many as there are openings
            begun = openings[last] if last >= 0 and openings else ""
            written = await self._write(prompt, job.image, STORY, sampling, begun=begun)
            if number == 0 and self._guards.thread:
                room_tokens = (job.sampling.max_tokens or DEFAULT_TOKENS[STORY]) // 2
                openings = tuple(
                    opening
                    for opening in thread.openings(written.text, job.captions, cast, self.model.world)
                    if len(self.model.wording.encode(opening)) <= room_tokens
                )
            return written

        rules: dict[str, Rule] = {}
        if self._guards.repetition:
            rules["repetition"] = lambda text: repetition.faults(text, job.captions)
        if self._guards.thread:
            rules["thread"] = lambda text: thread.faults(text, job.captions, cast)
        if self._guards.invention:
            rules["invention"] = lambda text: invention.faults(text, job.captions, self.model.world, names)

        def repair(text: str) -> str:
            if self._guards.invention:
                text = invention.repaired(text, job.captions, self.model.world, names)
            lost = thread.loses_thread(text, job.captions, cast)
            return thread.with_hero(text, job.captions, cast) if lost and self._guards.thread else text

        return await self._guarded(rules, CAPTION_TRIES, job.sampling, write, repair)

    async def describe(self, job: DescribeJob) -> Written:
        """The description of `job.caption`; of the pack's cast it names only whom the story's captions mention.

        Whoever of `job.learned` is in the caption is in its description. Somebody whom the pack does not know keeps
        the looks of the first earlier description that tells them; while none does, those that the pack's eyes read off
        the picture.

        Raises the same errors as `write_caption`.
        """
        self._check_pack(job.pack)
        check_caption(job.previous_caption, "previous_caption")
        check_caption(job.caption, "caption")
        budget = self._budget(job.sampling.max_tokens, DESCRIPTIVE)
        for name, texts in (
            ("earlier_captions", job.earlier_captions),
            ("earlier_descriptions", job.earlier_descriptions),
        ):
            if len(texts) > CAPTIONS_MAX:
                raise CaptionTooLong(f"{len(texts)} texts are more than {CAPTIONS_MAX}", field=name)
            for number, text in enumerate(texts):
                check_caption(text, f"{name}[{number}]")
        check_learned(job.learned)
        cast, wording, places = self.model.cast, self.model.wording, self.model.world.places
        captions = cast.context(job.earlier_captions, job.previous_caption, job.caption)
        said = (*job.earlier_captions, job.previous_caption, job.caption)
        # First those that were learned: of two looks of the same name the first one counts.
        looks_told = prompts.told_looks((*told(job.learned), *job.earlier_descriptions))
        known = {**looks_told, **self.model.world.characters}
        self._refuse_if_full()  # before the work of looking
        looks = {**await self._seen_looks(job, known), **known}
        lines = prompts.cast_lines(looks, said)
        prompt = wording.description_prompt(job.previous_caption, job.caption, budget, lines)
        locked = self._guards.name_lock
        forbidden = name_tokens(wording, cast.strangers(captions), captions) if locked else ()
        room_tokens = min(job.sampling.max_tokens or DEFAULT_TOKENS[DESCRIPTIVE], DEFAULT_TOKENS[DESCRIPTIVE])

        at = place_lock.where(job.caption, places, await self._seen_place(job)) if self._guards.place_lock else None
        met = [one.name for one in job.learned if any(whole_word(one.name).search(caption) for caption in said)]

        opening = ""

        async def write(sampling: Sampling, number: int) -> Written:
            nonlocal opening
            written = await self._write(prompt, job.image, DESCRIPTIVE, sampling, forbidden, begun=opening)
            if number == 0 and at is not None and place_lock.faults(written.text, at, places):
                opening = at.opening  # begun there, the rest goes with it: whether the light is a sun or a window
            # At once, and not only where no other try has fewer faults: who is misnamed is there, and a try without
            # them would be chosen for saying less.
            mends = {"invention": named, "look_lock": dressed}
            for guard, mend in mends.items():
                text = mend(written.text)
                if text == written.text or (not fits(text) and fits(written.text)):
                    continue
                written = replace(written, text=text)
                if number == 0:
                    self._observer.text_guarded(guard=guard, outcome="repaired")
            return written

        def named(text: str) -> str:
            mended = invention.repaired(text, said, self.model.world, met) if self._guards.invention else text
            return look_lock.repaired(mended, looks) if mended != text and self._guards.look_lock else mended

        def dressed(text: str) -> str:
            eyes = self.model.eyes  # they know the words of looks
            if eyes is None or not self._guards.look_lock:
                return text
            return companions.repaired(text, job.caption, job.earlier_descriptions, eyes.shape)

        def fits(text: str) -> bool:
            return len(text) <= TEXT_CHARACTERS_MAX and len(wording.encode(text)) <= room_tokens

        def repair(text: str) -> str:
            text = cast.repaired(text, *captions, fits, looks) if locked else text
            mended = look_lock.repaired(text, looks) if self._guards.look_lock else text
            mended = place_lock.repaired(mended, at, places) if self._guards.place_lock else mended
            both = dressed(mended)  # only now somebody may look like who was there
            for best in (both, mended):  # who has no room beside the other is left out, and the rest stays mended
                if fits(best) or not fits(text):
                    return best
            return text

        rules: dict[str, Rule] = {"name_lock": lambda text: cast.faults(text, *captions)} if locked else {}
        if self._guards.look_lock:
            rules["look_lock"] = lambda text: look_lock.faults(text, looks)
        if self._guards.place_lock:
            rules["place_lock"] = lambda text: place_lock.faults(text, at, places)
        written = await self._guarded(rules, NAME_LOCK_TRIES, job.sampling, write, repair)
        if not locked:
            return written
        earlier = (*job.earlier_captions, job.previous_caption)
        return replace(written, text=completed(written.text, job.caption, earlier, job.learned, fits))

    async def _seen_looks(self, job: DescribeJob, known: Mapping[str, str]) -> dict[str, str]:
        """What the picture shows of somebody whom its caption names and of whom nobody has said what they look like.

        Nothing when the pack has no eyes, or when it is not clear which figure is meant.
        """
        eyes = self.model.eyes
        if eyes is None:
            return {}

        def look() -> dict[str, str]:
            names, others = self.model.world.whom((*job.earlier_captions, job.previous_caption), known)
            if not names:
                return {}
            picture = read_image(job.image, eyes.shape.image_px)
            return new_looks(names, others, eyes.figures(np.asarray(picture)), eyes.phrase)

        return await asyncio.to_thread(look)

    async def _seen_place(self, job: DescribeJob) -> place_lock.At | None:
        """Where the picture is, for a caption that speaks of no place; None when the pack's eyes do not know."""
        eyes, world = self.model.eyes, self.model.world
        if eyes is None or place_lock.is_told(job.caption, world.places):
            return None

        def look() -> place_lock.At | None:
            word = eyes.place(np.asarray(read_image(job.image, eyes.shape.image_px)))
            place = next((one for one in world.places if one.split()[-1] == word), None)
            return None if place is None else place_lock.At(world.there.get(place, "in"), place)

        return await asyncio.to_thread(look)

    async def _guarded(
        self,
        rules: Mapping[str, Rule],
        tries: int,
        sampling: Sampling,
        write: Writer,
        repair: Callable[[str], str],
    ) -> Written:
        """What `write` gives as number 0; if that has faults, the best of `tries` more; if all have some, repaired."""

        def faults(text: str) -> int:
            return sum(rule(text) for rule in rules.values())

        first = await write(sampling, 0)
        first_faults = await asyncio.to_thread(faults, first.text)
        if first_faults == 0:
            return first
        guard = next(name for name, rule in rules.items() if rule(first.text) > 0)
        # Nobody is refused for a second choice's sake, so those being made count as if they all ran already.
        crowded = self._running + self._choosing + tries > self._max_requests
        others = [] if crowded else await self._second_choices(tries, sampling, write)
        counts = [first_faults, *(await asyncio.gather(*(asyncio.to_thread(faults, other.text) for other in others)))]
        # min() keeps the earliest of equals, so the same request gives the same text.
        best_faults, number = min(zip(counts, range(len(counts)), strict=True))
        text, outcome = (first, *others)[number].text, "second_choice"
        if best_faults > 0:
            text = repair(text)
            outcome = "kept_faulty" if await asyncio.to_thread(faults, text) > 0 else "repaired"
        self._observer.text_guarded(guard=guard, outcome=outcome)
        return replace(
            (first, *others)[number],
            text=text,
            completion_tokens=first.completion_tokens + sum(other.completion_tokens for other in others),
            duration_s=first.duration_s + max((other.duration_s for other in others), default=0.0),
        )

    async def _second_choices(self, count: int, sampling: Sampling, write: Writer) -> list[Written]:
        """More texts for the same request, numbers 1 to `count`, decoded together; fewer when some fail."""
        warmer = replace(sampling, temperature=max(sampling.temperature, RETRY_TEMPERATURE))
        self._choosing += count
        try:
            answers = await asyncio.gather(
                *(write(replace(warmer, seed=derived_seed(warmer.seed, n)), n) for n in range(1, 1 + count)),
                return_exceptions=True,  # a try that fails is no reason to lose the text that is there
            )
        finally:
            self._choosing -= count
        if failed := [type(answer).__name__ for answer in answers if isinstance(answer, BaseException)]:
            log.info("second_choices_failed", errors=failed)
        return [answer for answer in answers if isinstance(answer, Written)]

    async def _write(
        self,
        prompt: prompts.Prompt,
        image: bytes,
        adapter: str,
        sampling: Sampling,
        forbidden_ids: tuple[int, ...] = (),
        begun: str = "",
    ) -> Written:
        """What the model answers, with `begun` as the answer's first words."""
        self._refuse_if_full()
        started_s, tokens, outcome = self._clock(), 0, "cancelled"
        self._count(1)
        try:
            picture = await asyncio.to_thread(self._see, image)
            for attempt in range(self._max_attempts):
                ask = self._ask(prompt, picture, adapter, sampling, attempt, begun)
                reply = await self._driver.generate(replace(ask, forbidden_ids=forbidden_ids))
                tokens += len(reply.ids)
                text = readable(self._continued(begun, reply.ids))
                if reply.finish is Finish.LENGTH:
                    text = whole_sentences(text)
                if text:
                    outcome = "written"
                    return Written(
                        text=text,
                        finish=reply.finish,
                        prompt_tokens=reply.prompt_tokens,
                        completion_tokens=tokens,
                        duration_s=self._clock() - started_s,
                        pack_digest=self.model.pack_digest,
                    )
                log.info("empty_text", adapter=adapter, attempt=attempt)
            raise CaptionNotWritten(f"the model wrote nothing in {self._max_attempts} tries")
        except FabulaError as error:
            outcome = error.reason.lower()
            raise
        finally:
            self._count(-1)
            seconds = self._clock() - started_s
            self._observer.text_done(adapter=adapter, outcome=outcome, tokens=tokens, seconds=seconds)

    def _continued(self, begun: str, ids: Sequence[int]) -> str:
        """`begun` and what was written after it; nothing when that is nothing."""
        decode = self.model.wording.decode
        if not begun or not decode(ids).strip():
            return decode(ids)
        # Decoded together: alone, a continuation would lose the space it begins with in most tokenizers.
        opening = self.model.wording.encode(begun)
        return begun + decode((*opening, *ids))[len(decode(opening)) :]

    def _refuse_if_full(self) -> None:
        if self._running >= self._max_requests:
            raise QueueFull(f"{self._running} captions are being written; try again after a pause")

    def _see(self, image: bytes) -> Image.Image | None:
        """The picture as the model gets it. Checked for one that sees none too: a request is good or bad for all."""
        picture = read_image(image, self.model.image_px or _UNSEEN_PX, whole=self.model.whole_pictures)
        return picture if self.model.image_px else None

    def _ask(
        self,
        prompt: prompts.Prompt,
        picture: Image.Image | None,
        adapter: str,
        sampling: Sampling,
        attempt: int,
        begun: str = "",
    ) -> Ask:
        again = attempt > 0
        begun_ids = self.model.wording.encode(begun) if begun else []
        tokens = sampling.max_tokens or DEFAULT_TOKENS[adapter]
        return Ask(
            ids=(*prompt.ids, *begun_ids),
            image=picture,
            adapter=adapter if adapter in self.model.adapters else None,
            temperature=max(sampling.temperature, RETRY_TEMPERATURE) if again else sampling.temperature,
            top_p=sampling.top_p,
            seed=derived_seed(sampling.seed, attempt),
            # What is begun counts as answered: prompt and answer fit the context together.
            max_tokens=tokens - len(begun_ids),
            stop_ids=self.model.wording.stop_ids,
        )

    def _budget(self, max_tokens: int, adapter: str) -> int:
        """Prompt tokens, the image counted as one, that leave room for the picture and the answer."""
        return self.model.context_tokens - (self.model.image_tokens_count - 1) - (max_tokens or DEFAULT_TOKENS[adapter])

    def _check_pack(self, name: str) -> None:
        if name not in ("", self.model.pack_name, *self.model.also_called):
            raise PackUnknown(f"pack {name!r} is not loaded here; {self.model.pack_name!r} is", field="pack")

    def _count(self, change: int) -> None:
        self._running += change
        self._observer.load_changed(running=self._running)


def check_caption(text: str, field_name: str) -> None:
    """Raises CaptionEmpty or CaptionTooLong, naming the field."""
    if len(text) > CAPTION_CHARACTERS_MAX:
        raise CaptionTooLong(
            f"a caption has {len(text)} characters and at most {CAPTION_CHARACTERS_MAX} are taken",
            field=field_name,
            metadata={"limit": str(CAPTION_CHARACTERS_MAX)},
        )
    if not prompts.clean(text):
        raise CaptionEmpty(field=field_name)


def readable(text: str) -> str:
    """What the model wrote as one clean line without special tokens, at most `TEXT_CHARACTERS_MAX` characters."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return prompts.clean(text.replace("\ufffd", ""))[:TEXT_CHARACTERS_MAX].strip()


def whole_sentences(text: str) -> str:
    """A text that was cut off, without its unfinished last sentence; as it is when it holds no whole one."""
    ends = list(_SENTENCE_END.finditer(text))
    return text[: ends[-1].end()].strip() if ends else text


def derived_seed(seed: int, attempt: int) -> int:
    """The generator's seed for one try: 63 bits of a hash, so that tries are unrelated and any seed is welcome."""
    digest = hashlib.sha256(f"caption {seed} {attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
