"""Puts a character together: skeleton, species, coat, face, accessory and what it holds.

Draws one actor around its own origin (between the feet); it knows nothing of backgrounds or of other actors.
"""

from __future__ import annotations

import skia

from training.toon.accessories import EYEWEAR, HEADWEAR, NECKWEAR, draw_cape_behind
from training.toon.colours import CLOTH, FUR, OUTLINE, RGB, WHITE, belly, ink_on, shade
from training.toon.face import draw_blush, draw_brows, draw_eyes, draw_sweat, draw_tears
from training.toon.parts import (
    BEAK,
    EARS,
    MUZZLES,
    TAILS,
    Coat,
    draw_body_marks,
    draw_face_mask,
    draw_marks,
    draw_marks_behind,
    draw_marks_over,
)
from training.toon.pen import Pen, Point, oval, scallops, smooth, spikes
from training.toon.pose import ACROSS_PROPS, FRONT_PROPS, Pose, pose_for
from training.toon.props import PROP_DRAWERS
from training.toon.scene import Actor, Look
from training.toon.species import BUILDS, Build

ARM = 6.6  # thickness of an arm, without its outline
LEG = 8.0
FURRY_MUZZLES = ("plain", "buck", "whiskers", "trunk", "pig", "bill", "beak", "big_nose")  # the mouth lies on fur


def coat_of(look: Look) -> Coat:
    """Return the three colours of a character's body."""
    fur = look.fur_rgb or FUR[look.colour]
    if look.species == "panda":
        return Coat(fur=(250, 248, 246), light=WHITE, dark=fur if look.colour != "white" else (120, 120, 134))
    light = look.belly_rgb or belly(fur)
    if look.species == "penguin":
        light = WHITE
    if look.species == "sheep":
        light = (232, 190, 156) if look.colour not in ("orange", "brown") else (255, 232, 212)
    if look.species == "hedgehog":
        light = (255, 232, 204)
    return Coat(fur=fur, light=light, dark=shade(fur))


class Figure:
    """One actor, ready to be drawn part by part from back to front."""

    def __init__(self, pen: Pen, actor: Actor, prop_scale: float) -> None:
        look = actor.character.look
        self.pen, self.actor = pen, actor
        self.build: Build = BUILDS[look.species]
        self.coat = coat_of(look)
        self.cloth: RGB = look.accessory_rgb or CLOTH[look.accessory_colour]
        self.accessory = look.accessory
        self.pose: Pose = pose_for(actor.action, actor.prop)
        self.prop_scale = prop_scale

    def draw(self) -> None:
        """Draw the actor standing on y = 0."""
        pose = self.pose
        with self.pen.moved(0, -pose.lift, turn=pose.lean):
            if pose.lying:
                self._lying()
            else:
                self._upright()
        self._signs()

    # -- the two arrangements ------------------------------------------------------------------------------------------

    def _upright(self) -> None:
        pose, pen = self.pose, self.pen
        bx, by = pose.body
        if self.accessory == "cape":
            with pen.moved(*self._neck()):
                draw_cape_behind(pen, self.cloth)
        with pen.moved(bx - 10, by + 7):
            TAILS[self.build.tail](pen, self.coat)
        if not pose.seated:
            self._legs()
        self._body()
        if pose.seated:
            self._seated_feet()
        self._head()
        self._neckwear(self._neck())
        prop = self.actor.prop
        if prop in FRONT_PROPS:
            self._prop((0, -19))
        if prop in ACROSS_PROPS:
            self._prop((-2, -19))
        if prop is not None and prop not in FRONT_PROPS + ACROSS_PROPS:
            self._prop(pose.hands[1])
        self._arms()

    def _lying(self) -> None:
        pose, pen = self.pose, self.pen
        bx, by = pose.body
        with pen.moved(bx + 22, by + 5, mirror=True):
            TAILS[self.build.tail](pen, self.coat)
        self._body()
        pen.ellipse(bx + 17, -4, 8.2, 4.6, colour=BEAK if self.build.bird else self._limb_colour())
        if self.accessory == "cape":
            pen.shape(
                smooth([(-2, -27), (10, -31), (28, -27), (42, -14), (44, -6), (30, -9), (16, -7), (4, -8)]), self.cloth
            )
        if self.accessory in NECKWEAR:
            with pen.moved(9, -14, turn=-72, scale=0.92):
                NECKWEAR[self.accessory](pen, self.cloth)
        self._head()
        for x in (-24.0, -4.0):
            pen.ellipse(x, -3.6, 7.0, 4.2, colour=self._limb_colour())

    def _neck(self) -> Point:
        return self.pose.head[0] * 0.6, self.pose.head[1] + 20.5

    def _limb_colour(self) -> RGB:
        if self.build.dark_limbs:
            return self.coat.dark
        if self.actor.character.look.species in ("sheep", "hedgehog"):
            return self.coat.light
        return self.coat.fur

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _legs(self) -> None:
        pose, pen = self.pose, self.pen
        foot = BEAK if self.build.bird else self._limb_colour()
        for hip, (x, y) in zip(pose.hips, pose.feet, strict=True):
            leg = 3.4 if self.build.bird else LEG
            pen.limb([hip, (x * 0.98, y - 2)], leg, foot)
            pen.ellipse(x + (1.2 if x > 0 else -1.2), y, 7.2, 4.2, colour=foot)
            if not self.build.bird:
                pen.stroke(smooth([hip, (x * 0.98, y - 2.6)], closed=False), foot, leg)

    def _seated_feet(self) -> None:
        foot = BEAK if self.build.bird else self._limb_colour()
        sole = foot if self.build.bird else self.coat.light
        for x, y in self.pose.feet:
            self.pen.ellipse(x, y - 3, 7.6, 7.2, colour=foot)
            self.pen.disc(x, y - 2.4, 4.2, 4.0, colour=sole)

    def _body(self) -> None:
        pose, pen, coat = self.pose, self.pen, self.coat
        (bx, by), (rx, ry) = pose.body, pose.body_radii
        marks = self.build.marks
        if "wool" in marks:
            pen.shape(scallops(bx, by, rx + 0.5, ry - 0.5, 13, 4), coat.fur)
            return
        if "quills" in marks:
            pen.shape(spikes(bx, by - 1, rx + 1, ry - 1.5, 13, 9), coat.dark)
        pen.fill(oval(bx, by, rx, ry), coat.fur if "quills" not in marks else coat.light)
        draw_body_marks(pen, marks, coat, bx, by, rx, ry)
        if "quills" not in marks:
            if pose.lying:
                with pen.clipped(oval(bx, by, rx, ry)):
                    pen.disc(bx - 4, by + 13, rx * 0.8, ry * 0.55, colour=coat.light)
            else:
                with pen.clipped(oval(bx, by, rx, ry)):
                    pen.disc(
                        bx,
                        by + 2.6,
                        rx * self.build.belly_ratio,
                        ry * (self.build.belly_ratio + 0.06),
                        colour=coat.light,
                    )
        pen.stroke(oval(bx, by, rx, ry))

    def _head(self) -> None:
        pose, pen, build, coat = self.pose, self.pen, self.build, self.coat
        mood, closed = self.actor.mood, self.actor.action == "sleep"
        crying = self.actor.action == "cry"
        rx, ry = build.head_radii
        with pen.moved(*pose.head, turn=pose.head_tilt):
            draw_marks_behind(pen, build.marks, coat)
            EARS[build.ears](pen, coat)
            bulging = build.eye_spot[1] < -10  # frogs' eyes stand on the head, in front of any hat
            if bulging and self.accessory in HEADWEAR:
                with pen.moved(0, build.hat_y):
                    HEADWEAR[self.accessory](pen, self.cloth)
            if bulging:
                for s in (-1, 1):
                    pen.ellipse(s * build.eye_spot[0], build.eye_spot[1], 9.6, 9.8, colour=coat.fur)
            pen.ellipse(0, 0, rx, ry, colour=coat.fur)
            if bulging:
                with pen.clipped(oval(0, 0, rx + 1, ry + 1)):
                    for s in (-1, 1):
                        pen.disc(s * build.eye_spot[0], build.eye_spot[1], 8.6, 8.8, colour=coat.fur)
            draw_marks(pen, build.marks, coat, build.eye_spot, build.head_radii)
            draw_face_mask(pen, build.muzzle, coat, build.head_radii)
            if "wool" in build.marks or "quills" in build.marks or "heart_face" in build.marks:
                pen.stroke(oval(0, 0, rx, ry))
            draw_marks_over(pen, build.marks, coat)
            draw_blush(pen, x=rx - 7.0)
            lid = coat.dark if build.marks and build.marks[0] in ("panda_eyes", "bandit") else coat.fur
            if build.marks and build.marks[0] in ("wool", "quills", "eye_discs"):
                lid = coat.light
            if "heart_face" in build.marks:
                lid = (214, 214, 226)
            pen.ink = ink_on(lid)
            draw_eyes(pen, mood, build.eye_spot, lid, closed or crying)
            pen.ink = ink_on(coat.fur) if build.muzzle in FURRY_MUZZLES and "heart_face" not in build.marks else OUTLINE
            MUZZLES[build.muzzle](pen, coat, mood, closed)
            pen.ink = OUTLINE
            if crying:
                draw_tears(pen, build.eye_spot)
            if mood == "scared":
                draw_sweat(pen)
            if self.accessory in EYEWEAR:
                EYEWEAR[self.accessory](pen, self.cloth, build.eye_spot)
            if self.accessory in HEADWEAR and not bulging:
                with pen.moved(0, build.hat_y if self.accessory != "earmuffs" else -14):
                    HEADWEAR[self.accessory](pen, self.cloth)
            if not closed:
                pen.ink = ink_on(lid)
                draw_brows(pen, mood, build.eye_spot)
                pen.ink = OUTLINE

    def _neckwear(self, neck: Point) -> None:
        if self.accessory in NECKWEAR:
            with self.pen.moved(*neck, scale=1.12):
                NECKWEAR[self.accessory](self.pen, self.cloth)

    def _arms(self) -> None:
        colour = self._limb_colour()
        pose = self.pose
        for shoulder, elbow, hand in zip(pose.shoulders, pose.elbows, pose.hands, strict=True):
            self.pen.limb([shoulder, elbow, hand], ARM + (1.4 if self.build.bird else 0), colour)

    def _prop(self, grip: Point) -> None:
        assert self.actor.prop is not None
        with self.pen.moved(*grip, scale=self.prop_scale):
            PROP_DRAWERS[self.actor.prop](self.pen)

    # -- signs in the air ----------------------------------------------------------------------------------------------

    def _signs(self) -> None:
        pen, action = self.pen, self.actor.action
        if action == "sleep":
            for x, y, size in ((16.0, -46.0, 4.2), (25.0, -57.0, 5.4), (36.0, -70.0, 6.8)):
                zed = [
                    (x - size / 2, y - size / 2),
                    (x + size / 2, y - size / 2),
                    (x - size / 2, y + size / 2),
                    (x + size / 2, y + size / 2),
                ]
                path = _corner_path(zed)
                pen.stroke(path, OUTLINE, 4.2)
                pen.stroke(path, WHITE, 1.9)
        if action == "dance":
            for x, y in ((-40.0, -62.0), (40.0, -36.0)):
                pen.line_through([(x + 4, y), (x + 4, y - 16)], OUTLINE, 2.6)
                pen.line_through([(x + 4, y - 16), (x + 11, y - 11)], OUTLINE, 3.8)
                pen.ellipse(x, y, 5.2, 4.2, colour=(255, 110, 190), width=1.9)
        if action == "cheer":
            for x, y, turn in ((-38.0, -74.0, -40), (38.0, -74.0, 40), (-42.0, -60.0, -75), (42.0, -60.0, 75)):
                with pen.moved(x, y, turn=turn):
                    pen.line_through([(0, 3.4), (0, -3.4)], OUTLINE, 4.8)
                    pen.line_through([(0, 3.4), (0, -3.4)], (255, 224, 70), 2.4)
        if action == "run":
            for y, length in ((-44.0, 9), (-30.0, 12), (-16.0, 8)):
                pen.line_through([(-34, y), (-34 - length, y)], WHITE, 2.6)


def _corner_path(points: list[Point]) -> skia.Path:
    path = skia.Path()
    path.moveTo(*points[0])
    for point in points[1:]:
        path.lineTo(*point)
    return path
