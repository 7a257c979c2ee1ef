"""What the customization service counts: the `customization_*` metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

CREATED = Counter("customization_jobs_created_total", "Jobs that were accepted.")
ENDED = Counter("customization_jobs_ended_total", "Jobs that ended, by the state they ended in.", ["state"])
REFUSED = Counter("customization_jobs_refused_total", "Example stories that the checks refused.")
ATTEMPTS = Counter("customization_attempts_total", "Training processes that were started.")
PUBLISHED = Counter("customization_versions_published_total", "Character versions that were published.")
JOBS = Gauge("customization_jobs_count", "Jobs that wait for their turn, and jobs that have it.", ["state"])
CHECK_SECONDS = Histogram("customization_check_seconds", "Looking over an example story.")
LOOK_SECONDS = Histogram("customization_look_seconds", "One look of the runner at every job.")
