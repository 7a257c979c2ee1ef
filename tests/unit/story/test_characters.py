"""Who is meant, who is in a frame, what is told of them: without a process or a wire."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fabula.customization.v1 import customization_service_pb2 as customization_pb
from fabula.customization.v1 import job_pb2
from fabula.story.v1 import story_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import (
    CharacterNotFound,
    CharacterOfAnotherPack,
    CharacterRepeated,
    FeatureMissing,
    InvalidArgument,
    PackUnknown,
    Unavailable,
    ValueOutOfRange,
)
from services.runtime.names import MOST_IN_FRAME
from services.story.api_grpc import story_request_from_pb
from services.story.backends import Drawing, LoadedPack
from services.story.characters import CharacterLookup, drawn_in, unfamiliar
from services.story.customization import Customizations
from services.story.documents import read_form, read_json_body
from services.story.intake import MOST_CHARACTERS, StoryRequest, check_characters
from services.story.protobuf import story_to_pb
from services.story.records import (
    Options,
    State,
    Story,
    StoryCharacter,
    StoryWarning,
    options_from_json,
    options_to_json,
)

DRAWING = Drawing(
    width_px=8,
    height_px=8,
    min_side_px=8,
    side_multiple_px=8,
    max_area_px=64,
    default_steps=2,
    max_steps=4,
    default_text_guidance=1.0,
    default_image_guidance=1.0,
    max_references=3,
    features=("characters",),
    samplers=(),
    qualities=(),
)


def character(name: str, phrase: str = "a pink pig with a teal hat") -> StoryCharacter:
    return StoryCharacter(name=name, phrase=phrase, version_id=name * 2, weights_sha256=name * 3)


def version(name: str, mark: str, digest: str = "now", phrase: str = "a pig") -> job_pb2.CharacterVersion:
    return job_pb2.CharacterVersion(
        version_id=mark * 64,
        weights_sha256=mark,
        character=job_pb2.NewCharacter(name=name, phrase=phrase),
        pack="toon",
        pack_digest=digest,
    )


class Published:
    """A customization service's list."""

    def __init__(self, *versions: job_pb2.CharacterVersion) -> None:
        self.published = versions
        self.asked: list[str] = []

    async def versions(self, *, name: str = "") -> AsyncIterator[job_pb2.CharacterVersion]:
        self.asked.append(name)
        for each in self.published:
            if name in ("", each.character.name):
                yield each


class Frames:
    """A frame service's packs."""

    def __init__(self, drawing: Drawing | None = DRAWING, base_digest: str = "") -> None:
        pack = LoadedPack(name="toon", digest="now", architecture="storygen", drawing=drawing, base_digest=base_digest)
        self.packs = (pack,)
        self.asked = 0

    async def loaded(self, *, timeout_s: float) -> tuple[LoadedPack, ...]:
        self.asked += 1
        return self.packs


async def find(published: Published, *wanted: str, frames: Frames | None = None, pack: str = "toon") -> Any:
    lookup = CharacterLookup(published, frames or Frames())  # type: ignore[arg-type]
    return await lookup.find(wanted, pack=pack)


# -- who is meant ------------------------------------------------------------------------------------------------------


async def test_nobody_is_asked_when_nobody_is_wanted() -> None:
    published, frames = Published(), Frames(None)
    assert await find(published, frames=frames) == ()
    assert (published.asked, frames.asked) == ([], 0)


async def test_a_name_is_its_newest_version_that_the_network_can_wear() -> None:
    published = Published(version("Rosa", "a", "before"), version("Rosa", "b"), version("Rosa", "c"))
    (found,) = await find(published, "Rosa")
    assert (found.version_id, found.weights_sha256) == ("b" * 64, "b")
    assert published.asked == ["Rosa"]


async def test_a_new_captioner_makes_nobody_unusable() -> None:
    learned_before = version("Rosa", "a", "before")
    learned_before.base_digest = "network"
    (found,) = await find(Published(learned_before), "Rosa", frames=Frames(base_digest="network"))
    assert found.version_id == "a" * 64


async def test_the_same_pack_with_another_network_wears_nobody() -> None:
    of_another = version("Rosa", "a", "now")
    of_another.base_digest = "network before"
    with pytest.raises(CharacterOfAnotherPack):
        await find(Published(of_another), "Rosa", frames=Frames(base_digest="network"))


async def test_an_id_is_that_version_and_no_newer_one() -> None:
    published = Published(version("Rosa", "a"), version("Rosa", "b"), version("Otto", "c"))
    found = await find(published, "b" * 64, "Otto")
    assert [(one.name, one.weights_sha256) for one in found] == [("Rosa", "b"), ("Otto", "c")]


async def test_texts_are_kept_as_captions_are() -> None:
    published = Published(version("Zoe\u0301", "a", phrase=" a  pink pig\nwith a teal hat. "))
    (found,) = await find(published, "Zoe\u0301")
    assert (found.name, found.phrase) == ("Zo\u00e9", "a pink pig with a teal hat")


@pytest.mark.parametrize("wanted", ["Rosa", "a" * 64])
async def test_somebody_of_another_network_is_refused_with_both_packs(wanted: str) -> None:
    with pytest.raises(CharacterOfAnotherPack) as caught:
        await find(Published(version("Rosa", "a", "before")), wanted)
    assert caught.value.metadata == {
        "field": "characters[0]",
        "character": wanted,
        "pack": "toon",
        "learned_on": "toon",
    }
    assert caught.value.field_violations[0].field == "characters[0]"


async def test_nobody_is_made_up() -> None:
    for wanted in ("Otto", "rosa", "Ros", "b" * 64):
        with pytest.raises(CharacterNotFound) as caught:
            await find(Published(version("Rosa", "a")), wanted)
        assert caught.value.metadata["character"] == wanted
        assert "fabula character versions" in caught.value.message


async def test_two_of_one_name_are_refused_however_they_were_asked_for() -> None:
    with pytest.raises(CharacterRepeated):
        await find(Published(version("Rosa", "a"), version("Rosa", "b")), "Rosa", "b" * 64)
    with pytest.raises(CharacterRepeated):
        await find(Published(version("Rosa", "a"), version("ROSA", "b")), "Rosa", "ROSA")


class Away:
    """A service that does not answer."""

    async def loaded(self, *, timeout_s: float) -> tuple[LoadedPack, ...]:
        raise Unavailable(retry_after_s=2.5)

    async def versions(self, *, name: str = "") -> AsyncIterator[job_pb2.CharacterVersion]:
        raise Unavailable(retry_after_s=2.5)
        yield


@pytest.mark.parametrize("service", ["frame", "customization"])
async def test_whichever_service_is_away_is_named(service: str) -> None:
    published: Any = Away() if service == "customization" else Published()
    frames: Any = Away() if service == "frame" else Frames()
    with pytest.raises(Unavailable) as caught:
        await find(published, "Rosa", frames=frames)
    assert caught.value.metadata == {"service": service}
    assert caught.value.retry_after_s == 2.5
    assert await find(published, frames=frames) == ()


async def test_a_pack_must_be_there_and_must_wear_weights() -> None:
    published = Published(version("Rosa", "a"))
    for drawing in (None, replace(DRAWING, features=("references",))):
        with pytest.raises(FeatureMissing):
            await find(published, "Rosa", frames=Frames(drawing))
    with pytest.raises(PackUnknown):
        await find(published, "Rosa", pack="ink")


class Channel:
    """A channel to a customization service that answers with pages."""

    grpc_channel = None

    def __init__(self, pages: Sequence[Sequence[str]]) -> None:
        self.pages = pages
        self.tokens: list[str] = []

    async def call(self, _method: Any, request: Any, *, timeout_s: float) -> Any:
        if not self.pages:
            raise Unavailable()
        self.tokens.append(request.page_token)
        page = int(request.page_token or 0)
        return customization_pb.ListCharacterVersionsResponse(
            versions=[version(name, "a") for name in self.pages[page]],
            next_page_token=str(page + 1) if page + 1 < len(self.pages) else "",
        )


async def test_pages_are_turned_to_the_end_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        ListCharacterVersions = None

        def __init__(self, _channel: Any) -> None: ...

    monkeypatch.setattr("services.story.customization.pb_grpc.CustomizationServiceStub", Stub)
    channel = Channel([["A", "B"], [], ["C"]])
    customizations = Customizations(channel, None, unload=None)  # type: ignore[arg-type]
    assert [one.character.name async for one in customizations.versions()] == ["A", "B", "C"]
    assert channel.tokens == ["", "1", "2"]
    channel.pages = []
    with pytest.raises(Unavailable):
        _ = [one async for one in customizations.versions()]


# -- who is in a frame -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "names"),
    [
        ("Rosa runs.", ["Rosa"]),
        ("A park, and Rosa's hat.", ["Rosa"]),
        ("Rosalind runs from a rosa bush.", []),
        ("Otto waves to Rosa; Rosa waves back.", ["Otto", "Rosa"]),
        ("Rosa Lee runs.", ["Rosa Lee"]),
        ("Rosa Lee runs after Rosa.", ["Rosa Lee", "Rosa"]),
        ("Rosa, Otto and Zo\u00e9 run.", ["Rosa", "Otto"]),
        ("Zoe\u0301 runs.", ["Zo\u00e9"]),
        ("R.2 runs, R72 does not.", ["R.2"]),
        ("", []),
    ],
)
def test_those_are_drawn_whom_a_description_names(description: str, names: list[str]) -> None:
    cast = [character(name) for name in ("Rosa", "Otto", "Rosa Lee", "Zo\u00e9", "R.2")]
    assert [one.name for one in drawn_in(cast, description)] == names


def test_without_characters_nobody_is_drawn() -> None:
    assert drawn_in((), "Rosa runs.") == ()


@given(st.lists(st.sampled_from(["Rosa", "Otto", "Pip", "runs", "Rosario", ","]), max_size=12))
def test_at_most_two_are_drawn_in_the_order_they_are_named(words: list[str]) -> None:
    cast = [character(name) for name in ("Pip", "Otto", "Rosa")]
    found = [one.name for one in drawn_in(cast, " ".join(words))]
    named = [word for word in dict.fromkeys(words) if word in ("Rosa", "Otto", "Pip")]
    assert found == named[:MOST_IN_FRAME]


# -- what is told ------------------------------------------------------------------------------------------------------


def test_a_warning_about_a_name_that_was_taught_is_none() -> None:
    def warning(names: str, reason: str = "NAME_UNFAMILIAR") -> StoryWarning:
        return StoryWarning(reason=reason, message="m", field="caption", metadata={"names": names})

    cast = [character("Rosa"), character("Miss Otto")]
    others = [warning("Rosa,Zed"), warning(""), warning("Rosa", "WORDS_UNFAMILIAR")]
    assert list(unfamiliar([warning("Rosa"), warning("Otto,Rosa,Miss"), *others], cast)) == others
    assert list(unfamiliar([warning("Rosa")], [])) == [warning("Rosa")]


# -- what is asked for and kept ----------------------------------------------------------------------------------------


def test_names_are_taken_tidy_or_refused_by_place() -> None:
    assert check_characters([" Rosa", "a" * 64]) == ("Rosa", "a" * 64)
    assert check_characters(["x" + str(n) for n in range(MOST_CHARACTERS)])
    for wanted, field in (
        (["Rosa", " "], "characters[1]"),
        (["x" * 101], "characters[0]"),
        (["a\nb"], "characters[0]"),
        (["x" + str(n) for n in range(MOST_CHARACTERS + 1)], "characters"),
    ):
        with pytest.raises(ValueOutOfRange) as caught:
            check_characters(wanted)
        assert caught.value.metadata["field"] == field
        assert len(caught.value.message) < 300
    with pytest.raises(CharacterRepeated):
        check_characters(["Rosa", "Rosa "])


def test_they_are_read_alike_over_both_protocols() -> None:
    over_grpc = story_request_from_pb(pb.CreateStoryRequest(image=b"i", caption="c", characters=["Rosa", "Otto"]))
    body = {"image": "aQ==", "caption": "c", "characters": ["Rosa", "Otto"]}
    assert over_grpc == read_json_body(json.dumps(body).encode(), "")
    assert over_grpc == read_form({"caption": "c", "characters": ["Rosa", "Otto"]}, b"i", "")
    assert over_grpc.characters == ("Rosa", "Otto")
    for wrong in ("Rosa", [1], None):
        with pytest.raises(InvalidArgument):
            read_json_body(json.dumps({**body, "characters": wrong}).encode(), "")


def test_a_key_names_the_characters_in_their_order() -> None:
    base = StoryRequest(image=b"i", caption="c")
    others = [replace(base, characters=each) for each in ((), ("Rosa",), ("Rosa", "Otto"), ("Otto", "Rosa"))]
    assert others[0].body_sha256() == base.body_sha256()
    assert len({each.body_sha256() for each in others}) == 4


def test_a_running_story_keeps_them_and_one_without_them_says_nothing() -> None:
    options = Options(frame_count=1, seed=1, pack="toon", temperature=0.2)
    assert options_to_json(options) == {"frame_count": 1, "seed": 1, "pack": "toon", "temperature": 0.2}
    cast = replace(options, characters=(character("Rosa"), character("Otto")), quality="best")
    kept = json.loads(json.dumps(options_to_json(cast)))  # as the workflow engine does
    assert options_from_json(kept) == cast
    assert options_from_json(options_to_json(options)) == options


def test_they_are_shown_without_what_only_services_need() -> None:
    options = Options(frame_count=1, seed=1, pack="toon", temperature=0.2, characters=(character("Rosa"),))
    story = Story(
        story_id="s", state=State.QUEUED, options=options, frames=(), create_us=0, update_us=0, last_sequence=1
    )
    (shown,) = story_to_pb(story).characters
    assert {field.name: value for field, value in shown.ListFields()} == {
        "name": "Rosa",
        "phrase": "a pink pig with a teal hat",
        "version_id": "RosaRosa",
    }
