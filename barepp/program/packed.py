"""A rank's list of actions in 8 bytes each, so that millions fit; it reads like any other list.

One action is one signed 64-bit integer:   | microbatch: 40 bits | stage: 20 bits | kind: 2 bits |

Why not a list of `Action`? One is a tuple of about 90 bytes with its integers, and 1024 stages of
4096 microbatches have 8.4 million. Loops over that many look at the integers; everything else
asks for an item and gets an `Action`.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from barepp.errors import ScheduleError
from barepp.program.actions import Action, Kind

KINDS = tuple(Kind)
KIND_BITS = 2
KIND_MASK = (1 << KIND_BITS) - 1
STAGE_BITS = 20
MICROBATCH_SHIFT = STAGE_BITS + KIND_BITS
# The bits that say which stage and kind: what all microbatches have in common.
PLACE_MASK = (1 << MICROBATCH_SHIFT) - 1
_MAX_STAGE = (1 << STAGE_BITS) - 1
_MAX_MICROBATCH = (1 << 40) - 1

_KIND_CODE = {kind: code for code, kind in enumerate(KINDS)}


class PackedActions(Sequence[Action]):
    """What one rank does, first to last; it cannot be changed."""

    __slots__ = ("_places", "codes")
    __hash__ = None  # type: ignore[assignment]  # as of any list

    def __init__(self, actions: Iterable[Action]) -> None:
        self.codes = array("q")
        append, kind_code = self.codes.append, _KIND_CODE
        for stage, kind, microbatch in actions:
            if not (0 <= stage <= _MAX_STAGE and 0 <= microbatch <= _MAX_MICROBATCH):
                raise ScheduleError(
                    f"{stage}{kind.value}{microbatch} is out of bounds: stages go from 0 to "
                    f"{_MAX_STAGE}, microbatches from 0 to {_MAX_MICROBATCH}"
                )
            append(microbatch << MICROBATCH_SHIFT | stage << KIND_BITS | kind_code[kind])
        self._places: frozenset[int] | None = None

    def each_place(self) -> Iterator[int]:
        """Return the stage and kind of one action after the other, as `place` writes them."""
        return map(PLACE_MASK.__and__, self.codes)

    def places(self) -> frozenset[int]:
        """Return the stages and kinds that occur, as `place` writes them."""
        if self._places is None:
            self._places = frozenset(self.each_place())
        return self._places

    def stages(self) -> set[int]:
        """Return the stages that occur."""
        return {one >> KIND_BITS for one in self.places()}

    def num_microbatches(self) -> int:
        """Return the largest microbatch that occurs, plus one."""
        return 1 + (max(self.codes) >> MICROBATCH_SHIFT) if self.codes else 0

    def texts(self) -> list[str]:
        """Return each action's text form."""
        common = {one: str(_unpack(one))[:-1] for one in self.places()}  # all but the microbatch 0
        return [f"{common[code & PLACE_MASK]}{code >> MICROBATCH_SHIFT}" for code in self.codes]

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> Action: ...
    @overload
    def __getitem__(self, index: slice) -> "PackedActions": ...
    def __getitem__(self, index: int | slice) -> "Action | PackedActions":
        if isinstance(index, slice):
            part = PackedActions(())
            part.codes = self.codes[index]
            return part
        return _unpack(self.codes[index])

    def __iter__(self) -> Iterator[Action]:
        return map(_unpack, self.codes)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedActions):
            return self.codes == other.codes
        return list(self) == other if isinstance(other, list) else NotImplemented

    def __repr__(self) -> str:
        return f"<{' '.join(map(str, self))}>"


def place(stage: int, kind: Kind) -> int:
    """Return the lowest bits of every action of this stage and kind."""
    return stage << KIND_BITS | _KIND_CODE[kind]


def packed(actions: Sequence[Action]) -> PackedActions:
    """Return the list in packed form; one that is, is returned itself."""
    return actions if isinstance(actions, PackedActions) else PackedActions(actions)


def _unpack(code: int) -> Action:
    stage = (code & PLACE_MASK) >> KIND_BITS
    return Action(stage, KINDS[code & KIND_MASK], code >> MICROBATCH_SHIFT)
