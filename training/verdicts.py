"""What is to be seen in a picture of the world, in the world's words, and how much of it somebody got right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.questions import NO_PROP, SCENE_QUESTIONS, SOMEBODY_ELSE, scene_answers, slot_answers
from training.toon.scene import Scene


@dataclass(frozen=True, kw_only=True)
class Someone:
    """One figure of a picture, in the world's words. `who` is an id of the main cast, or "somebody else"."""

    who: str
    species: str
    colour: str
    accessory: str
    accessory_colour: str
    action: str
    mood: str
    prop: str  # "none" for empty hands

    @property
    def look(self) -> tuple[str, str, str, str]:
        """What it is recognised by."""
        return self.species, self.colour, self.accessory, self.accessory_colour


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be seen in one picture: figures from left to right, and the place."""

    figures: tuple[Someone, ...]
    setting: str
    time: str
    side: str
    weather: str
    ground_prop: str  # "none" where nothing lies about

    @property
    def characters(self) -> frozenset[str]:
        """Ids of the main cast."""
        return frozenset(one.who for one in self.figures) - {SOMEBODY_ELSE}


def truth(scene: Scene) -> Verdict:
    """What a perfect judge would say of `scene`."""
    return Verdict(figures=tuple(Someone(**slot_answers(actor)) for actor in scene.actors), **scene_answers(scene))


def _matched(said: Verdict, true: Verdict) -> list[tuple[Someone | None, Someone]]:
    """Each true figure with the one seen in its place; None where the picture has another number of figures."""
    if len(said.figures) != len(true.figures):
        return [(None, one) for one in true.figures]
    return list(zip(said.figures, true.figures, strict=True))


_OF_PICTURES = ("count", "characters", "whole", "apart")
_OF_FIGURES = ("species", "look", "colours", "action", "mood")


def _is_kept_apart(pairs: Sequence[tuple[Someone | None, Someone]]) -> bool:
    """Nobody is missing or doubled, and nobody has a part of somebody else's look in the place of an own one."""
    seen = [one for one, _ in pairs if one is not None]
    if len(seen) < len(pairs) or len({one.look for one in seen}) < len({one.look for _, one in pairs}):
        return False
    return not any(
        a != b and any(a == other.look[part] for other_number, (_, other) in enumerate(pairs) if other_number != number)
        for number, (found, wanted) in enumerate(pairs)
        if found is not None
        for part, (a, b) in enumerate(zip(found.look, wanted.look, strict=True))
    )


def outcomes(said: Sequence[Verdict], true: Sequence[Verdict]) -> dict[str, list[bool]]:
    """Right or wrong, per question: an entry a picture or, where said so, a figure (all wrong if their number is).

    characters      pictures with exactly the true ones of the main cast (and as many figures as there should be)
    whole           pictures in which everybody is who should be there, with the right look: nobody missing or blended
    apart           pictures in which nobody is missing, doubled or has a part of another's look; what is wrong in
                    somebody's look and nobody else's in the picture does not count
    look, colours   figures with the right species, colour and accessory; with the right colours alone
    action, mood    figures
    prop            pictures that have a thing, held or lying about: all of them right
    no_prop         pictures that have none: none seen
    """
    scene = [name for name in SCENE_QUESTIONS if name != "ground_prop"]
    out: dict[str, list[bool]] = {name: [] for name in (*_OF_PICTURES, *_OF_FIGURES, "prop", "no_prop", *scene)}
    for seen, real in zip(said, true, strict=True):
        pairs = _matched(seen, real)
        out["count"].append(len(seen.figures) == len(real.figures))
        out["characters"].append(out["count"][-1] and seen.characters == real.characters)
        out["whole"].append(all(a is not None and a.look == b.look for a, b in pairs))
        out["apart"].append(_is_kept_apart(pairs))
        for a, b in pairs:
            out["species"].append(a is not None and a.species == b.species)
            out["look"].append(a is not None and a.look == b.look)
            out["colours"].append(a is not None and (a.colour, a.accessory_colour) == (b.colour, b.accessory_colour))
            out["action"].append(a is not None and a.action == b.action)
            out["mood"].append(a is not None and a.mood == b.mood)
        things = [(a.prop if a is not None else "", b.prop) for a, b in pairs] + [(seen.ground_prop, real.ground_prop)]
        has_one = any(b != NO_PROP for _, b in things)
        out["prop" if has_one else "no_prop"].append(all(a == b for a, b in things))
        for name in ("setting", "time", "side", "weather"):
            out[name].append(getattr(seen, name) == getattr(real, name))
    return out


def agreement(said: Sequence[Verdict], true: Sequence[Verdict]) -> dict[str, float]:
    """Share of right answers per question of `outcomes`; questions that never came up are left out."""
    return {name: sum(values) / len(values) for name, values in outcomes(said, true).items() if values}
