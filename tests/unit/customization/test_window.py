"""How much text a job's descriptions may have: the same, to the token, as training itself will take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from services.customization.checks import GivenFrame, GivenStory, by_name, check_story
from services.customization.intake import METHODS, TRAINED_ARCHITECTURES
from services.customization.window import Overlong, Window, window_of
from services.models.errors import TextTooLong
from services.models.pack import Pack
from services.models.registry import FrameModel, load_frame_model
from services.models.tiny import build_tiny_pack
from services.models.toon import TEXT
from tests.tiny_arldm_pack import build_arldm_pack
from training.backbones.registry import BACKBONES, backbone_of
from training.customize import recipe_for
from training.methods.method import ground_of
from training.methods.registry import method_of
from training.new_story import Called, SeenFrame, world_story
from training.toon.cast import NEW

TOON = Path(__file__).parents[3] / "services" / "models" / "packs" / "toon"
TAUGHT = [*((method, "") for method in METHODS), ("epicevo", "lora"), ("epicevo", "unet")]
# By architecture: who is new, beginnings of descriptions that tell of them by name, by look, and by both, and what
# makes them longer. The look told in part is what the name alone may be longer than.
OTTO = Called(name="Otto", phrase="a black penguin with orange earmuffs", noun="penguin")
BARNEY = Called(name="barney", phrase="the car with fred", noun="car")
TEXTS = {
    "storygen": (OTTO, ("Otto", "A black penguin", f"Otto, {OTTO.phrase},", "Otto's otter and Otto"), " runs and"),
    "arldm": (BARNEY, ("barney", "the car", "barney the car with fred", "the car barney"), " sits"),
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pack]:
    folder = tmp_path_factory.mktemp("packs")
    tiny = build_tiny_pack(folder / "tiny", captions=False, positions=160)
    return {"storygen": tiny, "arldm": build_arldm_pack(folder / "stories")}


@pytest.fixture(scope="module")
def models(packs: dict[str, Pack]) -> dict[str, FrameModel]:
    return {architecture: load_frame_model(pack) for architecture, pack in packs.items()}


def toon_window(method: str, learns: str = "", called: Called = OTTO) -> Window:
    return window_of(TOON, "storygen", method=method, learns=learns, name=called.name, phrase=called.phrase)


def longest(text: str, more: str, fits: Callable[[str], bool]) -> int:
    """How often a text takes `more` behind it and fits still; -1 where it does not fit as it is."""
    count = 0
    while fits(text + more * count):
        count += 1
    return count - 1


def test_every_pack_that_can_be_taught_has_a_window() -> None:
    assert set(TRAINED_ARCHITECTURES) == set(BACKBONES) == set(TEXTS)


@pytest.mark.parametrize("architecture", TEXTS)
@pytest.mark.parametrize(("method", "learns"), TAUGHT)
def test_the_checks_take_as_much_as_training_takes(
    architecture: str, method: str, learns: str, packs: dict[str, Pack], models: dict[str, FrameModel]
) -> None:
    pack, model = packs[architecture], models[architecture]
    called, texts, more = TEXTS[architecture]
    recipe = recipe_for(pack, method, learns=learns or "lora").method
    words = method_of(ground_of(model, [called], 0), recipe).words
    backbone = backbone_of(model)
    window = window_of(pack.folder, architecture, method=method, learns=learns, name=called.name, phrase=called.phrase)
    story = GivenStory(name=called.name, phrase=called.phrase, frames=())
    pixels = np.zeros((model.manifest.height_px, model.manifest.width_px, 3), dtype=np.uint8)

    def trained(text: str) -> bool:
        frame = SeenFrame(id="1", pixels=pixels, caption=text, descriptions=(text,), characters=frozenset({"new"}))
        try:
            backbone.shelf([frame], words, [called])
        except TextTooLong:
            return False
        return True

    def taken(text: str) -> bool:
        return window.overlong(text) is None and window.overlong(by_name(story, text)) is None

    for text in texts:
        most = longest(text, more, taken)
        assert trained(text + more * most) is (most >= 0)
        assert not trained(text + more * (most + 1))


def test_what_does_not_fit_is_counted_by_the_encoder_that_it_fits_least() -> None:
    room = TEXT.positions - 2
    assert toon_window("dreambooth").readers[0].room == room
    found = toon_window("dreambooth").overlong("Otto runs. " * 40)
    assert found is not None
    assert found.limit == room < found.token_count
    once, twice = (
        toon_window("textual-inversion").overlong("Otto" + " runs" * 100 + " Otto" * more) for more in (0, 1)
    )
    assert once is not None
    assert twice == Overlong(once.token_count + 4, room), "a word of four vectors is four tokens"


@pytest.mark.parametrize(("method", "learns"), TAUGHT)
def test_stories_of_the_toon_world_fit_the_toon_pack(method: str, learns: str) -> None:
    for one in NEW[:4]:
        story = world_story(one.id, 16)
        given = GivenStory(name=story.name, phrase=story.phrase, frames=())
        window = toon_window(method, learns, story.called)
        for frame in story.frames:
            text = frame.descriptions[0]
            assert window.overlong(text) is None, text
            assert window.overlong(by_name(given, text)) is None, text


def test_a_description_that_training_would_refuse_is_an_error_with_a_mend() -> None:
    long = "Otto, a black penguin with orange earmuffs, runs along the beach and looks at the waves. " * 6
    frames = [GivenFrame(image=b"", caption="Otto runs.", description=long if number == 1 else "") for number in (0, 1)]
    story = GivenStory(name=OTTO.name, phrase=OTTO.phrase, frames=frames)

    def found(window: Window | None) -> list[tuple[str, int | None]]:
        told = [one for one in check_story(story, (), None, window) if one.code == "DESCRIPTION_TOO_LONG"]
        assert all(one.severity == "error" and "94" in one.message and "words less" in one.mend for one in told)
        return [(one.code, one.frame_number) for one in told]

    assert found(toon_window("epicevo")) == [("DESCRIPTION_TOO_LONG", 2)]
    assert found(None) == []


def test_a_look_told_short_is_as_long_as_the_word_that_training_puts_in_its_place() -> None:
    """Five names fit, and the same look five times fits; the name learned as the whole phrase does not."""
    called = Called(name="Otto", phrase="a penguin with " + "very " * 20 + "orange earmuffs", noun="penguin")
    text = "The penguin runs. " * 5
    story = GivenStory(name=called.name, phrase=called.phrase, frames=())
    window = toon_window("lora", "", called)
    assert window.overlong(text) is None
    assert window.overlong(by_name(story, text)) is not None
    assert toon_window("dreambooth", "", called).overlong(by_name(story, text)) is None
