"""Who imports whom, and what is never imported: read from the sources, and from fresh processes."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import LIMIT_S, ROOT, launch

PACKAGES = ["demos", "barepp", "transport"]  # each may use itself and what stands after it
MAY_NAME_TORCH_DISTRIBUTED = {
    "transport/torch_dist/transport.py",
    "transport/bench/links.py",
    "barepp/bench/teams/torch_rank.py",
    "barepp/bench/start.py",  # in the text of the script that torchrun runs
    "barepp/bench/faults/script.py",
}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who depends on whom"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def in_fresh_python(code: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import barepp; barepp.Action; barepp.make_schedule; barepp.JobFailed; barepp.balance",
        "import barepp.plan.__main__",
        "import barepp.timeline, barepp.plan.chart_image",
        "import barepp.launch.__main__",
        "import barepp.top, barepp.stacks",
        "import barepp.launch.run",
        "import barepp.worker.external.environment; import barepp.launch.hosts.rendezvous_process",
        "import barepp; barepp.testing.run_with_fault",
        "import transport",
        "import transport.rendezvous.server",
        "import transport.rendezvous.client",
        "import transport.wire.decoder",
        "import transport.registry; transport.registry.transport_names()",
        "from barepp.plan.__main__ import main; "
        "main('--schedule 1f1b --stages 4 --microbatches 8'.split())",
    ],
)
def test_the_pure_parts_start_without_torch(statement: str) -> None:
    found = in_fresh_python(
        f"{statement}\nimport sys\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert found.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("module", "most"), [("barepp.train.pipeline", 42)])
def test_the_core_loads_few_files(module: str, most: int) -> None:
    """Devices, tracing, several hosts, faults and the profiler come where they are used."""
    loaded = in_fresh_python(
        f"import {module}, sys\n"
        "ours = ('barepp', 'transport')\n"
        "print(*sorted(name for name in sys.modules if name.partition('.')[0] in ours))"
    ).splitlines()[-1]
    assert len(loaded.split()) <= most, loaded


@pytest.mark.parametrize(("module", "most"), [("inproc", 9), ("sockets.transport", 20)])
def test_the_cpu_path_loads_few_files_and_no_optional_room(module: str, most: int) -> None:
    """What a person has to read before messages pass between threads, or over sockets."""
    found = in_fresh_python(
        f"import sys, transport.{module}\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] == 'transport'))"
    )
    loaded = found.splitlines()[-1].split()
    assert len(loaded) <= most, loaded
    rooms = {name.split(".")[1] for name in loaded if "." in name}
    assert not rooms & {"device", "cuda", "torch_dist", "shm", "rendezvous", "bench"}
    gpu = {"gpu_mailbox", "gpu_stager", "copy_thread"}
    assert not gpu & {name.rpartition(".")[2] for name in loaded}


def test_to_get_into_a_world_loads_few_files_and_no_optional_room() -> None:
    """Sockets, other launchers, GPUs and faults are imported by the ranks that use them."""
    found = in_fresh_python(
        "import sys, barepp.worker.init\n"
        "ours = [m for name, m in sys.modules.items() if name[:6] in ('barepp', 'transp')]\n"
        "print(*(m.__name__ for m in ours if not hasattr(m, '__path__')))"
    )
    loaded = found.splitlines()[-1].split()
    assert len(loaded) <= 13, loaded
    parts = {part for name in loaded for part in name.split(".")}
    assert not parts & {"external", "faults", "sockets", "cuda", "trace", "monitor", "rendezvous"}


@pytest.mark.parametrize("package", ["barepp", "transport"])
def test_type_checkers_see_the_names_that_are_imported_at_first_use(package: str) -> None:
    body = ast.parse((ROOT / package / "__init__.py").read_bytes()).body
    shown = next(node for node in body if isinstance(node, ast.If)).body
    names = {
        f"{node.module}.{alias.name}"
        for node in shown
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    module = importlib.import_module(package)
    homes = {f"{home}.{name}" for home, names in module._NAMES.items() for name in names}
    assert names == {name.replace("testing.testing", "testing") for name in homes}


def test_dependencies_point_one_way() -> None:
    for position, package in enumerate(PACKAGES):
        forbidden = set(PACKAGES[:position])
        for path in sources(package):
            used = {name.partition(".")[0] for name in imports(path)}
            assert not used & forbidden, f"{path.relative_to(ROOT)} imports {used & forbidden}"
    demos = {path.stem for path in sources("demos")}  # a demo is imported by its bare name
    for package in ("barepp", "transport"):
        for path in sources(package):
            assert not {name.partition(".")[0] for name in imports(path)} & demos


def test_the_pure_zone_needs_the_standard_library_alone() -> None:
    paths = sources("barepp/program") + sources("barepp/schedules") + sources("barepp/plan")
    paths += [ROOT / "barepp/errors.py", ROOT / "barepp/timeline.py"]
    paths += [ROOT / "barepp/trace" / f"{name}.py" for name in PURE_TRACE]
    for path in paths:
        for name in imports(path):
            top = name.partition(".")[0]
            if path.name == "chart_image.py" and top == "matplotlib":
                continue  # the extra `plot`
            assert top == "barepp" or top in sys.stdlib_module_names, f"{path}: {name}"


PURE_TRACE = ("recorder", "analysis", "step_breakdown", "chrome_format", "chrome_reader")


def test_nobody_names_torch_distributed() -> None:
    for package in PACKAGES:
        for path in sources(package):
            if str(path.relative_to(ROOT)) not in MAY_NAME_TORCH_DISTRIBUTED:
                text = path.read_text()
                assert "torch.distributed" not in text or _only_in_words(text), path


def _only_in_words(text: str) -> bool:
    """Whether the name stands in docstrings and comments alone."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "distributed" in ast.unparse(node):
            return False
        if isinstance(node, ast.Attribute) and node.attr == "distributed":
            return False
    return True


def test_nothing_from_the_network_can_be_evaluated() -> None:
    """transport/ imports no unpickler and calls neither eval nor exec nor anything of the kind."""
    for path in sources("transport"):
        for name in imports(path):
            top = name.partition(".")[0]
            assert top not in {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, (
                f"{path}: {name}"
            )
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__"}, f"{path}: {called}"
                assert called not in {"torch.load", "torch.save", "yaml.load"}, f"{path}: {called}"


def test_no_path_of_a_machine_stands_in_a_source() -> None:
    for package in [*PACKAGES, "tests"]:
        for path in sources(package):
            text = path.read_text()
            for word in ("/" + "root/", "/" + "home/", "/" + "work/"):
                assert word not in text, f"{path} mentions {word}"


def test_training_needs_nothing_of_torch_distributed(tmp_path: Path) -> None:
    """A run in which each of its doors raises still trains, and to the same loss on every rank."""
    script = """
        import torch, torch.distributed as dist

        def forbidden(*args, **kwargs):
            raise AssertionError("torch.distributed was used")

        for name in ("init_process_group", "send", "recv", "isend", "irecv", "broadcast",
                     "all_reduce", "barrier", "new_group"):
            setattr(dist, name, forbidden)
        for name in ("TCPStore", "FileStore", "HashStore", "PrefixStore", "ProcessGroupGloo"):
            setattr(dist, name, forbidden)

        import barepp, sys
        with barepp.init() as world:
            pipe = barepp.Pipeline(
                world, barepp.mlp(4, 8, 8, 3), torch.nn.functional.cross_entropy,
                schedule="1f1b", num_microbatches=4, seed=1,
            )
            optimizer = torch.optim.Adam(pipe.parameters(), lr=0.05)
            generator = torch.Generator().manual_seed(0)
            inputs = torch.randn(16, 8, generator=generator)
            targets = torch.randint(0, 3, (16,), generator=generator)
            losses = []
            for _ in range(20):
                pipe.zero_grad()
                losses.append(pipe.step(inputs, targets).item())
                optimizer.step()
            assert "transport.torch_dist.transport" not in sys.modules
            print(losses[0], losses[-1])
    """
    job = launch(tmp_path, script, "--world", "2")
    assert job.code == 0, job.err
    (first,), (second,) = job.said(0), job.said(1)
    assert first == second
    before, after = map(float, first.split())
    assert after < before / 2
