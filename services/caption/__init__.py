"""The caption service: writes the next story caption, and the description of a caption."""
