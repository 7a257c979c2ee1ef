"""The frame service: draws one picture from a description and the frames before it."""
