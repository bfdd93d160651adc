"""Text drawings: to scale, and in colours; the grid itself is tested in test_simulate.py."""

from __future__ import annotations

import io
import re

import pytest
from traces import made

from barepp.plan.colours import COLOUR, Style, painted, shade, wants_colours
from barepp.plan.simulate import Costs, simulate
from barepp.plan.text_chart import draw, draw_to_scale, nice_step
from barepp.plan.timeline import Timeline
from barepp.program.actions import Kind
from barepp.program.dry_run import Span
from barepp.schedules import make_schedule
from barepp.trace.analysis import measured

SGR = re.compile(r"\x1b\[[0-9;]*m")


def one_f_one_b(stages: int = 2, microbatches: int = 3) -> Timeline:
    return simulate(make_schedule("1f1b", stages, microbatches).order, stages, Costs())


def test_columns_are_time():
    drawn = draw_to_scale(one_f_one_b(), width=8 + 36)  # 12 units: three columns each
    assert drawn.splitlines() == [
        "ms      0              5              10",
        "rank 0  F0-F1-......B0----F2-B1----...B2----",
        "rank 1  ...F0-B0----F1-B1----F2-B2----......",
    ]


def test_what_does_not_fit_is_cut_and_never_left_out():
    rows = [line[8:] for line in draw_to_scale(one_f_one_b(), width=8 + 12).splitlines()[1:]]
    assert rows == ["FF..B0FB1.B2", ".FB0FB1FB2.."]
    short = Timeline([[Span(action, i, i + 1e-9)] for i, action in enumerate(_actions())])
    rows = [line[8:] for line in draw_to_scale(short, width=30, end=2).splitlines()[1:]]
    assert rows == ["F" + 11 * ".", 11 * "." + "F"]
    assert draw_to_scale(Timeline([[], []])) == "nothing takes any time: there is nothing to draw"


def _actions():
    return [span.action for row in one_f_one_b(2, 1).spans for span in row[:1]]


def test_the_stage_is_named_where_it_fits():
    timeline = measured(made("zb_v", 4, 3), 0).timeline
    assert "rank 0  0F0--" in draw_to_scale(timeline, width=120)
    assert "rank 0  F0-F1F2-" in draw_to_scale(timeline, width=60)


def test_two_drawings_have_one_scale():
    half = draw_to_scale(one_f_one_b(), width=8 + 48, end=24)
    assert half.splitlines()[0].rstrip() == "ms      0         5         10        15        20"
    assert half.splitlines()[1][8:] == "F0F1....B0--F2B1--..B2--"


@pytest.mark.parametrize(
    ("end", "most", "step"), [(33, 10, 5), (100, 10, 10), (0.031, 10, 0.005), (9, 9, 1), (1, 0, 1)]
)
def test_steps_of_an_axis(end, most, step):
    assert nice_step(end, most) == pytest.approx(step)


@pytest.mark.parametrize("draws", [draw, draw_to_scale])
@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_colours_change_nothing_but_the_colour(name, draws):
    stages = 8 if name == "zb_v" else 4
    timeline = simulate(make_schedule(name, stages, 6).order, stages, Costs())
    for width in (60, 120):
        coloured = draws(timeline, width, colours=True)
        assert SGR.sub("", coloured) == draws(timeline, width)
        codes = set(SGR.findall(coloured))
        # One for what is idle, one to end with, and one for each kind and place of its stage.
        assert len(codes) == 2 + (6 if name == "zb_v" else 2)


def test_paint():
    assert painted("F0", Style(Kind.F, 0)) == "\x1b[30;48;5;74mF0\x1b[0m"
    assert painted("F0", Style(Kind.F, 1)) == painted("F0", Style(Kind.F, 7)) != painted("F0", None)
    assert painted(" ", None) == " "


def test_shades_go_from_the_kinds_colour_towards_white():
    assert shade(Style(Kind.B, 0), 1) == shade(Style(Kind.B, 0), 4) == COLOUR[Kind.B]
    shades = [shade(Style(Kind.F, place), 4) for place in range(4)]
    assert shades == sorted(shades) and len(set(shades)) == 4
    assert shades[-1] < "#ffffff"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_whose_owner_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colours(Terminal()) and not wants_colours(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colours(Terminal())
    monkeypatch.setenv("NO_COLOR", "")  # no-color.org: when present and not an empty string
    assert wants_colours(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colours(Terminal())
