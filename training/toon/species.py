"""What each species is built of: parts by name, as data.

A species is a row of a table; `parts` draws the rows. Adding an animal adds a row here and its name in
`scene.SPECIES`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Build:
    """The parts of a species. Radii are those of the head."""

    ears: str
    muzzle: str
    tail: str
    marks: tuple[str, ...] = ()
    head_radii: tuple[float, float] = (23.0, 20.0)
    eye_spot: tuple[float, float] = (9.0, -1.6)
    hat_y: float = -20.5  # where a hat sits, in head coordinates
    dark_limbs: bool = False  # arms and legs in the darker marking colour
    bird: bool = False  # orange feet, wings for arms
    belly_ratio: float = 0.66


BUILDS: dict[str, Build] = {
    "rabbit": Build(ears="long", muzzle="buck", tail="puff", head_radii=(22.0, 19.5)),
    "cat": Build(ears="pointed", muzzle="whiskers", tail="thin", marks=("forehead_stripes",)),
    "bear": Build(ears="round", muzzle="snout", tail="none"),
    "fox": Build(ears="tall_pointed", muzzle="mask", tail="bushy", head_radii=(24.0, 19.0)),
    "frog": Build(
        ears="none", muzzle="wide", tail="none", head_radii=(25.0, 17.5), eye_spot=(11.5, -15.0), hat_y=-25.0
    ),
    "duck": Build(ears="tuft", muzzle="bill", tail="feathers", bird=True, head_radii=(21.5, 20.0)),
    "owl": Build(ears="horned", muzzle="beak", tail="none", marks=("eye_discs",), bird=True, eye_spot=(9.6, -2.0)),
    "penguin": Build(
        ears="none",
        muzzle="beak",
        tail="none",
        marks=("heart_face",),
        bird=True,
        head_radii=(21.5, 20.0),
        belly_ratio=0.8,
    ),
    "elephant": Build(ears="flaps", muzzle="trunk", tail="thin", head_radii=(21.0, 20.0)),
    "mouse": Build(ears="huge_round", muzzle="whiskers", tail="long_pink", head_radii=(21.0, 18.5)),
    "pig": Build(ears="folded", muzzle="pig", tail="curl"),
    "dog": Build(ears="floppy", muzzle="snout", tail="wag", marks=("eye_patch",)),
    "monkey": Build(ears="side_round", muzzle="monkey", tail="long", head_radii=(21.5, 20.0)),
    "koala": Build(ears="fluffy", muzzle="big_nose", tail="none"),
    "panda": Build(ears="round_dark", muzzle="snout", tail="none", marks=("panda_eyes",), dark_limbs=True),
    "lion": Build(ears="round", muzzle="snout", tail="tuft_tail", marks=("mane",), head_radii=(20.5, 18.5)),
    "sheep": Build(ears="drop", muzzle="plain", tail="puff", marks=("wool",), head_radii=(20.5, 19.0)),
    "hedgehog": Build(ears="tiny", muzzle="pointed_nose", tail="none", marks=("quills",), head_radii=(20.5, 18.5)),
    "dragon": Build(ears="horns", muzzle="nostrils", tail="spiked", marks=("back_spikes",)),
    "raccoon": Build(ears="pointed", muzzle="snout_small", tail="ringed", marks=("bandit",)),
    "deer": Build(ears="antlers", muzzle="snout", tail="puff", marks=("dots",), head_radii=(21.0, 20.0)),
    "squirrel": Build(ears="tufted_small", muzzle="buck", tail="giant", head_radii=(21.5, 19.0)),
    "tiger": Build(ears="round", muzzle="snout_small", tail="ringed", marks=("stripes",)),
    "cow": Build(ears="cow", muzzle="cow", tail="tuft_tail", marks=("spots",), head_radii=(21.5, 20.0)),
}
