"""The thread guard's rules."""

from __future__ import annotations

import pytest

from services.models.captions.cast import Cast
from services.models.captions.thread import (
    UNNAMED_MAX,
    doubles_somebody,
    faults,
    hero_of,
    loses_thread,
    openings,
    people,
    with_hero,
)
from services.models.world import World

CAST = Cast(("Mina", "Pip"))


@pytest.mark.parametrize(
    ("first", "hero"),
    [
        ("Pip met Mina.", "Pip"),
        ("Once Zora met Mina.", "Mina"),
        ("One day, Zora found a kite.", "Zora"),
        ("The girl found a kite. Nobody saw it.", None),
        ("A kite!", None),
    ],
)
def test_the_hero_is_whom_the_first_caption_names_first(first: str, hero: str | None) -> None:
    assert hero_of([first, "Pip came."], CAST) == hero


def test_a_hero_may_go_unnamed_for_a_while_and_no_longer() -> None:
    story = ["Mina slept."]
    for _ in range(UNNAMED_MAX):
        assert not loses_thread("She ran.", story, CAST)
        story.append("She ran.")
    assert loses_thread("She ran.", story, CAST)
    assert not loses_thread("Then Mina ran.", story, CAST)
    assert not loses_thread("She ran.", [*story, "Mina ran."], CAST)
    assert loses_thread("Minas ran.", story, CAST), "part of another word is no name"


def test_other_tries_begin_with_a_hero_who_was_lost_and_else_with_nothing() -> None:
    story = ["Mina slept.", "She woke.", "She ran."]
    assert openings("She sat.", story, CAST, World()) == ("Mina was", "Mina ran")
    assert openings("Then Mina sat.", story, CAST, World()) == ()
    assert openings("She sat.", ["A girl.", "She woke.", "She ran."], CAST, World()) == ()


@pytest.mark.parametrize(
    ("first", "begin"),
    [
        ("One day, Zora found a kite.", True),
        ("On Monday a bear found a kite.", False),
        ("One day in Paris a bear found a kite.", False),
        ("It was Christmas Eve.", False),
        ("One day, Zora found a skateboard.", False),  # who knows what the capital means in words nobody knows
        ("Der Bär fand einen Drachen.", False),
    ],
)
def test_no_try_begins_with_what_is_nobodys_name(first: str, begin: bool) -> None:
    world = World(words=("one", "day", "found", "kite", "bear", "was", "ran", "sat", "it"), names=("Zora",))
    story = [first, "It sat.", "It ran."]
    assert bool(openings("It sat.", story, CAST, world)) == begin
    assert not openings("It sat.", story, CAST, World()), "without a word to go by"


def test_a_story_without_a_hero_has_no_thread_to_lose() -> None:
    assert not loses_thread("She ran.", ["A girl.", "She sat.", "She ran."], CAST)
    assert not loses_thread("She ran.", [], CAST)


def test_nobody_is_two() -> None:
    assert doubles_somebody("Mina picked it up, and here came Mina.", CAST)
    assert not doubles_somebody("Mina was cross with Pip, and Pip was cross with Mina.", CAST)
    assert not doubles_somebody('"Mina!" called Pip. "Where is Mina?"', CAST)
    assert not doubles_somebody("Mina ran. Mina fell.", CAST), "two sentences may well begin alike"
    assert faults("Mina and Mina ran.", ["Pip slept.", "He woke.", "He ran."], CAST) == 2
    assert faults("Pip ran.", ["Pip slept."], CAST) == 0


def test_she_is_the_hero_where_she_can_be_nobody_else() -> None:
    story = ["Mina slept.", "She woke."]
    assert with_hero("At the beach, she saw that she was lost.", story, CAST) == (
        "At the beach, Mina saw that she was lost."
    )
    assert with_hero("She\u2019d lost it, and she cried.", story, CAST) == "She\u2019d lost it, and Mina cried."
    assert with_hero("She met Pip.", story, CAST) == "She met Pip."
    assert with_hero("It rained.", story, CAST) == "It rained."
    assert with_hero("She ran.", ["A girl slept."], CAST) == "She ran."


@pytest.mark.parametrize(
    ("first", "hero"),
    [
        ("Sunny days came and Mina waved.", "Mina"),
        ("Then Sunny waved to Mina.", "Sunny"),
        ("Will Mina come?", "Mina"),
        ("Rosa Lee waved to Mina.", "Rosa Lee"),
    ],
)
def test_a_learned_name_that_is_only_a_word_is_no_hero(first: str, hero: str) -> None:
    world = World(words=("sunny", "days", "came", "and", "waved", "will"), characters={"Mina": "a white sheep"})
    learned = people(("Sunny", "Will", "Rosa Lee"), [first], world)
    assert hero_of([first], Cast((*CAST.names, *learned))) == hero
    assert people(("Sunny",), ["Sunny days."], World()) == ("Sunny",), "a pack that does not say which words it knows"


def test_a_name_is_put_in_as_it_is() -> None:
    assert with_hero("She ran.", ["Ro\\1 slept."], Cast(("Ro\\1",))) == "Ro\\1 ran."
