"""What the caption service makes of a request."""

from __future__ import annotations

from fabula.caption.v1 import caption_service_pb2 as pb

from services.caption.service import describe_job_from_pb


def test_a_describe_request_keeps_every_caption_of_its_story() -> None:
    request = pb.DescribeRequest(previous_caption="Two.", caption="Three.", earlier_captions=["Zero.", "One."])
    job = describe_job_from_pb(request)
    assert job.earlier_captions == ("Zero.", "One.")
    assert describe_job_from_pb(pb.DescribeRequest(earlier_descriptions=["A.", "B."])).earlier_descriptions == (
        "A.",
        "B.",
    )
    assert (job.previous_caption, job.caption) == ("Two.", "Three.")
    assert describe_job_from_pb(pb.DescribeRequest(caption="One.")).earlier_captions == ()
