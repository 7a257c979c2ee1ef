"""What the toon world tells a pack to know: its own words and people, and nobody it never drew."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.models.tiny import build_tiny_pack
from services.models.world import World
from training.toon import knowledge
from training.toon.cast import MAIN, NEW
from training.toon.scene import PROPS, SETTINGS
from training.toon.world import sample_story


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = build_tiny_pack(tmp_path_factory.mktemp("packs") / "tiny", captions=False).folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knowledge, "STORIES", 600)
        patch.setattr(knowledge, "FRAMES", 200)
        patch.setattr(knowledge, "PICTURES", 2)
        knowledge.write_knowledge(folder)
    return World.load(folder)


def test_it_names_everybody_and_everything_of_the_world(world: World) -> None:
    assert world.characters["Pip"] == "an orange cat with a blue scarf"
    assert set(world.characters) == {character.name for character in MAIN}
    assert len(world.places) == len(SETTINGS)
    assert world.there == {"the beach": "at", "the farm": "on"}
    assert len(world.things) == len(PROPS)
    assert world.familiar_gain_db is not None


def test_new_characters_are_nobody_it_knows(world: World) -> None:
    for character in NEW:
        assert world.unknown_names(f"Pip met {character.name}.") == (character.name,)


def test_its_own_unseen_stories_draw_no_warning(world: World) -> None:
    captions = [frame.caption for seed in range(40) for frame in sample_story(seed, "test").frames]
    warned = [caption for caption in captions if world.unfamiliar_texts(caption, "caption")]
    assert len(warned) <= len(captions) // 50, warned  # fewer texts were read for this test than for a pack


def test_what_is_not_of_the_world_draws_one(world: World) -> None:
    reasons = [told.reason for told in world.unfamiliar_texts("Zed flew his spaceship.", "caption")]
    assert reasons == ["WORDS_UNFAMILIAR", "NAME_UNFAMILIAR"]


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="vae"):
        knowledge.world_knowledge(tmp_path)
