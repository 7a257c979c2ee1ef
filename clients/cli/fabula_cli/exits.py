"""What the exit status of `fabula` says. Scripts rely on these numbers."""

from __future__ import annotations

OK = 0
FAILED = 1  # something unexpected; the message says what
USAGE = 2  # the command line is wrong
NOT_RUNNING = 3  # the services cannot be reached: `fabula up`
REFUSED = 4  # the request was understood and refused: the reason says why
STORY_ENDED_BADLY = 5  # the story failed or was cancelled (what it has was still written), or a character job did
CANNOT_START = 6  # `up` could not start the services
FAULTS_FOUND = 7  # `doctor` or `pack verify` found something broken, `character train --check` a story that is refused
INTERRUPTED = 130  # Ctrl-C; a created story goes on
TERMINATED = 143  # SIGTERM; likewise

TABLE = """Exit status: 0 done · 1 unexpected failure · 2 wrong command line · 3 services not running · 4 request
refused · 5 story or character job failed or cancelled · 6 services could not start · 7 doctor, verify, --check: faults
found · 130 interrupted · 143 terminated"""
