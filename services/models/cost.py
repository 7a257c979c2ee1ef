"""What a network row costs and what the machine could do: how well a step uses what it runs on."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from services.models.registry import FrameModel
from services.models.storygen import References

_PROBE, _GPU_PROBE = 1024, 8192  # sides of the product that peaks are measured with: one that fills the device


@torch.inference_mode()
def flops_of_a_row(model: FrameModel, *, shallow: bool = False) -> float:
    """Floating-point operations of one main row at the pack's size that looks at one earlier frame; two a multiply-add.

    At none where the pack takes no references, or reads them as texts. A reference row costs about as much. `shallow`:
    one that uses an earlier step's deep states; for networks that can. Counted by torch from the operations themselves,
    not estimated.
    """
    manifest, factor = model.manifest, model.codec.factor
    latents = torch.zeros(
        1, model.codec.channels, manifest.height_px // factor, manifest.width_px // factor, device=model.device
    ).to(model.dtype)
    text = model.text.encode([""]).to(model.dtype)
    step = torch.zeros(1, dtype=torch.long, device=model.device)
    unet = model.denoiser.unet
    seen: References | None = None
    if manifest.max_references and model.reader is None:
        rows_BN = torch.zeros(1, 1, dtype=torch.long).to(step)
        seen = References(unet.project(unet.features(latents, step, text)), rows_BN)
    deep = unet.predict_and_keep(latents, step, text, seen)[1] if shallow else None
    with FlopCounterMode(display=False) as counter:
        if deep is None:
            unet.predict(latents, step, text, seen)
        else:
            unet.predict_shallow(latents, step, text, deep, seen)
    return float(counter.get_total_flops())


@torch.inference_mode()
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product in this arithmetic with this many threads: the best of a few."""
    side = _GPU_PROBE if device.type == "cuda" else _PROBE
    a = torch.ones(side, side, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        out = a @ a
        float(out[0, 0])  # waits for a device that works behind our back
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * side**3 / best_s
