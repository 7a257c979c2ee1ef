"""A plain grpc.aio server for the frame service: for tests, and for running it off a Ray cluster."""

from __future__ import annotations

import asyncio

import grpc.aio
from fabula.frame.v1 import frame_service_pb2 as pb
from fabula.frame.v1 import frame_service_pb2_grpc as pb_grpc
from prometheus_client import start_http_server

from services.frame.config import FrameSettings
from services.frame.loading import load_engine, load_remotes
from services.frame.metrics import MeteredObserver, PrometheusMeters
from services.frame.service import FrameServicer
from services.runtime import standalone
from services.runtime.config import Installation
from services.runtime.telemetry import configure_logging


async def start_server(servicer: FrameServicer, address: str) -> tuple[grpc.aio.Server, int]:
    """A started server with health and reflection, and its port (useful when `address` ends in `:0`)."""
    return await standalone.start_server(
        lambda server: pb_grpc.add_FrameServiceServicer_to_server(servicer, server),
        pb.DESCRIPTOR.services_by_name["FrameService"],
        address,
    )


async def run(host: str, port: int, metrics_port: int) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight end."""
    installation = Installation.load()
    configure_logging("frame", installation.log_level)
    observer = MeteredObserver(PrometheusMeters())
    settings = FrameSettings.load()
    engine = await asyncio.to_thread(load_engine, settings, installation, observer)
    servicer = FrameServicer(engine, installation.read_token(), load_remotes(settings, installation))
    server, bound = await start_server(servicer, f"{host}:{port}")
    if metrics_port:
        start_http_server(metrics_port, addr=host)
    print(f"frame service on {host}:{bound}", flush=True)
    stopping = standalone.stop_requested()
    died = asyncio.create_task(standalone.watch_health(lambda: engine.is_healthy, stopping))
    await stopping.wait()
    await server.stop(standalone.DRAIN_S)
    await asyncio.to_thread(engine.stop)
    if died.done() and died.result():
        raise SystemExit(1)
    died.cancel()


def main() -> None:
    """`python -m services.frame`."""
    flags = standalone.address_flags("frame")
    asyncio.run(run(flags.host, flags.port, flags.metrics_port))
