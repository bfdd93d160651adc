"""A few lines at the end of a terminal that are drawn over and over, each time in their own place.

What is written is text with the control sequences of ECMA-48 that every terminal knows. A picture
is one write, and what stands there is written over rather than erased first: nothing flickers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

_UP: Final = "\x1b[{}F"  # to the beginning of the line that many lines further up
_CLEAR_LINE: Final = "\x1b[K"  # from here to its end
_CLEAR_BELOW: Final = "\x1b[J"
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"  # (private to DEC's VT100, and known everywhere)


class Screen:
    """Remembers how much it has drawn; it writes nothing itself."""

    def __init__(self) -> None:
        self._height = 0
        self._width = 0

    def draw(self, lines: Sequence[str], columns: int) -> str:
        """Return what draws `lines` over those before, on a terminal that is `columns` wide.

        Where the terminal has become too narrow for those, it may have broken them into more:
        nobody knows how many, so they stay, and the new ones are drawn below.
        """
        start = _UP.format(self._height) if self._height and self._width <= columns else ""
        self._height = len(lines)
        self._width = min(max(map(len, lines), default=0), columns)
        # (A full line leaves the cursor on its last character, which clearing would take away.)
        body = "".join(s + (_CLEAR_LINE if len(s) < columns else "") + "\n" for s in lines)
        return f"{_NO_WRAP}{start}{body}{_CLEAR_BELOW}{_WRAP}"

    def erase(self) -> str:
        """Return what takes away the lines that stand there, and goes to where they stood."""
        start = _UP.format(self._height) + _CLEAR_BELOW if self._height else ""
        self._height = 0
        return start


def size_of(fd: int) -> os.terminal_size | None:
    """Return the size of the terminal behind a descriptor; None when there is none."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    if os.environ.get("TERM") == "dumb":  # it would show the sequences instead of obeying them
        return None
    return size if size.columns and size.lines else os.terminal_size((80, 24))
