"""A plain grpc.aio server for the frame service: for tests, and for running it off a Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import signal

import grpc
import grpc.aio
from fabula.frame.v1 import frame_service_pb2 as pb
from fabula.frame.v1 import frame_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from services.frame.config import FrameSettings
from services.frame.loading import load_engine
from services.frame.metrics import MeteredObserver, PrometheusMeters
from services.frame.service import FrameServicer
from services.runtime.channel import OPTIONS
from services.runtime.config import Installation
from services.runtime.telemetry import configure_logging

DRAIN_S = 20.0  # how long calls in flight may take to end after a request to stop


async def start_server(servicer: FrameServicer, address: str) -> tuple[grpc.aio.Server, int]:
    """A started server with health and reflection, and its port (useful when `address` ends in `:0`)."""
    server = grpc.aio.server(options=list(OPTIONS))
    pb_grpc.add_FrameServiceServicer_to_server(servicer, server)
    name = pb.DESCRIPTOR.services_by_name["FrameService"].full_name
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for service in ("", name):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, port


async def run(host: str, port: int, metrics_port: int) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight end."""
    installation = Installation.load()
    configure_logging("frame", installation.log_level)
    observer = MeteredObserver(PrometheusMeters())
    engine = await asyncio.to_thread(load_engine, FrameSettings.load(), installation, observer)
    server, bound = await start_server(FrameServicer(engine, installation.read_token()), f"{host}:{port}")
    if metrics_port:
        start_http_server(metrics_port, addr=host)
    print(f"frame service on {host}:{bound}", flush=True)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await stopping.wait()
    await server.stop(DRAIN_S)
    await asyncio.to_thread(engine.stop)


def main() -> None:
    """`python -m services.frame`."""
    parser = argparse.ArgumentParser(description="Runs the frame service without Ray.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--metrics-port", type=int, default=0, help="0 serves no metrics")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.host, arguments.port, arguments.metrics_port))
