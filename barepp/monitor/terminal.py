"""A few lines at the end of a terminal that rich redraws in their own place."""

from __future__ import annotations

import os
from collections.abc import Sequence


class Screen:
    """Remembers what it has drawn; it writes nothing itself. ImportError where rich is missing."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(force_terminal=True, color_system=None)
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def draw(self, lines: Sequence[str], size: os.terminal_size) -> str:
        """Return what draws `lines` over those before, on a terminal of that size."""
        from rich.text import Text

        self._console.size = size
        with self._console.capture() as drawn:
            self._live.start()
            self._live.update(Text("\n".join(lines), no_wrap=True), refresh=True)
        return drawn.get()

    def above(self, text: str) -> str:
        """Return what prints whole lines above those that stand there."""
        from rich.segment import Segment, Segments

        with self._console.capture() as drawn:
            self._console.print(Segments([Segment(text)]), crop=False)
        return drawn.get()

    def leave(self) -> str:
        """Return what lets the lines stand, and goes below them."""
        with self._console.capture() as drawn:
            self._live.stop()
        return drawn.get()


def new_screen() -> Screen | None:
    """Return a screen; None where rich, the extra `ui`, is not installed."""
    try:
        return Screen()
    except ImportError:
        return None


def size_of(fd: int) -> os.terminal_size | None:
    """Return the size of the terminal behind a descriptor; None when there is none."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    if os.environ.get("TERM") == "dumb":  # it would show the sequences instead of obeying them
        return None
    return size if size.columns and size.lines else os.terminal_size((80, 24))
