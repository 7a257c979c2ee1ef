"""What the story service counts. Names are `story_<thing>_<unit>`; labels have few values, ids are never labels."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.runtime.telemetry import DURATION_BUCKETS

REQUEST_SECONDS = Histogram(
    "story_request_duration_seconds",
    "Calls at the edge, streams until they end.",
    ["protocol", "method", "reason"],
    buckets=DURATION_BUCKETS,
)
CREATED = Counter("story_stories_created_total", "Stories accepted.")
ENDED = Counter("story_stories_ended_total", "Stories that ended, by how.", ["state"])
WAITS = Counter("story_waits_total", "Times a story had to wait for something, by reason.", ["reason"])
RETRIES = Counter("story_retries_total", "Steps tried again, by reason.", ["reason"])
STAGE_SECONDS = Histogram(
    "story_stage_duration_seconds", "One stage of one frame, retries included.", ["stage"], buckets=DURATION_BUCKETS
)
STORIES = Gauge("story_stories_count", "Stories in the database, by state.", ["state"])
WATCHERS = Gauge("story_watchers_count", "Event streams open in this process.")
RECOVERED = Counter("story_executors_recovered_total", "Dead processes whose stories were taken over.")
ORPHANS = Counter("story_orphan_objects_removed_total", "Unreferenced pictures removed from the object store.")
DECODE_SECONDS = Histogram(
    "story_image_decode_duration_seconds", "Decoding one uploaded picture.", buckets=DURATION_BUCKETS
)
