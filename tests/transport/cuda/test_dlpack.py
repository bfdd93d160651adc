"""Tensors over memory of ours, by DLPack: here over the CPU's, as over a GPU's."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import threading
import weakref
from ctypes import addressof, c_char
from typing import Any

import pytest
import torch
from jobs import ROOT
from transport_worlds import SOON_S

from transport.cuda.dlpack import DeviceType, tensor_at

HERE = (DeviceType.CPU, 0)


@pytest.fixture
def memory() -> Any:
    return mmap.mmap(-1, 65536)


def over(memory: Any, start: int, nbytes: int, released: list[int]) -> torch.Tensor:
    address = addressof(c_char.from_buffer(memory)) + start
    return tensor_at(address, nbytes, HERE, lambda: released.append(start))


def test_it_is_the_memory_itself_and_of_any_dtype(memory: Any) -> None:
    tensor = over(memory, 64, 48, [])
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex128, torch.int64):
        assert tensor.view(dtype).data_ptr() == tensor.data_ptr()
    tensor.view(torch.float32).view(3, 4).fill_(1.5)
    assert torch.frombuffer(memory, dtype=torch.float32, count=12, offset=64).tolist() == [1.5] * 12
    assert memory[:64] == bytes(64) and memory[112:200] == bytes(88)


def test_it_is_given_back_once_with_the_last_view_of_its_storage(memory: Any) -> None:
    released: list[int] = []
    tensors = [over(memory, 1024 * i, 1024, released) for i in range(4)]
    view = tensors[2].view(torch.float32)[10:20].detach().view(2, 5)
    stored = tensors[3].untyped_storage()
    tensors.clear()
    assert sorted(released) == [0, 1024]
    view.fill_(3)
    del view
    assert sorted(released) == [0, 1024, 2048]
    del stored
    assert sorted(released) == [0, 1024, 2048, 3072]
    gc.collect()
    assert len(released) == 4


def test_it_can_be_trained_on_and_freed_by_autograds_own_threads(memory: Any) -> None:
    released: list[int] = []
    x = over(memory, 0, 4096, released).view(torch.float32).detach().fill_(2.0).requires_grad_()
    loss = (x * x).sum()
    gradient = []
    x.register_hook(lambda g: gradient.append(float(g[0])))
    del x
    assert not released  # the graph has it
    loss.backward()
    del loss
    assert gradient == [4.0] and released == [0]


def test_it_may_be_freed_in_another_thread(memory: Any) -> None:
    released: list[int] = []
    box = [over(memory, 0, 100, released)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join(SOON_S)
    assert released == [0]


def test_it_may_be_freed_while_an_exception_is_on_its_way(memory: Any) -> None:
    released: list[int] = []
    count: Any = len
    with pytest.raises(TypeError, match="exactly one argument"):
        count(over(memory, 0, 100, released), "one too many")
    assert released == [0]


def test_a_forked_child_frees_its_own_copy_alone(memory: Any) -> None:
    released: list[int] = []
    tensor = over(memory, 0, 100, released)
    child = os.fork()
    if child == 0:
        del tensor
        os._exit(0 if released == [0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not released
    assert int(tensor.sum()) == 0


def test_what_is_freed_when_the_interpreter_ends_breaks_nothing() -> None:
    script = """
        import ctypes, sys, threading
        import torch
        from transport.cuda.dlpack import DeviceType, tensor_at
        memory = (ctypes.c_char * 4096)()
        class Box: pass
        box = Box()
        box.me = box  # a circle: freed at the very end, if at all
        def make(say):
            return tensor_at(ctypes.addressof(memory), 4096, (DeviceType.CPU, 0), say)
        box.tensor = make(lambda: print("late", flush=True))
        sys.modules["kept"] = make(lambda: print("later", flush=True))
        torch.kept = make(lambda: print("latest", flush=True))
        x = make(lambda: print("now", flush=True))
        del x
    """
    lines = "\n".join(line[8:] for line in script.splitlines())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", lines],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "now"
    assert done.stderr == ""


def test_what_torch_refuses_is_not_kept(memory: Any) -> None:
    released: set[int] = set()
    kept = weakref.ref(released)
    with pytest.raises(Exception):  # noqa: B017  # whichever torch raises for a device it lacks
        tensor_at(addressof(c_char.from_buffer(memory)), 10, (99, 0), released.clear)  # type: ignore[arg-type]
    del released
    gc.collect()
    assert kept() is None
