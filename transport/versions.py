"""The versions of what a rank runs, as it announces them: read with suspicion, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from transport.errors import ProtocolError, printable

MAX_NAMES: Final = 16
TEXT_LIMIT: Final = 100  # characters of a name or a version


def checked_versions(record: object) -> dict[str, str]:
    """Read a map from the network of names to versions; None is an empty one.

    Raises:
        ProtocolError: it is something else.
    """
    items = [] if record is None else list(record.items()) if isinstance(record, dict) else [record]
    texts = [text for item in items if isinstance(item, tuple) for text in item]
    if len(texts) != 2 * len(items) or len(items) > MAX_NAMES:
        raise ProtocolError(f"not a map of versions: {record!r:.100}")
    if not all(isinstance(text, str) for text in texts):
        raise ProtocolError(f"not a map of versions: {record!r:.100}")
    names, versions = texts[::2], texts[1::2]
    short = [[printable(text, TEXT_LIMIT) for text in column] for column in (names, versions)]
    return dict(zip(*short, strict=True))


def difference(mine: Mapping[str, str], rank: int, theirs: Mapping[str, str]) -> str:
    """Say in what `mine` differs from those of another rank; "" when it does not."""
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            return (
                f"it runs {name} {mine[name]}, but rank {rank} runs {name} {theirs[name]}: "
                "all must run the same"
            )
    return ""
