"""What barepp's commands have in common: mistakes in one sentence, and a reader that goes away."""

import argparse
import os
import sys
from typing import Final, NoReturn

__version__: Final = "0.1.0"  # (pyproject.toml says the same: a test compares them)


class Parser(argparse.ArgumentParser):
    """A parser that ends with code 2 and one sentence."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one sentence, without the page of usage before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def reader_is_gone() -> int:
    """Return the exit code for a `BrokenPipeError` of stdout: `| head` has seen enough.

    The interpreter flushes stdout once more at its end; it gets a place to flush to, or it would
    complain there.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141  # 128 + SIGPIPE, what the shell reports for a program that the signal ends
