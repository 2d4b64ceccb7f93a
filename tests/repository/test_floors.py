"""Imports point downward only: a file of the package imports files of lower floors, never its own or a higher one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the top floor to the bottom. A new file needs a place here: that is a decision, not a formality.
FLOORS = (
    ("persistrnn.__main__",),
    (
        "persistrnn.profiling.command",
        "persistrnn.report",
    ),
    ("persistrnn",),
    ("persistrnn.profiling.run",),
    ("persistrnn.profiling.page",),
    ("persistrnn.profiling.plots",),
    ("persistrnn.profiling.tables",),
    (
        "persistrnn.profiling.advice",
        "persistrnn.profiling.predicted",
    ),
    (
        "persistrnn.profiling.measure",
        "persistrnn.profiling.progress",
        "persistrnn.tables",
    ),
    ("persistrnn.profiling.record",),
    (
        "persistrnn.plots",
        "persistrnn.profiling.subject",
        "persistrnn.profiling.trace",
    ),
    (
        "persistrnn.profiling",
        "persistrnn.rows",
    ),
    ("persistrnn.results",),
    (
        "persistrnn.explain",
        "persistrnn.replacement",
        "persistrnn.streaming",
    ),
    ("persistrnn.modules",),
    ("persistrnn.functional",),
    ("persistrnn.stack",),
    ("persistrnn.time_chunks",),
    ("persistrnn.chunk_ops",),
    (
        "persistrnn.autograd",
        "persistrnn.stepwise",
        "persistrnn.validate",
    ),
    (
        "persistrnn.ops",
        "persistrnn.torch_path",
    ),
    (
        "persistrnn.double_backward",
        "persistrnn.mapping",
        "persistrnn.options",
        "persistrnn.phases",
        "persistrnn.reference",
    ),
    (
        "persistrnn.segments",
        "persistrnn.tracing",
    ),
    (
        "persistrnn.kernels.inspect.audit_command",
        "persistrnn.kernels.inspect.outlook",
        "persistrnn.kernels.inspect.plan_command",
    ),
    (
        "persistrnn.kernels.inspect.audit",
        "persistrnn.kernels.inspect.reasons",
    ),
    (
        "persistrnn.kernels",
        "persistrnn.kernels.inspect",
    ),
    ("persistrnn.kernels.launch",),
    (
        "persistrnn.kernels.inspect.picture",
        "persistrnn.kernels.device.recompute",
        "persistrnn.kernels.device.scan",
    ),
    (
        "persistrnn.kernels.device.product",
        "persistrnn.kernels.device.step_flags",
        "persistrnn.kernels.device.tile_tuples",
    ),
    (
        "persistrnn.kernels.device",
        "persistrnn.kernels.device.exchange",
        "persistrnn.kernels.device.pointwise",
        "persistrnn.kernels.device.tiles",
    ),
    ("persistrnn.kernels.planner.launch_metadata",),
    (
        "persistrnn.kernels.planner.forecast",
        "persistrnn.kernels.planner.pipeline",
    ),
    ("persistrnn.kernels.planner.plan",),
    (
        "persistrnn.kernels.planner.cost",
        "persistrnn.kernels.planner.memory",
        "persistrnn.kernels.planner.occupancy",
    ),
    ("persistrnn.kernels.planner.hardware",),
    (
        "persistrnn.kernels.planner.measurements",
        "persistrnn.kernels.planner.tiling",
    ),
    (
        "persistrnn.kernels.planner",
        "persistrnn.kernels.cells",
        "persistrnn.kernels.tensors",
    ),
)
HEIGHT = {module: -depth for depth, floor in enumerate(FLOORS) for module in floor}
KERNELS_IMPORTER = "persistrnn.ops"
NO_KERNELS = {"persistrnn.kernels.cells", "persistrnn.kernels.tensors"}  # names and numbers, without Triton
PUBLIC = {"persistrnn", "persistrnn.functional", "persistrnn.explain"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("persistrnn", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


FILES = {name_of(path): path for folder in ("persistrnn", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(source: str, package: str) -> Iterator[str]:
    """The modules of persistrnn that a file in ``package`` imports anywhere: by statement, by a call of
    ``import_module`` with a literal name, or as an attribute of ``persistrnn``."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[: package.count(".") + 2 - level] if level else []
                parent = ".".join([*base, *([module] if module else [])])
                found = [f"{parent}.{alias.name}" for alias in names]
                found = [name if name in FILES or name in HEIGHT else parent for name in found]
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found = [name]
            case ast.Attribute(value=ast.Name(id="persistrnn"), attr=attribute):
                found = [name for name in (f"persistrnn.{attribute}",) if name in FILES]
            case _:
                found = []
        yield from (name for name in found if name.split(".")[0] == "persistrnn")


def imports_of(module: str) -> set[str]:
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return set(imports(path.read_text(), package))


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import persistrnn.ops as o, torch", "", ["persistrnn.ops"]),
        ("def f():\n    from .kernels.planner import plan", "persistrnn", ["persistrnn.kernels.planner.plan"]),
        ("from . import ops, _name", "persistrnn", ["persistrnn.ops", "persistrnn"]),
        ("from .. import reference", "persistrnn.kernels", ["persistrnn.reference"]),
        ("from ..ops import forward", "persistrnn.kernels", ["persistrnn.ops"]),
        ("from .cells import CELLS", "persistrnn.kernels", ["persistrnn.kernels.cells"]),
        ("importlib.import_module('persistrnn.kernels.device.scan')", "", ["persistrnn.kernels.device.scan"]),
        ("import persistrnn\npersistrnn.kernels.x", "", ["persistrnn", "persistrnn.kernels"]),
        ("from torch import nn\nfrom persistrnnx import y", "", []),
    ],
)
def test_every_way_to_import_is_seen(source: str, package: str, expected: list[str]) -> None:
    assert list(imports(source, package)) == expected


def test_every_file_has_a_floor() -> None:
    assert FILES.keys() == HEIGHT.keys(), "every file is named in FLOORS, and no other"


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_downward(module: str) -> None:
    upward = [name for name in imports_of(module) if HEIGHT.get(name, 1) >= HEIGHT[module]]
    assert upward == [], f"{module} may import lower floors only: {FLOORS}"


def test_one_file_imports_the_kernels() -> None:
    importers = {
        module
        for module in FILES
        if not module.startswith("persistrnn.kernels")
        and any(name.startswith("persistrnn.kernels") for name in imports_of(module) - NO_KERNELS)
    }
    assert importers <= {KERNELS_IMPORTER}


def test_kernels_import_kernels_only() -> None:
    outside = {
        f"{module}: {name}"
        for module in FILES
        if module.startswith("persistrnn.kernels")
        for name in imports_of(module)
        if not name.startswith("persistrnn.kernels")
    }
    assert outside == set()


# Benchmarks that measure the kernels themselves, and not what users call.
NAMES = (
    "gpu/calibrate", "gpu/command", "gpu/compile_first", "gpu/first_steps", "gpu/micro", "gpu/micro_kernels",
    "gpu/smoke", "gpu/stress", "gpu/tune", "race/arms", "race/engine", "race/test_host",
)  # fmt: skip
MEASURE_KERNELS = {f"bench/{name}.py" for name in NAMES}


def test_benchmarks_use_the_public_surface() -> None:
    """And the results that they write; those that measure the kernels themselves are named, each with good reason."""
    allowed = PUBLIC | {"persistrnn.kernels.cells", "persistrnn.results"}
    inside = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in sorted((ROOT / "bench").rglob("*.py"))
        for name in imports(path.read_text(), "bench")
        if name not in allowed
    }
    kernels = {
        (file, name)
        for file, name in inside
        if file in MEASURE_KERNELS and name.startswith(("persistrnn.kernels", "persistrnn.autograd"))
    }
    assert inside - kernels == set(), f"bench/ may import {sorted(allowed)}, {sorted(MEASURE_KERNELS)} the kernels too"
    assert {file for file, _ in kernels} == MEASURE_KERNELS, "a file that needs no kernels is not on the list"
