"""Settings of an installation and of a service: `FABULA_*` variables over `$FABULA_HOME/config.toml` over defaults.

Frozen and strict: an unknown key or a bad value stops the process and names the key. Knows no service: a service
subclasses `Settings` beside the code it configures, and its section is its one word.

    FABULA_PORT_BASE=9000          the installation's           config.toml:  port_base = 9000
    FABULA_STORY_MAX_RUNNING=8     the story service's                        [story]
                                                                              max_running = 8
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import InitSettingsSource

PREFIX = "FABULA_"
# The words that own a FABULA_<WORD>_ prefix.
SECTIONS = ("story", "caption", "frame", "customization", "training", "cli", "test")
SHIPPED_PACKS = Path(__file__).resolve().parents[1] / "models" / "packs"


class ConfigInvalid(Exception):
    """A setting is unknown or has a bad value; the message names the key and says where it was read."""


def default_home() -> Path:
    """`$XDG_DATA_HOME/fabula`, or `~/.local/share/fabula`."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "fabula"


class Settings(BaseSettings):
    """Base of every section. A subclass sets `section` (its one word) and `env_prefix` (`FABULA_<WORD>_`)."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")
    section: ClassVar[str] = ""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment, which wins over the file."""
        given = dict(getattr(init_settings, "init_kwargs", {}))
        home = given.get("home") or os.environ.get(f"{PREFIX}HOME") or default_home()
        from_file = InitSettingsSource(settings_cls, read_section(Path(home) / "config.toml", cls.section))
        return init_settings, env_settings, from_file

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Reads the section. Raises ConfigInvalid naming every key that is unknown or bad."""
        prefix = str(cls.model_config["env_prefix"])
        known = {f"{prefix}{name}".upper() for name in cls.model_fields}
        unknown = sorted(key for key in os.environ if section_of(key) == cls.section and key not in known)
        if unknown:
            raise ConfigInvalid(f"unknown setting in the environment: {', '.join(unknown)}")
        try:
            return cls(**given)
        except ValidationError as error:
            faults = [
                f"{prefix}{'_'.join(str(part) for part in fault['loc'])}".upper() + f": {fault['msg']}"
                for fault in error.errors()
            ]
            raise ConfigInvalid("; ".join(faults)) from None


def section_of(variable: str) -> str | None:
    """Which section a variable of the environment belongs to; None if it is not ours at all."""
    if not variable.startswith(PREFIX):
        return None
    word = variable.removeprefix(PREFIX).split("_", 1)[0].lower()
    return word if word in SECTIONS else ""


def read_section(path: Path, section: str) -> dict[str, Any]:
    """A section of config.toml, or its top level without the sections. A missing file is an empty one."""
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid(f"{path}: {error}") from None
    if section:
        return dict(document.get(section, {}))
    return {key: value for key, value in document.items() if key not in SECTIONS}


class Installation(Settings):
    """What all processes of one installation share."""

    home: Path = Field(default_factory=default_home)  # everything the installation keeps lies below it
    port_base: int = Field(default=8470, ge=1024, le=65000)  # see the port properties below
    packs: str = ""  # folders to search for packs, joined by the path separator; empty: shipped ones, then home/packs
    token_file: Path | None = None  # the installation token; unset: home/token
    database_url: str = ""  # SQLAlchemy URL; empty: SQLite files in home. One setting moves all state to PostgreSQL
    object_store_url: str = ""  # file://, s3://, gs:// or az:// URL; empty: home/objects
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    instance: str = ""  # set by `fabula up` on what it starts, so that `down` can tell its processes from all others

    @property
    def story_http_port(self) -> int:
        """Public HTTP, and /metrics of the story process."""
        return self.port_base

    @property
    def story_grpc_port(self) -> int:
        """Public gRPC."""
        return self.port_base + 1

    @property
    def ingress_grpc_port(self) -> int:
        """Ray Serve's gRPC ingress: caption and frame."""
        return self.port_base + 2

    @property
    def ingress_http_port(self) -> int:
        """Ray Serve's HTTP proxy, loopback only."""
        return self.port_base + 3

    @property
    def gcs_port(self) -> int:
        """Ray's head."""
        return self.port_base + 4

    @property
    def dashboard_port(self) -> int:
        """Ray's dashboard, off by default."""
        return self.port_base + 5

    @property
    def metrics_port(self) -> int:
        """Ray's metrics export: the replicas' Prometheus metrics."""
        return self.port_base + 7

    @property
    def pack_folders(self) -> tuple[Path, ...]:
        """Where packs are looked for, first match wins."""
        if self.packs:
            return tuple(Path(part) for part in self.packs.split(os.pathsep) if part)
        return (SHIPPED_PACKS, self.home / "packs")

    @property
    def ray_folder(self) -> Path:
        """Ray's session folder: short (socket paths end at 107 characters), below a folder that only we may enter."""
        digest = hashlib.sha256(str(self.home.resolve()).encode()).hexdigest()[:8]
        return Path(f"/tmp/fabula-{os.getuid()}") / digest

    def make_home(self) -> Path:
        """Creates the home folder, for its owner only."""
        self.home.mkdir(parents=True, exist_ok=True)
        if self.home.stat().st_uid == os.getuid():  # a mounted volume belongs to somebody else and has its own rules
            self.home.chmod(0o700)
        for name in ("objects", "logs", "run", "packs"):
            (self.home / name).mkdir(exist_ok=True)
        return self.home

    def read_token(self) -> str:
        """The installation token. It is made on first use: 32 random bytes in hex, readable by its owner only."""
        path = self.token_file or self.home / "token"
        if self.token_file is None and not path.exists():
            make_token(path)
        token = path.read_text().strip()
        if len(token) < 32:
            raise ConfigInvalid(f"{PREFIX}TOKEN_FILE: {path} does not hold a token of at least 32 characters")
        return token


def make_token(path: Path) -> None:
    """Writes a new token, atomically and only if there is none: of several processes that start together, one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink(missing_ok=True)
