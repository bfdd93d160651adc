"""The handwritten digits: read, checked, cut into training and test set, and into batches.

Each image is 8×8 pixels of 0…16 in one row of data/digits.csv.gz, with its label behind them.
Without data/ beside this file there is nothing to train on; see data/README.md for its source.
"""

import gzip
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from barepp import DataError, UsageError, derive_seed

import torch
from torch import Tensor

DIGITS = Path(__file__).parent / "data" / "digits.csv.gz"
NUM_ROWS = 1797
NUM_PIXELS = 64
MAX_PIXEL = 16
NUM_CLASSES = 10
NUM_TEST_ROWS = 360
REMEDY = "take a fresh copy of the file from the repository"


class Digits(NamedTuple):
    """Images and their labels, row by row."""

    images: Tensor  # [rows, 64] float32, 0…1
    labels: Tensor  # [rows] int64, 0…9


def load(path: Path = DIGITS) -> tuple[Digits, Digits]:
    """Return the training set (1437 rows) and the test set (360 rows), the same on each call."""
    digits = read(path)
    # A generator of its own: the split depends on nobody's seed, and disturbs nobody's numbers.
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0))  # [1797]
    images, labels = digits.images[order], digits.labels[order]
    return (
        Digits(images[:-NUM_TEST_ROWS], labels[:-NUM_TEST_ROWS]),
        Digits(images[-NUM_TEST_ROWS:], labels[-NUM_TEST_ROWS:]),
    )


def batch(digits: Digits, step: int, batch_size: int, seed: int) -> Digits:
    """Return the batch of step `step` (from 0): each epoch is shuffled anew, no row is left out.

    The last batch of an epoch is smaller when the rows do not divide.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}; it must be at least 1")
    num_rows = len(digits.labels)
    batches_per_epoch = -(-num_rows // batch_size)  # division, rounded up
    epoch, index = divmod(step, batches_per_epoch)
    order = _epoch_order(num_rows, epoch, seed)  # [num_rows]
    rows = order[index * batch_size : (index + 1) * batch_size]  # [≤ batch_size]
    return Digits(digits.images[rows], digits.labels[rows])


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, epoch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "shuffle", step=epoch))
    return torch.randperm(num_rows, generator=generator)


def read(path: Path = DIGITS) -> Digits:
    """Read and check the whole file, in its own order."""
    lines = _decompress(path).splitlines()
    table = bytearray()
    for number, line in enumerate(lines, start=1):
        table += _parse_line(line, f"{path}, line {number}")
    if len(lines) != NUM_ROWS:
        raise DataError(f"{path} has {len(lines)} rows instead of {NUM_ROWS}; {REMEDY}")
    rows = torch.frombuffer(table, dtype=torch.uint8).view(NUM_ROWS, NUM_PIXELS + 1)
    return Digits(rows[:, :NUM_PIXELS].float() / MAX_PIXEL, rows[:, NUM_PIXELS].long())


def _decompress(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or not a gzip file ({error}); {REMEDY}") from error
    except EOFError as error:
        raise DataError(f"{path} is cut short; {REMEDY}") from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be read ({reason}); {REMEDY}") from error


def _parse_line(line: bytes, place: str) -> bytes:
    fields = line.split(b",")
    if len(fields) != NUM_PIXELS + 1:
        raise DataError(
            f"{place} has {len(fields)} columns instead of {NUM_PIXELS} pixels and 1 label; "
            f"{REMEDY}"
        )
    # bytes() refuses what is not in 0…255, so a row that parses holds whole numbers that small.
    try:
        row = bytes(map(int, fields))
    except ValueError as error:
        raise DataError(f"{place} holds something other than small numbers; {REMEDY}") from error
    if max(row[:NUM_PIXELS]) > MAX_PIXEL:
        raise DataError(
            f"{place} has a pixel of {max(row[:NUM_PIXELS])}, above {MAX_PIXEL}; {REMEDY}"
        )
    if row[NUM_PIXELS] >= NUM_CLASSES:
        raise DataError(f"{place} has the label {row[NUM_PIXELS]}, above 9; {REMEDY}")
    return row
