"""Where the limbs of a character are for each action.

One big-headed skeleton for every species: origin between the feet, y downwards, so up is negative; units are picture
units at scale 1. Everything is fixed per action (who waves, waves with the hand on the picture's right), because what
a text does not tell a model would average.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.toon.pen import Point

FRONT_PROPS = ("gift", "cake", "book", "ball", "boat")  # held with both hands before the belly
SIDE_PROPS = ("kite", "balloon", "umbrella", "lantern")  # held up with the hand on the picture's right
ACROSS_PROPS = ("guitar",)


@dataclass(frozen=True, kw_only=True)
class Pose:
    """A skeleton in one position. Hands and feet are (picture left, picture right)."""

    body: Point = (0, -24)
    body_radii: Point = (15.5, 16.5)
    head: Point = (0, -55)
    head_tilt: float = 0.0
    shoulders: tuple[Point, Point] = ((-11.5, -32), (11.5, -32))
    elbows: tuple[Point, Point] = ((-18, -26), (18, -26))
    hands: tuple[Point, Point] = ((-19.5, -17), (19.5, -17))
    hips: tuple[Point, Point] = ((-7.5, -13), (7.5, -13))
    feet: tuple[Point, Point] = ((-9, -3.5), (9, -3.5))
    lift: float = 0.0
    lean: float = 0.0  # degrees, clockwise, around the feet
    seated: bool = False
    lying: bool = False


STAND = Pose()
POSES: dict[str, Pose] = {
    "stand": STAND,
    "wave": replace(STAND, head_tilt=-5, elbows=((-18, -26), (24, -34)), hands=((-19.5, -17), (31, -50))),
    "run": replace(
        STAND,
        lean=9,
        lift=3,
        head=(3, -55),
        elbows=((-20, -30), (19, -23)),
        hands=((-24, -20), (26, -34)),
        feet=((-19, -9), (16, -2)),
        hips=((-7, -13), (7, -13)),
    ),
    "jump": replace(
        STAND,
        lift=13,
        elbows=((-22, -35), (22, -35)),
        hands=((-32, -44), (32, -44)),
        feet=((-15, -6), (15, -6)),
    ),
    "sit": replace(
        STAND,
        body=(0, -17),
        body_radii=(16, 15.5),
        head=(0, -47),
        shoulders=((-11.5, -25), (11.5, -25)),
        elbows=((-18, -18), (18, -18)),
        hands=((-15, -8.5), (15, -8.5)),
        feet=((-14, -4), (14, -4)),
        seated=True,
    ),
    "sleep": replace(STAND, body=(15, -14), body_radii=(27, 14.5), head=(-11, -23), head_tilt=-6, lying=True),
    "cry": replace(STAND, head_tilt=6, head=(0, -54), elbows=((-18, -26), (23, -35)), hands=((-19.5, -17), (14, -47))),
    "hold": STAND,
    "cheer": replace(
        STAND, elbows=((-23, -40), (23, -40)), hands=((-27, -63), (27, -63)), feet=((-11, -3.5), (11, -3.5))
    ),
    "dance": replace(
        STAND,
        lean=-7,
        head_tilt=-7,
        elbows=((-26, -27), (24, -38)),
        hands=((-13, -19), (27, -59)),
        feet=((-7, -3.5), (21, -11)),
    ),
    "point": replace(STAND, head_tilt=3, elbows=((-24, -26), (25, -32)), hands=((-12, -19), (38, -35))),
}


def pose_for(action: str, prop: str | None) -> Pose:
    """Return the skeleton of an action; holding depends on how the thing is carried."""
    pose = POSES[action]
    if prop is None:
        return pose
    if prop in FRONT_PROPS:
        return replace(pose, elbows=((-21, -25), (21, -25)), hands=((-14.5, -18), (14.5, -18)))
    if prop in ACROSS_PROPS:
        return replace(pose, elbows=((-22, -24), (23, -26)), hands=((-7, -17), (25, -32)))
    return replace(pose, elbows=((-18, -26), (23, -26)), hands=((-19.5, -17), (32, -33)))
