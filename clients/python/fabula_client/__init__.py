"""Typed client of Fabula, async and sync."""
