"""Named colours of the world and the tint that a time of day lays over a background.

Colours are RGB triples, 0..255. A character keeps its colours at night, so that it can be recognised; only what
stands behind it is tinted.
"""

from __future__ import annotations

import colorsys

RGB = tuple[int, int, int]

OUTLINE: RGB = (46, 36, 50)
WHITE: RGB = (255, 255, 255)
CREAM: RGB = (255, 244, 226)
BLUSH: RGB = (255, 138, 150)
MOUTH: RGB = (150, 40, 56)
TONGUE: RGB = (250, 120, 128)

FUR: dict[str, RGB] = {
    "orange": (247, 142, 50),
    "pink": (252, 164, 190),
    "brown": (150, 98, 62),
    "grey": (160, 164, 176),
    "yellow": (254, 214, 74),
    "green": (104, 192, 82),
    "blue": (98, 158, 226),
    "white": (250, 248, 246),
    "purple": (160, 116, 206),
    "red": (222, 82, 68),
    "teal": (62, 184, 174),
    "black": (66, 64, 80),
}

CLOTH: dict[str, RGB] = {
    "orange": (255, 132, 26),
    "pink": (255, 100, 162),
    "yellow": (255, 206, 28),
    "green": (38, 158, 72),
    "blue": (40, 98, 222),
    "white": (252, 252, 252),
    "purple": (126, 60, 186),
    "red": (226, 38, 46),
    "teal": (0, 158, 158),
}

TINT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.80, 0.66),
    "night": (0.36, 0.40, 0.64),
}


def mix(first: RGB, second: RGB, ratio: float) -> RGB:
    """Return the colour `ratio` (0..1) of the way from `first` to `second`."""
    r, g, b = (round(a + (z - a) * ratio) for a, z in zip(first, second, strict=True))
    return r, g, b


def tinted(colour: RGB, time: str) -> RGB:
    """Return a background colour as it looks at `time` (a key of `TINT`)."""
    r, g, b = (min(255, round(channel * gain)) for channel, gain in zip(colour, TINT[time], strict=True))
    return r, g, b


def belly(colour: RGB) -> RGB:
    """Return the lighter shade of a fur colour that bellies, muzzles and inner ears have."""
    return mix(colour, CREAM, 0.62)


def ink_on(colour: RGB) -> RGB:
    """Return the colour in which a thin line can be seen on `colour`."""
    r, g, b = colour
    return (240, 234, 244) if 0.3 * r + 0.59 * g + 0.11 * b < 92 else OUTLINE


def shade(colour: RGB) -> RGB:
    """Return the darker shade of a colour that stripes and folds have."""
    return mix(colour, OUTLINE, 0.32)


def hsv(hue: float, saturation: float, value: float) -> RGB:
    """Return an RGB triple (0..255) of a colour given in 0..1."""
    r, g, b = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return r, g, b
