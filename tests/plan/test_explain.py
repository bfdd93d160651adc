"""`python -m barepp.plan --explain RANK`: a line for each action, as the rank executes it."""

import pytest

from barepp.plan.__main__ import main as plan
from barepp.plan.explain import explain
from barepp.program.lowering import lower
from barepp.schedules import make_schedule, schedule_names, usual_stages


def test_a_rank_in_the_middle_receives_computes_and_sends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--schedule", "1f1b", "--stages", "4", "--microbatches", "2"]
    assert plan([*sizes, "--explain", "1"]) == 0
    head, empty, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(
        "rank 1 of 4 in 1f1b: what it does in a step (receives are posted before"
    )
    assert empty == ""
    forward = "1F{0}   {1}   forward of stage 1    {2}"
    backward = "1B{0}   {1}   backward of stage 1   {2}"
    received = ["receive activation {0} from rank 0", "receive gradient {0} from rank 2  "]
    sent = ["send activation {0} to rank 2", "send gradient {0} to rank 0"]
    expected = []
    for text, source, target in zip((forward, backward), received, sent, strict=True):
        expected += [text.format(i, source.format(i), target.format(i)) for i in range(2)]
    assert lines == expected


def test_ends_and_neighbours_on_one_rank() -> None:
    lines = explain(make_schedule("zb_v", 4, 1, 2), 0).splitlines()[2:]
    assert [line.split("   ") for line in lines] and lines[0].startswith("0F0   take microbatch 0")
    assert "send activation 0 to rank 1" in lines[0]
    assert "keep the loss" in lines[1] and "receive activation 0 from rank 1" in lines[1]
    assert "start from the loss" in lines[2] and "input gradient of stage 3" in lines[2]
    assert lines[3] == "3W0   use what 3I0 has kept              weight gradient of stage 3"
    inner = explain(make_schedule("zb_v", 4, 1, 2), 1)
    assert "hand activation 0 to my own stage" in inner
    assert "take activation 0 from my own stage" in inner
    assert "take gradient 0 from my own stage" in inner


@pytest.mark.parametrize("name", schedule_names())
def test_each_line_says_what_the_program_says(name: str) -> None:
    schedule = make_schedule(name, usual_stages(name, 3), 4, 3)
    program = lower(schedule.order, schedule.num_stages)
    for rank in range(3):
        lines = explain(schedule, rank).splitlines()[2:]
        assert len(lines) == len(program[rank])
        for line, (action, source, target) in zip(lines, program[rank], strict=True):
            assert line.startswith(f"{action}   ")
            assert (f"from rank {source}" in line) == (source is not None)
            assert (f"to rank {target}" in line) == (target is not None)


def test_a_rank_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan(["--schedule", "gpipe", "--stages", "2", "--microbatches", "2", "--explain", "2"])
    assert ended.value.code == 2
    assert "there is no rank 2: the ranks are 0 to 1" in capsys.readouterr().err
