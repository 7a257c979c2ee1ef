"""Eyes, brows, mouths and tears: how a mood looks on every species.

Drawn in head coordinates: the middle of the head is (0, 0), its radii about 23 and 20. A mood is never told by the
mouth alone, because beaks and trunks hide mouths: eyes and brows change too.
"""

from __future__ import annotations

import skia

from training.toon.colours import BLUSH, MOUTH, OUTLINE, RGB, TONGUE, WHITE
from training.toon.pen import Pen, oval, polygon, smooth

TEAR: RGB = (92, 178, 255)
LID_LINE = 1.9


def draw_eyes(pen: Pen, mood: str, spot: tuple[float, float], lid: RGB, closed: bool) -> None:
    """Draw both eyes at (±x, y) = `spot`; `lid` is the colour of half-shut lids."""
    x, y = spot
    for sign in (-1, 1):
        cx = sign * x
        if closed:
            pen.line_through([(cx - 5, y), (cx, y + 3.4), (cx + 5, y)], width=LID_LINE + 0.5)
        elif mood == "delighted":
            pen.line_through([(cx - 5, y + 2.2), (cx, y - 3.6), (cx + 5, y + 2.2)], width=LID_LINE + 0.8)
        else:
            _open_eye(pen, mood, cx, y, sign, lid)


def _open_eye(pen: Pen, mood: str, cx: float, cy: float, sign: int, lid: RGB) -> None:
    rx, ry, pupil = 6.2, 7.2, 4.1
    if mood == "surprised":
        rx, ry, pupil = 7.2, 8.4, 3.2
    if mood == "scared":
        rx, ry, pupil = 6.8, 7.8, 2.2
    white = oval(cx, cy, rx, ry)
    pen.fill(white, WHITE)
    with pen.clipped(white):
        py = cy + (1.8 if mood in ("sad", "sleepy") else 0.6)
        px = cx - sign * 0.9
        pen.disc(px, py, pupil, pupil * 1.14, colour=OUTLINE)
        pen.disc(px + pupil * 0.34, py - pupil * 0.46, pupil * 0.4, colour=WHITE)
        if mood == "sleepy":
            pen.fill(_upper(cx, cy, rx, ry, 0.1, 0), lid)
            pen.line_through([(cx - rx, cy + 0.4), (cx + rx, cy + 0.4)], width=LID_LINE)
        if mood == "angry":
            pen.fill(_upper(cx, cy, rx, ry, -0.42, -sign * 3.2), lid)
    pen.stroke(white, width=1.7)


def _upper(cx: float, cy: float, rx: float, ry: float, cut: float, slope: float) -> skia.Path:
    low = cy + cut * ry
    return polygon(
        [(cx - rx - 2, cy - ry - 2), (cx + rx + 2, cy - ry - 2), (cx + rx + 2, low + slope), (cx - rx - 2, low - slope)]
    )


def draw_brows(pen: Pen, mood: str, spot: tuple[float, float]) -> None:
    """Draw the eyebrows; they come last on a face, over glasses and brims."""
    heights = {
        "sad": (-11.6, -8.2),
        "scared": (-12.6, -9.2),
        "angry": (-6.4, -11.2),
        "surprised": (-12.0, -12.0),
        "sleepy": (-8.6, -8.0),
    }
    if mood not in heights:
        return
    x, y = spot
    first, last = heights[mood]
    middle = (first + last) / 2 - (1.6 if mood == "surprised" else 0.0)
    for s in (-1, 1):
        brow = [(s * (x - 4.8), y + first), (s * x, y + middle), (s * (x + 4.8), y + last)]
        pen.line_through(brow, width=2.6 if mood == "angry" else 2.2)


def draw_mouth(pen: Pen, mood: str, x: float, y: float, size: float = 1.0, closed: bool = False) -> None:
    """Draw the mouth with its middle at (x, y)."""
    with pen.moved(x, y, scale=size):
        if closed:
            pen.line_through([(-2.6, 0.4), (0, 1.8), (2.6, 0.4)], width=LID_LINE)
        elif mood in ("happy", "delighted"):
            wide = 6.6 if mood == "delighted" else 5.2
            deep = 6.6 if mood == "delighted" else 4.8
            path = smooth(
                [
                    (-wide, -1.4),
                    (0, -0.6),
                    (wide, -1.4),
                    (wide * 0.62, deep * 0.62),
                    (0, deep),
                    (-wide * 0.62, deep * 0.62),
                ]
            )
            pen.fill(path, MOUTH)
            with pen.clipped(path):
                pen.disc(0, deep, wide * 0.62, 3.0, colour=TONGUE)
            pen.stroke(path, width=1.7 / size)
        elif mood == "sad":
            pen.line_through([(-5, 3.2), (-2.4, 0.6), (0, 0), (2.4, 0.6), (5, 3.2)], width=2.1)
        elif mood == "surprised":
            path = oval(0, 1.6, 3.4, 4.3)
            pen.fill(path, MOUTH)
            pen.stroke(path, width=1.7 / size)
        elif mood == "angry":
            path = smooth([(-5.6, 3.0), (-4.6, -0.6), (0, -1.4), (4.6, -0.6), (5.6, 3.0), (0, 2.2)])
            pen.fill(path, WHITE)
            pen.stroke(path, width=1.7 / size)
            pen.line_through([(-2, -1), (-2, 2.4)], width=1.0)
            pen.line_through([(2, -1), (2, 2.4)], width=1.0)
        elif mood == "scared":
            pen.line_through(
                [(-6, 1.6), (-3.9, -0.6), (-1.9, 1.8), (0, -0.6), (1.9, 1.8), (3.9, -0.6), (6, 1.6)], width=2.0
            )
        else:
            pen.line_through([(-3, 0.8), (0, 1.4), (3, 0.8)], width=LID_LINE)


def draw_blush(pen: Pen, y: float = 7.0, x: float = 15.6) -> None:
    """Draw the two cheeks."""
    for sign in (-1, 1):
        pen.disc(sign * x, y, 3.7, 2.4, colour=BLUSH, alpha=190)


def draw_tears(pen: Pen, spot: tuple[float, float]) -> None:
    """Draw the big tears of somebody who cries; the eyes are at (±x, y) = `spot`."""
    x, y = spot
    for cx, cy, size in ((-x - 2.5, y + 9, 1.25), (x + 2.5, y + 9, 1.25)):
        drop = smooth([(cx, cy - 5.5 * size), (cx + 2.9 * size, cy), (cx, cy + 2.9 * size), (cx - 2.9 * size, cy)])
        pen.shape(drop, TEAR, width=1.4)
        pen.disc(cx - 0.8, cy - 0.4, 0.9, colour=WHITE)


def draw_sweat(pen: Pen) -> None:
    """Draw the drop of fear beside the forehead."""
    cx, cy = 22.5, -12.0
    drop = smooth([(cx, cy - 5.5), (cx + 3, cy), (cx, cy + 3), (cx - 3, cy)])
    pen.shape(drop, TEAR, width=1.4)
