"""Settings of the story service: `FABULA_STORY_*`, or the `[story]` section of config.toml."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.runtime.config import ConfigInvalid, Installation, Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class StorySettings(Settings):
    """What one may turn. Every default suits one machine."""

    model_config = SettingsConfigDict(env_prefix="FABULA_STORY_")
    section: ClassVar[str] = "story"

    host: str = "127.0.0.1"  # address both servers bind; the edge has no login, so anything else needs allowed_hosts
    allowed_hosts: str = ""  # further Host names, comma-separated; * switches the check off (behind a gateway of yours)
    allowed_origins: str = ""  # web origins whose pages may call, comma-separated; none by default
    caption_target: str = ""  # host:port of the caption service; empty: this machine's Serve ingress
    frame_target: str = ""  # host:port of the frame service; empty: this machine's Serve ingress
    customization_target: str = ""  # host:port of the customization service; empty: this machine's Serve ingress
    default_pack: str = "toon"  # the pack of a request that names none
    max_running: int = Field(default=4, ge=1)  # stories in progress at once in this process; the rest wait in the queue
    max_queued: int = Field(default=100, ge=1)  # accepted and not started, all processes together; more are refused
    caption_timeout_s: float = Field(default=120.0, gt=0)  # longest wait for one caption or description
    frame_timeout_s: float = Field(default=900.0, gt=0)  # longest wait for one frame, queue included
    preview_every_steps: int = Field(default=5, ge=0)  # a preview costs a decode; 0 switches previews off
    retry_first_s: float = Field(default=0.5, gt=0)  # pause after the first failure of something that may come back
    retry_most_s: float = Field(default=10.0, gt=0)  # longest pause: how late an outage's end is noticed
    poll_s: float = Field(default=0.5, gt=0)  # how often changes made by other story processes are looked for
    lease_s: float = Field(default=20.0, gt=0)  # silence after which a process on another machine counts as dead
    orphan_age_s: float = Field(default=3600.0, gt=0)  # unreferenced pictures are removed when they are older
    heartbeat_s: float = Field(default=15.0, gt=0)  # comment sent on a silent event stream, so that proxies keep it
    inference: bool = True  # answer clients of the Open Inference Protocol (KServe, Triton) too, on the gRPC port
    drain_s: float = Field(default=5.0, ge=0)  # longest wait for calls in flight at shutdown
    migrate: bool = True  # bring a SQLite database up to date at start; PostgreSQL is migrated by its own command

    def hosts(self) -> frozenset[str]:
        """Names under which this edge may be addressed."""
        return frozenset({*LOOPBACK, self.host, *_words(self.allowed_hosts)})

    def origins(self) -> tuple[str, ...]:
        """Web origins whose pages may call."""
        return tuple(_words(self.allowed_origins))

    def check(self) -> None:
        """Raises ConfigInvalid for a combination that is unsafe."""
        if self.host not in LOOPBACK and not self.allowed_hosts:
            raise ConfigInvalid(
                "FABULA_STORY_HOST: the edge has no login; binding it beyond this machine needs "
                "FABULA_STORY_ALLOWED_HOSTS (the names it is reached under, or * behind a gateway that checks them)"
            )

    def targets(self, installation: Installation) -> tuple[str, str]:
        """Where caption and frame are."""
        ingress = f"127.0.0.1:{installation.ingress_grpc_port}"
        return self.caption_target or ingress, self.frame_target or ingress

    def customizing_target(self, installation: Installation) -> str:
        """Where customization is."""
        return self.customization_target or f"127.0.0.1:{installation.ingress_grpc_port}"


def port_refused(host: str, port: int, why: str) -> ConfigInvalid:
    """What stops the process when it cannot have a port."""
    return ConfigInvalid(
        f"FABULA_PORT_BASE, FABULA_STORY_HOST: port {port} of {host} cannot be bound ({why}); stop what holds it, or "
        "choose another port base"
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
