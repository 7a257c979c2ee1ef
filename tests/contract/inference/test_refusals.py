"""What the unmodified tritonclient is told when something cannot be: the code, our reason, the tensor or parameter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.contract.inference.edge import WAIT_S, Edge
from tests.contract.inference.requests import caption_inputs, file, frame_inputs, noise, pixels, strings
from tests.contract.story.pictures import bomb_png, truncated_png

PICTURE = file(noise(1)[0])


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[str, str]:
    """Code and message of a refusal."""
    with pytest.raises(InferenceServerException) as error:
        call(*arguments, **named)
    return error.value.status().removeprefix("StatusCode."), error.value.message()


def until(condition: Callable[[], bool]) -> None:
    """Waits for the other side to notice something."""
    for _ in range(int(WAIT_S * 100)):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


@pytest.mark.parametrize(
    "name", ["frame/nowhere", "caption/nowhere", "tiny", "", "frame/", "caption/tiny/x", "story/tiny"]
)
def test_an_unknown_model_is_not_found(client: InferenceServerClient, name: str) -> None:
    for call in (client.get_model_metadata, client.get_model_config, lambda n: client.infer(n, frame_inputs())):
        code, message = refused(call, name)
        assert code == "NOT_FOUND"
        assert message.startswith("MODEL_UNKNOWN: Request for unknown model")
        assert "frame/" in message or "caption/" in message


def test_an_unknown_version_is_not_found(client: InferenceServerClient) -> None:
    code, message = refused(client.infer, "frame/tiny", frame_inputs(), model_version="2")
    assert (code, "version '2'" in message) == ("NOT_FOUND", True)


FRAME: list[tuple[str, Sequence[InferInput], dict[str, Any], str]] = [
    ("no prompt", [], {}, "TENSOR_INVALID: PROMPT: it is missing"),
    ("two prompts", [strings("PROMPT", "a", "b")], {}, "TENSOR_INVALID: PROMPT: its shape is [2]"),
    ("blank prompt", frame_inputs(" \n"), {}, "DESCRIPTION_EMPTY: PROMPT: "),
    ("long prompt", frame_inputs("x" * 200), {}, "DESCRIPTION_TOO_LONG: PROMPT: "),
    ("endless prompt", frame_inputs("x" * 5000), {}, "DESCRIPTION_TOO_LONG: PROMPT: the text has 5000 characters"),
    ("control characters", frame_inputs("a\x07b"), {}, "CAPTION_CHARACTERS_INVALID: PROMPT: "),
    ("not UTF-8", [strings("PROMPT", b"\xff")], {}, "TENSOR_INVALID: PROMPT: element 0 is not UTF-8"),
    ("another input", [*frame_inputs(), strings("NEGATIVE_PROMPT", "x")], {}, "UNKNOWN_FIELD: inputs: "),
    ("five references", frame_inputs(references=[PICTURE] * 5), {}, "TENSOR_INVALID: REFERENCE_IMAGES: it has 5"),
    ("more than the pack's", frame_inputs(references=[PICTURE] * 4), {}, "TOO_MANY_REFERENCES: REFERENCE_IMAGES: "),
    ("not a picture", frame_inputs(references=[PICTURE, b"GIF89a"]), {}, "IMAGE_UNREADABLE: REFERENCE_IMAGES[1]: "),
    ("cut picture", frame_inputs(references=[truncated_png()]), {}, "IMAGE_UNREADABLE: REFERENCE_IMAGES[0]: "),
    ("bomb", frame_inputs(references=[bomb_png()]), {}, "IMAGE_TOO_LARGE: REFERENCE_IMAGES[0]: "),
    ("no picture", frame_inputs(references=[b""]), {}, "IMAGE_MISSING: REFERENCE_IMAGES[0]: "),
    (
        "heavy picture",
        frame_inputs(references=[bytes((8 << 20) + 1)]),
        {},
        "IMAGE_TOO_LARGE: REFERENCE_IMAGES[0]: ",
    ),
    (
        "small pixels",
        [*frame_inputs(), pixels("REFERENCE_IMAGES", noise(1, side_px=8))],
        {},
        "IMAGE_TOO_SMALL: REFERENCE_IMAGES[0]: ",
    ),
    (
        "no pixels",
        [*frame_inputs(), pixels("REFERENCE_IMAGES", np.zeros((1, 0, 9, 3), dtype=np.uint8))],
        {},
        "TENSOR_INVALID: REFERENCE_IMAGES: a picture of no pixels",
    ),
    (
        "descriptions of nothing",
        [*frame_inputs(references=[PICTURE]), strings("REFERENCE_DESCRIPTIONS", "a", "b")],
        {},
        "TENSOR_INVALID: REFERENCE_DESCRIPTIONS: 2 descriptions of 1 pictures",
    ),
    (
        "distances of nothing",
        [*frame_inputs(references=[PICTURE]), pixels("REFERENCE_DISTANCES", np.uint8([1, 2]))],
        {},
        "TENSOR_INVALID: REFERENCE_DISTANCES: 2 distances of 1 pictures",
    ),
    (
        "far away",
        [*frame_inputs(references=[PICTURE]), pixels("REFERENCE_DISTANCES", np.uint8([9]))],
        {},
        "VALUE_OUT_OF_RANGE: REFERENCE_DISTANCES[0]: ",
    ),
    ("no edit", [*frame_inputs(), strings("EDIT_IMAGE", b"GIF89a")], {}, "IMAGE_UNREADABLE: EDIT_IMAGE: "),
    ("missing edit", [*frame_inputs(), strings("EDIT_IMAGE", b"")], {}, "IMAGE_MISSING: EDIT_IMAGE: "),
    ("two edits", [*frame_inputs(), strings("EDIT_IMAGE", PICTURE, PICTURE)], {}, "TENSOR_INVALID: EDIT_IMAGE: its "),
    ("strength of nothing", frame_inputs(), {"strength": 0.5}, "VALUE_OUT_OF_RANGE: strength: it is of an edit"),
    (
        "no strength",
        [*frame_inputs(), strings("EDIT_IMAGE", PICTURE)],
        {"strength": 0},
        "VALUE_OUT_OF_RANGE: strength: it is 0; it must be above 0",
    ),
    (
        "strength",
        [*frame_inputs(), strings("EDIT_IMAGE", PICTURE)],
        {"strength": 1.5},
        "VALUE_OUT_OF_RANGE: strength: it is 1.5; it must be from 0 to 1",
    ),
    ("steps", frame_inputs(), {"steps": 0}, "VALUE_OUT_OF_RANGE: steps: it is 0; it must be from 1 to 100"),
    ("steps as text", frame_inputs(), {"steps": "4"}, "VALUE_OUT_OF_RANGE: steps: a whole number is needed"),
    ("guidance", frame_inputs(), {"text_guidance": 31.0}, "VALUE_OUT_OF_RANGE: text_guidance: "),
    ("seed", frame_inputs(), {"seed": -1}, "VALUE_OUT_OF_RANGE: seed: "),
    ("odd width", frame_inputs(), {"width": 63}, "VALUE_OUT_OF_RANGE: width_px is 63"),
    ("sampler", frame_inputs(), {"sampler": "magic"}, "VALUE_OUT_OF_RANGE: no sampler 'magic'"),
    ("quality", frame_inputs(), {"quality": "superb"}, "VALUE_OUT_OF_RANGE: quality: it is 'superb'; it must be draft"),
    ("previews of one answer", frame_inputs(), {"preview_every": 1}, "VALUE_OUT_OF_RANGE: preview_every: "),
    ("character", frame_inputs(), {"characters": "Pip"}, "VALUE_OUT_OF_RANGE: characters: "),
    ("scale", frame_inputs(), {"characters": "a" * 64 + ":much"}, "VALUE_OUT_OF_RANGE: characters: 'much' is no"),
    ("vast scale", frame_inputs(), {"characters": "a" * 64 + ":3"}, "VALUE_OUT_OF_RANGE: characters[0]: "),
    ("tenant", frame_inputs(), {"tenant": "me"}, "UNKNOWN_FIELD: parameters: none is called 'tenant'"),
    ("misspelt", frame_inputs(), {"stpes": 4}, "UNKNOWN_FIELD: parameters: none is called 'stpes'"),
]


@pytest.mark.parametrize(("inputs", "parameters", "start"), [pytest.param(*case[1:], id=case[0]) for case in FRAME])
def test_a_bad_frame_request_is_refused_by_name(
    client: InferenceServerClient, edge: Edge, inputs: list[InferInput], parameters: dict[str, Any], start: str
) -> None:
    drawn = dict(edge.steps.count)
    code, message = refused(client.infer, "frame/tiny", inputs, parameters=parameters)
    assert code == "INVALID_ARGUMENT", message
    assert message.startswith(start) or start in message, message
    assert edge.steps.count == drawn, "nothing was started"


CAPTION: list[tuple[str, Sequence[InferInput], dict[str, Any], str]] = [
    ("no picture", [strings("CAPTIONS", "x")], {}, "TENSOR_INVALID: IMAGE: it is missing"),
    ("no caption", [strings("IMAGE", PICTURE), strings("CAPTIONS")], {}, "TENSOR_INVALID: CAPTIONS: story needs"),
    ("blank caption", caption_inputs("a", " "), {}, "CAPTION_EMPTY: CAPTIONS[1]: "),
    ("long caption", caption_inputs("x" * 1001), {}, "CAPTION_TOO_LONG: CAPTIONS[0]: "),
    ("many captions", caption_inputs(*["x"] * 22), {}, "TENSOR_INVALID: CAPTIONS: it has 22"),
    ("one to describe", caption_inputs("a"), {"adapter": "descriptive"}, "TENSOR_INVALID: CAPTIONS: descriptive needs"),
    (
        "descriptions for a story",
        [*caption_inputs("a"), strings("EARLIER_DESCRIPTIONS", "x")],
        {},
        "TENSOR_INVALID: EARLIER_DESCRIPTIONS: only the adapter 'descriptive'",
    ),
    (
        "blank description",
        [*caption_inputs("a", "b"), strings("EARLIER_DESCRIPTIONS", "x", "")],
        {"adapter": "descriptive"},
        "DESCRIPTION_EMPTY: EARLIER_DESCRIPTIONS[1]: ",
    ),
    ("damaged picture", [strings("IMAGE", b"no"), strings("CAPTIONS", "x")], {}, "IMAGE_UNREADABLE: IMAGE: "),
    ("adapter", caption_inputs("a"), {"adapter": "poetic"}, "VALUE_OUT_OF_RANGE: adapter: it is 'poetic'"),
    ("temperature", caption_inputs("a"), {"temperature": 2.5}, "VALUE_OUT_OF_RANGE: temperature: "),
    ("steps", caption_inputs("a"), {"steps": 4}, "UNKNOWN_FIELD: parameters: none is called 'steps'"),
]


@pytest.mark.parametrize(("inputs", "parameters", "start"), [pytest.param(*case[1:], id=case[0]) for case in CAPTION])
def test_a_bad_caption_request_is_refused_by_name(
    client: InferenceServerClient, edge: Edge, inputs: list[InferInput], parameters: dict[str, Any], start: str
) -> None:
    asked = len(edge.script.calls)
    code, message = refused(client.infer, "caption/tiny", inputs, parameters=parameters)
    assert (code, message.startswith(start)) == ("INVALID_ARGUMENT", True), message
    assert len(edge.script.calls) == asked, "nobody was asked"


def test_what_is_not_offered_is_refused(client: InferenceServerClient) -> None:
    outputs = [InferRequestedOutput("SOUND")]
    assert refused(client.infer, "frame/tiny", frame_inputs(), outputs=outputs)[1].startswith(
        "UNKNOWN_FIELD: outputs: "
    )
    ranked = [InferRequestedOutput("IMAGE", class_count=3)]
    assert (
        "IMAGE: its parameter 'classification'"
        in refused(client.infer, "frame/tiny", frame_inputs(), outputs=ranked)[1]
    )
    of_a_sequence = refused(client.infer, "frame/tiny", frame_inputs(), sequence_id=7)
    assert of_a_sequence[0] == "INVALID_ARGUMENT"
    assert "sequence" in of_a_sequence[1]
    assert refused(client.infer, "frame/tiny", frame_inputs(), request_id="x" * 256)[1].startswith(
        "VALUE_OUT_OF_RANGE: id"
    )
    assert "timeout" in refused(client.infer, "frame/tiny", frame_inputs(), timeout=-1)[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.get_inference_statistics(),
        lambda client: client.get_trace_settings(),
        lambda client: client.get_log_settings(),
        lambda client: client.get_system_shared_memory_status(),
        lambda client: client.register_system_shared_memory("a", "/a", 8),
        lambda client: client.unregister_system_shared_memory("a"),
        lambda client: client.get_cuda_shared_memory_status(),
        lambda client: client.unregister_cuda_shared_memory("a"),
    ],
)
def test_what_is_not_here_says_what_to_use(client: InferenceServerClient, call: Callable[..., Any]) -> None:
    code, message = refused(call, client)
    assert code == "UNIMPLEMENTED"
    assert message.startswith("UNIMPLEMENTED: ")
    assert len(message) > len("UNIMPLEMENTED: This method does not exist")


def test_a_refusal_carries_the_usual_details(edge: Edge) -> None:
    request = service_pb2.ModelInferRequest(model_name="frame/tiny")
    request.inputs.add(name="PROMPT", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b" ")
    with grpc.insecure_channel(edge.target) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(request, timeout=WAIT_S)
    details = dict(raised.value.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    info, violations = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    status.details[0].Unpack(info)
    status.details[1].Unpack(violations)
    assert (info.domain, info.reason) == ("fabula", "DESCRIPTION_EMPTY")
    assert [violation.field for violation in violations.field_violations] == ["PROMPT"]


# -- deadlines, outages ------------------------------------------------------------------------------------------------


def test_the_sooner_of_deadline_and_timeout_counts(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge()
    edge.steps.hold_after = 0
    with InferenceServerClient(edge.target) as client:
        for limits in ({"timeout": 300_000}, {"timeout": 300_000, "client_timeout": WAIT_S}):
            code, message = refused(client.infer, "frame/tiny", frame_inputs(), **limits)
            assert (code, message) == (
                "DEADLINE_EXCEEDED",
                "DEADLINE_EXCEEDED: The deadline passed before the work was done.",
            )
        code, _ = refused(client.infer, "frame/tiny", frame_inputs(), client_timeout=0.3, timeout=int(WAIT_S * 1e6))
        assert code == "DEADLINE_EXCEEDED"
        edge.steps.release()
        # 0 is none, and nothing of the others is left in the engine.
        assert client.infer("frame/tiny", frame_inputs(), timeout=0, parameters={"steps": 1, "seed": 9})
        until(lambda: not edge.engine.tickets)
    # At most the one that the engine was held before got its step.
    assert sum(count for seed, count in edge.steps.count.items() if seed != 9) <= 1


def test_a_full_queue_is_told_as_such(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge(max_running=1, max_queued=1)
    edge.steps.hold_after = 0
    with InferenceServerClient(edge.target) as client:
        calls = []
        for count in (1, 2):  # one is drawn and one waits; whoever comes now is refused
            calls.append(client.async_infer("frame/tiny", frame_inputs(), lambda **_: None, parameters={"steps": 1}))
            until(lambda count=count: len(edge.engine.tickets) == count and edge.steps.held.is_set())
        code, message = refused(client.infer, "frame/tiny", frame_inputs(), parameters={"steps": 1})
        assert (code, message.startswith("QUEUE_FULL: ")) == ("RESOURCE_EXHAUSTED", True)
        edge.steps.release()


def test_a_service_that_is_gone_is_unavailable(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge()
    with InferenceServerClient(edge.target) as client:
        assert client.is_model_ready("frame/tiny")
        edge.outage("frame")
        assert not client.is_server_ready()
        assert client.is_server_live()
        assert not client.is_model_ready("frame/tiny")
        assert client.is_model_ready("caption/tiny")
        states = {model.name: model.state for model in client.get_model_repository_index().models}
        assert states == {"frame/tiny": "UNAVAILABLE", "caption/tiny": "READY"}
        # Known from before, so its description is; nobody can draw with it.
        assert client.get_model_metadata("frame/tiny").name == "frame/tiny"
        assert refused(client.infer, "frame/tiny", frame_inputs())[0] == "UNAVAILABLE"
        edge.outage("caption")
        code, message = refused(client.infer, "caption/other", caption_inputs())
        assert (code, "UNAVAILABLE: the caption service does not answer" in message) == ("UNAVAILABLE", True)


def test_a_stopping_process_takes_nothing_more(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge()
    with InferenceServerClient(edge.target) as client:
        edge.run(lambda: edge.grpc.serving(False))
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("frame/tiny")
        code, message = refused(client.infer, "frame/tiny", frame_inputs())
        assert (code, message.startswith("SHUTTING_DOWN: ")) == ("UNAVAILABLE", True)
