"""The examples of clients/triton, run as they are, and the real story process with the protocol on and off."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from tests.contract.inference.edge import WAIT_S, Edge
from tests.contract.inference.requests import caption_inputs, file, frame_inputs, noise
from tests.contract.story.scripted_services import ScriptedServices
from tests.contract.story.story_process import StoryProcess

EXAMPLES = Path(__file__).resolve().parents[3] / "clients" / "triton"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(EXAMPLES / script), *arguments]  # isolated: nothing of ours is importable
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT_S, check=False)


def test_the_examples_know_only_the_stock_client() -> None:
    for path in EXAMPLES.glob("*.py"):
        imports = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert imports - sys.stdlib_module_names == {"numpy", "tritonclient"}, path


def test_draw_frame(edge: Edge, tmp_path: Path) -> None:
    reference = tmp_path / "earlier.png"
    reference.write_bytes(file(noise(1)[0]))
    out = tmp_path / "frame.png"
    flags = ["--url", edge.target, "--pack", "tiny", "--steps", "2", "--seed", "9", "--out", str(out)]
    done = run("draw_frame.py", *flags, "--prompt", "a fox", "--reference", str(reference), "--caption", "A fox came.")
    assert done.returncode == 0, done.stderr
    assert Image.open(out).format == "PNG"
    first, second = done.stdout.splitlines()
    assert first == f"{out}: seed 9, 2 steps"
    assert second.startswith("Then came frame 1")
    failed = run("draw_frame.py", *flags, "--prompt", " ")
    assert failed.returncode == 1
    assert failed.stderr.startswith("StatusCode.INVALID_ARGUMENT: DESCRIPTION_EMPTY: PROMPT: ")


def test_watch_frames(edge: Edge, tmp_path: Path) -> None:
    flags = ["--url", edge.target, "--pack", "tiny", "--steps", "4", "--out", str(tmp_path)]
    done = run("watch_frames.py", "a fox", "a lamp", *flags)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        assert Image.open(tmp_path / f"frame-{number}.png").format == "PNG"
    # The first frame's may be left out, if the second frame waits just then.
    assert Image.open(tmp_path / "frame-1-step-002.webp").format == "WEBP"
    failed = run("watch_frames.py", "a fox", " ", *flags)
    assert failed.returncode == 1
    assert failed.stderr.startswith("[request id: frame-1] DESCRIPTION_EMPTY: ")
    assert "frame-0.png" in failed.stdout


# -- the real process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def services() -> Iterator[ScriptedServices]:
    running = ScriptedServices()
    running.start()
    yield running
    running.close()


def health(process: StoryProcess, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(process.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S).status)


def test_the_story_process_answers_stock_clients(services: ScriptedServices, tmp_path: Path) -> None:
    process = StoryProcess(tmp_path / "home", services.target).start()
    try:
        with InferenceServerClient(process.grpc_target) as client:
            assert client.is_server_ready()
            names = [model.name for model in client.get_model_repository_index().models]
            assert names == ["frame/toon", "frame/other", "caption/toon", "caption/other"]
            drawn = client.infer("frame/other", frame_inputs(references=[file(noise(1)[0])]))
            assert Image.open(io.BytesIO(drawn.as_numpy("IMAGE")[0])).format == "PNG"
            assert client.infer("caption/toon", caption_inputs()).as_numpy("TEXT")[0]
        assert health(process, "inference.GRPCInferenceService") == health_pb2.HealthCheckResponse.SERVING
        assert "inference.GRPCInferenceService" in ProtoReflectionDescriptorDatabase(process.channel).get_services()
        metrics = process.http.get("/metrics").text
        assert 'method="ModelInfer",protocol="grpc",reason="OK"' in metrics
        assert process.terminate() == 0
    finally:
        process.kill()


def test_it_can_be_switched_off(services: ScriptedServices, tmp_path: Path) -> None:
    process = StoryProcess(tmp_path / "home", services.target, STORY_INFERENCE="false").start()
    try:
        with (
            InferenceServerClient(process.grpc_target) as client,
            pytest.raises(InferenceServerException, match="UNIMPLEMENTED"),
        ):
            client.get_server_metadata()
        assert health(process, "fabula.story.v1.StoryService") == health_pb2.HealthCheckResponse.SERVING
    finally:
        process.kill()
