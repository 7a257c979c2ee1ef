"""The cast: enough of it, all different, and the new characters really new."""

import itertools

from training.toon.cast import MAIN, NEW, SIDE, SIDE_COUNT, SIDE_NAMES, combination, random_look
from training.toon.scene import ACTIONS, MOODS, PROPS, SETTINGS, TIMES


def test_the_world_is_as_large_as_promised():
    assert len(MAIN) >= 7
    assert len(NEW) >= 9
    assert len(SIDE) == SIDE_COUNT >= 300
    assert len(SETTINGS) >= 6
    assert len(TIMES) == 3
    assert len(ACTIONS) >= 8
    assert len(PROPS) >= 8
    assert len(MOODS) >= 5


def test_named_characters_differ_in_species_and_in_what_they_wear():
    for group in (MAIN, NEW):
        assert len({character.look.species for character in group}) == len(group)
        assert len({character.look.accessory for character in group}) == len(group)
    assert len({character.look.colour for character in MAIN}) == len(MAIN)


def test_no_two_characters_can_be_mistaken_for_each_other():
    looks = [combination(character.look) for character in MAIN + SIDE + NEW]
    assert len(set(looks)) == len(looks)
    ids = [character.id for character in MAIN + SIDE + NEW]
    assert len(set(ids)) == len(ids)


def test_no_side_character_is_a_new_one_in_disguise():
    new = {combination(character.look) for character in NEW}
    assert not new & {combination(character.look) for character in MAIN + SIDE}


def test_names_of_new_characters_belong_to_nobody_else():
    new = {character.name for character in NEW}
    assert not new & {character.name for character in MAIN + SIDE}
    assert not new & {name for name, _ in SIDE_NAMES}


def test_an_accessory_never_has_the_colour_of_the_fur():
    for look in itertools.chain((c.look for c in MAIN + NEW), (random_look("test", i) for i in range(500))):
        assert look.colour != look.accessory_colour


def test_what_is_new_in_a_new_character_is_the_combination_only():
    """Species, colours and accessories of new characters are all known from side characters."""
    for character in NEW:
        assert any(side.look.species == character.look.species for side in SIDE)
        assert any(side.look.colour == character.look.colour for side in SIDE)
        assert any(side.look.accessory == character.look.accessory for side in SIDE)
