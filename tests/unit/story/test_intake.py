"""What is taken and what is refused, without a process or a wire."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import (
    CaptionCharactersInvalid,
    CaptionEmpty,
    CaptionTooLong,
    PackUnknown,
    Unavailable,
    ValueOutOfRange,
)
from services.story.intake import PACK_MEMORY_S, PackCheck, StoryRequest, check_caption, check_options
from services.story.plan import SEED_LIMIT

BASE = StoryRequest(image=b"i", caption="c")


@given(st.text(max_size=1200))
def test_a_caption_is_taken_tidy_or_refused_by_name(text: str) -> None:
    try:
        kept = check_caption(text)
    except (CaptionEmpty, CaptionTooLong, CaptionCharactersInvalid):
        return
    assert 1 <= len(kept) <= 1000
    assert kept == " ".join(kept.split())
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in kept)
    assert check_caption(kept) == kept


@given(st.integers(), st.integers(), st.floats(), st.floats(), st.floats())
def test_options_are_in_range_or_refused_by_name(
    frame_count: int, seed: int, text_guidance: float, image_guidance: float, temperature: float
) -> None:
    request = StoryRequest(
        image=b"i",
        caption="c",
        frame_count=frame_count,
        seed=seed,
        text_guidance=text_guidance,
        image_guidance=image_guidance,
        temperature=temperature,
    )
    try:
        options = check_options(request, default_pack="toon")
    except ValueOutOfRange:
        return
    assert 1 <= options.frame_count <= 20
    assert 0 <= options.seed < SEED_LIMIT
    assert options.text_guidance is not None
    assert 0 <= options.text_guidance <= 30


def test_what_is_not_said_has_its_default() -> None:
    options = check_options(BASE, default_pack="toon")
    assert (options.frame_count, options.pack, options.temperature) == (4, "toon", 0.2)
    assert options.quality == "standard"
    assert (options.steps, options.text_guidance, options.image_guidance) == (None, None, None)
    assert 0 <= options.seed < SEED_LIMIT


@pytest.mark.parametrize("quality", ["draft", "standard", "best"])
def test_a_quality_with_a_name_is_taken(quality: str) -> None:
    assert check_options(replace(BASE, quality=quality), default_pack="toon").quality == quality


@pytest.mark.parametrize("quality", ["", "Best", "best ", "ultra", "99", "x" * 5000])
def test_a_quality_without_one_is_refused_by_name(quality: str) -> None:
    with pytest.raises(ValueOutOfRange) as caught:
        check_options(replace(BASE, quality=quality), default_pack="toon")
    assert caught.value.metadata == {"field": "quality", "value": quality[:100], "known": "draft,standard,best"}
    assert "draft, standard or best" in caught.value.message
    assert len(caught.value.message) < 200


def test_the_body_is_compared_without_its_key_and_with_everything_else() -> None:
    same = StoryRequest(image=b"i", caption="c", request_id="k")
    assert same.body_sha256() == BASE.body_sha256()
    others = [
        StoryRequest(image=b"j", caption="c"),
        StoryRequest(image=b"i", caption="d"),
        *[
            StoryRequest(image=b"i", caption="c", **{name: value})  # type: ignore[arg-type]
            for name, value in (
                ("frame_count", 4),
                ("seed", 0),
                ("pack", "toon"),
                ("steps", 1),
                ("text_guidance", 0.0),
                ("image_guidance", 0.0),
                ("temperature", 0.2),
                ("quality", "draft"),
                ("quality", "best"),
                ("characters", ("Rosa",)),
            )
        ],
    ]
    hashes = {request.body_sha256() for request in [BASE, *others]}
    assert len(hashes) == 1 + len(others)


def test_a_key_of_before_there_was_a_quality_is_still_known() -> None:
    # Golden numbers, of the version before: a client that tries again across an update is no other request.
    assert BASE.body_sha256() == "462e25d039b021e259916e7d55253ae7bc8dca4e7bf953725a877e8f36f246ef"
    more = replace(BASE, steps=4, seed=7, quality="standard")
    assert more.body_sha256() == "66e31b2690843fe373deb2e2858153ac23b7c0fd19c15bc266ceea2d32f86f58"


class Backend:
    """Answers ListPacks, or does not."""

    def __init__(self, *names: str) -> None:
        self.names: tuple[str, ...] | None = names
        self.asked = 0

    async def packs(self, *, timeout_s: float) -> tuple[str, ...]:
        self.asked += 1
        if self.names is None:
            raise Unavailable()
        return self.names


def pack_check(caption: Backend, frame: Backend) -> PackCheck:
    return PackCheck(caption, frame, default_pack="toon")  # type: ignore[arg-type]


async def test_a_pack_must_be_loaded_by_both_services() -> None:
    check = pack_check(Backend("toon", "both"), Backend("toon", "both", "half"))
    await check.check("both", now_s=0)
    for name in ("half", "none"):
        with pytest.raises(PackUnknown) as caught:
            await check.check(name, now_s=0)
        assert "caption" in caught.value.message


async def test_services_are_asked_rarely_and_again_for_a_new_name() -> None:
    caption, frame = Backend("toon"), Backend("toon")
    check = pack_check(caption, frame)
    for second in range(int(PACK_MEMORY_S)):
        await check.check("toon", now_s=second)
    assert caption.asked == frame.asked == 1
    caption.names = frame.names = ("toon", "new")
    await check.check("new", now_s=10)
    assert caption.asked == 2


async def test_while_services_are_silent_the_default_pack_is_trusted_and_others_wait() -> None:
    caption, frame = Backend("toon"), Backend("toon")
    caption.names = frame.names = None
    check = pack_check(caption, frame)
    await check.check("toon", now_s=0)
    with pytest.raises(Unavailable):
        await check.check("other", now_s=0)
    caption.names = frame.names = ("toon",)
    await check.check("toon", now_s=100)
    caption.names = frame.names = None
    await check.check("toon", now_s=1000)  # the last answer counts while there is no newer one
    with pytest.raises(PackUnknown):
        await check.check("other", now_s=2000)
