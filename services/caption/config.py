"""Settings of the caption service: `FABULA_CAPTION_*`, section `[caption]` of config.toml."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.runtime.config import Settings


class CaptionSettings(Settings):
    """How captions are written here."""

    model_config = SettingsConfigDict(env_prefix="FABULA_CAPTION_", frozen=True, extra="forbid")
    section: ClassVar[str] = "caption"

    pack: str = Field(default="toon", min_length=1)  # the pack whose captioner is loaded
    # More packs, by commas, that it writes for: those that draw and bring no captioner, as published checkpoints do.
    # Their frames and its texts make stories together.
    also_for: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # How vLLM's engine is driven. "in_process" is one thread here: ready in 3 s and 0.8 GB. "async" is vLLM's AsyncLLM
    # with its engine in a child process: it keeps a GPU busy while this process decodes pictures. "auto" takes the
    # first on a CPU and the second on a GPU.
    # "plain" is transformers without vLLM: what "auto" takes for BLIP, and for language models vLLM does not serve.
    drive: Literal["auto", "in_process", "async", "plain"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # "auto": float32 on a CPU, bfloat16 on a GPU
    threads: int = Field(default=1, ge=1, le=256)  # CPU threads of the networks; a small LLaVA gains nothing from more
    max_running: int = Field(default=16, ge=1, le=1024)  # requests decoded together
    max_queued: int = Field(default=64, ge=0, le=100_000)  # requests that wait; one more is refused at once
    kv_cache_mib: int = Field(default=64, ge=1)  # keys and values of all requests; the toon pack takes 7.7 kB a token
    # Picture, question and answer together, where a captioner has room for more. One request's keys and values must fit
    # `kv_cache_mib`: a LLaVA of 7B takes 0.5 MiB a token in half precision.
    context_tokens_max: int = Field(default=2048, ge=256, le=1 << 20)
    gpu_memory_ratio: float = Field(default=0.85, gt=0.0, le=1.0)  # of one GPU's memory; only read on a GPU
    check_memory: bool = True  # refuse, before it is loaded, a captioner that does not fit the memory that is free
    max_attempts: int = Field(default=3, ge=1, le=10)  # tries before an empty answer becomes an error
    stall_s: float = Field(default=60.0, gt=0.0)  # a single step that takes longer means the engine hangs
    warm_up: bool = True  # write one caption and one description before calling itself ready

    @property
    def other_names(self) -> tuple[str, ...]:
        """`also_for` as names."""
        return tuple(name for name in (each.strip() for each in self.also_for.split(",")) if name)
