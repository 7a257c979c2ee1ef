"""A plain grpc.aio server for the caption service: for tests, and for running it off a Ray cluster."""

from __future__ import annotations

import asyncio

import grpc.aio
from fabula.caption.v1 import caption_service_pb2 as pb
from fabula.caption.v1 import caption_service_pb2_grpc as pb_grpc
from prometheus_client import start_http_server

from services.caption.config import CaptionSettings
from services.caption.engine import CaptionEngine
from services.caption.loading import build_engine
from services.caption.metrics import PrometheusObserver
from services.caption.remote import RemoteEngine
from services.caption.service import CaptionServicer
from services.runtime import standalone
from services.runtime.config import Installation
from services.runtime.errors import EngineDead
from services.runtime.telemetry import configure_logging


async def start_server(servicer: CaptionServicer, address: str) -> tuple[grpc.aio.Server, int]:
    """A started server with health and reflection, and its port (useful when `address` ends in `:0`)."""
    return await standalone.start_server(
        lambda server: pb_grpc.add_CaptionServiceServicer_to_server(servicer, server),
        pb.DESCRIPTOR.services_by_name["CaptionService"],
        address,
    )


async def run(host: str, port: int, metrics_port: int) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight end."""
    installation = Installation.load()
    configure_logging("caption", installation.log_level)
    settings = CaptionSettings.load()
    engine = await asyncio.to_thread(build_engine, settings, installation, PrometheusObserver())
    await engine.start(warm_up=settings.warm_up)
    servicer = CaptionServicer(engine, installation.read_token())
    server, bound = await start_server(servicer, f"{host}:{port}")
    if metrics_port:
        start_http_server(metrics_port, addr=host)
    print(f"caption service on {host}:{bound}", flush=True)
    stopping = standalone.stop_requested()
    died = asyncio.create_task(standalone.watch_health(lambda: _lives(engine), stopping))
    await stopping.wait()
    await server.stop(standalone.DRAIN_S)
    await engine.stop()
    if died.done() and died.result():
        raise SystemExit(1)
    died.cancel()


def _lives(engine: CaptionEngine | RemoteEngine) -> bool:
    try:
        engine.check_health()
    except EngineDead:
        return False
    return True


def main() -> None:
    """`python -m services.caption`."""
    flags = standalone.address_flags("caption")
    asyncio.run(run(flags.host, flags.port, flags.metrics_port))
