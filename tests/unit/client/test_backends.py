"""What an installation can do, from the wire: nothing is lost, nothing is guessed."""

from __future__ import annotations

from typing import get_args

from fabula.story.v1 import backend_pb2 as pb
from fabula.story.v1 import story_pb2
from fabula.story.v1.story_service_pb2 import ListBackendsResponse
from fabula_client import Backend, Backends, Drawing, Feature, QualitySettings
from fabula_client.backends import backends_from_pb


def test_a_pack_keeps_every_field() -> None:
    message = pb.Backend(
        pack="toon",
        digest="ab",
        architecture="storygen",
        is_default=True,
        writes=True,
        tells_stories=True,
        base_digest="cd",
        drawing=pb.Drawing(
            width_px=1,
            height_px=2,
            min_side_px=3,
            side_multiple_px=4,
            max_area_px=2**40,
            default_steps=5,
            max_steps=6,
            default_text_guidance=7.5,
            default_image_guidance=8.5,
            max_references=9,
            features=[pb.FEATURE_CHARACTERS],
            samplers=["euler", "ddim"],
            qualities=[
                pb.QualitySettings(quality=story_pb2.QUALITY_BEST, steps=10, text_guidance=11.5, image_guidance=12.5)
            ],
        ),
    )
    # Every field of the wire is set above, so that one that is added later is not forgotten here.
    for part in (message, message.drawing, message.drawing.qualities[0]):
        assert {field.name for field, _ in part.ListFields()} == set(part.DESCRIPTOR.fields_by_name)
    assert backends_from_pb(ListBackendsResponse(backends=[message])) == Backends(
        backends=(
            Backend(
                pack="toon",
                digest="ab",
                architecture="storygen",
                is_default=True,
                writes=True,
                tells_stories=True,
                base_digest="cd",
                drawing=Drawing(
                    width_px=1,
                    height_px=2,
                    min_side_px=3,
                    side_multiple_px=4,
                    max_area_px=2**40,
                    default_steps=5,
                    max_steps=6,
                    default_text_guidance=7.5,
                    default_image_guidance=8.5,
                    max_references=9,
                    features=("characters",),
                    samplers=("euler", "ddim"),
                    qualities=(QualitySettings(quality="best", steps=10, text_guidance=11.5, image_guidance=12.5),),
                ),
            ),
        ),
        unavailable_services=(),
    )


def test_a_pack_that_does_not_draw_has_no_drawing() -> None:
    found = backends_from_pb(ListBackendsResponse(backends=[pb.Backend(pack="pen")], unavailable_services=["frame"]))
    assert [backend.drawing for backend in found] == [None]
    assert (len(found), found.unavailable_services) == (1, ("frame",))


def test_every_feature_of_the_proto_is_known_and_a_newer_one_left_out() -> None:
    numbers = [number for number in pb.Feature.values() if number]
    message = pb.Backend(pack="toon", drawing=pb.Drawing(features=[*numbers, 99, pb.FEATURE_UNSPECIFIED]))
    (backend,) = backends_from_pb(ListBackendsResponse(backends=[message]))
    assert backend.drawing is not None
    assert set(backend.drawing.features) == set(get_args(Feature))
    assert len(backend.drawing.features) == len(numbers)
