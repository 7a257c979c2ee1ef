"""What the checks on an upload find, and what they leave alone: stories of the toon world, whole and damaged."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from services.customization.checks import (
    MOST_PIXELS,
    Finding,
    GivenFrame,
    GivenStory,
    KnownCharacter,
    by_name,
    check_story,
    is_acceptable,
    is_told_in,
    noun_of,
    read_picture,
)
from services.models.captions.cast import Cast
from services.models.eyes import Eyes, load_eyes
from services.models.world import World
from training.new_story import Called
from training.toon.cast import MAIN, NEW
from training.toon.grammar import describe_plainly, phrase
from training.toon.render import render
from training.toon.world import Story, sample_story

TOON = Path(__file__).parents[3] / "services" / "models" / "packs" / "toon"
SIZE_PX = 128
CLEAN_STORIES = 50


@pytest.fixture(scope="module")
def cast() -> tuple[KnownCharacter, ...]:
    """Everybody whom the toon pack knows, by name alone where it knows no look."""
    looks = World.load(TOON).characters
    return tuple(
        KnownCharacter(name=name, phrase=looks.get(name, "")) for name in sorted({*looks, *Cast.load(TOON).names})
    )


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    found = load_eyes(TOON)
    assert found is not None
    return found


def png(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, format=kind, **options)
    return out.getvalue()


def told(story: Story) -> GivenStory:
    """A story of the world as somebody would upload it."""
    assert story.hero.name is not None
    frames = tuple(
        GivenFrame(image=png(render(frame.scene, SIZE_PX)), caption=frame.caption, description=frame.description)
        for frame in story.frames
    )
    return GivenStory(
        name=story.hero.name, phrase=phrase(story.hero.look), frames=frames, width_px=SIZE_PX, height_px=SIZE_PX
    )


def new_stories() -> Iterator[tuple[int, Story]]:
    """Stories of the "new" split whose hero is one of the new characters, with the seeds they come from."""
    new = {one.id for one in NEW}
    return ((seed, story) for seed in range(10_000) if (story := sample_story(seed, "new")).hero.id in new)


@pytest.fixture(scope="module")
def clean() -> GivenStory:
    """The story of Momo, the brown monkey with a yellow party hat, without fault."""
    return told(sample_story(3, "new"))


def with_frame(story: GivenStory, number: int, **changed: object) -> GivenStory:
    """The story with one frame, counted from one, changed."""
    frames = list(story.frames)
    frames[number - 1] = replace(frames[number - 1], **changed)  # type: ignore[arg-type]
    return replace(story, frames=tuple(frames))


def opened(story: GivenStory, number: int) -> Image.Image:
    return Image.open(io.BytesIO(story.frames[number - 1].image)).convert("RGB")


def codes(findings: list[Finding]) -> list[tuple[str, int | None]]:
    return [(finding.code, finding.frame_number) for finding in findings]


def test_a_story_without_fault_has_no_findings(clean: GivenStory, cast: tuple[KnownCharacter, ...], eyes: Eyes) -> None:
    assert check_story(clean, cast, eyes) == []
    assert check_story(clean, cast, None) == []
    assert check_story(clean, (), None) == []


def test_clean_stories_are_not_refused_and_seldom_warned_of(cast: tuple[KnownCharacter, ...], eyes: Eyes) -> None:
    found: Counter[str] = Counter()
    warned = 0
    stories = new_stories()
    for _ in range(CLEAN_STORIES):
        findings = check_story(told(next(stories)[1]), cast, eyes)
        assert [finding for finding in findings if finding.severity == "error"] == []
        found.update(finding.code for finding in findings)
        warned += bool(findings)
    # Eyes that overlook a scarf are the only ones who may be wrong, in a frame or two of a hundred.
    assert set(found) <= {"CHARACTER_NOT_SEEN"}
    assert found["CHARACTER_NOT_SEEN"] <= 0.03 * 5 * CLEAN_STORIES
    assert warned <= 0.1 * CLEAN_STORIES


def _blurred(story: GivenStory) -> GivenStory:
    return with_frame(story, 2, image=png(opened(story, 2).filter(ImageFilter.GaussianBlur(2))))


def _nearly_repeated(story: GivenStory) -> GivenStory:
    cut = opened(story, 1).crop((1, 1, 127, 127)).resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)
    return with_frame(story, 4, image=png(cut, "JPEG", quality=60))


def _sized(width_px: int, height_px: int) -> Callable[[GivenStory], GivenStory]:
    return lambda story: with_frame(
        story, 3, image=png(opened(story, 3).resize((width_px, height_px), Image.Resampling.LANCZOS))
    )


def _renamed(name: str) -> Callable[[GivenStory], GivenStory]:
    return lambda story: replace(
        story,
        name=name,
        frames=tuple(
            replace(
                frame,
                caption=frame.caption.replace(story.name, name),
                description=frame.description.replace(story.name, name),
            )
            for frame in story.frames
        ),
    )


def _somebody_else(story: GivenStory) -> GivenStory:
    """The fifth picture shows Mina and nobody else."""
    scene = next(
        other.frames[0].scene
        for other in (sample_story(seed, "train") for seed in range(1000))
        if other.hero.id == "mina" and len(other.frames[0].scene.actors) == 1
    )
    return with_frame(story, 5, image=png(render(scene, SIZE_PX)))


DAMAGES: tuple[tuple[str, int | None, str, Callable[[GivenStory], GivenStory]], ...] = (
    ("FRAMES_TOO_FEW", None, "error", lambda story: replace(story, frames=story.frames[:2])),
    ("FRAMES_FEW", None, "warning", lambda story: replace(story, frames=story.frames[:4])),
    ("NAME_INVALID", None, "error", _renamed("M0mo!")),
    ("NAME_TAKEN", None, "error", _renamed("pip")),
    ("NAME_LIKE_KNOWN", None, "warning", _renamed("Little Pip")),
    ("NAME_LIKE_KNOWN", None, "warning", _renamed("Brunno")),
    ("NAME_GENERIC", None, "warning", _renamed("Monkey")),
    ("NOUN_INVALID", None, "error", lambda story: replace(story, noun="monkey" * 7)),
    ("CAPTION_INVALID", 3, "error", lambda story: with_frame(story, 3, caption=" ")),
    ("CAPTION_INVALID", 3, "error", lambda story: with_frame(story, 3, caption="Momo\x00 waved.")),
    ("CAPTION_INVALID", 3, "error", lambda story: with_frame(story, 3, caption="Momo " * 201)),
    ("DESCRIPTION_INVALID", 1, "error", lambda story: with_frame(story, 1, description="Momo " * 201)),
    (
        "DESCRIPTION_WITHOUT_CHARACTER",
        2,
        "error",
        lambda story: with_frame(story, 2, description="A monkey waves on the beach."),
    ),
    (
        "DESCRIPTION_WITHOUT_CHARACTER",
        2,
        "error",
        lambda story: with_frame(story, 2, caption="He waved.", description=""),
    ),
    ("FRAME_UNREADABLE", 5, "error", lambda story: with_frame(story, 5, image=b"no picture")),
    ("FRAME_UNREADABLE", 5, "error", lambda story: with_frame(story, 5, image=b"")),
    ("FRAME_UNREADABLE", 5, "error", lambda story: with_frame(story, 5, image=story.frames[4].image[:900])),
    ("FRAME_TOO_LARGE", 5, "error", lambda story: with_frame(story, 5, image=png(Image.new("1", (4097, 4096))))),
    ("FRAME_TOO_SMALL", 3, "error", _sized(60, 60)),
    ("FRAME_SMALL", 3, "warning", _sized(112, 112)),
    ("FRAME_SHAPE", 3, "error", _sized(192, 128)),
    ("FRAME_BLURRED", 2, "warning", _blurred),
    ("FRAME_REPEATED", 4, "error", lambda story: with_frame(story, 4, image=story.frames[0].image)),
    ("FRAME_NEARLY_REPEATED", 4, "warning", _nearly_repeated),
    ("CHARACTER_NOT_SEEN", 5, "warning", _somebody_else),
)


@pytest.mark.parametrize(("code", "number", "severity", "damage"), DAMAGES)
def test_a_damage_is_found_where_it_is_and_nothing_else_is(
    code: str,
    number: int | None,
    severity: str,
    damage: Callable[[GivenStory], GivenStory],
    clean: GivenStory,
    cast: tuple[KnownCharacter, ...],
    eyes: Eyes,
) -> None:
    findings = check_story(damage(clean), cast, eyes)
    # A blurred or a tiny picture may also hide who is in it.
    assert [one for one in codes(findings) if one != ("CHARACTER_NOT_SEEN", number)] == [
        one for one in [(code, number)] if code != "CHARACTER_NOT_SEEN"
    ]
    if code == "CHARACTER_NOT_SEEN":
        assert codes(findings) == [(code, number)]
    (finding,) = (one for one in findings if one.code == code)
    assert finding.severity == severity
    assert finding.message.endswith(".")
    assert finding.mend.endswith(".")


def test_too_many_frames_are_not_even_decoded(clean: GivenStory) -> None:
    findings = check_story(replace(clean, frames=(replace(clean.frames[0], image=b"none"),) * 21), (), None)
    assert codes(findings) == [("FRAMES_TOO_MANY", None)]


def test_a_picture_of_one_colour_shows_nobody(clean: GivenStory) -> None:
    flat = with_frame(clean, 1, image=png(np.full((SIZE_PX, SIZE_PX, 3), 200, dtype=np.uint8)))
    assert codes(check_story(flat, (), None)) == [("FRAME_EMPTY", 1)]


def test_a_phrase_is_needed(clean: GivenStory) -> None:
    found = codes(check_story(replace(clean, phrase=" "), (), None))
    assert ("PHRASE_INVALID", None) in found
    assert ("PHRASE_INVALID", None) in codes(check_story(replace(clean, phrase="a monkey " * 30), (), None))


def test_captions_that_never_say_the_name_leave_it_without_meaning(clean: GivenStory) -> None:
    nameless = replace(clean, frames=tuple(replace(one, caption="And then he went on.") for one in clean.frames))
    assert codes(check_story(nameless, (), None)) == [("CAPTIONS_WITHOUT_NAME", None)]


@pytest.mark.parametrize("seeing", [True, False])
def test_who_is_told_to_look_like_one_of_the_cast_is_a_risk(
    seeing: bool, clean: GivenStory, cast: tuple[KnownCharacter, ...], eyes: Eyes
) -> None:
    alike = "an orange cat with a blue cap"  # Pip has a scarf
    story = replace(
        clean,
        phrase=alike,
        frames=tuple(replace(one, description="Momo waves at the beach.") for one in clean.frames),
    )
    found = [one for one in check_story(story, cast, eyes if seeing else None) if one.code == "LOOK_ALIKE"]
    assert [one.severity for one in found] == ["warning"]
    assert "Pip" in found[0].message


def test_who_is_drawn_like_one_of_the_cast_is_a_risk(
    clean: GivenStory, cast: tuple[KnownCharacter, ...], eyes: Eyes
) -> None:
    of_mina = next(
        story
        for story in (sample_story(seed, "train") for seed in range(1000))
        if story.hero.id == "mina" and all(len(frame.scene.actors) == 1 for frame in story.frames[:3])
    )
    frames = tuple(
        replace(given, image=png(render(frame.scene, SIZE_PX)))
        for given, frame in zip(clean.frames, of_mina.frames, strict=True)
    )
    found = check_story(replace(clean, frames=frames), cast, eyes)
    assert [one.code for one in found if one.frame_number is None] == ["LOOK_ALIKE"]
    assert "Mina" in next(one.message for one in found if one.code == "LOOK_ALIKE")


def test_eyes_are_not_asked_about_looks_that_they_have_no_words_for(clean: GivenStory, eyes: Eyes) -> None:
    story = replace(
        clean,
        phrase="a mauve robot with a brass antenna",
        frames=tuple(replace(one, description="Momo waves at the beach.") for one in clean.frames),
    )
    assert check_story(story, (), eyes) == []


def test_all_that_is_wrong_is_said_at_once_the_story_first(clean: GivenStory) -> None:
    story = with_frame(with_frame(_renamed("Mo$mo")(clean), 4, image=b""), 2, caption="")
    assert codes(check_story(story, (), None)) == [
        ("NAME_INVALID", None),
        ("CAPTION_INVALID", 2),
        ("FRAME_UNREADABLE", 4),
    ]


def test_errors_refuse_and_warnings_can_be_accepted(clean: GivenStory) -> None:
    warned = check_story(_blurred(clean), (), None)
    assert not is_acceptable(warned)
    assert is_acceptable(warned, ["FRAME_BLURRED"])
    assert is_acceptable(warned, ["*"])
    assert not is_acceptable(warned, ["FRAME_SMALL"])
    assert not is_acceptable(check_story(replace(clean, frames=clean.frames[:2]), (), None), ["*", "FRAMES_TOO_FEW"])
    assert is_acceptable([])


def test_nothing_that_is_uploaded_makes_the_checks_raise(eyes: Eyes) -> None:
    strange = GivenStory(
        name="\ud800(", phrase="\x00[", noun="", frames=(GivenFrame(image=b"\x89PNG\r\n\x1a\n", caption="\ud800"),) * 5
    )
    found = check_story(strange, [KnownCharacter(name="Pip", phrase="")], eyes)
    assert {"NAME_INVALID", "PHRASE_INVALID", "FRAME_UNREADABLE", "CAPTION_INVALID"} <= {one.code for one in found}
    assert codes(check_story(GivenStory(name="", phrase="", frames=()), (), None))[0] == ("FRAMES_TOO_FEW", None)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    wide = png(Image.new("1", (MOST_PIXELS // 4096 + 1, 4096)))
    with pytest.raises(ValueError, match="at most"):
        read_picture(wide)


def test_transparent_pictures_lie_on_paper_and_turned_ones_stand_upright() -> None:
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    assert read_picture(png(clear)).tolist() == [[[255, 255, 255]] * 4] * 2
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    assert read_picture(png(turned, "JPEG", exif=turned.getexif())).shape == (4, 2, 3)


def test_training_and_the_checks_agree_on_who_is_told_of() -> None:
    texts = [
        text
        for seed in range(40)
        for frame in sample_story(seed, "new").frames
        for text in (frame.caption, frame.description, describe_plainly(frame.scene))
    ]
    agreed = Counter()  # type: ignore[var-annotated]
    for one in (*NEW, *MAIN):
        assert one.name is not None
        story = GivenStory(name=one.name, phrase=phrase(one.look), frames=())
        called = Called(name=one.name, phrase=story.phrase, noun=noun_of(story))
        assert noun_of(story) == one.look.species
        for text in texts:
            assert is_told_in(story, text) == called.is_told_in(text), text
            assert by_name(story, text) == called.by_name(text), text
            agreed[is_told_in(story, text)] += 1
    assert min(agreed[True], agreed[False]) > 100
