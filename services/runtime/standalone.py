"""What a service needs to run without Ray: a gRPC server with health and reflection, flags, a stop signal."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime.channel import OPTIONS

HEALTH_PERIOD_S = 2.0
DRAIN_S = 20.0  # how long calls in flight may take to end after a request to stop


async def start_server(
    register: Callable[[grpc.aio.Server], None], service: ServiceDescriptor, address: str
) -> tuple[grpc.aio.Server, int]:
    """A started server with health and reflection, and its port (useful when `address` ends in `:0`).

    `register` adds the servicer of `service` to the server.
    """
    server = grpc.aio.server(options=list(OPTIONS))
    register(server)
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", service.full_name):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((service.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, port


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


async def watch_health(is_healthy: Callable[[], bool], stopping: asyncio.Event) -> bool:
    """Sets `stopping` once the engine is ill: whoever supervises the process starts a new one. True when it was."""
    while is_healthy():  # noqa: ASYNC110 - an engine that hangs sets no event
        await asyncio.sleep(HEALTH_PERIOD_S)
    stopping.set()
    return True


def address_flags(service: str) -> argparse.Namespace:
    """`host`, `port` and `metrics_port` from the command line."""
    parser = argparse.ArgumentParser(description=f"Runs the {service} service without Ray.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--metrics-port", type=int, default=0, help="0 serves no metrics")
    return parser.parse_args()
