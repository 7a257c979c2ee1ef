"""The folder that a story leaves: self-contained, escaped, accessible."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabula_cli.storybook import contact_sheet, index_page, story_facts, story_page, write_storybook
from fabula_client import Reason, State, StoryCharacter
from PIL import Image

from tests.unit.cli.beginnings import NASTY, made_story, warning


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_storys_own_text_is_only_ever_text() -> None:
    story, images = made_story([NASTY, NASTY], description=NASTY, error=Reason(reason="X", message=NASTY))
    text = story_page(story, images)
    page = Page(text)
    assert page.all("script") == []
    assert page.all("image") == []
    assert "<script>alert(1)</script>" in page.words  # shown, as written
    assert "{{ 7*7 }}" in page.words  # not evaluated
    assert page.all("img")[1]["alt"] is not None
    assert "<script>alert(1)</script>" in str(page.all("img")[1]["alt"])
    assert "\x1b" not in text


def test_the_page_needs_nothing_from_outside() -> None:
    story, images = made_story(["One.", "Two.", "Three."])
    text = story_page(story, images)
    page = Page(text)
    sources = [str(attributes["src"]) for attributes in page.all("img")]
    assert len(sources) == 3
    for source, data in zip(sources, images.values(), strict=True):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == data
    assert page.all("link") == []
    assert re.findall(r"(?:https?:)?//[a-z]", re.sub(r"data:[^\"]+", "", text)) == []
    policy = next(attributes for attributes in page.all("meta") if attributes.get("http-equiv"))
    assert "default-src 'none'" in str(policy["content"])


def test_the_page_tells_how_each_frame_was_made() -> None:
    story, images = made_story(["One.", "Two."])
    words = Page(story_page(story, images)).words
    for fact in ("1001", "2001", "3001", "5.2 s", "sha256:feed", "A fox on a hill.", story.frames[1].image_sha256):
        assert fact in words


def test_the_page_tells_of_learned_characters() -> None:
    story, _ = made_story(["One."])
    assert "Learned characters" not in dict(story_facts(story))
    rosa = StoryCharacter(name="Rosa", phrase="a pink pig", version_id="a" * 64)
    assert dict(story_facts(replace(story, characters=(rosa,))))["Learned characters"] == f"Rosa ({'a' * 12})"


def test_the_page_tells_the_quality_unless_it_is_the_usual_one() -> None:
    story, images = made_story(["One.", "Two."])
    assert "Quality" not in Page(story_page(story, images)).words
    quick = replace(story, settings=replace(story.settings, quality="draft"))
    assert ("Quality", "draft") in story_facts(quick)
    assert "Quality" in Page(story_page(quick, images)).words


def test_what_the_pack_did_not_know_is_a_quiet_note(tmp_path: Path) -> None:
    story, images = made_story(["One.", "Two."], warnings=(warning("It never drew: robot."), warning(NASTY)))
    text = story_page(story, images)
    page = Page(text)
    assert [each["class"] for each in page.all("p") if each.get("class") == "note"] == ["note", "note"]
    assert "It never drew: robot." in page.words
    assert page.all("script") == []
    assert "\x1b" not in text
    book = write_storybook(tmp_path, story, images)
    assert json.loads(book.data.read_text())["warnings"][0]["metadata"] == {"words": "robot"}
    familiar, _ = made_story(["One.", "Two."])
    assert 'class="note"' not in story_page(familiar, images)


def test_every_picture_has_alternative_text_and_a_size() -> None:
    story, images = made_story(["One.", "Two."])
    for attributes in Page(story_page(story, images)).all("img"):
        assert attributes["alt"]
        assert attributes["width"] == "64"


def test_a_folder_holds_sheet_page_data_and_frames(tmp_path: Path) -> None:
    story, images = made_story(["One.", "Two.", "Three."])
    (tmp_path / "frame-9.png").write_bytes(b"of an earlier, longer story")
    book = write_storybook(tmp_path, story, images)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "contact_sheet.png",
        "frame-0.png",
        "frame-1.png",
        "frame-2.png",
        "story.gif",
        "story.html",
        "story.json",
    ]
    document = json.loads(book.data.read_text())
    assert document["state"] == "succeeded"
    assert document["settings"]["seed"] == 7
    for frame in document["frames"]:
        assert (tmp_path / frame["image"]).read_bytes() == images[frame["image_sha256"]]
    with Image.open(book.contact_sheet) as sheet:
        assert sheet.width > 3 * 256


def test_a_story_that_failed_half_way_keeps_what_it_has(tmp_path: Path) -> None:
    error = Reason(reason="RENDER_FAILED", message="It could not be drawn.")
    story, images = made_story(["One.", "Two."], state=State.FAILED, error=error, undrawn=frozenset({1}))
    book = write_storybook(tmp_path, story, images)
    assert [path.name for path in book.frames] == ["frame-0.png"]
    assert json.loads(book.data.read_text())["frames"][1]["image"] is None
    assert "RENDER_FAILED" in book.page.read_text()


@pytest.mark.parametrize("count", [1, 4, 5, 21])
@pytest.mark.parametrize("size", [(64, 64), (512, 128), (3, 900)])
def test_a_contact_sheet_holds_any_number_and_shape(count: int, size: tuple[int, int]) -> None:
    captions = ["שלום 👋 " + "word " * 80, "x" * 400, ""] * 7
    story, images = made_story(captions[:count], size=size)
    sheet = contact_sheet([(frame, images[frame.image_sha256]) for frame in story.frames])
    assert sheet.width == min(count, 5) * 272 + 16


def test_the_index_leads_to_every_story() -> None:
    story, _ = made_story([NASTY, "Two."])
    page = Page(index_page([("first", story, Path("first")), ("second", story, Path("second"))]))
    assert [attributes["href"] for attributes in page.all("a")][::2] == ["first/story.html", "second/story.html"]
    assert page.all("script") == []


def test_a_story_moves_in_a_gif_that_leaves_time_to_read(tmp_path: Path) -> None:
    story, images = made_story(["One.", "A second caption with quite a few more words in it.", "Three."])
    book = write_storybook(tmp_path, story, images)
    assert book.animation is not None
    with Image.open(book.animation) as moving:
        assert moving.n_frames == 3
        assert moving.info["loop"] == 0
        shown_ms = []
        for number in range(moving.n_frames):
            moving.seek(number)
            shown_ms.append(moving.info["duration"])
    assert shown_ms[1] > shown_ms[0] == shown_ms[2] >= 1000
    assert book.animation.stat().st_size > 1000


def test_a_story_without_a_frame_has_no_gif(tmp_path: Path) -> None:
    story, _ = made_story(["One."])
    assert write_storybook(tmp_path, story, {}).animation is None
    assert not (tmp_path / "story.gif").exists()
