"""A plain grpc.aio server for the customization service: for tests, and for running it off a Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import sys

import grpc.aio
import structlog
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import customization_service_pb2_grpc as pb_grpc
from prometheus_client import start_http_server

from services.customization.config import CustomizationSettings
from services.customization.database import database_url, upgrade
from services.customization.loading import CustomizationProcess
from services.customization.service import CustomizationServicer
from services.runtime import standalone
from services.runtime.config import ConfigInvalid, Installation
from services.runtime.errors import FabulaError
from services.runtime.telemetry import configure_logging

DRAIN_S = 5.0  # for calls in flight: watches come back anyway


async def start_server(servicer: CustomizationServicer, address: str) -> tuple[grpc.aio.Server, int]:
    """A started server with health and reflection, and its port (useful when `address` ends in `:0`)."""
    return await standalone.start_server(
        lambda server: pb_grpc.add_CustomizationServiceServicer_to_server(servicer, server),
        pb.DESCRIPTOR.services_by_name["CustomizationService"],
        address,
    )


async def run(installation: Installation, host: str, port: int, metrics_port: int) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight end."""
    process = CustomizationProcess(installation, CustomizationSettings.load())
    await process.start()
    server, bound = await start_server(CustomizationServicer(process, installation.read_token()), f"{host}:{port}")
    if metrics_port:
        start_http_server(metrics_port, addr=host)
    print(f"customization service on {host}:{bound}", flush=True)
    stopping = standalone.stop_requested()
    died = asyncio.create_task(standalone.watch_health(lambda: process.is_healthy, stopping))
    await stopping.wait()
    was_ill = died.done() and died.result()
    died.cancel()
    await process.stop()
    await server.stop(DRAIN_S)
    if was_ill:
        raise SystemExit(1)


def main() -> int:
    """`python -m services.customization`. Exit status 2: a setting is wrong; 1: something that is needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m services.customization", description="Runs customization jobs.")
    parser.add_argument("command", nargs="?", choices=("serve", "migrate"), default="serve")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--metrics-port", type=int, default=0, help="0 serves no metrics")
    flags = parser.parse_args()
    try:
        installation = Installation.load()
        configure_logging("customization", installation.log_level)
        if flags.command == "migrate":
            installation.make_home()
            upgrade(database_url(installation.database_url, installation.home))
            return 0
        asyncio.run(run(installation, flags.host, flags.port, flags.metrics_port))
    except ConfigInvalid as error:
        print(error, file=sys.stderr)
        return 2
    except (FabulaError, OSError) as error:
        structlog.get_logger("fabula.customization").error("start_failed", exc_info=error)
        return 1
    return 0
