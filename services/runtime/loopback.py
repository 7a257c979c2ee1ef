"""Keeps Ray Serve's own servers on this machine.

Serve binds its gRPC ingress, and a port of each replica that unpickles whatever it is sent, to every interface, and
has no setting for it. On one machine nobody outside has business there, so every worker of the local node runs
`install` first: a server told to listen everywhere then listens on loopback. In a cluster this is not used; network
policies close those ports there.
"""

from __future__ import annotations

from grpc.aio import _server

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("[::]:", "0.0.0.0:")


def on_loopback(address: str) -> str:
    """The same port on this machine only; an address that names an interface stays."""
    for prefix in EVERYWHERE:
        if address.startswith(prefix):
            return f"{LOOPBACK}:{address.removeprefix(prefix)}"
    return address


def install() -> None:
    """Makes every asyncio gRPC server of this process listen on loopback where it would listen everywhere."""
    listen = _server.Server.add_insecure_port

    def add_insecure_port(self: _server.Server, address: str) -> int:
        return int(listen(self, on_loopback(address)))

    _server.Server.add_insecure_port = add_insecure_port
