"""The undocumented names of torch and of Python's standard library that this repository uses.

1. No other file uses such a name; tests/test_private_names.py reads every source.
2. Each function says which versions have the name, why it is needed, and what happens where it is
   missing: a slower way, a feature less, or an error that names the version.
3. "All" means Python 3.10 to 3.13 and torch 2.6 to 2.14. README.md lists those with which the whole
   suite has run.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import datetime

    from torch import Tensor, nn

# -- torch: layers and autograd -------------------------------------------------------------------

IMPORTED_BY_OPTIMIZERS: Final = "torch._dynamo"
"""Versions: all. An optimizer imports it at its first use, which takes as long as importing torch;
a process that forks the ranks imports it once for all of them. Missing: nothing is preloaded."""


def import_for_optimizers() -> None:
    """Import what an optimizer imports at its first use, where this torch has it."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(IMPORTED_BY_OPTIMIZERS)


_LAYER_HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def call_is_forward(layer: nn.Module) -> bool:
    """Whether `layer(x)` does nothing but `layer.forward(x)`: no hooks, not compiled.

    Versions: all. The names are the dicts of hooks and the compiled call of a module. Needed to
    call a plain layer's forward directly. Missing: the answer is no, and torch's own way is taken.
    """
    from torch.nn.modules import module

    hooks = [getattr(layer, name, True) for name in _LAYER_HOOKS]
    for_all = [getattr(module, f"_global{name}", True) for name in _LAYER_HOOKS]
    compiled = getattr(layer, "_compiled_call_impl", True)
    return compiled is None and not any(hooks) and not any(for_all)


def autograd_engine() -> Callable[..., Any]:
    """Return what `torch.autograd.backward` and `torch.autograd.grad` call in the end.

    Versions: all. Those two first compare the shapes of outputs and gradients, and import sympy to
    do so: 0.4 s of each process's first step, and 30 µs a call (I of 8 small layers takes 0.45 ms
    with this and 0.76 ms with theirs). Missing: an AttributeError when a stage is imported.
    """
    from torch.autograd import Variable

    engine: Any = Variable._execution_engine
    run: Callable[..., Any] = engine.run_backward
    return run


def was_written_to(tensor: Tensor) -> bool:
    """Whether an in-place operation has changed a tensor since it was made.

    Versions: all; torch's notes on autograd name the counter. Needed to tell one graph about a
    write that happened in the next one. Missing: an AttributeError at the first split backward.
    """
    return tensor._version > 0


def sparse_values(tensor: Tensor) -> Tensor:
    """Return the memory of a sparse tensor's values, to be written to.

    Versions: all. The documented `values()` refuses a tensor with several values for one place, as
    gradients of embeddings are. Missing: an AttributeError in `LossScaler.step`.
    """
    return tensor._values()


def after_each_operation(
    call: Callable[[Any, Any], None],
) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `call(operation, result)` runs after each operation of this thread.

    Versions: all; torch's notes "Extending PyTorch" name the module. Unlike the documented
    TorchFunctionMode it sees the operations of a backward too. Needed by injected faults alone.
    Missing: an ImportError in the test that injects one.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = function(*args, **(kwargs or {}))
            call(function, made)
            return made

    mode: contextlib.AbstractContextManager[Any] = Mode()  # type: ignore[no-untyped-call]
    return mode


def forked_after_cuda() -> bool:
    """Whether this process was forked from one that had asked CUDA something.

    Versions: all. CUDA cannot be used then, and says only that there is no GPU. Missing: the answer
    is no, and the error is CUDA's own.
    """
    import torch

    return bool(getattr(torch.cuda, "_is_in_bad_fork", lambda: False)())


# -- torch: process groups for the gloo and nccl transports ---------------------------------------


def gloo_options(gloo: Any, device: Any, threads: int, timeout: datetime.timedelta) -> Any:
    """Return the options of a gloo process group.

    Versions: all. Needed to make one without `init_process_group`. Missing: an AttributeError when
    the gloo transport opens.
    """
    options = gloo._Options()
    options._devices = [device]
    options._threads = threads
    options._timeout = timeout
    return options


def nccl_options(nccl: Any, timeout: datetime.timedelta) -> Any:
    """Return the options of an NCCL process group; versions and reason as in `gloo_options`."""
    options = nccl.Options()
    options._timeout = timeout
    return options


# -- multiprocessing: a fork server of one's own ---------------------------------------------------
#
# multiprocessing has one fork server a program, which cannot be ended. A job needs its own: it must
# not disturb another job, nor the program that calls `barepp.run`.


def new_fork_server() -> Any:
    """Return a fork server that belongs to the caller, or None where there is no such class.

    Versions: all. Missing: the caller uses multiprocessing's own server, which then outlives the
    job until the program ends.
    """
    if hasattr(forkserver, "ForkServer") and hasattr(forkserver, "connect_to_new_process"):
        return forkserver.ForkServer()
    return None


@contextlib.contextmanager
def starting_from(server: Any) -> Iterator[None]:
    """Let `Process.start` ask this server for a child; the caller holds a lock.

    Versions: those of `new_fork_server`. `Process.start` looks the function up in its module.
    """
    usual = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = usual


@contextlib.contextmanager
def sockets_in(make_folder: Callable[[], str]) -> Iterator[None]:
    """Let multiprocessing make the server's socket in this folder; the caller holds a lock.

    Versions: all. multiprocessing removes its own folder when the program ends, which a killed
    program never does. Missing: no folder is made, and multiprocessing's own is used.
    """
    config = getattr(multiprocessing.current_process(), "_config", None)
    if not isinstance(config, dict):
        yield
        return
    usual = config.get("tempdir")
    config["tempdir"] = make_folder()
    try:
        yield
    finally:
        config["tempdir"] = usual


def fork_server_pid(server: Any) -> int:
    """Return the process id of a fork server.

    Versions: all. Needed to end it. Missing, or not started: 0, and the server ends by itself, up
    to a second after the job.
    """
    return getattr(server, "_forkserver_pid", None) or 0


def stop_fork_server(server: Any) -> None:
    """Close a fork server's descriptors and wait for its end, after it was killed.

    Versions: all. Missing: they close with the program.
    """
    with contextlib.suppress(OSError):  # its socket's file is gone already
        getattr(server, "_stop", lambda: None)()


def fork_server_alive_fd() -> int | None:
    """Return, once, the descriptor by which a process keeps its fork server alive, or None.

    Versions: all. A rank must not outlive the launcher by way of its server. Missing: None; the
    server then ends with its last rank.
    """
    server: Any = getattr(forkserver, "_forkserver", None)
    alive_fd: int | None = getattr(server, "_forkserver_alive_fd", None)
    if alive_fd is not None:
        server._forkserver_alive_fd = None
    return alive_fd


# -- the end of a process --------------------------------------------------------------------------


def join_threads() -> None:
    """Wait for the script's threads, thread pools included, as Python does when a program ends.

    Versions: all. A fork server ends its children without it. Missing: threads are not waited for.
    """
    getattr(threading, "_shutdown", lambda: None)()


def run_exit_handlers() -> None:
    """Run what the script gave to `atexit`; a fork server ends its children without that.

    Versions: all. Missing: an AttributeError at the end of each rank.
    """
    atexit._run_exitfuncs()


def forget_exit_handlers() -> None:
    """Forget the exit handlers, finalizers and thread pools that a forked process has copied.

    Versions: all. They are the program's, to be run there and not here; its pools have no threads
    here, and waiting for one's own is an error. Missing: an AttributeError for `atexit`; for the
    others the program's finalizers run in the rank too.
    """
    atexit._clear()
    # weakref.finalize has a list of its own, and tells atexit once.
    finalizers: Any = weakref.finalize
    if hasattr(finalizers, "_registry") and hasattr(finalizers, "_registered_with_atexit"):
        finalizers._registry.clear()
        finalizers._registered_with_atexit = False
    pools: Iterable[tuple[str, str]] = (
        ("thread", "_threads_queues"),
        ("process", "_threads_wakeups"),
    )
    for module, name in pools:
        getattr(sys.modules.get(f"concurrent.futures.{module}"), name, {}).clear()
