"""Finds a parameter that layers of two stages share, which would be trained as two.

Each stage adds up gradients for itself, and each process has a copy of its own: two uses of one
weight would drift apart without a word. Within a stage sharing is fine.

A rank does not build the layers of others, so how can it know? A shared parameter exists before
the layers are built, and so the builders of both layers can reach it: as an argument of a partial,
from a closure, as a global. Where another stage's builder can reach a parameter of this rank's,
and only there, that builder is called to see whether its layer does hold it.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from barepp.errors import PartitionError
from barepp.train.models import LayerBuilder
from barepp.train.stage.seeding import LayerRandomness
from barepp.train.stage.stage import Stage

_DEPTH = 5  # of functions in partials in lists …
_LENGTH = 10_000  # of a list of layers; a longer one holds something else


def check_no_sharing(
    stages: Mapping[int, Stage],
    ranges: Sequence[range],
    builders: Sequence[LayerBuilder],
    randomness: LayerRandomness,
) -> None:
    """Raise a PartitionError if one of `stages` (this rank's) shares a parameter with another."""
    stage_of = {layer: index for index, layers in enumerate(ranges) for layer in layers}
    users: dict[int, tuple[int, str]] = {}  # by the parameter's id: the first layer, its name
    for stage in stages.values():
        for name, parameter in stage.layers.named_parameters(remove_duplicate=False):
            layer = int(name.partition(".")[0])
            first, first_name = users.setdefault(id(parameter), (layer, name))
            if stage_of[first] != stage_of[layer]:
                raise _error((first, first_name), (layer, name), stage_of)
    for layer, builder in enumerate(builders):
        if stage_of[layer] in stages or not users.keys() & reachable(builder):
            continue
        with randomness:
            module = builder()
        for name, parameter in module.named_parameters():
            if id(parameter) in users:
                raise _error(users[id(parameter)], (layer, f"{layer}.{name}"), stage_of)


def reachable(start: object) -> set[int]:
    """Return the ids of the parameters that a builder can reach before it is called."""
    found: set[int] = set()
    seen: set[int] = set()
    level: list[object] = [start]
    for _ in range(_DEPTH):
        following: list[object] = []
        for thing in level:
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, nn.Module):
                found.update(map(id, thing.parameters()))
            elif isinstance(thing, torch.Tensor):
                found.add(id(thing))
            else:
                following += _held_by(thing)
        level = following
    return found


def _held_by(thing: object) -> Iterable[object]:
    held: Iterable[object] = ()
    if isinstance(thing, functools.partial):
        held = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, types.MethodType):
        held = [thing.__func__, thing.__self__]
    elif isinstance(thing, types.FunctionType):
        held = _held_by_function(thing)
    elif isinstance(thing, type):
        held = [thing.__init__]  # type: ignore[misc]  # of this very class: what it would run
    elif isinstance(thing, dict) and len(thing) <= _LENGTH:
        held = thing.values()
    elif isinstance(thing, (list, tuple, set, frozenset)) and len(thing) <= _LENGTH:
        held = thing
    elif type(thing).__dictoffset__ and not isinstance(thing, types.ModuleType):
        # Not vars(): a proxy may answer for something else, or load it.
        held = object.__getattribute__(thing, "__dict__").values()
    return held


def _held_by_function(function: types.FunctionType) -> Iterator[object]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that nothing has been put in yet
            yield cell.cell_contents
    codes = [function.__code__]
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        for name in code.co_names:  # attributes' names are among them: mostly not globals
            if name in function.__globals__:
                yield function.__globals__[name]


def _error(
    one: tuple[int, str], other: tuple[int, str], stage_of: Mapping[int, int]
) -> PartitionError:
    (layer, name), (second, second_name) = sorted((one, other))
    return PartitionError(
        f"layers {layer} and {second} share a parameter ({name} is {second_name}), but they are in "
        f"stages {stage_of[layer]} and {stage_of[second]}: it would be trained as two. Cut the "
        "model so that one stage has both, or give each layer a parameter of its own"
    )
