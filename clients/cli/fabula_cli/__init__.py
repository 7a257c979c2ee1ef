"""The `fabula` command."""
