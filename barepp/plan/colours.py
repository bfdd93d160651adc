"""What each kind of action looks like: the same colours in pictures and on terminals.

The colours are four of those that Okabe and Ito chose so that people with any kind of colour vision
tell them apart ("Color Universal Design", 2008). All are light enough for black text.
"""

import os
from typing import Final, NamedTuple, TextIO

from barepp.program.actions import Kind

MEANING: Final = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
}
COLOUR: Final = {Kind.F: "#56b4e9", Kind.B: "#e69f00", Kind.I: "#2fbf98", Kind.W: "#cc79a7"}
# The nearest of a terminal's 256 colours: of a rank's first stage, and paler of those behind it.
_TERMINAL: Final = {Kind.F: (74, 117), Kind.B: (214, 222), Kind.I: (36, 79), Kind.W: (175, 218)}
_PALEST: Final = 0.6  # how much white goes into the last of a rank's stages


class Style(NamedTuple):
    """How one character, or one bar, is painted."""

    kind: Kind
    place: int  # of the stage among those of its rank, from 0


def painted(text: str, style: Style | None) -> str:
    """Return the text in its colours for a terminal; without a style, faint (ECMA-48, SGR)."""
    if style is None:
        return f"\x1b[2m{text}\x1b[0m" if text.strip() else text
    shades = _TERMINAL[style.kind]
    return f"\x1b[30;48;5;{shades[min(style.place, 1)]}m{text}\x1b[0m"


def shade(style: Style, num_places: int) -> str:
    """Return a bar's colour as "#rrggbb": the paler, the later its stage is among its rank's."""
    white = _PALEST * style.place / max(1, num_places - 1)
    channels = [int(COLOUR[style.kind][i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + white * (255 - c)):02x}" for c in channels)


def wants_colours(stream: TextIO) -> bool:
    """Whether text for it is coloured: on a terminal, unless NO_COLOR (no-color.org) is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
