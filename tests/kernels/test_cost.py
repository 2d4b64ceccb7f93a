"""The cost model: its sums, its order, its floor; and the planner takes what it says is least. No GPU, no Triton."""

import dataclasses
import math

import pytest
from soundness import DTYPES, PASSES, SHAPES, keeps_its_registers, workloads

from persistrnn.kernels.planner import cost as model
from persistrnn.kernels.planner import plan as planning
from persistrnn.kernels.planner.choices import choices
from persistrnn.kernels.planner.cost import Work, floor, torch_step
from persistrnn.kernels.planner.hardware import DEVICES, Hardware
from persistrnn.kernels.planner.plan import BATCH_CLASSES, plan_layer
from persistrnn.kernels.planner.problem import BYTES, Problem

H200 = DEVICES["h200"]
PARTS = ("compute", "weights", "state", "synchronisation", "pointwise")
BATCHES = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 80, 100, 128, 129, 144, 256, 257, 1000, 1024, 1025, 2049, 5000)
SLACK = 1 + 1e-9  # of sums in another order
SLOWER = {"memory_rate": 0.25, "l2_rate": 0.25, "shared_rate": 0.25, "clock": 0.5, "exchange": 3.0, "barrier": 3.0}


def slower(hardware: Hardware, field: str) -> Hardware:
    return dataclasses.replace(hardware, **{field: getattr(hardware, field) * SLOWER[field]})


LARGE = [(cell, hidden, batch) for cell in SHAPES for hidden in (1840, 3000, 4096) for batch in (1, 16, 128)]


def passes_of_workloads(device: str, dtype: str):
    for number, (cell, hidden, batch) in enumerate((*workloads(), *LARGE)):  # of which some are streamed
        directions = 1 + number % 2
        found = plan_layer(Problem(SHAPES[cell], hidden, batch, directions, dtype, DEVICES[device]))
        for name in PASSES:
            yield f"{cell} H={hidden} B={batch} D={directions} {name}", found, getattr(found, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_parts_add_up_and_are_never_below_the_floor(device, dtype):
    for what, found, part in passes_of_workloads(device, dtype):
        assert 0 < found.floor <= part.predicted, what
        values = [getattr(part.cost, name) for name in PARTS]
        assert all(math.isfinite(value) and value >= 0 for value in values), what
        assert math.isclose(sum(values), part.cost.total), what
        assert min(part.cost.pointwise, part.cost.synchronisation) > 0, what
        # The product of a stream through a ring is in the time of its weights.
        assert part.cost.compute > 0 or (part.choice.ring and not part.tiling.k_blocks), what
        if part.tiling.slices == 1:
            assert part.cost.state == 0, what
        elif part.choice.splits > 1:
            assert part.cost.state > 0, what
        if part.in_shared == part.streamed == 0:
            assert part.cost.weights == 0, f"{what}: weights in registers cost nothing"
    assert {field.name for field in dataclasses.fields(model.Cost)} == set(PARTS)


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_floor_is_in_order(device, cell):
    """Of more work, and on a slower device, the floor is not lower."""
    shape, hardware = SHAPES[cell], DEVICES[device]
    for dtype in DTYPES:
        for hidden in (16, 256, 1024, 4096):
            floors = [floor(Problem(shape, hidden, batch, 1, dtype, hardware)) for batch in BATCHES]
            assert floors == sorted(floors), f"H={hidden} {dtype}"
            for batch in (1, 64):
                least = floor(Problem(shape, hidden, batch, 1, dtype, hardware))
                assert floor(Problem(shape, hidden, batch, 2, dtype, hardware)) >= least
                for field in SLOWER:
                    assert floor(Problem(shape, hidden, batch, 1, dtype, slower(hardware, field))) >= least, field
                arithmetic = 2 * shape.gates * hidden**2 * batch / (hardware.rate(dtype) * 1e6)
                assert least >= arithmetic


@pytest.mark.parametrize("cell", SHAPES)
@pytest.mark.parametrize("device", ["a100", "h200", "rtx5090", "mi300x"])
def test_a_larger_batch_is_never_cheaper(device, cell):
    sizes = ((16, "bf16"), (100, "fp32"), (129, "fp32"), (512, "bf16"), (1150, "bf16"), (2048, "tf32"))
    for number, (hidden, dtype) in enumerate(sizes):
        given = SHAPES[cell], hidden, 1 + number % 2, dtype, DEVICES[device]
        found = [plan_layer(Problem(*given[:2], batch, *given[2:])) for batch in BATCHES]
        for name in PASSES:
            most = 0.0
            for p in found:
                now = getattr(p, name).predicted
                assert now * SLACK >= most, f"H={hidden} B={p.batch} D={p.directions} {dtype} {name}"
                most = max(most, now)


@pytest.mark.parametrize("field", SLOWER)
@pytest.mark.parametrize("device", ["a100", "h200", "mi300x"])
def test_a_slower_device_is_never_faster(device, field):
    """The same choice takes at least as long there, and so does the plan, for batches that a plan is made for."""
    hardware = DEVICES[device]
    sizes = ((16, "bf16"), (129, "fp32"), (512, "fp16"), (1150, "bf16"), (4096, "tf32"))
    for number, cell in enumerate(SHAPES):
        for hidden, dtype in (sizes[::2], sizes[1:])[number]:
            for batch, directions in ((1, 1), (16, 2), (64, 1), (BATCH_CLASSES[-1], 1)):
                what = f"{cell} H={hidden} B={batch} D={directions} {dtype}"
                shape = SHAPES[cell], hidden, batch, directions, dtype
                before, after = (plan_layer(Problem(*shape, h)) for h in (hardware, slower(hardware, field)))
                for name in PASSES:
                    part = getattr(before, name)
                    there = Problem(*shape, slower(hardware, field))
                    same = planning.finish(there, name == "backward", part.choice, strict=False)
                    assert same.cost.total * SLACK >= part.cost.total, f"{what} {name}: the same choice"
                    if batch in BATCH_CLASSES:
                        assert getattr(after, name).predicted * SLACK >= part.predicted, f"{what} {name}"


@pytest.mark.parametrize("field", ["exchange", "barrier"])
def test_an_exchange_costs_what_it_costs(field):
    """Only slices that wait for each other pay for an exchange; all programs pay for barriers."""
    for hidden in (8, 1024):
        part = plan_layer(Problem(SHAPES["lstm"], hidden, 16, 1, "bf16", H200)).forward
        same = planning.finish(Problem(SHAPES["lstm"], hidden, 16, 1, "bf16", slower(H200, field)), False, part.choice)
        if field == "exchange" and part.tiling.slices == 1:
            assert same.cost == part.cost
        else:
            assert same.cost.synchronisation > part.cost.synchronisation
    assert part.cost.synchronisation >= H200.exchange, "with one batch tile nothing hides the exchange"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_streamed_weights_cost_their_bytes(device, dtype):
    """At least at the rate of the shared cache, and at the memory's where they exceed that cache."""
    hardware, size, streamed = DEVICES[device], BYTES[dtype], 0
    for cell in SHAPES:
        for hidden in (2048, 3000, 4096):
            found = plan_layer(Problem(SHAPES[cell], hidden, 16, 1, dtype, hardware))
            for part in (found.forward, found.backward):
                t = part.tiling
                cached = hardware.l2_rate * hardware.clock * 1e3  # bytes per microsecond and multiprocessor
                assert part.cost.weights * cached * SLACK >= part.streamed
                everybody = part.streamed * t.slices * part.groups
                assert everybody >= part.shares.streamed
                if everybody > hardware.l2:
                    assert part.cost.weights * hardware.memory_rate * 1e3 * SLACK >= everybody
                placed = hardware.shared_rate * hardware.clock * 1e3
                in_shared = t.m * sum(c.size for c in t.k_blocks[t.in_registers :]) * size
                assert part.cost.weights * placed * SLACK >= model.FITTED.sweep * in_shared
                streamed += part.streamed > 0
    assert streamed > 0


def test_more_of_anything_costs_more():
    """One number of the work or of the choice at a time."""
    part = plan_layer(Problem(SHAPES["lstm"], 1024, 64, 1, "bf16", H200)).forward
    choice = dataclasses.replace(part.choice, k_parts=1, batch_tile=16, subtiles=1, blocks=1)
    work = Work(m=64, k=1024, in_shared=512, streamed=128, slices=64, programs=64)

    def total(choice=choice, **changed):
        problem = Problem(SHAPES["lstm"], 1024, 64, 1, "bf16", H200)
        return model.step(problem, choice, dataclasses.replace(work, **changed), backward=False).total

    for field, value in (("m", 128), ("k", 2048), ("in_shared", 1024), ("streamed", 512)):
        assert total(**{field: value}) > total(), field
    for field, value in (("batch_tile", 32), ("subtiles", 2), ("k_parts", 2), ("burst", choice.burst // 8)):
        assert total(dataclasses.replace(choice, **{field: value})) > total(), field
    crowd = 2 * H200.multiprocessors
    assert total(dataclasses.replace(choice, blocks=2), programs=crowd) > total(programs=crowd // 2)
    assert total(slices=1, programs=1) < total(), "who has nobody to wait for waits for nobody"
    two = total(dataclasses.replace(choice, subtiles=2))
    assert two <= 2 * total(), "two batch tiles in turn hide a part of each other's exchange"


@pytest.mark.parametrize("dtype", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize(
    ("cell", "hidden", "device"),
    [
        ("gru", 129, "a100"), ("gru", 256, "h200"), ("lstm", 512, "mi300x"), ("lstm", 1150, "a100"),
        ("gru", 2048, "h200"), ("lstm", 4096, "rtx5090"),
    ],
)  # fmt: skip
def test_the_planner_takes_the_least(cell, hidden, device, dtype):
    """No other choice that fits is predicted to be faster."""
    for batch, directions in zip(BATCH_CLASSES[:6:2], (1, 2, 1), strict=True):
        problem = Problem(SHAPES[cell], hidden, batch, directions, dtype, DEVICES[device])
        found = plan_layer(problem)
        for name in PASSES:
            backward = name == "backward"
            part = getattr(found, name)
            strict = keeps_its_registers(part)
            others = [planning.finish(problem, backward, c, strict) for c in choices(problem, backward, strict)]
            assert others
            least = min((other for other in others if other is not None), key=lambda other: other.predicted)
            assert part.predicted <= least.predicted * SLACK, f"B={batch} {name}: {part.choice}, but {least.choice}"


def test_a_choice_that_does_not_fit_is_not_a_pass(monkeypatch):
    part = plan_layer(Problem(SHAPES["lstm"], 1024, 16, 1, "bf16", H200)).forward

    def finish(choice, **changed):
        device = dataclasses.replace(H200, **changed)
        return planning.finish(Problem(SHAPES["lstm"], 1024, 16, 1, "bf16", device), False, choice)

    assert finish(part.choice) == part
    assert finish(part.choice, shared=part.shared - 1) is None, "too little shared memory"
    few = (part.tiling.slices - 1) // part.choice.blocks
    assert finish(part.choice, multiprocessors=few) is None, "one multiprocessor short"
    more = dataclasses.replace(part.choice, in_registers=1024, in_shared=0, units=64)
    assert finish(more) is None, "too few registers"

    monkeypatch.setattr(planning, "register_limit", lambda choice: 255)
    twice = dataclasses.replace(part.choice, blocks=2)
    for shared, fits in ((2 * part.shared + 2048, True), (2 * part.shared, False)):
        found = finish(twice, shared=shared)
        assert (found is not None) == fits, "each of two programs takes another 1024 bytes"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_own_path_takes_time(device, dtype):
    for cell, hidden, batch in workloads():
        for directions in (1, 2):
            forward, backward = (
                torch_step(Problem(SHAPES[cell], hidden, batch, directions, dtype, DEVICES[device]), b)
                for b in (False, True)
            )
            what = f"{cell} H={hidden} B={batch} D={directions}"
            assert 0 < forward <= backward < math.inf, what
            if (cell, dtype) != ("lstm", "fp16"):  # cuDNN's persistent kernel has a published time, of one device
                arithmetic = 2 * directions * SHAPES[cell].gates * hidden**2 * batch
                assert forward >= arithmetic / (DEVICES[device].rate(dtype) * 1e6), what


def test_torchs_persistent_kernel_is_for_what_cudnn_has_one_for():
    published = torch_step(Problem(SHAPES["lstm"], 768, 16, 1, "fp16", DEVICES["h100"]), False)
    assert published == 1.96, "measured by others on an H100, LSTM H=768, B=16, fp16"
    for cell, hidden, batch, directions, dtype in (
        ("gru", 768, 16, 1, "fp16"), ("lstm", 769, 16, 1, "fp16"), ("lstm", 1152, 16, 1, "fp16"),
        ("lstm", 768, 17, 1, "fp16"), ("lstm", 768, 136, 1, "fp16"), ("lstm", 768, 16, 2, "fp16"),
        ("lstm", 768, 16, 1, "tf32"),
    ):  # fmt: skip
        assert torch_step(Problem(SHAPES[cell], hidden, batch, directions, dtype, DEVICES["h100"]), False) > published
