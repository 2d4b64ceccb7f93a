"""The planner: every size has a plan that holds together, or a refusal that says what would help. No GPU, no Triton."""

import collections
import contextlib
import dataclasses
import re

import pytest
from soundness import DTYPES, PASSES, SHAPES, check_plan, keeps_its_registers, workloads

from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import choices
from persistrnn.kernels.planner import plan as planning
from persistrnn.kernels.planner.hardware import DEVICES, INTERPRETER
from persistrnn.kernels.planner.plan import BATCH_CLASSES, PlanError, plan_layer
from persistrnn.kernels.planner.problem import BYTES, Problem

H200 = DEVICES["h200"]


def sound(cell, hidden, batch, directions, dtype, hardware):
    """A plan, checked; a failure says for what."""
    try:
        found = plan_layer(Problem(SHAPES[cell], hidden, batch, directions, dtype, hardware))
        check_plan(found)
    except (AssertionError, PlanError) as error:
        raise AssertionError(f"{cell} H={hidden} B={batch} D={directions} {dtype} {hardware.name}: {error}") from error
    return found


def test_the_workload_tables_are_all_there():
    cells = [cell for cell, _, _ in workloads()]
    assert cells.count("lstm") >= 25
    assert cells.count("gru") >= 25
    assert {("lstm", 1150, 80), ("gru", 2816, 32), ("lstm", 768, 256)} <= set(workloads())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_workload_has_a_sound_plan(device, dtype):
    for number, (cell, hidden, batch) in enumerate(workloads()):
        directions = 1 + number % 2
        found = sound(cell, hidden, batch, directions, dtype, DEVICES[device])
        what = f"{cell} H={hidden} B={batch} D={directions}"
        assert keeps_its_registers(found.forward), what
        assert keeps_its_registers(found.backward), what


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_small_size_has_a_sound_plan(device, dtype):
    for hidden in (*range(1, 200, 9), 8, 16, 64, 127, 128, 129, 200):
        sound("lstm" if hidden % 2 else "gru", hidden, 16, 1 + hidden % 2, dtype, DEVICES[device])


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_large_size_has_a_sound_plan(device, dtype, cell):
    for number, hidden in enumerate((1000, 1150, 1840, 3000, 4096)):
        for batch, directions in (((1, 2), (200, 1)), ((16, 1), (64, 2)))[number % 2]:
            sound(cell, hidden, batch, directions, dtype, DEVICES[device])


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_past_the_promise_a_size_is_planned_or_refused_in_full(device, dtype, cell):
    hardware = DEVICES[device]
    for hidden in (6000, 8192, 12_000, 16_384):
        outcomes = []
        for batch in (1, 64):
            try:
                check_plan(plan_layer(Problem(SHAPES[cell], hidden, batch, 1, dtype, hardware)))
                outcomes.append(True)
            except PlanError as error:
                outcomes.append(False)
                text = str(error)
                needed = SHAPES[cell].gates * hidden * hidden * BYTES[dtype]
                given = (f"hidden_size={hidden}", dtype, device, f"{needed:,} bytes")
                limits = (f"{hardware.multiprocessors} multiprocessors", f"{hardware.shared:,} bytes")
                for part in (*given, *limits, "smaller hidden_size", "backend='torch'"):
                    assert part in text, f"{part!r} is missing in: {text}"
                assert ("float16 or bfloat16" in text) == (dtype in ("tf32", "fp32")), "only where that is smaller"
        # A batch can always be cut into the tiles of a smaller one.
        assert len(set(outcomes)) == 1, f"H={hidden}: planned for batches 1 and 64: {outcomes}"


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("hidden", [1, 16, 100, 129, 320, 768, 1000, 1024])
def test_every_batch_has_a_sound_plan(cell, directions, hidden):
    for batch in (1, 2, 15, 16, 17, 64, 100, 512, 5000, 70_001, 1 << 20):
        sound(cell, hidden, batch, directions, "bf16", H200)


@pytest.mark.parametrize("cell", SHAPES)
def test_interpreter_plans_one_slice_for_every_size(cell):
    for hidden in (1, 10, 16, 17, 100, 512, 2048):
        for batch in (1, 31, 32, 200):
            found = sound(cell, hidden, batch, 2, "fp32", INTERPRETER)
            assert found.forward.tiling.slices == found.backward.tiling.slices == 1


@pytest.mark.parametrize(("cell", "hidden", "batch", "dtype", "warps"), [
    ("lstm", 256, 16, "bf16", (4, 4)),
    ("lstm", 512, 16, "tf32", (4, 4)),
    ("lstm", 256, 1, "tf32", (4, 4)),
    ("lstm", 256, 16, "fp32", (8, 8)),
    ("mgu", 256, 16, "tf32", (4, 8)),  # 8 rows of weights, 16 of the batch
    ("gru_reset_before", 256, 16, "bf16", (4, 4)),
    ("layer_norm_gru", 256, 1, "bf16", (4, 4)),
])  # fmt: skip
def test_small_tiles_have_as_many_warps_as_the_clock_says(cell, hidden, batch, dtype, warps):
    found = plan_layer(Problem(CELLS[cell], hidden, batch, 1, dtype, H200))
    assert (found.forward.choice.warps, found.backward.choice.warps) == warps


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("directions", [1, 2])
def test_batches_share_their_kernels(cell, directions):
    """All batches of a layer need at most one kernel per class. What is compiled of a pass is its tiling, with its
    number of warps and of registers."""

    def compiled(batch, name):
        part = getattr(plan_layer(Problem(SHAPES[cell], 512, batch, directions, "bf16", H200)), name)
        return part.tiling, part.choice.warps, planning.register_limit(part.choice)

    for name in PASSES:
        of_class = {size: compiled(size, name) for size in BATCH_CLASSES}
        kernels = set()
        for batch in {*range(1, 5001, 31), *(max(1, size + d) for size in BATCH_CLASSES for d in (-1, 0, 1))}:
            found = compiled(batch, name)
            assert found == of_class[next((size for size in BATCH_CLASSES if batch <= size), BATCH_CLASSES[-1])]
            kernels.add(found)
        assert len(kernels) <= len(BATCH_CLASSES)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    ("cell", "hidden", "batch", "dtype", "device", "least"),
    [
        ("lstm", 1840, 16, "bf16", "h200", 1.0),
        ("lstm", 2048, 16, "bf16", "h200", 1.0),
        ("gru", 2048, 16, "bf16", "h200", 1.0),
        ("gru", 1150, 80, "bf16", "h200", 1.0),
        ("lstm", 1024, 16, "tf32", "a100", 0.5),
    ],
)
def test_large_layers_stay_on_the_device(cell, hidden, batch, dtype, device, least, directions):
    found = sound(cell, hidden, batch, directions, dtype, DEVICES[device])
    assert min(found.forward.shares.resident, found.backward.shares.resident) >= least


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "largest"), [("fp16", 64), ("bf16", 64), ("tf32", 32), ("fp32", 16)])
def test_small_layers_may_be_one_slice(device, cell, dtype, largest):
    """No exchange at all where the weights and the arithmetic are small, and little of a batch is padding: among what
    the plan weighs, and taken of what is smallest, for which nothing else is there."""
    for hidden in (*range(1, largest, 5), largest):
        for batch in (1, 8, 16, 128):
            problem = Problem(SHAPES[cell], hidden, batch, 1, dtype, DEVICES[device])
            found = plan_layer(problem)
            for backward, taken in enumerate((found.forward, found.backward)):
                every = choices.choices(problem, bool(backward))
                weighed = [planning.finish(problem, bool(backward), choice) for choice in every]
                local = [part for part in weighed if part and part.tiling.slices == 1]
                part = min(local, key=lambda part: part.predicted)
                assert part.cost.state == 0
                assert part.predicted >= taken.predicted
                assert hidden > 8 or taken == part, f"H={hidden} B={batch}"
                assert batch > 16 or part.tiling.batch_tile * part.tiling.subtiles <= 16


@pytest.mark.parametrize("cell", SHAPES)
def test_a_partition_of_a_device_is_planned_for_as_what_it_is(cell):
    """A third of an H200: fewer groups at a time, and less of W_hh stays."""
    third = dataclasses.replace(H200, name="third", multiprocessors=44)
    for hidden in (16, 256, 1024, 2048):
        for dtype in DTYPES:
            sound(cell, hidden, 512, 1, dtype, third)
    whole, part = (plan_layer(Problem(SHAPES[cell], 2048, 16, 1, "bf16", device)).forward for device in (H200, third))
    assert part.shares.resident < whole.shares.resident
    assert part.predicted > whole.predicted


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_that_holds_no_slice_is_refused(cell, dtype):
    tiny = dataclasses.replace(H200, name="tiny", shared=2048)
    with pytest.raises(PlanError) as caught:
        plan_layer(Problem(SHAPES[cell], 1024, 16, 1, dtype, tiny))
    size = SHAPES[cell].gates * 1024 * 1024 * (2 if dtype in ("fp16", "bf16") else 4)
    given = "hidden_size=1024", dtype, "tiny", f"{size:,} bytes", "132 multiprocessors", "2,048 bytes"
    assert [part for part in (*given, "smaller", "backend='torch'") if part not in str(caught.value)] == []
    assert planning.best(Problem(SHAPES[cell], 1024, 16, 1, dtype, tiny), False) is None, "and the search ends"


@pytest.mark.parametrize("cell", SHAPES)
def test_offsets_past_31_bits_are_refused(cell):
    gates = SHAPES[cell].gates
    with pytest.raises(PlanError, match="hidden_size=70000") as caught:
        plan_layer(Problem(SHAPES[cell], 70_000, 16, 1, "bf16", H200))
    assert "backend='torch'" in str(caught.value)
    largest = int(re.search(r"up to (\d+)", str(caught.value))[1])
    assert gates * largest * (largest + 8) < 2**31, "what is allowed has offsets of 31 bits, padded rows and all"
    assert gates * (largest + 16) ** 2 > 2**31, "and is not far from the limit"
    with contextlib.suppress(PlanError):  # it is too large for another reason
        check_plan(plan_layer(Problem(SHAPES[cell], largest, 1, 1, "bf16", H200)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": 0}, "hidden_size must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"directions": 3}, "directions must be 1 or 2, got 3"),
        ({"dtype": "fp8"}, "dtype must be one of fp16, bf16, tf32, fp32, got 'fp8'"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(changed, message):
    arguments = {"hidden": 64, "batch": 16, "directions": 1, "dtype": "bf16"} | changed
    with pytest.raises(ValueError, match="got") as caught:
        Problem(SHAPES["lstm"], hardware=H200, **arguments)
    assert str(caught.value) == message
    assert not isinstance(caught.value, PlanError), "a wrong argument is not a size that does not fit"


@pytest.mark.parametrize("hidden", [64, 1024])
def test_plan_is_frozen_cached_and_compile_time_material(hidden):
    problem = Problem(SHAPES["gru"], hidden, 16, 1, "bf16", H200)
    found = plan_layer(problem)
    assert plan_layer(dataclasses.replace(problem)) is found
    plan_layer.cache_clear()
    planning.best.cache_clear()
    assert plan_layer(problem) == found, "the same question has the same answer"
    part = found.forward
    for record in (problem, found, part, part.tiling, part.choice, part.shares, part.cost):
        hash(record)
        assert record == dataclasses.replace(record)
        for field in dataclasses.fields(record):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record, field.name, None)


def streams(cell, hidden, batch, device="h200", dtype="bf16", weights=""):
    """Both passes, and of each whether it streams through a ring."""
    problem = Problem(SHAPES[cell], hidden, batch, 1, dtype, DEVICES[device], weight_dtype=weights)
    found = plan_layer(problem)
    return (found.forward, found.backward), [part.choice.ring > 0 for part in (found.forward, found.backward)]


@pytest.mark.parametrize(("cell", "hidden"), [("lstm", 4096), ("lstm", 2048), ("gru", 2560), ("gru", 4096)])
@pytest.mark.parametrize("batch", [16, 64, 128])
def test_what_is_streamed_is_read_once_for_a_wide_tile(cell, hidden, batch):
    passes, wide = streams(cell, hidden, batch)
    for part, is_wide in zip(passes, wide, strict=True):
        assert is_wide == (part.streamed > 0), "else each batch tile reads it again"
        if not is_wide:
            continue
        t = part.tiling
        assert (part.rounds, t.splits, t.subtiles) == (1, 1, 1)
        assert part.groups * t.batch_tile >= batch
        assert all(pack * t.units_formed % 64 == 0 for pack in t.packs), "products of warp groups"
        assert t.m * t.batch_tile <= 128 * 256, "accumulators"
        assert t.batch_tile * t.streamed_k_block * 2 >= 16 * 32 * part.choice.warps, "else h is copied through L1"


def test_where_streams_have_no_ring():
    assert streams("lstm", 4096, 64)[1] == [True, True]
    for other in ({"hidden": 4100}, {"dtype": "tf32"}, {"device": "b200"}, {"device": "mi300x"}, {"weights": "int8"}):
        passes, wide = streams(**{"cell": "lstm", "hidden": 4096, "batch": 64} | other)
        assert passes[0].streamed > 0
        assert wide == [False, False], other
    assert {part.tiling.batch_tile for part in streams("lstm", 4096, 64, "a100")[0]} == {32}


# What an uncached plan of both passes may do, about a quarter more than it does: choices whose weights find homes,
# choices weighed by a bound, choices worked out.
MOST = {(choices, "_filled"): 350, (planning, "_quick"): 150, (planning, "finish"): 35}


def test_plan_takes_little_work(monkeypatch):
    """`make bench` measures its time."""
    calls = collections.Counter()

    def counted(module, name):
        original = getattr(module, name)

        def call(*arguments, **options):
            calls[module, name] += 1
            return original(*arguments, **options)

        return call

    for module, name in MOST:
        monkeypatch.setattr(module, name, counted(module, name))
    for cell, hidden in (("lstm", 1), ("lstm", 128), ("gru", 320), ("lstm", 1000), ("gru", 1024), ("lstm", 2048)):
        for batch in (1, 64, 4096):
            plan_layer.cache_clear()
            planning.best.cache_clear()
            calls.clear()
            plan_layer(Problem(SHAPES[cell], hidden, batch, 2, "bf16", H200))
            assert calls[planning, "_quick"] * calls[planning, "finish"] > 0
            assert all(calls[name] <= MOST[name] for name in MOST), (cell, hidden, batch, calls)
            done = calls.copy()
            plan_layer(Problem(SHAPES[cell], hidden, batch, 2, "bf16", H200))
            assert calls == done, "it is kept"
