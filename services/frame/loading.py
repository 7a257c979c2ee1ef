"""From settings to an engine that is ready: packs found and checked, networks loaded, warmed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog
import torch

from services.frame.acceleration import accelerations
from services.frame.config import FrameSettings
from services.frame.engine import EngineSettings, Fetch, FrameEngine, Observer
from services.frame.remote import RemoteFrames
from services.models.allocator import keep_freed_memory
from services.models.errors import PackUnsupported
from services.models.footprint import check_room, footprint
from services.models.graphs import CudaRecorder, Graphs
from services.models.pack import RemoteManifest, find_pack, load_any_pack, load_pack, read_any_manifest, read_manifest
from services.models.references import ReferencePolicy
from services.models.registry import load_frame_model
from services.models.remote import REMOTE_FRAMES
from services.models.world import World
from services.runtime.config import Installation
from services.runtime.errors import CharacterWeightsUnknown, ObjectNotFound
from services.runtime.memory import free_memory_bytes as free_memory_bytes
from services.runtime.store import ObjectStore

log = structlog.get_logger("fabula.frame")


def load_engine(settings: FrameSettings, installation: Installation, observer: Observer | None = None) -> FrameEngine:
    """A started, warmed engine with the packs the settings name.

    Sets torch's thread count for the whole process. Raises ModelError when a pack cannot be loaded (PackTooLarge before
    any of its weights is read), and ValueError when its `world.json` is malformed.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if device == "cuda" else torch.float32,
    }[settings.dtype]
    decode_beside = {"on": True, "off": False, "auto": device == "cuda"}[settings.decode_beside]
    torch.set_num_threads(settings.thread_count)
    if device == "cpu":
        keep_freed_memory()
    folders = [find_pack(name, installation.pack_folders) for name in settings.pack_names]
    folders = [folder for folder in folders if not isinstance(read_any_manifest(folder), RemoteManifest)]
    if not folders:
        raise PackUnsupported("FABULA_FRAME_PACKS names packs on servers only; one of them must be drawn here")
    if settings.check_memory:
        wanted = [footprint(folder, read_manifest(folder), unet_bytes=dtype.itemsize) for folder in folders]
        if device == "cuda":
            check_room(wanted, free_bytes=torch.cuda.mem_get_info()[0], host_free_bytes=free_memory_bytes())
        else:
            check_room(wanted, free_bytes=free_memory_bytes())
    packs = [load_pack(folder) for folder in folders]
    models = {pack.name: load_frame_model(pack, device=device, dtype=dtype) for pack in packs}
    if device == "cuda" and settings.graphs == "auto" and not settings.strict:
        recorder = CudaRecorder()
        models = {
            name: replace(model, graphs=_graphs(recorder, name)) if model.is_recordable else model
            for name, model in models.items()
        }
    graphs = any(model.graphs is not None for model in models.values())
    engine = FrameEngine(
        models,
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
            adapter_stacks_bytes=settings.adapter_stacks_bytes,
            references=ReferencePolicy(
                shared_noise=settings.references == "shared-noise", levels_count=settings.reference_levels
            ),
            networks_max=settings.networks_max,
            deep_every=settings.deep_every,
            guidance_interval=(settings.guidance_from, settings.guidance_until),
            references_bytes=settings.references_bytes,
            prefill_rows=settings.prefill_rows,
            strict=settings.strict,
            decode_beside=decode_beside,
            stall_s=settings.stall_s,
        ),
        observer=observer,
        worlds={pack.name: World.load(pack.folder) for pack in packs},
        fetch=fetcher(ObjectStore.open(settings.characters_url, installation.home / "characters")),
    )
    for each in accelerations(torch.device(device), dtype, decode_beside=decode_beside, graphs=graphs):
        log.info("acceleration", name=each.name, on=each.on, why=each.why)
    engine.start()
    if settings.warm_up:
        engine.warm_up()
    log.info("frame_ready", packs=[pack.name for pack in packs], device=device, dtype=str(dtype))
    return engine


def _graphs(recorder: CudaRecorder, pack: str) -> Graphs:
    """The recordings of a pack's network."""

    def tell(why: str) -> None:
        log.warning("recordings_given_up", pack=pack, why=why, for_good=graphs.is_broken)

    graphs = Graphs(recorder, tell=tell)
    return graphs


def load_remotes(settings: FrameSettings, installation: Installation) -> dict[str, RemoteFrames]:
    """The packs that the settings name and servers draw with. Nobody is asked anything yet. Raises ModelError."""
    found = {}
    for name in settings.pack_names:
        manifest = load_any_pack(find_pack(name, installation.pack_folders)).manifest
        if not isinstance(manifest, RemoteManifest):
            continue
        if manifest.architecture != REMOTE_FRAMES:
            raise PackUnsupported(f"pack {name!r} is a {manifest.architecture}: it does not draw")
        found[name] = RemoteFrames(name, manifest.digest, manifest.architecture, manifest.endpoint)
    return found


def fetcher(store: ObjectStore) -> Fetch:
    """Reads characters' weights from `store`, for threads that have no event loop."""

    def fetch(digest: str) -> bytes:
        try:
            return asyncio.run(store.get(digest))
        except ObjectNotFound:
            raise CharacterWeightsUnknown(metadata={"digest": digest}) from None

    return fetch
