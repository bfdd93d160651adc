"""Finds a parameter that layers of two stages share: it would be trained as two.

Each stage adds up its own gradients, and each process has its own copy: two uses of one weight
would drift apart in silence. Within one stage sharing is fine.

1. A rank does not build the layers of other ranks. But a shared parameter exists before the layers
   are built, so the builders of both layers can reach it: as an argument of a partial, from a
   closure, as a global.
2. If the builder of another stage's layer can reach a parameter of this rank, that builder is
   called, to see whether its layer holds the parameter. No other builder is called.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from barepp.errors import PartitionError
from barepp.train.stage.layers import LayerBuilder
from barepp.train.stage.seeding import LayerRandomness

_DEPTH = 8  # of functions in partials in lists …
_LENGTH = 10_000  # of a list of layers; a longer one holds something else


def check_no_sharing(
    own: nn.ModuleDict,
    ranges: Sequence[range],
    builders: Sequence[LayerBuilder],
    randomness: LayerRandomness,
) -> None:
    """Raise a PartitionError if a layer of this rank (`own`) shares a parameter across stages."""
    stage_of = {layer: index for index, layers in enumerate(ranges) for layer in layers}
    own_stages = {stage_of[int(layer)] for layer in own}
    users: dict[int, tuple[int, str]] = {}  # by the parameter's id: the first layer, its name
    for name, parameter in own.named_parameters(remove_duplicate=False):
        layer = int(name.partition(".")[0])
        first, first_name = users.setdefault(id(parameter), (layer, name))
        if stage_of[first] != stage_of[layer]:
            raise _error((first, first_name), (layer, name), stage_of)
    for layer, builder in enumerate(builders):
        if stage_of[layer] in own_stages or not users.keys() & reachable(builder):
            continue
        with randomness:
            module = builder()
        for name, parameter in module.named_parameters():
            if id(parameter) in users:
                raise _error(users[id(parameter)], (layer, f"{layer}.{name}"), stage_of)


def reachable(start: object) -> set[int]:
    """Return the ids of the parameters that a builder can reach before it is called."""
    found: set[int] = set()
    seen: dict[int, object] = {}  # (kept alive, so that no id is given twice)
    level: list[object] = [start]
    for _ in range(_DEPTH):
        following: list[object] = []
        for thing in level:
            if id(thing) in seen:
                continue
            seen[id(thing)] = thing
            if isinstance(thing, nn.Module):
                found.update(map(id, thing.parameters()))
            elif isinstance(thing, torch.Tensor):
                found.add(id(thing))
            else:
                following += _held_by(thing)
        level = following
    return found


def _held_by(thing: object) -> Iterable[object]:
    """Return what an object refers to, as Python's garbage collector knows it.

    That asks no code of the object's own: a proxy would answer for something else, or load it.
    """
    if isinstance(thing, types.FunctionType):
        codes, used = [thing.__code__], set[str]()
        for code in codes:  # grows: functions in the function
            codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
            used.update(code.co_names)  # attributes' names are among them: mostly not globals
        variables = [thing.__globals__[name] for name in used if name in thing.__globals__]
        return [thing.__defaults__, thing.__kwdefaults__, thing.__closure__, *variables]
    if isinstance(thing, type):
        return [thing.__init__]  # type: ignore[misc]  # of this very class: what it would run
    if isinstance(thing, types.ModuleType):
        return []
    if isinstance(thing, (dict, list, tuple, set, frozenset)) and len(thing) > _LENGTH:
        return []
    held = gc.get_referents(thing)
    return [one for one in held if one is not type(thing)]


def _error(
    one: tuple[int, str], other: tuple[int, str], stage_of: Mapping[int, int]
) -> PartitionError:
    (layer, name), (second, second_name) = sorted((one, other))
    return PartitionError(
        f"layers {layer} and {second} share a parameter ({name} is {second_name}), but they are in "
        f"stages {stage_of[layer]} and {stage_of[second]}: it would be trained as two. Cut the "
        "model so that one stage has both, or give each layer a parameter of its own"
    )
