"""Pictures: what they show, in numbers; and where matplotlib is installed, how it looks."""

from __future__ import annotations

import re
import sys
from itertools import pairwise

import pytest
from traces import MS, every_shape, made

from barepp.errors import UsageError
from barepp.plan.chart_image import CHARACTERS, check_path, plot
from barepp.plan.chart_layout import MOST_BARS, Idle, label_that_fits, panel
from barepp.plan.colours import COLOUR
from barepp.plan.simulate import Costs, simulate
from barepp.program.actions import Action, Kind
from barepp.schedules import make_schedule
from barepp.trace.analysis import measured


def planned(name="1f1b", stages=4, microbatches=8, ranks=None, **options):
    schedule = make_schedule(name, stages, microbatches, ranks)
    return panel(simulate(schedule.order, stages, Costs()), "a plan", "ticks", **options)


@every_shape
def test_bars_and_idle_fill_each_row_exactly(shape):
    name, stages, microbatches, ranks = shape
    timeline = simulate(make_schedule(*shape).order, stages, Costs())
    drawn = planned(name, stages, microbatches, ranks)
    assert drawn.end == timeline.makespan
    for rank, row in enumerate(timeline.spans):
        bars = [bar for bar in drawn.bars if bar.rank == rank]
        assert [(bar.action, bar.start, bar.end) for bar in bars] == [tuple(span) for span in row]
        pieces = sorted((p.start, p.end) for p in [*bars, *drawn.idle] if p.rank == rank)
        assert pieces[0][0] == 0 and pieces[-1][1] == drawn.end
        assert all(one[1] == other[0] for one, other in pairwise(pieces))
        idle = sum(gap.end - gap.start for gap in drawn.idle if gap.rank == rank)
        assert drawn.bubbles[rank] == pytest.approx(idle / drawn.end)
    assert sum(drawn.bubbles) / len(drawn.bubbles) == pytest.approx(timeline.bubble)


def test_what_was_neither_computing_nor_waiting_stays_blank():
    real = measured(made("1f1b", 3, 4, transfer=2, sending=MS // 5), 1)
    drawn = panel(real.timeline, "measured", "ms", waits=real.waits)
    assert drawn.tells_waits and not planned().tells_waits
    for rank, row in enumerate(real.timeline.spans):
        spans = list(row)
        idle = [gap for gap in drawn.idle if gap.rank == rank]
        inside = [gap for gap in idle if spans[0].start < gap.start < spans[-1].start]
        blank = [gap.start - max(s.end for s in spans if s.end <= gap.start) for gap in inside]
        # What sends does so before it waits; what does not send waits at once.
        assert {round(one, 6) for one in blank} <= {0.0, 0.2} and pytest.approx(0.2) in blank
        assert all(any(gap.end == span.start for span in spans) for gap in inside)
        assert (rank == 0) == (idle[0].start != 0)  # before the first action
        if spans[-1].end < drawn.end - 0.3:
            assert idle[-1] == Idle(rank, spans[-1].end, real.timeline.makespan)


def test_a_rank_that_does_nothing_is_idle_all_the_time():
    order = make_schedule("gpipe", 2, 2).order
    timeline = simulate(order, 2, Costs())
    timeline.spans[1] = []
    assert Idle(1, 0.0, float(timeline.makespan)) in panel(timeline, "", "").idle


def test_labels():
    action = Action(2, Kind.F, 10)
    fitting = [label_that_fits(action, characters, with_stage=True) for characters in range(6)]
    assert fitting == ["", "", "10", "F10", "2F10", "2F10"]
    assert label_that_fits(action, 9, with_stage=False) == "F10"
    labels = {bar.label for bar in planned(microbatches=3, characters=1000).bars}
    assert labels == {"F0", "F1", "F2", "B0", "B1", "B2"}
    assert {bar.label for bar in planned(characters=1).bars} == {""}
    # Of several stages on a rank the label tells which, if it usually can.
    assert planned("zb_v", 4, 3, characters=200).bars[0].label == "0F0"
    assert planned("zb_v", 4, 3, characters=50).bars[0].label == "F0"
    # On the usual picture of the usual example all microbatches can be read.
    for name, stages in (("gpipe", 4), ("1f1b", 4), ("zb_h1", 4), ("zb_v", 8)):
        for bar in planned(name, stages, characters=CHARACTERS).bars:
            assert bar.label.endswith(f"{bar.action.kind.value}{bar.action.microbatch}")


def test_kinds_and_stages_are_told_apart_by_colour():
    drawn = planned("zb_v", 8, 4)
    assert (drawn.kinds, drawn.most_stages) == ([Kind.F, Kind.I, Kind.W], 2)
    looks = {}
    for bar in drawn.bars:
        looks.setdefault((bar.rank, bar.action.stage, bar.action.kind), set()).add(bar.colour)
    assert all(len(colours) == 1 for colours in looks.values())
    for rank in range(4):
        colours = [c for (r, _, _), found in looks.items() if r == rank for c in found]
        assert len(set(colours)) == 6
    assert {bar.colour for bar in planned("gpipe").bars} == {COLOUR[Kind.F], COLOUR[Kind.B]}


def test_what_takes_no_time_is_no_bar():
    timeline = simulate(make_schedule("zb_h1", 2, 2).order, 2, Costs(backward_weight=0))
    assert {bar.action.kind for bar in panel(timeline, "", "").bars} == {Kind.F, Kind.I}


def test_too_much_for_a_picture():
    timeline = simulate(make_schedule("gpipe", 2, MOST_BARS // 4 + 1).order, 2, Costs())
    with pytest.raises(UsageError, match="50004 actions are too many for a picture"):
        panel(timeline, "", "")


# -- painting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.pdf", "out", "png"])
def test_a_picture_has_a_kind(name, tmp_path):
    with pytest.raises(UsageError, match=r"a picture's name ends with \.svg or \.png"):
        check_path(tmp_path / name)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        check_path(tmp_path / "none" / "out.svg")


def test_without_matplotlib_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(UsageError, match="which is not installed: pip install matplotlib"):
        plot([planned()], "title", tmp_path / "out.svg")
    assert not list(tmp_path.iterdir())


def test_an_svg_says_it_all_in_text(tmp_path):
    pytest.importorskip("matplotlib")
    real = measured(made("1f1b", 4, 3, transfer=1), 1)
    path = tmp_path / "out.svg"
    drawn = panel(
        real.timeline, "measured", "ms", waits=real.waits, arrows=real.arrows, characters=CHARACTERS
    )
    plot([planned(microbatches=3, characters=CHARACTERS), drawn], "the title", path)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
    assert {"the title", "a plan", "measured", "ticks", "ms", "rank 0", "rank 3"} <= set(texts)
    for label in ("F0", "F1", "F2", "B0", "B1", "B2"):
        assert texts.count(label) == 2 * 4, label
    assert {"F  forward", "B  backward", "idle", "blank: busy with messages"} <= set(texts)
    assert len([text for text in texts if text.endswith("% bubble")]) == 8


def test_a_png_is_painted_in_the_colours(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "out.png"
    plot([planned("zb_v", 8, 3)], "the title", path)
    pixels = image.imread(path)[::9]
    found = {
        tuple(round(float(c) * 255) for c in pixel[:3]) for row in pixels for pixel in row[::3]
    }
    for bar in planned("zb_v", 8, 3).bars:
        assert tuple(int(bar.colour[i : i + 2], 16) for i in (1, 3, 5)) in found


def test_a_place_that_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.svg"
    path.mkdir()
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        plot([planned()], "title", path)
