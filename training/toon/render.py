"""Draws a scene: background, shadows, actors, things on the ground.

Anti-aliased vectors through skia, so every size is the same picture; a scene always gives the same pixels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import skia

from training.toon.figure import Figure
from training.toon.pen import Pen
from training.toon.pose import SIDE_PROPS
from training.toon.props import draw_ground_prop
from training.toon.scene import Actor, Grade, Scene
from training.toon.settings import SIZE, draw_setting

GROUND = 117.0
# Middle of each actor and its scale, by how many there are.
PLACES: dict[int, tuple[tuple[float, ...], float]] = {
    1: ((63.0,), 1.0),
    2: ((36.0, 93.0), 0.79),
    3: ((23.0, 64.0, 105.0), 0.64),
}
# Where they stand when the last of them holds something up on the right, which would else leave the picture.
HOLDING_PLACES: dict[int, tuple[float, ...]] = {1: (54.0,), 2: (28.0, 82.0), 3: (19.0, 57.0, 96.0)}
BESIDE_X = 104.0  # where a thing on the ground lies beside a single actor, who then steps aside
ASIDE_X = 47.0
_SAME_COLOUR = 8  # of 255, in the channel that differs most
PROP_FACTOR = {1: 1.0, 2: 1.18, 3: 1.2}  # held things shrink less than who holds them, or they could not be seen


def _actor(pen: Pen, actor: Actor, x: float, scale: float, prop_scale: float) -> None:
    wide = 33.0 if actor.action == "sleep" else 21.0
    shift = 8.0 if actor.action == "sleep" else 0.0
    if actor.action == "jump":
        wide = 16.0
    pen.disc(x + shift * scale, GROUND, wide * scale, 4.4 * scale, colour=(30, 26, 48), alpha=84)
    with pen.moved(x, GROUND, scale=scale):
        Figure(pen, actor, prop_scale).draw()


def _graded(pixels: npt.NDArray[np.uint8], grade: Grade) -> npt.NDArray[np.uint8]:
    """Turn the hue (a rotation about the grey axis) and apply the channel gains."""
    angle = np.deg2rad(grade.hue_deg)
    c, s = np.cos(angle), np.sin(angle)
    third, root = (1 - c) / 3, np.sqrt(1 / 3) * s
    turn = np.array(
        [
            [c + third, third - root, third + root],
            [third + root, c + third, third - root],
            [third - root, third + root, c + third],
        ]
    )
    flat = pixels.astype(np.float64) @ turn.T * np.array(grade.gains)
    graded: npt.NDArray[np.uint8] = np.clip(np.rint(flat), 0, 255).astype(np.uint8)
    return graded


def render(scene: Scene, size_px: int = 128) -> npt.NDArray[np.uint8]:
    """Return the picture of `scene`: uint8 RGB of shape [size_px, size_px, 3]."""
    return _drawn(scene, size_px, figures=True)


def figure_mask(scene: Scene, size_px: int = 128) -> npt.NDArray[np.bool_]:
    """Where figures, their shadows and what they hold are seen in `render`'s picture: [size_px, size_px]."""
    with_them, without = (_drawn(scene, size_px, figures=figures).astype(np.int16) for figures in (True, False))
    seen: npt.NDArray[np.bool_] = np.abs(with_them - without).max(axis=-1) > _SAME_COLOUR
    return seen


def _drawn(scene: Scene, size_px: int, *, figures: bool) -> npt.NDArray[np.uint8]:
    surface = skia.Surface(size_px, size_px)
    canvas = surface.getCanvas()
    canvas.scale(size_px / SIZE, size_px / SIZE)
    pen = Pen(canvas)
    draw_setting(pen, scene.setting, scene.time, scene.side, scene.weather, scene.palette)
    count = len(scene.actors)
    xs, scale = PLACES[count]
    if count == 1 and scene.ground_prop is not None:
        xs = (ASIDE_X,)
    elif scene.actors[-1].prop in SIDE_PROPS:
        xs = HOLDING_PLACES[count]
    for actor, x in zip(scene.actors, xs, strict=True) if figures else ():
        _actor(pen, actor, x, scale, PROP_FACTOR[count])
    if scene.ground_prop is not None:
        if count == 1:
            draw_ground_prop(pen, scene.ground_prop, BESIDE_X, GROUND + 2, 1.0)
        else:
            draw_ground_prop(pen, scene.ground_prop, 64.0, GROUND + 7, 0.8)
    pixels: npt.NDArray[np.uint8] = np.ascontiguousarray(surface.toarray(colorType=skia.kRGBA_8888_ColorType)[..., :3])
    return pixels if scene.grade is None else _graded(pixels, scene.grade)
