"""Draws the things that characters hold or that lie on the ground.

Each is drawn around its grip: the origin is where a hand takes it. A prop has one look, so that a word is enough for
it, and is at least 35 units in its longer direction.
"""

from __future__ import annotations

from collections.abc import Callable

import skia

from training.toon.colours import CREAM, OUTLINE, RGB, WHITE, shade
from training.toon.pen import Pen, oval, polygon, smooth

RED: RGB = (232, 60, 62)
BLUE: RGB = (58, 128, 236)
YELLOW: RGB = (255, 210, 60)
GREEN: RGB = (62, 172, 96)
PURPLE: RGB = (140, 84, 204)
WOOD: RGB = (186, 118, 62)


def _kite(pen: Pen) -> None:
    pen.line_through([(0, 0), (1, -8), (2, -12)], width=1.5)
    diamond = [(2.0, -46.0), (17.0, -28.0), (2.0, -8.0), (-12.0, -28.0)]
    pen.fill(polygon(diamond), RED)
    pen.fill(polygon([diamond[0], diamond[1], (2, -28)]), YELLOW)
    pen.fill(polygon([(2, -28), diamond[2], diamond[3]]), YELLOW)
    pen.stroke(polygon(diamond))
    pen.line_through([(2, -46), (2, -8)], width=1.3)
    pen.line_through([(-12, -28), (17, -28)], width=1.3)
    pen.line_through([(2, -8), (8, -3), (6, 3), (12, 9)], width=1.5)
    for x, y in ((8, -3), (11.5, 8)):
        pen.shape(
            polygon([(x - 4.5, y - 2.6), (x - 4.5, y + 2.6), (x + 4.5, y - 2.6), (x + 4.5, y + 2.6)]), BLUE, width=1.3
        )


def _balloon(pen: Pen) -> None:
    pen.line_through([(0, 2), (2, -6), (0, -13)], width=1.5)
    pen.shape(polygon([(-2.6, -11), (2.6, -11), (0, -15)]), BLUE, width=1.6)
    pen.shape(smooth([(0, -14.5), (-11, -24), (-13, -34), (-8, -44), (0, -47), (8, -44), (13, -34), (11, -24)]), BLUE)
    pen.disc(-5.5, -38, 2.6, 4.4, colour=(190, 222, 255))


def _gift(pen: Pen) -> None:
    pen.box(-16.5, -13, 33, 27, colour=PURPLE, round_=1.5)
    pen.box(-4, -13, 8, 27, colour=YELLOW, outlined=False)
    pen.box(-18.5, -17, 37, 9, colour=PURPLE, round_=2)
    pen.box(-4, -16, 8, 7.2, colour=YELLOW, outlined=False)
    for s in (-1, 1):
        pen.shape(smooth([(0, -17), (s * 6, -25), (s * 12, -23), (s * 9, -18)]), YELLOW, width=1.7)
    pen.ellipse(0, -18.4, 2.8, 2.4, colour=YELLOW, width=1.5)


def _cake(pen: Pen) -> None:
    pen.ellipse(0, 12, 21, 4, colour=WHITE)
    pen.box(-16, -7, 32, 19, colour=(255, 214, 160), round_=3)
    pen.box(-15, 1.4, 30, 4, colour=(232, 92, 112), outlined=False)
    pen.shape(
        smooth(
            [(-16, -3), (-16, -11), (0, -13), (16, -11), (16, -3), (11, 0.6), (6, -3), (0, 1), (-6, -3), (-11, 0.6)]
        ),
        (255, 150, 190),
    )
    pen.box(-2, -22, 4, 11, colour=(120, 206, 255), round_=1)
    pen.shape(smooth([(0, -31), (3, -26), (0, -23), (-3, -26)]), (255, 190, 40), width=1.5)
    for x in (-10, 10):
        pen.ellipse(x, -12, 2.8, colour=RED, width=1.4)


def _umbrella(pen: Pen) -> None:
    pen.line_through([(0, 10), (0, -34)], OUTLINE, 4.4)
    pen.line_through([(0, 10), (0, -34)], (232, 202, 150), 1.6)
    pen.line_through([(0, 8), (1, 12.5), (5, 12.5), (5.6, 9)], OUTLINE, 2.6)
    canopy = smooth(
        [
            (-24, -24),
            (-19, -37),
            (-8, -45),
            (8, -45),
            (19, -37),
            (24, -24),
            (16, -27),
            (8, -24),
            (0, -27),
            (-8, -24),
            (-16, -27),
        ]
    )
    pen.fill(canopy, RED)
    with pen.clipped(canopy):
        pen.fill(smooth([(-8, -22), (-6, -38), (0, -48), (6, -38), (8, -22)]), CREAM)
    pen.stroke(canopy)
    pen.ellipse(0, -46.5, 1.8, colour=RED, width=1.5)


def _book(pen: Pen) -> None:
    pen.shape(polygon([(-20, -13), (0, -9), (20, -13), (20, 12), (0, 16), (-20, 12)]), GREEN)
    for s in (-1, 1):
        pen.shape(smooth([(0, -9), (s * 9, -15), (s * 17, -14), (s * 17, 8), (s * 9, 7.6), (0, 12)]), WHITE, width=1.7)
        for y in (-7, -1, 5):
            pen.line_through([(s * 4.5, y - 0.5), (s * 13, y - 2.4)], (120, 128, 160), 1.7)


def _ball(pen: Pen) -> None:
    ball = oval(0, -3, 18.5)
    pen.fill(ball, WHITE)
    with pen.clipped(ball):
        for colour, points in (
            (RED, [(0.0, -3.0), (-24.0, -12.0), (-14.0, -30.0)]),
            (BLUE, [(0.0, -3.0), (6.0, -30.0), (25.0, -18.0)]),
            (YELLOW, [(0.0, -3.0), (26.0, 6.0), (12.0, 24.0)]),
            (GREEN, [(0.0, -3.0), (-8.0, 25.0), (-26.0, 10.0)]),
        ):
            pen.fill(polygon(points), colour)
    pen.stroke(ball)
    pen.ellipse(0, -3, 3.4, colour=WHITE, width=1.6)


def _lantern(pen: Pen) -> None:
    glow = skia.GradientShader.MakeRadial((0, 10), 30, [skia.Color(255, 224, 110, 190), skia.Color(255, 224, 110, 0)])
    pen.canvas.drawPath(oval(0, 10, 30), skia.Paint(AntiAlias=True, Shader=glow))
    pen.line_through([(-9, 0), (-7, -7), (0, -9), (7, -7), (9, 0)], width=2.2)
    pen.box(-10, -2, 20, 5.5, colour=(92, 96, 116), round_=2)
    pen.box(-9, 3, 18, 19, colour=(255, 238, 150), round_=2)
    pen.shape(smooth([(0, 6), (4.4, 14), (0, 19), (-4.4, 14)]), (255, 150, 40), width=1.4)
    pen.box(-11, 21, 22, 5.5, colour=(92, 96, 116), round_=2)


def _guitar(pen: Pen) -> None:
    with pen.moved(turn=-28):
        pen.box(8, -3.6, 28, 6.4, colour=(120, 72, 44), round_=1)
        pen.box(33, -6, 10, 11, colour=(120, 72, 44), round_=2)
        pen.shape(
            smooth(
                [
                    (13, 0),
                    (11, 8.5),
                    (3, 8),
                    (-3, 12),
                    (-14, 12.5),
                    (-20, 0),
                    (-14, -12.5),
                    (-3, -12),
                    (3, -8),
                    (11, -8.5),
                ]
            ),
            (240, 150, 60),
        )
        pen.disc(0, 0, 4.8, colour=(96, 54, 36))
        for y in (-1.5, 1.2):
            pen.line_through([(-13, y), (35, y)], CREAM, 0.9)
        pen.line_through([(-13, -4), (-13, 4)], (96, 54, 36), 2.6)


def _boat(pen: Pen) -> None:
    pen.line_through([(0, 4), (0, -26)], OUTLINE, 3.0)
    pen.shape(polygon([(2, -25), (18, -2), (2, 0)]), WHITE)
    pen.shape(polygon([(-2, -20), (-13, -2), (-2, 0)]), YELLOW)
    pen.shape(smooth([(-21, 2), (0, 3.4), (21, 2), (15, 13), (0, 15), (-15, 13)]), BLUE)
    pen.line_through([(-17, 7), (0, 8.6), (17, 7)], WHITE, 2.2)


PROP_DRAWERS: dict[str, Callable[[Pen], None]] = {
    "kite": _kite, "balloon": _balloon, "gift": _gift, "cake": _cake, "umbrella": _umbrella, "book": _book,
    "ball": _ball, "lantern": _lantern, "guitar": _guitar, "boat": _boat,
}  # fmt: skip

# How far the grip is above the ground when the thing stands there, and its turn in degrees.
_GROUND: dict[str, tuple[float, float]] = {
    "kite": (10, 14), "balloon": (2, 8), "gift": (14, 0), "cake": (16, 0), "umbrella": (12, 16), "book": (15, 0),
    "ball": (15.5, 0), "lantern": (26, 0), "guitar": (20, -40), "boat": (15, 0),
}  # fmt: skip


def draw_ground_prop(pen: Pen, prop: str, x: float, ground: float, scale: float) -> None:
    """Draw `prop` lying or standing on the ground at height `ground`."""
    lift, turn = _GROUND[prop]
    pen.disc(x, ground, 18 * scale, 3.6 * scale, colour=shade((90, 90, 100)), alpha=70)
    with pen.moved(x, ground - lift * scale, turn=turn, scale=scale):
        PROP_DRAWERS[prop](pen)
