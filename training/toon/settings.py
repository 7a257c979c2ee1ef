"""Draws the places, tinted by the time of day.

Every place is drawn with the sun, moon or window on the picture's right and its landmark on the left; the caller
mirrors it. A place has several palettes, which no words tell: the colour of a wall, a field, the sky. Nothing here is
random: setting, palette, time, side and weather are the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import skia

from training.toon.colours import RGB, WHITE, mix, tinted
from training.toon.pen import Pen, oval, polygon, scallops, smooth

SIZE = 128.0
_Choice = TypeVar("_Choice")
SKY: dict[str, tuple[tuple[RGB, RGB], ...]] = {  # of every palette
    "day": (
        ((112, 196, 250), (214, 241, 255)),
        ((92, 204, 218), (214, 246, 240)),
        ((150, 172, 250), (232, 230, 255)),
        ((150, 206, 232), (255, 244, 214)),
    ),
    "sunset": (
        ((250, 128, 92), (255, 216, 150)),
        ((236, 110, 142), (255, 204, 176)),
        ((188, 104, 160), (255, 190, 160)),
        ((252, 160, 84), (255, 232, 156)),
    ),
    "night": (
        ((24, 28, 78), (66, 78, 142)),
        ((14, 46, 80), (48, 98, 136)),
        ((48, 26, 88), (98, 76, 152)),
        ((14, 20, 50), (46, 60, 106)),
    ),
}
GREY_SKY: dict[str, tuple[RGB, RGB]] = {
    "day": ((146, 170, 192), (206, 218, 228)),
    "sunset": ((196, 130, 118), (232, 190, 160)),
    "night": ((30, 34, 64), (64, 72, 112)),
}
SUN_SPOT = (105.0, 23.0)
STARS = (
    (12, 14, 1.3),
    (30, 32, 1.0),
    (46, 10, 1.4),
    (62, 24, 0.9),
    (76, 9, 1.2),
    (20, 46, 0.9),
    (86, 36, 1.1),
    (118, 48, 1.0),
    (54, 42, 0.8),
)


_PLAIN_PALE: dict[RGB, RGB] = {
    (255, 226, 214): (255, 238, 230),  # the bedroom's wall and its stripes
    (238, 112, 120): (255, 188, 176),  # its rug
    (190, 230, 206): (226, 246, 234),  # the kitchen's wall and its tiles
}


class Palette:
    """The colours of a place: the same things in other ones. 0 is the plain palette."""

    def __init__(self, number: int) -> None:
        self._number = number

    def of(self, *choices: _Choice) -> _Choice:
        """This palette's one of some choices; the first of them in the plain palette."""
        return choices[self._number % len(choices)]

    def turned(self, colours: Sequence[RGB]) -> list[RGB]:
        """The colours in turn, each palette beginning with another."""
        start = self._number % len(colours)
        return [*colours[start:], *colours[:start]]


class Backdrop:
    """A pen with a time of day: fills are tinted and the outlines of things far away are soft."""

    def __init__(self, pen: Pen, time: str, weather: str, palette: Palette) -> None:
        self.pen, self.time, self.weather, self.palette = pen, time, weather, palette

    def shade(self, colour: RGB) -> RGB:
        """Return `colour` as it looks at this time."""
        return tinted(colour, self.time)

    def shape(self, path: skia.Path, colour: RGB, line: float = 1.5) -> None:
        """Fill `path` and line it with its own darker colour."""
        fill = self.shade(colour)
        self.pen.fill(path, fill)
        if line:
            self.pen.stroke(path, mix(fill, (34, 28, 52), 0.55), line)

    def box(self, x: float, y: float, width: float, height: float, colour: RGB, line: float = 1.5) -> None:
        """Draw a rectangle with its top left corner at (x, y)."""
        self.shape(polygon([(x, y), (x + width, y), (x + width, y + height), (x, y + height)]), colour, line)

    def disc(self, cx: float, cy: float, rx: float, ry: float, colour: RGB) -> None:
        """Fill an ellipse without a line."""
        self.pen.disc(cx, cy, rx, ry, colour=self.shade(colour))


def _gradient(pen: Pen, top: RGB, low: RGB, y0: float, y1: float, path: skia.Path) -> None:
    shader = skia.GradientShader.MakeLinear([(0, y0), (0, y1)], [skia.Color(*top), skia.Color(*low)])
    pen.canvas.drawPath(path, skia.Paint(AntiAlias=True, Shader=shader))


def _light(pen: Pen, time: str, x: float, y: float, size: float) -> None:
    """Draw the sun of day or sunset, or the moon."""
    if time == "night":
        crescent = skia.Op(
            oval(x, y, size), oval(x - size * 0.5, y - size * 0.28, size * 0.86), skia.PathOp.kDifference_PathOp
        )
        pen.shape(crescent, (255, 244, 190), line=(226, 190, 110), width=1.2)
        return
    colour = (255, 222, 66) if time == "day" else (255, 112, 52)
    pen.disc(x, y, size * 1.34, colour=mix(colour, WHITE, 0.4), alpha=110)
    pen.shape(oval(x, y, size), colour, line=mix(colour, (200, 90, 20), 0.45), width=1.4)


def _sky(back: Backdrop) -> None:
    clear = back.weather == "clear"
    top, low = back.palette.of(*SKY[back.time]) if clear else GREY_SKY[back.time]
    _gradient(back.pen, top, low, 0, 86, polygon([(0, 0), (SIZE, 0), (SIZE, SIZE), (0, SIZE)]))
    if back.time == "night" and clear:
        for x, y, r in STARS:
            back.pen.disc(x, y, r, colour=(255, 250, 220))
    _light(back.pen, back.time, SUN_SPOT[0], SUN_SPOT[1], 11)
    cloud = {"day": WHITE, "sunset": (255, 226, 204), "night": (86, 96, 152)}[back.time]
    if not clear:
        cloud = mix(cloud, (120, 126, 146), 0.45)
    clouds = ((27, 18, 13, 5), (72, 34, 10, 4)) if clear else ((22, 14, 19, 7), (60, 22, 17, 6.5), (98, 33, 17, 6))
    for x, y, rx, ry in clouds:
        back.pen.fill(scallops(x, y, rx, ry, 8, 4), cloud)


def _beach(back: Backdrop) -> None:
    _sky(back)
    palette = back.palette
    sea = palette.of((54, 158, 222), (40, 178, 186), (76, 122, 214), (86, 176, 210))
    back.shape(polygon([(0, 58), (SIZE, 58), (SIZE, 98), (0, 98)]), sea, 0)
    for x, y, w in ((16, 66, 14), (58, 63, 12), (98, 70, 16), (38, 76, 12), (84, 79, 10)):
        back.pen.line_through([(x - w / 2, y), (x, y - 1.4), (x + w / 2, y)], back.shade((170, 222, 250)), 1.6)
    shore = [(-10, 88), (30, 84), (70, 88), (110, 84), (140, 88)]
    sand = palette.of((250, 220, 150), (246, 202, 158), (240, 222, 196), (232, 204, 120))
    back.shape(smooth([*shore, (140, 140), (-10, 140)]), sand, 0)
    back.pen.line_through(shore, back.shade((255, 250, 236)), 3)
    trunk = (176, 120, 66)
    back.shape(smooth([(10, 98), (12, 76), (19, 53), (24, 54), (18, 76), (18, 98)]), trunk)
    leaf = palette.of((60, 166, 84), (108, 176, 60), (36, 140, 112), (76, 180, 120))
    for dx, dy in ((-21, -3), (-15, -13), (1, -17), (17, -11), (21, 1)):
        mid = (21 + dx / 2 + 1, 53 + dy / 2 - 7)
        back.shape(smooth([(21, 53), mid, (21 + dx, 53 + dy), (21 + dx / 2, 53 + dy / 2 + 2)]), leaf)
    back.disc(20, 56, 3.2, 3.2, (120, 74, 44))
    shell = palette.of((255, 168, 160), (255, 240, 220), (200, 150, 220), (255, 200, 120))
    for x, y in ((112, 108), (32, 121)):
        back.shape(scallops(x, y, 4, 3, 5, 2), shell, 1.2)


def _pine(back: Backdrop, x: float, base: float, height: float, colour: RGB) -> None:
    back.box(x - 2.5, base - 6, 5, 8, (128, 86, 56))
    for i, share in enumerate((0.0, 0.27, 0.52)):
        low = base - 4 - share * height
        half = height * (0.31 - 0.07 * i)
        back.shape(polygon([(x - half, low), (x, low - height * 0.46), (x + half, low)]), colour)


def _mushroom(back: Backdrop, x: float, y: float, cap: RGB) -> None:
    back.box(x - 1.8, y - 4, 3.6, 6, (250, 238, 214), 1.2)
    back.shape(smooth([(x - 6, y - 3), (x, y - 9.5), (x + 6, y - 3)]), cap, 1.2)
    back.disc(x - 1.6, y - 5.6, 1.2, 1.2, WHITE)
    back.disc(x + 2.2, y - 4.6, 1.0, 1.0, WHITE)


def _forest(back: Backdrop) -> None:
    _sky(back)
    palette = back.palette
    behind = palette.of((56, 128, 74), (84, 132, 60), (46, 112, 104), (110, 122, 62))
    back.shape(polygon([(0, 78), (SIZE, 78), (SIZE, SIZE), (0, SIZE)]), behind, 0)
    far = palette.of((58, 134, 96), (100, 148, 68), (48, 118, 128), (128, 134, 70))
    close = palette.of((34, 112, 70), (66, 120, 44), (30, 94, 106), (92, 106, 46))
    for x in (8, 38, 66, 92, 120):
        _pine(back, x, 84, 46, far)
    _pine(back, 20, 92, 66, close)
    _pine(back, 112, 92, 46, close)
    ground = palette.of((94, 168, 82), (134, 172, 70), (78, 150, 112), (112, 146, 84))
    back.shape(smooth([(-20, 92), (30, 86), (90, 90), (150, 86), (150, 150), (-20, 150)]), ground, 0)
    cap = palette.of((228, 58, 52), (244, 170, 60), (150, 96, 190), (236, 120, 90))
    _mushroom(back, 12, 110, cap)
    _mushroom(back, 116, 114, cap)


def _park(back: Backdrop) -> None:
    _sky(back)
    palette = back.palette
    back.shape(
        smooth([(-20, 82), (20, 64), (60, 80), (60, 140), (-20, 140)]),
        palette.of((134, 206, 110), (176, 208, 92), (104, 194, 136), (150, 214, 116)),
        0,
    )
    back.shape(
        smooth([(40, 84), (94, 66), (150, 80), (150, 140), (40, 140)]),
        palette.of((116, 194, 98), (156, 194, 80), (88, 180, 128), (132, 204, 104)),
        0,
    )
    lawn = palette.of((146, 216, 100), (186, 214, 88), (116, 204, 122), (162, 226, 112))
    back.shape(smooth([(-20, 90), (64, 84), (150, 90), (150, 150), (-20, 150)]), lawn, 0)
    back.shape(smooth([(11, 98), (14, 70), (22, 70), (25, 98)]), (150, 98, 60))
    back.shape(scallops(18, 52, 19, 17, 9, 6), palette.of((72, 164, 78), (126, 172, 50), (44, 142, 96), (96, 186, 60)))
    fruit = palette.of((230, 64, 60), (255, 206, 70), (236, 120, 190), (255, 240, 236))
    for dx, dy in ((-8, -6), (6, -10), (10, 6), (-5, 8)):
        back.disc(18 + dx, 52 + dy, 2.6, 2.6, fruit)
    wood = palette.of((196, 130, 74), (206, 92, 84), (96, 140, 196), (176, 112, 150))
    for x in (97, 121):
        back.box(x, 84, 3, 14, (120, 82, 56), 1.2)
    for y in (76, 82, 89):
        back.box(93, y, 34, 4, wood, 1.2)
    for x, y, colour in (
        (36, 112, (255, 120, 150)),
        (100, 116, (255, 236, 90)),
        (52, 122, (255, 255, 255)),
        (8, 118, (190, 130, 255)),
    ):
        back.pen.fill(scallops(x, y, 2.2, 2.2, 5, 2.4), back.shade(colour))
        back.disc(x, y, 1.1, 1.1, (255, 190, 40))


def _mountains(back: Backdrop) -> None:
    _sky(back)
    palette = back.palette
    far = palette.of((128, 142, 190), (112, 158, 172), (150, 132, 176), (164, 142, 134))
    near = palette.of((150, 164, 206), (138, 180, 192), (172, 156, 198), (188, 168, 158))
    for peak, half, top, colour in ((34.0, 50.0, 26.0, far), (92.0, 46.0, 40.0, near)):
        back.shape(polygon([(peak - half, 94), (peak, top), (peak + half, 94)]), colour)
        k = 0.33
        cap = [
            (peak, top),
            (peak + half * k, top + (94 - top) * k),
            (peak + half * 0.14, top + 15),
            (peak, top + 25),
            (peak - half * 0.16, top + 15),
            (peak - half * k, top + (94 - top) * k),
        ]
        back.shape(polygon(cap), (250, 252, 255), 1.2)
    back.shape(smooth([(-20, 92), (30, 86), (90, 91), (150, 86), (150, 150), (-20, 150)]), (236, 244, 255), 0)
    back.shape(smooth([(-20, 112), (40, 104), (100, 110), (150, 104), (150, 150), (-20, 150)]), (250, 252, 255), 0)
    needles = palette.of((64, 138, 120), (96, 150, 96), (52, 112, 136), (120, 138, 90))
    _pine(back, 12, 100, 34, needles)
    _pine(back, 120, 100, 26, needles)


def _town(back: Backdrop) -> None:
    _sky(back)
    lit = back.time == "night"
    palette = back.palette
    walls = palette.turned([(250, 206, 120), (246, 150, 140), (150, 208, 226), (184, 220, 150)])
    roofs = palette.turned([(206, 84, 66), (120, 100, 180), (206, 84, 66), (90, 120, 180)])
    for x, top, colour, roof in zip((-6, 28, 62, 96), (46, 56, 50, 58), walls, roofs, strict=True):
        back.box(x, top, 34, 50, colour)
        back.shape(polygon([(x - 2, top), (x + 17, top - 15), (x + 36, top)]), roof)
        for dx in (6, 20):
            for dy in (7, 23):
                pane = (255, 226, 110) if lit else back.shade((226, 244, 255))
                back.pen.shape(
                    polygon(
                        [
                            (x + dx, top + dy),
                            (x + dx + 8, top + dy),
                            (x + dx + 8, top + dy + 10),
                            (x + dx, top + dy + 10),
                        ]
                    ),
                    pane,
                    line=back.shade((110, 90, 100)),
                    width=1.2,
                )
    back.box(-4, 92, 140, 8, (214, 206, 206))
    back.box(-4, 99, 140, 40, (140, 144, 162), 0)
    for x in (2, 36, 70, 104):
        back.box(x, 121, 18, 3, (250, 240, 200), 0)
    back.box(13, 48, 3.6, 50, (76, 84, 104), 1.2)
    if lit:
        glow = skia.GradientShader.MakeRadial(
            (15, 43), 20, [skia.Color(255, 230, 130, 190), skia.Color(255, 230, 130, 0)]
        )
        back.pen.canvas.drawPath(oval(15, 43, 20), skia.Paint(AntiAlias=True, Shader=glow))
    back.pen.shape(
        oval(15, 43, 6.4),
        (255, 240, 160) if lit else back.shade((255, 250, 226)),
        line=back.shade((76, 84, 104)),
        width=1.5,
    )


def _farm(back: Backdrop) -> None:
    _sky(back)
    palette = back.palette
    field = palette.of((222, 196, 96), (212, 168, 84), (204, 200, 92), (232, 190, 112))
    back.shape(smooth([(-20, 76), (50, 66), (110, 74), (150, 66), (150, 140), (-20, 140)]), field, 0)
    for x in (52, 66, 80, 94, 108, 122):
        back.pen.line_through([(x, 72), (x + (x - 64) * 0.3, 92)], back.shade((198, 166, 70)), 1.8)
    grass = palette.of((150, 206, 92), (182, 206, 82), (124, 196, 104), (158, 202, 106))
    back.shape(smooth([(-20, 92), (40, 87), (100, 92), (150, 87), (150, 150), (-20, 150)]), grass, 0)
    boards = palette.of((214, 66, 56), (178, 108, 64), (196, 62, 96), (226, 112, 58))
    back.shape(polygon([(-4, 92), (-4, 58), (6, 42), (20, 34), (34, 42), (44, 58), (44, 92)]), boards)
    back.pen.stroke(
        smooth([(-6, 59), (6, 42), (20, 33), (34, 42), (46, 59)], closed=False), back.shade((250, 244, 240)), 3
    )
    back.box(9, 68, 22, 24, (250, 240, 232))
    back.box(11, 70, 18, 22, (176, 48, 44), 0)
    back.pen.line_through([(11, 70), (29, 92)], back.shade((250, 240, 232)), 2)
    back.pen.line_through([(29, 70), (11, 92)], back.shade((250, 240, 232)), 2)
    back.box(15, 49, 10, 9, (250, 240, 232), 1.2)
    fence = palette.of((250, 246, 238), (178, 124, 76))
    for x in (56, 74, 92, 110):
        back.box(x, 78, 4, 20, fence, 1.2)
    for y in (82, 90):
        back.box(50, y, 84, 3.4, fence, 1.2)


def _window(back: Backdrop, x: float, y: float, width: float, height: float) -> None:
    frame = back.shade((255, 252, 246))
    pane = polygon([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])
    _gradient(back.pen, *SKY[back.time][0], y, y + height, pane)
    with back.pen.clipped(pane):
        if back.time == "night":
            for dx, dy in ((6, 7), (12, 25), (24, 30)):
                back.pen.disc(x + dx, y + dy, 1.1, colour=(255, 250, 220))
        _light(back.pen, back.time, x + width * 0.68, y + height * 0.36, 6.5)
    back.pen.line_through([(x + width / 2, y), (x + width / 2, y + height)], frame, 2.6)
    back.pen.line_through([(x, y + height / 2), (x + width, y + height / 2)], frame, 2.6)
    back.pen.stroke(pane, mix(frame, (34, 28, 52), 0.5), 5.4)
    back.pen.stroke(pane, frame, 3.2)


def _paler(colour: RGB, share: float) -> RGB:
    """A colour's pale partner: that of the plain palette was chosen, those of the others are mixed."""
    return _PLAIN_PALE.get(colour) or mix(colour, WHITE, share)


def _bedroom(back: Backdrop) -> None:
    palette = back.palette
    wall = palette.of((255, 226, 214), (206, 222, 252), (218, 242, 206), (250, 234, 176))
    back.box(0, 0, 128, 90, wall, 0)
    for x in range(10, 130, 28):
        back.box(x, 0, 7, 88, _paler(wall, 0.4), 0)
    back.box(-4, 88, 140, 48, (206, 150, 104), 0)
    back.box(-4, 85, 140, 4.5, (250, 244, 236), 1.2)
    for y in (100, 113):
        back.pen.line_through([(0, y), (128, y)], back.shade((184, 128, 84)), 1.3)
    _window(back, 84, 14, 32, 34)
    back.box(48, 16, 20, 18, (255, 250, 240))
    heart = [(10, 14), (4, 8), (4.5, 4), (8, 3.4), (10, 6), (12, 3.4), (15.5, 4), (16, 8)]
    back.pen.fill(
        smooth([(48 + dx, 16 + dy) for dx, dy in heart]), back.shade(palette.of((240, 110, 130), (96, 150, 220)))
    )
    back.box(-6, 56, 8, 44, (150, 96, 60))
    back.box(-4, 76, 50, 20, palette.of((104, 150, 222), (226, 120, 110), (120, 184, 120), (170, 130, 210)))
    back.shape(smooth([(2, 78), (2, 68), (18, 68), (19, 78)]), (255, 255, 255))
    back.box(44, 72, 5, 28, (150, 96, 60))
    rug = palette.of((238, 112, 120), (110, 160, 220), (126, 190, 130), (240, 190, 90))
    back.pen.fill(oval(66, 116, 48, 10), back.shade(rug))
    back.pen.fill(oval(66, 116, 38, 7), back.shade(_paler(rug, 0.45)))


def _kitchen(back: Backdrop) -> None:
    palette = back.palette
    wall = palette.of((190, 230, 206), (250, 224, 160), (190, 212, 248), (248, 200, 192))
    back.box(0, 0, 128, 90, wall, 0)
    for i in range(-1, 8):
        for j in range(2):
            back.box(i * 19 - 2, 55 + j * 15, 17.5, 13.5, _paler(wall, 0.55), 0)
    back.box(-4, 86, 140, 48, (252, 240, 220), 0)
    tile = palette.of((240, 186, 142), (222, 150, 120), (150, 180, 220), (170, 206, 160))
    for row, (y, height) in enumerate(((88, 12), (100, 13), (113, 16))):
        for column in range(7):
            if (row + column) % 2:
                back.box(column * 21 - 8, y, 21, height, tile, 0)
    _window(back, 84, 12, 32, 32)
    back.box(-4, 26, 34, 70, (240, 246, 252))
    back.pen.line_through([(-4, 50), (30, 50)], back.shade((120, 130, 150)), 1.6)
    for y0, y1 in ((36, 45), (56, 70)):
        back.pen.line_through([(25, y0), (25, y1)], back.shade((120, 130, 150)), 2.6)
    back.box(96, 66, 40, 28, palette.of((232, 150, 90), (110, 160, 190), (190, 120, 150), (130, 170, 120)))
    back.box(92, 62, 44, 5.5, (250, 246, 240))
    back.disc(116, 81, 1.8, 1.8, (120, 70, 50))
    pot = palette.of((226, 62, 62), (70, 130, 210), (240, 180, 50), (120, 90, 190))
    back.shape(smooth([(106, 62), (104, 52), (122, 52), (120, 62)]), pot)
    back.pen.line_through([(104, 54), (99, 54), (101, 58)], back.shade((120, 30, 40)), 2)
    back.box(40, 22, 32, 4, (196, 130, 74), 1.2)
    jars = palette.turned([(255, 206, 80), (240, 110, 110), (110, 170, 240)])
    for dx, colour in zip((6, 16, 26), jars, strict=True):
        back.box(36.4 + dx, 11, 7.2, 11, colour, 1.2)


def _weather(back: Backdrop) -> None:
    """Draw rain or snow: one fixed pattern each."""
    for row in range(6):
        for column in range(6):
            x, y = column * 22 + (row % 2) * 11 + 4, row * 20 + (column % 3) * 5 + 6
            if back.weather == "rain":
                back.pen.line_through([(x + 1.5, y), (x - 1.5, y + 8)], (196, 222, 255), 1.6)
            else:
                back.pen.disc(x, y, 1.9, colour=WHITE)


PLACES: dict[str, Callable[[Backdrop], None]] = {
    "beach": _beach, "forest": _forest, "park": _park, "mountains": _mountains, "town": _town, "farm": _farm,
    "bedroom": _bedroom, "kitchen": _kitchen,
}  # fmt: skip


def draw_setting(pen: Pen, setting: str, time: str, side: str, weather: str, palette: int = 0) -> None:
    """Draw a whole background over the 128-unit square."""
    back = Backdrop(pen, time, weather, Palette(palette))
    with pen.moved(SIZE if side == "left" else 0, 0, mirror=side == "left"):
        PLACES[setting](back)
        if weather != "clear":
            _weather(back)
