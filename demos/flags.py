"""The command lines of the demos: flags from a dataclass, and one sentence for each mistake."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import barepp

F = TypeVar("F")


def flag(default: object, about: str) -> Any:
    """Return a field of a dataclass of flags: its default, and its line in --help."""
    return dataclasses.field(default=default, metadata={"help": about})


@contextlib.contextmanager
def one_sentence(world: barepp.World) -> Iterator[None]:
    """Print a person's mistake as one sentence without a traceback, and exit with code 2.

    Several ranks make the same mistake: then the launcher prints it, once.
    """
    try:
        yield
    except (barepp.UsageError, barepp.DataError) as error:
        if world.world_size > 1:
            raise
        refuse(error)


def refuse(error: Exception) -> NoReturn:
    """Print a person's mistake, and exit."""
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    sys.exit(2)


def join() -> barepp.World:
    """Join the world, on the device that --device names.

    This flag is read before the others, because the world decides what they may be. (A launcher has
    a --device of its own, for all ranks.)
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    try:
        return barepp.init(device=parser.parse_known_args(sys.argv[1:])[0].device)
    except barepp.UsageError as error:
        if barepp.launched():
            raise
        refuse(error)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise barepp.UsageError(message)


def read(defaults: F, world: barepp.World, about: str, without: Collection[str] = ()) -> F | None:
    """Return the flags of this command line, in a dataclass like `defaults`; None for --help.

    Each field is a flag of the same name, except those in `without`. A field whose default is None
    is a path, one whose default is False takes no value.
    """
    # Not argparse's own --help: every rank would print it, and leave without the others.
    parser = _Parser(
        prog=Path(sys.argv[0]).name,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="show this text and end")
    text = "cpu, cuda or auto, for a run without a launcher, which has a flag of this name (cpu)"
    parser.add_argument("--device", metavar="WORD", help=text)
    for field in dataclasses.fields(defaults):  # type: ignore[arg-type]
        name, default, text = f"--{field.name}", vars(defaults)[field.name], field.metadata["help"]
        if field.name in without:
            continue
        if default is False:
            parser.add_argument(name, action="store_true", help=text)
            continue
        type_ = Path if default is None else type(default)
        text += "" if default is None else f" ({default})"
        metavar = {Path: "PATH", int: "N", float: "X", str: "WORD"}[type_]
        parser.add_argument(name, type=type_, default=default, metavar=metavar, help=text)
    chosen = vars(parser.parse_args(sys.argv[1:]))
    chosen.pop("device")  # `join` has read it
    if chosen.pop("help"):
        if world.rank == 0:
            print(parser.format_help(), end="")
        return None
    return type(defaults)(**{**vars(defaults), **chosen})


def run_demo(
    defaults: F,
    about: str | None,
    run: Callable[[barepp.World, F], tuple[str, object]],
    without: Collection[str] = (),
) -> None:
    """Join the world, read the flags and `run`; rank 0 prints the text that `run` returns.

    The object that it returns as well goes into the file that --json names.
    """
    with join() as world, one_sentence(world):
        flags = read(defaults, world, about or "", without)
        if flags is None:
            return
        text, found = run(world, flags)
        if world.rank == 0:
            print(text)
            path: Path | None = vars(flags).get("json")
            if path is not None:
                path.write_text(json.dumps(found, indent=1) + "\n")


def check_at_least(least: int, flags: object, names: Sequence[str]) -> None:
    """Refuse smaller numbers."""
    for name in names:
        number = getattr(flags, name)
        if number < least:
            raise barepp.UsageError(f"--{name} is {number}; it must be at least {least}")


def check_positive(flags: object, name: str) -> None:
    """Refuse 0, what is below it, and what is no number."""
    number = getattr(flags, name)
    if not 0 < number < float("inf"):
        raise barepp.UsageError(f"--{name} is {number}; it must be a positive number")


def check_writable(flag: str, path: Path | None) -> None:
    """Find a file that cannot be written before anything is trained."""
    if path is None:
        return
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise barepp.UsageError(f"{flag} {path} cannot be written: {reason}") from error
