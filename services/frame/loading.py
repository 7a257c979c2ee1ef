"""From settings to an engine that is ready: packs found and checked, networks loaded, warmed."""

from __future__ import annotations

import asyncio

import structlog
import torch

from services.frame.config import FrameSettings
from services.frame.engine import EngineSettings, Fetch, FrameEngine, Observer
from services.models.pack import find_pack, load_pack
from services.models.references import ReferencePolicy
from services.models.registry import load_frame_model
from services.models.world import World
from services.runtime.config import Installation
from services.runtime.errors import CharacterWeightsUnknown, ObjectNotFound
from services.runtime.store import ObjectStore

log = structlog.get_logger("fabula.frame")


def load_engine(settings: FrameSettings, installation: Installation, observer: Observer | None = None) -> FrameEngine:
    """A started, warmed engine with the packs the settings name.

    Sets torch's thread count for the whole process. Raises ModelError when a pack cannot be loaded, and
    ValueError when its `world.json` is malformed.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if device == "cuda" else torch.float32,
    }[settings.dtype]
    torch.set_num_threads(settings.thread_count)
    packs = [load_pack(find_pack(name, installation.pack_folders)) for name in settings.pack_names]
    engine = FrameEngine(
        {pack.name: load_frame_model(pack, device=device, dtype=dtype) for pack in packs},
        default_pack=packs[0].name,
        settings=EngineSettings(
            max_running=settings.max_running,
            max_queued=settings.max_queued,
            max_rows=settings.max_rows,
            tenant_queue_share=settings.tenant_queue_share,
            aging_s=settings.aging_s,
            adapter_slots=settings.adapter_slots,
            adapter_rank_max=settings.adapter_rank_max,
            adapters_bytes=settings.adapters_bytes,
            references=ReferencePolicy(
                shared_noise=settings.references == "shared-noise", levels_count=settings.reference_levels
            ),
            networks_max=settings.networks_max,
            deep_every=settings.deep_every,
            references_bytes=settings.references_bytes,
            prefill_rows=settings.prefill_rows,
            strict=settings.strict,
            stall_s=settings.stall_s,
        ),
        observer=observer,
        worlds={pack.name: World.load(pack.folder) for pack in packs},
        fetch=fetcher(ObjectStore.open(settings.characters_url, installation.home / "characters")),
    )
    engine.start()
    if settings.warm_up:
        engine.warm_up()
    log.info("frame_ready", packs=[pack.name for pack in packs], device=device, dtype=str(dtype))
    return engine


def fetcher(store: ObjectStore) -> Fetch:
    """Reads characters' weights from `store`, for threads that have no event loop."""

    def fetch(digest: str) -> bytes:
        try:
            return asyncio.run(store.get(digest))
        except ObjectNotFound:
            raise CharacterWeightsUnknown(metadata={"digest": digest}) from None

    return fetch
