"""The tables. Migrations (`migrations/versions`) make them; a test holds the two together.

Times are microseconds since 1970 UTC, so that SQLite and PostgreSQL agree to the bit. Names begin with the service's
word: in PostgreSQL the services of an installation share a database.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

jobs = Table(
    "customization_jobs",
    metadata,
    Column("job_id", String(36), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", String(64), nullable=False, default=""),
    Column("message", Text, nullable=False, default=""),
    Column("attempt", Integer, nullable=False, default=0),
    Column("character", JSON, nullable=False),
    Column("frames", JSON, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("findings", JSON, nullable=False),
    Column("estimate", JSON, nullable=False),
    Column("progress", JSON(none_as_null=True)),
    Column("following", JSON, nullable=False),
    Column("last_sequence", BigInteger, nullable=False),
    Column("create_us", BigInteger, nullable=False),
    Column("update_us", BigInteger, nullable=False),
    Column("queue_us", BigInteger),  # when it was last put into the queue: who came first is trained first
    Column("start_us", BigInteger),
    Column("end_us", BigInteger),
    Column("delete_us", BigInteger),
    Column("purge_us", BigInteger),
    Column("report_sha256", String(64)),  # the page on the job, in the object store
    Column("report_us", BigInteger),  # when it was made; of before the job's end: it is an old one
    Column("baseline", JSON(none_as_null=True)),  # figures of the probes before the first step
    Index(None, "state"),
)

events = Table(
    "customization_events",
    metadata,
    Column("job_id", String(36), ForeignKey("customization_jobs.job_id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("time_us", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("payload", JSON, nullable=False),
)

checkpoints = Table(
    "customization_checkpoints",
    metadata,
    Column("job_id", String(36), ForeignKey("customization_jobs.job_id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("file", Text, nullable=False),  # its weights, below the job's folder
    Column("payload", JSON, nullable=False),
    Column("card", JSON, nullable=False),  # what the training process says of it
)

images = Table(
    "customization_images",
    metadata,
    Column("job_id", String(36), ForeignKey("customization_jobs.job_id"), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Index(None, "sha256"),
)

versions = Table(
    "customization_versions",
    metadata,
    Column("version_id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("job_id", String(36), nullable=False),  # no foreign key: the version stays when the job is purged
    Column("publish_us", BigInteger, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("manifest", Text, nullable=False),
    Column("delete_us", BigInteger),
    Column("purge_us", BigInteger),
    Column("unsettled_us", BigInteger),  # since when what lies in the stores may not be what this row says
    Index(None, "name"),
    Index(None, "job_id"),
)

request_keys = Table(
    "customization_request_keys",
    metadata,
    Column("request_id", String(255), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("job_id", String(36), ForeignKey("customization_jobs.job_id"), nullable=False),
    Column("create_us", BigInteger, nullable=False),
)
