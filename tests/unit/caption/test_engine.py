"""What the engine decides by itself, with a scripted driver in vLLM's place."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from PIL import Image

from services.caption.driver import Ask, Reply
from services.caption.engine import CaptionEngine, CaptionModel, derived_seed, readable, whole_sentences
from services.caption.image import read_image
from services.caption.job import DescribeJob, Finish, Sampling, StoryJob
from services.models.cast import Cast
from services.models.tokenizer import StoryTokenizer
from services.runtime.config import SHIPPED_PACKS
from services.runtime.errors import CaptionNotWritten, QueueFull

MODEL = CaptionModel(
    pack_name="tiny",
    pack_digest="d" * 64,
    architecture="llava",
    tokenizer=StoryTokenizer.load(SHIPPED_PACKS / "toon" / "tokenizer"),
    image_px=32,
    image_tokens_count=4,
    context_tokens=512,
)


@dataclass
class ScriptedDriver:
    """Answers with the texts it was given, one after the other."""

    texts: Sequence[str]
    asks: list[Ask] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def start(self) -> None: ...

    async def generate(self, ask: Ask) -> Reply:
        self.asks.append(ask)
        if self.gate is not None:
            await self.gate.wait()
        text = self.texts[len(self.asks) - 1]
        return Reply(ids=tuple(MODEL.tokenizer.encode(text)), finish=Finish.STOP, prompt_tokens=9)

    def check_health(self) -> None: ...

    @property
    def unfinished_count(self) -> int:
        return 0

    async def stop(self) -> None: ...


@dataclass
class Notes:
    """What an observer was told."""

    outcomes: list[tuple[str, str]] = field(default_factory=list)
    running: int = 0

    def load_changed(self, *, running: int) -> None:
        self.running = running

    def text_done(self, *, adapter: str, outcome: str, tokens: int, seconds: float) -> None:
        self.outcomes.append((adapter, outcome))


def png(
    mode: str = "RGB", size: tuple[int, int] = (32, 32), change: Callable[[Image.Image], Image.Image] | None = None
) -> bytes:
    picture = Image.new(mode, size)
    file = io.BytesIO()
    (change(picture) if change else picture).save(file, "PNG")
    return file.getvalue()


STORY = StoryJob(image=png(), captions=("Momo slept.",), sampling=Sampling(temperature=0.0, seed=5))
DESCRIBE = DescribeJob(image=png(), previous_caption="Momo slept.", caption="She woke.")


async def test_each_question_goes_to_its_adapter_with_its_length() -> None:
    driver = ScriptedDriver(["One.", "Two."])
    engine = CaptionEngine(MODEL, driver)
    assert (await engine.write_caption(STORY)).text == "One."
    assert (await engine.describe(DESCRIBE)).text == "Two."
    assert [(ask.adapter, ask.max_tokens) for ask in driver.asks] == [("story", 64), ("descriptive", 90)]


async def test_a_description_may_only_name_who_the_captions_name() -> None:
    driver = ScriptedDriver(["Mina waves.", "Two.", "Three."])
    engine = CaptionEngine(replace(MODEL, cast=Cast(("Mina", "Pip", "Bruno"))), driver)
    await engine.describe(replace(DESCRIBE, previous_caption="Pip slept.", caption="Mina met Zora."))
    await engine.describe(replace(DESCRIBE, previous_caption="She slept.", caption="She woke."))
    await engine.write_caption(STORY)
    bruno = {*MODEL.tokenizer.encode(" Bruno"), *MODEL.tokenizer.encode("Bruno")}
    assert set(driver.asks[0].forbidden_ids) <= bruno
    assert MODEL.tokenizer.encode(" Bruno")[0] in driver.asks[0].forbidden_ids
    assert driver.asks[1].forbidden_ids == driver.asks[2].forbidden_ids == (), "who 'she' is, the picture says"


async def test_a_description_that_leaves_somebody_out_is_chosen_again() -> None:
    wrong = ["A cat.", "Mina and Mina.", "Nobody.", "Mina waves to Pip.", "Pip, Pip, Mina.", "x", "x", "x"]
    driver = ScriptedDriver(wrong)
    engine = CaptionEngine(replace(MODEL, cast=Cast(("Mina", "Pip"))), driver)
    written = await engine.describe(replace(DESCRIBE, caption="Mina met Pip."))
    assert written.text == "Mina waves to Pip."
    assert len(driver.asks) == 8
    assert len({ask.seed for ask in driver.asks}) == 8
    assert written.completion_tokens == sum(len(MODEL.tokenizer.encode(text)) for text in wrong)


async def test_a_description_survives_the_tries_that_were_to_better_it() -> None:
    driver = ScriptedDriver(["A cat."] + [""] * 3 * 7)
    engine = CaptionEngine(replace(MODEL, cast=Cast(("Mina", "Pip"))), driver)
    written = await engine.describe(replace(DESCRIBE, caption="Mina met Pip."))
    assert written.text == "A cat."
    assert len(driver.asks) > 8


async def test_an_empty_answer_is_tried_again_with_another_seed_and_some_heat() -> None:
    driver = ScriptedDriver(["", " \n\x07", "At last."])
    written = await CaptionEngine(MODEL, driver).write_caption(STORY)
    assert written.text == "At last."
    assert written.completion_tokens == len(MODEL.tokenizer.encode(" \n\x07")) + len(MODEL.tokenizer.encode("At last."))
    assert len({ask.seed for ask in driver.asks}) == 3
    assert [ask.temperature for ask in driver.asks] == [0.0, 0.7, 0.7]


async def test_a_model_that_writes_nothing_is_a_named_error() -> None:
    notes = Notes()
    engine = CaptionEngine(MODEL, ScriptedDriver([""] * 3), max_attempts=3, observer=notes)
    with pytest.raises(CaptionNotWritten) as raised:
        await engine.write_caption(STORY)
    assert raised.value.reason == "CAPTION_NOT_WRITTEN"
    assert notes.outcomes == [("story", "caption_not_written")]


async def test_one_request_too_many_is_refused_at_once() -> None:
    driver, notes = ScriptedDriver(["Done."] * 3, gate=asyncio.Event()), Notes()
    engine = CaptionEngine(MODEL, driver, max_requests=2, observer=notes)
    running = [asyncio.create_task(engine.write_caption(STORY)) for _ in range(2)]
    while len(driver.asks) < 2:  # noqa: ASYNC110 - the pictures are decoded in threads
        await asyncio.sleep(0.001)
    with pytest.raises(QueueFull):
        await engine.write_caption(STORY)
    assert driver.gate is not None
    driver.gate.set()
    assert [written.text for written in await asyncio.gather(*running)] == ["Done.", "Done."]
    assert notes.running == 0


def test_what_goes_out_is_one_clean_line() -> None:
    assert readable(" A <image> cat\n<eos>\x00 ran\ufffd. ") == "A cat ran."
    assert len(readable("x" * 5000)) == 1000


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        ("It ran. It saw a", "It ran."),
        ('"Help!" cried Mo. Then', '"Help!" cried Mo.'),
        ('He said "Wait!" And', 'He said "Wait!"'),
        ("It ran and ran", "It ran and ran"),
        ("A 3.5 m kite. It", "A 3.5 m kite."),
    ],
)
def test_a_text_that_was_cut_off_ends_with_its_last_whole_sentence(cut: str, whole: str) -> None:
    assert whole_sentences(cut) == whole


def test_tries_have_unrelated_seeds_that_vllm_takes() -> None:
    seeds = {derived_seed(seed, attempt) for seed in (0, 1, 2**64 - 1) for attempt in range(3)}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_kind_of_picture_becomes_rgb_of_the_models_size(mode: str) -> None:
    picture = read_image(png(mode, (40, 20)), 32)
    assert (picture.mode, picture.size) == ("RGB", (32, 32))


def test_transparency_becomes_white_and_16_bits_keep_their_range() -> None:
    assert read_image(png("RGBA"), 32).getpixel((5, 5)) == (255, 255, 255)
    half = png("I;16", change=lambda picture: Image.new("I;16", picture.size, 32_896))
    assert read_image(half, 32).getpixel((5, 5)) == (128, 128, 128)


def test_a_rotated_photograph_is_turned_upright() -> None:
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    upright = read_image(file.getvalue(), 32)
    assert upright.getpixel((16, 2)) == (0, 0, 255)
    assert upright.getpixel((16, 29)) == (255, 0, 0)
