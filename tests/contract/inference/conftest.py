"""One edge for the tests of a module; an edge of its own where a test holds the engine or ends a service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tritonclient.grpc import InferenceServerClient

from services.models.registry import FrameModel, load_frame_model
from services.models.tiny import build_tiny_pack
from tests.contract.inference.edge import Edge


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> FrameModel:
    torch.set_num_threads(1)
    return load_frame_model(build_tiny_pack(tmp_path_factory.mktemp("packs") / "tiny", captions=False))


@pytest.fixture
def new_edge(model: FrameModel) -> Iterator[Callable[..., Edge]]:
    """Starts edges of this test alone, with settings of the engine."""
    started: list[Edge] = []

    def start(**settings: Any) -> Edge:
        started.append(Edge(model, **settings).start())
        return started[-1]

    yield start
    for edge in started:
        edge.stop()


@pytest.fixture(scope="module")
def edge(model: FrameModel) -> Iterator[Edge]:
    """The module's edge, over an engine nobody holds."""
    running = Edge(model).start()
    yield running
    running.stop()


@pytest.fixture
def client(edge: Edge) -> Iterator[InferenceServerClient]:
    """The stock client."""
    with InferenceServerClient(edge.target) as stock:
        yield stock
