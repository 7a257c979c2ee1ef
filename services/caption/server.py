"""A plain grpc.aio server for the caption service: for tests, and for running it off a Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import signal

import grpc
import grpc.aio
from fabula.caption.v1 import caption_service_pb2 as pb
from fabula.caption.v1 import caption_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from services.caption.config import CaptionSettings
from services.caption.engine import CaptionEngine
from services.caption.loading import build_engine
from services.caption.metrics import PrometheusObserver
from services.caption.service import CaptionServicer
from services.runtime.channel import OPTIONS
from services.runtime.config import Installation
from services.runtime.errors import EngineDead
from services.runtime.telemetry import configure_logging

HEALTH_PERIOD_S = 2.0
DRAIN_S = 20.0  # how long calls in flight may take to end after a request to stop


async def start_server(servicer: CaptionServicer, address: str) -> tuple[grpc.aio.Server, int]:
    """A started server with health and reflection, and its port (useful when `address` ends in `:0`)."""
    server = grpc.aio.server(options=list(OPTIONS))
    pb_grpc.add_CaptionServiceServicer_to_server(servicer, server)
    name = pb.DESCRIPTOR.services_by_name["CaptionService"].full_name
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
    configure_logging("caption", installation.log_level)
    settings = CaptionSettings.load()
    engine = await asyncio.to_thread(build_engine, settings, installation, PrometheusObserver())
    await engine.start(warm_up=settings.warm_up)
    server, bound = await start_server(CaptionServicer(engine, installation.read_token()), f"{host}:{port}")
    if metrics_port:
        start_http_server(metrics_port, addr=host)
    print(f"caption service on {host}:{bound}", flush=True)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    died = asyncio.create_task(_watch(engine, stopping))
    await stopping.wait()
    await server.stop(DRAIN_S)
    await engine.stop()
    if died.done() and died.result():
        raise SystemExit(1)
    died.cancel()


async def _watch(engine: CaptionEngine, stopping: asyncio.Event) -> bool:
    """Ends the process when the engine dies: whoever supervises it starts a new one. True when it died."""
    while True:
        try:
            engine.check_health()
        except EngineDead:
            stopping.set()
            return True
        await asyncio.sleep(HEALTH_PERIOD_S)


def main() -> None:
    """`python -m services.caption`."""
    parser = argparse.ArgumentParser(description="Runs the caption service without Ray.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--metrics-port", type=int, default=0, help="0 serves no metrics")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.host, arguments.port, arguments.metrics_port))
