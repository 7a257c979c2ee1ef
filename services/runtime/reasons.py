"""Reasons of warnings, spelt once: one service says them, another one reads them, and neither may import the other."""

from __future__ import annotations

WORDS_UNFAMILIAR = "WORDS_UNFAMILIAR"
NAME_UNFAMILIAR = "NAME_UNFAMILIAR"
PICTURE_UNFAMILIAR = "PICTURE_UNFAMILIAR"
