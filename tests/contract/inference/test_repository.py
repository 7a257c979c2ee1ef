"""The repository as the unmodified tritonclient sees it: what is listed, and a character that comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from tritonclient.grpc import InferenceServerClient, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.contract.inference.edge import WAIT_S, Edge
from tests.contract.inference.requests import frame_inputs


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[str, str]:
    """Code and message of a refusal."""
    with pytest.raises(InferenceServerException) as error:
        call(*arguments, **named)
    return error.value.status().removeprefix("StatusCode."), error.value.message()


def test_the_index_lists_every_pack_of_both_services(client: InferenceServerClient) -> None:
    index = client.get_model_repository_index()
    assert [(model.name, model.version, model.state) for model in index.models] == [
        ("frame/tiny", "1", "READY"),
        ("caption/tiny", "1", "READY"),
    ]


def test_a_character_hot_loads_is_drawn_and_leaves(client: InferenceServerClient, edge: Edge) -> None:
    digest = edge.files.keep_character(edge.model, 1)
    edge.files.fetched.clear()
    name = f"frame/tiny/{digest}"
    client.load_model(name)
    assert edge.files.fetched == [digest]
    client.load_model(name)
    asked = {"steps": 1, "seed": 50}
    worn = client.infer(name, frame_inputs(), parameters=asked)
    assert edge.files.fetched == [digest], "it was in memory already"
    assert [one.digest for one in edge.steps.jobs[50].characters] == [digest]
    assert client.is_model_ready(name)
    assert client.get_model_metadata(name).name == name
    client.unload_model(name)
    client.unload_model(name)  # unloading twice is well
    client.load_model(name)
    assert edge.files.fetched == [digest, digest], "it had left memory"
    plain = client.infer("frame/tiny", frame_inputs(), parameters=asked)
    named = client.infer("frame/tiny", frame_inputs(), parameters={**asked, "characters": digest})
    hinted = client.infer("frame/tiny", frame_inputs(), parameters={**asked, "characters": f"{digest}:0.5"})
    pictures = [result.as_numpy("IMAGE")[0] for result in (worn, named, plain, hinted)]
    assert pictures[0] == pictures[1]
    assert len({*pictures}) == 3
    assert [one.scale for one in edge.steps.jobs[50].characters] == [0.5]


def test_loading_draws_nothing_and_leaves_no_job(new_edge: Callable[..., Edge]) -> None:
    edge = new_edge(max_running=1)
    digest = edge.files.keep_character(edge.model, 2)
    edge.steps.hold_after = 0
    with InferenceServerClient(edge.target) as client:
        call = client.async_infer("frame/tiny", frame_inputs(), lambda **_: None, parameters={"steps": 1, "seed": 7})
        assert edge.steps.held.wait(WAIT_S)
        client.load_model(f"frame/tiny/{digest}")  # behind a job that does not move
        edge.steps.release()
        client.infer("frame/tiny", frame_inputs(), parameters={"steps": 1, "seed": 8})
        del call
    assert edge.files.fetched == [digest]
    assert set(edge.steps.count) == {7, 8}


def test_a_character_nobody_stored_cannot_be_loaded(client: InferenceServerClient) -> None:
    code, message = refused(client.load_model, "frame/tiny/" + "a" * 64)
    assert (code, message.startswith("CHARACTER_WEIGHTS_UNKNOWN: ")) == ("NOT_FOUND", True)
    code, message = refused(client.infer, "frame/tiny/" + "a" * 64, frame_inputs())
    assert (code, message.startswith("CHARACTER_WEIGHTS_UNKNOWN: ")) == ("NOT_FOUND", True)
    assert refused(client.load_model, "frame/tiny/Pip")[0] == "INVALID_ARGUMENT"
    assert not client.is_model_ready("frame/tiny/Pip")


def test_a_pack_is_loaded_and_stays(client: InferenceServerClient) -> None:
    client.load_model("frame/tiny")
    client.load_model("caption/tiny")
    assert refused(client.load_model, "frame/nowhere")[0] == "NOT_FOUND"
    for name in ("frame/tiny", "caption/tiny"):
        code, message = refused(client.unload_model, name)
        assert (code, "frame/<pack>/<digest>" in message) == ("UNIMPLEMENTED", True)
    assert client.is_model_ready("frame/tiny")
    for sent in ({"config": "{}"}, {"config": "{}", "files": {"file:1/model.onnx": b"x"}}):
        assert refused(client.load_model, "frame/tiny", **sent)[0] == "UNIMPLEMENTED"


def test_a_parameter_may_name_the_character_too(edge: Edge) -> None:
    digest = edge.files.keep_character(edge.model, 3)
    edge.files.fetched.clear()
    with grpc.insecure_channel(edge.target) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def asked(**parameters: str) -> Any:
            request = service_pb2.RepositoryModelLoadRequest(model_name="frame/tiny")
            for name, value in parameters.items():
                request.parameters[name].string_param = value
            return request

        stub.RepositoryModelLoad(asked(character=digest), timeout=WAIT_S)
        assert edge.files.fetched == [digest]
        for bad, start in (
            ({"character": "Pip"}, "VALUE_OUT_OF_RANGE: character: "),
            ({"adapter": "x"}, "UNKNOWN_FIELD: "),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                stub.RepositoryModelLoad(asked(**bad), timeout=WAIT_S)
            assert raised.value.details().startswith(start)
        with pytest.raises(grpc.RpcError) as raised:
            stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(repository_name="other"), timeout=WAIT_S)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        ready = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=WAIT_S)
        assert len(ready.models) == 2
