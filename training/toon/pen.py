"""Draws outlined shapes: the only module besides `render` that talks to skia.

Coordinates are picture units: 128 to a frame side, y downwards. It knows shapes and colours, not animals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import skia

from training.toon.colours import OUTLINE, RGB

Point = tuple[float, float]
LINE_WIDTH = 2.1  # outline width in picture units, whatever the character's scale


def smooth(points: Sequence[Point], closed: bool = True) -> skia.Path:
    """Return a Catmull-Rom curve through `points`."""
    path = skia.Path()
    count = len(points)

    def at(index: int) -> Point:
        return points[index % count] if closed else points[min(max(index, 0), count - 1)]

    path.moveTo(*points[0])
    for i in range(count if closed else count - 1):
        p0, p1, p2, p3 = at(i - 1), at(i), at(i + 1), at(i + 2)
        path.cubicTo(
            p1[0] + (p2[0] - p0[0]) / 6,
            p1[1] + (p2[1] - p0[1]) / 6,
            p2[0] - (p3[0] - p1[0]) / 6,
            p2[1] - (p3[1] - p1[1]) / 6,
            p2[0],
            p2[1],
        )
    if closed:
        path.close()
    return path


def polygon(points: Sequence[Point]) -> skia.Path:
    """Return the closed polygon through `points`."""
    path = skia.Path()
    path.addPoly([skia.Point(*point) for point in points], True)
    return path


def scallops(cx: float, cy: float, rx: float, ry: float, count: int, depth: float, turn: float = 0.0) -> skia.Path:
    """Return a closed cloud-like outline of `count` bumps around an ellipse."""
    path = skia.Path()
    for i in range(count + 1):
        angle = turn + 2 * math.pi * i / count
        end = (cx + rx * math.cos(angle), cy + ry * math.sin(angle))
        if i == 0:
            path.moveTo(*end)
            continue
        half = turn + 2 * math.pi * (i - 0.5) / count
        path.quadTo(cx + (rx + depth) * math.cos(half), cy + (ry + depth) * math.sin(half), *end)
    path.close()
    return path


def spikes(cx: float, cy: float, rx: float, ry: float, count: int, depth: float, turn: float = 0.0) -> skia.Path:
    """Return a closed star-like outline of `count` spikes around an ellipse."""
    points: list[Point] = []
    for i in range(count):
        for fraction, grow in ((0.0, 0.0), (0.5, depth)):
            angle = turn + 2 * math.pi * (i + fraction) / count
            points.append((cx + (rx + grow) * math.cos(angle), cy + (ry + grow) * math.sin(angle)))
    return polygon(points)


class Pen:
    """A canvas with the world's line style. `line` is the outline width in the canvas's current units."""

    def __init__(self, canvas: skia.Canvas, line: float = LINE_WIDTH) -> None:
        self.canvas = canvas
        self.line = line
        self.ink: RGB = OUTLINE  # colour of free lines; light while drawing on dark fur

    @contextmanager
    def moved(
        self, dx: float = 0, dy: float = 0, turn: float = 0, scale: float = 1, mirror: bool = False
    ) -> Iterator[None]:
        """Draw inside a frame moved by (dx, dy), then turned (degrees) and scaled; outlines keep their width."""
        self.canvas.save()
        self.canvas.translate(dx, dy)
        self.canvas.rotate(turn)
        self.canvas.scale(-scale if mirror else scale, scale)
        before, self.line = self.line, self.line / scale
        try:
            yield
        finally:
            self.line = before
            self.canvas.restore()

    @contextmanager
    def clipped(self, path: skia.Path) -> Iterator[None]:
        """Draw only inside `path`."""
        self.canvas.save()
        self.canvas.clipPath(path, True)
        try:
            yield
        finally:
            self.canvas.restore()

    def fill(self, path: skia.Path, colour: RGB, alpha: int = 255) -> None:
        """Fill `path`, without an outline."""
        self.canvas.drawPath(path, skia.Paint(AntiAlias=True, Color=skia.Color(*colour, alpha)))

    def stroke(self, path: skia.Path, colour: RGB = OUTLINE, width: float | None = None, alpha: int = 255) -> None:
        """Draw the line of `path` with round ends."""
        self.canvas.drawPath(
            path,
            skia.Paint(
                AntiAlias=True,
                Color=skia.Color(*colour, alpha),
                Style=skia.Paint.kStroke_Style,
                StrokeWidth=self.line if width is None else width,
                StrokeCap=skia.Paint.kRound_Cap,
                StrokeJoin=skia.Paint.kRound_Join,
            ),
        )

    def shape(self, path: skia.Path, colour: RGB, line: RGB = OUTLINE, width: float | None = None) -> None:
        """Fill `path` and outline it."""
        self.fill(path, colour)
        self.stroke(path, line, width)

    def disc(self, cx: float, cy: float, rx: float, ry: float | None = None, *, colour: RGB, alpha: int = 255) -> None:
        """Fill an ellipse, without an outline."""
        self.fill(oval(cx, cy, rx, ry), colour, alpha)

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float | None = None, *, colour: RGB, width: float | None = None
    ) -> None:
        """Fill and outline an ellipse."""
        self.shape(oval(cx, cy, rx, ry), colour, width=width)

    def limb(self, points: Sequence[Point], thickness: float, colour: RGB) -> None:
        """Draw an outlined sausage along a smooth line."""
        path = smooth(points, closed=False)
        self.stroke(path, OUTLINE, thickness + 2 * self.line)
        self.stroke(path, colour, thickness)

    def line_through(self, points: Sequence[Point], colour: RGB | None = None, width: float | None = None) -> None:
        """Draw a smooth open line, in ink unless told otherwise."""
        self.stroke(smooth(points, closed=False), self.ink if colour is None else colour, width)

    def box(
        self, x: float, y: float, width: float, height: float, *, colour: RGB, round_: float = 0, outlined: bool = True
    ) -> None:
        """Draw a rectangle with its top left corner at (x, y)."""
        path = skia.Path()
        path.addRRect(skia.RRect.MakeRectXY(skia.Rect.MakeXYWH(x, y, width, height), round_, round_))
        if outlined:
            self.shape(path, colour)
        else:
            self.fill(path, colour)


def oval(cx: float, cy: float, rx: float, ry: float | None = None) -> skia.Path:
    """Return an ellipse as a path; a circle when `ry` is left out."""
    path = skia.Path()
    ry = rx if ry is None else ry
    path.addOval(skia.Rect.MakeLTRB(cx - rx, cy - ry, cx + rx, cy + ry))
    return path
