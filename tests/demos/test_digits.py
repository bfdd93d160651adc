"""The digits: what is in the file, and what the reader says when it is damaged."""

import gzip
import time
from pathlib import Path

import digits
import pytest
import torch

from barepp.errors import DataError, UsageError


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return gzip.decompress(digits.DIGITS.read_bytes()).splitlines()


def written(tmp_path: Path, lines: list[bytes]) -> Path:
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines), compresslevel=1))
    return path


def test_read_gives_the_numbers_of_the_file(lines: list[bytes]) -> None:
    images, labels = digits.read()
    assert (images.dtype, images.shape) == (torch.float32, (1797, 64))
    assert (labels.dtype, labels.shape) == (torch.int64, (1797,))
    assert images.min() == 0
    assert images.max() == 1
    for row in (0, 1, 900, 1796):
        numbers = [int(field) for field in lines[row].split(b",")]
        assert (images[row] * 16).tolist() == numbers[:64]
        assert labels[row] == numbers[64]


def test_the_split_is_fixed_and_complete() -> None:
    state = torch.default_generator.get_state()
    train, test = digits.load()
    assert len(train.labels) == 1437
    assert len(test.labels) == 360
    for first, again in zip((*train, *test), (*digits.load()[0], *digits.load()[1]), strict=True):
        assert torch.equal(first, again)
    everything = torch.cat([train.images, test.images])
    assert sorted(everything.tolist()) == sorted(digits.read().images.tolist())
    assert test.labels.bincount().min() >= 20  # every digit is in the test set
    assert torch.equal(torch.default_generator.get_state(), state)


def test_reading_is_fast() -> None:
    digits.load()
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process: other programs do not count
        digits.load()
        times.append(time.process_time() - start)
    assert min(times) < 0.15


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 1000])
def test_an_epoch_shows_each_row_once(batch_size: int) -> None:
    rows = digits.Digits(torch.arange(100.0).unsqueeze(1), torch.arange(100))
    num_batches = -(-100 // batch_size)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * num_batches, (epoch + 1) * num_batches)
        batches = [digits.batch(rows, step, batch_size, seed=3) for step in steps]
        assert all(len(b.labels) == batch_size for b in batches[:-1])
        assert all(torch.equal(b.images.flatten(), b.labels.float()) for b in batches)
        order = torch.cat([b.labels for b in batches])
        assert sorted(order.tolist()) == list(range(100))
        epochs.append(order)
    assert not torch.equal(*epochs)


def test_batches_depend_on_step_and_seed_only() -> None:
    train, _ = digits.load()
    torch.manual_seed(1)
    state = torch.default_generator.get_state()
    first = digits.batch(train, 30, 64, seed=0)
    assert torch.equal(torch.default_generator.get_state(), state)
    digits._epoch_order.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(first.images, digits.batch(train, 30, 64, seed=0).images)
    assert not torch.equal(first.images, digits.batch(train, 30, 64, seed=1).images)


def test_a_batch_of_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="batch size is 0"):
        digits.batch(digits.load()[0], 0, 0, seed=0)


DAMAGED_LINES = {
    "a column too few": (lambda line: line.rsplit(b",", 1)[0], "64 columns"),
    "a column too many": (lambda line: line + b",1", "66 columns"),
    "an empty line": (lambda _: b"", "1 columns"),
    "an empty field": (lambda line: b"," + line.split(b",", 1)[1], "other than small numbers"),
    "a word": (lambda line: b"ten," + line.split(b",", 1)[1], "other than small numbers"),
    "a fraction": (lambda line: b"0.5," + line.split(b",", 1)[1], "other than small numbers"),
    "a negative pixel": (lambda line: b"-1," + line.split(b",", 1)[1], "other than small numbers"),
    "a bright pixel": (lambda line: b"17," + line.split(b",", 1)[1], "a pixel of 17, above 16"),
    "a huge pixel": (lambda line: b"300," + line.split(b",", 1)[1], "other than small numbers"),
    "an 11th digit": (lambda line: line.rsplit(b",", 1)[0] + b",10", "the label 10, above 9"),
}


@pytest.mark.parametrize("damage", DAMAGED_LINES)
@pytest.mark.parametrize("row", [0, 816, 1796])
def test_a_damaged_line_is_named(tmp_path: Path, lines: list[bytes], damage: str, row: int) -> None:
    change, message = DAMAGED_LINES[damage]
    path = written(tmp_path, [*lines[:row], change(lines[row]), *lines[row + 1 :], b""])
    with pytest.raises(DataError, match=message) as caught:
        digits.read(path)
    assert f"{path}, line {row + 1} " in str(caught.value)
    assert digits.REMEDY in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [0, 1, 1796, 1798])
def test_a_wrong_number_of_rows_is_named(tmp_path: Path, lines: list[bytes], rows: int) -> None:
    path = written(tmp_path, (lines + lines)[:rows])
    with pytest.raises(DataError, match=f"has {rows} rows instead of 1797"):
        digits.read(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = digits.DIGITS.read_bytes()
    path = tmp_path / "digits.csv.gz"
    end = len(whole)
    for size in [*range(40), *range(1000, end, 9000), *range(end - 9, end)]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError) as caught:
            digits.read(path)
        assert str(path) in str(caught.value)


def test_every_kind_of_flipped_byte_is_noticed(tmp_path: Path) -> None:
    whole = digits.DIGITS.read_bytes()
    path = tmp_path / "digits.csv.gz"
    for position in [0, 1, 2, *range(20, len(whole), 2500), len(whole) - 6, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="fresh copy"):
            digits.read(path)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.gz cannot be read \(No such file"):
        digits.read(tmp_path / "nothing.gz")
    with pytest.raises(DataError, match="cannot be read"):
        digits.read(tmp_path)


def test_a_file_that_is_not_gzip(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv.gz"
    path.write_text("5,6,7")
    with pytest.raises(DataError, match="damaged or not a gzip file"):
        digits.read(path)
