"""What a pack knows, and what it says of captions and pictures beyond that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.models.tiny import build_tiny_pack
from services.models.world import FILE_NAME, World, words_of

WORLD = World(
    words=("bear", "beach", "blue", "cry", "dance", "found", "hop", "kite", "play", "smiling", "snow", "sun", "box"),
    characters={"Pip": "an orange cat with a blue scarf", "Mina": "a pink rabbit with a yellow bow"},
    names=("Tom",),
    places=("the beach", "the forest", "the park", "the farm"),
    things=("a kite", "a toy boat"),
    familiar_gain_db=2.5,
)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Pip found a kite at the beach.", ()),
        ("A spaceship found the beach.", ("spaceship",)),
        ("The robot, a robot's robots and a laser-beam!", ("robot", "robots", "laser", "beam")),
        ("Two kites, 3 boxes and 12th bears hopped, hopping, cried, cries, danced and dancing.", ()),
        ("She smiles and smiled; Pip's kite wasn't blue, it's sunny.", ()),
        ("A cat with a scarf is in the forest with a boat.", ()),  # told of in phrases, places and things
        ("The bears’ beaches", ()),
        ("", ()),
        ("🚀 !!! 42", ()),
    ],
)
def test_words_the_pack_never_read_are_found_in_whatever_form(caption: str, words: tuple[str, ...]) -> None:
    assert WORLD.unknown_words(caption) == words


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("Pip met Mina and Tom.", ()),
        ("Pip met an astronaut called Zed.", ("Zed",)),
        ("Zed's kite! Where is Zed?", ("Zed",)),  # at the start of a sentence, but no word either
        ("A bear called Snow found Pip.", ("Snow",)),  # a word elsewhere, here a name
        ('Snow at the beach. Kites! "Play," I said. On Monday He danced.', ()),
        ("Pip went to the Beach.", ()),
        ("The Bear And The Beach", ()),  # a title
        ("PIP FOUND A KITE", ()),
        ("Ada and Bo met Ada.", ("Ada", "Bo")),
    ],
)
def test_names_of_nobody_the_pack_knows_are_found(caption: str, names: tuple[str, ...]) -> None:
    assert WORLD.unknown_names(caption) == names


def test_a_name_is_not_told_as_a_word_too() -> None:
    assert WORLD.unknown_words("Zed found Snow.") == ()


def test_a_message_says_what_is_unknown_and_what_is_known() -> None:
    words, name = WORLD.unfamiliar_texts("Zed played in a spaceship.", "caption")
    assert (words.reason, words.field, dict(words.metadata)) == ("WORDS_UNFAMILIAR", "caption", {"words": "spaceship"})
    assert words.message == (
        "This pack has never drawn: spaceship. "
        "Among what it knows are the beach, the forest, the park, a kite and a toy boat."
    )
    assert (name.reason, name.field, dict(name.metadata)) == ("NAME_UNFAMILIAR", "caption", {"names": "Zed"})
    assert name.message == (
        "This pack has never met Zed, who may look different from frame to frame. Among those it knows are "
        "Pip (an orange cat with a blue scarf) and Mina (a pink rabbit with a yellow bow)."
    )


def test_a_long_list_is_cut_in_the_message_and_whole_in_the_metadata() -> None:
    strange = [f"{letter}{letter}zz" for letter in "qwertyu"]
    (words,) = WORLD.unfamiliar_texts(" ".join(strange), "caption")
    assert "qqzz, wwzz, eezz, rrzz, ttzz and 2 more." in words.message
    assert words.metadata == {"words": ",".join(strange)}


def test_a_picture_is_unfamiliar_below_the_level() -> None:
    assert WORLD.unfamiliar_picture(2.5, "image") is None
    told = WORLD.unfamiliar_picture(0.44, "image")
    assert told is not None
    assert (told.reason, told.field) == ("PICTURE_UNFAMILIAR", "image")
    assert told.metadata == {"gain_db": "0.4", "familiar_gain_db": "2.5"}
    assert "Pip (an orange cat with a blue scarf)" in told.message
    assert "the beach" in told.message


def test_a_pack_that_says_nothing_of_itself_never_warns(tmp_path: Path) -> None:
    nothing = World.load(tmp_path)
    assert nothing == World()
    assert nothing.unfamiliar_texts("Zed in a spaceship", "caption") == ()
    assert nothing.unfamiliar_picture(-30.0, "image") is None


def test_a_pack_is_sealed_with_what_it_knows(tmp_path: Path) -> None:
    pack = build_tiny_pack(tmp_path / "tiny", captions=False, world=WORLD)
    assert pack.path(FILE_NAME).is_file()
    assert World.load(pack.folder) == WORLD


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"words": ["Kite"]}, "Kite"),
        ({"words": ["two words"]}, "two words"),
        ({"words": "kite"}, "words"),
        ({"characters": {"Pip": ""}}, "Pip"),
        ({"characters": ["Pip"]}, "characters"),
        ({"places": [""]}, "places"),
        ({"things": [1]}, "things"),
        ({"places": ["the beach"], "there": {"the farm": "on"}}, "the farm"),
        ({"places": ["the beach"], "there": {"the beach": " "}}, "the beach"),
        ({"familiar_gain_db": "2"}, "familiar_gain_db"),
        ({"familiar_psnr": 2.0}, "familiar_psnr"),
    ],
)
def test_a_malformed_world_is_refused_by_the_name_of_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(change))
    with pytest.raises(ValueError, match=named) as refused:
        World.load(tmp_path)
    assert FILE_NAME in str(refused.value)


def test_a_world_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("[")
    with pytest.raises(ValueError, match=FILE_NAME):
        World.load(tmp_path)


def test_words_are_told_as_the_file_has_them() -> None:
    assert list(words_of("Pip's 2 kites weren't RED.")) == ["pip", "kites", "were", "red"]


@pytest.mark.parametrize(
    ("captions", "unknown", "known"),
    [
        (("Zed found a kite.",), ("Zed",), ()),
        (("Pip came.", "He met Zed."), ("Zed",), ("an orange cat with a blue scarf",)),  # Pip is "he"
        (("Zed found a kite", "Kites dance", "She played."), ("Zed",), ()),
        (("A dog found a kite", "Snow is on the beach", "She played."), (), ()),
        (("The dog danced in Paris.",), (), ()),
        (("Pip and Mina came.",), (), ("an orange cat with a blue scarf", "a pink rabbit with a yellow bow")),
        (("Tom came.",), ("Tom",), ()),  # a name the pack has read has no look either
    ],
)
def test_whom_a_picture_may_show(captions: tuple[str, ...], unknown: tuple[str, ...], known: tuple[str, ...]) -> None:
    assert WORLD.whom(captions, WORLD.characters) == (unknown, known)
