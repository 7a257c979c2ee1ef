"""Generated examples are judged by what they show, never by how long this machine took."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
