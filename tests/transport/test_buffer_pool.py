"""Received memory that is used again: once its last storage is freed, and within a bound."""

from __future__ import annotations

import gc

import pytest
import torch
import transport_worlds as worlds
from transport_worlds import SOON_S

from transport.message.specs import MessageSpec, TensorSpec
from transport.sockets.buffer_pool import POOLED_NBYTES, Pool

MIB = 1024 * 1024
LARGE = MessageSpec((TensorSpec(torch.float32, (POOLED_NBYTES // 4,)),), False)
LARGER = MessageSpec((TensorSpec(torch.int64, (5, MIB)),), False)


def test_memory_is_used_again_when_its_last_storage_is_freed_and_not_before() -> None:
    pool = Pool()
    (first,) = pool.allocate(LARGE)
    place = first.data_ptr()
    view = first.view(4, -1)[3].detach()
    del first
    (second,) = pool.allocate(LARGE)
    assert second.data_ptr() != place
    del view
    (third,) = pool.allocate(LARGE)
    assert third.data_ptr() == place
    assert pool.idle_nbytes == 0
    del second, third
    assert pool.idle_nbytes == 2 * POOLED_NBYTES


def test_tensors_have_what_their_specs_say_and_small_ones_are_torchs_own() -> None:
    pool = Pool()
    small = TensorSpec(torch.int8, (3,))
    spec = MessageSpec(
        (LARGE.tensors[0], small, LARGER.tensors[0], TensorSpec(torch.bool, ())), True
    )
    with torch.inference_mode():
        made = pool.allocate(spec)
    assert MessageSpec.of(tuple(made)) == spec
    for tensor in made:
        assert not tensor.is_inference()
        assert tensor.data_ptr() % 64 == 0
    del tensor, made
    assert pool.idle_nbytes == LARGE.nbytes + LARGER.nbytes
    tensors = pool.allocate(MessageSpec((small,), False))
    tensors[0].resize_(100)  # as any tensor of torch's


def test_what_is_idle_stays_within_the_bound_and_fits_what_was_received_last() -> None:
    pool = Pool(idle_nbytes=LARGE.nbytes + LARGER.nbytes - 1)
    for spec in (LARGE, LARGER, LARGE):
        made = pool.allocate(spec)
        del made
        assert pool.idle_nbytes == spec.nbytes
    made = Pool(idle_nbytes=LARGE.nbytes - 1).allocate(LARGE)
    del made


def test_nothing_is_kept_after_close() -> None:
    pool = Pool()
    (kept,) = pool.allocate(LARGE)
    made = pool.allocate(LARGE)
    del made
    pool.close()
    assert pool.idle_nbytes == 0
    kept.fill_(3)
    assert int(kept[-1]) == 3  # its own, as long as it is held
    del kept
    assert pool.idle_nbytes == 0


def test_nothing_is_kept_of_what_comes_back_while_another_thread_closes() -> None:
    class ClosedMeanwhile(Pool):
        @property
        def idle_nbytes(self) -> int:  # (the bound is asked for in the midst of it)
            self.close()
            return 0

    pool = ClosedMeanwhile()
    made = pool.allocate(LARGE)
    del made
    assert not any(pool._idle.values())


def test_a_block_that_the_garbage_collector_finds_comes_back_too() -> None:
    pool = Pool()
    (tensor,) = pool.allocate(LARGE)
    circle: list[object] = [tensor]
    circle.append(circle)
    del tensor, circle
    gc.collect()
    assert pool.idle_nbytes == LARGE.nbytes


@pytest.mark.parametrize("name", ["unix", "tcp"])
def test_large_messages_are_received_into_the_same_memory(name: str) -> None:
    with worlds.world(name, 2) as (one, other):
        places = []
        for number in range(3):
            other.isend(torch.full((POOLED_NBYTES,), number, dtype=torch.uint8), 0)
            tensor = one.recv(1, timeout=SOON_S)
            assert bool((tensor == number).all())
            places.append(tensor.data_ptr())
            del tensor
        assert len(set(places)) == 1
