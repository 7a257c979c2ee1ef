"""A real story process for tests: started, killed and started again over the same home folder."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
from fabula.story.v1 import story_pb2, story_service_pb2, story_service_pb2_grpc

from tests.contract.story.scripted_services import TOKEN

ROOT = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 180.0


def free_port_base() -> int:
    """A number whose first two ports are free."""
    for _ in range(200):
        base = random.randrange(20000, 32000, 10)
        try:
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", base))
                second.bind(("127.0.0.1", base + 1))
                return base
        except OSError:
            continue
    raise RuntimeError("no free ports")


class StoryProcess:
    """`python -m services.story` and clients for it. `environment` are FABULA_ variables without the prefix."""

    def __init__(
        self, home: Path, target: str, *, command: tuple[str, ...] = ("-m", "services.story"), **environment: str
    ):
        self.home = home
        self.command = command
        self.environment = {
            "HOME": str(home),
            "STORY_CAPTION_TARGET": target,
            "STORY_FRAME_TARGET": target,
            "STORY_RETRY_FIRST_S": "0.05",
            "STORY_RETRY_MOST_S": "0.2",
            "STORY_POLL_S": "0.1",
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)
        (home / "token").write_text(TOKEN)

    def start(self, *, wait: bool = True) -> StoryProcess:
        base = free_port_base()
        self.http_url = f"http://127.0.0.1:{base}"
        self.grpc_target = f"127.0.0.1:{base + 1}"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FABULA_")}
        ours = {f"FABULA_{key}": value for key, value in self.environment.items()}
        with (self.home / "story.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                cwd=ROOT,
                env={**inherited, **ours, "FABULA_PORT_BASE": str(base)},
                stdout=log,
                stderr=log,
            )
        self.http = httpx.Client(base_url=self.http_url, timeout=120, trust_env=False)
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", 64 << 20)]
        self.channel = grpc.insecure_channel(self.grpc_target, options=options)
        self.stub = story_service_pb2_grpc.StoryServiceStub(self.channel)
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.kill()
                raise
        return self

    def wait_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the story process ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            try:
                if self.http.get("/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.02)
        raise RuntimeError(f"the story process was not ready in time:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return (self.home / "story.log").read_text(errors="replace")

    def kill(self) -> None:
        """As a crash does: no signal handler runs."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        return self._end(signal.SIGTERM)

    def wait_dead(self, timeout_s: float = 180) -> None:
        assert self.process is not None
        self.process.wait(timeout_s)
        self.channel.close()
        self.http.close()

    def _end(self, number: int) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(30)
        self.channel.close()
        self.http.close()
        return status

    # -- what tests do all the time ------------------------------------------------------------------------------------

    def create(self, image: bytes, **fields: Any) -> story_pb2.Story:
        request = {"caption": "Once upon a time.", "frame_count": 3, "seed": 7, "image": image, **fields}
        return self.stub.CreateStory(story_service_pb2.CreateStoryRequest(**request), timeout=120).story

    def get(self, story_id: str) -> story_pb2.Story:
        return self.stub.GetStory(story_service_pb2.GetStoryRequest(story_id=story_id), timeout=120).story

    def cancel(self, story_id: str) -> story_pb2.Story:
        return self.stub.CancelStory(story_service_pb2.CancelStoryRequest(story_id=story_id), timeout=120).story

    def watch(self, story_id: str, after: int = 0, timeout: float = 180) -> Any:
        request = story_service_pb2.WatchStoryRequest(story_id=story_id, after_sequence=after)
        return self.stub.WatchStory(request, timeout=timeout)

    def events(self, story_id: str, after: int = 0) -> list[story_pb2.StoryEvent]:
        """Every event from `after` on, until the story has ended."""
        return [message.event for message in self.watch(story_id, after)]

    def image(self, story_id: str, sha256: str) -> bytes:
        request = story_service_pb2.ReadImageRequest(story_id=story_id, sha256=sha256)
        return b"".join(part.chunk for part in self.stub.ReadImage(request, timeout=120))

    def wait_state(self, story_id: str, *states: int, timeout_s: float = 180) -> story_pb2.Story:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            story = self.get(story_id)
            if story.state in states:
                return story
            time.sleep(0.02)
        names = [story_pb2.Story.State.Name(state) for state in states]
        raise AssertionError(f"waited for {names}, is {story}\n{self.log()[-4000:]}")
