"""Imports point downward only: a room of the house imports rooms below it, and inside a room there is no circle."""

import ast
import graphlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the top to the ground, as patterns of modules; the first one that fits is a module's room.
ROOMS = {
    "tests/helpers": "helpers.*",
    "bench/gpu": "bench.gpu*",
    "bench/cells": "bench.cells*",
    "bench/race": "bench.race*",
    "bench/train": "bench.train*",
    "bench/verdict": "bench.report.notes bench.report.targets",
    "bench/report": "bench.report*",
    "bench": "bench*",
    "surface": "persistrnn persistrnn.__main__ persistrnn.profiling.command",
    "profiling": "persistrnn.profiling*",
    "inspect": "persistrnn.kernels.inspect*",
    "device": "persistrnn.kernels.device*",
    "planner": "persistrnn.kernels.planner*",
    "cells": "persistrnn.kernels.cells",
    "steps": "persistrnn.kernels.cells.*",
    "launch": "persistrnn.kernels*",
    "layers": "persistrnn.*",
}
FROM_THE_TOP = (
    *(
        "tests/helpers",
        "bench/gpu",
        "bench/cells",
        "bench/verdict",
        "bench/race",
        "bench/train",
        "bench/report",
        "bench",
    ),
    *("surface", "profiling", "layers", "inspect", "launch", "device", "steps", "planner", "cells"),
)
BESIDE = {(over, "bench/train") for over in ("bench/gpu", "bench/verdict", "bench/race")} | {
    ("bench/train", "bench/report")
}
# The table of cells derives a built-in one at the first question about it.
DEFERRED = {("persistrnn.kernels.cells", "persistrnn.kernels.cells.library")}
# Outside the kernels what is decided and the operators import them, and nothing else; facts and records are everyone's.
IMPORTERS = {"persistrnn.decide", "persistrnn.ops"}
RECORDS = {
    f"persistrnn.kernels.{name}"
    for name in ("cells", "cells.registration", "cells.variants", "tensors", "planner.typed_json")
}
# Of bench/ those that measure the kernels themselves, and not what users call.
MEASURE_KERNELS = {
    *(f"bench.gpu.{name}" for name in ("calibrate", "command", "compile_first", "journal", "micro", "micro_kernels")),
    *(f"bench.gpu.{name}" for name in ("smoke", "steps", "stress", "tune", "worker")),
    *("bench.race.arms", "bench.race.engine", "bench.race.test_host"),
}
PUBLIC = {"persistrnn", "persistrnn.functional", "persistrnn.calls", "persistrnn.explain"} | RECORDS
PUBLIC |= {"persistrnn.profiling.page", "persistrnn.profiling.drawing"}
NOT_JITTED = {"exchange_on", "fitting"}  # in kernels/device: how an exchange is done there


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = {"kernels": ("persistrnn", "kernels"), "tests": ()}.get(parts[0], parts[:1]) + parts[1:]
    return ".".join(parts).removesuffix(".__init__")


FOLDERS = ("persistrnn", "kernels", "bench", "tests/helpers")
FILES = {name_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def room(module: str) -> str:
    return next(name for name, patterns in ROOMS.items() if any(fnmatch(module, p) for p in patterns.split()))


def imports(source: str, package: str) -> Iterator[str]:
    """What a file in ``package`` imports anywhere: by statement, by a call of ``import_module`` with a literal name, or
    as an attribute of ``persistrnn``. Modules of ours as their files; others as they are written."""
    tree = ast.parse(source)
    types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    of_types = {inner for node in types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        match None if node in of_types else node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[: package.count(".") + 2 - level] if level else []
                parent = ".".join([*base, *([module] if module else [])])
                found = [f"{parent}.{alias.name}" for alias in names]
                found = [name if name in FILES else parent for name in found]
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found = [name]
            case ast.Attribute(value=ast.Name(id="persistrnn"), attr=attribute):
                found = [name for name in (f"persistrnn.{attribute}",) if name in FILES]
            case _:
                found = []
        for name in found:
            helper = f"helpers.{name.split('.')[0]}"  # which pytest puts on the path
            yield helper if helper in FILES else name


@cache
def imports_of(module: str) -> set[str]:
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return set(imports(path.read_text(), package)) - {module}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import persistrnn.ops as o, torch", "", ["persistrnn.ops", "torch"]),
        ("def f():\n    from .kernels.planner import plan", "persistrnn", ["persistrnn.kernels.planner.plan"]),
        ("from . import ops, _name", "persistrnn", ["persistrnn.ops", "persistrnn"]),
        ("from ..ops import forward", "persistrnn.kernels", ["persistrnn.ops"]),
        ("importlib.import_module('persistrnn.kernels.device.scan')", "", ["persistrnn.kernels.device.scan"]),
        ("import persistrnn\npersistrnn.kernels.x", "", ["persistrnn", "persistrnn.kernels"]),
        ("from accuracy import Bound", "helpers", ["helpers.accuracy"]),
    ],
)
def test_every_way_to_import_is_seen(source: str, package: str, expected: list[str]) -> None:
    assert list(imports(source, package)) == expected


def test_imports_point_downward() -> None:
    upward = set()
    for module in FILES.keys() - {"persistrnn"}:  # the front door names what is behind it
        above = FROM_THE_TOP[: FROM_THE_TOP.index(room(module))]
        for name in imports_of(module) & FILES.keys():
            if room(name) in above or (room(module), room(name)) in BESIDE or name.rpartition(".")[0] == module:
                upward.add((module, name))
    assert upward - DEFERRED == set(), f"rooms from the top: {FROM_THE_TOP}"


def test_no_circle() -> None:
    edges = {m: {n for n in imports_of(m) & FILES.keys() if (m, n) not in DEFERRED} for m in FILES}
    graphlib.TopologicalSorter(edges).prepare()


def test_who_imports_the_kernels() -> None:
    inside = {m for m in FILES if m.startswith("persistrnn.kernels")}
    outside = {m for m in FILES if m.startswith("persistrnn") and m not in inside}
    assert {m for m in outside if imports_of(m) & inside - RECORDS} <= IMPORTERS
    assert {(m, n) for m in inside for n in imports_of(m) & outside} == set(), "kernels import kernels only"


def test_the_planner_needs_neither_torch_nor_triton() -> None:
    plain = {m for m in FILES if room(m) in ("planner", "cells")}
    assert {(m, n) for m in plain for n in imports_of(m) if n.split(".")[0] in ("torch", "triton")} == set()


def test_cells_are_derived_when_they_are_asked_for() -> None:
    """Neither at import nor by a list of them, and without Triton."""
    code = """
        import sys
        import persistrnn
        from persistrnn.kernels import cells
        assert "lstm" in cells.CELLS and list(cells.CELLS) and len(cells.CELLS)
        assert not cells._registered
        assert cells.CELLS["lstm"].gates == 4
        heavy = {"triton", "torch._dynamo", "sympy"} & sys.modules.keys()
        assert not heavy, heavy
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_device_s_folder_holds_jitted_functions() -> None:
    """And the records that go into them."""
    for module in (m for m in FILES if room(m) == "device"):
        for node in ast.parse(FILES[module].read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name not in NOT_JITTED:
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                assert "jit" in decorators or "constexpr_function" in decorators, f"{module}.{node.name}"


def test_benchmarks_use_the_public_surface() -> None:
    bench = {m for m in FILES if m.startswith("bench")}
    inner = {(m, n) for m in bench for n in imports_of(m) if n.startswith("persistrnn") and n not in PUBLIC}
    allowed = ("persistrnn.kernels", "persistrnn.autograd", "persistrnn.decide")
    kernels = {(m, n) for m, n in inner if m in MEASURE_KERNELS and n.startswith(allowed)}
    assert inner - kernels == set(), f"bench/ may import {sorted(PUBLIC)}, {sorted(MEASURE_KERNELS)} the kernels too"
    assert {m for m, _ in kernels} == MEASURE_KERNELS & FILES.keys(), "a file that needs no kernels is not on the list"
