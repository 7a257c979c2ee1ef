"""A Ray node with a dashboard that takes jobs, which lives as long as this process. Prints where it is, as JSON.

python ray_process.py FOLDER CPUS
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from typing import Any

from ray._private import services
from ray._private.node import Node
from ray._private.parameter import RayParams


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


_asked_once = services.get_node
_START_S = 600.0


def asked_long_enough(*arguments: Any) -> Any:
    """What the control store says of this node. Ray gives it 30 s, which a busy machine does not have."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            return _asked_once(*arguments)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def main() -> None:
    services.get_node = asked_long_enough
    node = Node(
        RayParams(
            dashboard_host="127.0.0.1",
            dashboard_port=free_port(),
            # Without a port a node waits for its agents to choose, and dies of impatience on a busy machine.
            metrics_export_port=free_port(),
            metrics_agent_port=free_port(),
            dashboard_agent_listen_port=free_port(),
            runtime_env_agent_port=free_port(),
            include_dashboard=True,
            num_cpus=int(sys.argv[2]),
            object_store_memory=80_000_000,
            temp_dir=sys.argv[1],
            no_monitor=True,
            include_log_monitor=True,
        ),
        head=True,
        shutdown_at_exit=True,
        spawn_reaper=True,  # Ray's processes die with this one
    )
    print(json.dumps({"address": node.address, "dashboard": f"http://{node.webui_url}"}), flush=True)
    signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    main()
