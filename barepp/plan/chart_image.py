"""Paints panels of bars as a picture, SVG or PNG, with matplotlib (the extra "plot")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from barepp.errors import UsageError
from barepp.plan.chart_layout import Panel
from barepp.plan.colours import COLOUR, MEANING, Style, shade
from barepp.program.actions import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS: Final = (".svg", ".png")
WIDTH_IN: Final = 13.0
_ROW_IN: Final = 0.38  # height of a rank's row
_TALLEST_IN: Final = 40.0
_FONT_PT: Final = 7.5
_MARGIN_IN: Final = 0.95  # left of the axis, and as much right of it
# How many bold capitals and digits, each 0.78 of the font's size wide, fit side by side.
CHARACTERS: Final = (WIDTH_IN - 2 * _MARGIN_IN) * 72 / (_FONT_PT * 0.78)
_INK: Final = "#222222"
_IDLE: Final[dict[str, Any]] = {
    "facecolor": "#eeeeee",
    "edgecolor": "#b4b4b4",
    "hatch": "////",
    "linewidth": 0,
}


def check_path(path: Path) -> None:
    """Raise a `UsageError` where no picture can be made: before minutes of work, not after."""
    if path.suffix not in FORMATS:
        raise UsageError(f"--plot {path}: a picture's name ends with {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from None


def plot(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Write the panels, one below the other on the same scale, to a file; blocks until it is there.

    Raises:
        UsageError: the file cannot be written, or matplotlib is not installed.
    """
    check_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    heights = [min(_ROW_IN * max(panel.num_ranks, 2), _TALLEST_IN) for panel in panels]
    height = sum(heights) + 0.72 * len(panels) + 0.65
    with rc_context({"hatch.linewidth": 0.6, "svg.fonttype": "none", "font.size": _FONT_PT}):
        figure = Figure(figsize=(WIDTH_IN, height))
        top = height - 0.35
        for panel, each in zip(panels, heights, strict=True):
            bottom = top - 0.25 - each
            width = 1 - 2 * _MARGIN_IN / WIDTH_IN
            box = (_MARGIN_IN / WIDTH_IN, bottom / height, width, each / height)
            _paint(figure.add_axes(box), panel)
            top = bottom - 0.47
        figure.text(
            _MARGIN_IN / WIDTH_IN, 1 - 0.1 / height, title,
            fontsize=12, fontweight="bold", color=_INK, va="top",
        )  # fmt: skip
        figure.legend(
            handles=_legend(panels), loc="lower center", ncols=8, frameon=False, fontsize=9,
            bbox_to_anchor=(0.5, 0.04 / height),
        )  # fmt: skip
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise UsageError(f"--plot {path} cannot be written: {error.strerror}") from error


def _paint(axes: Axes, panel: Panel) -> None:
    for rank in range(panel.num_ranks):
        gaps = [(idle.start, idle.end - idle.start) for idle in panel.idle if idle.rank == rank]
        axes.broken_barh(gaps, (rank - 0.42, 0.84), **_IDLE)
        bars = [bar for bar in panel.bars if bar.rank == rank]
        axes.broken_barh(
            [(bar.start, bar.end - bar.start) for bar in bars], (rank - 0.42, 0.84),
            facecolors=[bar.colour for bar in bars], edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        for bar in bars:
            if bar.label:
                axes.text(
                    (bar.start + bar.end) / 2, rank, bar.label,
                    ha="center", va="center_baseline", fontsize=_FONT_PT, color="black",
                    fontweight="bold", clip_on=True,
                )  # fmt: skip
        axes.annotate(
            f"{panel.bubbles[rank]:.0%} bubble", (1, rank), xycoords=("axes fraction", "data"),
            xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, color=_INK,
        )  # fmt: skip
    for arrow in panel.arrows:
        axes.annotate(
            "", (arrow.used, arrow.receiver), (arrow.sent, arrow.sender),
            arrowprops={"arrowstyle": "-|>", "color": "#333333", "linewidth": 0.6, "shrinkA": 0,
                        "shrinkB": 0, "mutation_scale": 6},
        )  # fmt: skip
    axes.set_xlim(0, panel.end)
    axes.set_ylim(panel.num_ranks - 0.5, -0.5)
    every = max(1, panel.num_ranks // 32)
    axes.set_yticks(range(0, panel.num_ranks, every))
    axes.set_yticklabels([f"rank {rank}" for rank in range(0, panel.num_ranks, every)], fontsize=9)
    axes.set_title(panel.title, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel(panel.unit, fontsize=9, color=_INK, labelpad=1)
    axes.tick_params(axis="x", length=2, color="#888888", labelcolor=_INK)
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(panels: Sequence[Panel]) -> list[Any]:
    from matplotlib.patches import Patch

    found = {kind for panel in panels for kind in panel.kinds}
    handles = [
        Patch(facecolor=COLOUR[kind], label=f"{kind.value}  {meaning}")
        for kind, meaning in MEANING.items()
        if kind in found
    ]
    if any(panel.most_stages > 1 for panel in panels):
        pale = shade(Style(Kind.F, 1), 2)
        handles.append(Patch(facecolor=pale, label="paler: a later stage of the rank"))
    handles.append(Patch(**_IDLE, label="idle"))
    if any(panel.tells_waits for panel in panels):
        handles.append(Patch(facecolor="none", label="blank: busy with messages"))
    return handles
