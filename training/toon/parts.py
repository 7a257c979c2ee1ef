"""Draws the parts that make a species: ears, muzzles, tails and markings.

Ears, muzzles and marks are drawn in head coordinates (middle of the head at the origin), tails from their root. Each
part is a function of a `Coat`; the tables at the end give them their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.toon.colours import CREAM, OUTLINE, RGB, WHITE, mix
from training.toon.face import draw_mouth
from training.toon.pen import Pen, Point, oval, polygon, scallops, smooth, spikes

PINK: RGB = (255, 172, 186)
BEAK: RGB = (255, 164, 44)


@dataclass(frozen=True, kw_only=True)
class Coat:
    """The colours of a character: fur, its light belly shade and its dark marking shade."""

    fur: RGB
    light: RGB
    dark: RGB


def _both(draw: Callable[[int], None]) -> None:
    for sign in (-1, 1):
        draw(sign)


# --- ears, drawn before the head -------------------------------------------------------------------------------------


def _ears_long(pen: Pen, coat: Coat) -> None:
    for sign in (-1, 1):
        with pen.moved(sign * 9.5, -14, turn=sign * 11):
            pen.ellipse(0, -14, 6.4, 17, colour=coat.fur)
            pen.disc(0, -13, 3.0, 11.5, colour=PINK)


def _ears_pointed(pen: Pen, coat: Coat, tip: float = 31.0) -> None:
    for s in (-1, 1):
        pen.shape(smooth([(s * 5, -14), (s * 15.5, -tip), (s * 18.5, -tip + 1), (s * 23, -5), (s * 12, -8)]), coat.fur)
        pen.fill(smooth([(s * 10.5, -16), (s * 16.6, -tip + 6.5), (s * 19, -12)]), PINK)


def _ears_tall_pointed(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(polygon([(s * 4, -14), (s * 17.5, -38), (s * 24, -4)]), coat.fur)
        pen.fill(polygon([(s * 13, -30), (s * 17.5, -38), (s * 19.6, -27)]), coat.dark)
        pen.fill(polygon([(s * 10, -17), (s * 16.4, -28), (s * 19, -12)]), coat.light)
        pen.stroke(polygon([(s * 4, -14), (s * 17.5, -38), (s * 24, -4)]))


def _ears_round(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.ellipse(s * 16.5, -15.5, 8.2, colour=coat.fur)
        pen.disc(s * 16.5, -15, 4.6, colour=coat.light)


def _ears_round_dark(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.ellipse(s * 16.5, -16, 8.2, colour=coat.dark)


def _ears_huge_round(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.ellipse(s * 19.5, -16, 12.4, colour=coat.fur)
        pen.disc(s * 19.5, -15.5, 8, colour=PINK)


def _ears_flaps(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(
            smooth([(s * 13, -14), (s * 28, -21), (s * 38, -9), (s * 35, 8), (s * 25, 15), (s * 16, 8)]), coat.fur
        )
        pen.fill(smooth([(s * 20, -9), (s * 28, -14), (s * 33, -6), (s * 31, 5), (s * 25, 9)]), PINK)


def _ears_folded(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(smooth([(s * 5, -15), (s * 18, -28), (s * 24, -25), (s * 22, -6), (s * 14, -9)]), coat.fur)
        pen.shape(smooth([(s * 17, -22), (s * 24, -25), (s * 23, -12)]), mix(coat.fur, PINK, 0.6), width=1.6)


def _ears_floppy(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(
            smooth([(s * 12, -17), (s * 23, -18), (s * 31, -4), (s * 30, 11), (s * 24, 13), (s * 19, 2)]), coat.dark
        )


def _ears_side_round(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.ellipse(s * 23, -2, 8.6, colour=coat.fur)
        pen.disc(s * 23.5, -2, 5, colour=coat.light)


def _ears_fluffy(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(scallops(s * 22, -11, 11, 11, 9, 3.4, turn=0.2), coat.fur)
        pen.fill(scallops(s * 22, -10, 6, 6, 7, 2), mix(coat.light, PINK, 0.5))


def _ears_horned(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(polygon([(s * 3, -17), (s * 20, -30), (s * 22, -6)]), coat.dark)


def _ears_tuft(pen: Pen, coat: Coat) -> None:
    for x, y in ((-6, -27), (0, -31), (6, -27)):
        pen.limb([(0, -17), (x * 0.7, y * 0.8), (x, y)], 3.4, coat.fur)


def _ears_horns(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(smooth([(s * 6, -15), (s * 11, -30), (s * 15, -33), (s * 15, -24), (s * 17, -12)]), CREAM)
        pen.shape(polygon([(s * 19, -8), (s * 33, -12), (s * 29, -4), (s * 34, 2), (s * 20, 5)]), coat.dark)


def _ears_antlers(pen: Pen, coat: Coat) -> None:
    horn = (196, 148, 96)
    for s in (-1, 1):
        pen.limb([(s * 8, -15), (s * 12, -27), (s * 17, -37)], 3.2, horn)
        pen.limb([(s * 12, -27), (s * 18, -28), (s * 22, -31)], 3.2, horn)
        pen.stroke(smooth([(s * 8, -15), (s * 12, -27), (s * 17, -37)], closed=False), horn, 3.2)
        pen.shape(smooth([(s * 15, -12), (s * 27, -16), (s * 31, -9), (s * 25, -3), (s * 18, -4)]), coat.fur)
        pen.fill(smooth([(s * 20, -9), (s * 27, -12), (s * 27, -7)]), PINK)


def _ears_cow(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(smooth([(s * 8, -16), (s * 12, -27), (s * 16, -29), (s * 17, -22), (s * 15, -13)]), CREAM)
        pen.shape(smooth([(s * 17, -9), (s * 29, -13), (s * 34, -5), (s * 27, 1), (s * 19, -1)]), coat.fur)
        pen.fill(smooth([(s * 22, -6), (s * 29, -9), (s * 29, -3)]), PINK)


def _ears_drop(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(smooth([(s * 16, -7), (s * 28, -7), (s * 33, 3), (s * 27, 7), (s * 18, 1)]), coat.light)


def _ears_tiny(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.ellipse(s * 16, -13, 5.6, colour=coat.light)


def _ears_tufted_small(pen: Pen, coat: Coat) -> None:
    for s in (-1, 1):
        pen.shape(smooth([(s * 6, -15), (s * 12, -29), (s * 15, -35), (s * 17, -28), (s * 20, -9)]), coat.fur)
        pen.fill(smooth([(s * 11, -17), (s * 14.5, -25), (s * 16.5, -14)]), coat.light)


# --- marks -----------------------------------------------------------------------------------------------------------


def draw_marks_behind(pen: Pen, marks: tuple[str, ...], coat: Coat) -> None:
    """Draw what stands out behind the head: manes, quills and back spikes."""
    if "mane" in marks:
        pen.shape(scallops(0, -1, 27, 25, 13, 6), coat.dark)
    if "wool" in marks:
        pen.shape(scallops(0, -3, 23.5, 21, 13, 5), coat.fur)
    if "quills" in marks:
        pen.shape(spikes(0, -3, 23, 21, 17, 10, turn=0.1), coat.dark)
    if "back_spikes" in marks:
        for x, y in ((-8, -22), (0, -25), (8, -22)):
            pen.shape(polygon([(x - 5, y + 6), (x, y - 6), (x + 5, y + 6)]), coat.dark)


def draw_marks(pen: Pen, marks: tuple[str, ...], coat: Coat, eye_spot: Point, head: tuple[float, float]) -> None:
    """Draw what lies on the head, under eyes and muzzle."""
    rx, ry = head
    x, y = eye_spot
    if "forehead_stripes" in marks:
        for dx in (-5, 0, 5):
            pen.line_through([(dx, -ry + 1.8), (dx * 0.8, -ry + 6)], coat.dark, 2.4)
    if "stripes" in marks:
        for dx in (-6, 0, 6):
            pen.line_through([(dx, -ry + 1.8), (dx * 0.7, -ry + 7)], coat.dark, 3.0)
        for s in (-1, 1):
            for dy in (1, 7):
                pen.line_through([(s * (rx - 1.5), dy), (s * (rx - 7), dy + 1.2)], coat.dark, 2.8)
    with pen.clipped(oval(0, 0, rx - 1, ry - 1)):
        if "eye_discs" in marks:
            for s in (-1, 1):
                pen.disc(s * x, y, 11.5, 12.5, colour=coat.light)
        if "heart_face" in marks:
            for s in (-1, 1):
                pen.disc(s * 8.6, -2, 11, 12, colour=WHITE)
            pen.disc(0, 8, 17, 11, colour=WHITE)
        if "panda_eyes" in marks:
            for s in (-1, 1):
                with pen.moved(s * (x + 1), y + 1, turn=s * 24):
                    pen.disc(0, 0, 8.6, 10.8, colour=coat.dark)
        if "bandit" in marks:
            for s in (-1, 1):
                with pen.moved(s * 12, 0, turn=s * 18):
                    pen.disc(0, 0, 12, 9, colour=coat.dark)
            pen.disc(0, -15, 4, 8, colour=coat.light)
        if "eye_patch" in marks:
            pen.disc(x + 1, y, 10, 11.5, colour=coat.dark)
        if "spots" in marks:
            pen.disc(15, -13, 11, 11, colour=coat.dark)
            pen.disc(-20, 3, 6, 8, colour=coat.dark)
        if "quills" in marks or "wool" in marks:
            pen.disc(0, 0, rx, ry, colour=coat.light)
        if "dots" in marks:
            for dx, dy in ((-4, -14), (0, -17), (4, -14)):
                pen.disc(dx, dy, 1.5, colour=coat.light)


def draw_marks_over(pen: Pen, marks: tuple[str, ...], coat: Coat) -> None:
    """Draw what lies over the forehead: wool."""
    if "wool" in marks:
        pen.shape(scallops(0, -14.5, 13, 5.5, 9, 4.2), coat.fur)
    if "quills" in marks:
        pen.shape(
            polygon(
                [
                    (-15, -11),
                    (-12, -21),
                    (0, -25),
                    (12, -21),
                    (15, -11),
                    (9, -15),
                    (5, -10),
                    (0, -15),
                    (-5, -10),
                    (-9, -15),
                ]
            ),
            coat.dark,
        )


def draw_body_marks(pen: Pen, marks: tuple[str, ...], coat: Coat, cx: float, cy: float, rx: float, ry: float) -> None:
    """Draw what lies on the body, inside its outline."""
    with pen.clipped(oval(cx, cy, rx - 0.6, ry - 0.6)):
        if "stripes" in marks:
            for s in (-1, 1):
                for dy in (-5, 2, 9):
                    pen.line_through([(cx + s * rx, cy + dy), (cx + s * (rx - 5), cy + dy + 1)], coat.dark, 2.8)
        if "spots" in marks:
            pen.disc(cx - rx + 2, cy + 4, 6, 7, colour=coat.dark)
            pen.disc(cx + rx - 3, cy - 7, 5, 5, colour=coat.dark)


# --- muzzles, drawn after the eyes -----------------------------------------------------------------------------------


def _nose(pen: Pen, y: float, rx: float = 2.9, ry: float = 2.1, colour: RGB = OUTLINE) -> None:
    pen.disc(0, y, rx, ry, colour=colour)


def _muzzle_plain(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    _nose(pen, 5.0, 2.8, 1.9, (236, 110, 130))
    draw_mouth(pen, mood, 0, 10.2, 0.92, closed)


def _muzzle_buck(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    _muzzle_plain(pen, coat, mood, closed)
    if mood not in ("surprised", "angry", "scared"):
        y = 9.4 if mood in ("happy", "delighted") and not closed else 11.6
        pen.shape(polygon([(-2.3, y), (2.3, y), (2.0, y + 3.6), (-2.0, y + 3.6)]), WHITE, width=1.1)


def _muzzle_whiskers(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    for s in (-1, 1):
        pen.line_through([(s * 16, 6), (s * 27, 3)], width=1.2)
        pen.line_through([(s * 16, 9.5), (s * 27, 10.5)], width=1.2)
    _muzzle_plain(pen, coat, mood, closed)


def _muzzle_snout(pen: Pen, coat: Coat, mood: str, closed: bool, size: float = 1.0) -> None:
    pen.disc(0, 9, 11 * size, 8.2 * size, colour=coat.light)
    _nose(pen, 4.6, 3.9, 2.7)
    pen.disc(-1, 3.8, 1.1, 0.7, colour=WHITE)
    draw_mouth(pen, mood, 0, 10.2, 0.9, closed)


def _muzzle_snout_small(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    _muzzle_snout(pen, coat, mood, closed, 0.86)


def _muzzle_mask(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    _nose(pen, 5.6, 3.4, 2.4)
    draw_mouth(pen, mood, 0, 10.6, 0.86, closed)


def _muzzle_pointed_nose(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    _nose(pen, 4.6, 4.0, 3.2)
    pen.disc(-1.1, 3.6, 1.1, 0.8, colour=WHITE)
    draw_mouth(pen, mood, 0, 10.4, 0.86, closed)


def _muzzle_big_nose(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    pen.ellipse(0, 3.4, 4.6, 5.6, colour=(70, 62, 80))
    pen.disc(-1.2, 1, 1.3, 1.6, colour=(150, 144, 164))
    draw_mouth(pen, mood, 0, 11.6, 0.86, closed)


def _muzzle_wide(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    for s in (-1, 1):
        pen.disc(s * 2.6, -1.0, 0.9, 0.9, colour=OUTLINE)
    draw_mouth(pen, mood, 0, 5.4, 1.35, closed)


def _muzzle_bill(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    draw_mouth(pen, mood, 0, 11.6, 0.95, closed)
    pen.shape(smooth([(-10.5, 8), (-6, 4.2), (0, 3.2), (6, 4.2), (10.5, 8), (5, 10.8), (0, 11.2), (-5, 10.8)]), BEAK)
    for s in (-1, 1):
        pen.disc(s * 2.4, 6, 0.9, 0.9, colour=OUTLINE)


def _muzzle_beak(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    draw_mouth(pen, mood, 0, 12.0, 0.9, closed)
    pen.shape(smooth([(-5.6, 4.6), (0, 2.4), (5.6, 4.6), (2.6, 9), (0, 11), (-2.6, 9)]), BEAK)


def _muzzle_trunk(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    draw_mouth(pen, mood, 7.4, 10.4, 0.9, closed)
    pen.limb([(0, 4), (-0.6, 11), (-4, 17.5), (-10.5, 19.5), (-14.5, 15.5)], 6.6, coat.fur)
    pen.disc(0, 3.6, 3.6, 4.0, colour=coat.fur)
    for p, q in (((-3.4, 9.6), (2.4, 10.6)), ((-4.6, 14), (0.4, 16.4))):
        pen.line_through([p, q], coat.dark, 1.2)


def _muzzle_pig(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    draw_mouth(pen, mood, 0, 13.2, 0.86, closed)
    pen.ellipse(0, 5.8, 8.2, 5.6, colour=mix(coat.fur, (240, 90, 130), 0.35))
    for s in (-1, 1):
        pen.disc(s * 2.9, 5.8, 1.3, 2.0, colour=OUTLINE)


def _muzzle_monkey(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    for s in (-1, 1):
        pen.disc(s * 1.5, 3.8, 0.9, 0.8, colour=OUTLINE)
    draw_mouth(pen, mood, 0, 9.8, 1.0, closed)


def _muzzle_nostrils(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    pen.disc(0, 9.4, 13, 8.4, colour=coat.light)
    for s in (-1, 1):
        pen.disc(s * 4.2, 5.6, 1.3, 1.0, colour=OUTLINE)
    draw_mouth(pen, mood, 0, 10.8, 0.95, closed)


def _muzzle_cow(pen: Pen, coat: Coat, mood: str, closed: bool) -> None:
    pen.ellipse(0, 10.4, 13, 8.4, colour=PINK, width=1.7)
    for s in (-1, 1):
        pen.disc(s * 5.4, 6.8, 1.6, 1.3, colour=OUTLINE)
    draw_mouth(pen, mood, 0, 11.4, 0.86, closed)


# --- tails, drawn first, from the root at the origin; they go to the picture's left -----------------------------------


def _tail_puff(pen: Pen, coat: Coat) -> None:
    pen.shape(scallops(-4, 1, 5.5, 5.5, 7, 2.4), mix(coat.light, WHITE, 0.4))


def _tail_thin(pen: Pen, coat: Coat) -> None:
    pen.limb([(2, 2), (-8, 4), (-15, -3), (-14, -13), (-18, -17)], 3.6, coat.fur)


def _tail_long(pen: Pen, coat: Coat) -> None:
    pen.limb([(2, 2), (-9, 6), (-17, 0), (-16, -12), (-22, -18), (-27, -13)], 3.8, coat.fur)


def _tail_long_pink(pen: Pen, coat: Coat) -> None:
    pen.limb([(2, 4), (-8, 7), (-16, 3), (-20, -6), (-26, -7)], 2.4, PINK)


def _tail_bushy(pen: Pen, coat: Coat) -> None:
    body = smooth([(2, 4), (-9, 7), (-20, 2), (-26, -11), (-23, -22), (-15, -15), (-8, -8), (0, -5)])
    pen.shape(body, coat.fur)
    tip = smooth([(-26, -11), (-23, -22), (-16, -16), (-18, -12), (-21, -11)])
    pen.fill(tip, WHITE)
    pen.stroke(body)


def _tail_giant(pen: Pen, coat: Coat) -> None:
    pen.shape(
        smooth(
            [(3, 6), (-9, 9), (-20, 2), (-22, -16), (-28, -30), (-22, -42), (-11, -40), (-7, -28), (-9, -14), (0, -8)]
        ),
        coat.fur,
    )
    pen.line_through([(-7, 2), (-15, -6), (-15, -20), (-20, -30)], coat.light, 3.4)


def _tail_curl(pen: Pen, coat: Coat) -> None:
    pen.limb([(2, 0), (-6, 3), (-10, -2), (-6, -6), (-3, -2), (-8, 3), (-14, 0)], 2.2, coat.fur)


def _tail_wag(pen: Pen, coat: Coat) -> None:
    pen.limb([(2, 2), (-9, -1), (-15, -10)], 5.0, coat.fur)


def _tail_ringed(pen: Pen, coat: Coat) -> None:
    line: list[Point] = [(2, 2), (-9, 4), (-17, -3), (-19, -13), (-16, -20)]
    pen.limb(line, 7.4, coat.fur)
    for (x, y), turn in (((-8, 3.8), 10), ((-15.6, -0.6), 60), ((-19, -9), 90), ((-16.4, -19), 110)):
        with pen.moved(x, y, turn=turn):
            pen.line_through([(0, -2.6), (0, 2.6)], coat.dark, 3.2)


def _tail_tuft_tail(pen: Pen, coat: Coat) -> None:
    pen.limb([(2, 2), (-9, 5), (-17, -1), (-17, -11)], 3.0, coat.fur)
    pen.shape(smooth([(-17, -10), (-22, -15), (-18, -23), (-13, -15)]), coat.dark)


def _tail_spiked(pen: Pen, coat: Coat) -> None:
    for x, y in ((-8, 0), (-15, 2), (-21, 4)):
        pen.shape(polygon([(x - 4, y), (x - 2, y - 8), (x + 4, y)]), coat.dark)
    pen.shape(smooth([(4, -8), (-6, -2), (-17, 3), (-29, 5), (-31, 9), (-18, 11), (-4, 11), (4, 8)]), coat.fur)


def _tail_feathers(pen: Pen, coat: Coat) -> None:
    pen.shape(smooth([(2, -4), (-7, -9), (-14, -12), (-12, -5), (-14, 0), (-6, 5), (2, 6)]), coat.fur)


def _nothing(pen: Pen, coat: Coat) -> None:
    """Draw nothing: the species has no such part."""


EARS: dict[str, Callable[[Pen, Coat], None]] = {
    "none": _nothing, "long": _ears_long, "pointed": _ears_pointed, "tall_pointed": _ears_tall_pointed,
    "round": _ears_round, "round_dark": _ears_round_dark, "huge_round": _ears_huge_round, "flaps": _ears_flaps,
    "folded": _ears_folded, "floppy": _ears_floppy, "side_round": _ears_side_round, "fluffy": _ears_fluffy,
    "horned": _ears_horned, "tuft": _ears_tuft, "horns": _ears_horns, "antlers": _ears_antlers, "cow": _ears_cow,
    "drop": _ears_drop, "tiny": _ears_tiny, "tufted_small": _ears_tufted_small,
}  # fmt: skip
MUZZLES: dict[str, Callable[[Pen, Coat, str, bool], None]] = {
    "plain": _muzzle_plain, "buck": _muzzle_buck, "whiskers": _muzzle_whiskers, "snout": _muzzle_snout,
    "snout_small": _muzzle_snout_small, "mask": _muzzle_mask, "pointed_nose": _muzzle_pointed_nose,
    "big_nose": _muzzle_big_nose, "wide": _muzzle_wide, "bill": _muzzle_bill, "beak": _muzzle_beak,
    "trunk": _muzzle_trunk, "pig": _muzzle_pig, "monkey": _muzzle_monkey, "nostrils": _muzzle_nostrils,
    "cow": _muzzle_cow,
}  # fmt: skip
TAILS: dict[str, Callable[[Pen, Coat], None]] = {
    "none": _nothing, "puff": _tail_puff, "thin": _tail_thin, "long": _tail_long, "long_pink": _tail_long_pink,
    "bushy": _tail_bushy, "giant": _tail_giant, "curl": _tail_curl, "wag": _tail_wag, "ringed": _tail_ringed,
    "tuft_tail": _tail_tuft_tail, "spiked": _tail_spiked, "feathers": _tail_feathers,
}  # fmt: skip


def draw_face_mask(pen: Pen, muzzle: str, coat: Coat, head: tuple[float, float]) -> None:
    """Draw the light lower face of foxes and monkeys, under the eyes."""
    rx, ry = head
    with pen.clipped(oval(0, 0, rx - 1, ry - 1)):
        if muzzle == "mask":
            pen.fill(
                smooth([(-27, 2), (-14, 1), (-4, 6), (0, 2), (4, 6), (14, 1), (27, 2), (18, 24), (0, 26), (-18, 24)]),
                mix(coat.light, WHITE, 0.5),
            )
        if muzzle == "monkey":
            for s in (-1, 1):
                pen.disc(s * 8, -3, 10.5, 10.5, colour=coat.light)
            pen.disc(0, 8.5, 15.5, 9.5, colour=coat.light)
        if muzzle == "wide":
            pen.disc(0, 13, 21, 10, colour=coat.light)
