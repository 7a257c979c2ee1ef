"""The flags that every training command takes."""

from __future__ import annotations

import argparse

import torch

from services.models.allocator import keep_freed_memory

_KEPT_BYTES = 1 << 30  # a backward pass frees more than a step of drawing does


def run_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--minutes` and `--threads`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=None, help="end after this much training time, at rate zero")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def run_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with torch's threads set, and freed memory kept for the next step."""
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory(_KEPT_BYTES)
    return arguments
