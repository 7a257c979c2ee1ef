"""Settings of the frame service: `FABULA_FRAME_*`, section `[frame]` of config.toml."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from services.frame.scheduler import SchedulerSettings
from services.runtime.config import Settings

# Shared with `EngineSettings`; here, because this module costs nothing to import.
ADAPTER_RANK_MAX = 16
ADAPTERS_BYTES = 256 << 20
STACKS_BYTES = 8 << 30
REFERENCES_BYTES = 512 << 20
PREFILL_ROWS = 24
STALL_S = 60.0
NETWORKS_MAX = 4


class FrameSettings(Settings):
    """How frames are drawn here."""

    model_config = SettingsConfigDict(env_prefix="FABULA_FRAME_", frozen=True, extra="forbid")
    section: ClassVar[str] = "frame"

    packs: str = "toon"  # packs to load, comma-separated; the first is the default
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # The UNet's arithmetic. "auto" is bfloat16 on a GPU and float32 on a CPU; bfloat16 on a CPU with AVX512-BF16 takes
    # two thirds of the time and moves pixels by a few levels.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(default=0, ge=0, le=256)  # CPU threads of the networks; 0: every core this process may use
    max_running: int = Field(default=SchedulerSettings.max_running, ge=1, le=256)  # frames denoised together
    max_queued: int = Field(
        default=SchedulerSettings.max_queued, ge=1, le=10_000
    )  # frames that wait; one more is refused at once
    max_rows: int = Field(
        default=SchedulerSettings.max_rows, ge=1, le=4096
    )  # network rows in one step; memory grows with it
    # Of the waiting frames, what one tenant may have.
    tenant_queue_share: float = Field(default=SchedulerSettings.tenant_queue_share, gt=0.0, le=1.0)
    aging_s: float = Field(default=SchedulerSettings.aging_s, gt=0.0)  # waiting that lifts a frame by one priority
    characters_url: str = ""  # object store of characters' weights (file, s3, gs, az); empty: home/characters
    adapter_slots: int = Field(default=0, ge=0, le=1024)  # weights in the network; 0: two for each running frame
    adapter_rank_max: int = Field(
        default=ADAPTER_RANK_MAX, ge=1, le=256
    )  # of characters' weights; memory grows with it
    adapters_bytes: int = Field(default=ADAPTERS_BYTES, ge=0)  # of weights that are kept in memory for later
    adapter_stacks_bytes: int = Field(default=STACKS_BYTES, ge=0)  # of weights side by side in one pack's network
    # How earlier frames are noised: as StoryGen does, or with one noise for all, so that their passes are used again.
    references: Literal["exact", "shared-noise"] = "exact"
    # Noise levels of earlier frames during a frame: 0 is StoryGen's, one a step and distance. With a few of them and
    # shared noise a picture passes through the network only so often; the service's README says what that costs.
    reference_levels: int = Field(default=0, ge=0, le=1000)
    networks_max: int = Field(default=NETWORKS_MAX, ge=1, le=64)  # UNets that characters brought, in memory for jobs
    # Of so many steps one computes the UNet's deep blocks, the others use what it left (DeepCache): for packs that take
    # dozens of steps. 1: every step computes all.
    deep_every: int = Field(default=1, ge=1, le=16)
    # The part of a frame's steps in which guidance counts; outside of it only the row with text and references is
    # computed. The service's README says what that saves and costs.
    guidance_from: float = Field(default=0.0, ge=0.0, le=1.0)
    guidance_until: float = Field(default=1.0, ge=0.0, le=1.0)
    references_bytes: int = Field(default=REFERENCES_BYTES, ge=0)  # of what passes over earlier frames left
    prefill_rows: int = Field(default=PREFILL_ROWS, ge=0, le=4096)  # rows of such a pass that takes later steps' along
    # The same picture bit for bit, whoever is drawn at the same time: every frame steps in forwards of its own.
    strict: bool = False
    # Decode pictures that are done while others step. "auto" does on a GPU; on a CPU both want the same cores.
    decode_beside: Literal["auto", "on", "off"] = "auto"
    # Record the network's forwards once for each shape and replay them (CUDA graphs). "auto" does on a GPU.
    graphs: Literal["auto", "off"] = "auto"
    stall_s: float = Field(default=STALL_S, gt=0.0)  # a single step that takes longer means the engine hangs
    # Refuse packs whose weights and work on one frame do not fit the free memory, before they are read.
    check_memory: bool = True
    warm_up: bool = True  # draw once before calling itself ready

    @field_validator("packs")
    @classmethod
    def _names_a_pack(cls, packs: str) -> str:
        if not [name for name in packs.split(",") if name.strip()]:
            raise ValueError("name at least one pack")
        return packs

    @model_validator(mode="after")
    def _has_a_guided_part(self) -> FrameSettings:
        if self.guidance_from >= self.guidance_until:
            raise ValueError("guidance_from must be below guidance_until")
        return self

    @property
    def pack_names(self) -> tuple[str, ...]:
        """The packs to load, default first."""
        return tuple(name.strip() for name in self.packs.split(",") if name.strip())

    @property
    def thread_count(self) -> int:
        """CPU threads of the networks."""
        return self.threads or len(os.sched_getaffinity(0))
