"""A terminal of a few control sequences, for tests of what is drawn: what would a person see?"""

from __future__ import annotations

import re

_SEQUENCE = re.compile(r"\x1b\[(\??\d*)([A-Za-z])")


class Terminal:
    """Lines that grow downwards; a longer one than `columns` is wrapped."""

    def __init__(self, columns: int = 80) -> None:
        self.columns = columns
        self.lines = [""]
        self.cursor_shown = True
        self._row = self._printed = 0

    def write(self, text: str) -> None:
        for part in re.split(r"(\x1b\[\??\d*[A-Za-z]|\n|\r)", text):
            if match := _SEQUENCE.fullmatch(part):
                self._obey(match[2], match[1])
            elif part == "\n":
                self._newline()
            elif part == "\r":
                self._printed = 0
            elif part:
                self._print(part)

    @property
    def shown(self) -> list[str]:
        assert self.lines[self._row] == "", "the cursor stands at the beginning of a line"
        return [line.rstrip() for line in self.lines[: self._row]]

    def _print(self, text: str) -> None:
        # (Nothing here moves the cursor within a line, so what is printed begins at its left end.)
        while len(text) > self.columns:
            self.lines[self._row], text = text[: self.columns], text[self.columns :]
            self._newline()
        assert self._printed == 0, "text is printed at the left end"
        self.lines[self._row] = text + self.lines[self._row][len(text) :]
        self._printed = len(text)

    def _newline(self) -> None:
        self._row += 1
        self._printed = 0
        if self._row == len(self.lines):
            self.lines.append("")

    def _obey(self, letter: str, argument: str) -> None:
        match letter:
            case "A":
                assert int(argument) <= self._row, "above the top"
                self._row -= int(argument)
            case "K" if argument == "2":
                self.lines[self._row] = ""
            case "H":
                self._row = self._printed = 0
            case "J":
                self.lines[self._row :] = [""]
            case "l" | "h" if argument == "?25":
                self.cursor_shown = letter == "h"
            case _:
                raise AssertionError(f"an unknown sequence: {argument}{letter}")
