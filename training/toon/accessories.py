"""Draws the one loud thing each character wears.

Hats, flowers, bows and glasses in head coordinates; scarves, ties, bandanas and capes in neck coordinates (the neck
is the origin, shoulders about 12 to each side).
"""

from __future__ import annotations

from collections.abc import Callable

from training.toon.colours import CREAM, OUTLINE, RGB, WHITE, mix, shade
from training.toon.pen import Pen, oval, polygon, scallops, smooth, spikes

GOLD: RGB = (255, 208, 60)


def _contrast(colour: RGB) -> RGB:
    """Return the colour of the small ornament on cloth: cream, or gold where cream would not be seen."""
    return GOLD if min(colour) > 200 else CREAM


def _bow(pen: Pen, colour: RGB, size: float = 1.0) -> None:
    with pen.moved(scale=size):
        for s in (-1, 1):
            pen.shape(smooth([(0, 0), (s * 9, -8), (s * 13.5, -5), (s * 13.5, 5), (s * 9, 8)]), colour)
            pen.line_through([(s * 4.5, 0), (s * 9, -1.5)], shade(colour), 1.3)
        pen.ellipse(0, 0, 4.0, 4.6, colour=mix(colour, OUTLINE, 0.14))


def _head_bow(pen: Pen, colour: RGB) -> None:
    with pen.moved(13, -1, turn=18):
        _bow(pen, colour, 0.98)


def _cap(pen: Pen, colour: RGB) -> None:
    pen.shape(smooth([(-19, 4), (-18, -6), (-9, -13), (3, -14), (14, -9), (18, 2), (8, 4), (-8, 5)]), colour)
    pen.shape(smooth([(6, 3), (18, -1), (31, 2), (33, 6), (22, 8), (8, 7)]), shade(colour))
    pen.ellipse(-1, -13.5, 2.6, 2.2, colour=_contrast(colour))
    pen.line_through([(-1, -12), (-4, -5), (-5, 4)], shade(colour), 1.3)


def _party_hat(pen: Pen, colour: RGB) -> None:
    cone = polygon([(-12, 4), (0, -24), (12, 4)])
    pen.fill(cone, colour)
    with pen.clipped(cone):
        for y in (-14, -5, 4):
            pen.line_through([(-14, y + 4), (14, y - 4)], _contrast(colour), 3.2)
    pen.stroke(cone)
    pen.ellipse(0, -24.5, 4.2, colour=_contrast(colour))


def _top_hat(pen: Pen, colour: RGB) -> None:
    pen.shape(polygon([(-11, 3), (-12.5, -19), (12.5, -19), (11, 3)]), colour)
    pen.fill(polygon([(-10.4, 2), (-10.9, -5), (10.9, -5), (10.4, 2)]), _contrast(colour))
    pen.shape(smooth([(-19, 3), (0, 1), (19, 3), (18, 6.5), (0, 7.5), (-18, 6.5)]), colour)


def _beanie(pen: Pen, colour: RGB) -> None:
    pen.shape(smooth([(-19, 4), (-17, -8), (-8, -16), (8, -16), (17, -8), (19, 4)]), colour)
    for x in (-9, 0, 9):
        pen.line_through([(x * 0.7, -14), (x, -1)], shade(colour), 1.5)
    pen.box(-20, 0, 40, 7.5, colour=_contrast(colour), round_=3.6)
    pen.shape(scallops(0, -18, 4.6, 4.6, 8, 2), _contrast(colour))


def _flower(pen: Pen, colour: RGB) -> None:
    with pen.moved(13, -1):
        pen.shape(scallops(0, 0, 7.2, 7.2, 6, 8.5), colour)
        pen.ellipse(0, 0, 4.0, colour=GOLD if colour[2] > 90 or colour[1] < 150 else WHITE)


def _crown(pen: Pen, colour: RGB) -> None:
    pen.shape(polygon([(-15, 4), (-17, -14), (-8, -6), (0, -19), (8, -6), (17, -14), (15, 4)]), colour)
    for x, y in ((-17, -14), (0, -19), (17, -14)):
        pen.ellipse(x, y, 2.6, colour=_contrast(colour))
    for x in (-8, 0, 8):
        pen.disc(x, -1, 2.1, colour=_contrast(colour))


def _wizard_hat(pen: Pen, colour: RGB) -> None:
    pen.shape(smooth([(-13, 3), (-7, -14), (4, -27), (14, -26), (8, -19), (10, -8), (13, 3)]), colour)
    pen.shape(smooth([(-26, 4), (0, -1), (26, 4), (18, 8), (0, 9), (-18, 8)]), colour)
    for x, y, r in ((-3, -5, 3.6), (5, -15, 2.8)):
        pen.fill(spikes(x, y, r * 0.45, r * 0.45, 5, r * 0.75, turn=-0.9), _contrast(colour))


def _earmuffs(pen: Pen, colour: RGB) -> None:
    pen.line_through([(-22, 14), (-19, -1), (0, -9), (19, -1), (22, 14)], OUTLINE, 6.4)
    pen.line_through([(-22, 14), (-19, -1), (0, -9), (19, -1), (22, 14)], mix(colour, WHITE, 0.45), 2.6)
    for s in (-1, 1):
        pen.shape(scallops(s * 22.5, 17, 7, 8, 9, 2.4), colour)


def _straw_hat(pen: Pen, colour: RGB) -> None:
    pen.shape(smooth([(-27, 5), (0, -2), (27, 5), (20, 9), (0, 10), (-20, 9)]), mix(colour, CREAM, 0.45))
    pen.shape(smooth([(-15, 4), (-13, -8), (0, -13), (13, -8), (15, 4), (0, 6)]), mix(colour, CREAM, 0.45))
    pen.shape(smooth([(-15, 4), (-15, -1), (0, 1), (15, -1), (15, 4), (0, 7)]), colour)


def _glasses(pen: Pen, colour: RGB, spot: tuple[float, float]) -> None:
    x, y = spot
    for s in (-1, 1):
        ring = oval(s * (x + 0.6), y, 9.2, 9.6)
        pen.stroke(ring, OUTLINE, 5.2)
        pen.stroke(ring, colour, 3.0)
        pen.line_through([(s * (x + 10), y - 1), (s * 24, y - 3)], OUTLINE, 3.4)
    pen.line_through([(-1.6, y - 1), (0, y - 2), (1.6, y - 1)], colour, 2.6)


def _scarf(pen: Pen, colour: RGB) -> None:
    pen.shape(smooth([(5, 3), (13, 3), (15, 20), (7, 21)]), colour)
    pen.line_through([(7.4, 16), (14, 15.4)], _contrast(colour), 2.0)
    pen.shape(smooth([(-16, -2), (0, 2.2), (16, -2), (17, 3.4), (12, 6.4), (0, 8.6), (-12, 6.4), (-17, 3.4)]), colour)
    pen.line_through([(-6, 3.0), (-5, 7.2)], shade(colour), 1.4)


def _bow_tie(pen: Pen, colour: RGB) -> None:
    with pen.moved(0, 4.5):
        _bow(pen, colour, 1.05)


def _bandana(pen: Pen, colour: RGB) -> None:
    pen.shape(smooth([(-16, -2), (0, 2), (16, -2), (15, 4), (5, 11), (0, 17.5), (-5, 11), (-15, 4)]), colour)
    for x, y in ((-6, 5), (0, 10), (6, 5)):
        pen.disc(x, y, 1.6, colour=_contrast(colour))


def _cape_collar(pen: Pen, colour: RGB) -> None:
    pen.shape(smooth([(-15, -2), (0, 2), (15, -2), (15, 4), (0, 7.5), (-15, 4)]), colour)
    pen.ellipse(0, 5, 3.8, colour=GOLD if colour[0] < 240 or colour[1] < 180 else WHITE)


def draw_cape_behind(pen: Pen, colour: RGB) -> None:
    """Draw the cloth of a cape, behind the body; neck coordinates."""
    pen.shape(
        smooth(
            [
                (-12, -3),
                (12, -3),
                (25, 9),
                (36, 27),
                (24, 26),
                (12, 31),
                (0, 28),
                (-12, 31),
                (-24, 26),
                (-36, 27),
                (-25, 9),
            ]
        ),
        colour,
    )


HEADWEAR: dict[str, Callable[[Pen, RGB], None]] = {
    "bow": _head_bow, "cap": _cap, "party hat": _party_hat, "top hat": _top_hat, "beanie": _beanie, "flower": _flower,
    "crown": _crown, "wizard hat": _wizard_hat, "earmuffs": _earmuffs, "straw hat": _straw_hat,
}  # fmt: skip
EYEWEAR: dict[str, Callable[[Pen, RGB, tuple[float, float]], None]] = {"glasses": _glasses}
NECKWEAR: dict[str, Callable[[Pen, RGB], None]] = {
    "scarf": _scarf, "bow tie": _bow_tie, "bandana": _bandana, "cape": _cape_collar,
}  # fmt: skip
