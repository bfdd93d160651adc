"""A schedule of your own, from a file of your own: `--schedule path/to/file.py:function`.

The function is like the built-in ones: it takes (num_stages, num_microbatches, num_ranks) and gives
each rank's list, rank 0's first. An action may be an `Action` or its text "2B1", and a whole list
may be one text with spaces. So this is a schedule, and needs no import:

    def one_after_the_other(num_stages, num_microbatches, num_ranks):
        return [
            [f"{rank}{kind}{microbatch}" for microbatch in range(num_microbatches) for kind in "FB"]
            for rank in range(num_ranks)
        ]

It must give the same lists every time it is asked: each rank asks by itself.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from operator import index
from pathlib import Path
from typing import Any

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Kind


def is_own(name: str) -> bool:
    """Return whether `name` has the form path/to/file.py:function."""
    return ".py:" in name


def own_order(
    name: str, num_stages: int, num_microbatches: int, num_ranks: int
) -> Iterator[list[Action]]:
    """Yield the list of each rank, as the function `name` in its file gives them."""
    function = _load(name)
    try:
        lists = list(function(num_stages, num_microbatches, num_ranks))
    except Exception as error:  # whatever it is, it is the user's
        call = f"({num_stages} stages, {num_microbatches} microbatches, {num_ranks} ranks)"
        raise ScheduleError(f"{name}{call} failed: {_told(error)}") from error
    for rank, row in enumerate(lists):
        words = row.split() if isinstance(row, str) else row
        if not isinstance(words, Iterable):
            raise ScheduleError(
                f"{name} gives {words!r} for rank {rank} instead of a list of actions"
            )
        yield [_action(name, rank, position, word) for position, word in enumerate(words)]


def _action(name: str, rank: int, position: int, word: Any) -> Action:
    where = f"{name} gives at rank {rank}, position {position}"
    if isinstance(word, str):
        try:
            return Action.parse(word)
        except ScheduleError as error:
            raise ScheduleError(f"{where}: {error}") from None
    try:
        stage, kind, microbatch = word  # an Action, or what looks like one
        return Action(index(stage), Kind(kind), index(microbatch))
    except (TypeError, ValueError):
        raise ScheduleError(f"{where}: {word!r}; an action is written '2B1'") from None


def _load(name: str) -> Callable[..., Any]:
    file, _, wanted = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ScheduleError(f"there is no file {file} (from {Path.cwd()}) for --schedule {name}")
    # A name that no import can meet: the file is read anew each time, and hides no other module.
    module_name = f"barepp own schedule {path.resolve()}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # is_own has seen the .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses, for one, look their own module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever it is, it is the user's
        raise ScheduleError(f"{file} cannot be read: {_told(error)}") from error
    function = getattr(module, wanted, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    found = [key for key, value in vars(module).items() if _is_a_choice(value, module_name)]
    there = f"there are {', '.join(found)}" if found else "it defines none"
    raise ScheduleError(f"{file} has no function {wanted!r}; {there}")


def _is_a_choice(value: object, module_name: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module_name


def _told(error: Exception) -> str:
    """Return type, message and the innermost line of the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
