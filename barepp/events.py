"""The job's history as `events.jsonl`: one JSON object a line, written as it happens."""

from __future__ import annotations

import json
import time
from pathlib import Path


class EventLog:
    """Appends events to a file; with None as the path it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", encoding="utf-8") if path is not None else None

    def write(self, event: str, rank: int, **fields: object) -> None:
        """Write one event of `rank` with the Unix time in seconds."""
        if self._file is not None:
            record = {"time": time.time(), "event": event, "rank": rank, **fields}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
