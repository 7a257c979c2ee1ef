"""The customization service with the pretend trainer, in a process of its own, so that a test can kill it."""

from __future__ import annotations

import asyncio
import os
import sys

from services.customization.config import CustomizationSettings
from services.customization.loading import CustomizationProcess
from services.customization.local import LocalBackend
from services.customization.server import start_server
from services.customization.service import CustomizationServicer
from services.runtime import standalone
from services.runtime.config import Installation
from tests.contract.customization.harness import PRETEND, TOKEN


async def main() -> None:
    settings = CustomizationSettings(poll_s=0.05, threads=1, eyes=False, save_every_s=0.5)
    process = CustomizationProcess(Installation.load(), settings)
    process.backend = LocalBackend(niceness=0, environment=os.environ, program=PRETEND)
    await process.start()
    server, port = await start_server(CustomizationServicer(process, TOKEN), "127.0.0.1:0")
    print(f"port {port}", flush=True)
    await standalone.stop_requested().wait()
    await process.stop()
    await server.stop(None)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
