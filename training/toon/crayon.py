"""Draws a crude picture in wax crayon, as a child would: no renderer of the world is used, only scribbles.

It exists to have a first frame that the models have never seen the like of: grainy paper, wobbly lines, hatching
instead of flat colours, no outline of constant width, other proportions.
"""

from __future__ import annotations

import math
import random

import numpy as np
import skia

from training.toon.picture import Pixels

RGB = tuple[int, int, int]
Point = tuple[float, float]
SIZE = 256.0


class Crayon:
    """A wax crayon with an unsteady hand."""

    def __init__(self, canvas: skia.Canvas, rng: random.Random) -> None:
        self.canvas, self.rng = canvas, rng

    def line(self, points: list[Point], colour: RGB, width: float = 4.0, wobble: float = 1.6) -> None:
        """Scribble along `points`, twice, never on quite the same way."""
        for _ in range(2):
            path = skia.Path()
            for i, (x, y) in enumerate(points):
                point = (x + self.rng.gauss(0, wobble), y + self.rng.gauss(0, wobble))
                if i:
                    path.lineTo(*point)
                else:
                    path.moveTo(*point)
            self.canvas.drawPath(path, self._wax(colour, width))

    def ring(self, cx: float, cy: float, rx: float, ry: float, colour: RGB, width: float = 4.0) -> None:
        """Draw an ellipse that does not quite close."""
        start = self.rng.uniform(0, math.tau)
        angles = [start + math.tau * 1.06 * i / 26 for i in range(27)]
        self.line([(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles], colour, width)

    def hatch(
        self, area: skia.Path, colour: RGB, slope_deg: float = 35.0, gap: float = 4.2, width: float = 4.0
    ) -> None:
        """Fill `area` with slanting strokes that leave paper between them."""
        box = area.computeTightBounds()
        cx, cy = box.centerX(), box.centerY()
        reach = math.hypot(box.width(), box.height()) / 2
        c, s = math.cos(math.radians(slope_deg)), math.sin(math.radians(slope_deg))
        self.canvas.save()
        self.canvas.clipPath(area, True)
        offset = -reach
        while offset < reach:
            middle = (cx - s * offset, cy + c * offset)
            ends = [(middle[0] + k * c * reach, middle[1] + k * s * reach) for k in (-1.0, -0.3, 0.4, 1.0)]
            self.line(ends, colour, width, wobble=1.3)
            offset += gap * self.rng.uniform(0.75, 1.2)
        self.canvas.restore()

    def _wax(self, colour: RGB, width: float) -> skia.Paint:
        shade = tuple(min(255, max(0, channel + self.rng.randint(-12, 12))) for channel in colour)
        return skia.Paint(
            AntiAlias=True,
            Color=skia.Color(*shade, 178),
            Style=skia.Paint.kStroke_Style,
            StrokeWidth=width * self.rng.uniform(0.8, 1.15),
            StrokeCap=skia.Paint.kRound_Cap,
            StrokeJoin=skia.Paint.kRound_Join,
        )


def _oval(cx: float, cy: float, rx: float, ry: float) -> skia.Path:
    path = skia.Path()
    path.addOval(skia.Rect.MakeLTRB(cx - rx, cy - ry, cx + rx, cy + ry))
    return path


def _polygon(*points: Point) -> skia.Path:
    path = skia.Path()
    path.addPoly([skia.Point(*point) for point in points], True)
    return path


def _grain(pixels: Pixels, seed: int) -> Pixels:
    """Let the tooth of the paper show through the wax."""
    noise = np.random.default_rng(seed)
    fine = noise.normal(0, 1, pixels.shape[:2])
    soft = (fine + np.roll(fine, 1, 0) + np.roll(fine, 1, 1) + np.roll(fine, (1, 1), (0, 1))) / 2
    wax = 1 - pixels.min(axis=2) / 255.0
    lifted = pixels + (soft * (3 + 9 * wax) + np.clip(soft - 1.2, 0, None) * 26 * wax)[..., None]
    grained: Pixels = np.clip(np.rint(lifted), 0, 255).astype(np.uint8)
    return grained


def beach_day(seed: int = 7, size_px: int = 256) -> Pixels:
    """Return uint8 RGB [size_px, size_px, 3]: an orange cat with a blue scarf at the beach, the sun on the left."""
    surface = skia.Surface(size_px, size_px)
    canvas = surface.getCanvas()
    canvas.scale(size_px / SIZE, size_px / SIZE)
    canvas.clear(skia.Color(252, 248, 238))
    hand = Crayon(canvas, random.Random(seed))
    orange, dark, blue = (240, 128, 40), (70, 46, 40), (36, 84, 200)

    hand.hatch(_polygon((0, 0), (256, 0), (256, 112), (0, 112)), (150, 208, 246), 8, 8.5, 5)
    hand.hatch(_polygon((0, 112), (256, 106), (256, 172), (0, 176)), (48, 140, 208), -4, 5, 5)
    hand.hatch(_polygon((0, 176), (256, 170), (256, 256), (0, 256)), (238, 202, 120), 14, 5.2, 5)
    hand.hatch(_oval(44, 42, 24, 24), (252, 204, 40), 60, 4, 5)
    for i in range(10):
        a = math.tau * i / 10
        hand.line(
            [(44 + 30 * math.cos(a), 42 + 30 * math.sin(a)), (44 + 42 * math.cos(a), 42 + 42 * math.sin(a))],
            (250, 190, 40),
            4,
        )
    hand.line([(222, 206), (216, 160), (224, 112)], (140, 88, 48), 11)
    for x, y in ((186, 92), (196, 74), (226, 66), (252, 84), (254, 108)):
        hand.line([(224, 108), ((224 + x) / 2, (108 + y) / 2 - 12), (x, y)], (52, 150, 70), 7)

    hand.line([(150, 206), (178, 214), (190, 190), (182, 172)], orange, 8)
    for x in (104, 142):
        hand.line([(x, 212), (x, 236)], orange, 15)
    hand.hatch(_oval(123, 190, 30, 34), orange, 40, 4, 5)
    hand.hatch(_oval(123, 198, 17, 22), (255, 226, 190), 20, 4, 5)
    hand.line([(97, 178), (76, 200)], orange, 12)
    hand.line([(149, 178), (172, 152), (178, 142)], orange, 12)
    for s in (-1, 1):
        ear = _polygon((123 + s * 14, 84), (123 + s * 38, 46), (123 + s * 50, 102))
        hand.hatch(ear, orange, 70, 4, 5)
        hand.line([(123 + s * 14, 84), (123 + s * 38, 46), (123 + s * 50, 102)], dark, 3.6)
    hand.hatch(_oval(123, 118, 52, 44), orange, 30, 3.8, 5)
    hand.ring(123, 118, 52, 44, dark, 3.6)
    hand.ring(123, 190, 31, 35, dark, 3.4)
    for s in (-1, 1):
        canvas.drawPath(_oval(123 + s * 20, 112, 13, 15), skia.Paint(AntiAlias=True, Color=skia.Color(255, 253, 248)))
        hand.ring(123 + s * 20, 112, 13, 15, dark, 3)
        hand.hatch(_oval(123 + s * 18, 115, 6.5, 7.5), (40, 32, 36), 20, 2.4, 4)
        hand.line([(123 + s * 34, 132), (123 + s * 70, 126)], dark, 2.4)
        hand.line([(123 + s * 34, 138), (123 + s * 70, 142)], dark, 2.4)
        hand.hatch(_oval(123 + s * 36, 132, 9, 6), (250, 140, 140), 0, 3, 4)
    hand.hatch(_oval(123, 128, 5, 4), (236, 110, 120), 0, 2.4, 3)
    hand.line([(106, 138), (114, 148), (123, 150), (132, 148), (140, 138)], (150, 40, 50), 4)
    hand.line([(94, 162), (110, 170), (136, 170), (152, 162)], blue, 13)
    hand.line([(140, 170), (146, 206)], blue, 12)
    return _grain(np.ascontiguousarray(surface.toarray(colorType=skia.kRGBA_8888_ColorType)[..., :3]), seed)
