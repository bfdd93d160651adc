"""Microbatches: as even as possible, none empty, canonical, and together the batch."""

import pytest
import torch

from barepp.errors import UsageError
from barepp.train.batch import microbatch_sizes, split


@pytest.mark.parametrize("num_microbatches", range(1, 13))
def test_sizes_are_even_larger_first_and_never_empty(num_microbatches: int) -> None:
    for rows in range(1, 40):
        sizes = microbatch_sizes(rows, num_microbatches)
        assert sum(sizes) == rows
        assert len(sizes) == min(rows, num_microbatches)
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("rows", "num_microbatches", "message"),
    [(0, 4, "0 rows"), (8, 0, "num_microbatches is 0"), (8, -2, "num_microbatches is -2")],
)
def test_nothing_to_cut_is_an_error(rows: int, num_microbatches: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        microbatch_sizes(rows, num_microbatches)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (16,), (7, 5), (1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_split_is_canonical_and_complete(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for rows in (1, 2, 7, 11, 32):
        batch = torch.randint(0, 100, (rows, *shape)).to(dtype)
        for num_microbatches in (1, 2, 3, 4, 50):
            sizes = microbatch_sizes(rows, num_microbatches)
            parts = split(batch, sizes)
            assert [len(part) for part in parts] == sizes
            assert torch.equal(torch.cat(parts), batch)
            for part in parts:
                assert part.is_contiguous()
                assert part.data_ptr() % 64 == 0


def test_split_names_the_rows_that_are_missing() -> None:
    with pytest.raises(UsageError, match=r"shape \(9, 2\).*\[4, 4\] rows.*must have 8 rows"):
        split(torch.zeros(9, 2), [4, 4])
    with pytest.raises(UsageError, match=r"shape \(\)"):
        split(torch.tensor(1.0), [1])
