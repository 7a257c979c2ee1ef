"""What makes drawing faster on some devices and not on others: what is on here, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Acceleration:
    """One of them."""

    name: str
    on: bool
    why: str


def accelerations(
    device: torch.device, dtype: torch.dtype, *, decode_beside: bool, graphs: bool
) -> tuple[Acceleration, ...]:
    """Of an engine that draws on `device`, its UNets computing in `dtype`."""
    gpu = device.type == "cuda"
    half = dtype == torch.bfloat16
    return (
        Acceleration(
            "bfloat16",
            half,
            "the UNet's matrix products take half the bytes"
            if half
            else "float32 was asked for"
            if gpu
            else "few processors multiply it; FABULA_FRAME_DTYPE=bfloat16 asks for it",
        ),
        Acceleration(
            "channels_last",
            gpu,
            "a GPU's convolutions want their channels together" if gpu else "no gain was measured on a processor",
        ),
        Acceleration(
            "decode_beside",
            decode_beside,
            "pictures are decoded in a thread of their own while others step"
            if decode_beside
            else "a processor's cores are busy with the steps"
            if not gpu
            else "FABULA_FRAME_DECODE_BESIDE=off",
        ),
        Acceleration(
            "graphs",
            graphs,
            "forwards are recorded once for each shape and replayed"
            if graphs
            else "FABULA_FRAME_GRAPHS=off, FABULA_FRAME_STRICT, or no pack whose forwards can be recorded"
            if gpu
            else "a processor launches nothing",
        ),
        Acceleration(
            "pinned_memory",
            gpu,
            "the host goes on while it is copied from" if gpu else "nothing is copied to another device",
        ),
        Acceleration(
            "merged_characters",
            not gpu and not half,
            "rows that wear the same go through weights with the character in them"
            if not gpu and not half
            else "everybody's rows go through batched products",
        ),
    )
