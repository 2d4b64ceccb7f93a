"""The planner: every size has a plan that holds together, or a refusal that says what would help. No GPU, no Triton."""

import ast
import dataclasses
import inspect
import sys
import time

import pytest
from persistrnn.kernels import plan as planning
from persistrnn.kernels.plan import DEVICES, DTYPES, INTERPRETER, Hardware, PlanError, Shape, plan

SHAPES = {"lstm": Shape("lstm", 4, 4, False), "gru": Shape("gru", 3, 4, True)}
PASSES = ("forward", "backward")

# (device, dtype, largest hidden size that every cell must have a plan for)
PROMISED = [
    ("h200", "fp16", 1024),
    ("h200", "bf16", 1024),
    ("h200", "tf32", 768),
    ("h200", "fp32", 768),
    ("h100", "bf16", 1024),
    ("a100", "fp16", 640),
    ("a100", "bf16", 640),
    ("a100", "tf32", 512),
    ("a100", "fp32", 512),
]


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def check_plan(found: planning.Plan) -> None:
    """What must hold for every plan, whatever the rules that made it."""
    shape, hardware, hidden = SHAPES[found.cell], found.hardware, found.hidden
    for name in PASSES:
        part: planning.Pass = getattr(found, name)
        t = part.tiling
        backward = name == "backward"
        assert (t.hidden, t.directions, t.gates, t.saved) == (hidden, found.directions, shape.gates, shape.saved)
        assert t.recurrent_gradient == shape.recurrent_gradient
        assert t.interpreted == (hardware is INTERPRETER)
        assert t.precision == ("tf32" if found.dtype == "tf32" else "ieee")

        assert t.slices * t.units >= hidden, "every unit has an owner"
        assert (t.slices - 1) * t.units < hidden, "no slice is idle"
        assert all(is_power_of_two(n) for n in (t.units, t.batch_tile, t.splits, part.warps))
        assert t.splits in (1, part.warps), "one part of K per warp, or no parts"
        assert t.units >= 16, "a dot needs 16 rows"
        assert t.batch_tile >= 8, "a dot needs 8 columns"
        assert part.warps * 32 <= 1024, "threads of one program"

        # Chunks cover K exactly once, from 0 on, without a gap or an overlap.
        covered = [k for chunk in t.chunks for k in range(chunk.start, chunk.start + chunk.length)]
        assert covered == list(range(shape.gates * hidden if backward else hidden))
        for chunk in t.chunks:
            assert is_power_of_two(chunk.size)
            assert chunk.size >= chunk.length >= 1
            assert chunk.size // t.splits >= 16, "each part of a chunk is at least one dot deep"
        if t.slices == 1:
            assert all(chunk.size == t.units for chunk in t.chunks), "the operand is the tile of the state itself"

        assert sum(t.packs) == (1 if backward else shape.gates)
        assert t.first_gates == tuple(sum(t.packs[:i]) for i in range(len(t.packs)))
        assert all(is_power_of_two(n) for n in t.packs)

        jobs = -(-found.batch // t.batch_tile) * found.directions
        assert part.groups >= 1
        assert part.groups * t.slices <= hardware.multiprocessors, "all programs are resident at the same time"
        assert part.groups <= jobs, "no group is idle"
        assert part.rounds * part.groups >= jobs, "every job is done"
        assert (part.rounds - 1) * part.groups < jobs, "no round is empty"

        rows = sum(t.packs) * t.units
        assert part.resident == rows * sum(chunk.size for chunk in t.chunks) * DTYPES[found.dtype]
        assert part.resident < part.shared <= hardware.shared, "W_hh and the moving operand fit"


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize(("device", "dtype", "largest"), PROMISED)
def test_every_promised_size_has_a_sound_plan(cell, device, dtype, largest):
    for hidden in range(1, largest + 1):
        try:
            check_plan(plan(SHAPES[cell], hidden, 16, 1, dtype, DEVICES[device]))
        except (AssertionError, PlanError) as error:
            raise AssertionError(f"H={hidden}: {error}") from error


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("hidden", [1, 16, 100, 129, 320, 768, 1000, 1024])
def test_every_batch_has_a_sound_plan(cell, directions, hidden):
    for batch in (1, 2, 15, 16, 17, 64, 100, 512, 5000, 1 << 20):
        check_plan(plan(SHAPES[cell], hidden, batch, directions, "bf16", DEVICES["h200"]))


@pytest.mark.parametrize("cell", SHAPES)
def test_interpreter_plans_one_slice_for_every_size(cell):
    for hidden in (1, 10, 16, 17, 100, 512, 2048):
        for batch in (1, 31, 32, 200):
            found = plan(SHAPES[cell], hidden, batch, 2, "fp32", INTERPRETER)
            check_plan(found)
            assert found.forward.tiling.slices == found.backward.tiling.slices == 1


def test_a_partition_of_a_device_is_planned_for_as_what_it_is():
    """A third of an H200: fewer groups at a time in more rounds, or a refusal where one group does not fit."""
    third = Hardware("third", 90, 44, 232_448)
    found = plan(SHAPES["lstm"], 256, 512, 1, "bf16", third)
    check_plan(found)
    assert found.forward.rounds > plan(SHAPES["lstm"], 256, 512, 1, "bf16", DEVICES["h200"]).forward.rounds
    with pytest.raises(PlanError, match=r"hidden_size=1024 .* third .* 44 multiprocessors"):
        plan(SHAPES["lstm"], 1024, 16, 1, "bf16", third)


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_size_is_planned_or_refused_in_full(cell, dtype, device):
    """Past the promise, too, a size is either planned soundly or refused with value, limits and remedy."""
    hardware = DEVICES[device]
    refused = 0
    for hidden in (512, 640, 641, 700, 768, 769, 800, 1024, 1025, 1288, 1536, 2048, 2112, 2113, 4096, 65_536):
        try:
            found = plan(SHAPES[cell], hidden, 64, 2, dtype, hardware)
        except PlanError as error:
            refused += 1
            text = str(error)
            needed = SHAPES[cell].gates * hidden * hidden * DTYPES[dtype]
            given = (f"hidden_size={hidden}", dtype, device, f"{needed:,} bytes")
            limits = (f"{hardware.multiprocessors} multiprocessors", f"{hardware.shared:,} bytes")
            remedies = ("smaller hidden_size", "backend='torch'")
            for part in given + limits + remedies:
                assert part in text, f"{part!r} is missing in: {text}"
            assert ("float16 or bfloat16" in text) == (DTYPES[dtype] == 4), "a smaller dtype helps only where one is"
        else:
            check_plan(found)
    assert refused > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": 0}, "hidden_size must be at least 1, got 0"),
        ({"hidden": -3}, "hidden_size must be at least 1, got -3"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 1, got -1"),
        ({"directions": 0}, "directions must be 1 or 2, got 0"),
        ({"directions": 3}, "directions must be 1 or 2, got 3"),
        ({"dtype": "fp8"}, "dtype must be one of fp16, bf16, tf32, fp32, got 'fp8'"),
        ({"dtype": "float32"}, "dtype must be one of fp16, bf16, tf32, fp32, got 'float32'"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(changed, message):
    arguments = {"hidden": 64, "batch": 16, "directions": 1, "dtype": "bf16"} | changed
    with pytest.raises(ValueError, match="got") as caught:
        plan(SHAPES["lstm"], hardware=DEVICES["h200"], **arguments)
    assert str(caught.value) == message
    assert not isinstance(caught.value, PlanError), "a wrong argument is not a size that does not fit"


def test_refusal_is_a_value_error():
    assert issubclass(PlanError, ValueError)


@pytest.mark.parametrize("hidden", [64, 1024])
def test_plan_is_frozen_cached_and_compile_time_material(hidden):
    arguments = (SHAPES["gru"], hidden, 16, 1, "bf16", DEVICES["h200"])
    found = plan(*arguments)
    assert plan(*arguments) is found
    part, t = found.forward, found.forward.tiling
    for record in (found, part, t, t.chunks[0], found.hardware, SHAPES["gru"]):
        hash(record)
        assert record == dataclasses.replace(record)
        for field in dataclasses.fields(record):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record, field.name, None)


@pytest.mark.parametrize(
    ("hidden", "expected"), [(64, ("1 slice x 64 units", "no exchange")), (512, ("32 slices x 16 units", "exchange"))]
)
def test_plan_prints_what_it_decided(hidden, expected):
    found = plan(SHAPES["lstm"], hidden, 64, 2, "bf16", DEVICES["h200"])
    text = str(found)
    parts = [getattr(found, name) for name in PASSES]
    numbers = [f"{n:,} " for part in parts for n in (part.resident, part.shared, found.hardware.shared)]
    head = (f"lstm H={hidden} B=64 D=2 bf16 on h200", "sm_90", "132 multiprocessors")
    for piece in (*head, *PASSES, *expected, *numbers, "0 streamed"):
        assert piece in text, f"{piece!r} is missing in:\n{text}"
    assert all(len(line) <= 160 for line in text.splitlines())


def test_the_plan_does_not_know_the_number_of_steps():
    """Else a new length would be a new plan, and perhaps a new compilation."""
    assert list(inspect.signature(plan).parameters) == ["cell", "hidden", "batch", "directions", "dtype", "hardware"]


@pytest.mark.parametrize("device", ["h200", "a100"])
@pytest.mark.parametrize("hidden", [64, 100, 512])
def test_a_batch_changes_the_grid_and_nothing_that_is_compiled(device, hidden):
    found = [plan(SHAPES["gru"], hidden, batch, 1, "bf16", DEVICES[device]) for batch in (1, 3, 16, 17, 64, 999)]
    for name in PASSES:
        assert len({dataclasses.replace(getattr(p, name), groups=0, rounds=0) for p in found}) == 1
    assert len({p.forward.groups for p in found}) > 1


def test_plan_is_quick():
    """Uncached, the median of 5 per size: a scheduler's hiccup is not the planner's."""
    slowest = {}
    for hidden in (1, 128, 129, 1000, 1024):
        times = []
        for _ in range(5):
            plan.cache_clear()
            start = time.perf_counter()
            plan(SHAPES["lstm"], hidden, 4096, 2, "bf16", DEVICES["h200"])
            times.append(time.perf_counter() - start)
        slowest[hidden] = sorted(times)[2]
    assert max(slowest.values()) < 0.005, slowest


def test_planner_imports_the_standard_library_only():
    tree = ast.parse(inspect.getsource(planning))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "plan.py imports no file of the package"
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Name):
            assert node.id not in ("__import__", "open", "exec", "eval")
    assert imported <= set(sys.stdlib_module_names)
    assert not imported & {"os", "random", "time"}, "the same question has the same answer, everywhere"


@pytest.mark.parametrize("total", [1, 15, 16, 17, 100, 129, 320, 512, 768, 1000, 1024, 4096, 4097])
@pytest.mark.parametrize(("smallest", "largest"), [(16, 16), (16, 512), (128, 512), (128, 128)])
def test_chunks_cover_a_range_once(total, smallest, largest):
    found = planning.chunks(total, smallest, largest)
    assert [k for c in found for k in range(c.start, c.start + c.length)] == list(range(total))
    assert all(is_power_of_two(c.size) and smallest <= c.size <= largest and c.length <= c.size for c in found)
    assert sum(c.size for c in found) <= max(smallest, total * 4 / 3 + smallest), "little of it is padding"


def test_chunks_as_documented():
    assert [c.size for c in planning.chunks(320, 16, 512)] == [256, 64]
    assert [c.size for c in planning.chunks(768, 16, 512)] == [512, 256]


def test_shapes_are_the_cells_own():
    """The numbers above are those that the kernels run with (needs Triton, which the rest of this file does not)."""
    pytest.importorskip("triton")
    from persistrnn.kernels.cells import CELLS
    from persistrnn.kernels.launch import shape_of

    assert {name: shape_of(cell) for name, cell in CELLS.items()} == SHAPES
