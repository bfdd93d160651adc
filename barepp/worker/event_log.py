"""The job's history as `events.jsonl`: one JSON object a line, written as it happens."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path


class EventLog:
    """Writes a job's events to a new file; with None as the path it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w", encoding="utf-8") if path is not None else None

    def write(self, event: str, rank: int, **fields: object) -> None:
        """Write one event of `rank` with the Unix time in seconds; never raises."""
        if self._file is not None:
            record = {"time": time.time(), "event": event, "rank": rank, **fields}
            with contextlib.suppress(OSError):  # a full disk must not end the job
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
